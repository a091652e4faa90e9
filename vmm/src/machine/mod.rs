//! The machine: one assembly path from a checked spec, and the life of what it builds.
//!
//! [`Machine::build`] is the only place that puts devices, memory and vCPUs
//! together; a restore is the same build with state applied. Everything from
//! the host comes in as an open descriptor ([`Host`]): the caller opens, jails
//! itself, and only then builds and runs.
//!
//! ```text
//!  build ─► stopped ─start─► running ◄─resume/pause─► paused
//!                               │ stop, or the guest's own end
//!                               └─► over (wait tells the first cause)
//! ```

mod devices;
mod snapshot;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use self::devices::{Devices, Pollers, Supplies, connect, waits_for_disk, with_devices};
pub use self::snapshot::{MachineState, SaveError};
use crate::boot::{self, BootError, Image};
use crate::bus::{Bus, line_of};
use crate::kvm::vcpu::Vcpu;
use crate::kvm::{KvmError, Vm};
use crate::memory::{
    self, ChangingRam, GuestRam, MemoryError, MemoryImage, Observer, Window, WorkingSet,
};
use crate::outcome::{Outcome, VmExit};
use crate::spec::{Checked, DeviceSpec, VmSpec};
use crate::vcpu::Vcpus;
use crate::virtio::device::Persist;
use crate::virtio::device::RestoreError;
use crate::virtio::fs::{FsExport, FsLimits, FsRole, FsStats, Shares};
use crate::virtio::mem::{Extent, Mem};
use crate::virtio::net::Tap;
use crate::virtio::transport::Board;
use crate::virtio::vsock::Connector;
use crate::virtio::worker::{Poller, Worker};

/// Everything of the host that a machine is made of, already open.
pub struct Host {
    /// /dev/kvm.
    pub kvm: OwnedFd,
    /// An uncompressed kernel; a restore needs none.
    pub kernel: Option<File>,
    /// Its initial RAM disk.
    pub initrd: Option<File>,
    /// A template's memory, for [`crate::spec::MemoryBacking::Template`].
    pub memory: Option<File>,
    /// What a start from the template needs; a restore without it observes what it is.
    pub working_set: Option<WorkingSet>,
    /// Where the guest's console prints; it bounds what it keeps.
    pub console: Box<dyn Write + Send>,
    /// Where the guest's console reads, for debugging.
    pub console_input: Option<OwnedFd>,
    /// The files of the block devices, in the order of the spec.
    pub blocks: Vec<File>,
    /// The taps of the network cards, in the order of the spec.
    pub taps: Vec<Tap>,
    /// Who takes the streams that the guest opens, by port.
    pub vsock_ports: BTreeMap<u32, Sender<UnixStream>>,
    /// The directories of the fs device.
    pub fs_exports: Vec<FsExport>,
    /// What they are to a guest that is saved with them mounted.
    pub fs_role: FsRole,
    /// How much of the host the fs device may hold on to.
    pub fs_limits: FsLimits,
}

