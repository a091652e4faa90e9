//! What goes wrong, in the words and codes that containerd's own shims answer with: its clients
//! tell by the code, and by the words where there is no code.

use containerd_shim_protos::ttrpc::{self, Code, get_status};
use hull_sandbox::{EngineError, StoreError};

/// A call that can't be served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Fault {
    /// There is no such container or process, or no more.
    #[error("{0}: not found")]
    NotFound(String),
    /// There is one of that name.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// It is not in the state for that.
    #[error("{0}: failed precondition")]
    FailedPrecondition(String),
    /// What was sent makes no sense.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// No shim of this runtime does that.
    #[error("{0}: not implemented")]
    NotImplemented(&'static str),
    /// Anything else, in words.
    #[error("{0}")]
    Failed(String),
}

/// What a call has for an answer.
pub(crate) type Answer<T> = Result<T, Fault>;

impl Fault {
    /// A failure with its causes, after `what`.
    pub(crate) fn of(what: &str, error: &anyhow::Error) -> Self {
        let mut words: Vec<String> = error.chain().map(ToString::to_string).collect();
        // Transparent errors say what their source says.
        words.dedup();
        let words = format!("{what}: {}", words.join(": "));
        match error.downcast_ref() {
            Some(EngineError::Store(StoreError::NameInUse { .. })) => Self::AlreadyExists(words),
            _ => Self::Failed(words),
        }
    }

    /// What the engine says of a process that may just have ended.
    pub(crate) fn of_engine(what: &str, error: EngineError) -> Self {
        match error {
            EngineError::NotRunning(_) => Self::NotFound("process already finished".to_owned()),
            error => Self::of(what, &error.into()),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::NotImplemented(_) => Code::UNIMPLEMENTED,
            Self::Failed(_) => Code::UNKNOWN,
        }
    }
}

impl From<Fault> for ttrpc::Error {
    fn from(fault: Fault) -> Self {
        Self::RpcStatus(get_status(fault.code(), fault))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_has_the_code_and_the_words_of_containerds_own() {
        let fault = Fault::of_engine("cannot signal", EngineError::NotRunning("c".into()));
        let ttrpc::Error::RpcStatus(status) = ttrpc::Error::from(fault) else {
            panic!("no status")
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        assert_eq!(status.message(), "process already finished: not found");
    }
}
