//! One command: its process, and its stream to the caller.
//!
//! Owns: the process until it has ended and its output is sent. Refuses: to outlive its caller:
//! when the stream breaks, the command's process group is killed.
//!
//! ```text
//! caller ──► messages ──► feeder ──► stdin
//! caller ◄── writer   ◄── stdout, stderr (a thread each, until the end and an empty pipe)
//! ```

use std::io;
use std::net::{Shutdown, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hull_tests::host::wire::{self, Message, Open};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::serve::Live;
use crate::sys;

/// How long a caller may take to say what it wants.
const OPENING: Duration = Duration::from_secs(30);
const CHUNK: usize = 64 * 1024;

type Writer = Arc<Mutex<TcpStream>>;

/// A started command and our ends of its streams.
struct Started {
    child: Child,
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: Option<OwnedFd>,
    terminal: Option<OwnedFd>,
}

/// Serves one caller.
///
/// # Errors
/// When the stream or the machine fails; a command's own failure is told to the caller.
pub(crate) fn run(mut caller: TcpStream, token: &str, live: &Live) -> Result<()> {
    caller.set_read_timeout(Some(OPENING))?;
    caller.set_nodelay(true)?;
    let Some(Message::Open(open)) = wire::read(&mut caller)? else {
        return Ok(());
    };
    ensure!(open.token == token, "a caller showed a wrong token");
    caller.set_read_timeout(None)?;
    let writer: Writer = Arc::new(Mutex::new(caller.try_clone()?));
    let last = match start(&open, live) {
        Ok(started) => converse(started, caller.try_clone()?, &writer)?,
        Err((code, error)) => Message::Failed(code, format!("{error:#}")),
    };
    send(&writer, &last)?;
    // The other direction stays open: the caller closes once it has read the last message.
    caller.shutdown(Shutdown::Write)?;
    Ok(())
}

fn send(writer: &Writer, message: &Message) -> io::Result<()> {
    let mut stream = writer.lock().unwrap_or_else(PoisonError::into_inner);
    wire::write(&mut *stream, message)
}

fn start(open: &Open, live: &Live) -> Result<Started, (u8, anyhow::Error)> {
    let refuse = |error| (125, error);
    live.refresh(open.packages);
    for directory in &open.live {
        live.show(directory).map_err(refuse)?;
    }
    let Some((program, arguments)) = open.argv.split_first() else {
        return Err(refuse(anyhow::anyhow!("no command was given")));
    };
    if !open.cwd.is_dir() {
        let cwd = open.cwd.display();
        return Err(refuse(anyhow::anyhow!("{cwd} isn't a directory in there")));
    }
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .envs(open.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&open.cwd);
    let started = match open.terminal {
        Some(size) => on_terminal(&mut command, size),
        None => on_pipes(&mut command),
    };
    started.map_err(|error| {
        let code = match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::NotFound) => 127,
            Some(_) => 126,
            None => 125,
        };
        (code, error.context(format!("can't start {program}")))
    })
}

fn on_pipes(command: &mut Command) -> Result<Started> {
    command
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn()?;
    let (Some(stdin), Some(stdout), Some(stderr)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        anyhow::bail!("the command has no pipes");
    };
    Ok(Started {
        child,
        stdin: stdin.into(),
        stdout: stdout.into(),
        stderr: Some(stderr.into()),
        terminal: None,
    })
}

fn on_terminal(command: &mut Command, size: (u16, u16)) -> Result<Started> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let main = openpt(flags).context("open a terminal")?;
    grantpt(&main).context("grant the terminal")?;
    unlockpt(&main).context("unlock the terminal")?;
    resize(main.as_fd(), size).context("size the terminal")?;
    let end = ioctl_tiocgptpeer(&main, flags).context("open the terminal's end")?;
    command
        .stdin(Stdio::from(end.try_clone()?))
        .stdout(Stdio::from(end.try_clone()?))
        .stderr(Stdio::from(end));
    sys::lead_session_on_stdin(command);
    let child = command.spawn()?;
    // The child's ends must go, or the terminal never reports its end.
    command.stdin(Stdio::null());
    command.stdout(Stdio::null());
    command.stderr(Stdio::null());
    Ok(Started {
        child,
        stdin: main.try_clone()?,
        stdout: main.try_clone()?,
        stderr: None,
        terminal: Some(main),
    })
}

fn resize(terminal: impl AsFd, (rows, columns): (u16, u16)) -> rustix::io::Result<()> {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    tcsetwinsize(terminal, size)
}

