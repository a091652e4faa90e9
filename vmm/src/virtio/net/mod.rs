//! The network card (virtio 1.3 §5.1): frames between the guest and a tap, one queue each way.
//!
//! A frame crosses in one piece, its header in front, through a buffer of the device's own: what
//! the guest rewrites meanwhile changes nothing. Checksums and segmentation are left to whoever
//! needs them done, so that a frame may be 64 KiB on any MTU. A frame that the guest has no room
//! for waits, and with it the tap; one that the host doesn't take is lost, as on any wire.

mod traffic;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::device::{
    Activation, DeviceError, Interest, Persist, Readiness, RestoreError, Unsaveable, VirtioDevice,
    read_config_bytes,
};
use super::queue::{Chain, Queue};
use crate::spec::NetSpec;

pub use traffic::{Count, Flow, Traffic};

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const QUEUE_SIZE: u16 = 256;
const TAP: u32 = 0;

/// `struct virtio_net_hdr_v1`, which the tap puts before each frame, too.
const HEADER_BYTES: usize = 12;
/// Where the header says how many buffers a received frame is in.
const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Header, Ethernet's own, and the largest packet of IP (virtio 1.3 §5.1.6.3.1).
const MAX_FRAME_BYTES: usize = 65_562;
/// Frames received in a row before the worker's other devices have their turn.
const BATCH: usize = 64;

const CSUM: u64 = 1 << 0;
const GUEST_CSUM: u64 = 1 << 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const GUEST_TSO4: u64 = 1 << 7;
const GUEST_TSO6: u64 = 1 << 8;
const GUEST_ECN: u64 = 1 << 9;
const HOST_TSO4: u64 = 1 << 11;
const HOST_TSO6: u64 = 1 << 12;
const HOST_ECN: u64 = 1 << 13;
const MRG_RXBUF: u64 = 1 << 15;
const STATUS: u64 = 1 << 16;
/// The link is up: with a status to read, guests say so, too.
const LINK_UP: u8 = 1;

/// What a reader of a tap takes off the sender's hands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Frames without their checksum.
    pub checksum: bool,
    /// TCP segments over IPv4 larger than the MTU.
    pub tso4: bool,
    /// TCP segments over IPv6 larger than the MTU.
    pub tso6: bool,
    /// Such segments with ECN.
    pub ecn: bool,
}

impl Offloads {
    /// What a guest takes that chose `features`. Linux takes no segments without checksums.
    fn of(features: u64) -> Self {
        let has = |bit| features & (bit | GUEST_CSUM) == bit | GUEST_CSUM;
        let (tso4, tso6) = (has(GUEST_TSO4), has(GUEST_TSO6));
        Self {
            checksum: has(GUEST_CSUM),
            tso4,
            tso6,
            ecn: has(GUEST_ECN) && (tso4 || tso6),
        }
    }
}

