//! A 16550 serial port, output only, for debugging a kernel before its console is up.
//!
//! Every byte costs an exit, so it is there only behind `debug_serial`. It
//! raises no interrupts: Linux's early console and its polling both do without.

use std::io::Write;

use serde::{Deserialize, Serialize};

/// The first port's base.
pub const COM1: u16 = 0x3f8;
/// How many ports it has.
pub const PORTS: u16 = 8;

/// Transmitter empty, holding register empty.
const LSR_IDLE: u8 = 0x60;
/// Line control: the divisor latch is visible.
const LCR_DIVISOR: u8 = 0x80;
/// Modem status: carrier, ready, clear to send.
const MSR_READY: u8 = 0xb0;
/// No interrupt pending.
const IIR_NONE: u8 = 0x01;

/// The port's registers.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Serial {
    registers: [u8; 8],
    divisor: [u8; 2],
}

impl Serial {
    /// A write of `value` to register `offset`; output goes to `sink`.
    ///
    /// A sink that fails loses the byte: there is nobody to tell.
    pub fn write(&mut self, offset: u16, value: u8, sink: &mut dyn Write) {
        let latch = self.registers[3] & LCR_DIVISOR != 0;
        match offset {
            0 | 1 if latch => self.divisor[usize::from(offset)] = value,
            0 => drop(sink.write_all(&[value])),
            1 | 3 | 4 | 7 => self.registers[usize::from(offset)] = value,
            _ => {}
        }
    }

    /// A read of register `offset`.
    #[must_use]
    pub fn read(&self, offset: u16) -> u8 {
        let latch = self.registers[3] & LCR_DIVISOR != 0;
        match offset {
            0 | 1 if latch => self.divisor[usize::from(offset)],
            0 => 0,
            2 => IIR_NONE,
            5 => LSR_IDLE,
            6 => MSR_READY,
            1 | 3 | 4 | 7 => self.registers[usize::from(offset)],
            _ => 0xff,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_go_out_but_not_those_of_the_divisor() {
        let (mut serial, mut sink) = (Serial::default(), Vec::new());
        serial.write(3, LCR_DIVISOR, &mut sink);
        serial.write(0, 12, &mut sink);
        assert_eq!(serial.read(0), 12);
        serial.write(3, 3, &mut sink);
        for byte in *b"hi" {
            assert_ne!(serial.read(5) & 0x20, 0);
            serial.write(0, byte, &mut sink);
        }
        assert_eq!(sink, b"hi");
        // The scratch register, by which a driver finds that there is a port.
        serial.write(7, 0x5a, &mut sink);
        assert_eq!((serial.read(7), serial.read(9)), (0x5a, 0xff));
    }
}
