//! A process under test: its streams held, its terminal made, every wait with a deadline.
//!
//! Owns: pipes, pseudo-terminals, signals, the end. Refuses: to know what the process is.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "what a fixture can't have ends its test"
)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// How often a case that repeats itself does so: as `HULL_ROUNDS` says, or this often.
#[must_use]
pub fn rounds(usual: u32) -> u32 {
    let asked = std::env::var("HULL_ROUNDS").ok();
    asked.and_then(|asked| asked.parse().ok()).unwrap_or(usual)
}

/// How long a process may take if its test doesn't say. Machines under test are slow ones.
pub const DEADLINE: Duration = Duration::from_secs(120);
const CHUNK: usize = 64 * 1024;

/// A process to start.
#[derive(Debug)]
pub struct Process {
    argv: Vec<OsString>,
    env: Vec<(String, String)>,
    cwd: Option<PathBuf>,
    stdin: Input,
    tty: Option<(u16, u16)>,
    deadline: Duration,
}

#[derive(Debug)]
enum Input {
    Null,
    Open,
    Bytes(Vec<u8>),
}

/// What a process left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its own exit code, or 128 + the signal that ended it.
    pub code: i32,
    /// All it wrote to stdout (or to its terminal).
    pub stdout: Vec<u8>,
    /// All it wrote to stderr.
    pub stderr: Vec<u8>,
}

/// Makes a program of this text, by another process: a child that another test forks has whatever
/// this one has open for writing, and nobody can execute that (execve(2), `ETXTBSY`).
///
/// # Panics
/// When it can't be written.
pub fn install(path: &Path, text: impl Into<Vec<u8>>) {
    let words = ["install", "-m", "755", "/dev/stdin"].map(OsStr::new);
    let install = Process::new(words.into_iter().chain([path.as_os_str()]));
    install.stdin(text).output().ok();
}

impl Output {
    /// Stdout as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stderr as text.
    #[must_use]
    pub fn errors(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Exit code, stdout and stderr, to compare with what was expected.
    #[must_use]
    pub fn all(&self) -> (i32, String, String) {
        (self.code, self.text(), self.errors())
    }

    /// Stdout as text, of a process that must have succeeded.
    ///
    /// # Panics
    /// When it didn't.
    #[track_caller]
    pub fn ok(&self) -> String {
        assert_eq!(self.code, 0, "{:?}", self.all());
        self.text()
    }
}

impl Process {
    /// A process with this program and these arguments, with the caller's environment, without
    /// stdin.
    pub fn new<A: Into<OsString>>(argv: impl IntoIterator<Item = A>) -> Self {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            cwd: None,
            stdin: Input::Null,
            tty: None,
            deadline: DEADLINE,
        }
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.to_owned(), value.into()));
        self
    }

    /// Sets its current directory.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<PathBuf>) -> Self {
        self.cwd = Some(directory.into());
        self
    }

    /// Gives it these bytes on stdin, and then its end.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Input::Bytes(bytes.into());
        self
    }

    /// Leaves its stdin open, for [`Running::write`].
    #[must_use]
    pub fn stdin_open(mut self) -> Self {
        self.stdin = Input::Open;
        self
    }

    /// Gives it a terminal of this size. What it writes is all in stdout; its stdin is the
    /// terminal and never ends by itself.
    #[must_use]
    pub fn tty(mut self, rows: u16, columns: u16) -> Self {
        self.tty = Some((rows, columns));
        self
    }

    /// Bounds its time; [`DEADLINE`] if unsaid.
    #[must_use]
    pub fn deadline(mut self, limit: Duration) -> Self {
        self.deadline = limit;
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it can't be started or its time is over.
    #[track_caller]
    #[must_use]
    pub fn output(self) -> Output {
        self.spawn().wait()
    }

    /// Starts it.
    ///
    /// # Panics
    /// When it can't be started.
    #[track_caller]
    #[must_use]
    pub fn spawn(mut self) -> Running {
        let name = format!("{:?}", self.argv);
        let terminal = self.tty.map(Terminal::open);
        if terminal.is_some() {
            // Makes the terminal its controlling one, and then is the process itself.
            self.argv.splice(0..0, ["setsid".into(), "-c".into()]);
        }
        let (program, arguments) = self.argv.split_first().expect("a process has a program");
        let mut command = Command::new(program);
        command.args(arguments).envs(self.env);
        if let Some(directory) = &self.cwd {
            command.current_dir(directory);
        }
        match &terminal {
            Some(terminal) => {
                let side = || Stdio::from(terminal.far.try_clone().expect("duplicate a terminal"));
                command.stdin(side()).stdout(side()).stderr(side());
            }
            None => {
                let has_stdin = !matches!(self.stdin, Input::Null);
                command
                    .stdin(if has_stdin {
                        Stdio::piped()
                    } else {
                        Stdio::null()
                    })
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
            }
        }
        let child = match command.spawn() {
            Ok(child) => child,
            Err(error) => panic!("can't start {name}: {error}"),
        };
        drop(command);
        Running::new(name, child, terminal, self.stdin, self.deadline)
    }
}

