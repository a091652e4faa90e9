//! A command in the emulated host on this process's own terminal and streams.
//!
//! Owns: this process's stdin, stdout, stderr, terminal mode and signals while it runs. Refuses:
//! to return output (see [`super::Command`]).

use std::io::{self, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use super::wire::{self, Message, STDIN_WINDOW};
use super::{Host, Pulse};

/// As for a command that SIGPIPE ends.
const NOBODY_READS: u8 = 128 + 13;

/// How a command's stream ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The command's; the exit code for this process.
    Command(u8),
    /// The machine's.
    Gone,
    /// The machine is there, and doesn't answer.
    Hung,
}

type Writer = Arc<Mutex<TcpStream>>;

/// Bytes of stdin that may still be sent.
#[derive(Default)]
struct Window {
    used: Mutex<usize>,
    freed: Condvar,
}

/// On this machine itself there is nothing to carry: the command inherits everything.
fn native(open: &wire::Open) -> Result<u8> {
    let (program, arguments) = open.argv.split_first().context("no command")?;
    let status = std::process::Command::new(program)
        .args(arguments)
        .envs(open.env.iter().map(|(key, value)| (key, value)))
        .current_dir(&open.cwd)
        .status()
        .with_context(|| format!("run {program}"))?;
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal));
    let code = code.with_context(|| format!("{program} is not over"))?;
    u8::try_from(code).with_context(|| format!("{program} ended with {code}"))
}

impl Host {
    /// Runs a command of the host on this process's stdin, stdout and stderr; with a
    /// terminal of its own if both ends here are one. Returns the exit code for this process.
    ///
    /// # Errors
    /// When the machine can't be reached or ends before the command (report 125 for it).
    pub fn attach(&self, argv: Vec<String>, env: &[(String, String)]) -> Result<u8> {
        let mut open = self.open(argv);
        for (key, value) in env {
            open.env.retain(|(known, _)| known != key);
            open.env.push((key.clone(), value.clone()));
        }
        let has_terminal = isatty(io::stdin()) && isatty(io::stdout());
        open.terminal = has_terminal.then(terminal_size);
        let Some(stream) = self.connect(&open)? else {
            return native(&open);
        };
        let raw = has_terminal.then(Raw::enter).transpose()?;
        let writer: Writer = Arc::new(Mutex::new(stream.try_clone()?));
        let window = Arc::new(Window::default());
        forward_signals(Arc::clone(&writer))?;
        let feeder = (Arc::clone(&writer), Arc::clone(&window));
        // Never joined: a read of stdin can't be interrupted, and this process ends soon after.
        thread::spawn(move || forward_stdin(&feeder.0, &feeder.1));
        let outcome = relay(stream, &writer, &window, self.pulse());
        drop(raw);
        match outcome? {
            End::Command(code) => Ok(code),
            End::Gone => Err(self.gone()),
            End::Hung => Err(self.hung()),
        }
    }
}

/// Moves output until the last message, or until the machine ends or hangs.
fn relay(mut stream: TcpStream, writer: &Writer, window: &Window, pulse: Pulse) -> Result<End> {
    loop {
        if !await_words(&stream, writer, pulse)? {
            return Ok(End::Hung);
        }
        // A broken stream is a machine that ended.
        let Ok(Some(message)) = wire::read(&mut stream) else {
            return Ok(End::Gone);
        };
        match message {
            Message::Stdout(data) if !show(&mut io::stdout().lock(), &data)? => {
                return Ok(End::Command(NOBODY_READS));
            }
            Message::Stderr(data) if !show(&mut io::stderr().lock(), &data)? => {
                return Ok(End::Command(NOBODY_READS));
            }
            Message::Stdout(_) | Message::Stderr(_) | Message::Pong => {}
            Message::StdinAck(count) => {
                let mut used = window.used.lock().unwrap_or_else(PoisonError::into_inner);
                *used = used.saturating_sub(count as usize);
                window.freed.notify_all();
            }
            Message::Exited(code) => return Ok(End::Command(code)),
            Message::Signaled(signal) => return Ok(End::Command(128_u8.saturating_add(signal))),
            Message::Failed(code, why) => {
                eprintln!("host: {why}");
                return Ok(End::Command(code));
            }
            other => anyhow::bail!("unexpected message {other:?}"),
        }
    }
}

