//! Images from archives and directories.
//!
//! Owns: reading docker-archive (`docker save`), oci-archive tarballs and OCI layout directories
//! into the store. Refuses: networks, and trust in an archive's names: they are only keys.

use std::io::Read;
use std::path::PathBuf;

use crate::progress::Progress;
use crate::store::{Image, ImageStore, StoreError};

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

impl ImageStore {
    /// Loads every image of `source`: a tarball (docker-archive or oci-archive, found out by
    /// looking, compressed or not), an OCI layout directory, or one of these with its kind said:
    /// `docker-archive:FILE`, `oci-archive:FILE[:TAG]`, `oci:DIR[:TAG]`.
    ///
    /// # Errors
    /// [`LoadError`] with what is wrong with the source. Nothing of it is in the store then.
    pub fn load(&self, source: &str, progress: &dyn Progress) -> Result<Vec<Image>, LoadError> {
        let _ = progress;
        Err(LoadError::Archive {
            what: source.to_owned(),
            reason: String::new(),
        })
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
    ) -> Result<Vec<Image>, LoadError> {
        let _ = (reader, progress);
        Err(LoadError::Archive {
            what: what.to_owned(),
            reason: String::new(),
        })
    }
}
