//! Carries one process's streams between its frames and this process's own descriptors.
//!
//! Owns: the poll loop over stdin, the outputs, the stream and signals; the window of stdin;
//! the detach keys. Refuses: raw mode (`terminal`), and what an end means (`run`, `exec`).
//!
//! ```text
//!  stdin ──(window)──► Stdin, StdinEof ┐                     ┌► stdout, stderr
//!  signals ──────────► Signal, Resize ─┴► stream ──► frames ─┴► the end
//! ```
//! The stream is read only once all earlier output is written, so a slow reader of our output
//! slows the process and nothing piles up here.

mod output;

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;

use hull_proto::{Decoder, ExitStatus, Failure, Frame, FrameError, MAX_DATA, STDIN_WINDOW, encode};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use self::output::{Outputs, Sink, Written};
use crate::detach::DetachScanner;
use crate::signals::{Signals, WINDOW_CHANGED};
use crate::terminal;

/// What ended the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum End {
    /// The process ended, and all its output was written.
    Exited(ExitStatus),
    /// The process was never started.
    Failed(Failure),
    /// The detach keys were typed.
    Detached,
    /// Nobody reads our stdout any more.
    OutputClosed,
    /// A signal ended us, and signals are not the process's.
    Interrupted(u8),
    /// The other side went away without a word.
    Lost,
}

/// A relay that cannot go on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelayError {
    /// One of our own descriptors failed.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The stream carries what is no frame.
    #[error("the process stream broke its rules")]
    Frame(#[from] FrameError),
}

/// Where the process's stdin comes from.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stdin<'a> {
    /// Somebody else has it.
    Absent,
    /// It is at its end from the start.
    AtEnd,
    /// This descriptor.
    From(BorrowedFd<'a>),
}

/// This process's side of the streams.
#[derive(Debug)]
pub(crate) struct Ends<'a> {
    pub(crate) stdin: Stdin<'a>,
    pub(crate) stdout: BorrowedFd<'a>,
    pub(crate) stderr: BorrowedFd<'a>,
    /// The terminal whose size the process's terminal follows.
    pub(crate) terminal: Option<BorrowedFd<'a>>,
    pub(crate) signals: &'a mut Signals,
    /// Whether signals are sent on to the process.
    pub(crate) sig_proxy: bool,
    /// The keys that detach; none for none.
    pub(crate) detach_keys: Vec<u8>,
}

/// Which descriptor is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ready {
    Signals,
    Stdin,
    Output,
    Send,
    Receive,
}

#[derive(Debug)]
struct Relay<'a, 'b> {
    stream: &'b UnixStream,
    decoder: Decoder,
    stdin: Stdin<'a>,
    terminal: Option<BorrowedFd<'a>>,
    signals: &'a mut Signals,
    sig_proxy: bool,
    detach: DetachScanner,
    outputs: Outputs<'a>,
    /// Frames on their way out, and how much of them is sent.
    sending: Vec<u8>,
    sent: usize,
    /// Bytes of stdin that nobody acknowledged yet.
    unacknowledged: usize,
    end: Option<End>,
}

/// Relays until the process ends or something cuts it short.
pub(crate) fn relay(
    stream: &UnixStream,
    decoder: Decoder,
    ends: Ends<'_>,
) -> Result<End, RelayError> {
    let mut relay = Relay {
        stream,
        decoder,
        stdin: ends.stdin,
        terminal: ends.terminal,
        signals: ends.signals,
        sig_proxy: ends.sig_proxy,
        detach: DetachScanner::new(ends.detach_keys),
        outputs: Outputs::new(ends.stdout, ends.stderr),
        sending: Vec::new(),
        sent: 0,
        unacknowledged: 0,
        end: None,
    };
    relay.begin()?;
    relay.run()
}

impl Relay<'_, '_> {
    fn begin(&mut self) -> Result<(), RelayError> {
        if matches!(self.stdin, Stdin::AtEnd) {
            self.stdin = Stdin::Absent;
            self.queue(&Frame::StdinEof)?;
        }
        self.resize()?;
        // Those that came while nobody could have them.
        self.take_signals()
    }

    fn run(mut self) -> Result<End, RelayError> {
        // Most of it is never written to: only what is costs memory.
        let mut chunk = Box::new_uninit_slice(MAX_DATA);
        // What the decoder was given with may be whole frames already.
        self.take_frames()?;
        loop {
            if self.outputs.is_empty()
                && let Some(end) = self.end.take()
            {
                return Ok(end);
            }
            for ready in self.wait()? {
                match ready {
                    Ready::Signals => self.take_signals()?,
                    Ready::Stdin => self.read_stdin(&mut chunk)?,
                    Ready::Output => self.write_output()?,
                    Ready::Send => self.send()?,
                    Ready::Receive => self.receive(&mut chunk)?,
                }
            }
            // What cuts the relay short doesn't wait for output to be written.
            if matches!(
                self.end,
                Some(End::Detached | End::OutputClosed | End::Interrupted(_))
            ) {
                self.send()?;
                self.outputs.clear();
            }
        }
    }

