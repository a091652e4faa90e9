//! The one place that assembles a VM: from a plan and from what was opened for it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use hull_proto::{CONTROL_PORT, GUEST_CID, Interface, RESOLVER_PORT, Request, SHARES_TAG};
use hull_vmm::machine::{BuildError, Host, Machine, MachineState, Moment, SaveError};
use hull_vmm::memory::{MemoryImage, WorkingSet};
use hull_vmm::outcome::VmExit;
use hull_vmm::spec::{
    BlockSpec, DeviceSpec, FsSpec, MemSpec, MemoryBacking, MemorySpec, NetSpec, SpecError, VmSpec,
    VsockSpec,
};
use hull_vmm::virtio::fs::{CachePolicy, FsExport, FsLimits, FsRole, FsStats};
use hull_vmm::virtio::net::{SetOffloads, Tap, Traffic};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::console::{BootLog, Tail};
use crate::control::InterfaceStats;
use crate::network::{JoinError, Joined};
use crate::plan::PlannedVm;
use crate::rootfs::SharedDirectory;
use crate::sys;
use crate::template::Template;

use super::guest::{Guest, SnapshotError};
use super::view::View;
use super::{OpenError, forward};

/// Lines of the console that are shown when a guest fails.
const LAST_LINES: usize = 12;

