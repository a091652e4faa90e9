//! What a virtual machine is asked to be: plain data, and the one place that checks it.
//!
//! Knows nothing of the host: descriptors come in beside it, in
//! `Host`. Only a [`Checked`] spec can be built.

use serde::{Deserialize, Serialize};

/// The most vCPUs a machine can have: what the multiprocessor table is tested for.
pub const MAX_VCPUS: u8 = 32;
/// The least memory in which a kernel comes up.
pub const MIN_MEMORY_BYTES: u64 = 32 << 20;
/// The most memory: 1 TiB, well within 40 guest-physical address bits.
pub const MAX_MEMORY_BYTES: u64 = 1 << 40;
/// Linux's limit on x86-64 (`COMMAND_LINE_SIZE`), the closing zero included.
pub const MAX_CMDLINE_BYTES: usize = 2048;
/// The room that `Machine::build` keeps for what it appends.
pub const CMDLINE_RESERVE_BYTES: usize = 768;
/// The longest tag of an fs device (virtio 1.3 §5.11.4).
pub const MAX_FS_TAG_BYTES: usize = 36;
/// The largest DAX window: each of its chunks is a mapping, and so a bounded resource.
pub const MAX_DAX_WINDOW_BYTES: u64 = 2 << 30;
/// The longest serial of a block device (virtio 1.3 §5.2.6).
pub const MAX_BLOCK_SERIAL_BYTES: usize = 20;
/// The lowest CID a guest may have; those below are the protocol's own (virtio 1.3 §5.10.4).
pub const MIN_GUEST_CID: u64 = 3;

/// What a memory device's size is a multiple of: Linux adds memory in units as large, on x86-64.
pub const MEM_UNIT_BYTES: u64 = 128 << 20;
/// The most blocks of a memory device: each is a slot of KVM's, of which there are 32764.
const MAX_MEM_BLOCKS: u64 = 8192;

/// The smallest MTU (virtio 1.3 §5.1.4.1).
pub const MIN_MTU: u16 = 68;

/// A virtual machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmSpec {
    /// How many vCPUs, 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM.
    pub memory: MemorySpec,
    /// The kernel's command line, without what the machine appends for its devices.
    pub kernel_cmdline: String,
    /// The devices, in the order of [`DeviceSpec`]'s variants.
    pub devices: Vec<DeviceSpec>,
    /// Adds a 16550 serial port whose output goes where the console's goes.
    #[serde(default)]
    pub debug_serial: bool,
}

/// Guest RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemorySpec {
    /// Size in bytes, a multiple of 2 MiB.
    pub size_bytes: u64,
    /// Where its pages come from.
    #[serde(default)]
    pub backing: MemoryBacking,
}

/// Where guest RAM's pages come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryBacking {
    /// Private anonymous memory, zero until touched.
    #[default]
    Anonymous,
    /// A memory file of the machine's own, shared: what a template is saved from.
    Shared,
    /// A private mapping of a template's memory, given as a file in
    /// `Host`: pages are copied when written.
    Template,
}

/// A device, by kind. The order of the variants is the order in the machine: the same
/// devices stand at the same addresses in every machine that has them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceSpec {
    /// Host directories over virtio-fs.
    Fs(FsSpec),
    /// Streams between host and guest.
    Vsock(VsockSpec),
    /// A network card.
    Net(NetSpec),
    /// The kernel's log, one way.
    Console,
    /// A disk.
    Block(BlockSpec),
    /// What takes back the memory that the guest has free.
    Balloon,
    /// Randomness.
    Rng,
    /// Memory that comes and goes while the guest runs.
    Mem(MemSpec),
}

/// An fs device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsSpec {
    /// The name the guest mounts it by: 1 to [`MAX_FS_TAG_BYTES`] bytes.
    pub tag: String,
    /// Size of the DAX window in bytes, a multiple of 2 MiB up to [`MAX_DAX_WINDOW_BYTES`]; 0
    /// for none.
    #[serde(default)]
    pub dax_window_bytes: u64,
}

/// A vsock device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address, at least [`MIN_GUEST_CID`].
    pub guest_cid: u64,
}

