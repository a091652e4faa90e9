//! The messages of process streams: what to start, and how it ended.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// First frame of a process stream, said by the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
// Tagged from outside: a tag inside would have every spec buffered before it is understood.
#[serde(rename_all = "snake_case")]
pub enum Spawn {
    /// Creates a container and runs its first process.
    Container(Box<ContainerStart>),
    /// Runs another process in a container that runs.
    Exec(Box<ExecStart>),
    /// Connects to a port of the guest's own address: what goes in on stdin comes out there, what
    /// comes back is stdout.
    Connect {
        /// The TCP port.
        port: u16,
    },
}

/// A document of the OCI runtime spec, passed on unread: what it may hold is between the plan
/// that writes it and the agent that honours it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OciJson(Box<RawValue>);

impl OciJson {
    /// Writes a document.
    ///
    /// # Errors
    /// Only for values that JSON has no form of.
    pub fn write<T: Serialize>(document: &T) -> Result<Self, serde_json::Error> {
        serde_json::value::to_raw_value(document).map(Self)
    }

    /// The document as it was written.
    #[must_use]
    pub fn text(&self) -> &str {
        self.0.get()
    }

    /// Reads the document.
    ///
    /// # Errors
    /// If it isn't what `T` expects.
    pub fn read<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        serde_json::from_str(self.0.get())
    }
}

impl PartialEq for OciJson {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// A container to create.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ContainerStart {
    /// Names the container within the sandbox: 1 to 128 of `[A-Za-z0-9_.-]`.
    pub id: String,
    /// The OCI runtime spec, with every path as the guest sees it (below
    /// [`crate::SHARES_DIR`] for the root and bind mounts).
    pub spec: OciJson,
    /// Runs a minimal init as the container's process 1, which forwards signals to the
    /// command and reaps orphans, as `docker run --init` does. Without a command (no arguments
    /// in the spec) it is all there is, and ends at SIGTERM.
    #[serde(default)]
    pub init: bool,
    /// Makes everything and stops short of the command: the agent says
    /// [`crate::Frame::Prepared`] and goes on at [`crate::Frame::Go`].
    #[serde(default)]
    pub hold: bool,
}

/// A process to add to a container.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExecStart {
    /// The container's name.
    pub id: String,
    /// The process, as the OCI runtime spec describes one.
    pub process: OciJson,
}

/// How a process ended: the last frame of its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It called `exit` with this code.
    Exited(u8),
    /// This signal ended it.
    Signaled {
        /// The signal's number.
        signal: u8,
        /// Whether the guest's kernel ended it because the container's memory ran out.
        oom: bool,
    },
}

impl ExitStatus {
    /// The code that shells and container engines report: the process's own, or 128 + signal.
    #[must_use]
    pub fn code(self) -> i32 {
        match self {
            Self::Exited(code) => i32::from(code),
            Self::Signaled { signal, .. } => 128 + i32::from(signal),
        }
    }
}

/// Why a process was not started: the only and last frame of its stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// What kind of fault it is, for the exit code.
    pub kind: FailureKind,
    /// The fault for a person, in the words engines look for (`executable file not found in
    /// $PATH`, `permission denied`, `no such file or directory`).
    pub message: String,
}

/// The kinds of failure that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// The command doesn't exist (127).
    NotFound,
    /// The command exists and can't be executed (126).
    NotExecutable,
    /// The request can't be met: user, working directory, mount, limit (125 for the
    /// container's first process as Docker has it, 126 for an exec).
    Refused,
    /// The agent itself failed (125).
    Internal,
}
