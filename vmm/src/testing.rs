//! The driver's side of a ring, scripted: what tests and fuzz targets drive devices with.
//!
//! [`GuestQueue`] lays a split ring out in guest RAM, adds chains (direct,
//! indirect or made by hand, however hostile) and takes used entries back.
//! [`FakeIrq`] counts interrupts, [`FakeWakers`] remembers what is watched.
//! Test code: it panics when a test is wrong.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::missing_panics_doc,
    reason = "test code: a failure is the test's"
)]

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::memory::GuestRam;
use crate::virtio::device::{Activation, Interest, Persist, VirtioDevice, Wakers};
use crate::virtio::queue::{Interrupt, Queue, QueueState};
use crate::virtio::transport::Lines;

/// `VIRTQ_DESC_F_NEXT`.
pub const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE`.
pub const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT`.
pub const INDIRECT: u16 = 4;

/// Guest RAM of `size_bytes` from address 0.
#[must_use]
pub fn guest_ram(size_bytes: usize) -> GuestRam {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), size_bytes)]).unwrap())
}

/// Counts the interrupts of each queue.
#[derive(Debug, Default)]
pub struct FakeIrq([AtomicUsize; 16]);

impl FakeIrq {
    /// How often queue `index` raised its interrupt since the last call.
    pub fn take(&self, index: usize) -> usize {
        self.0[index].swap(0, Ordering::SeqCst)
    }
}

impl Interrupt for FakeIrq {
    fn raise(&self, index: usize) {
        self.0[index].fetch_add(1, Ordering::SeqCst);
    }
}

impl Lines for FakeIrq {
    fn pulse(&self, index: usize) {
        self.raise(index);
    }
}

/// Remembers which descriptors are watched, for what, under which token.
#[derive(Debug, Default)]
pub struct FakeWakers(Mutex<BTreeMap<RawFd, (Interest, u32)>>);

impl FakeWakers {
    /// What is watched now.
    pub fn watched(&self) -> BTreeMap<RawFd, (Interest, u32)> {
        self.0.lock().unwrap().clone()
    }

    /// The tokens watched now, sorted.
    pub fn tokens(&self) -> Vec<u32> {
        let mut tokens: Vec<u32> = self.watched().values().map(|(_, token)| *token).collect();
        tokens.sort_unstable();
        tokens
    }
}

impl Wakers for FakeWakers {
    fn watch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()> {
        match self
            .0
            .lock()
            .unwrap()
            .insert(fd.as_raw_fd(), (interest, token))
        {
            None => Ok(()),
            Some(_) => Err(io::ErrorKind::AlreadyExists.into()),
        }
    }

