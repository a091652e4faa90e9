//! KVM: the only room with its ioctls.
//!
//! [`Vm`] is the virtual machine's descriptor with its interrupt chip and its
//! memory slots; [`vcpu::Vcpu`] one processor, data in and data out;
//! [`cpuid`] decides, as a pure function, what processor the guest sees.
#![expect(
    unsafe_code,
    reason = "memory slots and borrowed descriptors handed to KVM"
)]

mod blocks;
pub mod cpuid;
pub mod state;
pub mod vcpu;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vm_memory::{Address, GuestMemory, GuestMemoryRegion, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;

pub use self::blocks::MemoryBlocks;
use crate::bus::line_of;
use crate::memory::{ChangingRam, Window, now};
use crate::outcome::lock;
use crate::virtio::mem::Region;
use crate::virtio::transport::Lines;

/// The version of KVM's interface, the same since 2007.
const API_VERSION: i32 = 12;
/// Three pages below 4 GiB that Intel's virtualisation keeps for itself (`KVM_SET_TSS_ADDR`).
const TSS_ADDRESS: usize = 0xfffb_d000;

/// What KVM refused.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// A call failed.
    #[error("cannot {what}")]
    Call {
        /// What was tried, as in "create a vCPU".
        what: &'static str,
        /// What the kernel says.
        #[source]
        source: io::Error,
    },
    /// The descriptor isn't /dev/kvm, or an unknown one.
    #[error("the KVM descriptor speaks version {0} of the interface, {API_VERSION} is needed")]
    Version(i32),
    /// A saved register that this host's processor doesn't take.
    #[error("cannot set a vCPU's MSR {0:#x}")]
    Msr(u32),
    /// The CPUID table has more leaves than KVM takes.
    #[error("the processor has too many CPUID leaves")]
    Cpuid,
}

/// Turns an error of KVM's into ours; for `map_err`.
fn refused(what: &'static str) -> impl FnOnce(vmm_sys_util::errno::Error) -> KvmError {
    move |error| KvmError::Call {
        what,
        source: error.into(),
    }
}

/// A virtual machine in KVM, its guest RAM mapped in.
pub struct Vm {
    fd: Arc<VmFd>,
    kvm: Kvm,
    /// How many slots are taken for good.
    slots: u32,
    /// Keeps the memory mapped for as long as the slots point at it.
    ram: ChangingRam,
    _window: Option<Arc<Window>>,
}

impl Vm {
    /// Creates a VM with an interrupt chip, `memory` and a window beside it, from an open /dev/kvm.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn new(
        kvm: OwnedFd,
        ram: &ChangingRam,
        window: Option<&Arc<Window>>,
    ) -> Result<Self, KvmError> {
        let memory = now(ram);
        // SAFETY: the descriptor was owned by `kvm` and is handed over; if it isn't /dev/kvm,
        // the calls on it fail.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::Version(version));
        }
        let fd = kvm.create_vm().map_err(refused("create a VM"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(refused("set the TSS address"))?;
        fd.create_irq_chip()
            .map_err(refused("create the interrupt chip"))?;
        let mut vm = Self {
            fd: Arc::new(fd),
            kvm,
            slots: 0,
            ram: ram.clone(),
            _window: window.cloned(),
        };
        for region in memory.iter() {
            let host = region
                .get_host_address(MemoryRegionAddress(0))
                .map_err(|error| KvmError::Call {
                    what: "find guest memory's address",
                    source: io::Error::other(error),
                })?;
            let region = kvm_userspace_memory_region {
                slot: vm.slots,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: host as u64,
            };
            // SAFETY: the range is one mapping of `memory`, which `vm` keeps alive for as
            // long as its VM exists; regions of a GuestMemoryMmap don't overlap.
            unsafe { vm.fd.set_user_memory_region(region) }
                .map_err(refused("register guest memory"))?;
            vm.slots += 1;
        }
        if let Some(window) = window {
            vm.register(window)?;
            vm.slots += 1;
        }
        Ok(vm)
    }

    /// Makes a window known, for good. A write to it is an access to a device that isn't there.
    fn register(&self, window: &Window) -> Result<(), KvmError> {
        let region = kvm_userspace_memory_region {
            slot: self.slots,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: window.address(),
            memory_size: window.length(),
            userspace_addr: window.host_address(),
        };
        // SAFETY: the range is reserved by the window, which `self` keeps for as long as its VM
        // exists, and lies above all of guest memory.
        unsafe { self.fd.set_user_memory_region(region) }
            .map_err(refused("register the window for files"))
    }

    /// What gives a running guest blocks of `region`, which lies above all that it has.
    #[must_use]
    pub fn blocks(&self, region: Region) -> MemoryBlocks {
        MemoryBlocks::new(Arc::clone(&self.fd), self.ram.clone(), region, self.slots)
    }

    /// What this host's KVM can show a guest of a processor.
    ///
    /// # Errors
    /// When KVM won't tell.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("ask for the supported CPUID"))
    }

    /// The interrupt lines of its devices.
    #[must_use]
    pub fn lines(&self) -> Arc<dyn Lines> {
        Arc::new(ChipLines(Mutex::new(Arc::clone(&self.fd))))
    }

    /// Counts the eventfd `fd` up whenever the guest writes the 32-bit `value` at
    /// `address`, without an exit to us.
    ///
    /// # Errors
    /// When KVM refuses.
    pub fn ioeventfd(&self, fd: BorrowedFd<'_>, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(&as_eventfd(fd), &IoEventAddress::Mmio(address), value)
            .map_err(refused("connect a doorbell"))
    }
}

/// Lines into the interrupt chip. Of an eventfd for such a line (`KVM_IRQFD`) KVM would have a kernel
/// thread see to it, which costs more and comes later than the call does.
///
/// One thread at a time: a line that another still holds up doesn't rise again, and what was to be
/// told would be lost.
struct ChipLines(Mutex<Arc<VmFd>>);

impl Lines for ChipLines {
    fn pulse(&self, index: usize) {
        if let Some(line) = line_of(index) {
            let vm = lock(&self.0);
            for level in [true, false] {
                // Refused only where there is no chip, and this machine was made with one.
                let _ = vm.set_irq_line(line.into(), level);
            }
        }
    }
}

/// A number for the processor that guests of `vcpus` vCPUs see through an open /dev/kvm: equal
/// for hosts on which a saved vCPU finds itself at home, of one build of this crate.
///
/// # Errors
/// When KVM won't tell.
pub fn processor(kvm: BorrowedFd<'_>, vcpus: u8) -> Result<u64, KvmError> {
    // SAFETY: the descriptor is open while borrowed, and ManuallyDrop never closes it; if it
    // isn't /dev/kvm, the call on it fails.
    let kvm = ManuallyDrop::new(unsafe { Kvm::from_raw_fd(kvm.as_raw_fd()) });
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(refused("ask for the supported CPUID"))?;
    let mut hasher = DefaultHasher::new();
    for leaf in cpuid::for_vcpu(supported.as_slice(), 0, vcpus) {
        let registers = [leaf.eax, leaf.ebx, leaf.ecx, leaf.edx];
        (leaf.function, leaf.index, registers).hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// KVM's crate wants its own type of eventfd; this lends it ours.
fn as_eventfd(fd: BorrowedFd<'_>) -> ManuallyDrop<EventFd> {
    // SAFETY: the descriptor is open while borrowed, the caller doesn't outlive the borrow
    // (the value stays within one expression), and ManuallyDrop never closes it.
    ManuallyDrop::new(unsafe { EventFd::from_raw_fd(fd.as_raw_fd()) })
}
