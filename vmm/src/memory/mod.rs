//! Guest memory: the layout of RAM around the MMIO gap, and the mappings behind it.
//!
//! Nothing here touches a page: RAM is mapped lazily and without a
//! reservation, so a machine costs the host what its guest has touched.
//!
//! ```text
//! 0 ──────── 3 GiB ░░░ gap: virtio-mmio, I/O APIC, local APIC ░░░ 4 GiB ────────
//!   low RAM                                                high RAM, window, blocks that come and go
//! ```
#![expect(unsafe_code, reason = "advice about the mappings of guest RAM")]

mod changing;
mod image;
mod window;
mod working_set;

pub(crate) use self::changing::{Block, add, end_in_file, new_block, saved_block, take};
pub use self::changing::{ChangingRam, now, place_of_blocks};
pub use self::image::MemoryImage;
pub use self::window::Window;
pub use self::working_set::{Observer, WorkingSet, hold_program};

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, FileOffset, GuestAddress, GuestMemory, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::spec::{MemoryBacking, MemorySpec};

/// Guest RAM as devices see it: shared, cheap to clone, every access checked.
pub type GuestRam = Arc<GuestMemoryMmap>;

/// Bytes of a page.
const PAGE: u64 = 4096;
/// Bytes of a huge page.
const HUGE_PAGE: u64 = 2 << 20;
/// Where a template holds nothing for so many bytes, a copy has memory of its own. Each mapping more
/// costs a start something, too.
const LARGE_HOLE: u64 = 16 << 20;
/// Where low RAM ends and the MMIO gap begins.
pub const GAP_START: u64 = 3 << 30;
/// Where the MMIO gap ends and high RAM begins.
pub const GAP_END: u64 = 4 << 30;

