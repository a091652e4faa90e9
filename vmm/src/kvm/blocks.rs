//! Blocks of memory that a running guest is given: one slot each.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;

use crate::memory::{self, Block, ChangingRam};
use crate::virtio::mem::{Blocks, Region};

/// The blocks of one region, in KVM and in what devices see.
pub struct MemoryBlocks {
    vm: Arc<VmFd>,
    ram: ChangingRam,
    region: Region,
    /// The first one's; what lies below is the machine's.
    first_slot: u32,
}

impl MemoryBlocks {
    pub(super) fn new(vm: Arc<VmFd>, ram: ChangingRam, region: Region, first_slot: u32) -> Self {
        Self {
            vm,
            ram,
            region,
            first_slot,
        }
    }

    /// Has the guest see a block, or nothing in its place.
    fn set(&self, index: usize, block: &Block, plugged: bool) -> io::Result<()> {
        let slot = u32::try_from(index).ok();
        let slot = slot.and_then(|index| self.first_slot.checked_add(index));
        let region = kvm_userspace_memory_region {
            slot: slot.ok_or(io::ErrorKind::InvalidInput)?,
            flags: 0,
            guest_phys_addr: self.region.block(index).start,
            memory_size: if plugged { self.region.block_bytes } else { 0 },
            userspace_addr: block.as_ptr() as u64,
        };
        // SAFETY: the range is one mapping of just this block, which is held by `ram` from before
        // the guest is told of it until its slot is gone, and lies above all other guest memory.
        unsafe { self.vm.set_user_memory_region(region) }?;
        Ok(())
    }
}

impl Blocks for MemoryBlocks {
    fn plug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let new = blocks.clone().map(|index| {
            let block = memory::new_block(self.region.block(index));
            block.map_err(io::Error::other)
        });
        let new: Vec<Block> = new.collect::<Result<_, _>>()?;
        memory::add(&self.ram, &new)?;
        for (index, block) in blocks.clone().zip(&new) {
            if let Err(error) = self.set(index, block, true) {
                self.unplug_some(blocks.start..index, blocks)?;
                return Err(error);
            }
        }
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        self.unplug_some(blocks.clone(), blocks)
    }

    /// Their bytes are those that lie behind RAM's in its file, one block's behind another's.
    fn restore(&mut self, blocks: &[usize]) -> io::Result<()> {
        if blocks.is_empty() {
            return Ok(());
        }
        let ram = memory::now(&self.ram);
        let (saved, mut offset) = memory::end_in_file(&ram).ok_or(io::ErrorKind::NotFound)?;
        let mut restored = Vec::with_capacity(blocks.len());
        for &index in blocks {
            let block = memory::saved_block(self.region.block(index), saved, offset);
            restored.push(block.map_err(io::Error::other)?);
            offset += self.region.block_bytes;
        }
        memory::add(&self.ram, &restored)?;
        let mut both = blocks.iter().zip(&restored);
        both.try_for_each(|(&index, block)| self.set(index, block, true))
    }
}

impl MemoryBlocks {
    /// Takes blocks out of guest memory, those that are `shown` out of the guest's sight, too.
    fn unplug_some(&self, shown: Range<usize>, blocks: Range<usize>) -> io::Result<()> {
        let addresses = blocks.clone().map(|index| self.region.block(index).start);
        let taken = memory::take(&self.ram, addresses, self.region.block_bytes)?;
        for (index, block) in blocks.zip(&taken) {
            if shown.contains(&index)
                && let Err(error) = self.set(index, block, false)
            {
                // The guest may still reach them: they must stay what they are.
                memory::add(&self.ram, &taken)?;
                return Err(error);
            }
        }
        Ok(())
    }
}
