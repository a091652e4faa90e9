//! The socket device (virtio 1.3 §5.10): streams between guest and host, whose
//! host ends are Unix sockets of this process.
//!
//! ```text
//!  guest ── tx ring ──► packet ─► mux ─► connection ──► Unix socket ── host
//!        ◄─ rx ring ──                             ◄──
//! ```
//!
//! Owns the three queues, the configuration space and the two ways in: a guest
//! that connects to one of the host's ports, a host that asks its
//! [`Connector`]. Refuses anything but streams between this guest and its host.
//! Nothing is buffered without a bound: a full socket stops the guest by its
//! credit, a guest without credit or receive buffers stops the socket.

mod connection;
mod mux;
mod packet;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};
use serde::{Deserialize, Serialize};

use self::connection::MAX_DATA_BYTES;
pub use self::connection::StreamState;
pub use self::mux::MAX_CONNECTIONS;
use self::mux::{CONNECT_TIMEOUT, Mux};
use self::packet::{HEADER_BYTES, Header, Op};
use super::device::{
    Activation, DeviceError, Interest, Persist, Readiness, RestoreError, VirtioDevice,
    read_config_bytes,
};
use super::queue::{Chain, Queue, QueueError};

/// Receive, transmit and event queue (virtio 1.3 §5.10.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
const EVENT_QUEUE: usize = 2;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (virtio 1.3 §5.10.6.8).
const EVENT_TRANSPORT_RESET: u32 = 0;

/// Connections asked for by the host and not yet seen by the device.
#[derive(Debug)]
struct Asked {
    wake: OwnedFd,
    active: AtomicBool,
    waiting: Mutex<VecDeque<(u32, UnixStream, Instant)>>,
}

/// Connects the host to ports of the guest, from any thread.
#[derive(Debug, Clone)]
pub struct Connector(Arc<Asked>);

impl Connector {
    /// A stream to `guest_port`. It is there at once: what is written to it is
    /// delivered when the guest has accepted. When the guest refuses, or is
    /// silent for two seconds, the stream reads as ended.
    ///
    /// # Errors
    /// `NotConnected` when the guest's driver isn't up, `WouldBlock` when
    /// [`MAX_CONNECTIONS`] wait already, or what `socketpair(2)` says.
    pub fn connect(&self, guest_port: u32) -> io::Result<UnixStream> {
        if !self.0.active.load(Ordering::Acquire) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let mut waiting = self
            .0
            .waiting
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if waiting.len() >= MAX_CONNECTIONS {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        waiting.push_back((guest_port, ours, Instant::now() + CONNECT_TIMEOUT));
        drop(waiting);
        rustix::io::write(&self.0.wake, &1u64.to_ne_bytes())?;
        Ok(theirs)
    }
}

/// How far the guest has been told that a restore cut its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TransportReset {
    /// Nothing to tell.
    None,
    /// To be told at the next look at the event queue.
    Due,
    /// Told; its answer is a kick of the event queue. Until then a new
    /// connection could still be taken for an old one.
    Told,
}

/// What a snapshot keeps of the device.
///
/// Streams that the guest opened are carried on, each over a new socket, if all of the
/// device's are such and nothing is on its way in any. Else none survives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// The guest had connections, and has to be told that they are gone.
    pub had_connections: bool,
    /// Those that are carried on.
    #[serde(default)]
    pub streams: Vec<StreamState>,
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    asked: Arc<Asked>,
    mux: Mux,
    transport_reset: TransportReset,
    data: Vec<u8>,
}

