//! One vsock stream: a Unix socket on the host's side, credit and half-closes
//! on the guest's (virtio 1.3 §5.10.6.3, §5.10.6.5).
//!
//! ```text
//!   Requested ──RESPONSE──► Open ──both directions shut──► Closing ──► gone
//!       └──RST, deadline──► gone         └──guest's end shut──► Draining ──► gone
//! ```
//!
//! Owns what one stream may buffer: at most [`RECEIVE_BUFFER_BYTES`] that the
//! guest sent and the host has not read, at most [`MAX_DATA_BYTES`] that the
//! host sent and the guest has no room for. Refuses a guest that sends beyond
//! its credit or acknowledges what it was never sent. Knows no queue, no table.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use rustix::buffer::spare_capacity;
use rustix::io::Errno;
use rustix::net::RecvFlags;
use serde::{Deserialize, Serialize};

use super::packet::{Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes a guest may have in flight to a host that doesn't read.
pub(super) const RECEIVE_BUFFER_BYTES: u32 = 128 * 1024;

/// Bytes of data in one packet, either way.
pub(super) const MAX_DATA_BYTES: usize = 64 * 1024;

/// Bytes that a snapshot keeps of what is on its way to the guest: more than a socket holds.
const MAX_SAVED_BYTES: usize = 1 << 20;

/// The guest broke the protocol; its connection is cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// The host asked; the guest has until the deadline to answer.
    Requested(Instant),
    /// Data flows.
    Open,
    /// The host has closed both directions; the guest has until the deadline
    /// to say `RST`.
    Closing(Instant),
    /// The guest is done with it; what it sent still goes to the host.
    Draining,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    phase: Phase,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    /// In the table's list of connections that may have a packet to send.
    pub(super) listed: bool,

    // Guest to host.
    received: VecDeque<u8>,
    rx_cnt: u32,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    guest_sends_no_more: bool,
    host_reads_no_more: bool,
    write_shut: bool,

    // Host to guest.
    staged: Vec<u8>,
    staged_from: usize,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    maybe_readable: bool,
    hung_up: bool,
    host_sends_no_more: bool,
    guest_reads_no_more: bool,

    // Packets owed to the guest.
    owes: Owed,
    told_shutdown: u32,
}

/// An open stream with what is on its way, as a snapshot keeps it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// Its port on the host.
    pub host_port: u32,
    /// Its port in the guest.
    pub guest_port: u32,
    rx_cnt: u32,
    fwd_cnt: u32,
    told_fwd_cnt: u32,
    tx_cnt: u32,
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    owes_credit: bool,
    /// What the guest sent and the host's socket had no room for.
    to_host: Vec<u8>,
    /// What the host sent and the guest was not given yet.
    to_guest: Vec<u8>,
}

/// Control packets a connection has yet to send.
#[derive(Debug, Default, Clone, Copy)]
struct Owed {
    request: bool,
    response: bool,
    credit: bool,
}

impl Connection {
    /// A connection that the guest asked for, to be answered with `RESPONSE`.
    pub(super) fn accepted(stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(stream, request.dst_port, request.src_port, Phase::Open);
        connection.owes.response = true;
        connection.peer_buf_alloc = request.buf_alloc;
        connection.peer_fwd_cnt = 0;
        connection
    }

    /// A connection that the host asks the guest for.
    pub(super) fn requested(
        stream: UnixStream,
        host_port: u32,
        guest_port: u32,
        deadline: Instant,
    ) -> Self {
        let mut connection = Self::new(stream, host_port, guest_port, Phase::Requested(deadline));
        connection.owes.request = true;
        connection
    }