/// Why a machine can't be built or started.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Guest memory.
    #[error("cannot set guest memory up")]
    Memory(#[from] MemoryError),
    /// KVM.
    #[error("cannot set the virtual machine up")]
    Kvm(#[from] KvmError),
    /// The kernel.
    #[error("cannot load the kernel")]
    Boot(#[from] BootError),
    /// A saved state.
    #[error("cannot apply the saved state")]
    Restore(#[from] RestoreError),
    /// A machine that isn't restored needs one.
    #[error("no kernel was given")]
    NoKernel,
    /// A device of the spec has nothing behind it.
    #[error("the spec asks for a {0} device, but nothing was opened for it")]
    NoHost(&'static str),
    /// A device can't be made.
    #[error("cannot make the {device} device")]
    Device {
        /// Which.
        device: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread or a descriptor can't be had.
    #[error("cannot {what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// A moment on two clocks: by it a guest can tell the time, however late it hears of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// The guest's time stamp counter.
    pub tsc: u64,
    /// How often that counts in a millisecond.
    pub tsc_khz: u32,
    /// The host's wall clock.
    pub realtime: SystemTime,
}

impl Moment {
    fn of(vcpu: &Vcpu) -> Option<Self> {
        let (tsc, tsc_khz) = vcpu.time_stamp().ok()?;
        Some(Self {
            tsc,
            tsc_khz,
            realtime: SystemTime::now(),
        })
    }
}

/// Where the machine stands in its life.
enum Life {
    Stopped(Vec<Vcpu>),
    Alive { vcpus: Vcpus, workers: Vec<Worker> },
    Over,
}

/// A virtual machine.
pub struct Machine {
    // Dropped from here down: threads first, then what they used.
    life: Life,
    bus: Arc<Bus>,
    pollers: Pollers,
    vsock: Option<Connector>,
    fs_stats: Option<Arc<FsStats>>,
    shares: Option<Shares>,
    outcome: Arc<Outcome>,
    memory_file: Option<Arc<File>>,
    /// What sees which pages of its first memory are touched, and that memory.
    observer: Option<(Observer, GuestRam)>,
    moment: Option<Moment>,
    extent: Option<Arc<Extent>>,
    memory: ChangingRam,
    vm: Vm,
}

impl Machine {
    /// Builds the machine with its kernel loaded; nothing of the guest runs yet.
    ///
    /// # Errors
    /// [`BuildError`] with the chain of causes.
    pub fn build(spec: Checked<VmSpec>, mut host: Host) -> Result<Self, BuildError> {
        let spec = spec.into_spec();
        let (mut kernel, mut initrd) = (host.kernel.take(), host.initrd.take());
        let machine = Self::assemble(&spec, host)?;
        let kernel = kernel.as_mut().ok_or(BuildError::NoKernel)?;
        machine.load(&spec, kernel, initrd.as_mut())?;
        Ok(machine)
    }

    /// Puts memory, devices and vCPUs together.
    fn assemble(spec: &VmSpec, host: Host) -> Result<Self, BuildError> {
        let (ram, memory_file) = memory::map_ram(&spec.memory, host.memory)?;
        let memory = ChangingRam::from(ram);
        let window = reserve_window(spec)?;
        let window_bytes = window.as_ref().map_or(0, |window| window.length());
        let vm = Vm::new(host.kvm, &memory, window.as_ref())?;
        let no_fd = |source| BuildError::Host {
            what: "make an event descriptor",
            source,
        };
        let outcome = Arc::new(Outcome::new().map_err(no_fd)?);
        let pollers = Pollers {
            devices: Poller::new().map_err(no_fd)?,
            fs: Poller::new().map_err(no_fd)?,
        };
        let board = Board {
            memory: memory.clone(),
            window,
            lines: vm.lines(),
            outcome: Arc::clone(&outcome),
        };
        let mut supplies = Supplies {
            vm: &vm,
            place_of_blocks: memory::place_of_blocks(spec.memory.size_bytes, window_bytes),
            sink: Arc::new(Mutex::new(host.console)),
            console_input: host.console_input,
            blocks: host.blocks.into_iter(),
            taps: host.taps.into_iter(),
            vsock_ports: host.vsock_ports,
            fs_exports: host.fs_exports,
            fs_role: host.fs_role,
            fs_limits: host.fs_limits,
        };
        let sink = spec.debug_serial.then(|| Arc::clone(&supplies.sink));
        let mut devices = Devices::default();
        for device in &spec.devices {
            devices.add(device, &mut supplies, &board, &pollers)?;
        }
        connect(&vm, &devices.slots)?;
        let supported = vm.supported_cpuid()?;
        let vcpus = (0..spec.vcpus)
            .map(|index| vm.create_vcpu(index, spec.vcpus, supported.as_slice()))
            .collect::<Result<Vec<_>, _>>()?;
        Ok(Self {
            life: Life::Stopped(vcpus),
            bus: Arc::new(Bus::new(devices.slots, sink)),
            pollers,
            vsock: devices.vsock,
            fs_stats: devices.fs_stats,
            shares: devices.shares,
            outcome,
            memory_file,
            observer: None,
            moment: None,
            extent: devices.extent,
            memory,
            vm,
        })
    }

    /// Loads the kernel and has the first vCPU stand before its first instruction.
    fn load(
        &self,
        spec: &VmSpec,
        kernel: &mut File,
        initrd: Option<&mut File>,
    ) -> Result<(), BuildError> {
        let slots = self.bus.slots().len();
        let lines: Vec<u8> = (0..slots).filter_map(line_of).collect();
        let image = Image {
            kernel,
            initrd,
            cmdline: &with_devices(&spec.kernel_cmdline, slots),
            vcpus: spec.vcpus,
            lines: &lines,
        };
        let entry = boot::load(&self.ram(), spec.memory.size_bytes, image)?;
        let Life::Stopped(vcpus) = &self.life else {
            return Ok(());
        };
        if let Some(first) = vcpus.first() {
            first.enter_at(&entry)?;
        }
        for vcpu in vcpus {
            vcpu.set_boot_msrs()?;
        }
        Ok(())
    }

    /// When it was started, if the host could tell.
    #[must_use]
    pub fn moment(&self) -> Option<Moment> {
        self.moment
    }

    /// Starts the threads and lets the guest run. On a machine that runs or is over, nothing.
    ///
    /// # Errors
    /// When the host refuses a thread; the machine is over then.
    pub fn start(&mut self) -> Result<(), BuildError> {
        let Life::Stopped(vcpus) = &mut self.life else {
            return Ok(());
        };
        let vcpus = std::mem::take(vcpus);
        self.life = Life::Over;
        self.moment = vcpus.first().and_then(Moment::of);
        let failed = |source| BuildError::Host {
            what: "start a thread",
            source,
        };
        let (fs, others): (Vec<_>, Vec<_>) = self
            .bus
            .slots()
            .iter()
            .cloned()
            .enumerate()
            .partition(|(_, slot)| waits_for_disk(slot.unit()));
        let mut workers = Vec::with_capacity(2);
        for (name, poller, slots) in [
            ("fs", &self.pollers.fs, fs),
            ("devices", &self.pollers.devices, others),
        ] {
            if !slots.is_empty() {
                workers.push(Worker::start(name, Arc::clone(poller), slots).map_err(failed)?);
            }
        }
        let vcpus = Vcpus::start(vcpus, &self.bus, &self.outcome).map_err(failed)?;
        vcpus.resume();
        self.life = Life::Alive { vcpus, workers };
        Ok(())
    }

    /// Holds the guest: vCPUs first, then the devices. Returns when all stand still.
    pub fn pause(&self) {
        if let Life::Alive { vcpus, workers } = &self.life {
            vcpus.pause();
            workers.iter().for_each(Worker::pause);
        }
    }

    /// Lets a paused guest go on.
    pub fn resume(&self) {
        if let Life::Alive { vcpus, workers } = &self.life {
            workers.iter().for_each(Worker::resume);
            vcpus.resume();
        }
    }

    /// Ends the machine at once, whatever the guest does. Idempotent.
    pub fn stop(&mut self) {
        self.outcome.report(VmExit::Stopped);
        if let Life::Alive {
            mut vcpus,
            mut workers,
        } = std::mem::replace(&mut self.life, Life::Over)
        {
            vcpus.stop();
            workers.iter_mut().for_each(Worker::stop);
        }
    }

    /// Waits for the machine's end, ends what is left of it and says how it came.
    pub fn wait(&mut self) -> VmExit {
        let exit = self.outcome.wait();
        self.stop();
        exit
    }

    /// As [`Machine::wait`], but gives up after `limit`, the machine running on.
    pub fn wait_for(&mut self, limit: Duration) -> Option<VmExit> {
        let exit = self.outcome.wait_for(limit)?;
        self.stop();
        Some(exit)
    }

    /// A descriptor that is readable from the moment [`Machine::wait`] won't block.
    #[must_use]
    pub fn ended(&self) -> BorrowedFd<'_> {
        self.outcome.ready()
    }

    /// The outcome, to be shared with another thread.
    #[must_use]
    pub fn outcome(&self) -> Arc<Outcome> {
        Arc::clone(&self.outcome)
    }

    /// Opens a stream to `guest_port`. May be called from any thread through
    /// [`Machine::vsock_connector`]; a guest that refuses shows as an end of file.
    ///
    /// # Errors
    /// When the machine has no vsock device, or the host no descriptors.
    pub fn vsock_connect(&self, guest_port: u32) -> io::Result<UnixStream> {
        match &self.vsock {
            Some(connector) => connector.connect(guest_port),
            None => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// What opens streams into the guest, from any thread.
    #[must_use]
    pub fn vsock_connector(&self) -> Option<Connector> {
        self.vsock.clone()
    }

    /// How many requests the guest made of the fs device, by kind.
    #[must_use]
    pub fn fs_stats(&self) -> Option<&FsStats> {
        self.fs_stats.as_deref()
    }

    /// What changes the directories that the fs device shows.
    #[must_use]
    pub fn shares(&self) -> Option<&Shares> {
        self.shares.as_ref()
    }

    /// How much memory it has beyond its RAM, if it has a device for that.
    #[must_use]
    pub fn extent(&self) -> Option<&Extent> {
        self.extent.as_deref()
    }

    /// Has the guest have so many bytes of memory beyond its RAM, as far as its device goes. It
    /// takes its time: [`Machine::extent`] tells when it has them.
    pub fn request_memory(&self, bytes: u64) {
        let mut slots = self.bus.slots().iter();
        if let (Some(extent), Some(slot)) =
            (&self.extent, slots.find(|slot| slot.unit() == Mem::UNIT))
        {
            extent.request(bytes);
            slot.config_changed();
        }
    }

    fn ram(&self) -> GuestRam {
        memory::now(&self.memory)
    }

    /// What a machine that was restored without a [`Host::working_set`] has touched up to now.
    #[must_use]
    pub fn observed(&self) -> Option<WorkingSet> {
        let (observer, memory) = self.observer.as_ref()?;
        observer.seen(memory).ok()
    }

    /// The content of guest memory, to be read while the machine is paused.
    ///
    /// # Errors
    /// If the host won't say which pages there are.
    pub fn memory_image(&self) -> io::Result<MemoryImage> {
        MemoryImage::of(&self.ram())
    }

    /// The file that holds guest memory, with [`crate::spec::MemoryBacking::Shared`].
    #[must_use]
    pub fn memory_file(&self) -> Option<&Arc<File>> {
        self.memory_file.as_ref()
    }
}

/// The window that the spec's fs device asks for.
fn reserve_window(spec: &VmSpec) -> Result<Option<Arc<Window>>, MemoryError> {
    let mut lengths = spec.devices.iter().filter_map(|device| match device {
        DeviceSpec::Fs(fs) if fs.dax_window_bytes > 0 => Some(fs.dax_window_bytes),
        _ => None,
    });
    let reserve = |length| Window::reserve(spec.memory.size_bytes, length).map(Arc::new);
    lengths.next().map(reserve).transpose()
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