/// Why guest memory can't be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The host won't map that much.
    #[error("cannot map {size_bytes} bytes of guest memory at {address:#x}")]
    Map {
        /// Size of the mapping.
        size_bytes: u64,
        /// Guest-physical address of its start.
        address: u64,
        /// What `mmap(2)` says.
        #[source]
        source: vm_memory::mmap::MmapRegionError,
    },
    /// A memory file can't be made or sized.
    #[error("cannot make a memory file of {size_bytes} bytes")]
    File {
        /// Its size.
        size_bytes: u64,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// A template was asked for, but none given, or a shorter one.
    #[error("template memory of {wanted} bytes is needed, {given} bytes were given")]
    Template {
        /// Size in the spec.
        wanted: u64,
        /// Size of the file given; 0 when there is none.
        given: u64,
    },
    /// The host won't map memory where a template has none.
    #[error("cannot map guest memory where the template holds nothing")]
    Holes(#[source] io::Error),
    /// The host won't keep addresses free for a window.
    #[error("cannot reserve a window of {length} bytes")]
    Window {
        /// Its length.
        length: u64,
        /// What `mmap(2)` says.
        #[source]
        source: io::Error,
    },
    /// The pieces don't make an address space: a bug in the layout.
    #[error("cannot lay guest memory out")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
}

/// Guest RAM of `size_bytes` as ranges of guest-physical addresses, lowest first.
#[must_use]
pub fn ram_ranges(size_bytes: u64) -> Vec<Range<u64>> {
    let low = 0..size_bytes.min(GAP_START);
    let high = GAP_END..GAP_END + (size_bytes - low.end);
    [low, high]
        .into_iter()
        .filter(|range| !range.is_empty())
        .collect()
}

/// Maps guest RAM. With [`MemoryBacking::Template`], `file` begins with the template's memory;
/// with [`MemoryBacking::Shared`], the memory file made is returned beside it.
///
/// # Errors
/// [`MemoryError`] when the host refuses, or the template doesn't fit.
pub fn map_ram(
    spec: &MemorySpec,
    file: Option<File>,
) -> Result<(GuestRam, Option<Arc<File>>), MemoryError> {
    let size_bytes = spec.size_bytes;
    let file = match spec.backing {
        MemoryBacking::Anonymous => None,
        MemoryBacking::Shared => Some(Arc::new(memory_file(size_bytes)?)),
        MemoryBacking::Template => Some(Arc::new(check_template(file, size_bytes)?)),
    };
    let shared = spec.backing == MemoryBacking::Shared;
    let mut offset = 0;
    let mut regions = Vec::with_capacity(2);
    for range in ram_ranges(size_bytes) {
        let length = range.end - range.start;
        let flags = match (&file, shared) {
            (None, _) => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            (Some(_), true) => libc::MAP_SHARED,
            (Some(_), false) => libc::MAP_PRIVATE,
        };
        let part = file.as_ref().map(|file| (file, offset));
        regions.push(map_region(range, flags, part)?);
        offset += length;
    }
    if file.is_none() {
        regions.iter().for_each(prefer_huge_pages);
    }
    let memory = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
    let memory = Arc::new(memory);
    if spec.backing == MemoryBacking::Template {
        own_holes(&memory).map_err(MemoryError::Holes)?;
    }
    Ok((memory, file.filter(|_| shared)))
}

/// Maps a range of guest memory, from a place in a file on or from nothing.
fn map_region(
    range: Range<u64>,
    flags: i32,
    file: Option<(&Arc<File>, u64)>,
) -> Result<GuestRegionMmap, MemoryError> {
    let length = range.end - range.start;
    let mut mapping = MmapRegionBuilder::new(usize::try_from(length).unwrap_or(usize::MAX))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(flags | libc::MAP_NORESERVE);
    let _pad = Pad::before(length);
    if let Some((file, offset)) = file {
        mapping = mapping.with_file_offset(FileOffset::from_arc(Arc::clone(file), offset));
    }
    let mapping = mapping.build().map_err(|source| MemoryError::Map {
        size_bytes: length,
        address: range.start,
        source,
    })?;
    GuestRegionMmap::new(mapping, GuestAddress(range.start)).ok_or(MemoryError::Layout(
        vm_memory::GuestRegionCollectionError::NoMemoryRegion,
    ))
}

/// Takes up the addresses above the next mapping, so that the host, which goes down from the last
/// one, puts it where its huge pages are those of its file.
struct Pad {
    start: *mut c_void,
    length: usize,
}

impl Pad {
    /// For a mapping of `length`; nothing if the host's choice is good, or it gives no room.
    fn before(length: u64) -> Option<Self> {
        // One page more than a multiple of huge pages, which the host would place as ours are to
        // be: the space where it puts all else.
        let length = usize::try_from(length + PAGE).ok()?;
        let probe = Self::map(std::ptr::null_mut(), length, MapFlags::PRIVATE)?;
        let end = probe.start.map_addr(|start| start + length);
        let above = (probe.start.addr() + PAGE as usize) % HUGE_PAGE as usize;
        drop(probe);
        let start = end.map_addr(|end| end - above);
        Self::map(start, above, MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE)
    }

    fn map(start: *mut c_void, length: usize, flags: MapFlags) -> Option<Self> {
        let (access, flags) = (ProtFlags::empty(), flags | MapFlags::NORESERVE);
        // SAFETY: a fresh mapping that nothing else knows, and that takes the place of none; of no
        // length, it is refused.
        let start = unsafe { rustix::mm::mmap_anonymous(start, length, access, flags) };
        start.ok().map(|start| Self { start, length })
    }
}

impl Drop for Pad {
    fn drop(&mut self) {
        // SAFETY: the mapping is this value's own.
        let _ = unsafe { rustix::mm::munmap(self.start, self.length) };
    }
}

/// A boot touches RAM all over: in pages of 4 KiB that is thousands of faults, each with an
/// exit, and a third of the whole start. Only advice: a host without huge pages ignores it.
fn prefer_huge_pages(region: &GuestRegionMmap) {
    // SAFETY: the range is one mapping that `region` owns, and the advice changes no content.
    let _ = unsafe {
        rustix::mm::madvise(region.as_ptr().cast(), region.size(), Advice::LinuxHugepage)
    };
}

/// Has memory of its own be where a template's file holds nothing over [`LARGE_HOLE`]: a page that is
/// written there is not first made in the file, for good, and then copied.
fn own_holes(memory: &GuestRam) -> io::Result<()> {
    for hole in memory.iter().flat_map(large_holes) {
        if let Some((start, length)) = host_range(memory, &hole) {
            // SAFETY: the range lies in one mapping of `memory`, which nobody has read yet.
            unsafe { map_zeros(start, length) }?;
            // In small pages, as in the rest: a guest may use few of them.
            // SAFETY: as above; only advice.
            let _ = unsafe { rustix::mm::madvise(start, length, Advice::LinuxNoHugepage) };
        }
    }
    Ok(())
}

/// The whole huge pages of a region that its file holds nothing of, [`LARGE_HOLE`] and more at a time,
/// as guest-physical addresses; none of a file that can't tell.
fn large_holes(region: &GuestRegionMmap) -> Vec<Range<u64>> {
    let mut holes = Vec::new();
    let Some(file) = region.file_offset() else {
        return holes;
    };
    let (begin, end) = (file.start(), file.start() + region.len());
    let guest = region.start_addr().raw_value();
    let mut at = begin;
    while at < end
        && let Ok(data) = next_data(file.file(), at, end)
    {
        let data = data.unwrap_or(end);
        let hole_end = data - data % HUGE_PAGE;
        if hole_end.saturating_sub(at) >= LARGE_HOLE {
            holes.push(guest + (at - begin)..guest + (hole_end - begin));
        }
        at = hole_end + HUGE_PAGE;
    }
    holes
}

/// Where a file next holds data, from `at` on and before `end`.
fn next_data(file: &File, at: u64, end: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data).filter(|data| *data < end)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Has a range of whole pages be zeros of this process's own, in the place of what was there.
///
/// # Safety
/// The range lies in one mapping of guest memory, whose content there isn't needed.
unsafe fn map_zeros(start: *mut c_void, length: usize) -> io::Result<()> {
    let (access, fresh) = (
        ProtFlags::READ | ProtFlags::WRITE,
        MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
    );
    // SAFETY: what takes the range's place is the same to whoever holds an address in it.
    unsafe { rustix::mm::mmap_anonymous(start, length, access, fresh) }?;
    Ok(())
}

/// Gives the whole pages of a range back to the host: they read as zeros from then on.
///
/// # Errors
/// If the range isn't in `memory`, or the host refuses.
pub fn discard(memory: &GuestRam, address: GuestAddress, length: u32) -> io::Result<()> {
    let Some(begin) = address.0.checked_next_multiple_of(PAGE) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let end = (address.0.saturating_add(length.into())) & !(PAGE - 1);
    if end <= begin {
        return Ok(());
    }
    let (Some((start, length)), Some(region)) = (
        host_range(memory, &(begin..end)),
        memory.find_region(GuestAddress(begin)),
    ) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if region.file_offset().is_some() && region.flags() & libc::MAP_PRIVATE != 0 {
        // Let go of, a page of the template would show what the template holds.
        // SAFETY: the range lies in one mapping of `memory`, whose content is the guest's, which asked.
        return unsafe { map_zeros(start, length) };
    }
    let advice = match region.file_offset() {
        None => Advice::LinuxDontNeed,
        Some(_) => Advice::LinuxRemove,
    };
    // SAFETY: the range lies in one mapping of `memory`, whose content is the guest's, which asked.
    Ok(unsafe { rustix::mm::madvise(start, length, advice) }?)
}

/// Where a range of whole pages lies in this process; nothing if it isn't all in one region.
fn host_range(memory: &GuestRam, range: &Range<u64>) -> Option<(*mut c_void, usize)> {
    let length = usize::try_from(range.end.checked_sub(range.start)?).ok()?;
    let aligned = range.start.is_multiple_of(PAGE) && range.end.is_multiple_of(PAGE);
    let slice = memory.get_slice(GuestAddress(range.start), length).ok()?;
    let start = slice.ptr_guard_mut().as_ptr();
    (aligned && length > 0).then_some((start.cast(), length))
}

fn memory_file(size_bytes: u64) -> Result<File, MemoryError> {
    let make = || -> io::Result<File> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(rustix::fs::memfd_create("hull-guest-memory", flags)?);
        file.set_len(size_bytes)?;
        rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
        Ok(file)
    };
    make().map_err(|source| MemoryError::File { size_bytes, source })
}

