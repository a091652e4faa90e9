//! One virtual processor: data in, data out.
//!
//! [`Vcpu::run`] takes what answers the last exit and returns the next one as
//! plain data, so that the loop around it ([`crate::vcpu`]) is tested without
//! KVM. Rules of `KVM_RUN` (`Documentation/virt/kvm/api.rst`) are kept here.
#![expect(unsafe_code, reason = "the union and the data page of struct kvm_run")]

use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd};

use kvm_bindings::{
    CpuId, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_IO, KVM_EXIT_IO_IN, KVM_EXIT_MMIO, Msrs,
    kvm_cpuid_entry2, kvm_msr_entry, kvm_pre_fault_memory, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::{VcpuExit as RawExit, VcpuFd};
use rustix::ioctl::{self, Updater, opcode};

use super::{KvmError, Vm, cpuid, refused};
use crate::boot::Entry;

/// The most bytes one access moves.
pub const MAX_ACCESS_BYTES: usize = 8;
/// A page of port accesses: the most that KVM hands over at once.
const MAX_PORT_BYTES: usize = 4096;

/// `IA32_TIME_STAMP_COUNTER` (Intel SDM, volume 4).
const MSR_TIME_STAMP_COUNTER: u32 = 0x10;
/// `IA32_MISC_ENABLE`, and its bit for fast strings.
const MSR_MISC_ENABLE: (u32, u64) = (0x1a0, 1);
/// `IA32_MTRR_DEF_TYPE`: enabled, write-back everywhere.
const MSR_MTRR_DEF_TYPE: (u32, u64) = (0x2ff, 1 << 11 | 6);

/// What answers the exit before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuEntry {
    /// Nothing was asked.
    Run,
    /// The bytes that a [`VcpuExit::PortRead`] or [`VcpuExit::MmioRead`] asked for.
    Data([u8; MAX_ACCESS_BYTES]),
}

/// Bytes of one access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    bytes: [u8; MAX_ACCESS_BYTES],
    length: usize,
}

impl Access {
    /// An access of these bytes; what exceeds 8 is cut.
    #[must_use]
    pub fn new(data: &[u8]) -> Self {
        let mut bytes = [0; MAX_ACCESS_BYTES];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        Self {
            bytes,
            length: data.len().min(MAX_ACCESS_BYTES),
        }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

/// Why a vCPU stands still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuExit {
    /// The guest wrote to an I/O port.
    PortWrite(u16, Access),
    /// The guest reads so many bytes from an I/O port.
    PortRead(u16, usize),
    /// The guest wrote to memory that isn't RAM.
    MmioWrite(u64, Access),
    /// The guest reads so many bytes from memory that isn't RAM.
    MmioRead(u64, usize),
    /// A signal came, or KVM wants to be called again.
    Interrupted,
    /// The processor gave up on three nested faults.
    TripleFault,
    /// KVM can't go on; what it says and the registers.
    Failed {
        /// KVM's reason, with its suberror where it has one.
        reason: String,
        /// The registers, for a person.
        registers: String,
    },
}

/// `KVM_PRE_FAULT_MEMORY` of `linux/kvm.h`.
const PRE_FAULT: ioctl::Opcode = opcode::read_write::<kvm_pre_fault_memory>(0xae, 0xd5);

/// The port access at hand: KVM hands over repeated ones as one exit.
#[derive(Debug, Clone, Copy)]
struct PortAccess {
    port: u16,
    size: usize,
    count: usize,
    next: usize,
    read: bool,
    offset: usize,
}

/// What answer KVM waits for.
#[derive(Debug, Clone, Copy)]
enum Pending {
    Nothing,
    Port(PortAccess),
    MmioRead,
}

/// One virtual processor.
pub struct Vcpu {
    fd: VcpuFd,
    pending: Pending,
}

impl Vm {
    /// Creates vCPU `index` of `count`. The first is to enter at `entry`; the others wait
    /// for the first to start them.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn create_vcpu(
        &self,
        index: u8,
        count: u8,
        supported: &[kvm_cpuid_entry2],
    ) -> Result<Vcpu, KvmError> {
        let fd = self
            .fd
            .create_vcpu(u64::from(index))
            .map_err(refused("create a vCPU"))?;
        let table = cpuid::for_vcpu(supported, index, count);
        let table = CpuId::from_entries(&table).map_err(|_| KvmError::Cpuid)?;
        fd.set_cpuid2(&table)
            .map_err(refused("set a vCPU's CPUID"))?;
        Ok(Vcpu {
            fd,
            pending: Pending::Nothing,
        })
    }
}