    /// Waits for any descriptor that can be used now.
    fn wait(&self) -> Result<Vec<Ready>, RelayError> {
        let mut asked = vec![Ready::Signals];
        let mut fds = vec![PollFd::new(&*self.signals, PollFlags::IN)];
        let window = self.unacknowledged < STDIN_WINDOW && self.sending.is_empty();
        if let Stdin::From(stdin) = &self.stdin
            && window
            && self.end.is_none()
        {
            asked.push(Ready::Stdin);
            fds.push(PollFd::new(stdin, PollFlags::IN));
        }
        match self.outputs.next() {
            Some(output) => {
                asked.push(Ready::Output);
                fds.push(PollFd::from_borrowed_fd(output, PollFlags::OUT));
            }
            None => {
                asked.push(Ready::Receive);
                fds.push(PollFd::new(self.stream, PollFlags::IN));
            }
        }
        if !self.sending.is_empty() {
            asked.push(Ready::Send);
            fds.push(PollFd::new(self.stream, PollFlags::OUT));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(Errno::INTR) => return Ok(Vec::new()),
            Err(errno) => return Err(failed("wait for input", errno)),
        }
        let ready = asked.iter().zip(&fds);
        Ok(ready
            .filter(|(_, fd)| !fd.revents().is_empty())
            .map(|(&ready, _)| ready)
            .collect())
    }

    fn take_signals(&mut self) -> Result<(), RelayError> {
        for signal in self.signals.take() {
            match signal {
                WINDOW_CHANGED => self.resize()?,
                _ if self.sig_proxy => self.queue(&Frame::Signal { signal, all: false })?,
                // The only one of those caught that wouldn't have ended us.
                18 => {}
                _ => self.end = Some(End::Interrupted(signal)),
            }
        }
        Ok(())
    }

    fn resize(&mut self) -> Result<(), RelayError> {
        match self.terminal.and_then(terminal::size) {
            Some((rows, cols)) => self.queue(&Frame::Resize { rows, cols }),
            None => Ok(()),
        }
    }

    fn read_stdin(&mut self, chunk: &mut [MaybeUninit<u8>]) -> Result<(), RelayError> {
        let Stdin::From(stdin) = self.stdin else {
            return Ok(());
        };
        // Less than the window by what the scanner may hold and then let go at once.
        let room = (STDIN_WINDOW - self.unacknowledged).min(chunk.len());
        let bytes: &[u8] = match rustix::io::read(stdin, &mut chunk[..room]) {
            Ok((bytes, _)) => bytes,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // A terminal that hung up has nothing more to say.
            Err(Errno::IO) => &[],
            Err(errno) => return Err(failed("read stdin", errno)),
        };
        if bytes.is_empty() {
            self.stdin = Stdin::Absent;
            let rest = self.detach.rest();
            self.queue_stdin(&rest)?;
            return self.queue(&Frame::StdinEof);
        }
        let scanned = self.detach.feed(bytes);
        self.queue_stdin(&scanned.forward)?;
        if scanned.detached {
            self.end = Some(End::Detached);
        }
        Ok(())
    }

    fn queue_stdin(&mut self, bytes: &[u8]) -> Result<(), RelayError> {
        for piece in bytes.chunks(MAX_DATA) {
            self.unacknowledged += piece.len();
            self.queue(&Frame::Stdin(piece.to_vec()))?;
        }
        Ok(())
    }

    fn queue(&mut self, frame: &Frame) -> Result<(), RelayError> {
        Ok(encode(frame, &mut self.sending)?)
    }

    fn send(&mut self) -> Result<(), RelayError> {
        while self.sent < self.sending.len() {
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match send(self.stream, &self.sending[self.sent..], flags) {
                Ok(count) => self.sent += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                // The other side listens no more; what it said last is still to be read.
                Err(Errno::PIPE | Errno::CONNRESET | Errno::NOTCONN) => {
                    self.stdin = Stdin::Absent;
                    break;
                }
                Err(errno) => return Err(failed("send to the process", errno)),
            }
        }
        self.sending.clear();
        self.sent = 0;
        Ok(())
    }

    fn receive(&mut self, chunk: &mut [MaybeUninit<u8>]) -> Result<(), RelayError> {
        if self.end.is_some() || !self.outputs.is_empty() {
            return Ok(());
        }
        match recv(self.stream, &mut *chunk, RecvFlags::DONTWAIT) {
            Ok((_, 0)) | Err(Errno::CONNRESET) => self.end = Some(End::Lost),
            Ok(((bytes, _), _)) => {
                self.decoder.feed(bytes);
                self.take_frames()?;
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(errno) => return Err(failed("hear from the process", errno)),
        }
        Ok(())
    }

    fn take_frames(&mut self) -> Result<(), RelayError> {
        while self.end.is_none()
            && let Some(frame) = self.decoder.take()?
        {
            self.take_frame(frame);
        }
        Ok(())
    }

    fn take_frame(&mut self, frame: Frame) {
        match frame {
            Frame::Stdout(bytes) => self.outputs.push(Sink::Stdout, bytes),
            Frame::Stderr(bytes) => self.outputs.push(Sink::Stderr, bytes),
            Frame::StdinAck(count) => {
                self.unacknowledged = self.unacknowledged.saturating_sub(count as usize);
            }
            Frame::Exited(status) => self.end = Some(End::Exited(status)),
            Frame::Failed(failure) => self.end = Some(End::Failed(failure)),
            // The rest is for the other side, or news that changes nothing here.
            Frame::Started { .. }
            | Frame::Prepared { .. }
            | Frame::OomKilled { .. }
            | Frame::Go
            | Frame::Spawn(_)
            | Frame::Stdin(_)
            | Frame::StdinEof
            | Frame::Resize { .. }
            | Frame::Signal { .. } => {}
        }
    }

    fn write_output(&mut self) -> Result<(), RelayError> {
        match self.outputs.write() {
            Ok(Written::Some) => Ok(()),
            Ok(Written::StdoutClosed) => {
                if !matches!(self.end, Some(End::Exited(_) | End::Failed(_))) {
                    self.end = Some(End::OutputClosed);
                }
                Ok(())
            }
            Err(errno) => Err(failed("write the command's output", errno)),
        }
    }
}

fn failed(what: &'static str, errno: Errno) -> RelayError {
    RelayError::Io {
        what,
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests;
