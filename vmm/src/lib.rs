//! Hull's virtual machine: KVM, guest memory, virtio devices, snapshots.
//!
//! A contents page. `spec` says what is asked, `machine` builds and drives it,
//! `kvm` is the only room with ioctls, `memory` the only one that maps guest
//! RAM, `virtio` reads what guests write. Nothing in here knows what a
//! container or an image is, and nothing in here opens a path.

pub mod boot;
pub mod bus;
pub mod device;
pub mod kvm;
pub mod machine;
pub mod memory;
pub mod outcome;
pub mod spec;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod vcpu;
pub mod virtio;
