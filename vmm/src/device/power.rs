//! Two I/O ports by which a guest ends its machine.
//!
//! The keyboard controller's reset line, which Linux pulls for `reboot=k` and
//! as its last resort, and one port of ours for a shutdown, since a machine
//! without ACPI has no other. Nothing else of a keyboard controller is here.

/// Command and status port of the i8042.
pub const I8042_COMMAND: u16 = 0x64;
/// "Pulse the reset line."
const I8042_RESET: u8 = 0xfe;
/// A byte written here ends the machine: [`POWER_OFF`].
pub const POWER_PORT: u16 = 0x600;
/// The value that means shutdown.
pub const POWER_OFF: u8 = 0x34;

/// What a guest asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Reset.
    Reset,
    /// Shut down.
    Shutdown,
}

/// What a write of `data` to `port` asks for.
#[must_use]
pub fn request(port: u16, data: &[u8]) -> Option<Request> {
    match (port, data) {
        (I8042_COMMAND, [I8042_RESET]) => Some(Request::Reset),
        (POWER_PORT, [POWER_OFF]) => Some(Request::Shutdown),
        _ => None,
    }
}

/// What a read of `port` answers: the i8042's status says that nothing is pending, all
/// else floats.
#[must_use]
pub fn read(port: u16) -> u8 {
    if port == I8042_COMMAND { 0 } else { 0xff }
}
