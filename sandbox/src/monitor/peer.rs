//! A socket that never makes the driver wait: what can't be written yet is kept, up to a bound
//! that callers look at.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use hull_proto::{Frame, encode};

use crate::control;

const READ_CHUNK: usize = 64 * 1024;

/// One end of a stream, for a loop that polls.
#[derive(Debug)]
pub(super) struct Peer {
    socket: UnixStream,
    out: Vec<u8>,
    written: usize,
    gone: bool,
}

impl Peer {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            out: Vec::new(),
            written: 0,
            gone: false,
        })
    }

    /// Bytes that wait for the other side to read.
    pub(super) fn pending(&self) -> usize {
        self.out.len() - self.written
    }

    /// What waits for the other side to read.
    pub(super) fn unsent(&self) -> &[u8] {
        self.out.get(self.written..).unwrap_or_default()
    }

    /// Whether the other side is gone, so that everything for it is dropped.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }

    /// Appends bytes and writes what can be written.
    pub(super) fn send(&mut self, bytes: &[u8]) {
        if !self.gone {
            self.out.extend_from_slice(bytes);
            self.flush();
        }
    }

    /// Appends a frame. Those that the monitor makes itself can always be encoded.
    pub(super) fn send_frame(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        match encode(frame, &mut bytes) {
            Ok(()) => self.send(&bytes),
            Err(_) => self.gone = true,
        }
    }

    /// Writes what can be written.
    pub(super) fn flush(&mut self) {
        while self.written < self.out.len() && !self.gone {
            match self.socket.write(&self.out[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => self.gone = true,
            }
        }
        if self.gone || self.written == self.out.len() {
            self.out.clear();
            self.written = 0;
        }
        if self.out.capacity() > 4 * READ_CHUNK && self.out.len() < READ_CHUNK {
            self.out.shrink_to(READ_CHUNK);
        }
    }

    /// Reads once. `None` is nothing there now; an empty slice is the end.
    pub(super) fn receive<'a>(&mut self, chunk: &'a mut [u8]) -> Option<&'a [u8]> {
        received(chunk, |chunk| self.socket.read(chunk))
    }

    /// As [`Self::receive`], with the descriptors that come along.
    pub(super) fn receive_with_fds<'a>(
        &mut self,
        chunk: &'a mut [u8],
        descriptors: &mut Vec<OwnedFd>,
    ) -> Option<&'a [u8]> {
        received(chunk, |chunk| {
            control::receive_with_fds(&self.socket, chunk, descriptors)
        })
    }

    pub(super) fn mark_gone(&mut self) {
        self.gone = true;
        self.flush();
    }

    /// The socket, for what goes beside the stream of bytes.
    pub(super) fn socket(&self) -> &UnixStream {
        &self.socket
    }
}

/// What `read` got into the chunk; the end if it fails.
fn received(
    chunk: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> io::Result<usize>,
) -> Option<&[u8]> {
    loop {
        match read(chunk) {
            Ok(count) => return Some(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return None,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return Some(&[]),
        }
    }
}

impl AsFd for Peer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
