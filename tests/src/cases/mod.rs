//! The table of `run` cases: what a container's command must see and do, whoever runs it.
//!
//! Owns: the shape of a case, its data by subject, how its outcome is judged. Refuses: to know an
//! engine's flags; [`adapters`](crate::adapters) put a case into an engine's words.

mod check;
mod config;
mod devices;
mod environment;
mod files;
mod identity;
mod limits;
mod mounts;
mod process;
mod rights;
mod signals;
mod streams;
mod terminal;

use std::path::{Path, PathBuf};

use rustix::process::Signal;

pub use check::run_all;

use crate::image;

/// One row of the table.
#[derive(Debug, Clone)]
pub struct Case {
    /// What it shows, as a sentence with underscores.
    pub name: &'static str,
    /// The engines that it can't hold on, with the reason.
    pub only: Only,
    /// The image's name.
    pub image: &'static str,
    /// Program and arguments; none is the image's own.
    pub command: Vec<String>,
    /// What the container is made of besides.
    pub setup: Setup,
    /// What happens while it runs.
    pub steps: Vec<Step>,
    /// Given on stdin, and then its end. Without it, there is no stdin.
    pub stdin: Option<Vec<u8>>,
    /// A terminal of so many rows and columns.
    pub tty: Option<(u16, u16)>,
    /// The exit code.
    pub code: i32,
    /// Judges stdout (or all that came to the terminal).
    pub stdout: Expect,
    /// Judges stderr.
    pub stderr: Expect,
    /// Judges the host's directories of [`Setup::shares`] afterwards.
    pub after: Option<fn(&Path)>,
}

/// Who can hold a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Only {
    /// Everybody.
    No,
    /// Not the control, for this reason.
    Hull(&'static str),
}

/// What a container is made of, in nobody's words.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// Program that the image's is replaced by.
    pub entrypoint: Option<&'static str>,
    /// Variables over the image's; `None` removes one.
    pub env: Vec<(String, Option<String>)>,
    /// A file of variables.
    pub env_file: Option<&'static str>,
    /// The user.
    pub user: User,
    /// Additional groups, beside the user's own.
    pub groups: Vec<u32>,
    /// Working directory.
    pub cwd: Option<&'static str>,
    /// Host name.
    pub hostname: Option<&'static str>,
    /// What the host shares.
    pub shares: Vec<Share>,
    /// Memory file systems: target and options.
    pub tmpfs: Vec<(&'static str, &'static str)>,
    /// Nothing can be written to the root.
    pub read_only: bool,
    /// Capabilities over the default ones.
    pub cap_add: Vec<&'static str>,
    /// Capabilities without which it runs.
    pub cap_drop: Vec<&'static str>,
    /// No program can have more rights than its parent.
    pub no_new_privileges: bool,
    /// Limits: name, soft, hard.
    pub ulimits: Vec<(&'static str, u64, u64)>,
    /// Processes.
    pub pids: Option<i64>,
    /// Memory, MiB.
    pub memory: Option<u64>,
    /// Processors.
    pub cpus: Option<u32>,
    /// Kernel settings.
    pub sysctls: Vec<(&'static str, &'static str)>,
    /// A minimal init is process 1.
    pub init: bool,
}

/// A user as it is asked for, and who that is in the image.
#[derive(Debug, Clone, Copy, Default)]
pub struct User {
    /// As a person says it; empty is the image's own.
    pub asked: &'static str,
    /// Its number.
    pub uid: u32,
    /// Its group's number.
    pub gid: u32,
    /// Its further groups' numbers.
    pub groups: &'static [u32],
}

/// A directory or file of the host that the container sees.
#[derive(Debug, Clone)]
pub struct Share {
    /// Where on the host: relative to the case's directory, or absolute.
    pub source: PathBuf,
    /// Where in the container.
    pub target: &'static str,
    /// Refuses writes.
    pub read_only: bool,
    /// Files to make before: path in the case's directory, contents.
    pub files: Vec<(&'static str, &'static str)>,
}

/// Something that happens while the command runs.
#[derive(Debug, Clone)]
pub struct Step {
    /// Once stdout has this.
    pub when: &'static str,
    /// What.
    pub act: Act,
}