impl Vcpu {
    /// The guest's time stamp counter as it is now, and how often it counts in a millisecond.
    ///
    /// # Errors
    /// [`KvmError::Call`].
    pub fn time_stamp(&self) -> Result<(u64, u32), KvmError> {
        let counter = kvm_msr_entry {
            index: MSR_TIME_STAMP_COUNTER,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[counter]).map_err(|_| KvmError::Cpuid)?;
        self.fd
            .get_msrs(&mut msrs)
            .map_err(refused("read a vCPU's time stamp counter"))?;
        let khz = self
            .fd
            .get_tsc_khz()
            .map_err(refused("read the rate of a vCPU's time stamp counter"))?;
        let counter = msrs.as_slice().first().map_or(0, |entry| entry.data);
        Ok((counter, khz))
    }

    /// Maps guest RAM as this vCPU's reads of it would, without exits (`KVM_PRE_FAULT_MEMORY`,
    /// Linux 6.11). The range is guest-physical, in whole pages.
    ///
    /// # Errors
    /// [`KvmError::Call`]: on other hosts always.
    pub fn pre_fault(&self, range: &Range<u64>) -> Result<(), KvmError> {
        let mut left = kvm_pre_fault_memory {
            gpa: range.start,
            size: range.end.saturating_sub(range.start),
            ..Default::default()
        };
        while left.size > 0 {
            // SAFETY: KVM_PRE_FAULT_MEMORY takes this structure and notes in it how far it came.
            let call = unsafe { Updater::<PRE_FAULT, _>::new(&mut left) };
            // SAFETY: `fd` outlives the borrow.
            let fd = unsafe { BorrowedFd::borrow_raw(self.fd.as_raw_fd()) };
            // SAFETY: mapping pages earlier changes nothing that the guest or we could see.
            let done = unsafe { ioctl::ioctl(fd, call) };
            done.map_err(|error| KvmError::Call {
                what: "map guest memory in advance",
                source: error.into(),
            })?;
        }
        Ok(())
    }

    /// Sets the registers to enter a kernel in 64-bit mode (Linux
    /// `Documentation/arch/x86/boot.rst`, "64-bit boot protocol").
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn enter_at(&self, entry: &Entry) -> Result<(), KvmError> {
        let mut sregs = self
            .fd
            .get_sregs()
            .map_err(refused("read a vCPU's system registers"))?;
        set_long_mode(&mut sregs, entry);
        self.fd
            .set_sregs(&sregs)
            .map_err(refused("set a vCPU's system registers"))?;
        let regs = kvm_regs {
            rip: entry.instruction,
            rsi: entry.boot_params,
            rsp: entry.stack,
            rflags: 2,
            ..Default::default()
        };
        self.fd
            .set_regs(&regs)
            .map_err(refused("set a vCPU's registers"))
    }

