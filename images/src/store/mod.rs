//! The image store: one directory that every command and every user process shares.
//!
//! Owns: the layout below, its locks, and what may be deleted when. Refuses: networks and
//! archives (they bring bytes through [`Ingest`]), and mounts.
//!
//! ```text
//! DIR/                 0700: layers hold setuid files and device nodes that the host's other
//!                      users must not reach (whoever mounts a layer must do so nodev, or inside
//!                      a guest)
//!   oci-layout         an OCI image layout (image-spec image-layout.md)
//!   index.json         one descriptor per name; replaced whole, under index.lock
//!   blobs/sha256/HEX   verified content; appears by rename, complete
//!   layers/HEX/        an unpacked layer, named by its chain id; appears by rename, complete
//!   ingest/HEX         a partial download, flocked by its downloader
//!   unpack/HEX.PID.N/  a layer being unpacked
//!   index.lock         flock, exclusive: index.json is being replaced
//!   sweep.lock         flock, shared: unreferenced content is in use (pull, load, unpack, a
//!                      container being made); exclusive: garbage is being deleted
//! ```

mod blobs;
mod image;
mod index;
mod layers;
mod lock;
mod sweep;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub(crate) use blobs::Ingest;
pub use image::{Image, Layer};
pub(crate) use index::Entry;
pub use sweep::{Reclaimed, Removed};

use crate::digest::Digest;
use crate::unpack::{Limits, UnpackError};

/// The content-addressed store. Cheap to clone; all clones and all processes share the directory.
#[derive(Debug, Clone)]
pub struct ImageStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    root: PathBuf,
    limits: Limits,
}

/// Keeps unreferenced content from being swept while it lives.
///
/// Take one before resolving an image, and drop it when a container that names the image is
/// recorded on disk.
#[derive(Debug)]
#[must_use]
pub struct Hold {
    _lock: lock::FileLock,
}

/// Why the store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The store's own files are not what they should be.
    #[error("image store is damaged: {}: {reason}", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Content does not have the digest it was asked for by.
    #[error("digest mismatch: expected {expected}, got {actual}")]
    DigestMismatch {
        /// Digest asked for.
        expected: Digest,
        /// Digest of what came.
        actual: Digest,
    },
    /// Content does not have the size it was declared with.
    #[error("size mismatch for {digest}: declared {declared} bytes, got {actual}")]
    SizeMismatch {
        /// The content.
        digest: Digest,
        /// Bytes declared by the manifest.
        declared: u64,
        /// Bytes seen, at least.
        actual: u64,
    },
    /// No image has this name or ID.
    #[error("no such image: {name}")]
    NoSuchImage {
        /// What was asked for.
        name: String,
    },
    /// An ID prefix names several images.
    #[error("image ID {prefix} is ambiguous: {count} images begin with it")]
    Ambiguous {
        /// What was asked for.
        prefix: String,
        /// How many images have it.
        count: usize,
    },
    /// The image cannot be deleted.
    #[error("cannot remove image {name}: {reason}")]
    InUse {
        /// What was asked for.
        name: String,
        /// Who holds it, and what to do.
        reason: String,
    },
    /// A layer could not be unpacked.
    #[error("cannot unpack layer {layer}")]
    Unpack {
        /// Digest of the layer's blob.
        layer: Digest,
        /// Why.
        #[source]
        source: Box<UnpackError>,
    },
    /// The disk, or a quota on it, has no room.
    #[error("no room in {}: make some with 'hull image prune' or 'hull rmi'", directory.display())]
    Full {
        /// The store's directory.
        directory: PathBuf,
        /// What was tried.
        source: Box<Self>,
    },
    /// The image's description is not usable.
    #[error("invalid image: {0}")]
    InvalidImage(String),
}

impl StoreError {
    /// Whether it comes of a disk, or a quota, that has no room.
    pub(crate) fn is_full(&self) -> bool {
        let error = match self {
            Self::Io { source, .. } => source,
            Self::Unpack { source, .. } => match &**source {
                UnpackError::Write { source, .. } => source,
                _ => return false,
            },
            _ => return false,
        };
        matches!(
            error.kind(),
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
        )
    }
}

/// Result of the store's calls.
pub(crate) type Result<T> = std::result::Result<T, StoreError>;

/// Makes an [`StoreError::Io`] from what was tried and on what.
pub(crate) fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

impl ImageStore {
    /// Opens the store at `dir`, making it (mode 0700) when it is not there, and clears what
    /// killed processes left half-made.
    ///
    /// # Errors
    /// When the directory cannot be made or its files are damaged.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        Self::open_with_limits(dir, Limits::default())
    }

    /// Like [`ImageStore::open`], with other limits for unpacking.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn open_with_limits(dir: impl AsRef<Path>, limits: Limits) -> Result<Self> {
        let dir = dir.as_ref();
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        for part in ["", "blobs/sha256", "layers", "ingest", "unpack"] {
            let path = dir.join(part);
            builder
                .create(&path)
                .map_err(failed("create directory", &path))?;
        }
        let root = fs::canonicalize(dir).map_err(failed("resolve", dir))?;
        let store = Self {
            shared: Arc::new(Shared { root, limits }),
        };
        let layout = store.path("oci-layout");
        if !layout.exists() {
            let _hold = store.hold()?;
            store.write_atomically(&layout, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
        }
        store.sweep_leftovers()?;
        Ok(store)
    }

    /// The store's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.shared.root
    }

    /// Keeps unreferenced content from being swept until the [`Hold`] is dropped. Waits while
    /// another process sweeps.
    ///
    /// # Errors
    /// When the lock file cannot be opened or locked.
    pub fn hold(&self) -> Result<Hold> {
        Ok(Hold {
            _lock: lock::FileLock::shared(&self.path("sweep.lock"))?,
        })
    }

    /// Says what to do about a full disk, if that is what failed.
    pub(crate) fn explained(&self, error: StoreError) -> StoreError {
        match error.is_full() {
            false => error,
            true => StoreError::Full {
                directory: self.root().to_owned(),
                source: Box::new(error),
            },
        }
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.shared.limits
    }

    fn path(&self, relative: &str) -> PathBuf {
        self.shared.root.join(relative)
    }

    /// Replaces `path` by `bytes`: written to a new file, synced, renamed.
    fn write_atomically(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        use std::io::Write as _;
        let mut file = tempfile::Builder::new()
            .prefix("write-")
            .tempfile_in(self.path("ingest"))
            .map_err(failed("create a temporary file for", path))?;
        file.write_all(bytes).map_err(failed("write", path))?;
        file.as_file().sync_all().map_err(failed("sync", path))?;
        file.persist(path)
            .map_err(|error| failed("rename into place", path)(error.error))?;
        let parent = path.parent().unwrap_or(&self.shared.root);
        lock::sync_directory(parent)
    }
}
