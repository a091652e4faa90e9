//! Images: references, registries, archives, and their layers on disk.
//!
//! Owns: what an image's name means, fetching it (distribution spec) or reading it from an
//! archive, the content-addressed store that all commands share, and unpacking layers in the form
//! overlayfs wants. Refuses: knowing what runs an image (no containers, no VMs, no mounts), and
//! trust: every byte from a registry or an archive is bounded, and its digest is checked before
//! it is used.
//!
//! ```text
//! Reference ─► ImageStore::pull ─► blobs/sha256/… ─► layers/<chain id>/ ─► overlay lower dirs
//! archive   ─► ImageStore::load ─┘   (compressed)      (unpacked once)
//! ```
//!
//! All calls here block. The one asynchronous part, the registry client, lives on a runtime that
//! exists only while a pull does.

#![forbid(unsafe_code)]

mod digest;
mod load;
mod manifest;
mod progress;
mod reference;
mod registry;
mod store;
#[cfg(feature = "testing")]
pub mod testing;
pub mod unpack;

pub use digest::{Digest, DigestError};
pub use load::LoadError;
pub use oci_spec::image::ImageConfiguration;
pub use progress::{Progress, Silent, Step};
pub use reference::{Reference, ReferenceError};
pub use registry::{Auth, Platform, PullError, PullOptions, Pulled};
pub use store::{Hold, Image, ImageStore, Layer, Reclaimed, Removed, StoreError};
