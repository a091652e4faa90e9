//! What faces call.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::exit::{CODE_HULL_FAILED, FailureClass};
use crate::plan::Plan;
use crate::request::{ExecRequest, RunRequest};
use crate::settings::Settings;
use crate::state::{ExitRecord, Status};
use crate::stream::{ProcessStream, StreamError};

/// Something that could not be done for a face.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The container failed to start.
    #[error(transparent)]
    Start(#[from] StartFailure),
    /// No container has this name or id.
    #[error("No such container: {0}")]
    NotFound(String),
    /// The operation needs a container that runs.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The operation needs a container that doesn't run.
    #[error("container {0} is running: stop it before, or force its removal")]
    IsRunning(String),
    /// The host refused something.
    #[error("cannot {action}")]
    Host {
        /// What was tried, on what.
        action: String,
        /// Why not.
        source: io::Error,
    },
    /// The stream to a process broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl EngineError {
    /// The code that a face exits with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Start(failure) => failure.class.run_code(),
            _ => CODE_HULL_FAILED,
        }
    }
}

/// Why a container never ran, as the monitor says it on its readiness pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", chain.join(": "))]
pub struct StartFailure {
    /// How far it came: `open`, `rootfs`, `build`, `boot`, `setup`, `spawn`.
    pub stage: String,
    /// What kind of failure it is.
    pub class: FailureClass,
    /// The error and its causes, outermost first.
    pub chain: Vec<String>,
}

/// Hull's engine on this host.
#[derive(Debug, Clone)]
pub struct Engine {
    settings: Settings,
}

/// How to read a container's log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Goes on until the container ends.
    pub follow: bool,
    /// Only this many of the last lines.
    pub tail: Option<usize>,
}

/// A line (or the part of one) of a container's log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// The bytes, with the newline if there was one.
    pub log: Vec<u8>,
    /// Whether it went to stderr.
    pub stderr: bool,
    /// When it was written.
    pub time: jiff::Timestamp,
}

impl Engine {
    /// An engine with these settings. Touches nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self { settings }
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Plans a container and gives it its directory and name. Nothing runs yet.
    ///
    /// # Errors
    /// If the request is invalid, the name is in use, or the disk refuses.
    pub fn create(&self, request: &RunRequest) -> Result<Container, EngineError> {
        let _ = request;
        Err(EngineError::NotFound(String::new()))
    }

    /// The container with this id, unique beginning of an id, or name.
    ///
    /// # Errors
    /// If there is none, or the beginning is several's.
    pub fn find(&self, name_or_id: &str) -> Result<Container, EngineError> {
        Err(EngineError::NotFound(name_or_id.to_owned()))
    }

    /// Every container, the newest first.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn list(&self) -> Result<Vec<Container>, EngineError> {
        Ok(Vec::new())
    }

    /// Clears what monitors and faces that were killed left behind; returns how many things.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn sweep(&self) -> Result<usize, EngineError> {
        Ok(0)
    }
}

/// One container of this host.
#[derive(Debug)]
pub struct Container {
    directory: PathBuf,
    plan: Plan,
}

impl Container {
    /// Its id, 64 hexadecimal digits.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.plan.id
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.plan.name
    }

    /// What it was made to be.
    #[must_use]
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What it is at this moment.
    ///
    /// # Errors
    /// If its directory can't be read.
    pub fn status(&self) -> Result<Status, EngineError> {
        Ok(Status::Created)
    }

    /// Starts it and returns the first process's stream, attached before its first byte of
    /// output; drop the stream to detach. The container doesn't need this process to live on.
    ///
    /// # Errors
    /// [`EngineError::Start`] says how far the start came.
    pub fn start(&mut self, attach: bool) -> Result<Option<ProcessStream>, EngineError> {
        let _ = attach;
        Err(EngineError::NotRunning(self.plan.id.clone()))
    }

    /// Attaches to the first process: output from now on, stdin if the container is
    /// interactive and nobody else holds it.
    ///
    /// # Errors
    /// If the container doesn't run.
    pub fn attach(&self, stdin: bool) -> Result<ProcessStream, EngineError> {
        let _ = stdin;
        Err(EngineError::NotRunning(self.plan.id.clone()))
    }

    /// Runs another process in it. The stream's first frame is `Started` or `Failed`; closing
    /// the stream early kills the process.
    ///
    /// # Errors
    /// If the container doesn't run.
    pub fn exec(&self, request: &ExecRequest) -> Result<ProcessStream, EngineError> {
        let _ = request;
        Err(EngineError::NotRunning(self.plan.id.clone()))
    }

    /// Sends a signal to the first process.
    ///
    /// # Errors
    /// If the container doesn't run.
    pub fn signal(&self, signal: u8) -> Result<(), EngineError> {
        let _ = signal;
        Err(EngineError::NotRunning(self.plan.id.clone()))
    }

    /// Asks it to stop by its stop signal, kills it after its (or this) time; returns when the
    /// monitor is gone. A container that doesn't run is stopped already.
    ///
    /// # Errors
    /// If the monitor can't be spoken to.
    pub fn stop(&self, timeout: Option<Duration>) -> Result<(), EngineError> {
        let _ = timeout;
        Ok(())
    }

    /// Waits until it has ended and its monitor is gone.
    ///
    /// # Errors
    /// If it was never started.
    pub fn wait(&self) -> Result<ExitRecord, EngineError> {
        Err(EngineError::NotRunning(self.plan.id.clone()))
    }

    /// Reads its output so far, oldest first.
    ///
    /// # Errors
    /// If the log can't be opened.
    pub fn logs(&self, options: &LogOptions) -> Result<LogReader, EngineError> {
        let _ = options;
        Ok(LogReader {})
    }

    /// The last part of its VM's console.
    ///
    /// # Errors
    /// If there is one and it can't be read.
    pub fn boot_log(&self) -> Result<Vec<u8>, EngineError> {
        Ok(Vec::new())
    }

    /// Everything known about it, in the shape that `docker inspect` has where Docker has it.
    ///
    /// # Errors
    /// If its directory can't be read.
    pub fn inspect(&self) -> Result<serde_json::Value, EngineError> {
        Ok(serde_json::Value::Null)
    }

    /// Removes it and all it wrote. `force` kills it first.
    ///
    /// # Errors
    /// [`EngineError::IsRunning`] without `force`.
    pub fn remove(self, force: bool) -> Result<(), EngineError> {
        let _ = (self.directory, force);
        Ok(())
    }
}

/// Entries of a log, one after the other; with `follow`, `next` waits.
#[derive(Debug)]
pub struct LogReader {}

impl Iterator for LogReader {
    type Item = Result<LogEntry, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        None
    }
}