#[derive(Debug)]
struct Terminal {
    near: OwnedFd,
    far: OwnedFd,
}

impl Terminal {
    fn open(size: (u16, u16)) -> Self {
        let near = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("open a pseudo-terminal");
        grantpt(&near).expect("grant a pseudo-terminal");
        unlockpt(&near).expect("unlock a pseudo-terminal");
        let name = ptsname(&near, Vec::new()).expect("name a pseudo-terminal");
        let flags =
            rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::CLOEXEC;
        let far = rustix::fs::open(name.as_c_str(), flags, rustix::fs::Mode::empty())
            .expect("open a pseudo-terminal's far side");
        resize(&near, size);
        Self { near, far }
    }
}

fn resize(terminal: impl AsFd, (rows, columns): (u16, u16)) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size).expect("size a pseudo-terminal");
}

#[derive(Debug)]
enum Event {
    Stdout(Vec<u8>),
    Stderr(Vec<u8>),
    /// All that it wrote has been read, and it has ended.
    Ended(i32),
}

/// A process that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    name: String,
    pid: Pid,
    events: Receiver<Event>,
    stdin: Option<Sender<Vec<u8>>>,
    terminal: Option<OwnedFd>,
    deadline: Instant,
    output: Output,
    ended: bool,
}

impl Running {
    fn new(
        name: String,
        mut child: Child,
        terminal: Option<Terminal>,
        input: Input,
        limit: Duration,
    ) -> Self {
        let pid = Pid::from_child(&child);
        let (events, received) = mpsc::channel();
        let mut pumps = Vec::new();
        let (near, stdin) = match terminal {
            Some(Terminal { near, far }) => {
                drop(far);
                let copy = || File::from(near.try_clone().expect("duplicate a terminal"));
                pumps.push(pump(copy(), Event::Stdout, events.clone()));
                let stdin = feed(copy());
                (Some(near), Some(stdin))
            }
            None => {
                let stdout = child.stdout.take().expect("stdout is a pipe");
                let stderr = child.stderr.take().expect("stderr is a pipe");
                pumps.push(pump(stdout, Event::Stdout, events.clone()));
                pumps.push(pump(stderr, Event::Stderr, events.clone()));
                (None, child.stdin.take().map(feed))
            }
        };
        thread::spawn(move || reap(child, pumps, &events));
        let mut running = Self {
            name,
            pid,
            events: received,
            stdin,
            terminal: near,
            deadline: Instant::now() + limit,
            output: Output {
                code: -1,
                stdout: Vec::new(),
                stderr: Vec::new(),
            },
            ended: false,
        };
        if let Input::Bytes(bytes) = input {
            running.write(bytes);
            if running.terminal.is_none() {
                running.close_stdin();
            }
        }
        running
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// When it is gone.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        assert!(!self.ended, "{} is gone", self.name);
        kill_process(self.pid, signal).expect("signal a process that runs");
    }

    /// Gives it bytes on stdin or as typed on its terminal.
    pub fn write(&mut self, bytes: impl Into<Vec<u8>>) {
        if let Some(stdin) = &self.stdin {
            // One that has ended doesn't read: no error of ours.
            let _gone = stdin.send(bytes.into());
        }
    }

    /// Ends its stdin.
    pub fn close_stdin(&mut self) {
        self.stdin = None;
    }

