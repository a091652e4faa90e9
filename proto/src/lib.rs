//! The words that Hull's host and guest share.
//!
//! Owns: the names, ports and messages of the two kinds of vsock stream between the monitor and
//! the agent, and the framing of process streams. Refuses: I/O of any kind, and trust: every
//! byte that arrives is bounded before it is stored.
//!
//! ```text
//! agent ── dials host port CONTROL_PORT ──► monitor      one control stream per guest
//!   Hello ►   ◄ Request   Reply ►   ◄ Request   Reply ► …
//! monitor ── connects to guest port PROCESS_PORT ──► agent   one process stream per process
//!   ◄ Spawn   (Prepared ►   ◄ Go)   Started ►   ◄ Stdin/Resize/Signal   Stdout/Stderr ► …   Exited ►
//!   (OomKilled ► at any time after Spawn of a container)
//! ```

#![forbid(unsafe_code)]

mod cgroup;
mod control;
mod frame;
mod network;
mod process;

use std::net::Ipv4Addr;

pub use cgroup::{
    CgroupStats, CpuStats, IoStats, MemoryEvents, MemoryStat, MemoryStats, PidsStats, ProcessInfo,
    ProcessPage, weight_of_shares,
};
pub use control::{
    ControlError, Hello, Identity, LineDecoder, Moment, Reply, Request, Setup, encode_line,
};
pub use frame::{Decoder, Frame, FrameError, encode};
pub use network::{
    Address, Interface, MAX_INTERFACES, MAX_NETWORK_ENTRIES, Neighbour, Route, spare_mac,
};
pub use process::{ContainerStart, ExecStart, ExitStatus, Failure, FailureKind, OciJson, Spawn};

/// Version of everything in this crate. The monitor refuses an agent of another generation.
pub const GENERATION: u16 = 8;

/// Host vsock port that the agent dials once it can serve: its connection means "ready".
pub const CONTROL_PORT: u32 = 1024;

/// Host vsock port where the questions for the name server of a guest's network go: each message
/// behind its length, two bytes, the higher first; so are the answers.
pub const RESOLVER_PORT: u32 = 1026;

/// Where an engine's own name server is in the network namespace that it made: Docker's address.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(127, 0, 0, 11);

/// Guest vsock port on which the agent accepts process streams.
pub const PROCESS_PORT: u32 = 1025;

/// Context id of every guest. Streams end in the monitor, so the same id serves all.
pub const GUEST_CID: u32 = 3;

/// Tag of the one virtio-fs device whose tree holds the root and every volume.
pub const SHARES_TAG: &str = "hull";

/// Where the agent mounts that device in the guest; OCI specs sent to the agent name the
/// container's root and the sources of bind mounts by paths below it.
pub const SHARES_DIR: &str = "/run/hull/shares";

/// The one disk of a guest, by its place among the devices.
pub const SCRATCH_DEVICE: &str = "/dev/vda";

/// Where the agent mounts that disk, on which [`SCRATCH_UPPER`] and [`SCRATCH_WORK`] are there.
pub const SCRATCH_DIR: &str = "/run/hull/scratch";

/// The directory of the disk that holds what was written over the image.
pub const SCRATCH_UPPER: &str = "upper";

/// The directory of the disk that is overlayfs's own.
pub const SCRATCH_WORK: &str = "work";

/// Where the agent mounts the image's layers with the scratch disk over them: a container's root.
pub const LAYERED_ROOT_DIR: &str = "/run/hull/root";

/// Where the agent keeps the memory that a pod's containers share (`/dev/shm`), if
/// [`Setup::shared_memory_bytes`] asks for it.
pub const SHARED_MEMORY_DIR: &str = "/run/hull/shm";

/// Largest data payload (stdin, stdout, stderr) of one frame, in bytes.
pub const MAX_DATA: usize = 64 * 1024;

/// Largest payload the agent accepts from the host (a spawn with its whole spec), in bytes.
pub const MAX_FROM_HOST: usize = 4 * 1024 * 1024;

/// Largest payload the host accepts from the guest, in bytes.
pub const MAX_FROM_GUEST: usize = MAX_DATA;

/// Bytes of stdin that may be on their way without a [`Frame::StdinAck`]. The agent can always
/// hold this much, so a process that never reads cannot keep a signal from getting through.
pub const STDIN_WINDOW: usize = 256 * 1024;
