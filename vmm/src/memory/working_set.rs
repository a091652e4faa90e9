//! Which pages of a template a start touches and writes: seen at one start, had ready at the next.
//!
//! A copy of a template takes a fault, each with an exit of the guest, for every page that it
//! reads first, and more for one that it writes. [`Observer`] notes those of one copy;
//! [`WorkingSet::make_ready`] has the pages of later copies mapped, and those that will be written
//! copied, in bulk. All of it is advice: a set that is wrong, or a host that can't, costs time or
//! memory, never content.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::ptr;

use rustix::ioctl::{self, Updater, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags, userfaultfd};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion, GuestRegionMmap};

use super::{GAP_START, GuestRam, HUGE_PAGE, PAGE, host_range};

/// So many pages of a huge page must be read to have it mapped in one piece.
const DENSE: u64 = 16;

/// So many huge pages are held of a program: more than any that is linked for them has.
const MOST_OF_PROGRAM: u64 = 16;

/// Bytes of an entry of `/proc/PID/pagemap`, and how many are read at once.
const ENTRY: usize = 8;
const ENTRIES: usize = 8192;
/// `/proc/PID/pagemap`: the page is mapped; it is a file's own (kernel documentation, "pagemap").
pub(super) const PRESENT: u64 = 1 << 63;
const OF_FILE: u64 = 1 << 61;

/// Pages of guest RAM that a start needs: ranges of guest-physical addresses in whole pages,
/// lowest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WorkingSet {
    /// Those that are written.
    pub written: Vec<Range<u64>>,
    /// Those that are written or read.
    pub touched: Vec<Range<u64>>,
}

/// `struct uffdio_api` of `linux/userfaultfd.h`.
#[repr(C)]
struct UffdApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdRegister {
    start: u64,
    length: u64,
    mode: u64,
    ioctls: u64,
}

const UFFD_API: u64 = 0xaa;
/// `UFFD_FEATURE_WP_ASYNC` (Linux 6.7): no faults are reported, and any mapping will do.
const WRITE_PROTECT_ASYNC: u64 = 1 << 15;
/// `UFFDIO_REGISTER_MODE_WP`.
const WRITE_PROTECT: u64 = 1 << 1;
const API: ioctl::Opcode = opcode::read_write::<UffdApi>(0xaa, 0x3f);
const REGISTER: ioctl::Opcode = opcode::read_write::<UffdRegister>(0xaa, 0x00);

/// What sees which pages of a private mapping are touched.
#[derive(Debug)]
pub struct Observer {
    pagemap: File,
    /// Keeps the kernel from mapping the neighbours of a page that is touched.
    _alone: Option<OwnedFd>,
}

impl Observer {
    /// Watches `memory` from now on. On a host before Linux 6.7 it will see a page's neighbours
    /// touched, too.
    ///
    /// # Errors
    /// If `/proc` can't be read.
    pub fn new(memory: &GuestRam) -> io::Result<Self> {
        Ok(Self {
            pagemap: File::open("/proc/self/pagemap")?,
            _alone: fault_alone(memory).ok(),
        })
    }

    /// What was touched so far.
    ///
    /// # Errors
    /// If `/proc` can't be read.
    pub fn seen(&self, memory: &GuestRam) -> io::Result<WorkingSet> {
        let mut set = WorkingSet::default();
        for region in memory.iter() {
            let guest = region.start_addr().raw_value();
            each_page(&self.pagemap, region, |offset, bits| {
                if bits & PRESENT != 0 {
                    add(&mut set.touched, guest + offset);
                }
                if bits & (PRESENT | OF_FILE) == PRESENT {
                    add(&mut set.written, guest + offset);
                }
            })?;
        }
        Ok(set)
    }
}

/// Shows what `pagemap` says of each page of a region, by the page's offset in it.
pub(super) fn each_page(
    pagemap: &File,
    region: &GuestRegionMmap,
    mut show: impl FnMut(u64, u64),
) -> io::Result<()> {
    let entry = region.as_ptr() as u64 / PAGE * ENTRY as u64;
    let pages = region.len() / PAGE;
    let mut bytes = vec![0; ENTRIES * ENTRY];
    for first in (0..pages).step_by(ENTRIES) {
        let count = usize::try_from(pages - first).map_or(ENTRIES, |n| n.min(ENTRIES));
        let part = bytes.get_mut(..count * ENTRY).unwrap_or_default();
        pagemap.read_exact_at(part, entry + first * ENTRY as u64)?;
        for (index, bits) in (first..).zip(part.as_chunks().0) {
            show(index * PAGE, u64::from_ne_bytes(*bits));
        }
    }
    Ok(())
}

/// Adds a page behind all others.
pub(super) fn add(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if page == last.end => last.end = page + PAGE,
        _ => ranges.push(page..page + PAGE),
    }
}

