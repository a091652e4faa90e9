//! The content of guest memory as a file would hold it: RAM and the blocks beside it without gaps, and
//! without pages of which it is known that nothing is in them.
//!
//! Reading a page that was never touched would have the host give it memory. So only those are read
//! that the host has memory for, or that a template has bytes for.

use std::fs::File;
use std::io;
use std::ops::Range;

use rustix::fs::SeekFrom;
use vm_memory::{Address, Bytes, FileOffset, GuestAddress, GuestMemory, GuestMemoryRegion};

use super::working_set::{PRESENT, add, each_page};
use super::{GuestRam, PAGE, next_data};

/// `/proc/PID/pagemap`: the page is swapped out.
const SWAPPED: u64 = 1 << 62;

/// The content of guest memory, while nothing writes to it.
#[derive(Debug)]
pub struct MemoryImage {
    memory: GuestRam,
    /// Where a region begins in the image, and its guest-physical address: lowest first.
    places: Vec<(u64, u64)>,
    filled: Vec<Range<u64>>,
    length: u64,
}

impl MemoryImage {
    /// The content of `memory` as it is now.
    ///
    /// # Errors
    /// If `/proc` or a template's file can't be read.
    pub(crate) fn of(memory: &GuestRam) -> io::Result<Self> {
        let pagemap = File::open("/proc/self/pagemap")?;
        let mut length = 0;
        let mut filled = Vec::new();
        let mut places = Vec::new();
        for region in memory.iter() {
            places.push((length, region.start_addr().raw_value()));
            let mut ranges = Vec::new();
            each_page(&pagemap, region, |offset, bits| {
                if bits & (PRESENT | SWAPPED) != 0 {
                    add(&mut ranges, length + offset);
                }
            })?;
            if let Some(file) = region.file_offset() {
                ranges.extend(data_of(file, region.len(), length)?);
            }
            filled.extend(ranges);
            length += region.len();
        }
        Ok(Self {
            memory: GuestRam::clone(memory),
            places,
            filled: joined(filled),
            length,
        })
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Where there may be anything but zeros: ranges of whole pages, lowest first.
    #[must_use]
    pub fn filled(&self) -> &[Range<u64>] {
        &self.filled
    }

    /// Reads whole pages of one range of [`MemoryImage::filled`].
    ///
    /// # Errors
    /// When there is no such place.
    pub fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let (mut buffer, mut offset) = (buffer, offset);
        while !buffer.is_empty() {
            let next = self.places.partition_point(|(begin, _)| *begin <= offset);
            let end = self.places.get(next).map_or(self.length, |(end, _)| *end);
            let (begin, guest) = *next
                .checked_sub(1)
                .and_then(|last| self.places.get(last))
                .filter(|_| offset < end)
                .ok_or(io::ErrorKind::UnexpectedEof)?;
            let (address, room) = (guest + (offset - begin), end - offset);
            let count = usize::try_from(room).map_or(buffer.len(), |room| room.min(buffer.len()));
            let (part, rest) = buffer.split_at_mut(count);
            self.memory
                .read_slice(part, GuestAddress(address))
                .map_err(io::Error::other)?;
            (buffer, offset) = (rest, offset + count as u64);
        }
        Ok(())
    }
}

/// Where a template's file holds data for a region, which begins at `base` of the image.
fn data_of(file: &FileOffset, length: u64, base: u64) -> io::Result<Vec<Range<u64>>> {
    let (begin, end) = (file.start(), file.start() + length);
    let mut data = Vec::new();
    let mut at = begin;
    while at < end {
        let Some(first) = next_data(file.file(), at, end)? else {
            break;
        };
        at = rustix::fs::seek(file.file(), SeekFrom::Hole(first))?.min(end);
        let aligned = (first & !(PAGE - 1)) - begin..at.next_multiple_of(PAGE) - begin;
        data.push(base + aligned.start..base + aligned.end);
    }
    Ok(data)
}

