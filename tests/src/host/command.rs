//! A command on the host, for tests and bench: its input given, its output kept.
//!
//! Owns: one face for the machine's own KVM and for the emulated host. Refuses: to wait without
//! a deadline.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use super::Host;
use super::wire::{self, Message, Open};
use crate::process::Output;

/// How long a command may take if its caller doesn't say.
const DEADLINE: Duration = Duration::from_secs(120);
const CHUNK: usize = 64 * 1024;

/// A command to run on a [`Host`].
#[derive(Debug)]
pub struct Command<'a> {
    host: &'a Host,
    open: Open,
    stdin: Vec<u8>,
    deadline: Duration,
}

impl<'a> Command<'a> {
    pub(super) fn new(host: &'a Host, argv: Vec<String>) -> Self {
        let open = host.open(argv);
        Self {
            host,
            open,
            stdin: Vec::new(),
            deadline: DEADLINE,
        }
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.open.env.retain(|(known, _)| known != key);
        self.open.env.push((key.to_owned(), value.to_owned()));
        self
    }

    /// Sets its current directory.
    #[must_use]
    pub fn cwd(mut self, directory: impl Into<PathBuf>) -> Self {
        self.open.cwd = directory.into();
        self
    }

    /// Shows one more outer directory as it is now, writable.
    #[must_use]
    pub fn live(mut self, directory: impl Into<PathBuf>) -> Self {
        self.open.live.push(directory.into());
        self
    }

    /// Gives it these bytes on stdin, and then its end.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    /// Bounds its time; 120 s if unsaid. It is killed after that.
    #[must_use]
    pub fn deadline(mut self, limit: Duration) -> Self {
        self.deadline = limit;
        self
    }

    /// Gives it a terminal of this size (emulated host only). Its output is all stdout.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.open.terminal = Some((rows, columns));
        self
    }

    /// Runs it to its end.
    ///
    /// # Errors
    /// When it can't be started, the machine ends, or its time is over.
    pub fn output(self) -> Result<Output> {
        self.spawn()?.wait()
    }

    /// Starts it with its stdin given; the caller may then signal it and wait.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn spawn(self) -> Result<Running> {
        let name = self.open.argv.join(" ");
        let (events, received) = mpsc::channel();
        let side = match self.host.connect(&self.open)? {
            Some(stream) => emulated(stream, events)?,
            None => native(&self.open, events).with_context(|| format!("run {name}"))?,
        };
        let mut running = Running {
            name,
            side,
            received,
            deadline: Instant::now() + self.deadline,
            beat: self.host.pulse().beat,
            stdin: self.stdin.into(),
            window: wire::STDIN_WINDOW,
            is_stdin_open: true,
            stdout: Vec::new(),
            stderr: Vec::new(),
            code: None,
        };
        running.feed();
        Ok(running)
    }
}

#[derive(Debug)]
enum Side {
    Emulated(TcpStream),
    Native { group: Pid, stdin: Sender<Vec<u8>> },
}

/// A command that runs. Dropping it kills it.
#[derive(Debug)]
pub struct Running {
    name: String,
    side: Side,
    received: Receiver<Message>,
    deadline: Instant,
    beat: Duration,
    stdin: VecDeque<u8>,
    window: usize,
    is_stdin_open: bool,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    code: Option<i32>,
}

impl Running {
    /// Sends it a signal by number; INT, QUIT and HUP reach its whole process group.
    ///
    /// # Errors
    /// When it is gone.
    pub fn signal(&mut self, number: u8) -> Result<()> {
        match &mut self.side {
            Side::Emulated(stream) => {
                wire::write(stream, &Message::Signal(number)).context("send a signal")
            }
            Side::Native { group, .. } => {
                let signal = Signal::from_named_raw(i32::from(number)).context("no such signal")?;
                match signal {
                    Signal::INT | Signal::QUIT | Signal::HUP => kill_process_group(*group, signal),
                    other => kill_process(*group, other),
                }
                .context("send a signal")
            }
        }
    }

