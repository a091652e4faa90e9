//! The memory device (virtio 1.2 §5.15): a guest's memory in blocks that come and go while it runs.
//!
//! The host says how much it wants the guest to have of them ([`Extent::request`]); the guest
//! plugs and unplugs blocks until it has that, or as near as it can get.
//!
//! What a hostile guest can have of the host is what was asked of it, and who guarantees that is
//! [`Blocks`]: a block that isn't plugged has neither a slot in KVM nor a mapping in this process,
//! so there is no page that an access could fill. The guest's own reaches a device that isn't
//! there; a buffer handed to a device is refused by the queue. A block that is unplugged goes back
//! to the host with all its pages before the guest hears of it, or when the device that works on
//! it at this moment is done. (QEMU's `dynamic-memslots` have a few large slots, of which the
//! unplugged parts stay mapped and are punched out again and again; here a block is a slot.)

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use rustix::event::EventfdFlags;
use serde::{Deserialize, Serialize};

use super::device::{
    Activation, DeviceError, Persist, RestoreError, Unsaveable, VirtioDevice, read_config_bytes,
};
use super::queue::{Chain, Queue, QueueError};
use crate::outcome::lock;

/// `VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE`: the driver keeps away from what isn't plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;
const QUEUE_SIZES: [u16; 1] = [8];

/// `struct virtio_mem_req`: a type, a first address and a number of blocks.
const REQUEST_BYTES: usize = 24;
const RESPONSE_BYTES: u32 = 10;
const PLUG: u16 = 0;
const UNPLUG: u16 = 1;
const UNPLUG_ALL: u16 = 2;
const STATE: u16 = 3;

/// What a request is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Ack,
    /// It would have more than was asked.
    Nack,
    /// The host can't now.
    Busy,
    /// There are no such blocks, or they are what they are to become.
    Error,
    /// The answer to [`STATE`].
    State(u16),
}

impl Answer {
    fn bytes(self) -> [u8; RESPONSE_BYTES as usize] {
        let (kind, state): (u16, u16) = match self {
            Self::Ack => (0, 0),
            Self::Nack => (1, 0),
            Self::Busy => (2, 0),
            Self::Error => (3, 0),
            Self::State(state) => (0, state),
        };
        let mut bytes = [0; RESPONSE_BYTES as usize];
        let [low, high] = kind.to_le_bytes();
        [bytes[0], bytes[1]] = [low, high];
        let [low, high] = state.to_le_bytes();
        [bytes[8], bytes[9]] = [low, high];
        bytes
    }
}

/// Where a device's blocks lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Guest-physical address of the first.
    pub address: u64,
    /// Length of all of them in bytes, a multiple of `block_bytes`.
    pub length: u64,
    /// Length of one, a power of two.
    pub block_bytes: u64,
}

impl Region {
    /// How many blocks there are.
    #[must_use]
    pub fn count(&self) -> usize {
        usize::try_from(self.length / self.block_bytes).unwrap_or(0)
    }

    /// Guest-physical addresses of a block.
    #[must_use]
    pub fn block(&self, index: usize) -> Range<u64> {
        let start = self.address + index as u64 * self.block_bytes;
        start..start + self.block_bytes
    }

    /// The blocks that a request names, if it names any and there are those.
    fn named(&self, address: u64, count: u16) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.address)?;
        if !offset.is_multiple_of(self.block_bytes) || count == 0 {
            return None;
        }
        let first = usize::try_from(offset / self.block_bytes).ok()?;
        let end = first.checked_add(count.into())?;
        (end <= self.count()).then_some(first..end)
    }
}

/// What has the memory of blocks appear in the guest and go away again.
pub trait Blocks: Send {
    /// Gives these blocks memory: all of them, or none.
    ///
    /// # Errors
    /// What the host lacks.
    fn plug(&mut self, blocks: Range<usize>) -> io::Result<()>;

    /// Takes it back, all of it, and the pages with it.
    ///
    /// # Errors
    /// When the host can't: the guest may be able to reach some of it then.
    fn unplug(&mut self, blocks: Range<usize>) -> io::Result<()>;

    /// Gives these blocks, lowest first, the memory that they had when the machine was saved.
    ///
    /// # Errors
    /// What the host lacks: some of them may be there then.
    fn restore(&mut self, blocks: &[usize]) -> io::Result<()>;
}

