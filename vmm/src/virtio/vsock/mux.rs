//! All vsock streams of one guest: who talks to whom, and who may send next.
//!
//! Owns the table of connections, their sockets' readiness (an epoll instance
//! that the device watches as one descriptor), their deadlines (one timer) and
//! the turn they take. Refuses what isn't for the host, connections beyond
//! [`MAX_CONNECTIONS`], and guests that break the protocol: their connection
//! gets `RST`. Knows no queue: packets go in and out as headers and bytes.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use rustix::buffer::spare_capacity;
use rustix::event::epoll;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::connection::{Connection, MAX_DATA_BYTES, Phase, StreamState, Violation};
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};

/// Connections a guest may have, in both directions together.
pub const MAX_CONNECTIONS: usize = 1024;

/// Refusals waiting for the guest to give receive buffers; its packets wait beyond.
const MAX_RESETS: usize = 256;

/// How long a guest may take to accept a connection.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a guest may take to answer the end of a connection, as Linux's own
/// `VSOCK_CLOSE_TIMEOUT`.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(8);

/// The first port the host connects from: out of the way of well-known ones.
const FIRST_HOST_PORT: u32 = 1 << 30;

const TOKEN_TIMER: u64 = 0;
const TOKEN_CONNECT: u64 = 1;
const FIRST_TOKEN: u64 = 2;

/// A socket event to look at, as [`Mux::poll`] returns them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Polled {
    /// Somebody asked for a connection to the guest.
    pub(super) connect: bool,
}

/// What goes out next, see [`Mux::select`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outgoing {
    Refusal,
    Stream(u64, Op),
}

#[derive(Debug)]
pub(super) struct Mux {
    guest_cid: u64,
    ports: BTreeMap<u32, Sender<UnixStream>>,
    epoll: OwnedFd,
    timer: OwnedFd,
    connections: BTreeMap<u64, Connection>,
    by_ports: BTreeMap<(u32, u32), u64>,
    next_token: u64,
    next_host_port: u32,
    ready: VecDeque<u64>,
    resets: VecDeque<Header>,
    spare: Vec<u8>,
    timer_is_stale: bool,
}

impl Mux {
    /// A table for the guest `guest_cid` that reaches the host on `ports`;
    /// `connect` becomes readable when the host wants a connection.
    pub(super) fn new(
        guest_cid: u64,
        ports: BTreeMap<u32, Sender<UnixStream>>,
        connect: impl AsFd,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        epoll::add(
            &epoll,
            &timer,
            epoll::EventData::new_u64(TOKEN_TIMER),
            epoll::EventFlags::IN,
        )?;
        epoll::add(
            &epoll,
            connect,
            epoll::EventData::new_u64(TOKEN_CONNECT),
            epoll::EventFlags::IN,
        )?;
        Ok(Self {
            guest_cid,
            ports,
            epoll,
            timer,
            connections: BTreeMap::new(),
            by_ports: BTreeMap::new(),
            next_token: FIRST_TOKEN,
            next_host_port: FIRST_HOST_PORT,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            spare: Vec::new(),
            timer_is_stale: false,
        })
    }

    /// The descriptor that is readable when [`Mux::poll`] has work.
    pub(super) fn event_fd(&self) -> &OwnedFd {
        &self.epoll
    }

    /// Connections, those included that only drain.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    /// Drops every connection: their hosts read the end of file.
    pub(super) fn clear(&mut self) {
        self.connections.clear();
        self.by_ports.clear();
        self.ready.clear();
        self.resets.clear();
        self.timer_is_stale = true;
        self.arm_timer();
    }

    /// The streams that a snapshot can go on with, and the host's and the guest's ports of those
    /// that are over with it.
    pub(super) fn streams(&self) -> (Vec<StreamState>, Vec<(u32, u32)>) {
        let refused = |header: &Header| (header.src_port, header.dst_port);
        let mut cut: Vec<(u32, u32)> = self.resets.iter().map(refused).collect();
        let mut streams = Vec::new();
        for connection in self.connections.values() {
            match connection.state() {
                Some(state) => streams.push(state),
                // The guest has forgotten it.
                None if connection.phase() == Phase::Draining => {}
                None => cut.push((connection.host_port, connection.guest_port)),
            }
        }
        (streams, cut)
    }

    /// Tells the guest that a stream is over.
    pub(super) fn cut(&mut self, host_port: u32, guest_port: u32) {
        self.refuse(&Header {
            src_port: guest_port,
            dst_port: host_port,
            socket_type: TYPE_STREAM,
            ..Header::default()
        });
    }