/// Waits until there is something to read, and asks for it meanwhile. False when even so nothing
/// comes.
fn await_words(stream: &TcpStream, writer: &Writer, pulse: Pulse) -> Result<bool> {
    let until = Instant::now() + pulse.answer;
    let beat = Timespec::try_from(pulse.beat)?;
    while Instant::now() < until {
        let mut watched = [PollFd::new(stream, PollFlags::IN)];
        let ready = retry_on_intr(|| poll(&mut watched, Some(&beat)));
        if ready.context("wait for the machine")? > 0 {
            return Ok(true);
        }
        // Whoever writes holds the lock, should the machine not read either.
        if let Ok(mut stream) = writer.try_lock() {
            let _gone = wire::write(&mut *stream, &Message::Ping);
        }
    }
    Ok(false)
}

/// Whether somebody still reads there.
fn show(to: &mut impl Write, data: &[u8]) -> Result<bool> {
    match to.write_all(data).and_then(|()| to.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error).context("write the command's output"),
    }
}

fn send(writer: &Writer, message: &Message) -> io::Result<()> {
    wire::write(
        &mut *writer.lock().unwrap_or_else(PoisonError::into_inner),
        message,
    )
}

fn forward_stdin(writer: &Writer, window: &Window) {
    let mut buffer = vec![0; STDIN_WINDOW / 4];
    loop {
        let count = match rustix::io::read(io::stdin(), &mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => break,
        };
        {
            let used = window.used.lock().unwrap_or_else(PoisonError::into_inner);
            let mut used = window
                .freed
                .wait_while(used, |used| *used + count > STDIN_WINDOW)
                .unwrap_or_else(PoisonError::into_inner);
            *used += count;
        }
        if send(writer, &Message::Stdin(buffer[..count].to_vec())).is_err() {
            return;
        }
    }
    let _gone = send(writer, &Message::StdinEof);
}

fn forward_signals(writer: Writer) -> Result<()> {
    let watched = [SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH];
    let mut signals = Signals::new(watched).context("watch for signals")?;
    thread::spawn(move || {
        for signal in signals.forever() {
            let message = if signal == SIGWINCH {
                let (rows, columns) = terminal_size();
                Message::Resize(rows, columns)
            } else {
                Message::Signal(u8::try_from(signal).unwrap_or_default())
            };
            if send(&writer, &message).is_err() {
                return;
            }
        }
    });
    Ok(())
}

fn terminal_size() -> (u16, u16) {
    tcgetwinsize(io::stdout()).map_or((24, 80), |size| (size.ws_row, size.ws_col))
}

/// The outer terminal passing every key on; as it was when dropped.
struct Raw {
    before: Termios,
}

impl Raw {
    fn enter() -> Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd()).context("read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Now, &raw).context("set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        let _restored = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_machine_that_is_silent_is_asked_and_one_that_does_not_answer_hangs() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut machine, _) = listener.accept().unwrap();
        let machine = thread::spawn(move || {
            for _ in 0..2 {
                assert_eq!(wire::read(&mut machine).unwrap(), Some(Message::Ping));
                wire::write(&mut machine, &Message::Pong).unwrap();
            }
            assert_eq!(wire::read(&mut machine).unwrap(), Some(Message::Ping));
            machine
        });
        let writer: Writer = Arc::new(Mutex::new(stream.try_clone().unwrap()));
        let pulse = Pulse {
            beat: Duration::from_millis(10),
            answer: Duration::from_millis(500),
        };
        let ended = relay(stream, &writer, &Window::default(), pulse).unwrap();
        assert_eq!(ended, End::Hung);
        drop(machine.join().unwrap());
    }
}
