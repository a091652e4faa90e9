//! Checkpoints: a container that runs, memory and disk, in a directory, and containers that go on
//! from there.
//!
//! ```text
//! DIR/guest                         a saved guest's file (`template::file`): what it stands on and
//!                                   its plan in the header, its machine and streams behind
//! DIR/scratch, volumes, identity,   what the container's directory held, as it was
//!     limits.json
//! ```
//!
//! Owns that directory: whoever takes a checkpoint copies the disk while the monitor has the guest
//! stand still, and the directory gets its name when all of it is on disk. Refuses: what can't go
//! on elsewhere (pods, sessions), a host with another kernel or processor, and a file
//! that isn't what was written.
//!
//! A bundle's has no disk: its root directory is its engine's, which keeps it beside the checkpoint
//! and has it back in the bundle that goes on.

mod go_on;
mod staging;
mod take;

use std::fs::File;
use std::os::fd::BorrowedFd;
use std::path::PathBuf;

use hull_vmm::machine::MachineState;
use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::plan::Plan;
use crate::scratch;
use crate::store;
use crate::template::file::{self, FileError, Header, Kind};
use crate::template::{Ground, KeyError};

pub use go_on::FromRequest;
pub(crate) use go_on::open;
pub(crate) use staging::{CLEAR_UP, clear_up};
pub use take::{Saved, Staged};

/// The file that holds the guest.
const GUEST: &str = "guest";
/// What else of a container's directory its copies have: its disk, and the limits that it has by now.
const KEPT: [&str; 4] = [scratch::NAME, "volumes", "identity", store::LIMITS];

/// A checkpoint that can't be taken or gone on from.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// One of this name is there.
    #[error("cannot make checkpoint \"{0}\": it exists")]
    Exists(PathBuf),
    /// It is of an engine's container, and there is no engine.
    #[error("checkpoint \"{0}\" is of an engine's container: only that engine can go on from it")]
    Engines(PathBuf),
    /// There is none.
    #[error("no such checkpoint: {0}")]
    Unknown(PathBuf),
    /// The disk refused.
    #[error("cannot {action} \"{path}\"")]
    Disk {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Its container had a network and the copy has none, or the reverse.
    #[error("checkpoint \"{path}\" is of a container that had {}: a copy needs the same", if *had { "a network" } else { "no network" })]
    Network {
        /// Its directory.
        path: PathBuf,
        /// Whether it had one.
        had: bool,
    },
    /// It isn't what was written.
    #[error("checkpoint \"{path}\" can't be used")]
    Unusable {
        /// Its directory.
        path: PathBuf,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// An image of its container's is gone.
    #[error(
        "checkpoint \"{path}\" can't be used: a layer of its image {image} is gone; pull the image again"
    )]
    Layer {
        /// Its directory.
        path: PathBuf,
        /// The image.
        image: String,
    },
    /// The guest ran on before all was saved.
    #[error("the container was killed while its checkpoint was made")]
    Spoiled,
    /// This host's processor can't be looked at.
    #[error("cannot tell what a checkpoint stands on")]
    Ground(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A checkpoint that a monitor can't go on from.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoadError {
    /// The host differs.
    #[error("the checkpoint can't go on here: {0}")]
    Ground(String),
    /// A machine has the cards that it has.
    #[error("the checkpoint's guest has {had} network cards, and its network now {has} interfaces")]
    Cards { had: usize, has: usize },
    /// It isn't what was written.
    #[error("the checkpoint can't be used")]
    File(#[from] FileError),
    /// This host's processor can't be looked at.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// What a checkpoint says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct About {
    pub(crate) ground: Ground,
    /// [`hull_proto::GENERATION`] of its agent.
    pub(crate) agent: u16,
    pub(crate) plan: Plan,
}

/// A container between two instructions.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    pub(crate) machine: MachineState,
    /// The host's port of the first process's stream.
    pub(crate) process_port: u32,
    pub(crate) streams: CarriedStreams,
}

/// What its monitor knew of the first process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CarriedStreams {
    pub(crate) guest_pid: u32,
    pub(crate) oom_kills: u32,
    /// Bytes of stdin that the agent has not acknowledged.
    pub(crate) stdin_outstanding: usize,
    pub(crate) stdin_ended: bool,
    /// Frames, or parts of one, that were on their way to the agent and from it.
    pub(crate) to_agent: Vec<u8>,
    pub(crate) from_agent: Vec<u8>,
}

/// Opens a checkpoint's file, whose access time stays as it is.
fn open_guest(path: &std::path::Path) -> std::io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// Reads what a monitor needs to go on; returns the guest kernel's release, too.
pub(crate) fn load(file: &File, kvm: BorrowedFd<'_>) -> Result<(Carried, String), LoadError> {
    let (header, state): (Header<About>, _) = file::read_head(file, Kind::Checkpoint)?;
    let about = &header.key;
    let ground = Ground::of(about.plan.vm.vcpus, kvm)?;
    if let Some(difference) = ground.differs(&about.ground) {
        return Err(LoadError::Ground(difference));
    }
    if about.agent != hull_proto::GENERATION {
        return Err(LoadError::Ground(format!(
            "its agent speaks generation {}, this Hull speaks {}",
            about.agent,
            hull_proto::GENERATION
        )));
    }
    file::check_memory(file, &header)?;
    Ok((state.read()?, header.kernel))
}