/// Tells the host what the reader of its tap takes (`TUNSETOFFLOAD`).
pub type SetOffloads = Box<dyn Fn(BorrowedFd<'_>, Offloads) -> io::Result<()> + Send>;

/// The host's end of the wire.
pub struct Tap {
    /// Reads and writes a frame at a time, behind a `struct virtio_net_hdr_v1`.
    pub device: OwnedFd,
    /// How it is told what the guest takes.
    pub set_offloads: SetOffloads,
    /// Where what goes over it is counted.
    pub traffic: Arc<Traffic>,
    /// No frame passes before the guest takes the card anew: what it has to say until then is said
    /// by who it was.
    pub muted: bool,
}

/// The device.
pub struct Net {
    spec: NetSpec,
    tap: Tap,
    activation: Option<Activation>,
    /// Whether the tap is being watched: not while a frame waits for the guest.
    watching: bool,
    /// The interface is no more: the device goes on, and nothing comes or goes.
    gone: bool,
    /// The frame that is being received: its first bytes are one while `waiting` isn't 0.
    inbound: Vec<u8>,
    waiting: usize,
    /// Buffers taken from the guest for the frame that waits.
    held: Vec<Chain>,
    outbound: Vec<u8>,
}

/// A card's state: what is on its way is the network's to lose, and what it is called is the spec's.
/// A copy's card has another address than its guest has read, which has to be told.
#[derive(Debug, Serialize, Deserialize)]
pub struct NetState {}

impl Net {
    /// A card at the end of `tap`.
    ///
    /// # Errors
    /// When the tap can't be kept from blocking.
    pub fn new(spec: NetSpec, tap: Tap) -> io::Result<Self> {
        let flags = fcntl_getfl(&tap.device)?;
        fcntl_setfl(&tap.device, flags | OFlags::NONBLOCK)?;
        Ok(Self {
            spec,
            tap,
            activation: None,
            watching: false,
            gone: false,
            inbound: vec![0; MAX_FRAME_BYTES],
            waiting: 0,
            held: Vec::new(),
            outbound: vec![0; MAX_FRAME_BYTES],
        })
    }

    fn chose(&self, feature: u64) -> bool {
        let activation = self.activation.as_ref();
        activation.is_some_and(|activation| activation.features & feature != 0)
    }

    /// From the tap to the guest, until either has nothing for the other.
    fn receive(&mut self, hangup: bool, queue: &mut Queue) -> Result<(), DeviceError> {
        for _ in 0..BATCH {
            if self.waiting == 0 {
                match rustix::io::read(&self.tap.device, &mut self.inbound[..]) {
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) if !hangup => return Ok(()),
                    Ok(0) | Err(_) => return self.lose(),
                    // No frame, of no tap.
                    Ok(count) if count < HEADER_BYTES => continue,
                    Ok(count) => self.waiting = count,
                }
            }
            if !self.deliver(queue)? {
                return self.watch(false);
            }
        }
        Ok(())
    }

    /// Puts the frame that waits into the guest's buffers; false if there are too few.
    fn deliver(&mut self, queue: &mut Queue) -> Result<bool, DeviceError> {
        let mergeable = self.chose(MRG_RXBUF);
        let most = usize::from(queue.state().size);
        let mut room: usize = self.held.iter().map(room_of).sum();
        while room < self.waiting && (mergeable || self.held.is_empty()) {
            if self.held.len() >= most {
                break;
            }
            let Some(chain) = queue.pop()? else {
                return Ok(false);
            };
            if chain.readable_len() > 0 || room_of(&chain) < HEADER_BYTES {
                return Err(DeviceError::Guest("buffer that takes no frame".to_owned()));
            }
            room += room_of(&chain);
            self.held.push(chain);
        }
        let length = std::mem::take(&mut self.waiting);
        // One that doesn't fit into all that the guest can ever give is as good as lost.
        if room < length {
            self.tap.traffic.received.lose();
            return Ok(true);
        }
        self.fill(length, queue)?;
        self.tap.traffic.received.pass(length - HEADER_BYTES);
        Ok(true)
    }

    /// Hands over the frame of `length` bytes in as many of the held buffers as it takes.
    fn fill(&mut self, length: usize, queue: &mut Queue) -> Result<(), DeviceError> {
        let mut count = 0;
        let mut room = 0;
        for chain in &self.held {
            if room >= length {
                break;
            }
            room += room_of(chain);
            count += 1;
        }
        let buffers = u16::try_from(count).unwrap_or(QUEUE_SIZE);
        if let Some(place) = self.inbound.get_mut(NUM_BUFFERS) {
            place.copy_from_slice(&buffers.to_le_bytes());
        }
        let mut rest = self.inbound.get(..length).unwrap_or_default();
        let mut filled = Vec::with_capacity(count);
        for chain in self.held.drain(..count) {
            let (part, after) = rest.split_at(rest.len().min(room_of(&chain)));
            chain.write_at(0, part)?;
            filled.push((chain, u32::try_from(part.len()).unwrap_or(0)));
            rest = after;
        }
        queue.complete_together(&filled)?;
        Ok(())
    }

    /// From the guest to the tap.
    fn transmit(&mut self, queue: &mut Queue) -> Result<(), DeviceError> {
        while let Some(chain) = queue.pop()? {
            let length = chain.readable_len() as usize;
            if chain.writable_len() > 0 || !(HEADER_BYTES..=MAX_FRAME_BYTES).contains(&length) {
                return Err(DeviceError::Guest(format!("frame of {length} bytes")));
            }
            if self.tap.muted {
                queue.complete(&chain, 0)?;
                continue;
            }
            let frame = self.outbound.get_mut(..length).unwrap_or_default();
            chain.read_at(0, frame)?;
            let written = loop {
                match rustix::io::write(&self.tap.device, &*frame) {
                    Err(Errno::INTR) => {}
                    written => break written,
                }
            };
            match written {
                Ok(_) => self.tap.traffic.sent.pass(length - HEADER_BYTES),
                // What the host doesn't take is lost: a bad header, or an interface that is down.
                Err(_) => self.tap.traffic.sent.lose(),
            }
            queue.complete(&chain, 0)?;
        }
        Ok(())
    }

    /// The interface went away under the device.
    fn lose(&mut self) -> Result<(), DeviceError> {
        self.watch(false)?;
        self.gone = true;
        Ok(())
    }

    fn watch(&mut self, wanted: bool) -> Result<(), DeviceError> {
        let Some(activation) = &self.activation else {
            return Ok(());
        };
        if wanted == self.watching || self.gone || wanted && self.tap.muted {
            return Ok(());
        }
        let tap = self.tap.device.as_fd();
        let result = if wanted {
            activation.wakers.watch(tap, Interest::Read, TAP)
        } else {
            activation.wakers.unwatch(tap)
        };
        result.map_err(|source| DeviceError::Host {
            what: "watch the tap",
            source,
        })?;
        self.watching = wanted;
        Ok(())
    }

    /// Tells the tap what to leave to the guest.
    fn offload(&mut self, offloads: Offloads) -> Result<(), DeviceError> {
        match (self.tap.set_offloads)(self.tap.device.as_fd(), offloads) {
            Ok(()) => Ok(()),
            // It was unplugged while the guest came up.
            Err(error) if error.raw_os_error() == Some(Errno::BADFD.raw_os_error()) => {
                self.gone = true;
                Ok(())
            }
            Err(source) => Err(DeviceError::Host {
                what: "set the tap's offloads",
                source,
            }),
        }
    }
}