/// A mapping that takes part in asynchronous write protection has its pages mapped one by one,
/// protected or not.
fn fault_alone(memory: &GuestRam) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor reports no fault, so no thread ever waits for its reader.
    let fd = unsafe { userfaultfd(UserfaultfdFlags::CLOEXEC) }?;
    let mut api = UffdApi {
        api: UFFD_API,
        features: WRITE_PROTECT_ASYNC,
        ioctls: 0,
    };
    // SAFETY: UFFDIO_API takes this structure and fills it in.
    let call = unsafe { Updater::<API, _>::new(&mut api) };
    // SAFETY: as above.
    unsafe { ioctl::ioctl(&fd, call) }?;
    for region in memory.iter() {
        let mut register = UffdRegister {
            start: region.as_ptr() as u64,
            length: region.len(),
            mode: WRITE_PROTECT,
            ioctls: 0,
        };
        // SAFETY: UFFDIO_REGISTER takes this structure and fills it in; the range is one mapping
        // of `memory`, none of which is write-protected.
        let call = unsafe { Updater::<REGISTER, _>::new(&mut register) };
        // SAFETY: as above.
        unsafe { ioctl::ioctl(&fd, call) }?;
    }
    Ok(fd)
}

impl WorkingSet {
    /// Has the host hold in huge pages what starts read of `template` without ever writing there:
    /// kernel code for the most part. A whole huge page then costs a later start what one page does.
    /// Notes those that the host holds so; a host that can't changes nothing.
    pub fn gather(&mut self, template: &File) {
        let mut blocks = self.dense_blocks();
        blocks.retain(|block| collapse(template, block.start).is_ok());
        let is_in = |range: &Range<u64>| blocks.iter().any(|block| block.contains(&range.start));
        let parts = self.touched.iter().flat_map(split);
        let mut touched: Vec<Range<u64>> = parts.filter(|part| !is_in(part)).collect();
        touched.extend(blocks);
        touched.sort_unstable_by_key(|range| range.start);
        self.touched = touched;
    }

    /// Has the host hold in huge pages again what was gathered, once it has read `template` anew.
    pub fn hold(&self, template: &File) {
        for range in self.touched.iter().filter(|range| is_huge(range)) {
            // Without, each of its pages costs a start what it did before.
            let _ = collapse(template, range.start);
        }
    }

    /// Takes what another start needed in as well.
    pub fn join(&mut self, other: &Self) {
        for (ours, theirs) in [
            (&mut self.written, &other.written),
            (&mut self.touched, &other.touched),
        ] {
            ours.extend_from_slice(theirs);
            ours.sort_unstable_by_key(|range| range.start);
            let mut joined: Vec<Range<u64>> = Vec::with_capacity(ours.len());
            for range in ours.drain(..) {
                match joined.last_mut() {
                    Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                    _ => joined.push(range),
                }
            }
            *ours = joined;
        }
    }

    /// The huge pages of low RAM, which lies in a template's file as it does in the guest, that are
    /// read often enough and not written.
    fn dense_blocks(&self) -> Vec<Range<u64>> {
        let mut read: BTreeMap<u64, u64> = BTreeMap::new();
        for part in self.touched.iter().flat_map(split) {
            *read.entry(part.start / HUGE_PAGE).or_default() += (part.end - part.start) / PAGE;
        }
        for part in self.written.iter().flat_map(split) {
            read.remove(&(part.start / HUGE_PAGE));
        }
        read.retain(|block, pages| *pages >= DENSE && (block + 1) * HUGE_PAGE <= GAP_START);
        let range = |block: &u64| block * HUGE_PAGE..(block + 1) * HUGE_PAGE;
        read.keys().map(range).collect()
    }

    /// Copies the pages that will be written; what lies outside of `memory` is passed over.
    pub(crate) fn make_ready(&self, memory: &GuestRam) {
        for range in &self.written {
            let Some((start, length)) = host_range(memory, range) else {
                continue;
            };
            // SAFETY: the range lies in one mapping of `memory`, and the advice changes none of
            // its content. Only advice: what can't be copied now is when it is written.
            let _ = unsafe { rustix::mm::madvise(start, length, Advice::LinuxPopulateWrite) };
        }
    }
}

/// Has the host hold a program in huge pages, as far as it fills them: one that is linked for it takes
/// a fault for each of those, and not one for every few pages. A host that can't changes nothing.
pub fn hold_program(program: &File) {
    let length = program.metadata().map_or(0, |metadata| metadata.len());
    for block in 0..(length / HUGE_PAGE).min(MOST_OF_PROGRAM) {
        let _ = collapse(program, block * HUGE_PAGE);
    }
}

/// Whether it is one huge page.
fn is_huge(range: &Range<u64>) -> bool {
    range.start.is_multiple_of(HUGE_PAGE) && range.end - range.start == HUGE_PAGE
}

/// A range's parts in each huge page.
fn split(range: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut start, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let part = start..end.min((start / HUGE_PAGE + 1) * HUGE_PAGE);
        start = part.end;
        (!part.is_empty()).then_some(part)
    })
}

