//! The one door through which guest bytes come in: a split virtqueue (virtio 1.3 §2.7).
//!
//! [`Queue::pop`] walks a descriptor chain once, copies its descriptors into
//! our own memory, checks every one of them and hands out a [`Chain`] whose
//! buffers lie in guest RAM, readable before writable. Loops, indices and
//! addresses out of range, lengths that wrap, nested or ragged indirect tables
//! and rings that lie outside RAM are refused here and nowhere else. What a
//! guest rewrites afterwards can change the bytes a device reads, never where
//! it reads or writes.

mod chain;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use virtio_queue::{Queue as Ring, QueueOwnedT, QueueState as RingState, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryError, GuestMemoryMmap};

pub use self::chain::{Buffer, Chain, Spans};
use crate::memory::{ChangingRam, GuestRam, Window, now};

/// The longest chain, in descriptors, counting those of an indirect table.
///
/// Linux's drivers use indirect tables longer than the queue; none needs more than this.
pub const MAX_CHAIN_DESCRIPTORS: usize = 1024;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT` (virtio 1.3 §2.7.6).
const AVAIL_NO_INTERRUPT: u16 = 1;

/// What a guest did wrong in a ring or a chain.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The ring itself: index out of range, or not in RAM.
    #[error("ring is broken")]
    Ring(#[source] virtio_queue::Error),
    /// The queue was enabled with rings outside guest RAM.
    #[error("ring lies outside guest memory")]
    RingOutsideMemory,
    /// A chain that loops, leaves its table, nests indirect tables or is empty.
    #[error("descriptor chain {0} is malformed")]
    Malformed(u16),
    /// A chain of more than [`MAX_CHAIN_DESCRIPTORS`].
    #[error("descriptor chain {0} is too long")]
    TooLong(u16),
    /// A readable buffer after a writable one (virtio 1.3 §2.7.4.2).
    #[error("descriptor chain {0} has a readable buffer after a writable one")]
    Order(u16),
    /// A buffer outside guest RAM.
    #[error(
        "descriptor chain {chain} has a buffer outside guest memory: {length} bytes at {address:#x}"
    )]
    Buffer {
        /// Head of the chain.
        chain: u16,
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        length: u32,
    },
    /// A buffer of no bytes.
    #[error("descriptor chain {0} has an empty buffer")]
    Empty(u16),
    /// The chain is too small for what the device's protocol puts there.
    #[error("descriptor chain is too short: {wanted} bytes at offset {offset}, {have} available")]
    Short {
        /// Offset asked for.
        offset: usize,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes in all.
        have: usize,
    },
    /// A buffer lies where the window for files shows nothing.
    #[error("descriptor chain has a buffer in a window that shows nothing there")]
    Window(#[source] std::io::Error),
    /// Guest RAM refused an access that was checked before: the memory map changed.
    #[error("guest memory refused an access")]
    Memory(#[from] GuestMemoryError),
}

/// Tells the driver that used buffers wait for it. Implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// Raises the interrupt of queue `index`.
    fn raise(&self, index: usize);
}

/// Where a queue stands; all that a snapshot needs of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct QueueState {
    /// Largest size that the device offers.
    pub max_size: u16,
    /// Size that the driver chose.
    pub size: u16,
    /// The driver enabled it.
    pub ready: bool,
    /// `VIRTIO_F_EVENT_IDX` was negotiated.
    pub event_idx: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the driver's ring.
    pub avail_ring: u64,
    /// Guest-physical address of the device's ring.
    pub used_ring: u64,
    /// Next entry to take.
    pub next_avail: u16,
    /// Next entry to fill.
    pub next_used: u16,
}

/// One virtqueue, seen from the device.
pub struct Queue {
    ring: Ring,
    index: usize,
    memory: ChangingRam,
    window: Option<Arc<Window>>,
    interrupt: Arc<dyn Interrupt>,
}

impl Queue {
    /// A queue whose rings are where `state` says.
    ///
    /// # Errors
    /// [`QueueError`] when the state is no possible one or, for a ready queue, when a
    /// ring lies outside guest RAM.
    pub fn new(
        state: &QueueState,
        index: usize,
        memory: impl Into<ChangingRam>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Self, QueueError> {
        let memory = memory.into();
        let ring = Ring::try_from(RingState {
            max_size: state.max_size,
            next_avail: state.next_avail,
            next_used: state.next_used,
            event_idx_enabled: state.event_idx,
            size: state.size,
            ready: state.ready,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
        })
        .map_err(QueueError::Ring)?;
        if state.ready && !rings_in_memory(state, &now(&memory)) {
            return Err(QueueError::RingOutsideMemory);
        }
        Ok(Self {
            ring,
            index,
            memory,
            window: None,
            interrupt,
        })
    }

    /// The same, whose chains may have the device read from what a window shows.
    #[must_use]
    pub fn with_window(self, window: Option<Arc<Window>>) -> Self {
        Self { window, ..self }
    }

    /// The queue's position, as a snapshot keeps it.
    #[must_use]
    pub fn state(&self) -> QueueState {
        let state = self.ring.state();
        QueueState {
            max_size: state.max_size,
            size: state.size,
            ready: state.ready,
            event_idx: state.event_idx_enabled,
            desc_table: state.desc_table,
            avail_ring: state.avail_ring,
            used_ring: state.used_ring,
            next_avail: state.next_avail,
            next_used: state.next_used,
        }
    }

    /// The next entry of the ring to take: it moves with every chain popped.
    #[must_use]
    pub fn position(&self) -> u16 {
        self.ring.next_avail()
    }

    /// Whether the driver has enabled it.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.ring.ready()
    }

    /// Guest memory as it is now, where the chains' buffers lie.
    #[must_use]
    pub fn memory(&self) -> GuestRam {
        now(&self.memory)
    }

    /// Takes the next chain, if there is one; a queue not set up has none.
    ///
    /// # Errors
    /// [`QueueError`] when the driver broke a rule; the device must stop.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if !self.ring.ready() {
            return Ok(None);
        }
        let memory = self.memory();
        let descriptors = {
            let mut iter = self
                .ring
                .iter(Arc::clone(&memory))
                .map_err(QueueError::Ring)?;
            iter.next()
        };
        // The iterator also ends when the ring can't be read: where `new` found it, or in memory
        // that the guest has given up since.
        descriptors
            .map(|chain| Chain::new(chain, memory, self.window.clone()))
            .transpose()
    }

    /// Puts the chain popped last back, to be popped again: for a device that can't go on.
    pub fn unpop(&mut self, _chain: Chain) {
        self.ring.go_to_previous_position();
    }

    /// Asks the driver to kick again, and says whether it added chains meanwhile.
    ///
    /// Called by the worker around [`super::device::VirtioDevice::on_queue`].
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings can't be accessed.
    pub fn enable_kicks(&mut self) -> Result<bool, QueueError> {
        if !self.ring.ready() {
            return Ok(false);
        }
        self.ring
            .enable_notification(self.memory().as_ref())
            .map_err(QueueError::Ring)
    }

    /// Hands a chain back, `written` bytes of it filled, and raises the interrupt when
    /// the ring says so. `written` is capped at what the chain can take.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings can't be accessed.
    pub fn complete(&mut self, chain: &Chain, written: u32) -> Result<(), QueueError> {
        self.complete_head(chain.head(), written.min(chain.writable_len()))
    }

    /// As [`Queue::complete`], for a device that keeps a chain's head alone.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings can't be accessed.
    pub fn complete_head(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let memory = self.memory();
        let memory = memory.as_ref();
        self.ring
            .add_used(memory, head, written)
            .map_err(QueueError::Ring)?;
        if self.wants_interrupt()? {
            self.interrupt.raise(self.index);
        }
        Ok(())
    }

    /// Hands several chains back at once, each with the bytes written to it: the driver sees
    /// all of them or none. For what is one message to it, as a frame in several buffers.
    ///
    /// # Errors
    /// [`QueueError::Ring`] when the rings can't be accessed.
    pub fn complete_together(&mut self, chains: &[(Chain, u32)]) -> Result<(), QueueError> {
        let Ok(count) = u16::try_from(chains.len()) else {
            return Ok(());
        };
        let (used_ring, first) = (self.ring.used_ring(), self.ring.next_used());
        let memory = self.memory();
        let memory = memory.as_ref();
        for (place, (chain, written)) in (0..count).zip(chains) {
            let place = u64::from(first.wrapping_add(place) % self.ring.size());
            let entry = GuestAddress(used_ring + 4 + 8 * place);
            let written = (*written).min(chain.writable_len());
            memory.write_obj(u32::from(chain.head()).to_le(), entry)?;
            memory.write_obj(written.to_le(), entry.unchecked_add(4))?;
        }
        let next = first.wrapping_add(count);
        self.ring.set_next_used(next);
        memory.store(next.to_le(), GuestAddress(used_ring + 2), Ordering::Release)?;
        // What was handed back must be seen before the driver's wish is read.
        fence(Ordering::SeqCst);
        let wanted = if self.ring.event_idx_enabled() {
            let event = self.ring.avail_ring() + 4 + 2 * u64::from(self.ring.size());
            let event: u16 = memory.load(GuestAddress(event), Ordering::Relaxed)?;
            // virtio 1.3 §2.7.10: it asked for an interrupt at one of these entries.
            next.wrapping_sub(u16::from_le(event)).wrapping_sub(1) < count
        } else {
            self.wants_interrupt()?
        };
        if wanted {
            self.interrupt.raise(self.index);
        }
        Ok(())
    }

    fn wants_interrupt(&mut self) -> Result<bool, QueueError> {
        let memory = self.memory();
        let memory = memory.as_ref();
        if !self
            .ring
            .needs_notification(memory)
            .map_err(QueueError::Ring)?
        {
            return Ok(false);
        }
        if self.ring.event_idx_enabled() {
            return Ok(true);
        }
        let flags: u16 = memory.load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)?;
        Ok(u16::from_le(flags) & AVAIL_NO_INTERRUPT == 0)
    }
}

fn rings_in_memory(state: &QueueState, memory: &GuestMemoryMmap) -> bool {
    let size = usize::from(state.size);
    // virtio 1.3 §2.7: 16 bytes a descriptor, 2 and 8 an entry, 6 around each ring.
    let parts = [
        (state.desc_table, 16 * size),
        (state.avail_ring, 6 + 2 * size),
        (state.used_ring, 6 + 8 * size),
    ];
    // Address 0 is what virtio-queue takes for "never set".
    parts
        .iter()
        .all(|&(address, length)| address != 0 && memory.check_range(GuestAddress(address), length))
}