    /// Sets the model-specific registers that firmware would have set.
    ///
    /// # Errors
    /// When KVM refuses one.
    pub fn set_boot_msrs(&self) -> Result<(), KvmError> {
        let entries = [MSR_MISC_ENABLE, MSR_MTRR_DEF_TYPE].map(|(index, data)| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        });
        let msrs = Msrs::from_entries(&entries).map_err(|_| KvmError::Cpuid)?;
        let set = self
            .fd
            .set_msrs(&msrs)
            .map_err(refused("set a vCPU's boot MSRs"))?;
        if set != entries.len() {
            let source = io::Error::from(io::ErrorKind::Unsupported);
            return Err(KvmError::Call {
                what: "set all of a vCPU's boot MSRs",
                source,
            });
        }
        Ok(())
    }

    /// Runs the guest until something needs us. `entry` answers the exit before.
    ///
    /// # Errors
    /// When `KVM_RUN` itself fails, other than by a signal.
    pub fn run(&mut self, entry: VcpuEntry) -> Result<VcpuExit, KvmError> {
        if let Some(next) = self.answer(entry) {
            return Ok(next);
        }
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {
                return Ok(VcpuExit::Interrupted);
            }
            // Of the window alone a part may be missing.
            Err(error) if error.errno() == libc::EFAULT => {
                let reason = "the guest reached for memory with nothing behind it";
                return Ok(self.failed(reason.to_owned()));
            }
            Err(error) => return Err(refused("run a vCPU")(error)),
        };
        Ok(match exit {
            RawExit::MmioWrite(address, data) => VcpuExit::MmioWrite(address, Access::new(data)),
            RawExit::MmioRead(address, data) => {
                let length = data.len();
                self.pending = Pending::MmioRead;
                VcpuExit::MmioRead(address, length)
            }
            RawExit::IoOut(..) | RawExit::IoIn(..) => {
                self.begin_port_access();
                return Ok(self.next_port_access().unwrap_or(VcpuExit::Interrupted));
            }
            RawExit::Intr | RawExit::IrqWindowOpen => VcpuExit::Interrupted,
            RawExit::Shutdown => VcpuExit::TripleFault,
            other => {
                let reason = format!("{other:?}");
                self.failed(reason)
            }
        })
    }

    /// The descriptor, for what is done to a vCPU that stands still.
    pub(super) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// Whether the next run only completes what the last exit began, without entering the
    /// guest: its state is consistent after that alone (`Documentation/virt/kvm/api.rst`,
    /// `KVM_RUN`).
    pub fn leave_at_once(&mut self, wanted: bool) {
        self.fd.set_kvm_immediate_exit(u8::from(wanted));
    }

    /// Hands the answer to KVM; another access of the same exit may be left.
    fn answer(&mut self, entry: VcpuEntry) -> Option<VcpuExit> {
        match (self.pending, entry) {
            (Pending::MmioRead, VcpuEntry::Data(data)) => {
                let run = self.fd.get_kvm_run();
                if run.exit_reason == KVM_EXIT_MMIO {
                    // SAFETY: the exit reason says which field of the union is in use, and
                    // any bytes are valid in it.
                    let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
                    mmio.data = data;
                }
                self.pending = Pending::Nothing;
                None
            }
            (Pending::Port(access), entry) => {
                if let (true, VcpuEntry::Data(data)) = (access.read, entry) {
                    let at = (access.next - 1) * access.size;
                    if let Some(to) = self.port_bytes(&access, at) {
                        to.copy_from_slice(data.get(..access.size).unwrap_or_default());
                    }
                }
                self.next_port_access()
            }
            _ => None,
        }
    }

    fn begin_port_access(&mut self) {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_IO {
            return;
        }
        // SAFETY: the exit reason says which field of the union is in use.
        let io = unsafe { run.__bindgen_anon_1.io };
        self.pending = Pending::Port(PortAccess {
            port: io.port,
            size: usize::from(io.size),
            count: usize::try_from(io.count).unwrap_or(0),
            next: 0,
            read: u32::from(io.direction) == KVM_EXIT_IO_IN,
            offset: usize::try_from(io.data_offset).unwrap_or(0),
        });
    }

    fn next_port_access(&mut self) -> Option<VcpuExit> {
        let Pending::Port(mut access) = self.pending else {
            return None;
        };
        if access.next >= access.count {
            self.pending = Pending::Nothing;
            return None;
        }
        let at = access.next * access.size;
        let bytes = Access::new(self.port_bytes(&access, at)?);
        access.next += 1;
        self.pending = Pending::Port(access);
        Some(if access.read {
            VcpuExit::PortRead(access.port, access.size)
        } else {
            VcpuExit::PortWrite(access.port, bytes)
        })
    }

    /// The bytes of one access, which lie behind struct kvm_run in the same mapping.
    fn port_bytes(&mut self, access: &PortAccess, at: usize) -> Option<&mut [u8]> {
        let inside = matches!(access.size, 1 | 2 | 4)
            && at
                .checked_add(access.size)
                .is_some_and(|end| end <= MAX_PORT_BYTES);
        if !inside {
            return None;
        }
        let run = std::ptr::from_mut(self.fd.get_kvm_run()).cast::<u8>();
        // SAFETY: KVM put the data page of a port exit at this offset of the mapping of which
        // struct kvm_run is the start, and the access lies within that page.
        let start = unsafe { run.add(access.offset + at) };
        // SAFETY: as above; nobody else uses the mapping while `self` is borrowed mutably.
        Some(unsafe { std::slice::from_raw_parts_mut(start, access.size) })
    }

    fn failed(&mut self, mut reason: String) -> VcpuExit {
        let run = self.fd.get_kvm_run();
        if run.exit_reason == KVM_EXIT_INTERNAL_ERROR {
            // SAFETY: the exit reason says which field of the union is in use.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let _ = write!(reason, ", suberror {}", internal.suberror);
            let count = usize::try_from(internal.ndata).unwrap_or(0);
            for value in internal.data.iter().take(count) {
                let _ = write!(reason, ", {value:#x}");
            }
        }
        VcpuExit::Failed {
            reason,
            registers: self.registers(),
        }
    }

    /// The registers, for a person who reads a failure.
    #[must_use]
    pub fn registers(&self) -> String {
        let mut text = String::new();
        match self.fd.get_regs() {
            Ok(r) => {
                let _ = writeln!(
                    text,
                    "rip {:016x} rflags {:08x} rsp {:016x} rbp {:016x}\n\
                     rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}\n\
                     rsi {:016x} rdi {:016x} r8  {:016x} r9  {:016x}\n\
                     r10 {:016x} r11 {:016x} r12 {:016x} r13 {:016x}\n\
                     r14 {:016x} r15 {:016x}",
                    r.rip,
                    r.rflags,
                    r.rsp,
                    r.rbp,
                    r.rax,
                    r.rbx,
                    r.rcx,
                    r.rdx,
                    r.rsi,
                    r.rdi,
                    r.r8,
                    r.r9,
                    r.r10,
                    r.r11,
                    r.r12,
                    r.r13,
                    r.r14,
                    r.r15,
                );
            }
            Err(error) => {
                let _ = writeln!(text, "general registers: {error}");
            }
        }
        match self.fd.get_sregs() {
            Ok(s) => {
                let _ = write!(
                    text,
                    "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:04x}\n\
                     cs {:04x} base {:x} ss {:04x} ds {:04x} gs base {:x} gdt {:x} idt {:x}",
                    s.cr0,
                    s.cr2,
                    s.cr3,
                    s.cr4,
                    s.efer,
                    s.cs.selector,
                    s.cs.base,
                    s.ss.selector,
                    s.ds.selector,
                    s.gs.base,
                    s.gdt.base,
                    s.idt.base,
                );
            }
            Err(error) => {
                let _ = write!(text, "system registers: {error}");
            }
        }
        text
    }
}

/// Paging on, flat 64-bit code at selector 0x10 and data at 0x18 (`__BOOT_CS`, `__BOOT_DS`).
fn set_long_mode(sregs: &mut kvm_sregs, entry: &Entry) {
    let flat = kvm_segment {
        base: 0,
        limit: u32::MAX,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment {
        selector: 0x18,
        type_: 3,
        db: 1,
        ..flat
    };
    sregs.cs = kvm_segment {
        selector: 0x10,
        type_: 11,
        l: 1,
        ..flat
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt.base = entry.gdt;
    sregs.gdt.limit = entry.gdt_limit;
    sregs.cr3 = entry.page_table;
    // CR4.PAE; CR0.PE, CR0.ET, CR0.PG; EFER.LME, EFER.LMA.
    sregs.cr4 |= 1 << 5;
    sregs.cr0 |= 1 | 1 << 4 | 1 << 31;
    sregs.efer |= 1 << 8 | 1 << 10;
}
