//! From the spec's list of devices to slots: what each is made of, where it is connected.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::BuildError;
use crate::bus::{Sink, address_of, line_of};
use crate::kvm::{KvmError, Vm};
use crate::spec::DeviceSpec;
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::device::DynDevice;
use crate::virtio::fs::{Fs, FsExport, FsLimits, FsRole, FsStats, Shares};
use crate::virtio::mem::{Extent, Mem, Region};
use crate::virtio::net::{Net, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{Board, QUEUE_NOTIFY, Slot};
use crate::virtio::vsock::{Connector, Vsock};
use crate::virtio::worker::Poller;

/// The workers' epolls: what waits for the host's disk may take long, all others don't.
pub(super) struct Pollers {
    pub(super) devices: Arc<Poller>,
    pub(super) fs: Arc<Poller>,
}

/// What building devices leaves behind, beside the slots.
#[derive(Default)]
pub(super) struct Devices {
    pub(super) slots: Vec<Arc<Slot>>,
    pub(super) vsock: Option<Connector>,
    pub(super) fs_stats: Option<Arc<FsStats>>,
    pub(super) shares: Option<Shares>,
    pub(super) extent: Option<Arc<Extent>>,
}

/// What the devices take from the host, taken one by one.
pub(super) struct Supplies<'a> {
    pub(super) vm: &'a Vm,
    /// Where memory that comes and goes can lie.
    pub(super) place_of_blocks: u64,
    pub(super) sink: Sink,
    pub(super) console_input: Option<OwnedFd>,
    pub(super) blocks: std::vec::IntoIter<File>,
    pub(super) taps: std::vec::IntoIter<Tap>,
    pub(super) vsock_ports: BTreeMap<u32, Sender<UnixStream>>,
    pub(super) fs_exports: Vec<FsExport>,
    pub(super) fs_role: FsRole,
    pub(super) fs_limits: FsLimits,
}

impl Devices {
    /// Makes one device and its slot: the only place that knows all kinds.
    pub(super) fn add(
        &mut self,
        spec: &DeviceSpec,
        supplies: &mut Supplies<'_>,
        board: &Board,
        pollers: &Pollers,
    ) -> Result<(), BuildError> {
        let failed = |device| move |source| BuildError::Device { device, source };
        let device: Box<dyn DynDevice> = match spec {
            DeviceSpec::Fs(spec) => {
                let exports = std::mem::take(&mut supplies.fs_exports);
                let (role, limits) = (supplies.fs_role, supplies.fs_limits);
                let window = board.window.clone();
                let fs = Fs::new(spec, exports, role, limits, window).map_err(failed("fs"))?;
                self.fs_stats = Some(fs.stats());
                self.shares = Some(fs.shares());
                Box::new(fs)
            }
            DeviceSpec::Vsock(vsock) => {
                let ports = std::mem::take(&mut supplies.vsock_ports);
                let vsock = Vsock::new(vsock.guest_cid, ports).map_err(failed("vsock"))?;
                self.vsock = Some(vsock.connector());
                Box::new(vsock)
            }
            DeviceSpec::Net(net) => {
                let tap = supplies.taps.next().ok_or(BuildError::NoHost("net"))?;
                Box::new(Net::new(*net, tap).map_err(failed("net"))?)
            }
            DeviceSpec::Console => Box::new(Console::new(
                Arc::clone(&supplies.sink),
                supplies.console_input.take(),
            )),
            DeviceSpec::Block(block) => {
                let file = supplies.blocks.next().ok_or(BuildError::NoHost("block"))?;
                let made = Block::new(file, block);
                Box::new(made.map_err(failed("block"))?)
            }
            DeviceSpec::Balloon => Box::new(Balloon),
            DeviceSpec::Rng => Box::new(Rng),
            DeviceSpec::Mem(mem) => {
                let region = Region {
                    address: supplies.place_of_blocks,
                    length: mem.region_bytes,
                    block_bytes: mem.block_bytes(),
                };
                let blocks = Box::new(supplies.vm.blocks(region));
                let mem = Mem::new(region, blocks).map_err(failed("mem"))?;
                self.extent = Some(mem.extent());
                Box::new(mem)
            }
        };
        let unit = device.unit();
        let poller = if waits_for_disk(unit) {
            &pollers.fs
        } else {
            &pollers.devices
        };
        let slot = Slot::new(self.slots.len(), device, board, poller).map_err(failed(unit))?;
        self.slots.push(Arc::new(slot));
        Ok(())
    }
}

/// Whether a device's requests are the host's disk's, and take as long.
pub(super) fn waits_for_disk(unit: &str) -> bool {
    unit == "fs" || unit == "block"
}

/// Connects every slot's doorbells to KVM.
pub(super) fn connect(vm: &Vm, slots: &[Arc<Slot>]) -> Result<(), KvmError> {
    for (index, slot) in slots.iter().enumerate() {
        for (queue, doorbell) in (0u32..).zip(slot.doorbells()) {
            vm.ioeventfd(doorbell.as_fd(), address_of(index) + QUEUE_NOTIFY, queue)?;
        }
    }
    Ok(())
}

/// The command line with where the devices are (Linux `drivers/virtio/virtio_mmio.c`).
pub(super) fn with_devices(cmdline: &str, slots: usize) -> String {
    let mut line = cmdline.to_owned();
    for index in 0..slots {
        if let Some(irq) = line_of(index) {
            let space = if line.is_empty() { "" } else { " " };
            // Writing to a String can't fail.
            let _ = write!(
                line,
                "{space}virtio_mmio.device=4K@{:#x}:{irq}",
                address_of(index)
            );
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{CMDLINE_RESERVE_BYTES, MAX_DEVICES};

    #[test]
    fn the_kernel_is_told_where_the_devices_are() {
        assert_eq!(with_devices("quiet", 0), "quiet");
        assert_eq!(
            with_devices("quiet", 2),
            "quiet virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6"
        );
        assert!(with_devices("", MAX_DEVICES).len() < CMDLINE_RESERVE_BYTES);
    }
}
