//! Advisory locks that the kernel drops when their holder dies.
//!
//! Owns: `flock(2)` on the store's lock files. Refuses: deciding who may take which.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::{Result, failed};

/// A held lock; dropping it releases it.
#[derive(Debug)]
pub(super) struct FileLock {
    _file: File,
}

impl FileLock {
    /// Waits for a shared lock.
    pub(super) fn shared(path: &Path) -> Result<Self> {
        Self::wait(path, FlockOperation::LockShared)
    }

    /// Waits for an exclusive lock.
    pub(super) fn exclusive(path: &Path) -> Result<Self> {
        Self::wait(path, FlockOperation::LockExclusive)
    }

    /// Takes an exclusive lock if nobody holds any.
    pub(super) fn try_exclusive(path: &Path) -> Result<Option<Self>> {
        let file = open(path)?;
        Ok(try_lock(&file, path)?.then_some(Self { _file: file }))
    }

    fn wait(path: &Path, operation: FlockOperation) -> Result<Self> {
        let file = open(path)?;
        lock_waiting(&file, operation, path)?;
        Ok(Self { _file: file })
    }
}

fn open(path: &Path) -> Result<File> {
    OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .read(true)
        .mode(0o600)
        .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits().cast_signed())
        .open(path)
        .map_err(failed("open lock file", path))
}

/// Takes `operation` on `file`, waiting through signals.
fn lock_waiting(file: &File, operation: FlockOperation, path: &Path) -> Result<()> {
    rustix::io::retry_on_intr(|| rustix::fs::flock(file, operation))
        .map_err(|errno| failed("lock", path)(errno.into()))
}

fn try_lock(file: &File, path: &Path) -> Result<bool> {
    match rustix::fs::flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(failed("lock", path)(errno.into())),
    }
}

/// Opens (making it when needed) and exclusively locks the file at `path`, which others may
/// rename or delete while we wait: what is returned is locked *and* still there by that name.
pub(super) fn open_locked(path: &Path) -> Result<File> {
    loop {
        let file = open(path)?;
        lock_waiting(&file, FlockOperation::LockExclusive, path)?;
        let ours = file.metadata().map_err(failed("examine", path))?;
        match std::fs::symlink_metadata(path) {
            Ok(named) if named.ino() == ours.ino() && named.dev() == ours.dev() => return Ok(file),
            _ => {} // renamed into place or deleted by its last holder
        }
    }
}

/// Makes the directory's entries durable.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let directory = File::open(path).map_err(failed("open directory", path))?;
    directory.sync_all().map_err(failed("sync directory", path))
}