    /// Waits until its stdout holds `text`.
    ///
    /// # Errors
    /// When it ends first, or its time is over.
    pub fn await_stdout(&mut self, text: &str) -> Result<()> {
        let holds = |all: &[u8]| all.windows(text.len()).any(|part| part == text.as_bytes());
        while !holds(&self.stdout) {
            if self.code.is_some() {
                bail!("{} ended without saying {text:?}", self.name);
            }
            self.receive()?;
        }
        Ok(())
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When the machine ends first, or its time is over.
    pub fn wait(mut self) -> Result<Output> {
        loop {
            if let Some(code) = self.code {
                return Ok(Output {
                    code,
                    stdout: std::mem::take(&mut self.stdout),
                    stderr: std::mem::take(&mut self.stderr),
                });
            }
            self.receive()?;
        }
    }

    fn receive(&mut self) -> Result<()> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.received.recv_timeout(left.min(self.beat)) {
            Ok(Message::Stdout(data)) => self.stdout.extend(data),
            Ok(Message::Stderr(data)) => self.stderr.extend(data),
            Ok(Message::StdinAck(count)) => {
                self.window += count as usize;
                self.feed();
            }
            Ok(Message::Exited(code)) => self.code = Some(i32::from(code)),
            Ok(Message::Signaled(signal)) => self.code = Some(128 + i32::from(signal)),
            Ok(Message::Failed(code, why)) => {
                self.stderr.extend(why.into_bytes());
                self.code = Some(i32::from(code));
            }
            Ok(Message::Pong) => {}
            Ok(other) => bail!("{}: unexpected message {other:?}", self.name),
            Err(RecvTimeoutError::Timeout) if left > self.beat => {
                if let Side::Emulated(stream) = &mut self.side {
                    let _gone = wire::write(stream, &Message::Ping);
                }
            }
            Err(RecvTimeoutError::Timeout) => bail!(
                "{} didn't end in time; stdout: {:?}, stderr: {:?}",
                self.name,
                String::from_utf8_lossy(&self.stdout),
                String::from_utf8_lossy(&self.stderr)
            ),
            Err(RecvTimeoutError::Disconnected) => {
                bail!("the emulated KVM host ended while {} ran", self.name)
            }
        }
        Ok(())
    }

    /// Sends what the window allows. A command that is gone doesn't read: no error.
    fn feed(&mut self) {
        while self.window > 0 && !self.stdin.is_empty() {
            let count = self.stdin.len().min(CHUNK).min(self.window);
            let data: Vec<u8> = self.stdin.drain(..count).collect();
            self.window -= count;
            let _gone = match &mut self.side {
                Side::Emulated(stream) => wire::write(stream, &Message::Stdin(data)).is_err(),
                Side::Native { stdin, .. } => stdin.send(data).is_err(),
            };
        }
        if self.stdin.is_empty() && self.is_stdin_open {
            self.is_stdin_open = false;
            match &mut self.side {
                Side::Emulated(stream) => {
                    let _gone = wire::write(stream, &Message::StdinEof);
                }
                Side::Native { stdin, .. } => *stdin = mpsc::channel().0,
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        match &self.side {
            Side::Emulated(stream) => {
                let _gone = stream.shutdown(Shutdown::Both);
            }
            Side::Native { group, .. } if self.code.is_none() => {
                let _gone = kill_process_group(*group, Signal::KILL);
            }
            Side::Native { .. } => {}
        }
    }
}

fn emulated(stream: TcpStream, events: Sender<Message>) -> Result<Side> {
    let mut reader = stream.try_clone()?;
    thread::spawn(move || {
        while let Ok(Some(message)) = wire::read(&mut reader) {
            if events.send(message).is_err() {
                break;
            }
        }
    });
    Ok(Side::Emulated(stream))
}

fn native(open: &Open, events: Sender<Message>) -> Result<Side> {
    let (program, arguments) = open.argv.split_first().context("no command was given")?;
    let spawned = std::process::Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(open.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&open.cwd)
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = spawned?;
    let group = Pid::from_child(&child);
    let (feed, food) = mpsc::channel::<Vec<u8>>();
    let stdin = child.stdin.take();
    let acknowledge = events.clone();
    thread::spawn(move || {
        let Some(mut stdin) = stdin else { return };
        while let Ok(data) = food.recv() {
            // The reader may be gone: what is left is dropped, as a pipe would.
            let _dropped = stdin.write_all(&data);
            let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
            let _gone = acknowledge.send(Message::StdinAck(count));
        }
    });
    let mut pumps = Vec::new();
    if let Some(stdout) = child.stdout.take() {
        pumps.push(pump(stdout, Message::Stdout, events.clone()));
    }
    if let Some(stderr) = child.stderr.take() {
        pumps.push(pump(stderr, Message::Stderr, events.clone()));
    }
    thread::spawn(move || {
        for pump in pumps {
            let _done = pump.join();
        }
        let last = match child.wait() {
            Ok(status) => match (status.code(), status.signal()) {
                (Some(code), _) => Message::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
                (None, signal) => {
                    Message::Signaled(u8::try_from(signal.unwrap_or(0)).unwrap_or(u8::MAX))
                }
            },
            Err(error) => Message::Failed(125, format!("can't wait for it: {error}")),
        };
        let _gone = events.send(last);
    });
    Ok(Side::Native { group, stdin: feed })
}

fn pump(
    mut from: impl Read + Send + 'static,
    wrap: fn(Vec<u8>) -> Message,
    to: Sender<Message>,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; CHUNK];
        while let Ok(count) = from.read(&mut buffer) {
            if count == 0 || to.send(wrap(buffer[..count].to_vec())).is_err() {
                break;
            }
        }
    })
}
