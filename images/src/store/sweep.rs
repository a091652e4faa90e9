//! Deleting: names, images, and what nothing refers to.
//!
//! Owns: `rmi`, garbage collection, clearing what killed processes left. Refuses: knowing who
//! uses an image; callers say.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::index::{Entry, drop_redundant};
use super::{Image, ImageStore, Result, StoreError, failed, lock};
use crate::digest::Digest;
use crate::manifest::{self, Manifest};
use crate::reference::Reference;
use crate::unpack::remove_tree;

/// One thing that `remove` did, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removed {
    /// A name no longer means the image.
    Untagged(Reference),
    /// The image with this ID is gone.
    Deleted(Digest),
}

/// What a collection freed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Blobs and partial downloads deleted.
    pub blobs: u64,
    /// Their bytes.
    pub blob_bytes: u64,
    /// Unpacked layers deleted.
    pub layers: u64,
    /// True when somebody was using the store, and nothing was deleted: try again later.
    pub busy: bool,
}

impl ImageStore {
    /// Removes the name `name`, and the image with it when that was its last; or, for an ID, the
    /// image with all its names. `in_use` says for an image ID who uses it (a container's name),
    /// if anybody does.
    ///
    /// With `force`, an ID with several names is removed, and an image in use only loses its
    /// names.
    ///
    /// # Errors
    /// [`StoreError::NoSuchImage`]; [`StoreError::InUse`] when the image would go but is in use,
    /// or an ID has several names; or when the store cannot be changed.
    pub fn remove(
        &self,
        name: &str,
        force: bool,
        in_use: &dyn Fn(&Digest) -> Option<String>,
    ) -> Result<Vec<Removed>> {
        let removed = self.change_index(|entries| {
            let found = self
                .find(entries, name)?
                .map(|entry| entry.image_id.clone());
            let image_id = found.ok_or_else(|| StoreError::NoSuchImage {
                name: name.to_owned(),
            })?;
            remove_from(entries, name, &image_id, force, in_use)
        })?;
        if removed.iter().any(|r| matches!(r, Removed::Deleted(_))) {
            self.collect_garbage()?;
        }
        Ok(removed)
    }

    /// Removes every image that has no name and that `in_use` does not claim, and collects.
    ///
    /// # Errors
    /// When the store cannot be changed.
    pub fn prune(
        &self,
        in_use: &dyn Fn(&Digest) -> Option<String>,
    ) -> Result<(Vec<Removed>, Reclaimed)> {
        let removed = self.change_index(|entries| {
            let named: BTreeSet<Digest> = entries
                .iter()
                .filter(|e| e.tag.is_some())
                .map(|e| e.image_id.clone())
                .collect();
            let goes = |e: &Entry| !named.contains(&e.image_id) && in_use(&e.image_id).is_none();
            let gone: BTreeSet<Digest> = entries
                .iter()
                .filter(|e| goes(e))
                .map(|e| e.image_id.clone())
                .collect();
            entries.retain(|e| !goes(e));
            Ok(gone.into_iter().map(Removed::Deleted).collect())
        })?;
        Ok((removed, self.collect_garbage()?))
    }

    /// Deletes blobs and layers that no image needs, and partial downloads. Does nothing, and
    /// says so, while any process holds the store.
    ///
    /// # Errors
    /// When the store is damaged or something cannot be deleted.
    pub fn collect_garbage(&self) -> Result<Reclaimed> {
        self.collect(&BTreeSet::new())
    }

    /// All content that is here, partial or whole, referenced or not.
    pub(crate) fn present(&self) -> Result<BTreeSet<PathBuf>> {
        let mut found = BTreeSet::new();
        for part in ["blobs/sha256", "ingest", "layers"] {
            found.extend(children(&self.path(part))?);
        }
        Ok(found)
    }

    /// As [`ImageStore::collect_garbage`], but what is in `kept` stays.
    pub(crate) fn collect(&self, kept: &BTreeSet<PathBuf>) -> Result<Reclaimed> {
        let Some(_lock) = lock::FileLock::try_exclusive(&self.path("sweep.lock"))? else {
            return Ok(Reclaimed {
                busy: true,
                ..Reclaimed::default()
            });
        };
        let (blobs, layers) = self.referenced()?;
        let mut reclaimed = Reclaimed::default();
        for part in ["blobs/sha256", "ingest"] {
            for path in children(&self.path(part))? {
                let wanted = part != "ingest" && blobs.contains(file_name(&path));
                if !wanted && !kept.contains(&path) {
                    let size = fs::symlink_metadata(&path)
                        .map(|m| m.len())
                        .unwrap_or_default();
                    fs::remove_file(&path).map_err(failed("remove", &path))?;
                    reclaimed.blobs += 1;
                    reclaimed.blob_bytes += size;
                }
            }
        }
        for path in children(&self.path("layers"))? {
            if !layers.contains(file_name(&path)) && !kept.contains(&path) {
                // Out of sight first: a layer that is half deleted must not be found.
                let doomed = self.path("unpack").join(file_name(&path));
                fs::rename(&path, &doomed).map_err(failed("rename", &path))?;
                remove_tree(&doomed).map_err(failed("remove", &doomed))?;
                reclaimed.layers += 1;
            }
        }
        self.clear_scratch()?;
        Ok(reclaimed)
    }

