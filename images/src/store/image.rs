//! One image as callers see it, and finding it by name or ID.
//!
//! Owns: [`Image`], `resolve`, `list`. Refuses: changing anything on disk.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;

use super::{Entry, ImageStore, Result, StoreError};
use crate::digest::Digest;
use crate::manifest::Manifest;
use crate::progress::Progress;
use crate::reference::Reference;

/// An image that is complete in the store (its layers' blobs are; ask
/// [`ImageStore::unpacked_layers`] for its directories).
#[derive(Debug, Clone)]
pub struct Image {
    /// Digest of its configuration: the image's ID.
    pub id: Digest,
    /// Digest of its manifest.
    pub digest: Digest,
    /// Its tags, sorted; empty when a newer image took its tag.
    pub references: Vec<Reference>,
    /// `NAME@DIGEST` by which registries know it, sorted; empty for a loaded image.
    pub repo_digests: Vec<Reference>,
    /// What to run, and how.
    pub config: ImageConfiguration,
    /// Its layers, base first.
    pub layers: Vec<Layer>,
    /// Bytes of manifest, configuration and layers as stored (compressed).
    pub size: u64,
}

/// One layer of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    /// Digest of the blob, as stored (compressed).
    pub digest: Digest,
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Digest of this layer on all below it (image-spec config.md "Layer ChainID").
    pub chain_id: Digest,
    /// Bytes of the blob.
    pub size: u64,
}

impl Image {
    /// Its layers as the manifest `digest` and the configuration list them.
    pub(crate) fn from_parts(
        digest: Digest,
        manifest_bytes: u64,
        manifest: &Manifest,
        config: &[u8],
    ) -> Result<Self> {
        let parsed: ImageConfiguration = serde_json::from_slice(config).map_err(|error| {
            StoreError::InvalidImage(format!("configuration {}: {error}", manifest.config.digest))
        })?;
        let diff_ids = parsed.rootfs().diff_ids();
        if diff_ids.len() != manifest.layers.len() {
            return Err(StoreError::InvalidImage(format!(
                "manifest {digest} lists {} layers, its configuration {}",
                manifest.layers.len(),
                diff_ids.len()
            )));
        }
        let mut layers: Vec<Layer> = Vec::with_capacity(diff_ids.len());
        for (blob, diff_id) in manifest.layers.iter().zip(diff_ids) {
            let diff_id: Digest = diff_id
                .parse()
                .map_err(|error| StoreError::InvalidImage(format!("layer diff id: {error}")))?;
            let chain_id = match layers.last() {
                None => diff_id.clone(),
                Some(below) => Digest::of(format!("{} {diff_id}", below.chain_id).as_bytes()),
            };
            layers.push(Layer {
                digest: blob.digest.clone(),
                diff_id,
                chain_id,
                size: blob.size,
            });
        }
        let size = layers
            .iter()
            .map(|l| l.size)
            .fold(manifest.config.size, u64::saturating_add);
        Ok(Self {
            id: manifest.config.digest.clone(),
            digest,
            references: Vec::new(),
            repo_digests: Vec::new(),
            config: parsed,
            layers,
            size: size.saturating_add(manifest_bytes),
        })
    }
}

impl ImageStore {
    /// The image called `name`: a reference, or an ID or a prefix of one (with or without
    /// `sha256:`). A reference wins over an ID prefix, as Docker has it.
    ///
    /// # Errors
    /// When the store is damaged or an ID prefix is ambiguous; an unknown or malformed name is
    /// `Ok(None)`.
    pub fn resolve(&self, name: &str) -> Result<Option<Image>> {
        let entries = self.read_index()?;
        Ok(match self.find(&entries, name)? {
            Some(entry) => Some(self.assemble(entry, &entries)?),
            None => None,
        })
    }

    /// All images, each once, with all its names; sorted by first name, nameless ones last.
    ///
    /// # Errors
    /// When the store is damaged.
    pub fn list(&self) -> Result<Vec<Image>> {
        let entries = self.read_index()?;
        let mut first: BTreeMap<&Digest, &Entry> = BTreeMap::new();
        for entry in &entries {
            first.entry(&entry.image_id).or_insert(entry);
        }
        let images = first.values().map(|entry| self.assemble(entry, &entries));
        let mut images = images.collect::<Result<Vec<_>>>()?;
        images.sort_by_key(|image| {
            let name = image.references.first().map(ToString::to_string);
            (name.is_none(), name, image.id.clone())
        });
        Ok(images)
    }

    /// The unpacked directories of the image's layers, base first (overlayfs lists them the other
    /// way round); layers that are not unpacked yet are. They never change once returned, and
    /// stay as long as the image is in the store.
    ///
    /// # Errors
    /// When a layer is hostile, damaged, or does not fit the disk.
    pub fn unpacked_layers(&self, image: &Image, progress: &dyn Progress) -> Result<Vec<PathBuf>> {
        let _hold = self.hold()?;
        let mut below = Vec::with_capacity(image.layers.len());
        for layer in &image.layers {
            below.push(self.unpacked_layer(layer, &below, progress)?);
        }
        Ok(below)
    }

    /// The entry that `name` means.
    pub(super) fn find<'e>(&self, entries: &'e [Entry], name: &str) -> Result<Option<&'e Entry>> {
        if let Ok(reference) = Reference::parse(name)
            && let Some(entry) = entries.iter().find(|e| e.answers_to(&reference))
        {
            return Ok(Some(entry));
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        let hexadecimal = prefix
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if prefix.is_empty() || prefix.len() > 64 || !hexadecimal {
            return Ok(None);
        }
        let mut found = BTreeMap::new();
        for entry in entries
            .iter()
            .filter(|e| e.image_id.hex().starts_with(prefix))
        {
            found.entry(&entry.image_id).or_insert(entry);
        }
        match found.len() {
            0 | 1 => Ok(found.into_values().next()),
            count => Err(StoreError::Ambiguous {
                prefix: prefix.to_owned(),
                count,
            }),
        }
    }

    /// The image of `chosen`, with the names of all entries of that image: several manifests
    /// may describe it (compressed in other ways, say).
    fn assemble(&self, chosen: &Entry, entries: &[Entry]) -> Result<Image> {
        let digest = &chosen.digest;
        let damaged = |reason: String| StoreError::Damaged {
            path: self.blob_path(digest),
            reason,
        };
        let bytes = self.read_blob(digest, crate::manifest::MAX_BYTES)?;
        let manifest = Manifest::parse(&bytes).map_err(|error| damaged(error.to_string()))?;
        let config = self.read_blob(&manifest.config.digest, crate::manifest::MAX_BYTES)?;
        let mut image = Image::from_parts(digest.clone(), bytes.len() as u64, &manifest, &config)?;
        for entry in entries.iter().filter(|e| e.image_id == chosen.image_id) {
            image.references.extend(entry.tag_reference());
            image.repo_digests.extend(entry.repo_digest());
        }
        image.references.sort();
        image.references.dedup();
        image.repo_digests.sort();
        image.repo_digests.dedup();
        Ok(image)
    }
}
