//! `index.json`: which names mean which manifests.
//!
//! Owns: reading it whole and replacing it whole. Refuses: interpreting manifests. Foreign fields
//! are not kept: the file is the store's own.
//!
//! Each descriptor has one name at most (`org.opencontainers.image.ref.name`, the full
//! reference), and remembers the digest that the registry gave for it, which for a multi-platform
//! image is the index's.

use std::collections::BTreeMap;
use std::io;

use serde::{Deserialize, Serialize};

use super::{ImageStore, Result, StoreError, failed, lock};
use crate::digest::Digest;
use crate::manifest::{self, Pointer};
use crate::reference::Reference;

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const REPO_DIGEST: &str = "dev.hull.image.repo-digest";
const IMAGE_ID: &str = "dev.hull.image.id";

/// Largest index.json accepted, in bytes.
const MAX_INDEX_BYTES: u64 = 256 * 1024 * 1024;

/// One name of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// Digest of the manifest.
    pub(crate) digest: Digest,
    /// Bytes of the manifest.
    pub(crate) size: u64,
    pub(crate) media_type: String,
    /// Digest of the configuration.
    pub(crate) image_id: Digest,
    /// A reference with a tag and no digest.
    pub(crate) tag: Option<Reference>,
    /// `NAME@DIGEST` as the registry has it.
    pub(crate) pinned: Option<Reference>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IndexFile {
    schema_version: u32,
    #[serde(default = "index_type")]
    media_type: String,
    manifests: Vec<Pointer>,
}

fn index_type() -> String {
    manifest::OCI_INDEX.to_owned()
}

impl Entry {
    /// Whether `reference` means this entry. A digest in it wins over its tag, as in Docker.
    pub(crate) fn answers_to(&self, reference: &Reference) -> bool {
        match reference.digest() {
            None => self.tag.as_ref() == Some(reference),
            Some(digest) => self.pinned.as_ref().is_some_and(|pinned| {
                pinned.name() == reference.name()
                    && (pinned.digest() == Some(digest) || self.digest == *digest)
            }),
        }
    }

    pub(crate) fn tag_reference(&self) -> Option<Reference> {
        self.tag.clone()
    }

    pub(crate) fn repo_digest(&self) -> Option<Reference> {
        self.pinned.clone()
    }

    fn to_pointer(&self) -> Pointer {
        let mut pointer = Pointer::new(&self.media_type, self.digest.clone(), self.size);
        let mut note = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                pointer.annotations.insert(key.to_owned(), value);
            }
        };
        note(IMAGE_ID, Some(self.image_id.to_string()));
        note(REF_NAME, self.tag.as_ref().map(ToString::to_string));
        note(REPO_DIGEST, self.pinned.as_ref().map(ToString::to_string));
        pointer
    }

    fn from_pointer(pointer: &Pointer) -> std::result::Result<Self, String> {
        let note = |key: &str| pointer.annotations.get(key);
        let reference = |key: &str| {
            note(key)
                .map(|text| Reference::parse(text))
                .transpose()
                .map_err(|e| e.to_string())
        };
        let image_id = note(IMAGE_ID).ok_or("an image without an ID")?;
        Ok(Self {
            digest: pointer.digest.clone(),
            size: pointer.size,
            media_type: pointer.media_type.clone(),
            image_id: image_id.parse().map_err(|e| format!("image ID: {e}"))?,
            tag: reference(REF_NAME)?,
            pinned: reference(REPO_DIGEST)?,
        })
    }
}

impl ImageStore {
    /// All entries. Needs no lock: the file is only ever replaced whole.
    pub(super) fn read_index(&self) -> Result<Vec<Entry>> {
        let path = self.path("index.json");
        let bytes = match std::fs::metadata(&path) {
            Ok(meta) if meta.len() > MAX_INDEX_BYTES => {
                return Err(StoreError::Damaged {
                    path,
                    reason: "it is too large".to_owned(),
                });
            }
            Ok(_) => std::fs::read(&path).map_err(failed("read", &path))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed("examine", &path)(error)),
        };
        let damaged = |reason: String| StoreError::Damaged {
            path: path.clone(),
            reason,
        };
        let file: IndexFile =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        file.manifests
            .iter()
            .map(|p| Entry::from_pointer(p).map_err(damaged))
            .collect()
    }

    /// Changes the entries under the lock and replaces the file.
    pub(super) fn change_index<T>(
        &self,
        change: impl FnOnce(&mut Vec<Entry>) -> Result<T>,
    ) -> Result<T> {
        let _lock = lock::FileLock::exclusive(&self.path("index.lock"))?;
        let mut entries = self.read_index()?;
        let before = entries.clone();
        let result = change(&mut entries)?;
        if entries != before {
            let file = IndexFile {
                schema_version: 2,
                media_type: index_type(),
                manifests: entries.iter().map(Entry::to_pointer).collect(),
            };
            let path = self.path("index.json");
            let bytes = serde_json::to_vec(&file).map_err(|error| StoreError::Damaged {
                path: path.clone(),
                reason: error.to_string(),
            })?;
            self.write_atomically(&path, &bytes)?;
        }
        Ok(result)
    }

    /// Records `entry`, whose content must be complete in the store. A tag is taken from the
    /// image that had it.
    pub(crate) fn record(&self, entry: Entry) -> Result<()> {
        self.change_index(|entries| {
            if entry.tag.is_some() {
                for other in entries.iter_mut().filter(|other| other.tag == entry.tag) {
                    other.tag = None;
                }
            }
            entries.push(entry);
            drop_redundant(entries);
            Ok(())
        })
    }
}

/// Drops nameless entries that say nothing which another entry does not say too.
pub(super) fn drop_redundant(entries: &mut Vec<Entry>) {
    let mut known: BTreeMap<(Digest, Option<Reference>), ()> = BTreeMap::new();
    let mut images: BTreeMap<Digest, ()> = BTreeMap::new();
    for entry in entries.iter().filter(|e| e.tag.is_some()) {
        known.insert((entry.digest.clone(), entry.pinned.clone()), ());
        images.insert(entry.image_id.clone(), ());
    }
    // Pinned ones before the wholly nameless, so that the latter see them.
    for pinned in [true, false] {
        entries.retain(|entry| {
            if entry.tag.is_some() || entry.pinned.is_some() != pinned {
                return true;
            }
            let fresh = known
                .insert((entry.digest.clone(), entry.pinned.clone()), ())
                .is_none();
            let first = images.insert(entry.image_id.clone(), ()).is_none();
            fresh && (pinned || first)
        });
    }
}
