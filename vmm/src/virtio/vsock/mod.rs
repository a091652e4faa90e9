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
    Activation, DeviceError, Interest, Persist, Readiness, RestoreError, Unsaveable, VirtioDevice,
    read_config_bytes,
};
use super::queue::{Chain, Queue, QueueError};

/// Receive, transmit and event queue (virtio 1.3 §5.10.2).
const QUEUE_SIZES: [u16; 3] = [128, 128, 8];
const EVENT_QUEUE: usize = 2;

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

/// What a snapshot keeps of the device.
///
/// Open streams are carried on with all that is on its way in them, each over a new socket; the
/// guest is told that the others are over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockState {
    /// The guest's context id.
    pub guest_cid: u64,
    /// Those that are carried on.
    pub streams: Vec<StreamState>,
    /// The host's and the guest's ports of those that are not.
    pub cut: Vec<(u32, u32)>,
}

/// The socket device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    asked: Arc<Asked>,
    mux: Mux,
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
}

impl Persist for Vsock {
    const UNIT: &'static str = "vsock";
    type State = VsockState;

    fn save(&self) -> Result<VsockState, Unsaveable> {
        let (streams, cut) = self.mux.streams();
        Ok(VsockState {
            guest_cid: self.guest_cid,
            streams,
            cut,
        })
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
        for stream in state.streams {
            let port = stream.host_port;
            self.mux.carry_on(stream).map_err(|error| {
                mismatch(format!(
                    "nobody goes on with its stream to port {port}: {error}"
                ))
            })?;
        }
        for (host_port, guest_port) in state.cut {
            self.mux.cut(host_port, guest_port);
        }
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
        // Nothing ever happens that the event queue is for (virtio 1.3 §5.10.6.8).
        match index {
            EVENT_QUEUE => Ok(()),
            _ => self.service(queues),
        }
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
    }
}