/// A network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Its address: one card's, not a group's.
    pub mac: [u8; 6],
    /// The largest packet, at least [`MIN_MTU`].
    pub mtu: u16,
}

/// A block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// The guest can't write to it.
    #[serde(default)]
    pub read_only: bool,
    /// What the guest reads as its serial number: at most [`MAX_BLOCK_SERIAL_BYTES`] bytes.
    #[serde(default)]
    pub serial: String,
    /// A flush is answered when the host's disk has all that was written; otherwise at once, and
    /// what was written is lost when the host crashes.
    pub durable: bool,
}

/// A memory device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemSpec {
    /// The most that the guest can be given beyond its RAM, in bytes: a multiple of
    /// [`MEM_UNIT_BYTES`].
    pub region_bytes: u64,
}

impl MemSpec {
    /// The bytes that come and go at once: 2 MiB, more where that would make too many blocks.
    #[must_use]
    pub fn block_bytes(&self) -> u64 {
        let least = self.region_bytes.div_ceil(MAX_MEM_BLOCKS).max(2 << 20);
        least.next_power_of_two()
    }
}

/// Why a spec can't be built.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SpecError {
    /// Too many vCPUs, or none.
    #[error("{0} vCPUs asked for: 1 to {MAX_VCPUS} are possible")]
    Vcpus(u8),
    /// Too much memory, too little, or no multiple of 2 MiB.
    #[error(
        "{0} bytes of memory asked for: possible are multiples of 2 MiB from {min} MiB to {max} GiB",
        min = MIN_MEMORY_BYTES >> 20, max = MAX_MEMORY_BYTES >> 30
    )]
    Memory(u64),
    /// A command line the kernel would cut.
    #[error("kernel command line of {0} bytes is too long: {max} are possible",
        max = MAX_CMDLINE_BYTES - CMDLINE_RESERVE_BYTES)]
    CmdlineLength(usize),
    /// A command line with a byte that can't stand in one.
    #[error("kernel command line holds a byte that is no printable ASCII character")]
    CmdlineByte,
    /// Devices out of order.
    #[error("devices are out of order: {0} stands behind {1}")]
    Order(&'static str, &'static str),
    /// A device that can be there once only.
    #[error("more than one {0} device")]
    Twice(&'static str),
    /// An fs tag that is empty, too long or has a zero byte.
    #[error("fs tag {0:?} isn't one of 1 to {MAX_FS_TAG_BYTES} bytes without a zero")]
    FsTag(String),
    /// A DAX window that is no multiple of 2 MiB, or too large.
    #[error("DAX window of {0} bytes: possible are multiples of 2 MiB up to {max} MiB",
        max = MAX_DAX_WINDOW_BYTES >> 20)]
    DaxWindow(u64),
    /// A CID that isn't a guest's.
    #[error("vsock guest CID {0} is reserved")]
    GuestCid(u64),
    /// A MAC that is a group's, or nobody's.
    #[error("network card with MAC {0:02x?}: it isn't one card's address")]
    Mac([u8; 6]),
    /// An MTU too small.
    #[error("network card with an MTU of {0}: at least {MIN_MTU} is possible")]
    Mtu(u16),
    /// A memory device for nothing, too much, or no multiple of 128 MiB.
    #[error(
        "memory device of {0} bytes: possible are multiples of {min} MiB up to {max} GiB",
        min = MEM_UNIT_BYTES >> 20, max = MAX_MEMORY_BYTES >> 30
    )]
    Mem(u64),
    /// A block serial too long.
    #[error("block serial {0:?} is longer than {MAX_BLOCK_SERIAL_BYTES} bytes")]
    BlockSerial(String),
    /// More devices than there are interrupt lines.
    #[error("{0} devices asked for: {MAX_DEVICES} are possible")]
    Devices(usize),
}

/// How many devices a machine can have: one interrupt line each of the I/O APIC's.
pub const MAX_DEVICES: usize = 16;

/// Something that passed its check; only [`VmSpec::validate`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked<T>(T);

impl<T> Checked<T> {
    /// Takes it out of its seal.
    pub fn into_spec(self) -> T {
        self.0
    }
}

