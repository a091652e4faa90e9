//! Why a process could not be started, in the words that engines look for.
//!
//! Owns: the one error of everything between a spawn request and `execve`. It is what travels to
//! the host, so it carries a kind and a sentence and no chain. Refuses: to guess a kind; whoever
//! raises a fault names it.

use std::fmt::Display;

use hull_proto::{Failure, FailureKind};
use rustix::io::Errno;

/// Longest message that travels, in bytes.
const MAX_MESSAGE: usize = 4096;

/// A process that was not started.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Fault {
    kind: FailureKind,
    message: String,
}

impl Fault {
    /// A fault of this kind.
    pub(crate) fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
        }
    }

    /// The request can't be met.
    pub(crate) fn refused(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Refused, message)
    }

    /// The agent itself failed.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(FailureKind::Internal, message)
    }

    /// What the host is told.
    pub(crate) fn into_failure(mut self) -> Failure {
        if self.message.len() > MAX_MESSAGE {
            let mut end = MAX_MESSAGE;
            while !self.message.is_char_boundary(end) {
                end -= 1;
            }
            self.message.truncate(end);
        }
        Failure {
            kind: self.kind,
            message: self.message,
        }
    }
}

/// Turns the error of a system call into a fault that says what was tried.
pub(crate) trait Tried<T> {
    /// Refuses the request: `what` failed for a reason that lies in the request.
    fn or_refuse<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, Fault>;
    /// Blames the agent: `what` should not fail.
    fn or_internal<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, Fault>;
}

impl<T, E: Into<std::io::Error>> Tried<T> for Result<T, E> {
    fn or_refuse<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, Fault> {
        self.map_err(|error| Fault::refused(format!("{}: {}", what(), plain(&error.into()))))
    }

    fn or_internal<D: Display>(self, what: impl FnOnce() -> D) -> Result<T, Fault> {
        self.map_err(|error| Fault::internal(format!("{}: {}", what(), plain(&error.into()))))
    }
}

/// The text of an error number as engines print it: `no such file or directory`.
pub(crate) fn errno_text(errno: Errno) -> String {
    plain(&errno.into())
}

fn plain(error: &std::io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    let Some(first) = chars.next() else {
        return String::new();
    };
    first.to_lowercase().chain(chars).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_number_reads_as_engines_print_it() {
        assert_eq!(errno_text(Errno::NOENT), "no such file or directory");
        assert_eq!(errno_text(Errno::NOEXEC), "exec format error");
    }

    #[test]
    fn a_long_message_is_cut_between_characters() {
        let failure = Fault::refused("ä".repeat(MAX_MESSAGE)).into_failure();
        assert_eq!(failure.message.len(), MAX_MESSAGE);
    }
}
