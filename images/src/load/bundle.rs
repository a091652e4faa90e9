//! Files by name, from a tarball or a directory.
//!
//! Owns: the one interface that both kinds of images are read through. Refuses: following a
//! directory's odd files (pipes, devices).

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use super::{LoadError, Result};
use crate::digest::{Digest, HashingReader};
use crate::manifest::{self, Compression};
use crate::store::{ImageStore, StoreError};

/// A file that is a blob of the store now.
pub(super) struct Brought {
    pub(super) digest: Digest,
    pub(super) size: u64,
    pub(super) compression: Compression,
}

/// A set of files that holds images.
pub(super) trait Bundle {
    /// What people call it.
    fn what(&self) -> String;

    /// The file `name` whole, if it is there; at most a manifest's size.
    fn read_small(&mut self, name: &str) -> Result<Option<Vec<u8>>>;

    /// Makes the file `name` a blob of the store. If `expected`, its digest and size must be those.
    fn bring(&mut self, name: &str, expected: Option<(&Digest, u64)>) -> Result<Brought>;

    fn broken(&self, reason: String) -> LoadError {
        LoadError::Archive {
            what: self.what(),
            reason,
        }
    }

    fn stored(&self, source: StoreError) -> LoadError {
        LoadError::Store {
            what: self.what(),
            source,
        }
    }
}

/// Checks what came against what was declared.
pub(super) fn check(
    expected: Option<(&Digest, u64)>,
    actual: &Digest,
    bytes: u64,
) -> std::result::Result<(), StoreError> {
    match expected {
        Some((digest, _)) if digest != actual => Err(StoreError::DigestMismatch {
            expected: digest.clone(),
            actual: actual.clone(),
        }),
        Some((digest, declared)) if declared != bytes => Err(StoreError::SizeMismatch {
            digest: digest.clone(),
            declared,
            actual: bytes,
        }),
        _ => Ok(()),
    }
}

/// How a layer that begins with `start` is compressed.
pub(super) fn compression_of(start: &[u8]) -> Compression {
    match start {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Compression::Zstd,
        _ => Compression::None,
    }
}

/// An OCI layout on disk.
pub(super) struct Directory<'s> {
    store: &'s ImageStore,
    path: PathBuf,
}

impl<'s> Directory<'s> {
    pub(super) fn new(store: &'s ImageStore, path: &Path) -> Self {
        Self {
            store,
            path: path.to_owned(),
        }
    }

    fn open(&self, name: &str) -> Result<Option<File>> {
        let path = self.path.join(name);
        let wrong = |source| LoadError::Read {
            path: path.clone(),
            source,
        };
        let opened = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
            .open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(wrong(error)),
        };
        if !file.metadata().map_err(wrong)?.is_file() {
            return Err(self.broken(format!("{name} is not a file")));
        }
        Ok(Some(file))
    }
}

impl Bundle for Directory<'_> {
    fn what(&self) -> String {
        self.path.display().to_string()
    }

    fn read_small(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open(name)? else {
            return Ok(None);
        };
        let mut bytes = Vec::new();
        file.take(manifest::MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| LoadError::Read {
                path: self.path.join(name),
                source,
            })?;
        if bytes.len() as u64 > manifest::MAX_BYTES {
            return Err(self.broken(format!(
                "{name} is larger than {} bytes",
                manifest::MAX_BYTES
            )));
        }
        Ok(Some(bytes))
    }

    fn bring(&mut self, name: &str, expected: Option<(&Digest, u64)>) -> Result<Brought> {
        let wrong = |source| LoadError::Read {
            path: self.path.join(name),
            source,
        };
        let missing = || self.broken(format!("{name} is missing"));
        let file = self.open(name)?.ok_or_else(missing)?;
        // Hash first: the store wants to know what it is given.
        let mut reader = HashingReader::new(&file);
        let mut start = Vec::new();
        (&mut reader)
            .take(4)
            .read_to_end(&mut start)
            .map_err(wrong)?;
        std::io::copy(&mut reader, &mut std::io::sink()).map_err(wrong)?;
        let (digest, size) = reader.finish();
        check(expected, &digest, size).map_err(|error| self.stored(error))?;
        if let Some(mut ingest) = self
            .store
            .ingest(&digest, size)
            .map_err(|error| self.stored(error))?
        {
            ingest.restart().map_err(|error| self.stored(error))?;
            let mut file = self.open(name)?.ok_or_else(missing)?;
            let mut buffer = vec![0; 256 * 1024];
            loop {
                match file.read(&mut buffer).map_err(wrong)? {
                    0 => break,
                    count => ingest
                        .append(&buffer[..count])
                        .map_err(|e| self.stored(e))?,
                }
            }
            ingest.commit().map_err(|error| self.stored(error))?;
        }
        Ok(Brought {
            digest,
            size,
            compression: compression_of(&start),
        })
    }
}