    /// A saved stream, going on over another socket.
    ///
    /// # Errors
    /// `InvalidData` for a state that no stream can have.
    pub(super) fn resumed(stream: UnixStream, state: StreamState) -> io::Result<Self> {
        let buffered = state.rx_cnt.wrapping_sub(state.fwd_cnt);
        if buffered > RECEIVE_BUFFER_BYTES
            || state.to_host.len() != buffered as usize
            || state.to_guest.len() > MAX_SAVED_BYTES
        {
            return Err(ErrorKind::InvalidData.into());
        }
        Ok(Self {
            rx_cnt: state.rx_cnt,
            fwd_cnt: state.fwd_cnt,
            told_fwd_cnt: state.told_fwd_cnt,
            tx_cnt: state.tx_cnt,
            peer_buf_alloc: state.peer_buf_alloc,
            peer_fwd_cnt: state.peer_fwd_cnt,
            owes: Owed {
                credit: state.owes_credit,
                ..Owed::default()
            },
            received: state.to_host.into(),
            staged: state.to_guest,
            ..Self::new(stream, state.host_port, state.guest_port, Phase::Open)
        })
    }

    /// What another socket could go on with; `None` while the stream opens or closes.
    pub(super) fn state(&self) -> Option<StreamState> {
        let closed = self.guest_sends_no_more
            || self.host_reads_no_more
            || self.host_sends_no_more
            || self.guest_reads_no_more
            || self.hung_up;
        if self.phase != Phase::Open || closed || self.owes.request || self.owes.response {
            return None;
        }
        let mut to_guest = self.staged.get(self.staged_from..)?.to_vec();
        to_guest.extend(self.queued()?);
        Some(StreamState {
            host_port: self.host_port,
            guest_port: self.guest_port,
            rx_cnt: self.rx_cnt,
            fwd_cnt: self.fwd_cnt,
            told_fwd_cnt: self.told_fwd_cnt,
            tx_cnt: self.tx_cnt,
            peer_buf_alloc: self.peer_buf_alloc,
            peer_fwd_cnt: self.peer_fwd_cnt,
            owes_credit: self.owes.credit,
            to_host: self.received.iter().copied().collect(),
            to_guest,
        })
    }

