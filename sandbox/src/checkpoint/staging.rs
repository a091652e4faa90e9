//! A directory in the making, of which nothing is left if its maker is killed.
//!
//! A process of the monitor's program waits for its maker's end beside it, and removes what has no
//! name of its own by then. What a power cut leaves goes when the next one is made beside it: it
//! isn't locked any more.

use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::io::Errno;

use crate::names;
use crate::sys;

use super::CheckpointError;

/// What a monitor is told that holds no container, but clears up behind another process.
pub(crate) const CLEAR_UP: &str = "clear-up";

/// Waits until whoever gave this process its stdin has ended; removes the directory `path` unless
/// the word came that it is to stay.
pub(crate) fn clear_up(path: &Path) {
    let mut word = Vec::new();
    // A read that fails is no word.
    let _ = io::stdin().read_to_end(&mut word);
    if word.is_empty() {
        // Nobody is left to tell.
        let _ = fs::remove_dir_all(path);
    }
}

/// What all of them are called, and some digits.
const NAME: &str = ".hull-checkpoint-";
/// One that isn't locked yet is younger than this.
const FRESH: Duration = Duration::from_secs(60);

/// A directory that is removed unless it is published.
#[derive(Debug)]
pub(super) struct Staging {
    path: PathBuf,
    guard: Child,
    /// Says that its maker lives.
    lock: Option<OwnedFd>,
    kept: bool,
}

/// Removes those in `parent` whose makers, and their guards, are gone.
fn clear_remains(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let age = entry.metadata().and_then(|metadata| metadata.modified());
        let age = age.ok().and_then(|at| at.elapsed().ok());
        let is_old = age.is_some_and(|age| age > FRESH);
        if is_old
            && entry
                .file_name()
                .as_encoded_bytes()
                .starts_with(NAME.as_bytes())
            && lock(&entry.path()).is_ok()
        {
            // What can't be removed now is in nobody's way.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn lock(path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())?;
    flock(&directory, FlockOperation::NonBlockingLockExclusive)?;
    Ok(directory)
}

fn disk(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> CheckpointError {
    let path = path.to_owned();
    move |source| CheckpointError::Disk {
        action,
        path,
        source,
    }
}

impl Staging {
    /// Makes one in `parent`, guarded by the program `monitor`.
    pub(super) fn make(parent: &Path, monitor: &Path) -> Result<Self, CheckpointError> {
        clear_remains(parent);
        let random = names::id();
        let name = format!("{NAME}{}", random.get(..16).unwrap_or(&random));
        let path = parent.join(name);
        // The guard first: what it is to remove need not be there yet.
        let mut command = Command::new(monitor);
        command
            .arg(CLEAR_UP)
            .arg(&path)
            .current_dir("/")
            .env_clear();
        command.stdin(Stdio::piped());
        command.stdout(Stdio::null()).stderr(Stdio::null());
        let guard = sys::spawn_in_session(&mut command, &[]).map_err(disk("start", monitor))?;
        let mut staging = Self {
            path,
            guard,
            lock: None,
            kept: false,
        };
        DirBuilder::new()
            .mode(0o700)
            .create(&staging.path)
            .map_err(disk("create", &staging.path))?;
        let locked = lock(&staging.path);
        staging.lock = Some(locked.map_err(|error| disk("lock", &staging.path)(error.into()))?);
        Ok(staging)
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Has all of it on disk.
    pub(super) fn sync(&self) -> Result<(), CheckpointError> {
        self.sync_at(&self.path)
    }

    fn sync_at(&self, path: &Path) -> Result<(), CheckpointError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .and_then(rustix::fs::syncfs)
            .map_err(|error| disk("write", path)(error.into()))
    }

    /// Gives it its name, which an empty directory may have had.
    pub(super) fn publish(mut self, path: &Path) -> Result<(), CheckpointError> {
        match rustix::fs::rename(&self.path, path) {
            Ok(()) => {}
            Err(Errno::EXIST | Errno::NOTEMPTY | Errno::NOTDIR) => {
                return Err(CheckpointError::Exists(path.to_owned()));
            }
            Err(error) => return Err(disk("create", path)(error.into())),
        }
        self.kept = true;
        drop(self.lock.take());
        self.sync_at(path)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Some(mut stdin) = self.guard.stdin.take()
            && self.kept
        {
            // A guard that is gone removes nothing.
            let _ = stdin.write_all(b"kept");
        }
        let _ = self.guard.wait();
        if !self.kept {
            // If there was no guard any more.
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::time::SystemTime;

    use super::*;

    #[test]
    fn remains_go_and_what_is_being_made_stays() {
        let parent = tempfile::tempdir().unwrap();
        let make = |name: &str, age: Duration| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::write(path.join("guest"), "x").unwrap();
            let directory = File::open(&path).unwrap();
            directory.set_modified(SystemTime::now() - age).unwrap();
            path
        };
        let old = Duration::from_secs(100);
        let remains = make(".hull-checkpoint-1", old);
        let kept = [
            make(".hull-checkpoint-2", Duration::ZERO),
            make(".hull-checkpoint-3", old),
            make("checkpoint", old),
        ];
        let _lock = lock(&kept[1]).unwrap();
        clear_remains(parent.path());
        assert!(!remains.exists());
        assert!(kept.iter().all(|path| path.exists()));
    }
}
