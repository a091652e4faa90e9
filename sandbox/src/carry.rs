//! Carries a process's streams between its frames and descriptors that this process was given.
//!
//! Owns: a thread for each direction, each of which may wait for its other side: the window of
//! stdin, and the stream's own buffers, keep either from drowning the other. Refuses: raw mode
//! and what an end means.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;

use hull_proto::{Frame, MAX_DATA};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::termios::tcgetwinsize;

use crate::stream::{ProcessStream, StreamSender};
use crate::sys;

const STACK: usize = 256 * 1024;

/// A process's standard streams as the host's owner gives them.
#[derive(Debug)]
pub struct Stdio {
    /// What it reads.
    pub stdin: OwnedFd,
    /// What it writes.
    pub stdout: OwnedFd,
    /// Its errors; not used with a terminal.
    pub stderr: OwnedFd,
    /// Whether all three are one terminal.
    pub terminal: bool,
}

impl Stdio {
    /// This process's own.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn own(terminal: bool) -> io::Result<Self> {
        Ok(Self {
            stdin: io::stdin().as_fd().try_clone_to_owned()?,
            stdout: io::stdout().as_fd().try_clone_to_owned()?,
            stderr: io::stderr().as_fd().try_clone_to_owned()?,
            terminal,
        })
    }

    /// One terminal for all.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn terminal(terminal: OwnedFd) -> io::Result<Self> {
        Ok(Self {
            stdin: terminal.try_clone()?,
            stdout: terminal.try_clone()?,
            stderr: terminal,
            terminal: true,
        })
    }
}

/// What a terminal says besides its bytes, for this process: to be made before it has any thread.
#[derive(Debug)]
pub struct Changes(OwnedFd);

impl Changes {
    /// Makes `terminal` this session leader's own, and catches its new sizes and its end.
    ///
    /// # Errors
    /// If there are no more descriptors.
    pub fn of(terminal: BorrowedFd<'_>) -> io::Result<Self> {
        let changes = Self(sys::window_signals()?);
        // Somebody else's already: then its sizes are theirs to tell.
        let _ = rustix::process::ioctl_tiocsctty(terminal);
        Ok(changes)
    }
}

/// Carries until the process has ended and its output is written; returns the last frame.
///
/// # Errors
/// If a thread can't be had or the stream breaks.
pub fn carry(
    stream: ProcessStream,
    stdio: Stdio,
    changes: Option<Changes>,
) -> io::Result<Option<Frame>> {
    let (sender, mut receiver) = stream.split();
    let Stdio {
        stdin,
        stdout,
        stderr,
        terminal,
    } = stdio;
    if let Some(Changes(signals)) = changes {
        let terminal = stdout.try_clone()?;
        let sender = sender.clone();
        let sizes = move || follow_sizes(&signals, terminal.as_fd(), &sender);
        spawn("sizes", sizes)?;
    }
    spawn("stdin", move || feed(&stdin, &sender, terminal))?;
    let mut open = [true; 2];
    loop {
        let (which, data) = match receiver.receive().map_err(io::Error::other)? {
            Some(Frame::Stdout(data)) => (0, data),
            Some(Frame::Stderr(data)) => (1, data),
            Some(frame @ (Frame::Exited(_) | Frame::Failed(_))) => return Ok(Some(frame)),
            Some(_) => continue,
            None => return Ok(None),
        };
        let to = if which == 0 { &stdout } else { &stderr };
        // What nobody reads any more is dropped; the process goes on, as into a pipe to a shell
        // that ignores it.
        if open[which] && write_all(to.as_fd(), &data).is_err() {
            open[which] = false;
        }
    }
}

/// They end with this process, or with the stream.
fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .stack_size(STACK);
    thread.spawn(body).map(drop)
}

fn feed(stdin: &OwnedFd, sender: &StreamSender, terminal: bool) {
    let mut chunk = vec![0; MAX_DATA];
    loop {
        match rustix::io::read(stdin, &mut chunk) {
            Ok(count) if count > 0 => {
                if sender.stdin(&chunk[..count]).is_err() {
                    return;
                }
            }
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(stdin.as_fd(), PollFlags::IN),
            Ok(_) | Err(_) => {
                if !terminal {
                    // A stream that broke has told its reader.
                    let _ = sender.stdin_eof();
                }
                return;
            }
        }
    }
}

fn write_all(to: BorrowedFd<'_>, mut data: &[u8]) -> Result<(), Errno> {
    while !data.is_empty() {
        match rustix::io::write(to, data) {
            Ok(count) => data = &data[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait_for(to, PollFlags::OUT),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn wait_for(descriptor: BorrowedFd<'_>, flags: PollFlags) {
    // An interruption has it tried again.
    let _ = poll(&mut [PollFd::new(&descriptor, flags)], None);
}

fn follow_sizes(signals: &OwnedFd, terminal: BorrowedFd<'_>, sender: &StreamSender) {
    loop {
        if let Ok(size) = tcgetwinsize(terminal)
            && size.ws_row > 0
        {
            let frame = Frame::Resize {
                rows: size.ws_row,
                cols: size.ws_col,
            };
            if sender.send(&frame).is_err() {
                return;
            }
        }
        let mut signal = [0; 128];
        match rustix::io::read(signals, &mut signal) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use hull_proto::{Decoder, ExitStatus, MAX_FROM_HOST, encode};

    use super::*;

    #[test]
    fn bytes_go_both_ways_and_the_end_is_the_last_word() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let (stdin, mut typed) = io::pipe().unwrap();
        let (mut printed, stdout) = io::pipe().unwrap();
        let stdio = Stdio {
            stdin: stdin.into(),
            stdout: stdout.into(),
            stderr: File::options()
                .write(true)
                .open("/dev/null")
                .unwrap()
                .into(),
            terminal: false,
        };
        typed.write_all(b"in").unwrap();
        drop(typed);
        let carried =
            thread::spawn(move || carry(ProcessStream::new(near).unwrap(), stdio, None).unwrap());
        let mut decoder = Decoder::new(MAX_FROM_HOST);
        let mut heard = Vec::new();
        let mut chunk = [0; 64];
        while heard.last() != Some(&Frame::StdinEof) {
            let count = far.read(&mut chunk).unwrap();
            decoder.feed(&chunk[..count]);
            while let Some(frame) = decoder.take().unwrap() {
                heard.push(frame);
            }
        }
        assert_eq!(heard, [Frame::Stdin(b"in".to_vec()), Frame::StdinEof]);
        let mut bytes = Vec::new();
        let last = Frame::Exited(ExitStatus::Exited(7));
        for frame in [Frame::Stdout(b"out".to_vec()), last.clone()] {
            encode(&frame, &mut bytes).unwrap();
        }
        far.write_all(&bytes).unwrap();
        assert_eq!(carried.join().unwrap(), Some(last));
        let mut said = String::new();
        printed.read_to_string(&mut said).unwrap();
        assert_eq!(said, "out");
    }
}
