//! Content by digest, and its arrival.
//!
//! Owns: `blobs/` and `ingest/`. A blob is seen only when it is complete and its digest is right.
//! Refuses: asking where bytes come from.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::{ImageStore, Result, StoreError, failed, lock};
use crate::digest::{Digest, Hasher};

/// A blob being written. Dropping it keeps what has arrived, for the next attempt to go on from;
/// [`Ingest::commit`] makes it a blob.
#[derive(Debug)]
pub(crate) struct Ingest {
    store: ImageStore,
    file: File,
    path: PathBuf,
    digest: Digest,
    size: u64,
    received: u64,
    hasher: Hasher,
}

impl std::fmt::Debug for Hasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hasher")
    }
}

impl ImageStore {
    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.path("blobs/sha256").join(digest.hex())
    }

    pub(crate) fn has_blob(&self, digest: &Digest) -> bool {
        self.blob_path(digest).is_file()
    }

    pub(crate) fn open_blob(&self, digest: &Digest) -> Result<File> {
        let path = self.blob_path(digest);
        File::open(&path).map_err(failed("open", &path))
    }

    /// A small blob, whole, its digest checked again.
    pub(crate) fn read_blob(&self, digest: &Digest, max_bytes: u64) -> Result<Vec<u8>> {
        let path = self.blob_path(digest);
        let mut bytes = Vec::new();
        let file = self.open_blob(digest)?;
        file.take(max_bytes + 1)
            .read_to_end(&mut bytes)
            .map_err(failed("read", &path))?;
        let damaged = |reason: &str| StoreError::Damaged {
            path: path.clone(),
            reason: reason.to_owned(),
        };
        if bytes.len() as u64 > max_bytes {
            return Err(damaged("it is too large"));
        }
        if Digest::of(&bytes) != *digest {
            return Err(damaged("its digest is wrong; remove it and pull again"));
        }
        Ok(bytes)
    }

    /// Puts a small blob whose digest was computed from `bytes`.
    pub(crate) fn put_blob(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::of(bytes);
        if !self.has_blob(&digest) {
            self.write_atomically(&self.blob_path(&digest), bytes)?;
        }
        Ok(digest)
    }

    /// Makes the file at `path`, whose digest the caller computed while writing it, a blob.
    pub(crate) fn adopt(&self, path: &Path, digest: &Digest) -> Result<()> {
        if self.has_blob(digest) {
            return Ok(());
        }
        let file = File::open(path).map_err(failed("open", path))?;
        file.sync_all().map_err(failed("sync", path))?;
        let target = self.blob_path(digest);
        // A link, not a rename: another image of the same archive may need the file again.
        match std::fs::hard_link(path, &target) {
            Ok(()) => lock::sync_directory(&self.path("blobs/sha256")),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) => Err(failed("link into place", &target)(error)),
        }
    }

    /// Begins or resumes the arrival of the blob `digest` of `size` bytes. Waits while another
    /// process fetches the same; `None` means that it is complete now.
    pub(crate) fn ingest(&self, digest: &Digest, size: u64) -> Result<Option<Ingest>> {
        if self.has_blob(digest) {
            return Ok(None);
        }
        let path = self.path("ingest").join(digest.hex());
        let file = lock::open_locked(&path)?;
        if self.has_blob(digest) {
            // The holder before us finished; our fresh file is not needed.
            std::fs::remove_file(&path).map_err(failed("remove", &path))?;
            return Ok(None);
        }
        let mut ingest = Ingest {
            store: self.clone(),
            file,
            path,
            digest: digest.clone(),
            size,
            received: 0,
            hasher: Hasher::default(),
        };
        ingest.take_up()?;
        Ok(Some(ingest))
    }
}

impl Ingest {
    /// Bytes that are here already.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }

    /// Hashes what an earlier attempt left.
    fn take_up(&mut self) -> Result<()> {
        let present = self
            .file
            .metadata()
            .map_err(failed("examine", &self.path))?
            .len();
        if present >= self.size {
            // Complete would have been renamed: this is an attempt that failed its check.
            return self.restart();
        }
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let count = self
                .file
                .read(&mut buffer)
                .map_err(failed("read", &self.path))?;
            if count == 0 {
                return Ok(());
            }
            self.hasher.update(&buffer[..count]);
            self.received += count as u64;
        }
    }

    /// Forgets what has arrived.
    pub(crate) fn restart(&mut self) -> Result<()> {
        self.file
            .set_len(0)
            .map_err(failed("truncate", &self.path))?;
        self.file
            .seek(SeekFrom::Start(0))
            .map_err(failed("rewind", &self.path))?;
        self.hasher = Hasher::default();
        self.received = 0;
        Ok(())
    }

    /// Appends `bytes`; more than the declared size is refused and forgotten.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let actual = self.received.saturating_add(bytes.len() as u64);
        if actual > self.size {
            self.restart()?;
            let (digest, declared) = (self.digest.clone(), self.size);
            return Err(StoreError::SizeMismatch {
                digest,
                declared,
                actual,
            });
        }
        self.file
            .write_all(bytes)
            .map_err(failed("write", &self.path))?;
        self.hasher.update(bytes);
        self.received = actual;
        Ok(())
    }

    /// Checks size and digest and makes it a blob. What fails the check is deleted.
    pub(crate) fn commit(mut self) -> Result<()> {
        let digest = self.digest.clone();
        if self.received != self.size {
            let (declared, actual) = (self.size, self.received);
            self.restart()?;
            return Err(StoreError::SizeMismatch {
                digest,
                declared,
                actual,
            });
        }
        let actual = std::mem::take(&mut self.hasher).finish();
        if actual != digest {
            std::fs::remove_file(&self.path).map_err(failed("remove", &self.path))?;
            return Err(StoreError::DigestMismatch {
                expected: digest,
                actual,
            });
        }
        self.file.sync_all().map_err(failed("sync", &self.path))?;
        let target = self.store.blob_path(&digest);
        std::fs::rename(&self.path, &target).map_err(failed("rename into place", &target))?;
        lock::sync_directory(&self.store.path("blobs/sha256"))
    }
}
