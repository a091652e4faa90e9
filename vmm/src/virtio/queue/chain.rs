//! A descriptor chain, walked once and checked: buffers in guest RAM, and access to them.

use std::io;
use std::sync::Arc;

use virtio_queue::DescriptorChain;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::{MAX_CHAIN_DESCRIPTORS, QueueError};
use crate::memory::{GuestRam, Window};

/// A buffer of a chain, or the part of one that lies in one piece of guest memory; if it is to be
/// read, it may lie in the window for files instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buffer {
    /// Guest-physical address.
    pub address: GuestAddress,
    /// Length in bytes, not zero.
    pub length: u32,
}

/// A descriptor chain, walked and checked: what the device may read, then what it may write.
pub struct Chain {
    descriptors: DescriptorChain<GuestRam>,
    memory: GuestRam,
    window: Option<Arc<Window>>,
    /// A buffer lies in the window.
    reaches_window: bool,
    buffers: Vec<Buffer>,
    /// How many of `buffers`, from the start, are readable.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
}

impl Chain {
    pub(super) fn new(
        descriptors: DescriptorChain<GuestRam>,
        memory: GuestRam,
        window: Option<Arc<Window>>,
    ) -> Result<Self, QueueError> {
        let head = descriptors.head_index();
        let mut chain = Self {
            descriptors: descriptors.clone(),
            memory,
            window,
            reaches_window: false,
            buffers: Vec::with_capacity(4),
            readable: 0,
            readable_len: 0,
            writable_len: 0,
        };
        let mut open = true;
        for descriptor in descriptors {
            if chain.buffers.len() == MAX_CHAIN_DESCRIPTORS {
                return Err(QueueError::TooLong(head));
            }
            open = descriptor.has_next();
            let buffer = Buffer {
                address: descriptor.addr(),
                length: descriptor.len(),
            };
            chain.push(head, buffer, descriptor.is_write_only())?;
        }
        // The iterator ends silently at a loop, a bad index, a bad table: seen by a
        // last descriptor that still names a next one, or by none at all.
        if open {
            return Err(QueueError::Malformed(head));
        }
        Ok(chain)
    }

    fn push(&mut self, head: u16, buffer: Buffer, writable: bool) -> Result<(), QueueError> {
        if buffer.length == 0 {
            return Err(QueueError::Empty(head));
        }
        let in_window = |window: &Arc<Window>| {
            window.contains(buffer.address.raw_value(), buffer.length.into())
        };
        let total = if writable {
            &mut self.writable_len
        } else {
            if self.readable != self.buffers.len() {
                return Err(QueueError::Order(head));
            }
            &mut self.readable_len
        };
        *total = total
            .checked_add(buffer.length)
            .ok_or(QueueError::Malformed(head))?;
        let before = self.buffers.len();
        if !self.push_parts(head, buffer)? {
            let is_shown = !writable && self.window.as_ref().is_some_and(in_window);
            if !is_shown {
                return Err(QueueError::Buffer {
                    chain: head,
                    address: buffer.address.raw_value(),
                    length: buffer.length,
                });
            }
            self.reaches_window = true;
            self.buffers.truncate(before);
            self.buffers.push(buffer);
        }
        if !writable {
            self.readable = self.buffers.len();
        }
        Ok(())
    }

    /// Adds the parts of a buffer, each in one piece of guest memory; false if it isn't all there.
    fn push_parts(&mut self, head: u16, buffer: Buffer) -> Result<bool, QueueError> {
        let Buffer {
            mut address,
            mut length,
        } = buffer;
        while length > 0 {
            let Some(region) = self.memory.find_region(address) else {
                return Ok(false);
            };
            if self.buffers.len() == MAX_CHAIN_DESCRIPTORS {
                return Err(QueueError::TooLong(head));
            }
            let room = region.last_addr().unchecked_offset_from(address);
            // One less than there is, so that it can't overflow.
            let more = u32::try_from(room).map_or(length - 1, |room| room.min(length - 1));
            self.buffers.push(Buffer {
                address,
                length: more + 1,
            });
            length -= more + 1;
            match address.checked_add(u64::from(more) + 1) {
                Some(next) => address = next,
                None => return Ok(length == 0),
            }
        }
        Ok(true)
    }

