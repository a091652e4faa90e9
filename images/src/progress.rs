//! What a pull, a load or an unpack says while it works.
//!
//! Owns: the words. Refuses: printing; callers draw bars or stay silent.

use crate::digest::Digest;

/// One step in the life of one blob or layer.
///
/// Order for a layer that must be fetched: `Waiting`, `Downloading`…, `Downloaded`, `Unpacking`…,
/// `Ready`. A layer that is already here goes straight to `Ready`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Part of the image, not begun.
    Waiting {
        /// Bytes of the blob as declared by the manifest.
        total_bytes: u64,
    },
    /// Bytes have arrived (also the first report after a resume, with what was already there).
    Downloading {
        /// Bytes of the blob on disk so far.
        done_bytes: u64,
        /// Bytes of the whole blob.
        total_bytes: u64,
    },
    /// A transient failure; another attempt follows.
    Retrying {
        /// Number of the attempt that follows, from 2.
        attempt: u32,
        /// What went wrong.
        reason: String,
    },
    /// The blob is complete and its digest is right.
    Downloaded,
    /// The layer is being unpacked.
    Unpacking {
        /// Compressed bytes consumed so far.
        done_bytes: u64,
        /// Compressed bytes of the whole layer.
        total_bytes: u64,
    },
    /// The layer is here, unpacked.
    Ready,
}

/// Receives progress. Called from several threads at once; must not block for long.
pub trait Progress: Send + Sync {
    /// The reference was resolved to an image with these layers (digest, compressed bytes), base
    /// first. Called once, before any step.
    fn layers(&self, layers: &[(Digest, u64)]) {
        let _ = layers;
    }

    /// A layer, named by the digest of its blob, has come to `step`.
    fn step(&self, layer: &Digest, step: Step) {
        let _ = (layer, step);
    }
}

/// Progress that nobody looks at.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {}