    fn rewatch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()> {
        match self.0.lock().unwrap().get_mut(&fd.as_raw_fd()) {
            Some(entry) => *entry = (interest, token),
            None => return Err(io::ErrorKind::NotFound.into()),
        }
        Ok(())
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match self.0.lock().unwrap().remove(&fd.as_raw_fd()) {
            Some(_) => Ok(()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// One part of a chain.
#[derive(Debug, Clone)]
pub enum Part {
    /// A buffer with these bytes, which the device may read.
    Read(Vec<u8>),
    /// A buffer of this many bytes (filled with 0xAA), which the device may write.
    Write(u32),
}

/// A raw descriptor, as hostile as one likes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawDescriptor {
    /// Guest-physical address.
    pub address: u64,
    /// Length in bytes.
    pub length: u32,
    /// [`NEXT`], [`WRITE`], [`INDIRECT`].
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl RawDescriptor {
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// An entry of the used ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub head: u16,
    /// Bytes written, as the device says.
    pub length: u32,
    /// What stands in the chain's writable buffers, whole, in order (empty for raw chains).
    pub written: Vec<u8>,
}

/// The driver's side of one queue.
pub struct GuestQueue {
    memory: GuestRam,
    state: QueueState,
    next_descriptor: u16,
    next_data: u64,
    data_end: u64,
    avail_index: u16,
    used_index: u16,
    writable: BTreeMap<u16, Vec<(u64, u32)>>,
}

impl GuestQueue {
    /// A ring of `size` entries laid out from `base` (page-aligned, not 0), its
    /// buffers behind it up to `base + room_bytes`. With `VIRTIO_F_EVENT_IDX` off.
    #[must_use]
    pub fn new(memory: &GuestRam, base: u64, size: u16, room_bytes: u64) -> Self {
        let entries = u64::from(size);
        let desc_table = base;
        let avail_ring = desc_table + 16 * entries;
        let used_ring = (avail_ring + 6 + 2 * entries).next_multiple_of(4);
        let next_data = (used_ring + 6 + 8 * entries).next_multiple_of(4096);
        assert!(next_data < base + room_bytes, "no room for the ring");
        Self {
            memory: Arc::clone(memory),
            state: QueueState {
                max_size: size,
                size,
                ready: true,
                event_idx: false,
                desc_table,
                avail_ring,
                used_ring,
                next_avail: 0,
                next_used: 0,
            },
            next_descriptor: 0,
            next_data,
            data_end: base + room_bytes,
            avail_index: 0,
            used_index: 0,
            writable: BTreeMap::new(),
        }
    }

    /// Where the ring lies: what a driver writes to the transport.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.state
    }

    /// Turns `VIRTIO_F_EVENT_IDX` on for queues made from here on.
    pub fn use_event_idx(&mut self) {
        self.state.event_idx = true;
    }

    /// The device's side of it, as queue `index`.
    #[must_use]
    pub fn device_side(&self, index: usize, irq: &Arc<FakeIrq>) -> Queue {
        let irq: Arc<dyn Interrupt> = Arc::<FakeIrq>::clone(irq);
        Queue::new(&self.state, index, Arc::clone(&self.memory), irq).unwrap()
    }

    /// Reserves `length` bytes of guest RAM for a buffer.
    pub fn allocate(&mut self, length: usize) -> u64 {
        let address = self.next_data;
        self.next_data += (length as u64).next_multiple_of(16);
        assert!(self.next_data <= self.data_end, "no room for a buffer");
        address
    }

    fn place(&mut self, parts: &[Part]) -> Vec<RawDescriptor> {
        parts
            .iter()
            .map(|part| match part {
                Part::Read(bytes) => {
                    let address = self.allocate(bytes.len());
                    self.memory
                        .write_slice(bytes, GuestAddress(address))
                        .unwrap();
                    let length = bytes.len().try_into().unwrap();
                    RawDescriptor {
                        address,
                        length,
                        flags: 0,
                        next: 0,
                    }
                }
                Part::Write(length) => {
                    let address = self.allocate(*length as usize);
                    let fill = vec![0xAA; *length as usize];
                    self.memory
                        .write_slice(&fill, GuestAddress(address))
                        .unwrap();
                    RawDescriptor {
                        address,
                        length: *length,
                        flags: WRITE,
                        next: 0,
                    }
                }
            })
            .collect()
    }

    fn remember(&mut self, head: u16, descriptors: &[RawDescriptor]) {
        let writable = descriptors.iter().filter(|d| d.flags & WRITE != 0);
        self.writable
            .insert(head, writable.map(|d| (d.address, d.length)).collect());
    }

    /// Adds a chain of descriptors in the table; returns its head.
    pub fn add(&mut self, parts: &[Part]) -> u16 {
        let mut descriptors = self.place(parts);
        let head = self.next_descriptor;
        let last = descriptors.len() - 1;
        for (i, descriptor) in descriptors.iter_mut().enumerate() {
            if i < last {
                descriptor.flags |= NEXT;
                descriptor.next = (head + i as u16 + 1) % self.state.size;
            }
        }
        for (i, descriptor) in descriptors.iter().enumerate() {
            self.write_descriptor((head + i as u16) % self.state.size, *descriptor);
        }
        self.next_descriptor = (head + descriptors.len() as u16) % self.state.size;
        self.remember(head, &descriptors);
        self.publish(head);
        head
    }

    /// Adds a chain behind one indirect descriptor; returns its head.
    pub fn add_indirect(&mut self, parts: &[Part]) -> u16 {
        let mut descriptors = self.place(parts);
        let last = descriptors.len() - 1;
        for (i, descriptor) in descriptors.iter_mut().enumerate() {
            if i < last {
                descriptor.flags |= NEXT;
                descriptor.next = i as u16 + 1;
            }
        }
        let head = self.next_descriptor;
        self.remember(head, &descriptors);
        self.add_indirect_table(&descriptors)
    }

    /// Adds an indirect table just as it is; returns its head.
    pub fn add_indirect_table(&mut self, table: &[RawDescriptor]) -> u16 {
        let bytes: Vec<u8> = table.iter().flat_map(RawDescriptor::bytes).collect();
        let address = self.allocate(bytes.len());
        self.memory
            .write_slice(&bytes, GuestAddress(address))
            .unwrap();
        let length = bytes.len().try_into().unwrap();
        let head = self.next_descriptor;
        self.write_descriptor(
            head,
            RawDescriptor {
                address,
                length,
                flags: INDIRECT,
                next: 0,
            },
        );
        self.next_descriptor = (head + 1) % self.state.size;
        self.publish(head);
        head
    }

    /// Writes one descriptor of the table just as it is.
    pub fn write_descriptor(&self, index: u16, descriptor: RawDescriptor) {
        let address = self.state.desc_table + 16 * u64::from(index);
        self.memory
            .write_slice(&descriptor.bytes(), GuestAddress(address))
            .unwrap();
    }

    /// Makes the chain at `head` available, whatever stands there.
    pub fn publish(&mut self, head: u16) {
        let entry = u64::from(self.avail_index % self.state.size);
        let address = GuestAddress(self.state.avail_ring + 4 + 2 * entry);
        self.memory.write_obj(head.to_le(), address).unwrap();
        self.set_avail_index(self.avail_index.wrapping_add(1));
    }

    /// Sets the available ring's index just as given.
    pub fn set_avail_index(&mut self, index: u16) {
        self.avail_index = index;
        let address = GuestAddress(self.state.avail_ring + 2);
        self.memory
            .store(index.to_le(), address, Ordering::Release)
            .unwrap();
    }

    /// Sets the available ring's flags (1: no interrupts).
    pub fn set_avail_flags(&self, flags: u16) {
        self.memory
            .write_obj(flags.to_le(), GuestAddress(self.state.avail_ring))
            .unwrap();
    }

    /// Sets `used_event`: with event indices, interrupt when this entry has been used.
    pub fn set_used_event(&self, index: u16) {
        let address = self.state.avail_ring + 4 + 2 * u64::from(self.state.size);
        self.memory
            .write_obj(index.to_le(), GuestAddress(address))
            .unwrap();
    }

    /// Takes the next used entry, if the device has filled one.
    pub fn pop_used(&mut self) -> Option<Used> {
        let ring = self.state.used_ring;
        let index: u16 = self
            .memory
            .load(GuestAddress(ring + 2), Ordering::Acquire)
            .unwrap();
        if u16::from_le(index) == self.used_index {
            return None;
        }
        let entry = ring + 4 + 8 * u64::from(self.used_index % self.state.size);
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let length: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        self.used_index = self.used_index.wrapping_add(1);
        let head = u16::try_from(u32::from_le(head)).unwrap();
        let mut written = Vec::new();
        for (address, length) in self.writable.remove(&head).unwrap_or_default() {
            let mut part = vec![0; length as usize];
            self.memory
                .read_slice(&mut part, GuestAddress(address))
                .unwrap();
            written.extend_from_slice(&part);
        }
        Some(Used {
            head,
            length: u32::from_le(length),
            written,
        })
    }
}

/// A device between scripted queues: activated, with one [`GuestQueue`] per queue.
pub struct Bench<D: VirtioDevice> {
    /// The device.
    pub device: D,
    /// The driver's side of its queues.
    pub guest: Vec<GuestQueue>,
    /// The device's side of them.
    pub queues: Vec<Queue>,
    /// Its interrupts.
    pub irq: Arc<FakeIrq>,
    /// What it watches.
    pub wakers: Arc<FakeWakers>,
    /// Guest RAM: 16 MiB.
    pub memory: GuestRam,
}

impl<D: VirtioDevice> Bench<D> {
    /// Activates `device` with all its features and a 1 MiB room for each queue.
    #[must_use]
    pub fn new(mut device: D) -> Self {
        let memory = guest_ram(16 << 20);
        let irq = Arc::new(FakeIrq::default());
        let wakers = Arc::new(FakeWakers::default());
        let guest: Vec<GuestQueue> = device
            .queue_sizes()
            .iter()
            .zip(1u64..)
            .map(|(size, place)| GuestQueue::new(&memory, place << 20, *size, 1 << 20))
            .collect();
        let queues = guest
            .iter()
            .enumerate()
            .map(|(i, q)| q.device_side(i, &irq))
            .collect();
        let watching: Arc<dyn Wakers> = Arc::<FakeWakers>::clone(&wakers);
        let features = device.features();
        let activation = Activation {
            features,
            wakers: watching,
        };
        device.activate(activation).unwrap();
        Self {
            device,
            guest,
            queues,
            irq,
            wakers,
            memory,
        }
    }

    /// Kicks queue `index`.
    ///
    /// # Errors
    /// What the device says.
    pub fn kick(&mut self, index: usize) -> Result<(), crate::virtio::device::DeviceError> {
        self.device.on_queue(index, &mut self.queues)
    }

    /// Adds a chain to queue `index`, kicks it and takes the used entry.
    pub fn round_trip(&mut self, index: usize, parts: &[Part]) -> Used {
        let head = self.guest[index].add(parts);
        self.kick(index).unwrap();
        let used = self.guest[index]
            .pop_used()
            .expect("the device completed nothing");
        assert_eq!(used.head, head);
        used
    }
}

/// Saves `from`, sends the state through bytes, applies it to `to` and checks that
/// `to` then saves the same. Every device passes this.
pub fn persist_roundtrip<D: Persist>(from: &D, to: &mut D) {
    let saved = rmp_serde::to_vec(&from.save().unwrap()).unwrap();
    to.restore(rmp_serde::from_slice(&saved).unwrap()).unwrap();
    assert_eq!(rmp_serde::to_vec(&to.save().unwrap()).unwrap(), saved);
}