/// The same ranges, none of which touches another.
fn joined(mut ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    ranges.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;
    use crate::memory::{
        ChangingRam, GAP_END, GAP_START, add, discard, end_in_file, map_ram, new_block, now,
        saved_block,
    };
    use crate::spec::{MemoryBacking, MemorySpec};

    const SIZE: u64 = 32 << 20;

    fn ram(size_bytes: u64, backing: MemoryBacking, file: Option<File>) -> GuestRam {
        let spec = MemorySpec {
            size_bytes,
            backing,
        };
        map_ram(&spec, file).unwrap().0
    }

    /// All that a reader of the image sees.
    fn content(image: &MemoryImage) -> Vec<u8> {
        let mut all = vec![0; usize::try_from(image.length()).unwrap()];
        for range in image.filled() {
            let (from, to) = (range.start as usize, range.end as usize);
            image.read_at(&mut all[from..to], range.start).unwrap();
        }
        all
    }

    #[test]
    fn it_is_what_the_guest_would_read() {
        let mut template = tempfile::tempfile().unwrap();
        template.write_all(&vec![7; 1 << 20]).unwrap();
        template.set_len(SIZE).unwrap();
        for backing in [
            MemoryBacking::Anonymous,
            MemoryBacking::Shared,
            MemoryBacking::Template,
        ] {
            let given = Some(template.try_clone().unwrap());
            let memory = ram(SIZE, backing, given);
            memory.write_slice(&[9; 5000], GuestAddress(4095)).unwrap();
            memory
                .write_slice(&[3; 10], GuestAddress(SIZE - 10))
                .unwrap();
            memory
                .write_slice(&[4; 8192], GuestAddress(16 << 20))
                .unwrap();
            discard(&memory, GuestAddress(16 << 20), 4096).unwrap();
            discard(&memory, GuestAddress(512 << 10), 8192).unwrap();
            let image = MemoryImage::of(&memory).unwrap();
            let mut expected = vec![0; SIZE as usize];
            memory.read_slice(&mut expected, GuestAddress(0)).unwrap();
            assert!(content(&image) == expected, "{backing:?}");
            // A huge page at each place that was written, at most.
            let read: u64 = image
                .filled()
                .iter()
                .map(|range| range.end - range.start)
                .sum();
            assert!(read <= 8 << 20, "{backing:?}: {:?}", image.filled());
        }
    }

    #[test]
    fn blocks_lie_behind_ram() {
        const BLOCK: u64 = 2 << 20;
        let at = |block: u64| (4 << 30) + block * BLOCK;
        let template = tempfile::tempfile().unwrap();
        template.set_len(SIZE).unwrap();
        let memory = ram(SIZE, MemoryBacking::Template, Some(template));
        let memory = ChangingRam::from(memory);
        let new = [1, 7].map(|block| new_block(at(block)..at(block + 1)).unwrap());
        add(&memory, &new).unwrap();
        let memory = now(&memory);
        for (address, byte) in [(SIZE - 9, 1_u8), (at(1), 2), (at(8) - 5, 3)] {
            memory
                .write_slice(&[byte; 5], GuestAddress(address))
                .unwrap();
        }
        let image = MemoryImage::of(&memory).unwrap();
        let all = content(&image);
        assert_eq!(all.len() as u64, SIZE + 2 * BLOCK);
        let place = |at: u64| usize::try_from(SIZE + at).unwrap();
        assert_eq!(all[place(0) - 9..][..5], [1; 5]);
        assert_eq!(all[place(0)..][..6], [2, 2, 2, 2, 2, 0]);
        assert_eq!(all[place(2 * BLOCK) - 6..], [0, 3, 3, 3, 3, 3]);

        // As another machine has it, which may let go of it.
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&all).unwrap();
        let memory = ram(SIZE, MemoryBacking::Template, Some(file));
        let (file, end) = end_in_file(&memory).unwrap();
        assert_eq!(end, SIZE);
        let block = saved_block(at(7)..at(8), file, end + BLOCK).unwrap();
        let memory = ChangingRam::from(Arc::clone(&memory));
        add(&memory, &[block]).unwrap();
        let memory = now(&memory);
        let last = GuestAddress(at(8) - 5);
        assert_eq!(memory.read_obj::<[u8; 5]>(last).unwrap(), [3; 5]);
        discard(&memory, GuestAddress(at(7)), BLOCK as u32).unwrap();
        assert_eq!(memory.read_obj::<[u8; 5]>(last).unwrap(), [0; 5]);
    }

    #[test]
    fn the_gap_is_left_out() {
        let memory = ram(4 << 30, MemoryBacking::Anonymous, None);
        memory
            .write_slice(&[1; 4096], GuestAddress(GAP_START - 4096))
            .unwrap();
        memory
            .write_slice(&[2; 4096], GuestAddress(GAP_END))
            .unwrap();
        let image = MemoryImage::of(&memory).unwrap();
        assert_eq!(image.length(), 4 << 30);
        let mut around = [0; 8192];
        image.read_at(&mut around, GAP_START - 4096).unwrap();
        assert_eq!(
            [around[0], around[4095], around[4096], around[8191]],
            [1, 1, 2, 2]
        );
        assert!(image.read_at(&mut around, 4 << 30).is_err());
    }
}