/// Has the host's page cache hold the huge page of `file` at `offset` in one piece (madvise(2),
/// `MADV_COLLAPSE`, Linux 6.1). For most file systems the mapping must be one of code.
fn collapse(file: &File, offset: u64) -> io::Result<()> {
    let room = 2 * HUGE_PAGE as usize;
    let (access, flags) = (ProtFlags::empty(), MapFlags::PRIVATE | MapFlags::NORESERVE);
    // SAFETY: a fresh mapping that nothing else knows.
    let space = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), room, access, flags) }?;
    let begin = space.map_addr(|address| address.next_multiple_of(HUGE_PAGE as usize));
    let (access, flags) = (
        ProtFlags::READ | ProtFlags::EXEC,
        MapFlags::PRIVATE | MapFlags::FIXED,
    );
    let size = HUGE_PAGE as usize;
    // SAFETY: the huge page lies within the space that was just mapped.
    let mapped = unsafe { rustix::mm::mmap(begin, size, access, flags, file, offset) };
    let done = mapped.map_err(io::Error::from).and_then(|at| {
        // SAFETY: the range is that mapping, and the advice changes none of its content.
        match unsafe { libc::madvise(at, size, libc::MADV_COLLAPSE) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    });
    // SAFETY: nothing refers to the space.
    let _ = unsafe { rustix::mm::munmap(space, room) };
    done
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::memory::map_ram;
    use crate::spec::{MemoryBacking, MemorySpec};

    fn copy(template: &File, size_bytes: u64) -> GuestRam {
        let backing = MemoryBacking::Template;
        let spec = MemorySpec {
            size_bytes,
            backing,
        };
        map_ram(&spec, Some(template.try_clone().unwrap()))
            .unwrap()
            .0
    }

    fn holds(ranges: &[Range<u64>], page: u64) -> bool {
        ranges.iter().any(|range| range.contains(&(page * PAGE)))
    }

    #[test]
    fn what_one_copy_touches_the_next_has() {
        let size = 32 << 20;
        let mut template = tempfile::tempfile().unwrap();
        template.write_all(&vec![7; 1 << 20]).unwrap();
        template.set_len(size).unwrap();
        let memory = copy(&template, size);
        let observer = Observer::new(&memory).unwrap();
        assert_eq!(observer.seen(&memory).unwrap(), WorkingSet::default());
        for page in [3, 4, 100, 6000] {
            memory.write_obj(1_u8, GuestAddress(page * PAGE)).unwrap();
        }
        let _: u8 = memory.read_obj(GuestAddress(200 * PAGE)).unwrap();
        let set = observer.seen(&memory).unwrap();
        let written = [3..5, 100..101, 6000..6001].map(|r| r.start * PAGE..r.end * PAGE);
        assert_eq!(set.written, written);
        assert!(
            [3, 100, 200, 6000]
                .iter()
                .all(|&page| holds(&set.touched, page))
        );
        assert!(!holds(&set.touched, 250), "{set:?}");

        let memory = copy(&template, size);
        let observer = Observer::new(&memory).unwrap();
        set.make_ready(&memory);
        assert_eq!(observer.seen(&memory).unwrap().written, set.written);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(100 * PAGE)).unwrap(), 7);
    }

    #[test]
    fn two_sets_make_one() {
        let pages = |range: Range<u64>| range.start * PAGE..range.end * PAGE;
        let mut set = WorkingSet {
            written: vec![pages(3..4)],
            touched: vec![pages(3..5), pages(9..10), pages(20..30)],
        };
        let other = WorkingSet {
            written: Vec::new(),
            touched: vec![pages(0..1), pages(5..9), pages(22..24)],
        };
        set.join(&other);
        assert_eq!(set.written, [pages(3..4)]);
        assert_eq!(set.touched, [pages(0..1), pages(3..10), pages(20..30)]);
    }

    #[test]
    fn what_is_read_and_never_written_is_gathered() {
        let pages = |range: Range<u64>| range.start * PAGE..range.end * PAGE;
        let set = WorkingSet {
            written: vec![pages(1030..1031)],
            // Dense, dense up to the middle of one that is written to, and a few.
            touched: vec![pages(10..40), pages(600..1100), pages(2000..2003)],
        };
        let huge = |number: u64| number * HUGE_PAGE..(number + 1) * HUGE_PAGE;
        assert_eq!(set.dense_blocks(), [huge(0), huge(1)]);
        let mut template = tempfile::tempfile().unwrap();
        template.write_all(&vec![7; 8 << 20]).unwrap();
        let mut gathered = set.clone();
        gathered.gather(&template);
        gathered.hold(&template);
        hold_program(&template);
        assert_eq!(gathered.written, set.written);
        for range in set.touched.iter().flat_map(split) {
            let mut ranges = gathered.touched.iter();
            assert!(ranges.any(|r| r.start <= range.start && range.end <= r.end));
        }
        assert!(gathered.touched.is_sorted_by_key(|range| range.start));
    }
}