/// The bytes of a frame that a chain of the guest's takes.
fn room_of(chain: &Chain) -> usize {
    chain.writable_len() as usize
}

impl Persist for Net {
    const UNIT: &'static str = "net";
    type State = NetState;

    fn save(&self) -> Result<NetState, Unsaveable> {
        Ok(NetState {})
    }

    fn restore(&mut self, _: NetState) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl VirtioDevice for Net {
    const ID: u32 = 1;

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let sends = CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN;
        let takes = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | MRG_RXBUF;
        MAC | MTU | STATUS | sends | takes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let [m0, m1, m2, m3, m4, m5] = self.spec.mac;
        let [low, high] = self.spec.mtu.to_le_bytes();
        // A number of queues isn't offered.
        let config = [m0, m1, m2, m3, m4, m5, LINK_UP, 0, 0, 0, low, high];
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let offloads = Offloads::of(activation.features);
        self.activation = Some(activation);
        self.watching = false;
        self.offload(offloads)
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        match (index, queues.get_mut(index)) {
            (TRANSMIT, Some(queue)) => self.transmit(queue),
            (RECEIVE, Some(queue)) => {
                if self.waiting > 0 && !self.deliver(queue)? {
                    return Ok(());
                }
                // Whether there is more, the watch will tell.
                self.watch(true)
            }
            _ => Ok(()),
        }
    }

    fn on_event(
        &mut self,
        _token: u32,
        readiness: Readiness,
        queues: &mut [Queue],
    ) -> Result<(), DeviceError> {
        match queues.get_mut(RECEIVE) {
            Some(queue) if !self.gone => self.receive(readiness.hangup, queue),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        // Nothing can be said to anybody here, and a tap that is gone needs nothing.
        drop(self.watch(false));
        drop(self.offload(Offloads::default()));
        self.activation = None;
        self.tap.muted = false;
        self.waiting = 0;
        self.held.clear();
    }
}

#[cfg(test)]
mod tests;
