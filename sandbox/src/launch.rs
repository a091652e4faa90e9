//! From a face to a monitor: what is handed on, and what comes back before the container runs.
//!
//! ```text
//! 3 the container's directory   4 its run directory   5 the lock   6 the readiness pipe
//! 7 the stream of the client that is attached from the start, if any
//! the last: the checkpoint to go on from, if any
//! 0 1 2 the container's own streams, if the monitor is to carry them
//! ```
//!
//! Nothing of the plan is on the command line but the id, so nothing of it shows in `ps`.

use std::env;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command};

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::carry::Stdio;
use crate::exit::FailureClass;
use crate::plan::PlannedVm;
use crate::store::Entry;
use crate::sys;

/// What a monitor is told when it has a client from the start.
const ATTACHED: &str = "attached";
/// When its standard streams are the container's.
const CARRYING: &str = "carrying";
/// When they are so and a terminal.
const CARRYING_TERMINAL: &str = "carrying-terminal";

/// What it is told after that when it goes on from a checkpoint.
const GOING_ON: &str = "going-on";

/// What a monitor is told that holds no container, but makes a template.
pub(crate) const BUILD_TEMPLATE: &str = "build-template";

/// Longest word of a monitor's on its readiness pipe, in bytes.
const MAX_READINESS: u64 = 256 * 1024;

/// Why a container never ran, as the monitor says it on its readiness pipe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{}", chain.join(": "))]
pub struct StartFailure {
    /// How far it came: `launch`, `open`, `rootfs`, `build`, `join`, `jail`, `boot`,
    /// `setup`, `spawn`, `view`.
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
    Started {
        /// What its start should have had and had not.
        notice: Option<String>,
    },
    /// It never will.
    Failed(StartFailure),
}

/// What a monitor was handed.
#[derive(Debug)]
pub(crate) struct Inherited {
    pub(crate) entry: Entry,
    pub(crate) lock: File,
    pub(crate) readiness: File,
    pub(crate) streams: Streams,
    /// What the first process goes on from, if it doesn't begin.
    pub(crate) checkpoint: Option<File>,
}

/// Where the first process's streams go from the start.
#[derive(Debug, Default)]
pub(crate) enum Streams {
    /// To the log alone.
    #[default]
    None,
    /// To a client, as frames.
    Attached(UnixStream),
    /// To descriptors that the monitor carries them to.
    Own(Stdio),
}

impl Inherited {
    /// Takes it. First thing that a monitor does.
    pub(crate) fn take() -> io::Result<Self> {
        let word = env::args_os().nth(2).unwrap_or_default();
        let attached = word == ATTACHED;
        let goes_on = env::args_os().nth(3).is_some_and(|word| word == GOING_ON);
        let count = 4 + usize::from(attached) + usize::from(goes_on);
        let mut descriptors = sys::inherited(count)?.into_iter();
        let own = word == CARRYING || word == CARRYING_TERMINAL;
        let streams = if own {
            Streams::Own(take_streams(word == CARRYING_TERMINAL)?)
        } else {
            Streams::None
        };
        let mut next = || descriptors.next().ok_or(io::ErrorKind::NotFound);
        let directory = named(&next()?)?;
        let run = named(&next()?)?;
        Ok(Self {
            entry: Entry::new(directory, run),
            lock: File::from(next()?),
            readiness: File::from(next()?),
            streams: match attached {
                true => Streams::Attached(UnixStream::from(next()?)),
                false => streams,
            },
            checkpoint: goes_on.then(next).transpose()?.map(File::from),
        })
    }
}

/// Takes the standard streams and leaves /dev/null in their places.
fn take_streams(terminal: bool) -> io::Result<Stdio> {
    let stdio = Stdio::own(terminal)?;
    let null = File::options().read(true).write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(stdio)
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
    streams: Streams,
    checkpoint: Option<File>,
) -> io::Result<Launched> {
    let open = |path: &Path| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
    };
    let directory = open(&entry.directory)?;
    let run = open(&entry.run)?;
    let (readiness, said) = io::pipe()?;
    let mut command = Command::new(monitor);
    command.arg(entry.id()).current_dir("/").env_clear();
    // An arena of its own for each of a handful of threads costs a start more than it ever saves
    // them (mallopt(3), `M_ARENA_MAX`).
    command.env("MALLOC_ARENA_MAX", "1");
    let mut descriptors = vec![directory.as_fd(), run.as_fd(), lock.as_fd(), said.as_fd()];
    let null = process::Stdio::null;
    match &streams {
        Streams::Own(own) => command
            .arg(if own.terminal {
                CARRYING_TERMINAL
            } else {
                CARRYING
            })
            .stdin(own.stdin.try_clone()?)
            .stdout(own.stdout.try_clone()?)
            .stderr(own.stderr.try_clone()?),
        _ => command.stdin(null()).stdout(null()).stderr(null()),
    };
    match &streams {
        Streams::Attached(stream) => {
            command.arg(ATTACHED);
            descriptors.push(stream.as_fd());
        }
        // The next word has its place.
        Streams::None if checkpoint.is_some() => {
            command.arg("");
        }
        _ => {}
    }
    if let Some(checkpoint) = &checkpoint {
        command.arg(GOING_ON);
        descriptors.push(checkpoint.as_fd());
    }
    let child = sys::spawn_in_session(&mut command, &descriptors)?;
    // From here on they are the monitor's alone.
    drop((said, lock, streams, checkpoint));
    Ok(Launched {
        child,
        readiness: File::from(OwnedFd::from(readiness)),
    })
}

/// Has a monitor make the template of a VM; returns the template's name.
pub(crate) fn build_template(monitor: &Path, vm: &PlannedVm) -> io::Result<Result<String, String>> {
    let mut child = Command::new(monitor)
        .arg(BUILD_TEMPLATE)
        .current_dir("/")
        .env_clear()
        .stdin(process::Stdio::piped())
        .stdout(process::Stdio::piped())
        .stderr(process::Stdio::piped())
        .spawn()?;
    let described = child.stdin.take().map(|to| serde_json::to_writer(to, vm));
    let done = child.wait_with_output()?;
    described.transpose()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    Ok(match done.status.success() {
        true => Ok(text(&done.stdout)),
        false => Err(text(&done.stderr)),
    })
}

impl Launched {
    /// Waits for the monitor's word; returns what it has to say of a start that went well.
    pub(crate) fn readiness(mut self) -> Result<Option<String>, StartFailure> {
        let mut line = Vec::new();
        let read = (&mut self.readiness)
            .take(MAX_READINESS)
            .read_to_end(&mut line);
        match read.map(|_| serde_json::from_slice(&line)) {
            Ok(Ok(Readiness::Started { notice })) => Ok(notice),
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