    /// What the host has written to the socket and wasn't read from it; it stays there.
    fn queued(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; MAX_SAVED_BYTES / 2];
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.stream, &mut *bytes, flags) {
            // The host has closed it.
            Ok((0, _)) => None,
            Ok((count, _)) => {
                bytes.truncate(count);
                Some(bytes)
            }
            Err(Errno::AGAIN) => Some(Vec::new()),
            Err(_) => None,
        }
    }

    fn new(stream: UnixStream, host_port: u32, guest_port: u32, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            host_port,
            guest_port,
            listed: false,
            received: VecDeque::new(),
            rx_cnt: 0,
            fwd_cnt: 0,
            told_fwd_cnt: 0,
            guest_sends_no_more: false,
            host_reads_no_more: false,
            write_shut: false,
            staged: Vec::new(),
            staged_from: 0,
            tx_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            maybe_readable: true,
            hung_up: false,
            host_sends_no_more: false,
            guest_reads_no_more: false,
            owes: Owed::default(),
            told_shutdown: 0,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase
    }

    /// When something must happen for this connection to live on.
    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Requested(at) | Phase::Closing(at) => Some(at),
            Phase::Open | Phase::Draining => None,
        }
    }

    /// The guest accepted.
    ///
    /// # Errors
    /// It was not asked, or its credit is a lie.
    pub(super) fn on_response(&mut self, header: &Header) -> Result<(), Violation> {
        if !matches!(self.phase, Phase::Requested(_)) || self.owes.request {
            return Err(Violation);
        }
        self.phase = Phase::Open;
        self.on_credit(header)
    }

    /// Takes the credit that every packet of the guest carries (virtio 1.3
    /// §5.10.6.3). An older count than the last is ignored.
    ///
    /// # Errors
    /// The guest acknowledges more than it was sent.
    pub(super) fn on_credit(&mut self, header: &Header) -> Result<(), Violation> {
        let unacknowledged = self.tx_cnt.wrapping_sub(header.fwd_cnt);
        if unacknowledged > self.tx_cnt.wrapping_sub(self.peer_fwd_cnt) {
            let ahead = header.fwd_cnt.wrapping_sub(self.tx_cnt);
            let behind = self.peer_fwd_cnt.wrapping_sub(header.fwd_cnt);
            return if ahead < behind {
                Err(Violation)
            } else {
                Ok(())
            };
        }
        self.peer_fwd_cnt = header.fwd_cnt;
        self.peer_buf_alloc = header.buf_alloc;
        Ok(())
    }

    /// The guest asks for our credit.
    pub(super) fn on_credit_request(&mut self) {
        self.owes.credit = true;
    }

    /// Takes data of the guest: to the socket what fits, the rest buffered.
    ///
    /// # Errors
    /// More than the credit we gave, or data after `SHUTDOWN`.
    pub(super) fn on_data(&mut self, data: &[u8]) -> Result<(), Violation> {
        let buffered = self.rx_cnt.wrapping_sub(self.fwd_cnt);
        let room = RECEIVE_BUFFER_BYTES.saturating_sub(buffered);
        let len = u32::try_from(data.len()).map_err(|_| Violation)?;
        if self.phase == Phase::Draining || self.guest_sends_no_more || len > room {
            return Err(Violation);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        self.flush();
        if self.host_reads_no_more {
            self.forwarded(data.len());
            return Ok(());
        }
        let written = if self.received.is_empty() {
            self.write_some(data)
        } else {
            0
        };
        if self.host_reads_no_more {
            self.forwarded(data.len() - written);
        } else {
            self.received.extend(&data[written..]);
        }
        Ok(())
    }

    /// The guest closes directions; `true` when it is done with both, so that
    /// only [`Connection::drain`] is left to do.
    pub(super) fn on_shutdown(&mut self, flags: u32) -> bool {
        if flags & SHUTDOWN_RECEIVE != 0 && !self.guest_reads_no_more {
            self.guest_reads_no_more = true;
            self.staged = Vec::new();
            self.staged_from = 0;
            // A socket whose peer is gone can't be shut: the same outcome.
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends_no_more = true;
            self.flush();
        }
        self.guest_reads_no_more && self.guest_sends_no_more
    }

    /// The guest is done with the connection: only what it sent is left.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.guest_sends_no_more = true;
        self.owes = Owed::default();
        self.staged = Vec::new();
        self.flush();
    }

    /// Nothing is left for the host to be given.
    pub(super) fn is_drained(&self) -> bool {
        self.received.is_empty()
    }

    /// The socket has changed: readable, writable or closed by its peer.
    pub(super) fn on_socket(&mut self, hung_up: bool) {
        self.maybe_readable = true;
        self.hung_up |= hung_up;
        self.flush();
    }

    /// Writes what is buffered; then passes the guest's end of data on.
    fn flush(&mut self) {
        while !self.received.is_empty() {
            let (front, _) = self.received.as_slices();
            let chunk = front.to_vec();
            let written = self.write_some(&chunk);
            self.received.drain(..written);
            if self.host_reads_no_more {
                self.forwarded(self.received.len());
                self.received = VecDeque::new();
            } else if written < chunk.len() {
                return;
            }
        }
        if self.received.capacity() > MAX_DATA_BYTES {
            self.received = VecDeque::new();
        }
        if self.guest_sends_no_more && !self.write_shut {
            self.write_shut = true;
            // A socket whose peer is gone can't be shut: the same outcome.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// Writes until the socket is full; notices a host that reads no more.
    fn write_some(&mut self, data: &[u8]) -> usize {
        let mut written = 0;
        while written < data.len() {
            match (&self.stream).write(&data[written..]) {
                Ok(0) => break,
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.host_reads_no_more = true;
                    break;
                }
            }
        }
        self.forwarded(written);
        written
    }

    /// Counts bytes out of the receive buffer; owes a credit update when the
    /// guest, by what it was told last, has less than half of it left.
    fn forwarded(&mut self, count: usize) {
        let count = u32::try_from(count).unwrap_or(RECEIVE_BUFFER_BYTES);
        self.fwd_cnt = self.fwd_cnt.wrapping_add(count);
        let seen_full = self.rx_cnt.wrapping_sub(self.told_fwd_cnt);
        if seen_full > RECEIVE_BUFFER_BYTES / 2 && self.fwd_cnt != self.told_fwd_cnt {
            self.owes.credit = true;
        }
    }

    /// Bytes the guest has room for.
    fn credit(&self) -> usize {
        let in_flight = self.tx_cnt.wrapping_sub(self.peer_fwd_cnt);
        self.peer_buf_alloc.saturating_sub(in_flight) as usize
    }

    /// Reads from the socket if the guest has room; notices its end.
    fn stage(&mut self, spare: &mut Vec<u8>) {
        let room = self.credit().min(MAX_DATA_BYTES);
        let idle = self.staged.len() == self.staged_from;
        if self.phase != Phase::Open || !idle || !self.maybe_readable || self.host_sends_no_more {
            return;
        }
        if self.guest_reads_no_more || room == 0 {
            return;
        }
        let mut buffer = std::mem::take(spare);
        buffer.reserve_exact(room);
        match rustix::io::retry_on_intr(|| {
            rustix::io::read(&self.stream, spare_capacity(&mut buffer))
        }) {
            Ok(0) => self.host_sends_no_more = true,
            Ok(_) => {
                self.staged = buffer;
                return;
            }
            Err(Errno::AGAIN) => self.maybe_readable = false,
            Err(_) => {
                self.host_sends_no_more = true;
                self.hung_up = true;
            }
        }
        *spare = buffer;
    }

    /// The `SHUTDOWN` flags the guest should know of by now.
    fn shutdown_flags(&self) -> u32 {
        let mut flags = 0;
        let sent_all = self.staged.len() == self.staged_from;
        if self.host_sends_no_more && sent_all {
            flags |= SHUTDOWN_SEND;
            if self.hung_up {
                flags |= SHUTDOWN_RECEIVE;
            }
        }
        if self.host_reads_no_more {
            flags |= SHUTDOWN_RECEIVE;
        }
        flags
    }

    /// The next operation to send, if there is one; reads the socket for it.
    pub(super) fn next_op(&mut self, spare: &mut Vec<u8>) -> Option<Op> {
        match self.phase {
            Phase::Draining => return None,
            Phase::Requested(_) => return self.owes.request.then_some(Op::Request),
            Phase::Open | Phase::Closing(_) => {}
        }
        if self.owes.response {
            return Some(Op::Response);
        }
        if self.owes.credit {
            return Some(Op::CreditUpdate);
        }
        self.stage(spare);
        if self.staged_from < self.staged.len() && self.credit() > 0 {
            return Some(Op::Data);
        }
        (self.shutdown_flags() & !self.told_shutdown != 0).then_some(Op::Shutdown)
    }

    /// Makes the packet of `op`, as [`Connection::next_op`] gave it: at most
    /// `room` bytes of data go behind the header. `close_by` is how long the
    /// guest may take to answer an end of both directions.
    pub(super) fn packet(
        &mut self,
        op: Op,
        room: usize,
        close_by: Instant,
        spare: &mut Vec<u8>,
        data: &mut Vec<u8>,
    ) -> Header {
        let mut header = self.header(op);
        data.clear();
        match op {
            Op::Request => self.owes.request = false,
            Op::Response => self.owes.response = false,
            Op::Data => {
                let pending = &self.staged[self.staged_from..];
                let count = pending.len().min(room).min(self.credit());
                data.extend_from_slice(&pending[..count]);
                self.staged_from += count;
                header.len = u32::try_from(count).unwrap_or(0);
                self.tx_cnt = self.tx_cnt.wrapping_add(header.len);
                if self.staged_from == self.staged.len() {
                    self.staged.clear();
                    *spare = std::mem::take(&mut self.staged);
                    self.staged_from = 0;
                }
            }
            Op::Shutdown => {
                header.flags = self.shutdown_flags();
                self.told_shutdown = header.flags;
                if header.flags == SHUTDOWN_BOTH {
                    self.phase = Phase::Closing(close_by);
                }
            }
            Op::Reset | Op::CreditUpdate | Op::CreditRequest => {}
        }
        self.owes.credit = false;
        self.told_fwd_cnt = self.fwd_cnt;
        header
    }

    fn header(&self, op: Op) -> Header {
        Header {
            src_port: self.host_port,
            dst_port: self.guest_port,
            op: op as u16,
            buf_alloc: RECEIVE_BUFFER_BYTES,
            fwd_cnt: self.fwd_cnt,
            ..Header::default()
        }
    }
}
