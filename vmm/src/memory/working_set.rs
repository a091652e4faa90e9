//! Which pages of a template a start touches and writes: seen at one start, had ready at the next.
//!
//! A copy of a template takes a fault, each with an exit of the guest, for every page that it
//! reads first, and more for one that it writes. [`Observer`] notes those of one copy;
//! [`WorkingSet::make_ready`] has the pages of later copies mapped, and those that will be written
//! copied, in bulk. All of it is advice: a set that is wrong, or a host that can't, costs time or
//! memory, never content.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use rustix::ioctl::{self, Updater, opcode};
use rustix::mm::{Advice, UserfaultfdFlags, userfaultfd};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion};

use super::{GuestRam, PAGE, host_range};

/// Bytes of an entry of `/proc/PID/pagemap`, and how many are read at once.
const ENTRY: usize = 8;
const ENTRIES: usize = 8192;
/// `/proc/PID/pagemap`: the page is mapped; it is a file's own (kernel documentation, "pagemap").
const PRESENT: u64 = 1 << 63;
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
            let entry = region.as_ptr() as u64 / PAGE * ENTRY as u64;
            let pages = region.len() / PAGE;
            let mut bytes = vec![0; ENTRIES * ENTRY];
            for first in (0..pages).step_by(ENTRIES) {
                let count = usize::try_from(pages - first).map_or(ENTRIES, |n| n.min(ENTRIES));
                let part = bytes.get_mut(..count * ENTRY).unwrap_or_default();
                self.pagemap
                    .read_exact_at(part, entry + first * ENTRY as u64)?;
                for (index, bits) in (first..).zip(part.as_chunks().0) {
                    let bits = u64::from_ne_bytes(*bits);
                    if bits & PRESENT == 0 {
                        continue;
                    }
                    let page = guest + index * PAGE;
                    add(&mut set.touched, page);
                    if bits & OF_FILE == 0 {
                        add(&mut set.written, page);
                    }
                }
            }
        }
        Ok(set)
    }
}

/// Adds a page behind all others.
fn add(ranges: &mut Vec<Range<u64>>, page: u64) {
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
}
