//! What a virtio device is to the rest of the machine.
//!
//! A device owns its own words with the driver (configuration space, requests)
//! and its own host resources. It never sees epoll, threads, registers or
//! interrupts: the transport negotiates, one worker decides which thread calls
//! it, and completing a chain through its [`Queue`] raises the interrupt when
//! the ring asks for it.
//!
//! ```text
//!  new ─► restore? ─► activate ─► on_queue / on_event … ─► reset ─► (activate again)
//!                        read_config / write_config: at any time
//! ```
//!
//! All calls of one device are serialised by a lock: no method runs while
//! another one of the same device does.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::queue::{Queue, QueueError};

/// What a device does when something can't go on.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The guest broke a rule of the device: it alone stops (`DEVICE_NEEDS_RESET`).
    #[error("guest broke a rule of the device: {0}")]
    Guest(String),
    /// A ring or a descriptor chain was malformed: as `Guest`.
    #[error("guest handed over a broken queue")]
    Queue(#[from] QueueError),
    /// The host lacks something the device can't live without: the VM stops with the cause.
    #[error("cannot {what}")]
    Host {
        /// What was tried, as in "register the connection's socket".
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Why a saved state can't be applied.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes aren't a state of this unit.
    #[error("state of unit \"{unit}\" can't be read")]
    Decode {
        /// The unit's name.
        unit: String,
        /// What serde says.
        #[source]
        source: rmp_serde::decode::Error,
    },
    /// The unit's state has no form in bytes: a bug of the unit.
    #[error("state of unit \"{unit}\" can't be written")]
    Encode {
        /// The unit's name.
        unit: &'static str,
        /// What serde says.
        #[source]
        source: rmp_serde::encode::Error,
    },
    /// The state is readable, but doesn't fit the device it is applied to.
    #[error("state of unit \"{unit}\" doesn't fit: {why}")]
    Mismatch {
        /// The unit's name.
        unit: String,
        /// What differs.
        why: String,
    },
    /// The unit can't be saved as it stands.
    #[error("unit \"{unit}\" can't be saved: {why}")]
    Unsaveable {
        /// The unit's name.
        unit: &'static str,
        /// What stands against it.
        why: String,
    },
    /// The snapshot holds nothing for a unit that the machine has.
    #[error("snapshot has no state for unit \"{0}\"")]
    Missing(String),
    /// The snapshot holds something for a unit that the machine hasn't.
    #[error("snapshot has a state for unit \"{0}\", which this machine lacks")]
    Unknown(String),
}

/// Why there is no state to take as a unit stands now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unsaveable(pub String);

/// A unit of state that a snapshot holds under its name.
///
/// The state is a struct of its own; new fields carry `#[serde(default)]`.
pub trait Persist {
    /// The unit's name in the snapshot, the same forever.
    const UNIT: &'static str;
    /// All that a freshly built unit needs to go on where this one stands.
    type State: Serialize + DeserializeOwned;

    /// Takes the state. Called only while vCPUs and workers stand still.
    ///
    /// # Errors
    /// [`Unsaveable`] when the unit can't be saved as it stands.
    fn save(&self) -> Result<Self::State, Unsaveable>;

    /// Applies a state to a freshly built unit, before [`VirtioDevice::activate`].
    ///
    /// # Errors
    /// [`RestoreError::Mismatch`] when the unit was built from another spec.
    fn restore(&mut self, state: Self::State) -> Result<(), RestoreError>;
}

/// For which readiness a descriptor is watched. Level-triggered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// Nothing but errors and hang-ups (which are always reported).
    None,
    /// Readable, or the peer has shut down its writing side.
    Read,
    /// Writable.
    Write,
    /// Either.
    ReadWrite,
}

/// What a watched descriptor reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Readiness {
    /// A read won't block: data, end of file or an error to fetch.
    pub readable: bool,
    /// A write won't block.
    pub writable: bool,
    /// The other side is gone in both directions, or the descriptor has an error.
    pub hangup: bool,
}

/// How a device asks to be called when one of its descriptors is ready.
///
/// A device may keep it (it is handed an owned one at activation) and add and
/// remove descriptors as its connections come and go. All descriptors of a
/// device are forgotten when it is reset.
pub trait Wakers: Send + Sync {
    /// Calls [`VirtioDevice::on_event`] with `token` whenever `fd` is ready for `interest`.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    fn watch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()>;

    /// Changes what a watched descriptor waits for.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    fn rewatch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()>;

    /// Stops watching; to be called before the descriptor is closed.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    fn unwatch(&self, fd: BorrowedFd<'_>) -> io::Result<()>;
}

/// All that an activated device gets to work with.
#[derive(Clone)]
pub struct Activation {
    /// The features that both sides agreed on.
    pub features: u64,
    /// To be called when descriptors are ready.
    pub wakers: Arc<dyn Wakers>,
}

/// A virtio device.
pub trait VirtioDevice: Persist + Send {
    /// The device type (virtio 1.3 §5).
    const ID: u32;

    /// The largest size of each queue: powers of two, the same for the device's whole life.
    fn queue_sizes(&self) -> &[u16];