/// What can happen to a command that runs.
#[derive(Debug, Clone)]
pub enum Act {
    /// The engine's command gets a signal.
    Signal(Signal),
    /// Something is typed or sent to its stdin.
    Write(&'static str),
    /// The terminal changes to so many rows and columns.
    Resize(u16, u16),
    /// The host changes the case's directory, and then stdin gets a line.
    Host(fn(&Path), &'static str),
}

/// How an output is judged.
#[derive(Debug, Clone)]
pub enum Expect {
    /// Anything.
    Any,
    /// Exactly these bytes.
    Is(Vec<u8>),
    /// Each of these is somewhere in it.
    Has(Vec<&'static str>),
    /// A sentence, and whether it is true.
    Holds(&'static str, fn(&str) -> bool),
}

/// Every case, by subject.
#[must_use]
pub fn all() -> Vec<(&'static str, Vec<Case>)> {
    vec![
        ("process", process::cases()),
        ("environment", environment::cases()),
        ("identity", identity::cases()),
        ("streams", streams::cases()),
        ("terminal", terminal::cases()),
        ("signals", signals::cases()),
        ("rights", rights::cases()),
        ("limits", limits::cases()),
        ("mounts", mounts::cases()),
        ("files", files::cases()),
        ("devices", devices::cases()),
        ("config", config::cases()),
    ]
}

/// A case that runs this program and expects success and silence.
fn case(name: &'static str, command: &[&str]) -> Case {
    Case {
        name,
        only: Only::No,
        image: image::PLAIN,
        command: command.iter().map(ToString::to_string).collect(),
        setup: Setup::default(),
        steps: Vec::new(),
        stdin: None,
        tty: None,
        code: 0,
        stdout: Expect::Is(Vec::new()),
        stderr: Expect::Is(Vec::new()),
        after: None,
    }
}

/// A case that runs a script of busybox's shell.
fn sh(name: &'static str, script: &str) -> Case {
    case(name, &["sh", "-c", script])
}

impl Case {
    fn only_hull(mut self, why: &'static str) -> Self {
        self.only = Only::Hull(why);
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Setup)) -> Self {
        change(&mut self.setup);
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.setup
            .env
            .push((name.to_owned(), Some(value.to_owned())));
        self
    }

    fn user(mut self, asked: &'static str, uid: u32, gid: u32, groups: &'static [u32]) -> Self {
        self.setup.user = User {
            asked,
            uid,
            gid,
            groups,
        };
        self
    }

    fn share(mut self, share: Share) -> Self {
        self.setup.shares.push(share);
        self
    }

    fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    fn tty(mut self, rows: u16, columns: u16) -> Self {
        self.tty = Some((rows, columns));
        self
    }

    fn step(mut self, when: &'static str, act: Act) -> Self {
        self.steps.push(Step { when, act });
        self
    }

    fn ends(mut self, code: i32) -> Self {
        self.code = code;
        self
    }

    fn prints(mut self, text: impl Into<Vec<u8>>) -> Self {
        self.stdout = Expect::Is(text.into());
        self
    }

    fn stdout(mut self, expect: Expect) -> Self {
        self.stdout = expect;
        self
    }

    fn stderr(mut self, expect: Expect) -> Self {
        self.stderr = expect;
        self
    }

    fn after(mut self, look: fn(&Path)) -> Self {
        self.after = Some(look);
        self
    }

    /// Whether it needs an open stdin. A terminal does: only then is the caller's own raw.
    #[must_use]
    pub fn is_interactive(&self) -> bool {
        let writes = |step: &Step| matches!(step.act, Act::Write(_) | Act::Host(..));
        self.tty.is_some() || self.stdin.is_some() || self.steps.iter().any(writes)
    }
}

/// A directory of the case's own, with these files, seen at `target`.
fn directory(target: &'static str, files: &[(&'static str, &'static str)]) -> Share {
    Share {
        source: "shared".into(),
        target,
        read_only: false,
        files: files.to_vec(),
    }
}

impl Share {
    fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }
}