impl<T> std::ops::Deref for Checked<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl DeviceSpec {
    /// Its place among the kinds, its name, and whether a machine can have several.
    fn kind(&self) -> (u8, &'static str, bool) {
        match self {
            Self::Fs(_) => (0, "fs", false),
            Self::Vsock(_) => (1, "vsock", false),
            Self::Net(_) => (2, "net", true),
            Self::Console => (3, "console", false),
            Self::Block(_) => (4, "block", true),
            Self::Balloon => (5, "balloon", false),
            Self::Rng => (6, "rng", false),
            Self::Mem(_) => (7, "mem", false),
        }
    }

    fn check(&self) -> Result<(), SpecError> {
        match self {
            Self::Fs(fs) => {
                if fs.tag.is_empty() || fs.tag.len() > MAX_FS_TAG_BYTES || fs.tag.contains('\0') {
                    return Err(SpecError::FsTag(fs.tag.clone()));
                }
                let window = fs.dax_window_bytes;
                if !window.is_multiple_of(2 << 20) || window > MAX_DAX_WINDOW_BYTES {
                    return Err(SpecError::DaxWindow(window));
                }
            }
            Self::Vsock(vsock) => {
                if vsock.guest_cid < MIN_GUEST_CID || vsock.guest_cid >= u64::from(u32::MAX) {
                    return Err(SpecError::GuestCid(vsock.guest_cid));
                }
            }
            Self::Net(net) => {
                if net.mac == [0; 6] || net.mac[0] & 1 != 0 {
                    return Err(SpecError::Mac(net.mac));
                }
                if net.mtu < MIN_MTU {
                    return Err(SpecError::Mtu(net.mtu));
                }
            }
            Self::Block(block) => {
                if block.serial.len() > MAX_BLOCK_SERIAL_BYTES {
                    return Err(SpecError::BlockSerial(block.serial.clone()));
                }
            }
            Self::Mem(mem) => {
                let bytes = mem.region_bytes;
                if !bytes.is_multiple_of(MEM_UNIT_BYTES) || !(1..=MAX_MEMORY_BYTES).contains(&bytes)
                {
                    return Err(SpecError::Mem(bytes));
                }
            }
            Self::Console | Self::Balloon | Self::Rng => {}
        }
        Ok(())
    }
}

impl VmSpec {
    /// Checks everything that can be checked without the host.
    ///
    /// # Errors
    /// The first rule of [`SpecError`] that is broken.
    pub fn validate(self) -> Result<Checked<Self>, SpecError> {
        if self.vcpus == 0 || self.vcpus > MAX_VCPUS {
            return Err(SpecError::Vcpus(self.vcpus));
        }
        let size = self.memory.size_bytes;
        if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&size) || !size.is_multiple_of(2 << 20) {
            return Err(SpecError::Memory(size));
        }
        if self.kernel_cmdline.len() > MAX_CMDLINE_BYTES - CMDLINE_RESERVE_BYTES {
            return Err(SpecError::CmdlineLength(self.kernel_cmdline.len()));
        }
        if !self
            .kernel_cmdline
            .bytes()
            .all(|b| b == b' ' || b.is_ascii_graphic())
        {
            return Err(SpecError::CmdlineByte);
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(SpecError::Devices(self.devices.len()));
        }
        for pair in self.devices.windows(2) {
            let [before, after] = pair else { continue };
            let ((place, name, several), (next, next_name, _)) = (before.kind(), after.kind());
            if next < place {
                return Err(SpecError::Order(next_name, name));
            }
            if next == place && !several {
                return Err(SpecError::Twice(name));
            }
        }
        for device in &self.devices {
            device.check()?;
        }
        Ok(Checked(self))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> VmSpec {
        VmSpec {
            vcpus: 1,
            memory: MemorySpec {
                size_bytes: 128 << 20,
                backing: MemoryBacking::Anonymous,
            },
            kernel_cmdline: "quiet".to_owned(),
            devices: vec![
                DeviceSpec::Fs(FsSpec {
                    tag: "root".to_owned(),
                    dax_window_bytes: 0,
                }),
                DeviceSpec::Vsock(VsockSpec { guest_cid: 3 }),
                net([2, 0, 0, 0, 0, 1], 1500),
                net([2, 0, 0, 0, 0, 2], u16::MAX),
                DeviceSpec::Console,
                DeviceSpec::Block(BlockSpec {
                    read_only: true,
                    serial: String::new(),
                    durable: true,
                }),
                DeviceSpec::Block(BlockSpec {
                    read_only: false,
                    serial: "scratch".to_owned(),
                    durable: false,
                }),
                DeviceSpec::Balloon,
                DeviceSpec::Rng,
                DeviceSpec::Mem(MemSpec {
                    region_bytes: 1 << 30,
                }),
            ],
            debug_serial: false,
        }
    }

