//! What a container is, as its directory tells it: the shapes of `state.json` and `exit.json`,
//! which only the monitor writes.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// What a container is at this moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It has a directory and was never started.
    Created,
    /// Its monitor lives, its first process not yet.
    Starting,
    /// Its first process runs, or waits, as the phase says.
    Running(Running),
    /// It ended.
    Exited(ExitRecord),
}

/// Contents of `state.json` while the first process runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Running {
    /// The monitor's process id on the host.
    pub monitor_pid: u32,
    /// The first process's id in the guest's first namespace.
    pub guest_pid: u32,
    /// When the first process started, or was made if it is held.
    pub started_at: Timestamp,
    /// Whether it runs now.
    #[serde(default)]
    pub phase: Phase,
    /// The guest kernel's release.
    pub kernel: String,
}

/// What a first process that exists is about.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// All is made; its command waits to be released.
    Held,
    /// It runs.
    #[default]
    Running,
    /// Its guest stands still.
    Paused,
}

/// Contents of `exit.json`: how a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExitRecord {
    /// The code that `run` and `wait` give: the process's own, 128 + signal, or one of
    /// [`crate::exit`]'s.
    pub code: u8,
    /// The signal that ended it.
    pub signal: Option<u8>,
    /// Whether processes of it were killed because memory ran out in the guest. Where the host's
    /// ran out, `error` says so.
    pub oom: bool,
    /// When the first process started, if it did.
    pub started_at: Option<Timestamp>,
    /// When it ended.
    pub finished_at: Timestamp,
    /// What went wrong when it was Hull, the guest or the host that ended it.
    pub error: Option<String>,
}