    /// Clears what killed processes left, if nobody is at work. Partial downloads stay: the next
    /// pull resumes them.
    pub(super) fn sweep_leftovers(&self) -> Result<()> {
        if let Some(_lock) = lock::FileLock::try_exclusive(&self.path("sweep.lock"))? {
            self.clear_scratch()?;
        }
        Ok(())
    }

    /// Empties `unpack/` and deletes stray temporary files. Only under the exclusive sweep lock.
    fn clear_scratch(&self) -> Result<()> {
        for path in children(&self.path("unpack"))? {
            remove_tree(&path).map_err(failed("remove", &path))?;
        }
        // index.json may be being replaced right now: its lock covers its temporary file.
        let _index = lock::FileLock::exclusive(&self.path("index.lock"))?;
        for path in children(&self.path("ingest"))? {
            let name = file_name(&path);
            if name.starts_with("write-") || name.starts_with("stage-") {
                fs::remove_file(&path)
                    .or_else(|error| match error.kind() {
                        io::ErrorKind::NotFound => Ok(()),
                        _ => Err(error),
                    })
                    .map_err(failed("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Names of the blobs and layer directories that the index needs.
    fn referenced(&self) -> Result<(BTreeSet<String>, BTreeSet<String>)> {
        let (mut blobs, mut layers) = (BTreeSet::new(), BTreeSet::new());
        for entry in self.read_index()? {
            if !blobs.insert(entry.digest.hex().to_owned()) {
                continue;
            }
            let damaged = |reason: String| StoreError::Damaged {
                path: self.blob_path(&entry.digest),
                reason,
            };
            let bytes = self.read_blob(&entry.digest, manifest::MAX_BYTES)?;
            let manifest = Manifest::parse(&bytes).map_err(|e| damaged(e.to_string()))?;
            let config = self.read_blob(&manifest.config.digest, manifest::MAX_BYTES)?;
            let image = Image::from_parts(entry.digest.clone(), 0, &manifest, &config)?;
            blobs.insert(image.id.hex().to_owned());
            for layer in &image.layers {
                blobs.insert(layer.digest.hex().to_owned());
                layers.insert(layer.chain_id.hex().to_owned());
            }
        }
        Ok((blobs, layers))
    }
}

fn remove_from(
    entries: &mut Vec<Entry>,
    name: &str,
    image_id: &Digest,
    force: bool,
    in_use: &dyn Fn(&Digest) -> Option<String>,
) -> Result<Vec<Removed>> {
    let refused = |reason: String| StoreError::InUse {
        name: name.to_owned(),
        reason,
    };
    let ours = |entry: &Entry| entry.image_id == *image_id;
    let tags: Vec<Reference> = entries
        .iter()
        .filter(|e| ours(e))
        .filter_map(|e| e.tag.clone())
        .collect();
    let asked = Reference::parse(name).ok().filter(|r| tags.contains(r));
    if let Some(tag) = &asked {
        if tags.len() > 1 {
            for entry in entries.iter_mut().filter(|e| e.tag.as_ref() == Some(tag)) {
                entry.tag = None;
            }
            drop_redundant(entries);
            return Ok(vec![Removed::Untagged(tag.clone())]);
        }
    } else if tags.len() > 1 && !force {
        let names = tags
            .iter()
            .map(Reference::familiar)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(refused(format!(
            "it has several names ({names}); name one, or use force"
        )));
    }
    let mut removed: Vec<Removed> = tags.into_iter().map(Removed::Untagged).collect();
    match in_use(image_id) {
        Some(user) if !force => {
            return Err(refused(format!(
                "it is used by container {user}; remove that first"
            )));
        }
        Some(_) => {
            for entry in entries.iter_mut().filter(|e| ours(e)) {
                entry.tag = None;
            }
            drop_redundant(entries);
        }
        None => {
            entries.retain(|e| !ours(e));
            removed.push(Removed::Deleted(image_id.clone()));
        }
    }
    Ok(removed)
}

fn children(directory: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(directory)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
        .map_err(failed("list directory", directory))
}

fn file_name(path: &Path) -> &str {
    // The store makes its own names; any other is not referenced.
    path.file_name()
        .and_then(|name| name.to_str())
        .unwrap_or_default()
}
