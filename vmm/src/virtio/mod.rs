//! Virtio (1.3): the device trait, the one place where rings are parsed, the devices.
//!
//! Everything under here reads bytes that a guest wrote: nothing panics on
//! them, allocates by them without a cap, or trusts a length.

pub mod balloon;
pub mod block;
pub mod console;
pub mod device;
pub mod fs;
pub mod mem;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;
pub mod worker;
