//! From a face to a monitor: what is handed on, and what comes back before the container runs.
//!
//! ```text
//! 3 the container's directory   4 its run directory   5 the lock   6 the readiness pipe
//! 7 the stream of the client that is attached from the start, if any
//! ```
//!
//! Nothing of the plan is on the command line but the id, so nothing of it shows in `ps`.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::exit::FailureClass;
use crate::store::Entry;
use crate::sys;

/// What a monitor says of itself when it has a client from the start.
const ATTACHED: &str = "attached";

/// Longest word of a monitor's on its readiness pipe, in bytes.
const MAX_READINESS: u64 = 256 * 1024;

/// Why a container never ran, as the monitor says it on its readiness pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", chain.join(": "))]
pub struct StartFailure {
    /// How far it came: `launch`, `open`, `rootfs`, `build`, `jail`, `boot`, `setup`, `spawn`.
    pub stage: String,
    /// What kind of failure it is.
    pub class: FailureClass,
    /// The error and its causes, outermost first.
    pub chain: Vec<String>,
}

/// The one line on the readiness pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Readiness {
    /// The first process runs.
    Started,
    /// It never will.
    Failed(StartFailure),
}

/// What a monitor was handed.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) entry: Entry,
    pub(crate) lock: File,
    pub(crate) readiness: File,
    pub(crate) attached: Option<UnixStream>,
}

impl Inherited {
    /// Takes it. First thing that a monitor does.
    pub(crate) fn take() -> io::Result<Self> {
        let attached = env::args_os().nth(2).is_some_and(|word| word == ATTACHED);
        let mut descriptors = sys::inherited(if attached { 5 } else { 4 })?.into_iter();
        let mut next = || descriptors.next().ok_or(io::ErrorKind::NotFound);
        let directory = named(&next()?)?;
        let run = named(&next()?)?;
        Ok(Self {
            entry: Entry::new(directory, run),
            lock: File::from(next()?),
            readiness: File::from(next()?),
            attached: descriptors.next().map(UnixStream::from),
        })
    }
}

fn named(descriptor: &OwnedFd) -> io::Result<PathBuf> {
    fs::read_link(sys::descriptor_path(descriptor))
}

/// A monitor that was started and hasn't said yet how it went.
#[derive(Debug)]
pub(crate) struct Launched {
    child: Child,
    readiness: File,
}

/// Starts a monitor. `lock` stays locked for as long as it lives.
pub(crate) fn launch(
    monitor: &Path,
    entry: &Entry,
    lock: File,
    attached: Option<UnixStream>,
) -> io::Result<Launched> {
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let directory = open(&entry.directory)?;
    let run = open(&entry.run)?;
    let (readiness, said) = io::pipe()?;
    let mut command = Command::new(monitor);
    command
        .arg(entry.id())
        .current_dir("/")
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut descriptors = vec![directory.as_fd(), run.as_fd(), lock.as_fd(), said.as_fd()];
    if let Some(stream) = &attached {
        command.arg(ATTACHED);
        descriptors.push(stream.as_fd());
    }
    let child = sys::spawn(&mut command, &descriptors)?;
    // From here on they are the monitor's alone.
    drop((said, lock, attached));
    Ok(Launched {
        child,
        readiness: File::from(OwnedFd::from(readiness)),
    })
}

impl Launched {
    /// Waits for the monitor's word.
    pub(crate) fn readiness(mut self) -> Result<(), StartFailure> {
        let mut line = Vec::new();
        let read = (&mut self.readiness)
            .take(MAX_READINESS)
            .read_to_end(&mut line);
        match read.map(|_| serde_json::from_slice(&line)) {
            Ok(Ok(Readiness::Started)) => Ok(()),
            Ok(Ok(Readiness::Failed(failure))) => {
                // It has said its last word and is about to exit.
                let _ = self.child.wait();
                Err(failure)
            }
            _ => Err(self.died()),
        }
    }

    fn died(&mut self) -> StartFailure {
        let how = match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        };
        StartFailure {
            stage: "launch".to_owned(),
            class: FailureClass::Hull,
            chain: vec!["the monitor died before its container ran".to_owned(), how],
        }
    }
}
