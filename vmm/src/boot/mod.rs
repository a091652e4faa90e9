//! Image bytes in, registers and memory writes out: entering Linux directly.
//!
//! The 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`): an
//! uncompressed `vmlinux` is read straight into guest RAM and entered at its
//! `startup_64` with a zero page, so that no line of firmware and none of the
//! kernel's own decompressor or 32-bit PVH stub runs.
//!
//! Low memory while booting:
//! ```text
//! 0x00500 GDT      0x07000 zero page   0x08000 stack   0x09000 page tables (3 pages)
//! 0x10000 seed     0x20000 command line                0x9fc00 multiprocessor table
//! ```

pub mod mptable;

use std::fs::File;
use std::io::{self, Seek};

use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryError};

use crate::memory::{GAP_START, GuestRam, ram_ranges};
use crate::spec::MAX_CMDLINE_BYTES;

const GDT: u64 = 0x500;
const ZERO_PAGE: u64 = 0x7000;
const STACK_TOP: u64 = 0x8ff0;
const PAGE_TABLES: u64 = 0x9000;
const SEED: u64 = 0x1_0000;
const CMDLINE: u64 = 0x2_0000;
/// Where conventional memory ends and the multiprocessor table stands: the last KiB below
/// 640 KiB is one of the places where a kernel looks for it.
const MPTABLE: u64 = 0x9_fc00;
const HIGH_MEMORY: u64 = 0x10_0000;
/// What the boot page tables map, one to one.
const MAPPED: u64 = 1 << 30;
/// Bytes of randomness handed to the kernel, so that it never waits for some.
const SEED_BYTES: usize = 32;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Why a kernel can't be entered.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file isn't an uncompressed x86-64 kernel.
    #[error("the kernel isn't an uncompressed x86-64 ELF image (a vmlinux) that fits in memory")]
    Kernel(#[source] linux_loader::loader::Error),
    /// Its entry or end lies where no kernel can run.
    #[error("the kernel asks for memory that the machine lacks: {entry:#x} to {end:#x}")]
    KernelRange {
        /// Where it is entered.
        entry: u64,
        /// Where its memory ends.
        end: u64,
    },
    /// The initial RAM disk can't be read.
    #[error("cannot read the initial RAM disk")]
    Initrd(#[source] io::Error),
    /// Nor can it be placed.
    #[error("the initial RAM disk of {size_bytes} bytes doesn't fit above the kernel")]
    InitrdSize {
        /// Its size.
        size_bytes: u64,
    },
    /// The command line with the devices in it is too long for Linux.
    #[error("the kernel command line has {0} bytes, {MAX_CMDLINE_BYTES} are possible")]
    Cmdline(usize),
    /// The host has no randomness to give.
    #[error("cannot get randomness for the kernel")]
    Seed(#[source] io::Error),
    /// Guest memory refused a write.
    #[error("cannot write boot data into guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Where and how the first vCPU enters the kernel. All addresses are guest-physical.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub instruction: u64,
    /// The zero page.
    pub boot_params: u64,
    /// Top of a stack.
    pub stack: u64,
    /// The top-level page table.
    pub page_table: u64,
    /// The descriptor table.
    pub gdt: u64,
    /// Its size in bytes, less one.
    pub gdt_limit: u16,
}

/// What is to be loaded.
pub struct Image<'a> {
    /// An uncompressed kernel.
    pub kernel: &'a mut File,
    /// An initial RAM disk.
    pub initrd: Option<&'a mut File>,
    /// The whole command line.
    pub cmdline: &'a str,
    /// How many vCPUs the multiprocessor table lists.
    pub vcpus: u8,
    /// The interrupt lines in use.
    pub lines: &'a [u8],
}

/// Loads `image` into guest RAM and writes all that the kernel expects to find.
///
/// # Errors
/// [`BootError`] naming what is wrong with the image.
pub fn load(memory: &GuestRam, memory_bytes: u64, image: Image<'_>) -> Result<Entry, BootError> {
    let low_end = memory_bytes.min(GAP_START);
    let loaded = Elf::load(
        memory.as_ref(),
        None,
        image.kernel,
        Some(GuestAddress(HIGH_MEMORY)),
    )
    .map_err(BootError::Kernel)?;
    let (entry, end) = (loaded.kernel_load.raw_value(), loaded.kernel_end);
    if entry >= end || end > low_end || entry >= MAPPED {
        return Err(BootError::KernelRange { entry, end });
    }
    let initrd = match image.initrd {
        Some(file) => Some(load_initrd(memory, file, end, low_end)?),
        None => None,
    };
    write_cmdline(memory, image.cmdline)?;
    memory.write_slice(
        &mptable::build(image.vcpus, image.lines, MPTABLE as u32),
        GuestAddress(MPTABLE),
    )?;
    write_seed(memory)?;
    write_zero_page(memory, memory_bytes, image.cmdline.len(), initrd)?;
    write_page_tables(memory)?;
    let gdt: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (place, descriptor) in (0u64..).zip(gdt) {
        memory.write_obj(descriptor, GuestAddress(GDT + 8 * place))?;
    }
    Ok(Entry {
        instruction: entry,
        boot_params: ZERO_PAGE,
        stack: STACK_TOP,
        page_table: PAGE_TABLES,
        gdt: GDT,
        gdt_limit: 31,
    })
}

/// Reads the RAM disk to the top of low memory; returns its address and size.
fn load_initrd(
    memory: &GuestRam,
    file: &mut File,
    kernel_end: u64,
    low_end: u64,
) -> Result<(u32, u32), BootError> {
    let size_bytes = file.metadata().map_err(BootError::Initrd)?.len();
    file.rewind().map_err(BootError::Initrd)?;
    let too_large = BootError::InitrdSize { size_bytes };
    let address = low_end.checked_sub(size_bytes).map(|a| a & !0xfff);
    let Some(address) = address.filter(|address| *address >= kernel_end) else {
        return Err(too_large);
    };
    let (Ok(at), Ok(size)) = (u32::try_from(address), u32::try_from(size_bytes)) else {
        return Err(too_large);
    };
    memory
        .read_exact_volatile_from(GuestAddress(address), file, size as usize)
        .map_err(|error| BootError::Initrd(io::Error::other(error)))?;
    Ok((at, size))
}

fn write_cmdline(memory: &GuestRam, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= MAX_CMDLINE_BYTES {
        return Err(BootError::Cmdline(cmdline.len()));
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    memory.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;
    Ok(())
}

/// A `setup_data` node of type `SETUP_RNG_SEED`.
fn write_seed(memory: &GuestRam) -> Result<(), BootError> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut seed = [0u8; SEED_BYTES];
    rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
        .map_err(|error| BootError::Seed(error.into()))?;
    memory.write_obj(0u64, GuestAddress(SEED))?;
    memory.write_obj(SETUP_RNG_SEED, GuestAddress(SEED + 8))?;
    memory.write_obj(SEED_BYTES as u32, GuestAddress(SEED + 12))?;
    memory.write_slice(&seed, GuestAddress(SEED + 16))?;
    Ok(())
}

/// The zero page: offsets are those of `struct boot_params` (Linux
/// `Documentation/arch/x86/zero-page.rst`). RAM is zero, so only what isn't is written.
fn write_zero_page(
    memory: &GuestRam,
    memory_bytes: u64,
    cmdline_bytes: usize,
    initrd: Option<(u32, u32)>,
) -> Result<(), BootError> {
    let at = |offset: u64| GuestAddress(ZERO_PAGE + offset);
    memory.write_obj(0xaa55u16, at(0x1fe))?;
    memory.write_obj(*b"HdrS", at(0x202))?;
    memory.write_obj(0xffu8, at(0x210))?;
    if let Some((address, size)) = initrd {
        memory.write_obj(address, at(0x218))?;
        memory.write_obj(size, at(0x21c))?;
    }
    memory.write_obj(CMDLINE as u32, at(0x228))?;
    memory.write_obj(0x0100_0000u32, at(0x230))?;
    memory.write_obj(u32::try_from(cmdline_bytes).unwrap_or(0), at(0x238))?;
    memory.write_obj(SEED, at(0x250))?;
    let map = e820(memory_bytes);
    memory.write_obj(u8::try_from(map.len()).unwrap_or(0), at(0x1e8))?;
    for (place, (start, size, kind)) in (0u64..).zip(map) {
        let entry = 0x2d0 + 20 * place;
        memory.write_obj(start, at(entry))?;
        memory.write_obj(size, at(entry + 8))?;
        memory.write_obj(kind, at(entry + 16))?;
    }
    Ok(())
}

/// The memory map: conventional memory, the table above it, RAM around the gap.
fn e820(memory_bytes: u64) -> Vec<(u64, u64, u32)> {
    let mut map = vec![
        (0, MPTABLE, E820_RAM),
        (MPTABLE, HIGH_MEMORY - MPTABLE, E820_RESERVED),
    ];
    for range in ram_ranges(memory_bytes) {
        let start = range.start.max(HIGH_MEMORY);
        map.push((start, range.end - start, E820_RAM));
    }
    map
}

/// Maps the first GiB one to one in pages of 2 MiB.
fn write_page_tables(memory: &GuestRam) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let (pml4, pdpt, pd) = (PAGE_TABLES, PAGE_TABLES + 0x1000, PAGE_TABLES + 0x2000);
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    memory.write_obj(pd | PRESENT_WRITABLE, GuestAddress(pdpt))?;
    let mut table = [0u8; 4096];
    for (entry, page) in table.chunks_exact_mut(8).zip(0u64..) {
        entry.copy_from_slice(&(page << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes());
    }
    memory.write_slice(&table, GuestAddress(pd))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::testing::guest_ram;

    /// An ELF image with one segment of `payload` at `address`, entered there.
    fn elf(address: u64, payload: &[u8]) -> File {
        let mut bytes = vec![0u8; 0x1000];
        bytes[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
        bytes[16..20].copy_from_slice(&[2, 0, 62, 0]);
        bytes[24..32].copy_from_slice(&address.to_le_bytes());
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..58].copy_from_slice(&[56, 0, 1, 0]);
        bytes[64..68].copy_from_slice(&1u32.to_le_bytes());
        bytes[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
        bytes[88..96].copy_from_slice(&address.to_le_bytes());
        bytes[96..104].copy_from_slice(&(payload.len() as u64).to_le_bytes());
        bytes[104..112].copy_from_slice(&(payload.len() as u64 + 0x1000).to_le_bytes());
        bytes.extend_from_slice(payload);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    fn image<'a>(kernel: &'a mut File, initrd: Option<&'a mut File>) -> Image<'a> {
        Image {
            kernel,
            initrd,
            cmdline: "quiet",
            vcpus: 2,
            lines: &[5],
        }
    }

    fn read<const N: usize>(memory: &GuestRam, address: u64) -> [u8; N] {
        let mut bytes = [0; N];
        memory
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    #[test]
    fn a_kernel_and_its_ram_disk_are_where_the_protocol_says() {
        let size = 64 << 20;
        let memory = guest_ram(size as usize);
        let mut initrd = tempfile::tempfile().unwrap();
        initrd.write_all(b"ramdisk").unwrap();
        let mut kernel = elf(0x100_0000, b"kernel");
        let entry = load(&memory, size, image(&mut kernel, Some(&mut initrd))).unwrap();
        assert_eq!(entry.instruction, 0x100_0000);
        assert_eq!(&read::<6>(&memory, 0x100_0000), b"kernel");
        let at = u32::from_le_bytes(read(&memory, ZERO_PAGE + 0x218));
        assert_eq!(&read::<7>(&memory, u64::from(at)), b"ramdisk");
        assert_eq!(at % 4096, 0);
        assert_eq!(&read::<6>(&memory, CMDLINE), b"quiet\0");
        assert_eq!(&read::<4>(&memory, MPTABLE), b"_MP_");
        assert_eq!(
            read::<8>(&memory, PAGE_TABLES + 0x2008),
            0x20_0083u64.to_le_bytes()
        );
        assert_ne!(read::<32>(&memory, SEED + 16), [0; 32]);
    }

    #[test]
    fn the_memory_map_covers_ram_and_nothing_else() {
        let map = e820(40 << 30);
        let ram: u64 = map.iter().filter(|e| e.2 == E820_RAM).map(|e| e.1).sum();
        assert_eq!(ram, (40 << 30) - (HIGH_MEMORY - MPTABLE));
        assert_eq!(map.last(), Some(&(4 << 30, 37 << 30, E820_RAM)));
        assert_eq!(
            e820(64 << 20).last(),
            Some(&(HIGH_MEMORY, 63 << 20, E820_RAM))
        );
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let size = 64 << 20;
        let memory = guest_ram(size as usize);
        let mut text = tempfile::tempfile().unwrap();
        text.write_all(&[b'x'; 4096]).unwrap();
        let refused = load(&memory, size, image(&mut text, None));
        assert!(matches!(refused, Err(BootError::Kernel(_))));
        // Entered below 1 MiB, at the end of memory, beyond it.
        for address in [0x1000, (64 << 20) - 0x1000, 1 << 40] {
            let mut kernel = elf(address, b"kernel");
            assert!(
                load(&memory, size, image(&mut kernel, None)).is_err(),
                "{address:#x}"
            );
        }
        let mut kernel = elf(0x100_0000, b"kernel");
        let mut large = tempfile::tempfile().unwrap();
        large.set_len(60 << 20).unwrap();
        let refused = load(&memory, size, image(&mut kernel, Some(&mut large)));
        assert!(matches!(refused, Err(BootError::InitrdSize { .. })));
    }
}