/// How much memory a guest has in blocks, and is to have; shared by the device and its host.
#[derive(Debug)]
pub struct Extent {
    region: Region,
    sizes: Mutex<Sizes>,
    changed: OwnedFd,
}

#[derive(Debug, Default)]
struct Sizes {
    requested: u64,
    plugged: u64,
    refusal: Option<String>,
}

impl Extent {
    /// Of a guest that has none yet.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(region: Region) -> io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Ok(Self {
            region,
            sizes: Mutex::default(),
            changed: rustix::event::eventfd(0, flags)?,
        })
    }

    /// Has the guest have so many bytes, in whole blocks, as far as there are; returns how many
    /// those are. The driver is still to be told that the configuration has changed.
    pub fn request(&self, bytes: u64) -> u64 {
        let most = self.region.length;
        let bytes = bytes.min(most).next_multiple_of(self.region.block_bytes);
        let mut sizes = lock(&self.sizes);
        sizes.requested = bytes;
        sizes.refusal = None;
        bytes
    }

    /// The bytes that it has now.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        lock(&self.sizes).plugged
    }

    /// Why the host didn't give it a block since the last request, if it didn't.
    #[must_use]
    pub fn refusal(&self) -> Option<String> {
        lock(&self.sizes).refusal.clone()
    }

    /// Readable when it has had another size since [`Extent::hear`].
    #[must_use]
    pub fn changed(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    /// Takes note of all changes up to now.
    pub fn hear(&self) {
        let _ = rustix::io::read(&self.changed, &mut [0; 8]);
    }

    fn tell(&self) {
        let _ = rustix::io::write(&self.changed, &1u64.to_ne_bytes());
    }
}

/// The device.
pub struct Mem {
    extent: Arc<Extent>,
    plugged: Vec<bool>,
    blocks: Box<dyn Blocks>,
}

/// Where the blocks are that the guest knows of, those that are plugged, lowest first, and how many
/// bytes of them it is to have. What is in them is guest memory's.
#[derive(Debug, Serialize, Deserialize)]
pub struct MemState {
    region: Region,
    plugged: Vec<Range<usize>>,
    requested: u64,
}

impl Mem {
    /// A device without a block plugged.
    ///
    /// # Errors
    /// When the host has no descriptor left.
    pub fn new(region: Region, blocks: Box<dyn Blocks>) -> io::Result<Self> {
        Ok(Self {
            extent: Arc::new(Extent::new(region)?),
            plugged: vec![false; region.count()],
            blocks,
        })
    }

    /// The host's hold on its size.
    #[must_use]
    pub fn extent(&self) -> Arc<Extent> {
        Arc::clone(&self.extent)
    }