fn check_template(file: Option<File>, wanted: u64) -> Result<File, MemoryError> {
    let given = file
        .as_ref()
        .and_then(|f| f.metadata().ok())
        .map_or(0, |m| m.len());
    file.filter(|_| given >= wanted)
        .ok_or(MemoryError::Template { wanted, given })
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use vm_memory::{Bytes, GuestMemory, GuestMemoryRegion};

    use super::*;

    fn spec(size_bytes: u64, backing: MemoryBacking) -> MemorySpec {
        MemorySpec {
            size_bytes,
            backing,
        }
    }

    #[test]
    fn ram_goes_around_the_gap() {
        let one = |range: Range<u64>| vec![range];
        assert_eq!(ram_ranges(1 << 30), one(0..1 << 30));
        assert_eq!(ram_ranges(3 << 30), one(0..3 << 30));
        assert_eq!(ram_ranges(40 << 30), vec![0..3 << 30, 4 << 30..41 << 30]);
        let (memory, file) = map_ram(&spec(40 << 30, MemoryBacking::Anonymous), None).unwrap();
        assert!(file.is_none());
        assert_eq!(memory.iter().map(|r| r.len()).sum::<u64>(), 40 << 30);
        assert!(!memory.address_in_range(GuestAddress(GAP_START)));
        memory
            .write_obj(7u32, GuestAddress((41 << 30) - 4))
            .unwrap();
    }

    #[test]
    fn a_template_is_copied_on_write() {
        let size = 32 << 20;
        let mut template = tempfile::tempfile().unwrap();
        template.write_all(b"template").unwrap();
        template.set_len(size).unwrap();
        let given = template.try_clone().unwrap();
        let (memory, _) = map_ram(&spec(size, MemoryBacking::Template), Some(given)).unwrap();
        memory.write_obj(b'T', GuestAddress(0)).unwrap();
        let mut bytes = [0; 8];
        memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(&bytes, b"Template");
        let mut now = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&template, &mut now, 0).unwrap();
        assert_eq!(&now, b"template");
        // What lies behind the memory isn't the guest's.
        template.set_len(size + 1).unwrap();
        let given = template.try_clone().unwrap();
        assert!(map_ram(&spec(size, MemoryBacking::Template), Some(given)).is_ok());
        template.set_len(size).unwrap();
        let other = map_ram(&spec(size * 2, MemoryBacking::Template), Some(template));
        assert!(matches!(other, Err(MemoryError::Template { given, .. }) if given == size));
        assert!(map_ram(&spec(size, MemoryBacking::Template), None).is_err());
    }

    #[test]
    fn what_a_copy_writes_where_its_template_has_nothing_is_not_in_the_template() {
        use std::os::unix::fs::MetadataExt;
        let size = 64 << 20;
        let template = memory_file(size).unwrap();
        for at in [0, size - PAGE] {
            std::os::unix::fs::FileExt::write_all_at(&template, b"template", at).unwrap();
        }
        let given = template.try_clone().unwrap();
        let before = template.metadata().unwrap().blocks();
        let (memory, _) = map_ram(&spec(size, MemoryBacking::Template), Some(given)).unwrap();
        for page in (HUGE_PAGE..size - HUGE_PAGE).step_by(HUGE_PAGE as usize) {
            let page = GuestAddress(page);
            assert_eq!(memory.read_obj::<u64>(page).unwrap(), 0);
            memory.write_obj(7_u64, page).unwrap();
            assert_eq!(memory.read_obj::<u64>(page).unwrap(), 7);
        }
        let mut bytes = [0; 8];
        memory
            .read_slice(&mut bytes, GuestAddress(size - PAGE))
            .unwrap();
        assert_eq!(&bytes, b"template");
        assert_eq!(template.metadata().unwrap().blocks(), before);
    }

    #[test]
    fn what_is_discarded_reads_as_zeros_wherever_it_came_from() {
        let size = 32 << 20;
        let mut template = tempfile::tempfile().unwrap();
        template.write_all(&vec![7; 64 << 10]).unwrap();
        template.set_len(size).unwrap();
        for backing in [
            MemoryBacking::Anonymous,
            MemoryBacking::Shared,
            MemoryBacking::Template,
        ] {
            let given = Some(template.try_clone().unwrap());
            let (memory, file) = map_ram(&spec(size, backing), given).unwrap();
            memory.write_slice(&[7; 64 << 10], GuestAddress(0)).unwrap();
            // From within page 1 to within page 4.
            discard(&memory, GuestAddress(4097), 3 * 4096).unwrap();
            let byte = |page: u64| memory.read_obj::<u8>(GuestAddress(page * 4096)).unwrap();
            assert_eq!([1, 2, 3, 4].map(byte), [7, 0, 0, 7], "{backing:?}");
            memory.write_obj(8_u8, GuestAddress(2 * 4096)).unwrap();
            discard(&memory, GuestAddress(0), 64 << 10).unwrap();
            if let Some(file) = file {
                assert_eq!(file.metadata().unwrap().blocks(), 0);
            }
            assert_eq!([0, 2, 15].map(byte), [0; 3], "{backing:?}");
            assert!(discard(&memory, GuestAddress(size - 4096), 8192).is_err());
            assert!(discard(&memory, GuestAddress(u64::MAX - 10), u32::MAX).is_err());
            discard(&memory, GuestAddress(5), 4096).unwrap();
        }
    }

    #[test]
    fn a_templates_huge_pages_can_be_the_hosts() {
        let size = 32 << 20;
        let template = tempfile::tempfile().unwrap();
        template.set_len(size).unwrap();
        let (memory, _) = map_ram(&spec(size, MemoryBacking::Template), Some(template)).unwrap();
        let start = memory.iter().next().unwrap().as_ptr() as u64;
        assert!(start.is_multiple_of(HUGE_PAGE), "{start:#x}");
    }

    #[test]
    fn shared_memory_is_in_its_file() {
        let (memory, file) = map_ram(&spec(32 << 20, MemoryBacking::Shared), None).unwrap();
        memory.write_obj(*b"here", GuestAddress(4096)).unwrap();
        let mut now = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(&*file.unwrap(), &mut now, 4096).unwrap();
        assert_eq!(&now, b"here");
    }
}