    /// Goes on with a saved stream: its host takes it as one that the guest just opened.
    pub(super) fn carry_on(&mut self, state: StreamState) -> io::Result<()> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let host = self.ports.get(&state.host_port);
        let host = host.ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        host.send(theirs)
            .map_err(|_| io::ErrorKind::ConnectionRefused)?;
        self.insert(Connection::resumed(ours, state)?)
    }

    /// So many refusals wait that the guest's packets have to.
    pub(super) fn is_congested(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    // --- from the guest ---------------------------------------------------

    /// Takes a packet of the guest; `data` is all that the header announced.
    pub(super) fn on_packet(&mut self, header: &Header, data: &[u8]) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let op = Op::from_wire(header.op);
        if header.socket_type != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let token = self
            .by_ports
            .get(&(header.dst_port, header.src_port))
            .copied();
        match (op, token) {
            (Some(Op::Request), None) => self.on_request(header),
            (_, None) => self.refuse(header),
            (Some(Op::Reset), Some(token)) => self.detach(token),
            (op, Some(token)) => {
                if self.on_stream_packet(token, op, header, data).is_err() {
                    self.refuse(header);
                    self.remove(token);
                } else {
                    self.list(token);
                }
            }
        }
        self.arm_timer();
    }

    fn on_stream_packet(
        &mut self,
        token: u64,
        op: Option<Op>,
        header: &Header,
        data: &[u8],
    ) -> Result<(), Violation> {
        let connection = self.connections.get_mut(&token).ok_or(Violation)?;
        if op == Some(Op::Response) {
            self.timer_is_stale = true;
            return connection.on_response(header);
        }
        if matches!(connection.phase(), Phase::Requested(_)) {
            return Err(Violation);
        }
        connection.on_credit(header)?;
        match op {
            Some(Op::Data) => connection.on_data(data)?,
            Some(Op::CreditUpdate) => {}
            Some(Op::CreditRequest) => connection.on_credit_request(),
            Some(Op::Shutdown) => {
                if connection.on_shutdown(header.flags & SHUTDOWN_BOTH) {
                    self.refuse(header);
                    self.detach(token);
                }
            }
            Some(Op::Request | Op::Response | Op::Reset) | None => return Err(Violation),
        }
        Ok(())
    }

    fn on_request(&mut self, header: &Header) {
        let accepted = self.ports.get(&header.dst_port).and_then(|host| {
            if self.connections.len() >= MAX_CONNECTIONS {
                return None;
            }
            let (ours, theirs) = UnixStream::pair().ok()?;
            ours.set_nonblocking(true).ok()?;
            host.send(theirs).ok()?;
            Some(Connection::accepted(ours, header))
        });
        if accepted.is_none_or(|connection| self.insert(connection).is_err()) {
            self.refuse(header);
        }
    }

    /// Answers a packet with `RST`, unless it is one.
    fn refuse(&mut self, header: &Header) {
        if header.op == Op::Reset as u16 || self.resets.len() >= MAX_RESETS + MAX_CONNECTIONS {
            return;
        }
        self.resets.push_back(Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            socket_type: header.socket_type,
            op: Op::Reset as u16,
            ..Header::default()
        });
    }

    // --- from the host ----------------------------------------------------

    /// Asks the guest for a connection to `guest_port`, answered by `deadline`.
    /// Without room for it, `stream` is dropped: its host reads the end of file.
    pub(super) fn connect(&mut self, stream: UnixStream, guest_port: u32, deadline: Instant) {
        if self.connections.len() >= MAX_CONNECTIONS {
            return;
        }
        let mut host_port = self.next_host_port;
        while self.by_ports.contains_key(&(host_port, guest_port)) {
            host_port = following_port(host_port);
        }
        self.next_host_port = following_port(host_port);
        let connection = Connection::requested(stream, host_port, guest_port, deadline);
        // A socket that can't be watched is dropped: its host reads the end of file.
        let _ = self.insert(connection);
        self.timer_is_stale = true;
        self.arm_timer();
    }

    /// Looks at all sockets and at the timer, without waiting.
    pub(super) fn poll(&mut self) -> io::Result<Polled> {
        let mut polled = Polled::default();
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(
                &self.epoll,
                spare_capacity(&mut events),
                Some(&Timespec {
                    tv_sec: 0,
                    tv_nsec: 0,
                }),
            ) {
                Err(rustix::io::Errno::INTR) => continue,
                outcome => outcome?,
            };
            for event in &events {
                let flags = event.flags;
                match event.data.u64() {
                    TOKEN_TIMER => self.on_timer(),
                    TOKEN_CONNECT => polled.connect = true,
                    token => self.on_socket(
                        token,
                        flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR),
                    ),
                }
            }
            // The two level-triggered descriptors would be reported again at once.
            if events.len() < events.capacity() {
                return Ok(polled);
            }
        }
    }

    fn on_socket(&mut self, token: u64, hung_up: bool) {
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.on_socket(hung_up);
            self.list(token);
        }
    }

    fn on_timer(&mut self) {
        // Only to make the timer quiet; its count says nothing.
        let _ = rustix::io::read(&self.timer, &mut [0u8; 8]);
        let now = Instant::now();
        let late: Vec<u64> = self
            .connections
            .iter()
            .filter(|(_, c)| c.deadline().is_some_and(|at| at <= now))
            .map(|(token, _)| *token)
            .collect();
        for token in late {
            self.expire(token);
        }
        self.timer_is_stale = true;
        self.arm_timer();
    }

    fn expire(&mut self, token: u64) {
        if let Some(connection) = self.connections.get(&token) {
            self.cut(connection.host_port, connection.guest_port);
            self.remove(token);
        }
    }

    fn arm_timer(&mut self) {
        if !std::mem::take(&mut self.timer_is_stale) {
            return;
        }
        let next = self
            .connections
            .values()
            .filter_map(Connection::deadline)
            .min();
        let wait = next.map_or(Duration::ZERO, |at| {
            at.saturating_duration_since(Instant::now())
                .max(Duration::from_micros(1))
        });
        let value = Itimerspec {
            it_interval: Timespec {
                tv_sec: 0,
                tv_nsec: 0,
            },
            it_value: Timespec {
                tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(wait.subsec_nanos()),
            },
        };
        // Fails for values that `Duration` rules out only.
        let _ = rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value);
    }

    // --- to the guest -----------------------------------------------------

    /// What the guest is to be sent next; reads sockets to know.
    pub(super) fn select(&mut self) -> Option<Outgoing> {
        if !self.resets.is_empty() {
            return Some(Outgoing::Refusal);
        }
        while let Some(token) = self.ready.front().copied() {
            if let Some(connection) = self.connections.get_mut(&token) {
                if let Some(op) = connection.next_op(&mut self.spare) {
                    return Some(Outgoing::Stream(token, op));
                }
                connection.listed = false;
                if connection.phase() == Phase::Draining && connection.is_drained() {
                    self.remove(token);
                }
            }
            self.ready.pop_front();
        }
        if self.spare.capacity() > 0 {
            self.spare = Vec::new();
        }
        None
    }

    /// Makes the packet that [`Mux::select`] chose, with at most `room` bytes
    /// of data, left in `data`.
    pub(super) fn packet(&mut self, outgoing: Outgoing, room: usize, data: &mut Vec<u8>) -> Header {
        data.clear();
        let (token, op) = match outgoing {
            Outgoing::Refusal => return self.resets.pop_front().unwrap_or_default(),
            Outgoing::Stream(token, op) => (token, op),
        };
        let Some(connection) = self.connections.get_mut(&token) else {
            return Header::default();
        };
        let mut header = connection.packet(
            op,
            room.min(MAX_DATA_BYTES),
            Instant::now() + CLOSE_TIMEOUT,
            &mut self.spare,
            data,
        );
        header.src_cid = HOST_CID;
        header.dst_cid = self.guest_cid;
        header.socket_type = TYPE_STREAM;
        if op == Op::Shutdown {
            self.timer_is_stale = true;
        }
        // The next one's turn.
        self.ready.rotate_left(1);
        self.arm_timer();
        header
    }

    // --- the table --------------------------------------------------------

    fn insert(&mut self, connection: Connection) -> io::Result<()> {
        let token = self.next_token;
        self.next_token += 1;
        let flags = epoll::EventFlags::IN
            | epoll::EventFlags::OUT
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::ET;
        epoll::add(
            &self.epoll,
            connection.stream(),
            epoll::EventData::new_u64(token),
            flags,
        )?;
        self.by_ports
            .insert((connection.host_port, connection.guest_port), token);
        self.connections.insert(token, connection);
        self.list(token);
        Ok(())
    }

    /// Gives a connection its turn to send.
    fn list(&mut self, token: u64) {
        if let Some(connection) = self.connections.get_mut(&token)
            && !connection.listed
        {
            connection.listed = true;
            self.ready.push_back(token);
        }
    }

    /// The guest is done with a connection: its ports are free again, and what
    /// the host has yet to read stays until it did.
    fn detach(&mut self, token: u64) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        self.timer_is_stale |= connection.deadline().is_some();
        self.by_ports
            .remove(&(connection.host_port, connection.guest_port));
        connection.drain();
        if connection.is_drained() {
            self.remove(token);
        }
    }

    /// Closing the socket takes it out of the epoll instance, too.
    fn remove(&mut self, token: u64) {
        if let Some(connection) = self.connections.remove(&token) {
            let ports = (connection.host_port, connection.guest_port);
            if self.by_ports.get(&ports) == Some(&token) {
                self.by_ports.remove(&ports);
            }
            self.timer_is_stale |= connection.deadline().is_some();
        }
    }
}

fn following_port(port: u32) -> u32 {
    // The last port, all ones, means "any" (virtio 1.3 §5.10.6.1, `VMADDR_PORT_ANY`).
    if port >= u32::MAX - 1 {
        FIRST_HOST_PORT
    } else {
        port + 1
    }
}