/// A VM that could not be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VmError {
    /// The plan asks for what no machine is.
    #[error("cannot build such a machine")]
    Spec(#[from] SpecError),
    /// The machine could not be built.
    #[error("cannot build the machine")]
    Build(#[source] BuildError),
    /// The machine could not be started.
    #[error("cannot start the machine")]
    Start(#[source] BuildError),
    /// A thread or a descriptor could not be had.
    #[error("cannot watch the machine")]
    Watch(#[source] io::Error),
}

/// What a VM is made of, open.
pub(super) struct Opened {
    pub(super) kvm: OwnedFd,
    pub(super) shares: Vec<SharedDirectory>,
    pub(super) console: BootLog,
    pub(super) network: Joined,
    /// The guest's disk, if it has one.
    pub(super) scratch: Option<File>,
}

/// What its first instruction is.
pub(super) enum Source {
    /// A kernel's.
    Boot {
        kernel: File,
        initrd: File,
        /// The guest is to be saved: its memory lies in a file.
        saved: bool,
    },
    /// The next one of a guest that was saved.
    Copy(Box<Template>),
    /// The same with a first process, whose stream has this port of the host's.
    GoOn(Box<Template>, u32),
}

impl Source {
    /// Opens what a boot needs.
    pub(super) fn boot(vm: &PlannedVm, saved: bool) -> Result<Self, OpenError> {
        let open = |what: &'static str, path: &Path| {
            File::open(path).map_err(|source| OpenError::Path {
                what,
                path: path.to_owned(),
                source,
            })
        };
        Ok(Self::Boot {
            kernel: open("guest kernel", &vm.kernel)?,
            initrd: open("guest's first root", &vm.initrd)?,
            saved,
        })
    }

    /// What the shares are to a guest from here.
    fn role(&self) -> FsRole {
        match self {
            Self::Boot { saved: true, .. } => FsRole::Template,
            Self::Copy(_) => FsRole::Copy,
            Self::Boot { saved: false, .. } | Self::GoOn(..) => FsRole::Own,
        }
    }
}

/// A VM, and where the agent will dial in.
pub(super) struct Vm {
    machine: Machine,
    console: Tail,
    dial: Sender<UnixStream>,
    /// What the guest is to know of its cards, and what ties them to the host's interfaces.
    network: Joined,
    /// What goes over each card.
    traffic: Vec<Arc<Traffic>>,
    /// Where its network will be found, if it comes later.
    view: Option<View>,
    /// Who asks for the name server of that.
    asking: Receiver<UnixStream>,
}

/// Until somebody dials in, a thread turns the machine's end into a closed stream; dropping this
/// ends it.
pub(super) struct Watch {
    cancel: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

/// The same devices in the same order in every VM, its network's cards and its disk among them.
fn spec(vm: &PlannedVm, network: &Joined, backing: MemoryBacking) -> VmSpec {
    let shares = DeviceSpec::Fs(FsSpec {
        tag: SHARES_TAG.to_owned(),
        dax_window_bytes: vm.window_bytes,
    });
    let streams = DeviceSpec::Vsock(VsockSpec {
        guest_cid: u64::from(GUEST_CID),
    });
    let cards = network.interfaces.iter().map(|interface| {
        DeviceSpec::Net(NetSpec {
            mac: interface.mac,
            mtu: u16::try_from(interface.mtu).unwrap_or(u16::MAX),
        })
    });
    let mut devices = vec![shares, streams];
    devices.extend(cards);
    devices.push(DeviceSpec::Console);
    devices.extend(vm.scratch.iter().map(|scratch| {
        DeviceSpec::Block(BlockSpec {
            read_only: false,
            serial: "scratch".to_owned(),
            durable: !scratch.fleeting,
        })
    }));
    devices.extend([DeviceSpec::Balloon, DeviceSpec::Rng]);
    if vm.growth_bytes > 0 {
        let region_bytes = vm.growth_bytes;
        devices.push(DeviceSpec::Mem(MemSpec { region_bytes }));
    }
    VmSpec {
        vcpus: vm.vcpus,
        memory: MemorySpec {
            size_bytes: vm.memory_bytes,
            backing,
        },
        kernel_cmdline: vm.cmdline.clone(),
        devices,
        debug_serial: vm.debug,
    }
}

/// The host's ends of the cards.
fn taps(network: &mut Joined, muted: bool) -> Vec<Tap> {
    let (is_spare, own) = (network.is_spare, network.own.clone().unwrap_or_default());
    let set_offloads = |number: usize| -> SetOffloads {
        match own.taps().get(number).cloned() {
            Some(waiting) => Box::new(move |_, told| waiting.set_offloads(told)),
            None if is_spare => Box::new(|_, _| Ok(())),
            None => Box::new(sys::set_offloads),
        }
    };
    let tap = |(number, device)| Tap {
        device,
        set_offloads: set_offloads(number),
        traffic: Arc::default(),
        muted,
    };
    network.taps.drain(..).enumerate().map(tap).collect()
}

impl Vm {
    /// Builds it; nothing of the guest runs yet.
    pub(super) fn build(
        plan: &PlannedVm,
        opened: Opened,
        source: Source,
    ) -> Result<(Self, Receiver<UnixStream>), VmError> {
        let (dial, streams) = mpsc::channel();
        let console = opened.console.tail();
        let exports = opened.shares.into_iter().map(export);
        let mut network = opened.network;
        // What goes on has another network's addresses at first.
        let taps = taps(&mut network, matches!(source, Source::GoOn(..)));
        let traffic = taps.iter().map(|tap| Arc::clone(&tap.traffic)).collect();
        let mut host = Host {
            kvm: opened.kvm,
            kernel: None,
            initrd: None,
            memory: None,
            working_set: None,
            console: Box::new(opened.console),
            console_input: None,
            blocks: opened.scratch.into_iter().collect(),
            taps,
            fs_exports: exports.collect(),
            fs_role: source.role(),
            fs_limits: FsLimits::default(),
            vsock_ports: BTreeMap::from([(CONTROL_PORT, dial.clone())]),
        };
        let (ask, asking) = mpsc::channel();
        if network.own.is_some() {
            host.vsock_ports.insert(RESOLVER_PORT, ask);
        }
        if let Source::GoOn(_, port) = &source {
            host.vsock_ports.insert(*port, dial.clone());
        }
        let machine = match source {
            Source::Copy(template) | Source::GoOn(template, _) => {
                host.memory = Some(template.file);
                host.working_set = template.working_set;
                let spec = spec(plan, &network, MemoryBacking::Template).validate()?;
                Machine::restore(spec, host, template.state)
            }
            Source::Boot {
                kernel,
                initrd,
                saved,
            } => {
                (host.kernel, host.initrd) = (Some(kernel), Some(initrd));
                let backing = match saved {
                    true => MemoryBacking::Shared,
                    false => MemoryBacking::Anonymous,
                };
                Machine::build(spec(plan, &network, backing).validate()?, host)
            }
        };
        let vm = Self {
            machine: machine.map_err(VmError::Build)?,
            console,
            dial,
            network,
            traffic,
            view: None,
            asking,
        };
        Ok((vm, streams))
    }

    /// Lets the guest run. Its end reaches whoever waits for the agent as a closed stream, for
    /// as long as the result lives.
    pub(super) fn start(&mut self) -> Result<Watch, VmError> {
        self.machine.start().map_err(VmError::Start)?;
        watch(&self.machine, self.dial.clone()).map_err(VmError::Watch)
    }

    /// The interfaces that the guest is to have from the start.
    pub(super) fn interfaces(&self) -> &[Interface] {
        match self.network.own {
            Some(_) => &[],
            None => &self.network.interfaces,
        }
    }

    /// Has the guest's network be found where `view` made a place for it, if it did.
    pub(super) fn await_network(&mut self, view: Option<&View>) {
        self.view = view.filter(|_| self.network.own.is_some()).cloned();
    }

    /// Has the guest's own ports be reached from its network namespace's.
    pub(super) fn forward(&mut self) {
        if let (Some(local), Some(guest)) =
            (self.network.local.take(), self.machine.vsock_connector())
        {
            forward::start(local, guest);
        }
    }

    /// Lets some time pass, unless the guest ends.
    pub(super) fn rest(&self, limit: Duration) {
        let ended = self.machine.ended();
        let limit = Timespec::try_from(limit).ok();
        let _ = poll(&mut [PollFd::new(&ended, PollFlags::IN)], limit.as_ref());
    }

    /// Has the guest stand still for ever and takes all that it is.
    pub(super) fn save(&self) -> Result<(MachineState, Arc<File>), SaveError> {
        self.machine.pause();
        let state = self.machine.save()?;
        let memory = self.machine.memory_file().ok_or(SaveError::NotPaused)?;
        Ok((state, Arc::clone(memory)))
    }
}

/// A directory as the file server takes it.
fn export(share: SharedDirectory) -> FsExport {
    FsExport {
        name: share.name,
        directory: share.directory,
        read_only: share.read_only,
        cache: match share.exclusive {
            true => CachePolicy::Always,
            false => CachePolicy::Auto,
        },
        known_by: share.known_by,
        // Neither the guest nor anybody else writes to it.
        immutable: share.read_only && share.exclusive,
    }
}

impl Guest for Vm {
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.machine.vsock_connect(port)
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.machine.ended()
    }

    fn ending(&self) -> Option<String> {
        let exit = self.machine.outcome().get()?;
        let mut text = match exit {
            VmExit::Reset if self.panicked() => "the guest's kernel panicked".to_owned(),
            exit => exit.to_string(),
        };
        let lines = Guest::console(self);
        if !lines.is_empty() {
            text.push_str("; its console's last lines:\n");
            text.push_str(&lines.join("\n"));
        }
        Some(text)
    }

    fn console(&self) -> Vec<String> {
        let mut lines = self.console.lines(usize::MAX);
        let first = panic_at(&lines).unwrap_or(lines.len().saturating_sub(LAST_LINES));
        lines.drain(..first);
        lines.truncate(LAST_LINES);
        lines
    }

    fn fs_requests(&self) -> u64 {
        self.machine.fs_stats().map_or(0, FsStats::total)
    }

    fn traffic(&self) -> Vec<InterfaceStats> {
        // Cards that still wait are nobody's.
        let cards = self.interfaces().iter().zip(&self.traffic);
        let of = |(interface, traffic): (&Interface, &Arc<Traffic>)| {
            let (received, sent) = (traffic.received.count(), traffic.sent.count());
            InterfaceStats {
                name: interface.name.clone(),
                rx_bytes: received.bytes,
                rx_packets: received.frames,
                rx_dropped: received.lost,
                tx_bytes: sent.bytes,
                tx_packets: sent.frames,
                tx_dropped: sent.lost,
            }
        };
        cards.map(of).collect()
    }

    fn find_network(&mut self) -> Option<Result<Request, JoinError>> {
        let (own, view) = (self.network.own.clone()?, self.view.clone()?);
        let tied = match view.tie_network(own) {
            Ok(Ok(tied)) => tied,
            Ok(Err(source)) => return Some(Err(JoinError::Own(source))),
            Err(gone) => return Some(Err(JoinError::View(gone))),
        };
        self.network.owner = tied.owner;
        self.network.local = tied.local;
        self.forward();
        let (_, none) = mpsc::channel();
        let asking = std::mem::replace(&mut self.asking, none);
        let resolver = tied.resolver.is_some();
        if let Some(server) = tied.resolver {
            forward::answer(server, asking, move || view.reach_resolver());
        }
        let interfaces = tied.interfaces;
        self.network.interfaces.clone_from(&interfaces);
        self.network.own = None;
        Some(Ok(Request::Network {
            interfaces,
            resolver,
        }))
    }

    fn moment(&self) -> Option<Moment> {
        self.machine.moment()
    }

    fn observed(&self) -> Option<WorkingSet> {
        self.machine.observed()
    }

    fn snapshot(&self) -> Result<(MachineState, MemoryImage), SnapshotError> {
        Ok((self.machine.save()?, self.machine.memory_image()?))
    }

    fn pause(&self) {
        self.machine.pause();
    }

    fn resume(&self) {
        self.machine.resume();
    }

    fn show(&self, shares: Vec<SharedDirectory>) -> io::Result<()> {
        let tree = self.machine.shares().ok_or(io::ErrorKind::Unsupported)?;
        tree.add(shares.into_iter().map(export).collect())
    }

    fn hide(&self, names: &[String]) {
        if let Some(tree) = self.machine.shares() {
            tree.remove(names);
        }
    }

    fn plug(&self, bytes: u64) {
        self.machine.request_memory(bytes);
    }

    fn plugged(&self) -> u64 {
        self.machine.extent().map_or(0, |extent| {
            extent.hear();
            extent.plugged()
        })
    }

    fn plugs(&self) -> Option<BorrowedFd<'_>> {
        Some(self.machine.extent()?.changed())
    }

    fn plug_refusal(&self) -> Option<String> {
        self.machine.extent()?.refusal()
    }

    fn stop(&mut self) {
        self.machine.stop();
    }
}

impl Vm {
    fn panicked(&self) -> bool {
        panic_at(&self.console.lines(usize::MAX)).is_some()
    }
}

/// The line in which the guest's kernel says that it gives up.
fn panic_at(lines: &[String]) -> Option<usize> {
    lines.iter().position(|line| line.contains("Kernel panic"))
}

fn watch(machine: &Machine, dial: Sender<UnixStream>) -> io::Result<Watch> {
    let (cancel, cancelled) = UnixStream::pair()?;
    let outcome = machine.outcome();
    let thread = thread::Builder::new()
        .name("boot-watch".to_owned())
        .stack_size(64 * 1024)
        .spawn(move || {
            let ended = outcome.ready();
            let mut fds = [
                PollFd::new(&ended, PollFlags::IN),
                PollFd::new(&cancelled, PollFlags::IN),
            ];
            while let Err(rustix::io::Errno::INTR) = poll(&mut fds, None) {}
            if !fds[0].revents().is_empty()
                && let Ok((closed, _)) = UnixStream::pair()
            {
                // Nobody listens any more: then nobody needs to know.
                let _ = dial.send(closed);
            }
        })?;
    Ok(Watch {
        cancel: Some(cancel),
        thread: Some(thread),
    })
}

impl Drop for Watch {
    fn drop(&mut self) {
        drop(self.cancel.take());
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}
