//! Devices that aren't virtio: what a guest needs to reset itself, and to be debugged.

pub mod power;
pub mod serial;
