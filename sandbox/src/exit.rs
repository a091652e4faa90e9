//! Exit codes: the one place where ends and failures become the numbers that a face exits with.

use hull_proto::FailureKind;
use serde::{Deserialize, Serialize};

/// Hull itself failed, before or around the container's command.
pub const CODE_HULL_FAILED: u8 = 125;
/// The command exists and cannot be executed.
pub const CODE_NOT_EXECUTABLE: u8 = 126;
/// The command does not exist.
pub const CODE_NOT_FOUND: u8 = 127;

/// Why something was never started, as far as exit codes tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureClass {
    /// The command does not exist.
    NotFound,
    /// The command exists and cannot be executed.
    NotExecutable,
    /// The request cannot be met: user, working directory, mount, limit.
    Refused,
    /// Hull or the host failed.
    Hull,
}

impl FailureClass {
    /// The exit code when a container's first process could not start.
    #[must_use]
    pub fn run_code(self) -> u8 {
        match self {
            Self::NotFound => CODE_NOT_FOUND,
            Self::NotExecutable => CODE_NOT_EXECUTABLE,
            Self::Refused | Self::Hull => CODE_HULL_FAILED,
        }
    }

    /// The exit code when a further process could not start in a running container.
    #[must_use]
    pub fn exec_code(self) -> u8 {
        match self {
            Self::NotFound => CODE_NOT_FOUND,
            Self::NotExecutable | Self::Refused => CODE_NOT_EXECUTABLE,
            Self::Hull => CODE_HULL_FAILED,
        }
    }
}

impl From<FailureKind> for FailureClass {
    fn from(kind: FailureKind) -> Self {
        match kind {
            FailureKind::NotFound => Self::NotFound,
            FailureKind::NotExecutable => Self::NotExecutable,
            FailureKind::Refused => Self::Refused,
            FailureKind::Internal => Self::Hull,
        }
    }
}