/// Moves bytes until the command has ended; returns the last message.
fn converse(mut started: Started, caller: TcpStream, writer: &Writer) -> Result<Message> {
    let over = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).context("make an event")?);
    let (feed, food) = mpsc::channel();
    let feeder = (started.stdin, Arc::clone(writer), Arc::clone(&over));
    let is_terminal = started.terminal.is_some();
    thread::spawn(move || feed_stdin(&feeder.0, &food, &feeder.1, &feeder.2, is_terminal));
    let pid = Pid::from_child(&started.child);
    let terminal = started.terminal.take();
    let answers = Arc::clone(writer);
    thread::spawn(move || listen(caller, &answers, pid, terminal.as_ref(), &feed));
    let mut pumps = Vec::new();
    let wrap: fn(Vec<u8>) -> Message = Message::Stdout;
    let outputs = [
        Some((started.stdout, wrap)),
        started.stderr.map(|end| (end, Message::Stderr as _)),
    ];
    for (end, wrap) in outputs.into_iter().flatten() {
        let (writer, over) = (Arc::clone(writer), Arc::clone(&over));
        pumps.push(thread::spawn(move || pump(&end, wrap, &writer, &over)));
    }
    let status = started.child.wait().context("wait for the command")?;
    rustix::io::write(&*over, &u64::to_ne_bytes(1)).context("tell the command's end")?;
    for pump in pumps {
        // A caller that is gone has had its command killed: nobody is left to tell.
        let _done = pump.join();
    }
    Ok(last_message(status))
}

fn last_message(status: ExitStatus) -> Message {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match (status.code(), status.signal()) {
        (Some(code), _) => Message::Exited(byte(code)),
        (None, Some(signal)) => Message::Signaled(byte(signal)),
        (None, None) => Message::Failed(125, "the command neither exited nor was killed".into()),
    }
}

/// Sends what comes out of `end` until it closes, or the command is over and nothing is left.
fn pump(end: &OwnedFd, wrap: fn(Vec<u8>) -> Message, writer: &Writer, over: &OwnedFd) {
    let mut buffer = vec![0; CHUNK];
    loop {
        let mut watched = [
            PollFd::new(end, PollFlags::IN),
            PollFd::new(over, PollFlags::IN),
        ];
        if poll(&mut watched, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
            return;
        }
        if watched[0].revents().is_empty() {
            if watched[1].revents().is_empty() {
                continue;
            }
            return;
        }
        // A terminal whose last user is gone answers EIO.
        let count = match rustix::io::read(end, &mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        if send(writer, &wrap(buffer[..count].to_vec())).is_err() {
            return;
        }
    }
}

/// Acts on the caller's messages until it is gone.
fn listen(
    mut caller: TcpStream,
    answers: &Writer,
    pid: Pid,
    terminal: Option<&OwnedFd>,
    feed: &Sender<Option<Vec<u8>>>,
) {
    loop {
        match wire::read(&mut caller) {
            // The feeder may have ended before the caller learned of it.
            Ok(Some(Message::Stdin(data))) => drop(feed.send(Some(data))),
            Ok(Some(Message::StdinEof)) => drop(feed.send(None)),
            Ok(Some(Message::Resize(rows, columns))) => {
                let _sized = terminal.map(|main| resize(main, (rows, columns)));
            }
            Ok(Some(Message::Signal(number))) => signal(pid, number),
            Ok(Some(Message::Ping)) => {
                // Whoever holds it is sending words that are as good.
                if let Ok(mut stream) = answers.try_lock() {
                    let _told = wire::write(&mut *stream, &Message::Pong);
                }
            }
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => break,
        }
    }
    // After a normal end the group has no such process left, or its leader chose to leave some.
    if kill_process(pid, Signal::HUP).is_ok() {
        let _killed = kill_process_group(pid, Signal::KILL);
    }
}

/// Keys of a terminal mean the whole foreground group; other signals mean the command.
fn signal(pid: Pid, number: u8) {
    let Some(signal) = Signal::from_named_raw(i32::from(number)) else {
        return;
    };
    let _sent = match signal {
        Signal::INT | Signal::QUIT | Signal::HUP => kill_process_group(pid, signal),
        other => kill_process(pid, other),
    };
}

/// Writes the caller's bytes to the command, at the command's own pace.
fn feed_stdin(
    stdin: &OwnedFd,
    food: &Receiver<Option<Vec<u8>>>,
    writer: &Writer,
    over: &OwnedFd,
    is_terminal: bool,
) {
    while let Ok(Some(data)) = food.recv() {
        let written = write_all(stdin, &data, over);
        let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if send(writer, &Message::StdinAck(count)).is_err() || !written {
            // Whoever doesn't read its stdin doesn't stop the caller from writing.
            while let Ok(Some(dropped)) = food.recv() {
                let count = u32::try_from(dropped.len()).unwrap_or(u32::MAX);
                let _told = send(writer, &Message::StdinAck(count));
            }
            return;
        }
    }
    if is_terminal {
        let _ended = rustix::io::write(stdin, &[4]);
    }
}

/// Whether all was written before the reader or the command was gone.
fn write_all(to: &OwnedFd, mut data: &[u8], over: &OwnedFd) -> bool {
    while !data.is_empty() {
        let mut watched = [
            PollFd::new(to, PollFlags::OUT),
            PollFd::new(over, PollFlags::IN),
        ];
        if poll(&mut watched, None).is_err_and(|error| error != rustix::io::Errno::INTR) {
            return false;
        }
        if !watched[1].revents().is_empty() {
            return false;
        }
        // A pipe that polls writable takes this much without blocking (pipe(7), PIPE_BUF).
        match rustix::io::write(to, &data[..data.len().min(4096)]) {
            Ok(count) => data = &data[count..],
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => return false,
        }
    }
    true
}