    /// Gives its terminal another size.
    ///
    /// # Panics
    /// When it has none.
    pub fn resize(&self, rows: u16, columns: u16) {
        resize(
            self.terminal.as_ref().expect("it has a terminal"),
            (rows, columns),
        );
    }

    /// Waits until its stdout (or terminal) holds `text`.
    ///
    /// # Panics
    /// When it ends first, or its time is over.
    #[track_caller]
    pub fn await_stdout(&mut self, text: &str) {
        while !holds(&self.output.stdout, text) {
            assert!(
                !self.ended,
                "{} ended without {text:?}: {:?}",
                self.name,
                self.output.all()
            );
            self.receive();
        }
    }

    /// Waits this long at most for its stdout to hold `text`; says whether it does.
    #[must_use]
    pub fn says_within(&mut self, text: &str, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        while !holds(&self.output.stdout, text) && !self.ended {
            let left = until.saturating_duration_since(Instant::now());
            match self.events.recv_timeout(left) {
                Ok(event) => self.take(event),
                Err(_) => return false,
            }
        }
        holds(&self.output.stdout, text)
    }

    /// What it has said so far, as text.
    #[must_use]
    pub fn said(&self) -> String {
        self.output.text()
    }

    /// Waits until its stderr holds `text`.
    ///
    /// # Panics
    /// When it ends first, or its time is over.
    #[track_caller]
    pub fn await_stderr(&mut self, text: &str) {
        while !holds(&self.output.stderr, text) {
            assert!(
                !self.ended,
                "{} ended without {text:?}: {:?}",
                self.name,
                self.output.all()
            );
            self.receive();
        }
    }

    /// Waits for its end and that of its output.
    ///
    /// # Panics
    /// When its time is over.
    #[track_caller]
    #[must_use]
    pub fn wait(mut self) -> Output {
        if self.terminal.is_none() {
            self.close_stdin();
        }
        while !self.ended {
            self.receive();
        }
        std::mem::replace(
            &mut self.output,
            Output {
                code: -1,
                stdout: Vec::new(),
                stderr: Vec::new(),
            },
        )
    }

    #[track_caller]
    fn receive(&mut self) {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.events.recv_timeout(left) {
            Ok(event) => self.take(event),
            Err(RecvTimeoutError::Timeout) => {
                panic!("{} took too long: {:?}", self.name, self.output.all())
            }
            Err(RecvTimeoutError::Disconnected) => panic!("{}: its reader ended", self.name),
        }
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Stdout(data) => self.output.stdout.extend(data),
            Event::Stderr(data) => self.output.stderr.extend(data),
            Event::Ended(code) => {
                self.output.code = code;
                self.ended = true;
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.ended {
            // It may end at this very moment; then there is nothing to kill.
            let _gone = kill_process(self.pid, Signal::KILL);
        }
    }
}

fn holds(all: &[u8], text: &str) -> bool {
    text.is_empty() || all.windows(text.len()).any(|part| part == text.as_bytes())
}

fn feed(mut to: impl Write + Send + 'static) -> Sender<Vec<u8>> {
    let (sender, food) = mpsc::channel::<Vec<u8>>();
    thread::spawn(move || {
        while let Ok(data) = food.recv() {
            // The reader may be gone: what is left is dropped, as a pipe would.
            if to.write_all(&data).is_err() {
                break;
            }
        }
    });
    sender
}

fn pump(
    mut from: impl Read + Send + 'static,
    wrap: fn(Vec<u8>) -> Event,
    to: Sender<Event>,
) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        loop {
            match from.read(&mut buffer) {
                Ok(count) if count > 0 => {
                    if to.send(wrap(buffer[..count].to_vec())).is_err() {
                        break;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // A terminal whose far side is closed says EIO.
                Ok(_) | Err(_) => break,
            }
        }
    })
}

fn reap(mut child: Child, pumps: Vec<JoinHandle<()>>, events: &Sender<Event>) {
    for pump in pumps {
        let _done = pump.join();
    }
    let status = child.wait();
    let code = status.map_or(-1, |status| {
        let signal = || 128 + status.signal().unwrap_or_default();
        status.code().unwrap_or_else(signal)
    });
    let _gone = events.send(Event::Ended(code));
}
