//! A slot driven through its registers, as a driver does it, and as one shouldn't.

use std::sync::mpsc;
use std::time::Duration;

use super::*;
use crate::testing::{GuestQueue, Part, guest_ram};
use crate::virtio::console::Console;
use crate::virtio::rng::Rng;
use crate::virtio::worker::Worker;

const FEATURES_OK_STEPS: [u32; 3] = [1, 3, 11];

struct Driver {
    slot: Arc<Slot>,
    guest: GuestQueue,
    pulses: mpsc::Sender<()>,
    interrupts: mpsc::Receiver<()>,
    worker: Option<Worker>,
}

/// Counts the pulses of every line.
impl Lines for mpsc::Sender<()> {
    fn pulse(&self, _index: usize) {
        // A test that has ended counts no more.
        let _ = self.send(());
    }
}

impl Driver {
    fn new() -> Self {
        let memory = guest_ram(4 << 20);
        let outcome = Arc::new(Outcome::new().unwrap());
        let (pulses, interrupts) = mpsc::channel();
        let board = Board {
            window: None,
            memory: Arc::clone(&memory).into(),
            lines: Arc::new(pulses.clone()),
            outcome,
        };
        let poller = Poller::new().unwrap();
        let slot = Arc::new(Slot::new(0, Box::new(Rng), &board, &poller).unwrap());
        let worker = Worker::start("devices", poller, vec![(0, Arc::clone(&slot))]).unwrap();
        let guest = GuestQueue::new(&memory, 0x1000, 16, 1 << 20);
        Self {
            slot,
            guest,
            pulses,
            interrupts,
            worker: Some(worker),
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut word = [0; 4];
        self.slot.read(offset, &mut word);
        u32::from_le_bytes(word)
    }

    fn write(&self, offset: u64, value: u32) {
        self.slot.write(offset, &value.to_le_bytes());
    }

    fn choose(&self, features: u64) {
        for (select, half) in [(0, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x24, select);
            self.write(0x20, half);
        }
    }

    /// Up to `DRIVER_OK`, with the queue where `guest` has it.
    fn bring_up(&self, features: u64) {
        self.write(0x70, 0);
        FEATURES_OK_STEPS[..2]
            .iter()
            .for_each(|status| self.write(0x70, *status));
        self.choose(features);
        self.write(0x70, FEATURES_OK_STEPS[2]);
        let state = self.guest.state();
        self.write(0x30, 0);
        self.write(0x38, u32::from(state.size));
        for (register, address) in [
            (0x80, state.desc_table),
            (0x90, state.avail_ring),
            (0xa0, state.used_ring),
        ] {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(0x44, 1);
        self.write(0x70, 15);
    }

    /// Waits until the interrupt line is raised.
    fn wait_for_interrupt(&self) {
        let limit = Duration::from_secs(20);
        self.interrupts
            .recv_timeout(limit)
            .expect("no interrupt came");
        // Those that came before it was looked at are one.
        while self.interrupts.try_recv().is_ok() {}
    }

    fn ask(&mut self, bytes: u32) -> usize {
        self.guest.add(&[Part::Write(bytes)]);
        self.slot.ring(0);
        self.wait_for_interrupt();
        assert_eq!(self.read(0x60), USED_BUFFER);
        self.write(0x64, USED_BUFFER);
        assert_eq!(self.read(0x60), 0);
        self.guest.pop_used().unwrap().length as usize
    }
}

#[test]
fn a_driver_finds_the_device_and_talks_to_it() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(0x00), MAGIC);
    assert_eq!((driver.read(0x04), driver.read(0x08)), (2, 4));
    assert_eq!(driver.read(0x34), 64);
    // No shared memory: all ones.
    assert_eq!((driver.read(0xb0), driver.read(0xbc)), (u32::MAX, u32::MAX));
    driver.write(0x14, 1);
    assert_eq!(driver.read(0x10), 1);
    driver.bring_up(VERSION_1);
    assert_eq!(driver.read(0x70), 15);
    assert_eq!(driver.ask(32), 32);
    assert_eq!(driver.ask(64), 64);
    // Odd accesses do nothing.
    let mut odd = [7; 3];
    driver.slot.read(0x01, &mut odd);
    assert_eq!(odd, [0; 3]);
    driver.slot.write(0x70, &[0]);
    assert_eq!(driver.read(0x70), 15);
}

