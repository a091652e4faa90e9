//! Images from archives and directories.
//!
//! Owns: reading docker-archive (`docker save`), oci-archive tarballs and OCI layout directories
//! into the store. Refuses: networks, and trust in an archive's names: they are only keys.

mod archive;
mod bundle;
mod docker;
mod oci;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use self::archive::Archive;
use self::bundle::Bundle;
use crate::progress::Progress;
use crate::reference::Reference;
use crate::store::{Entry, Image, ImageStore, StoreError};

/// Why a load failed.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The source cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The archive is not one of the kinds understood, or is broken.
    #[error("cannot load {what}: {reason}")]
    Archive {
        /// The archive or directory.
        what: String,
        /// Why.
        reason: String,
    },
    /// The archive's own tar or compression is broken, or too large.
    #[error("cannot load {what}")]
    Tar {
        /// The archive.
        what: String,
        /// Why.
        source: crate::unpack::UnpackError,
    },
    /// What it holds cannot be stored or unpacked.
    #[error("cannot store images of {what}")]
    Store {
        /// The archive or directory.
        what: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}

type Result<T> = std::result::Result<T, LoadError>;

/// An image whose content is in the store, and the names it is to have.
struct Found {
    entry: Entry,
    image: Image,
    tags: Vec<Reference>,
}

/// Which description of its images a bundle is read by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `manifest.json` if there is one, else `index.json`.
    Any,
    Docker,
    Oci,
}

impl ImageStore {
    /// Loads every image of `source`: a tarball (docker-archive or oci-archive, found out by
    /// looking, compressed or not), an OCI layout directory, or one of these with its kind said:
    /// `docker-archive:FILE`, `oci-archive:FILE[:TAG]`, `oci:DIR[:TAG]`.
    ///
    /// An image of an OCI layout that is named by a mere tag is called
    /// `localhost/FILE-OR-DIR:TAG` here.
    ///
    /// # Errors
    /// [`LoadError`] with what is wrong with the source. Nothing of it is in the store then
    /// (unless others use the store right now: then what it brought waits for the next sweep).
    pub fn load(&self, source: &str, progress: &dyn Progress) -> Result<Vec<Image>> {
        self.whole_or_nothing(source, || self.load_path(source, progress))
    }

    fn load_path(&self, source: &str, progress: &dyn Progress) -> Result<Vec<Image>> {
        let (kind, rest) = match source.split_once(':') {
            Some(("docker-archive", rest)) => (Kind::Docker, rest),
            Some(("oci-archive" | "oci", rest)) => (Kind::Oci, rest),
            _ => (Kind::Any, source),
        };
        let (path, tag) = split_tag(rest, kind);
        let failed = |error| LoadError::Read {
            path: path.to_owned(),
            source: error,
        };
        if path.metadata().map_err(failed)?.is_dir() {
            let mut bundle = bundle::Directory::new(self, path);
            let kind = if kind == Kind::Any { Kind::Oci } else { kind };
            return self.load_bundle(&mut bundle, kind, tag, progress);
        }
        let file = File::open(path).map_err(failed)?;
        let mut archive = Archive::read(self, Box::new(file), source)?;
        self.load_bundle(&mut archive, kind, tag, progress)
    }

    /// Loads every image of the tarball that `reader` (a pipe, standard input) brings; `what`
    /// names it in errors.
    ///
    /// # Errors
    /// As [`ImageStore::load`].
    pub fn load_reader(
        &self,
        reader: &mut dyn Read,
        what: &str,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>> {
        self.whole_or_nothing(what, || {
            let mut archive = Archive::read(self, Box::new(reader), what)?;
            self.load_bundle(&mut archive, Kind::Any, None, progress)
        })
    }

    /// Runs `load`; when it fails, frees what it brought.
    fn whole_or_nothing<T>(&self, what: &str, load: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.present().map_err(|source| LoadError::Store {
            what: what.to_owned(),
            source,
        })?;
        let loaded = load();
        if loaded.is_err() {
            // Why it failed is what to tell; what cannot be freed now is swept later.
            let _ = self.collect(&before);
        }
        loaded.map_err(|error| match error {
            LoadError::Store { what, source } => LoadError::Store {
                what,
                source: self.explained(source),
            },
            other => other,
        })
    }

    fn load_bundle(
        &self,
        bundle: &mut dyn Bundle,
        kind: Kind,
        tag: Option<&str>,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>> {
        let what = bundle.what();
        let stored = |source| LoadError::Store {
            what: what.clone(),
            source,
        };
        let _hold = self.hold().map_err(stored)?;
        let docker = match kind {
            Kind::Oci => None,
            Kind::Docker | Kind::Any => bundle.read_small("manifest.json")?,
        };
        let found = match docker {
            Some(manifest) => docker::images(self, bundle, &manifest)?,
            None if kind == Kind::Docker => {
                return Err(bundle.broken("it has no manifest.json".to_owned()));
            }
            None => oci::images(self, bundle, tag)?,
        };
        for image in &found {
            let sizes: Vec<_> = image
                .image
                .layers
                .iter()
                .map(|l| (l.digest.clone(), l.size))
                .collect();
            progress.layers(&sizes);
            self.unpacked_layers(&image.image, progress)
                .map_err(stored)?;
        }
        let mut images = Vec::new();
        for Found { entry, image, tags } in found {
            if tags.is_empty() {
                self.record(entry.clone()).map_err(stored)?;
            }
            for tag in tags {
                self.record(Entry {
                    tag: Some(tag),
                    ..entry.clone()
                })
                .map_err(stored)?;
            }
            images.extend(self.resolve(&image.id.to_string()).map_err(stored)?);
        }
        Ok(images)
    }
}

/// `FILE[:TAG]`: a colon belongs to the path if there is such a file.
fn split_tag(text: &str, kind: Kind) -> (&Path, Option<&str>) {
    let whole = Path::new(text);
    match text.rsplit_once(':') {
        Some((path, tag)) if kind == Kind::Oci && !whole.exists() => (Path::new(path), Some(tag)),
        _ => (whole, None),
    }
}
