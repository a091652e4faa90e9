//! The process's output that is not yet written, in the order in which it came.
//!
//! Owns: writing without ever waiting for a reader that is slow. Refuses: to make the caller's
//! descriptors non-blocking, for others (a shell) use the same open file.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, fstat};
use rustix::io::Errno;

/// What a pipe takes without waiting once poll says that it is writable (PIPE_BUF, pipe(7)).
const PIPE_BUF: usize = 4096;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sink {
    Stdout,
    Stderr,
}

/// What a write came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Written {
    /// As much as could be.
    Some,
    /// Stdout has no reader any more; what was for it is dropped.
    StdoutClosed,
}

#[derive(Debug)]
struct Target<'a> {
    fd: BorrowedFd<'a>,
    /// The most that one write may carry.
    most: usize,
    closed: bool,
}

impl<'a> Target<'a> {
    fn new(fd: BorrowedFd<'a>) -> Self {
        let regular = fstat(fd).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode).is_file());
        Self {
            fd,
            most: if regular { usize::MAX } else { PIPE_BUF },
            closed: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Outputs<'a> {
    stdout: Target<'a>,
    stderr: Target<'a>,
    pending: VecDeque<(Sink, Vec<u8>)>,
    /// How much of the first is written.
    written: usize,
}

impl<'a> Outputs<'a> {
    pub(super) fn new(stdout: BorrowedFd<'a>, stderr: BorrowedFd<'a>) -> Self {
        Self {
            stdout: Target::new(stdout),
            stderr: Target::new(stderr),
            pending: VecDeque::new(),
            written: 0,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Drops all that is not written.
    pub(super) fn clear(&mut self) {
        self.pending.clear();
        self.written = 0;
    }

    pub(super) fn push(&mut self, sink: Sink, bytes: Vec<u8>) {
        if bytes.is_empty() || self.target(sink).closed {
            return;
        }
        match self.pending.back_mut() {
            Some((last, pending)) if *last == sink => pending.extend_from_slice(&bytes),
            _ => self.pending.push_back((sink, bytes)),
        }
    }

    /// The descriptor that is to be written next.
    pub(super) fn next(&self) -> Option<BorrowedFd<'a>> {
        self.pending.front().map(|&(sink, _)| self.target(sink).fd)
    }

    /// Writes once to [`Self::next`], which must be writable.
    pub(super) fn write(&mut self) -> Result<Written, Errno> {
        let Some((sink, bytes)) = self.pending.front() else {
            return Ok(Written::Some);
        };
        let (sink, length) = (*sink, bytes.len());
        let target = self.target(sink);
        let until = length.min(self.written.saturating_add(target.most));
        match rustix::io::write(target.fd, &bytes[self.written..until]) {
            Ok(count) => self.written += count,
            Err(Errno::INTR | Errno::AGAIN) => {}
            // EIO is what a terminal that hung up says.
            Err(Errno::PIPE | Errno::IO | Errno::CONNRESET) => return Ok(self.close(sink)),
            Err(errno) => return Err(errno),
        }
        if self.written == length {
            self.pending.pop_front();
            self.written = 0;
        }
        Ok(Written::Some)
    }

    fn close(&mut self, sink: Sink) -> Written {
        self.pending.retain(|&(pending, _)| pending != sink);
        self.written = 0;
        match sink {
            Sink::Stdout => {
                self.stdout.closed = true;
                Written::StdoutClosed
            }
            Sink::Stderr => {
                self.stderr.closed = true;
                Written::Some
            }
        }
    }

    fn target(&self, sink: Sink) -> &Target<'a> {
        match sink {
            Sink::Stdout => &self.stdout,
            Sink::Stderr => &self.stderr,
        }
    }
}
