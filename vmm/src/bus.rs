//! Where the guest's accesses outside RAM go: addresses to devices.
//!
//! Virtio slots stand one after the other from [`MMIO_BASE`], each with one
//! interrupt line; a few I/O ports are decoded by hand. What nobody answers
//! reads as all ones, and is no error: kernels probe.

use std::io::Write;
use std::sync::{Arc, Mutex};

use crate::device::power::{self, Request};
use crate::device::serial::{COM1, PORTS, Serial};
use crate::outcome::lock;
use crate::virtio::transport::{Slot, WINDOW_BYTES};

/// Guest-physical address of the first slot's registers.
pub const MMIO_BASE: u64 = 0xd000_0000;

/// The interrupt line of slot `index`: those of the I/O APIC that no legacy device has.
#[must_use]
pub fn line_of(index: usize) -> Option<u8> {
    const LINES: [u8; 16] = [5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22];
    LINES.get(index).copied()
}

/// Guest-physical address of slot `index`'s registers.
#[must_use]
pub fn address_of(index: usize) -> u64 {
    MMIO_BASE + WINDOW_BYTES * index as u64
}

/// Where console output goes: shared by the console device and the serial port.
pub type Sink = Arc<Mutex<Box<dyn Write + Send>>>;

/// A serial port and where its output goes.
pub struct SerialPort {
    port: Mutex<Serial>,
    sink: Sink,
}

/// All that answers outside RAM.
pub struct Bus {
    slots: Vec<Arc<Slot>>,
    serial: Option<SerialPort>,
}

impl Bus {
    /// A bus with these slots in order and, for debugging, a serial port.
    #[must_use]
    pub fn new(slots: Vec<Arc<Slot>>, serial: Option<Sink>) -> Self {
        let serial = serial.map(|sink| SerialPort {
            port: Mutex::default(),
            sink,
        });
        Self { slots, serial }
    }

    /// The slots, in order.
    #[must_use]
    pub fn slots(&self) -> &[Arc<Slot>] {
        &self.slots
    }

    fn slot(&self, address: u64) -> Option<(&Slot, u64)> {
        let offset = address.checked_sub(MMIO_BASE)?;
        let index = usize::try_from(offset / WINDOW_BYTES).ok()?;
        Some((self.slots.get(index)?, offset % WINDOW_BYTES))
    }

    /// The guest reads memory that isn't RAM.
    pub fn mmio_read(&self, address: u64, data: &mut [u8]) {
        match self.slot(address) {
            Some((slot, offset)) => slot.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes memory that isn't RAM.
    pub fn mmio_write(&self, address: u64, data: &[u8]) {
        if let Some((slot, offset)) = self.slot(address) {
            slot.write(offset, data);
        }
    }

    fn serial(&self, port: u16) -> Option<(&SerialPort, u16)> {
        let serial = self.serial.as_ref()?;
        let register = port
            .checked_sub(COM1)
            .filter(|register| *register < PORTS)?;
        Some((serial, register))
    }

    /// The serial port's registers, where there is one.
    #[must_use]
    pub fn serial_state(&self) -> Option<Serial> {
        self.serial
            .as_ref()
            .map(|serial| lock(&serial.port).clone())
    }

    /// Sets the serial port's registers, where there is one.
    pub fn restore_serial(&self, state: Serial) {
        if let Some(serial) = &self.serial {
            *lock(&serial.port) = state;
        }
    }

    /// The guest reads an I/O port.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        match (self.serial(port), data) {
            (Some((serial, register)), [byte]) => *byte = lock(&serial.port).read(register),
            (_, data) => data.fill(power::read(port)),
        }
    }

    /// The guest writes an I/O port; what it may ask for by that.
    pub fn port_write(&self, port: u16, data: &[u8]) -> Option<Request> {
        match (self.serial(port), data) {
            (Some((serial, register)), [byte]) => {
                let mut sink = lock(&serial.sink);
                lock(&serial.port).write(register, *byte, sink.as_mut());
                None
            }
            _ => power::request(port, data),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::MAX_DEVICES;

    #[test]
    fn every_slot_has_a_line_and_an_address_of_its_own() {
        let lines: std::collections::BTreeSet<_> = (0..MAX_DEVICES).map(line_of).collect();
        assert_eq!(lines.len(), MAX_DEVICES);
        assert!(!lines.contains(&None));
        assert_eq!(address_of(2), MMIO_BASE + 0x2000);
    }

    #[test]
    fn what_nobody_answers_floats() {
        let bus = Bus::new(Vec::new(), None);
        let mut data = [0; 4];
        bus.mmio_read(MMIO_BASE, &mut data);
        assert_eq!(data, [0xff; 4]);
        bus.mmio_read(0, &mut data);
        bus.mmio_read(u64::MAX, &mut data);
        bus.mmio_write(u64::MAX, &data);
        let mut byte = [0];
        bus.port_read(COM1 + 5, &mut byte);
        assert_eq!(byte, [0xff]);
        assert_eq!(bus.port_write(0x64, &[0xfe]), Some(Request::Reset));
        assert_eq!(bus.port_write(0x64, &[0x20]), None);
        assert_eq!(bus.port_write(0x600, &[0x34]), Some(Request::Shutdown));
    }
}