    /// Index of the chain's first descriptor: its name in the used ring.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.descriptors.head_index()
    }

    /// Bytes that the device may read.
    #[must_use]
    pub fn readable_len(&self) -> u32 {
        self.readable_len
    }

    /// Bytes that the device may write.
    #[must_use]
    pub fn writable_len(&self) -> u32 {
        self.writable_len
    }

    /// The readable buffers, in order.
    #[must_use]
    pub fn readable(&self) -> &[Buffer] {
        self.buffers.get(..self.readable).unwrap_or_default()
    }

    /// The writable buffers, in order.
    #[must_use]
    pub fn writable(&self) -> &[Buffer] {
        self.buffers.get(self.readable..).unwrap_or_default()
    }

    /// Whether a buffer lies in the window for files: [`Chain::read_at`] and [`Chain::copy_to`]
    /// read it, nothing else does.
    #[must_use]
    pub fn reaches_window(&self) -> bool {
        self.reaches_window
    }

    /// Guest RAM, where the other buffers lie.
    #[must_use]
    pub fn memory(&self) -> &GuestRam {
        &self.memory
    }

    /// The chain as `virtio-queue` knows it, for crates that walk it themselves.
    ///
    /// The walk reads the guest's descriptors again: bounded and checked there, but
    /// possibly not what [`Chain`] saw. Prefer the buffers.
    #[must_use]
    pub fn descriptors(&self) -> DescriptorChain<GuestRam> {
        self.descriptors.clone()
    }

    /// Where `length` readable bytes from `offset` lie, piece by piece.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are fewer.
    pub fn readable_spans(&self, offset: usize, length: usize) -> Result<Spans, QueueError> {
        spans(self.readable(), offset, length)
    }

    /// Where `length` writable bytes from `offset` lie, piece by piece.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are fewer.
    pub fn writable_spans(&self, offset: usize, length: usize) -> Result<Spans, QueueError> {
        spans(self.writable(), offset, length)
    }

    /// Fills `data` from `offset` of the readable bytes.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are fewer.
    pub fn read_at(&self, offset: usize, data: &mut [u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for (address, length) in spans(self.readable(), offset, data.len())? {
            if let Some(part) = data.get_mut(done..done + length) {
                self.read_span(part, address)?;
            }
            done += length;
        }
        Ok(())
    }

    fn read_span(&self, part: &mut [u8], address: GuestAddress) -> Result<(), QueueError> {
        match (self.memory.read_slice(part, address), &self.window) {
            (Err(_), Some(window)) if self.reaches_window => window
                .read(address.raw_value(), part)
                .map_err(QueueError::Window),
            (read, _) => Ok(read?),
        }
    }

    /// A fixed number of bytes from `offset` of the readable ones.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are fewer.
    pub fn read_array<const N: usize>(&self, offset: usize) -> Result<[u8; N], QueueError> {
        let mut bytes = [0; N];
        self.read_at(offset, &mut bytes)?;
        Ok(bytes)
    }

    /// Writes `data` from `offset` of the writable bytes on.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there is no room.
    pub fn write_at(&self, offset: usize, data: &[u8]) -> Result<(), QueueError> {
        let mut done = 0;
        for (address, length) in spans(self.writable(), offset, data.len())? {
            if let Some(part) = data.get(done..done + length) {
                self.memory.write_slice(part, address)?;
            }
            done += length;
        }
        Ok(())
    }

    /// Copies the readable bytes `offset..offset + length` into `sink`, without holding
    /// more than a page of them at a time.
    ///
    /// # Errors
    /// [`QueueError::Short`] when there are fewer; the sink's own errors inside the `Ok`.
    pub fn copy_to(
        &self,
        offset: usize,
        length: usize,
        sink: &mut dyn io::Write,
    ) -> Result<io::Result<()>, QueueError> {
        let mut page = [0u8; 4096];
        let mut done = 0;
        while done < length {
            let count = (length - done).min(page.len());
            let Some(part) = page.get_mut(..count) else {
                break;
            };
            self.read_at(offset + done, part)?;
            if let Err(error) = sink.write_all(part) {
                return Ok(Err(error));
            }
            done += count;
        }
        Ok(Ok(()))
    }
}

/// Pieces of guest RAM: where each starts and how many bytes it has.
pub type Spans = Vec<(GuestAddress, usize)>;

/// The spans that make up `length` bytes from `offset` of `buffers`.
fn spans(buffers: &[Buffer], offset: usize, length: usize) -> Result<Spans, QueueError> {
    let have = buffers.iter().map(|b| b.length as usize).sum();
    if offset.checked_add(length).is_none_or(|end| end > have) {
        return Err(QueueError::Short {
            offset,
            wanted: length,
            have,
        });
    }
    let (mut skip, mut left) = (offset, length);
    let mut spans = Vec::with_capacity(buffers.len());
    for buffer in buffers {
        let size = buffer.length as usize;
        let start = skip.min(size);
        skip -= start;
        let count = left.min(size - start);
        left -= count;
        if count > 0 {
            spans.push((buffer.address.unchecked_add(start as u64), count));
        }
    }
    Ok(spans)
}
