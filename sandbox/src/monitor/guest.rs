//! The guest as the driver sees it: something that takes streams and ends.

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use hull_vmm::machine::{MachineState, Moment, SaveError};
use hull_vmm::memory::{MemoryImage, WorkingSet};

use crate::control::InterfaceStats;
use crate::network::JoinError;
use crate::rootfs::SharedDirectory;

/// A guest that can't be saved.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SnapshotError {
    /// Its machine can't.
    #[error("its guest can't be saved")]
    Machine(#[from] SaveError),
    /// Its memory can't be looked at.
    #[error("its guest's memory can't be looked at")]
    Memory(#[from] io::Error),
}

/// A running guest. The machine is one; tests bring their own.
pub(super) trait Guest {
    /// A stream to a port of the guest's.
    fn connect(&self, port: u32) -> io::Result<UnixStream>;
    /// Readable from the moment the guest has ended.
    fn ended(&self) -> BorrowedFd<'_>;
    /// Why it has ended, in a few words; `None` while it runs.
    fn ending(&self) -> Option<String>;
    /// The last lines of its console.
    fn console(&self) -> Vec<String>;
    /// Requests that it has made of its shares.
    fn fs_requests(&self) -> u64 {
        0
    }
    /// What has gone over each of its cards.
    fn traffic(&self) -> Vec<InterfaceStats> {
        Vec::new()
    }
    /// Ties it to the network that has come since it was built, if one was to come: what its
    /// agent is to be asked for.
    fn find_network(&mut self) -> Option<Result<hull_proto::Request, JoinError>> {
        None
    }
    /// What a copy of a template that nobody has learnt from touched up to now.
    fn observed(&self) -> Option<WorkingSet> {
        None
    }
    /// A moment since it was started, by which it can tell the time.
    fn moment(&self) -> Option<Moment> {
        None
    }
    /// All that it is, while it stands still.
    fn snapshot(&self) -> Result<(MachineState, MemoryImage), SnapshotError> {
        Err(SaveError::NotPaused.into())
    }
    /// Has it stand still. Idempotent.
    fn pause(&self) {}
    /// Lets it go on. Idempotent.
    fn resume(&self) {}
    /// Shows it more directories: all of them, or none.
    fn show(&self, _shares: Vec<SharedDirectory>) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Shows it those with these names no longer.
    fn hide(&self, _names: &[String]) {}
    /// Has it have so many bytes of memory beyond those that it was started with, as far as it can.
    fn plug(&self, _bytes: u64) {}
    /// How many it has.
    fn plugged(&self) -> u64 {
        0
    }
    /// Readable when that has changed since it was asked.
    fn plugs(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// Why the host gave it no more, if it didn't.
    fn plug_refusal(&self) -> Option<String> {
        None
    }
    /// Ends it at once. Idempotent.
    fn stop(&mut self);
}
