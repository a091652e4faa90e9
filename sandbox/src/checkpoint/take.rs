//! Taking a checkpoint of a container that runs.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use crate::container::Container;
use crate::control::{self, Request};
use crate::engine::EngineError;
use crate::rootfs::copy_whole;
use crate::template::Ground;

use super::staging::Staging;
use super::{CheckpointError, GUEST, KEPT};

/// A checkpoint that is complete and has no name yet: dropped, it is gone.
#[derive(Debug)]
pub struct Staged {
    staging: Staging,
}

impl Staged {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.staging.path()
    }
}

/// A container that was saved and stands still for as long as this is there; then it goes on.
#[derive(Debug)]
pub struct Saved<'a> {
    container: &'a Container,
    monitor: UnixStream,
}

impl Container {
    /// Saves it, memory and disk, to the directory `to`, which is new or empty.
    ///
    /// # Errors
    /// If it doesn't run, or is one that can't be saved; nothing is left then.
    pub fn checkpoint(&self, to: &Path) -> Result<Saved<'_>, EngineError> {
        let to = std::path::absolute(to).map_err(|source| CheckpointError::Disk {
            action: "find",
            path: to.to_owned(),
            source,
        })?;
        if to.symlink_metadata().is_ok() && !is_empty(&to) {
            return Err(CheckpointError::Exists(to).into());
        }
        let parent = to.parent().unwrap_or(Path::new("/"));
        let (staged, monitor) = self.save(parent)?;
        staged.staging.publish(&to)?;
        Ok(Saved {
            container: self,
            monitor,
        })
    }

    /// Saves it to a directory without a name in `parent`, which is made; it goes on.
    ///
    /// # Errors
    /// As [`Self::checkpoint`].
    pub fn stage(&self, parent: &Path) -> Result<Staged, EngineError> {
        fs::create_dir_all(parent).map_err(|source| CheckpointError::Disk {
            action: "create",
            path: parent.to_owned(),
            source,
        })?;
        Ok(self.save(parent)?.0)
    }

    /// Has the monitor save the guest, and copies the disk while that stands still: for as long
    /// as the socket is open.
    fn save(&self, parent: &Path) -> Result<(Staged, UnixStream), EngineError> {
        let monitor = self.connect()?;
        let staging = Staging::make(parent, self.monitor())?;
        let failed = |action, path: PathBuf| {
            move |source| CheckpointError::Disk {
                action,
                path,
                source,
            }
        };
        let guest = staging.path().join(GUEST);
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        let file = options
            .open(&guest)
            .map_err(failed("create", guest.clone()))?;
        self.ask_for(&monitor, &file)?;
        for name in KEPT {
            let from = self.entry().directory().join(name);
            if from.exists() {
                let to = staging.path().join(name);
                copy_whole(&from, &to).map_err(failed("copy what the container has to", to))?;
            }
        }
        staging.sync()?;
        // The monitor says why before it lets the guest go on.
        if is_readable(&monitor) {
            control::answer(&monitor).map_err(|error| self.failed("checkpoint", error))?;
            return Err(CheckpointError::Spoiled.into());
        }
        Ok((Staged { staging }, monitor))
    }

    fn ask_for(&self, monitor: &UnixStream, file: &File) -> Result<(), EngineError> {
        let vm = &self.plan().vm;
        let kvm = rustix::fs::open(&vm.kvm, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| CheckpointError::Disk {
                action: "open",
                path: vm.kvm.clone(),
                source: error.into(),
            })?;
        let ground = Ground::of(vm.vcpus, kvm.as_fd());
        let ground = ground.map_err(|error| CheckpointError::Ground(error.into()))?;
        let request = Request::Checkpoint {
            ground: json!(ground),
        };
        let failed = |error| self.failed("checkpoint", error);
        let line = control::request_line(request).map_err(failed)?;
        control::send_with_fds(monitor, &line, &[file.as_fd()])
            .map_err(|error| failed(control::ControlError::Io(error)))?;
        control::answer(monitor).map(drop).map_err(failed)
    }
}

impl Saved<'_> {
    /// Has it never go on: its VM is ended, and gone when this returns.
    ///
    /// # Errors
    /// If its monitor can't be spoken to.
    pub fn end(mut self) -> Result<(), EngineError> {
        let container = self.container;
        let told = self.monitor.write_all(b"\n");
        told.map_err(|error| container.failed("stop", control::ControlError::Io(error)))?;
        match control::answer(&self.monitor) {
            Ok(_) | Err(control::ControlError::Gone | control::ControlError::Refused(_)) => {}
            Err(error) => return Err(container.failed("stop", error)),
        }
        match container.wait() {
            Ok(_) => Ok(()),
            // It was to leave nothing.
            Err(EngineError::Store(error)) if error.is_missing() => Ok(()),
            Err(EngineError::NotRunning(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

fn is_empty(directory: &Path) -> bool {
    fs::read_dir(directory).is_ok_and(|mut entries| entries.next().is_none())
}

fn is_readable(socket: &UnixStream) -> bool {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    matches!(poll(&mut fds, Some(&now)), Ok(1..))
}