    /// The device's own feature bits; those of the ring and `VERSION_1` are the transport's.
    fn features(&self) -> u64 {
        0
    }

    /// Fills `data` from the configuration space; what lies beyond it reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver wrote to the configuration space; ignored by most devices.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready (`DRIVER_OK`), or a restored machine is about to resume.
    ///
    /// # Errors
    /// [`DeviceError::Host`] when a descriptor can't be watched.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;

    /// The driver kicked queue `index`, or a restore asks to look at it again.
    ///
    /// `queues` are all queues of the device, in order; one that the driver
    /// didn't set up pops nothing. A device that leaves chains in a queue is
    /// called again at the next kick only.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError>;

    /// A descriptor registered under `token` is ready. It may be a late report of a
    /// descriptor that was just unwatched.
    ///
    /// # Errors
    /// See [`DeviceError`].
    fn on_event(
        &mut self,
        _token: u32,
        _readiness: Readiness,
        _queues: &mut [Queue],
    ) -> Result<(), DeviceError> {
        Ok(())
    }

    /// The driver reset the device: back to the state of a freshly built one.
    fn reset(&mut self);

    /// A region of guest-physical memory the device shares (virtio 1.3 §2.10), by its id.
    fn shared_memory(&self, _id: u8) -> Option<SharedMemory> {
        None
    }
}

/// Where a shared memory region lies in the guest's physical address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SharedMemory {
    /// Guest-physical address of the first byte.
    pub base: u64,
    /// Length in bytes.
    pub length_bytes: u64,
}

/// A device whose type is erased: what the transport and the worker hold.
pub trait DynDevice: Send {
    /// See [`VirtioDevice::ID`].
    fn id(&self) -> u32;
    /// See [`Persist::UNIT`].
    fn unit(&self) -> &'static str;
    /// See [`VirtioDevice::queue_sizes`].
    fn queue_sizes(&self) -> &[u16];
    /// See [`VirtioDevice::features`].
    fn features(&self) -> u64;
    /// See [`VirtioDevice::read_config`].
    fn read_config(&self, offset: u64, data: &mut [u8]);
    /// See [`VirtioDevice::write_config`].
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// See [`VirtioDevice::activate`].
    ///
    /// # Errors
    /// As there.
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError>;
    /// See [`VirtioDevice::on_queue`].
    ///
    /// # Errors
    /// As there.
    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError>;
    /// See [`VirtioDevice::on_event`].
    ///
    /// # Errors
    /// As there.
    fn on_event(
        &mut self,
        token: u32,
        readiness: Readiness,
        queues: &mut [Queue],
    ) -> Result<(), DeviceError>;
    /// See [`VirtioDevice::reset`].
    fn reset(&mut self);
    /// See [`VirtioDevice::shared_memory`].
    fn shared_memory(&self, id: u8) -> Option<SharedMemory>;
    /// See [`Persist::save`].
    ///
    /// # Errors
    /// [`RestoreError::Unsaveable`], and [`RestoreError::Encode`].
    fn save(&self) -> Result<Vec<u8>, RestoreError>;
    /// See [`Persist::restore`].
    ///
    /// # Errors
    /// As there, and [`RestoreError::Decode`].
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError>;
}

impl<D: VirtioDevice> DynDevice for D {
    fn id(&self) -> u32 {
        D::ID
    }
    fn unit(&self) -> &'static str {
        D::UNIT
    }
    fn queue_sizes(&self) -> &[u16] {
        VirtioDevice::queue_sizes(self)
    }
    fn features(&self) -> u64 {
        VirtioDevice::features(self)
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        VirtioDevice::read_config(self, offset, data);
    }
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        VirtioDevice::write_config(self, offset, data);
    }
    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        VirtioDevice::activate(self, activation)
    }
    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        VirtioDevice::on_queue(self, index, queues)
    }
    fn on_event(
        &mut self,
        token: u32,
        readiness: Readiness,
        queues: &mut [Queue],
    ) -> Result<(), DeviceError> {
        VirtioDevice::on_event(self, token, readiness, queues)
    }
    fn reset(&mut self) {
        VirtioDevice::reset(self);
    }
    fn shared_memory(&self, id: u8) -> Option<SharedMemory> {
        VirtioDevice::shared_memory(self, id)
    }
    fn save(&self) -> Result<Vec<u8>, RestoreError> {
        let state = Persist::save(self)
            .map_err(|Unsaveable(why)| RestoreError::Unsaveable { unit: D::UNIT, why })?;
        rmp_serde::to_vec(&state).map_err(|source| RestoreError::Encode {
            unit: D::UNIT,
            source,
        })
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), RestoreError> {
        let state = rmp_serde::from_slice(state).map_err(|source| RestoreError::Decode {
            unit: D::UNIT.to_owned(),
            source,
        })?;
        Persist::restore(self, state)
    }
}

/// Fills `data` from a configuration space whose bytes are `config`; zeros beyond it.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(rest) = usize::try_from(offset).ok().and_then(|o| config.get(o..)) else {
        return;
    };
    let count = rest.len().min(data.len());
    for (to, from) in data.iter_mut().zip(rest.iter().take(count)) {
        *to = *from;
    }
}