impl Vsock {
    /// A device for the guest `guest_cid`. The guest reaches the host on the
    /// keys of `ports`; each of its connections arrives at the other end.
    ///
    /// # Errors
    /// What `eventfd(2)`, `epoll_create(2)` or `timerfd_create(2)` say.
    pub fn new(guest_cid: u64, ports: BTreeMap<u32, Sender<UnixStream>>) -> io::Result<Self> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let mux = Mux::new(guest_cid, ports, &wake)?;
        let asked = Asked {
            wake,
            active: AtomicBool::new(false),
            waiting: Mutex::default(),
        };
        Ok(Self {
            guest_cid,
            asked: Arc::new(asked),
            mux,
            transport_reset: TransportReset::None,
            data: Vec::new(),
        })
    }

    /// A handle to connect to the guest with.
    #[must_use]
    pub fn connector(&self) -> Connector {
        Connector(Arc::clone(&self.asked))
    }

    fn take_asked(&mut self) {
        // Only to make the descriptor quiet; its count says nothing.
        let _ = rustix::io::read(&self.asked.wake, &mut [0u8; 8]);
        let waiting = std::mem::take(
            &mut *self
                .asked
                .waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for (port, stream, deadline) in waiting {
            self.mux.connect(stream, port, deadline);
        }
    }

    /// Moves packets both ways until neither ring nor socket has more.
    fn service(&mut self, queues: &mut [Queue]) -> Result<(), DeviceError> {
        if self.transport_reset != TransportReset::None {
            return Ok(());
        }
        let [rx, tx, ..] = queues else {
            return Ok(());
        };
        loop {
            let drained = self.take_packets(tx)?;
            self.give_packets(rx)?;
            if drained || self.mux.is_congested() {
                return Ok(());
            }
        }
    }

    /// Takes the guest's packets; `true` when there are no more.
    fn take_packets(&mut self, tx: &mut Queue) -> Result<bool, QueueError> {
        while !self.mux.is_congested() {
            let Some(chain) = tx.pop()? else {
                return Ok(true);
            };
            self.take_packet(&chain)?;
            tx.complete(&chain, 0)?;
        }
        Ok(false)
    }

    /// A packet whose chain doesn't hold what its header says is dropped.
    fn take_packet(&mut self, chain: &Chain) -> Result<(), QueueError> {
        if (chain.readable_len() as usize) < HEADER_BYTES {
            return Ok(());
        }
        let mut header = Header::decode(&chain.read_array(0)?);
        let announced = header.len as usize;
        self.data.clear();
        if header.op == Op::Data as u16 {
            if announced > MAX_DATA_BYTES
                || announced > chain.readable_len() as usize - HEADER_BYTES
            {
                // Not an operation: whoever it names is cut off.
                header.op = 0;
            } else {
                self.data.resize(announced, 0);
                chain.read_at(HEADER_BYTES, &mut self.data)?;
            }
        }
        self.mux.on_packet(&header, &self.data);
        Ok(())
    }

    /// Fills the guest's receive buffers, while there are both.
    fn give_packets(&mut self, rx: &mut Queue) -> Result<(), DeviceError> {
        while let Some(outgoing) = self.mux.select() {
            let Some(chain) = rx.pop()? else {
                break;
            };
            let Some(room) = (chain.writable_len() as usize)
                .checked_sub(HEADER_BYTES)
                .filter(|room| *room > 0)
            else {
                return Err(DeviceError::Guest(format!(
                    "receive buffer of {} bytes has no room for a packet",
                    chain.writable_len()
                )));
            };
            let header = self.mux.packet(outgoing, room, &mut self.data);
            chain.write_at(0, &header.encode())?;
            chain.write_at(HEADER_BYTES, &self.data)?;
            let written = HEADER_BYTES + self.data.len();
            rx.complete(&chain, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        self.data = Vec::new();
        Ok(())
    }

    fn on_event_queue(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        match self.transport_reset {
            TransportReset::None => {}
            TransportReset::Told => self.transport_reset = TransportReset::None,
            TransportReset::Due => {
                let Some(chain) = queue.pop()? else {
                    return Ok(());
                };
                let event = EVENT_TRANSPORT_RESET.to_le_bytes();
                chain.write_at(0, &event)?;
                queue.complete(&chain, 4)?;
                self.transport_reset = TransportReset::Told;
            }
        }
        Ok(())
    }
}

impl Persist for Vsock {
    const UNIT: &'static str = "vsock";
    type State = VsockState;

    fn save(&self) -> VsockState {
        let streams = match self.transport_reset {
            TransportReset::None => self.mux.streams(),
            TransportReset::Due | TransportReset::Told => None,
        };
        VsockState {
            guest_cid: self.guest_cid,
            had_connections: streams.is_none(),
            streams: streams.unwrap_or_default(),
        }
    }

    fn restore(&mut self, state: VsockState) -> Result<(), RestoreError> {
        let mismatch = |why| RestoreError::Mismatch {
            unit: Self::UNIT.to_owned(),
            why,
        };
        if state.guest_cid != self.guest_cid {
            return Err(mismatch(format!(
                "it was saved with guest CID {}, the device has {}",
                state.guest_cid, self.guest_cid
            )));
        }
        for stream in &state.streams {
            self.mux.carry_on(stream).map_err(|error| {
                mismatch(format!(
                    "nobody goes on with its stream to port {}: {error}",
                    stream.host_port
                ))
            })?;
        }
        self.transport_reset = if state.had_connections {
            TransportReset::Due
        } else {
            TransportReset::None
        };
        Ok(())
    }
}

impl VirtioDevice for Vsock {
    const ID: u32 = 19;

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        activation
            .wakers
            .watch(self.mux.event_fd().as_fd(), Interest::Read, 0)
            .map_err(|source| DeviceError::Host {
                what: "watch the sockets of the vsock device",
                source,
            })?;
        self.asked.active.store(true, Ordering::Release);
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        if index == EVENT_QUEUE
            && let Some(queue) = queues.get_mut(index)
        {
            self.on_event_queue(queue)?;
        }
        self.service(queues)
    }

    fn on_event(
        &mut self,
        _token: u32,
        _readiness: Readiness,
        queues: &mut [Queue],
    ) -> Result<(), DeviceError> {
        let polled = self.mux.poll().map_err(|source| DeviceError::Host {
            what: "poll the sockets of the vsock device",
            source,
        })?;
        if polled.connect {
            self.take_asked();
        }
        self.service(queues)
    }

    fn reset(&mut self) {
        self.asked.active.store(false, Ordering::Release);
        self.take_asked();
        self.mux.clear();
        self.transport_reset = TransportReset::None;
    }
}