    fn net(mac: [u8; 6], mtu: u16) -> DeviceSpec {
        DeviceSpec::Net(NetSpec { mac, mtu })
    }

    fn broken(change: impl FnOnce(&mut VmSpec)) -> SpecError {
        let mut spec = spec();
        change(&mut spec);
        spec.validate().unwrap_err()
    }

    #[test]
    fn a_full_spec_passes_and_survives_its_json() {
        let json = serde_json::to_string(&spec()).unwrap();
        assert_eq!(serde_json::from_str::<VmSpec>(&json).unwrap(), spec());
        assert_eq!(spec().validate().unwrap().into_spec(), spec());
    }

    #[test]
    fn blocks_are_small_and_not_too_many() {
        for (gib, mib) in [(1, 2), (16, 2), (17, 4), (1024, 128)] {
            let mem = MemSpec {
                region_bytes: gib << 30,
            };
            assert_eq!(mem.block_bytes() >> 20, mib);
        }
    }

    #[test]
    fn each_rule_is_held() {
        assert_eq!(broken(|s| s.vcpus = 0), SpecError::Vcpus(0));
        assert_eq!(broken(|s| s.vcpus = 33), SpecError::Vcpus(33));
        assert_eq!(broken(|s| s.memory.size_bytes = 1), SpecError::Memory(1));
        assert_eq!(
            broken(|s| s.memory.size_bytes += 4096),
            SpecError::Memory((128 << 20) + 4096)
        );
        assert_eq!(
            broken(|s| s.kernel_cmdline = "a\nb".to_owned()),
            SpecError::CmdlineByte
        );
        assert_eq!(
            broken(|s| s.kernel_cmdline = "a".repeat(1600)),
            SpecError::CmdlineLength(1600)
        );
        assert_eq!(
            broken(|s| s.devices.swap(0, 1)),
            SpecError::Order("fs", "vsock")
        );
        assert_eq!(
            broken(|s| s.devices.insert(s.devices.len() - 1, DeviceSpec::Rng)),
            SpecError::Twice("rng")
        );
        for region_bytes in [0, 2 << 20, (1 << 40) + (128 << 20)] {
            let mem = DeviceSpec::Mem(MemSpec { region_bytes });
            assert_eq!(
                broken(|s| *s.devices.last_mut().unwrap() = mem),
                SpecError::Mem(region_bytes)
            );
        }
        assert_eq!(
            broken(|s| s.devices[1] = DeviceSpec::Vsock(VsockSpec { guest_cid: 2 })),
            SpecError::GuestCid(2)
        );
        for mac in [[0; 6], [0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
            assert_eq!(
                broken(|s| s.devices[2] = net(mac, 1500)),
                SpecError::Mac(mac)
            );
        }
        assert_eq!(
            broken(|s| s.devices[3] = net([2; 6], 67)),
            SpecError::Mtu(67)
        );
        assert_eq!(
            broken(|s| s.devices[0] = DeviceSpec::Fs(FsSpec {
                tag: String::new(),
                dax_window_bytes: 0
            })),
            SpecError::FsTag(String::new())
        );
        assert_eq!(
            broken(|s| s.devices[0] = DeviceSpec::Fs(FsSpec {
                tag: "r".to_owned(),
                dax_window_bytes: 4096
            })),
            SpecError::DaxWindow(4096)
        );
    }
}
