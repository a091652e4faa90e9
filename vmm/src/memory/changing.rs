//! Guest memory that changes while the guest runs: blocks of it that come and go beside RAM.
//!
//! Each block is a mapping of its own. Whoever works on guest memory does so on what it was when
//! the work began, [`now`]: a block that is taken away meanwhile goes back to the host when the
//! last of them is done, and nothing that begins afterwards finds it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::{Arc, PoisonError};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use super::{GAP_END, GuestRam, MemoryError, map_region, next_data, prefer_huge_pages, ram_ranges};

/// Guest memory as it changes: shared, cheap to clone.
pub type ChangingRam = GuestMemoryAtomic<GuestMemoryMmap>;

/// A block: mapped for as long as anything holds it.
pub(crate) type Block = Arc<GuestRegionMmap>;

/// What the place of the blocks is a multiple of: no smaller than the units in which Linux adds
/// memory (`memory_block_size_bytes`, at most 2 GiB on x86-64).
const PLACE: u64 = 2 << 30;

/// Guest memory as it is at this moment.
#[must_use]
pub fn now(ram: &ChangingRam) -> GuestRam {
    ram.memory().into_inner()
}

/// Where blocks begin in a guest with so much RAM and a window of that length: above both.
#[must_use]
pub fn place_of_blocks(ram_bytes: u64, window_bytes: u64) -> u64 {
    let end_of_ram = ram_ranges(ram_bytes).last().map_or(0, |range| range.end);
    // The window begins at a whole GiB; see `Window::reserve`.
    let window = end_of_ram.max(GAP_END).next_multiple_of(1 << 30);
    (window + window_bytes).next_multiple_of(PLACE)
}

/// A block of zeros, which no guest sees yet.
pub(crate) fn new_block(range: Range<u64>) -> Result<Block, MemoryError> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let block = map_region(range, flags, None)?;
    prefer_huge_pages(&block);
    Ok(Arc::new(block))
}

/// A block with a saved guest's content, which `file` has from `offset` on; the file stays as it is.
pub(crate) fn saved_block(
    range: Range<u64>,
    file: &Arc<File>,
    offset: u64,
) -> Result<Block, MemoryError> {
    let end = offset + (range.end - range.start);
    if let Ok(None) = next_data(file, offset, end) {
        return new_block(range);
    }
    map_region(range, libc::MAP_PRIVATE, Some((file, offset))).map(Arc::new)
}

/// The file that guest memory is a private mapping of, and where in it that memory ends.
pub(crate) fn end_in_file(memory: &GuestRam) -> Option<(&Arc<File>, u64)> {
    let last = memory.iter().last()?;
    let begin = last.file_offset()?;
    Some((begin.arc(), begin.start() + last.len()))
}

/// Makes blocks a part of guest memory: all of them, or none if one lies where something is.
pub(crate) fn add(ram: &ChangingRam, blocks: &[Block]) -> io::Result<()> {
    let guard = ram.lock().unwrap_or_else(PoisonError::into_inner);
    let mut memory = GuestMemoryMmap::clone(&now(ram));
    for block in blocks {
        memory = memory
            .insert_region(Arc::clone(block))
            .map_err(io::Error::other)?;
    }
    guard.replace(memory);
    Ok(())
}

/// Takes the blocks of `length` at these addresses out of guest memory: all of them, or none if
/// one isn't there.
pub(crate) fn take(
    ram: &ChangingRam,
    addresses: impl Iterator<Item = u64>,
    length: u64,
) -> io::Result<Vec<Block>> {
    let guard = ram.lock().unwrap_or_else(PoisonError::into_inner);
    let mut memory = GuestMemoryMmap::clone(&now(ram));
    let mut blocks = Vec::new();
    for address in addresses {
        let (rest, block) = memory
            .remove_region(GuestAddress(address), length)
            .map_err(io::Error::other)?;
        memory = rest;
        blocks.push(block);
    }
    guard.replace(memory);
    Ok(blocks)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory};

    use super::*;
    use crate::memory::Window;
    use crate::testing::guest_ram;

    const BLOCK: u64 = 2 << 20;

    #[test]
    fn work_goes_on_with_the_memory_it_began_with() {
        let ram = ChangingRam::from(guest_ram(16 << 20));
        let address = |index: u64| (4 << 30) + index * BLOCK;
        let before = now(&ram);
        let range = |index| address(index)..address(index + 1);
        let blocks: Vec<Block> = (0..3).map(|i| new_block(range(i)).unwrap()).collect();
        add(&ram, &blocks).unwrap();
        assert!(add(&ram, &blocks[..1]).is_err());
        drop(blocks);
        let with = now(&ram);
        assert!(!before.address_in_range(GuestAddress(address(0))));
        // What spans two blocks is one to whoever reads and writes.
        let border = GuestAddress(address(1) - 4);
        with.write_obj(*b"neighbor", border).unwrap();

        let taken = take(&ram, [address(1)].into_iter(), BLOCK).unwrap();
        assert_eq!(taken.len(), 1);
        assert!(take(&ram, [address(0), address(1)].into_iter(), BLOCK).is_err());
        let after = now(&ram);
        assert!(after.address_in_range(GuestAddress(address(0))));
        assert!(!after.address_in_range(GuestAddress(address(1))));
        assert!(after.read_obj::<u64>(border).is_err());
        drop(taken);
        assert_eq!(&with.read_obj::<[u8; 8]>(border).unwrap(), b"neighbor");
    }

    #[test]
    fn a_block_that_comes_back_is_empty() {
        let ram = ChangingRam::from(guest_ram(16 << 20));
        let range = (4 << 30)..(4 << 30) + BLOCK;
        for _ in 0..2 {
            add(&ram, &[new_block(range.clone()).unwrap()]).unwrap();
            let place = GuestAddress(range.start + 8);
            assert_eq!(now(&ram).read_obj::<u8>(place).unwrap(), 0);
            now(&ram).write_obj(7_u8, place).unwrap();
            take(&ram, [range.start].into_iter(), BLOCK).unwrap();
        }
    }

    #[test]
    fn blocks_lie_above_ram_and_window() {
        for ram in [64 << 20, 3 << 30, (3 << 30) + (2 << 20), 40 << 30] {
            for window in [0, 64 << 20, 1 << 30] {
                let place = place_of_blocks(ram, window);
                assert!(place.is_multiple_of(PLACE));
                assert!(place >= ram_ranges(ram).last().unwrap().end);
                if window > 0 {
                    let shown = Window::reserve(ram, window).unwrap();
                    assert!(place >= shown.address() + window, "{ram} {window}");
                }
            }
        }
    }
}
