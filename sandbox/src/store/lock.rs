//! A container's lock: a flock says that somebody runs it or is about to, and the file's text
//! says which monitor, once there is one.
//!
//! Owns that text and the wait for it. Refuses to say what the lock is had for.

use std::fs::{self, File, OpenOptions};
use std::io::{self, PipeReader, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{StoreError, disk};

/// The right to run a container, unless somebody else has it.
pub(super) fn try_lock(path: &Path) -> Result<Option<File>, StoreError> {
    let lock = open(path)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(lock)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(disk("lock", path)(error.into())),
    }
}

fn open(path: &Path) -> Result<File, StoreError> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    options.open(path).map_err(disk("open", path))
}

/// Waits until nobody has it.
pub(super) fn await_release(path: &Path) -> Result<(), StoreError> {
    let lock = open(path)?;
    loop {
        match flock(&lock, FlockOperation::LockShared) {
            Err(rustix::io::Errno::INTR) => {}
            result => return result.map_err(|error| disk("lock", path)(error.into())),
        }
    }
}

/// Forgets who had it before. Whoever calls has it now.
pub(super) fn forget_holder(lock: &File, path: &Path) -> Result<(), StoreError> {
    lock.set_len(0).map_err(disk("write", path))
}

/// The monitor says that it is the one that has this lock.
pub(crate) fn sign(mut lock: &File) -> io::Result<()> {
    writeln!(lock, "{}", std::process::id())
}

/// Kills the monitor that has the lock at `path`, if one has signed it.
pub(super) fn kill_holder(path: &Path) -> Result<(), StoreError> {
    let signed = || fs::read_to_string(path).map_err(disk("read", path));
    let text = signed()?;
    // A line that isn't whole yet is read again when it is.
    let pid = text.strip_suffix('\n').and_then(|line| line.parse().ok());
    if let Some(pid) = pid.and_then(Pid::from_raw)
        && let Ok(monitor) = pidfd_open(pid, PidfdFlags::empty())
        // Its number wasn't another's when it was taken hold of.
        && signed()? == text
    {
        // One that has ended by itself is as gone.
        let _ = pidfd_send_signal(&monitor, Signal::KILL);
    }
    Ok(())
}

/// Waits for a lock that others have, and for who they are.
#[derive(Debug)]
pub(super) struct Wait {
    signed: OwnedFd,
    had: PipeReader,
    locking: JoinHandle<rustix::io::Result<File>>,
}

/// What a wait came to.
#[derive(Debug)]
pub(super) enum Seen {
    /// The lock is had.
    Had(File),
    /// It may have been signed.
    Signed,
    /// Time is up; the lock is let go of when it should still be had.
    Nothing,
}

impl Wait {
    pub(super) fn of(path: &Path) -> Result<Self, StoreError> {
        let lock = open(path)?;
        let begin = || {
            let signed = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
            inotify::add_watch(&signed, path, WatchFlags::MODIFY)?;
            let (had, locked) = io::pipe()?;
            // flock(2) knows no deadline; a thread may wait in it beyond ours.
            let locking = thread::Builder::new().spawn(move || {
                let result = flock(&lock, FlockOperation::LockExclusive);
                drop(locked);
                result.map(|()| lock)
            })?;
            Ok(Self {
                signed,
                had,
                locking,
            })
        };
        begin().map_err(disk("wait for", path))
    }

    /// Waits for the next thing to happen.
    pub(super) fn next(self, deadline: Instant) -> io::Result<(Seen, Option<Self>)> {
        let mut fds = [
            PollFd::new(&self.had, PollFlags::IN),
            PollFd::new(&self.signed, PollFlags::IN),
        ];
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut fds, Some(&left)) {
            Err(rustix::io::Errno::INTR) => return Ok((Seen::Signed, Some(self))),
            Err(error) => return Err(error.into()),
            Ok(0) => return Ok((Seen::Nothing, None)),
            Ok(_) => {}
        }
        if fds[0].revents().is_empty() {
            // What was written is read elsewhere.
            let _ = rustix::io::read(&self.signed, &mut [0; 4096]);
            return Ok((Seen::Signed, Some(self)));
        }
        let lock = self.locking.join().map_err(|_| io::ErrorKind::Other)??;
        Ok((Seen::Had(lock), None))
    }
}