#[test]
fn features_that_were_not_offered_are_not_accepted() {
    let driver = Driver::new();
    for features in [0, 1 << 40 | VERSION_1, 1 | VERSION_1, EVENT_IDX] {
        driver.bring_up(features);
        assert_eq!(
            driver.read(0x70) & (FEATURES_OK | DRIVER_OK),
            0,
            "{features:#x}"
        );
    }
    driver.bring_up(EVENT_IDX | VERSION_1);
    assert_eq!(driver.read(0x70), 15);
    // Once accepted they stay.
    driver.choose(0);
    assert_eq!(
        lock(&driver.slot.shared).registers.driver_features,
        EVENT_IDX | VERSION_1
    );
}

#[test]
fn a_broken_ring_stops_the_device_until_it_is_reset() {
    let mut driver = Driver::new();
    driver.bring_up(VERSION_1);
    driver.guest.publish(99);
    driver.slot.ring(0);
    driver.wait_for_interrupt();
    assert_eq!(driver.read(0x60), CONFIG_CHANGE);
    assert_eq!(driver.read(0x70), 15 | NEEDS_RESET);
    // It stays down, whatever the driver kicks or writes.
    driver.slot.ring(0);
    driver.write(0x70, 15);
    assert_eq!(driver.read(0x70), 15 | NEEDS_RESET);
    driver.write(0x70, 0);
    assert_eq!(
        (driver.read(0x70), driver.read(0x60), driver.read(0x44)),
        (0, 0, 0)
    );
    let memory = guest_ram(4 << 20);
    driver.guest = GuestQueue::new(&memory, 0x1000, 16, 1 << 20);
    // Rings outside memory: refused at DRIVER_OK.
    driver.guest = GuestQueue::new(&guest_ram(16 << 20), 8 << 20, 16, 1 << 20);
    driver.bring_up(VERSION_1);
    assert_eq!(driver.read(0x70) & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn a_paused_worker_stands_still() {
    let mut driver = Driver::new();
    driver.bring_up(VERSION_1);
    let worker = driver.worker.take().unwrap();
    worker.pause();
    driver.guest.add(&[Part::Write(8)]);
    driver.slot.ring(0);
    worker.pause();
    assert!(driver.guest.pop_used().is_none());
    worker.resume();
    driver.wait_for_interrupt();
    assert!(driver.guest.pop_used().is_some());
}

#[test]
fn a_restored_slot_goes_on_where_the_saved_one_stood() {
    let mut driver = Driver::new();
    driver.bring_up(VERSION_1 | EVENT_IDX);
    driver.guest.set_used_event(0);
    driver.ask(16);
    let worker = driver.worker.take().unwrap();
    worker.pause();
    // A request that was added, but not seen yet.
    driver.guest.set_used_event(1);
    driver.guest.add(&[Part::Write(16)]);
    let bytes = rmp_serde::to_vec(&driver.slot.save().unwrap()).unwrap();
    drop(worker);

    let memory = lock(&driver.slot.shared).queues[0].memory().into();
    let board = Board {
        window: None,
        memory,
        lines: Arc::new(driver.pulses.clone()),
        outcome: Arc::new(Outcome::new().unwrap()),
    };
    let poller = Poller::new().unwrap();
    let copy = Arc::new(Slot::new(0, Box::new(Rng), &board, &poller).unwrap());
    copy.restore(rmp_serde::from_slice(&bytes).unwrap())
        .unwrap();
    assert_eq!(copy.save().unwrap(), driver.slot.save().unwrap());
    driver.slot = Arc::clone(&copy);
    driver.worker = Some(Worker::start("devices", poller, vec![(0, copy)]).unwrap());
    driver.wait_for_interrupt();
    assert_eq!(driver.guest.pop_used().unwrap().length, 16);

    // Another device's state doesn't fit.
    let poller = Poller::new().unwrap();
    let sink: crate::bus::Sink = Arc::new(Mutex::new(Box::new(std::io::sink())));
    let other = Slot::new(0, Box::new(Console::new(sink, None)), &board, &poller).unwrap();
    let refused = other.restore(rmp_serde::from_slice(&bytes).unwrap());
    assert!(matches!(refused, Err(RestoreError::Mismatch { .. })));
}