    fn serve(&mut self, chain: &Chain) -> Result<Answer, DeviceError> {
        let request: [u8; REQUEST_BYTES] = chain.read_array(0)?;
        let [k0, k1, _, _, _, _, _, _, rest @ ..] = request;
        let [a0, a1, a2, a3, a4, a5, a6, a7, c0, c1, ..] = rest;
        let address = u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]);
        let named = self
            .extent
            .region
            .named(address, u16::from_le_bytes([c0, c1]));
        match (u16::from_le_bytes([k0, k1]), named) {
            (PLUG, Some(blocks)) => Ok(self.plug(blocks)),
            (UNPLUG, Some(blocks)) if self.are(&blocks, true) => self.unplug(blocks),
            (UNPLUG_ALL, _) => self.unplug_all(),
            (STATE, Some(blocks)) => Ok(Answer::State(self.state(&blocks))),
            _ => Ok(Answer::Error),
        }
    }

    fn are(&self, blocks: &Range<usize>, plugged: bool) -> bool {
        let blocks = self.plugged.get(blocks.clone()).unwrap_or_default();
        blocks.iter().all(|&block| block == plugged)
    }

    fn mark(&mut self, blocks: Range<usize>, plugged: bool) {
        let bytes = blocks.len() as u64 * self.extent.region.block_bytes;
        if let Some(blocks) = self.plugged.get_mut(blocks) {
            blocks.fill(plugged);
        }
        let mut sizes = lock(&self.extent.sizes);
        match plugged {
            true => sizes.plugged += bytes,
            false => sizes.plugged -= bytes,
        }
    }

    fn plug(&mut self, blocks: Range<usize>) -> Answer {
        if !self.are(&blocks, false) {
            return Answer::Error;
        }
        let more = blocks.len() as u64 * self.extent.region.block_bytes;
        {
            let sizes = lock(&self.extent.sizes);
            if sizes.plugged + more > sizes.requested {
                return Answer::Nack;
            }
        }
        let answer = match self.blocks.plug(blocks.clone()) {
            Ok(()) => {
                self.mark(blocks, true);
                Answer::Ack
            }
            Err(error) => {
                lock(&self.extent.sizes).refusal = Some(error.to_string());
                Answer::Busy
            }
        };
        self.extent.tell();
        answer
    }

    fn unplug(&mut self, blocks: Range<usize>) -> Result<Answer, DeviceError> {
        let taken = self.blocks.unplug(blocks.clone());
        taken.map_err(|source| DeviceError::Host {
            what: "take memory back from the guest",
            source,
        })?;
        self.mark(blocks, false);
        self.extent.tell();
        Ok(Answer::Ack)
    }

    fn unplug_all(&mut self) -> Result<Answer, DeviceError> {
        for run in runs(&self.plugged) {
            self.unplug(run)?;
        }
        Ok(Answer::Ack)
    }

    /// `VIRTIO_MEM_STATE_PLUGGED`, `_UNPLUGGED` or `_MIXED`.
    fn state(&self, blocks: &Range<usize>) -> u16 {
        match (self.are(blocks, true), self.are(blocks, false)) {
            (true, _) => 0,
            (_, true) => 1,
            _ => 2,
        }
    }
}

/// The plugged ones, lowest first.
fn runs(plugged: &[bool]) -> Vec<Range<usize>> {
    let mut next = 0;
    let mut runs = Vec::new();
    for run in plugged.chunk_by(|one, other| one == other) {
        let begin = next;
        next += run.len();
        if run.first() == Some(&true) {
            runs.push(begin..next);
        }
    }
    runs
}

impl Persist for Mem {
    const UNIT: &'static str = "mem";
    type State = MemState;

    fn save(&self) -> Result<MemState, Unsaveable> {
        Ok(MemState {
            region: self.extent.region,
            plugged: runs(&self.plugged),
            requested: lock(&self.extent.sizes).requested,
        })
    }

    fn restore(&mut self, state: MemState) -> Result<(), RestoreError> {
        let mismatch = |why| RestoreError::Mismatch {
            unit: Self::UNIT.to_owned(),
            why,
        };
        let region = self.extent.region;
        if state.region != region {
            return Err(mismatch(format!("its blocks were at {:?}", state.region)));
        }
        let mut next = 0;
        for run in &state.plugged {
            if run.start < next || run.is_empty() || run.end > region.count() {
                return Err(mismatch(format!("it has no blocks {run:?}")));
            }
            next = run.end;
        }
        let blocks: Vec<usize> = state.plugged.iter().cloned().flatten().collect();
        let given = self.blocks.restore(&blocks);
        given.map_err(|error| mismatch(format!("its memory can't be had: {error}")))?;
        for run in state.plugged {
            self.mark(run, true);
        }
        self.extent.request(state.requested);
        Ok(())
    }
}

impl VirtioDevice for Mem {
    const ID: u32 = 24;

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Region {
            address,
            length,
            block_bytes,
        } = self.extent.region;
        let sizes = lock(&self.extent.sizes);
        // The usable part is all of it; there is no node.
        let words = [
            block_bytes,
            0,
            address,
            length,
            length,
            sizes.plugged,
            sizes.requested,
        ];
        read_config_bytes(&words.map(u64::to_le_bytes).concat(), offset, data);
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(());
        };
        while let Some(chain) = queue.pop()? {
            if chain.writable_len() < RESPONSE_BYTES {
                return Err(QueueError::Short {
                    offset: 0,
                    wanted: RESPONSE_BYTES as usize,
                    have: chain.writable_len() as usize,
                }
                .into());
            }
            let answer = self.serve(&chain)?;
            chain.write_at(0, &answer.bytes())?;
            queue.complete(&chain, RESPONSE_BYTES)?;
        }
        Ok(())
    }

    /// What is plugged stays (virtio 1.2 §5.15.6.2).
    fn reset(&mut self) {}
}
