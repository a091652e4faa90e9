//! Errors at the edge: their chain printed once, their exit code chosen once.
//!
//! Owns: the code of every way to fail. Refuses: recovering from any.

use std::io::{self, Write, stderr};

use hull_proto::ExitStatus;
use hull_sandbox::{CODE_HULL_FAILED, EngineError, FailureClass, StartFailure};

use crate::args::Command;

/// The exit code of a command that failed in no special way: Docker keeps 125 for `run` (and
/// for what was typed wrongly), and has 1 elsewhere.
pub(crate) fn default_code(command: &Command) -> u8 {
    match command {
        Command::Run(_) => CODE_HULL_FAILED,
        _ => 1,
    }
}

/// A failure whose exit code is known where it happens.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Coded {
    /// The exit code.
    pub(crate) code: u8,
    /// The whole message.
    pub(crate) message: String,
}

impl Coded {
    /// A failure of Hull or its user around a container.
    pub(crate) fn hull(message: impl Into<String>) -> Self {
        Self {
            code: CODE_HULL_FAILED,
            message: message.into(),
        }
    }

    /// A process that was not started in a container that runs.
    pub(crate) fn exec(class: FailureClass, message: String) -> Self {
        Self {
            code: class.exec_code(),
            message,
        }
    }
}

/// The code of a process that ended: its own, or 128 + signal.
pub(crate) fn exit_code(status: ExitStatus) -> u8 {
    u8::try_from(status.code()).unwrap_or(u8::MAX)
}

/// Prints `error` and its causes, and returns the exit code.
pub(crate) fn report(error: &anyhow::Error, default: u8) -> u8 {
    let pipe = |cause: &(dyn std::error::Error + 'static)| {
        let cause = cause.downcast_ref::<io::Error>();
        cause.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    if error.chain().any(pipe) {
        // Whoever read our output has had enough: end as SIGPIPE would have ended us.
        return 128 + crate::signals::PIPE;
    }
    // Nothing more can be done about a stderr that doesn't work.
    let _ = stderr().write_all(describe(error).as_bytes());
    code(error, default)
}

/// Prints what went wrong with one of several containers or images.
pub(crate) fn report_one(error: &anyhow::Error) {
    let _ = stderr().write_all(describe(error).as_bytes());
}

fn code(error: &anyhow::Error, default: u8) -> u8 {
    for cause in error.chain() {
        if let Some(coded) = cause.downcast_ref::<Coded>() {
            return coded.code;
        }
        if let Some(failure) = cause.downcast_ref::<StartFailure>() {
            return failure.class.run_code();
        }
        if let Some(EngineError::Start(failure)) = cause.downcast_ref::<EngineError>() {
            return failure.class.run_code();
        }
    }
    default
}

/// `hull: ` and the error, then each cause in a line of its own.
fn describe(error: &anyhow::Error) -> String {
    let mut messages: Vec<String> = Vec::new();
    for cause in error.chain() {
        match start_failure(cause) {
            Some(failure) => messages.extend(failure.chain.iter().cloned()),
            None => messages.push(cause.to_string()),
        }
    }
    // Transparent errors say what their source says.
    messages.dedup();
    let mut text = String::new();
    for (index, message) in messages.iter().enumerate() {
        let message = message.trim_end().replace('\n', "\n    ");
        match index {
            0 => text.push_str(&format!("hull: {message}\n")),
            _ => text.push_str(&format!("  caused by: {message}\n")),
        }
    }
    text
}

fn start_failure<'a>(cause: &'a (dyn std::error::Error + 'static)) -> Option<&'a StartFailure> {
    match cause.downcast_ref::<EngineError>() {
        Some(EngineError::Start(failure)) => Some(failure),
        _ => cause.downcast_ref::<StartFailure>(),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    fn start(class: FailureClass) -> anyhow::Error {
        let failure = StartFailure {
            stage: "spawn".into(),
            class,
            chain: vec!["cannot start \"nope\"".into(), "not in $PATH".into()],
        };
        anyhow::Error::from(EngineError::from(failure))
    }

    #[test]
    fn each_way_to_fail_has_its_code() {
        for (error, code) in [
            (start(FailureClass::NotFound), 127),
            (start(FailureClass::NotExecutable), 126),
            (start(FailureClass::Refused), 125),
            (start(FailureClass::Hull), 125),
            (start(FailureClass::NotFound).context("around it"), 127),
            (Coded::exec(FailureClass::Refused, "no".into()).into(), 126),
            (Coded::hull("no").into(), 125),
            (EngineError::NotRunning("x".into()).into(), 1),
        ] {
            assert_eq!(super::code(&error, 1), code, "{error:?}");
        }
    }

    #[test]
    fn the_chain_is_said_once() {
        assert_eq!(
            describe(&start(FailureClass::NotFound)),
            "hull: cannot start \"nope\"\n  caused by: not in $PATH\n"
        );
        let error = Err::<(), _>(io::Error::other("disk on fire"))
            .context("cannot read \"a\"")
            .unwrap_err();
        assert_eq!(
            describe(&error),
            "hull: cannot read \"a\"\n  caused by: disk on fire\n"
        );
    }

    #[test]
    fn a_reader_that_left_is_no_error() {
        let error = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!(report(&error, 1), 141);
    }
}
