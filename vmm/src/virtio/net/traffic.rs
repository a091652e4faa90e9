//! What has gone over a card, counted where the host's end of it is.

use std::sync::atomic::{AtomicU64, Ordering};

/// Both ways of a card, since it was made.
#[derive(Debug, Default)]
pub struct Traffic {
    /// To the guest.
    pub received: Flow,
    /// From it.
    pub sent: Flow,
}

/// One way of a card: a frame is one however large it is, and its header isn't counted.
#[derive(Debug, Default)]
pub struct Flow {
    bytes: AtomicU64,
    frames: AtomicU64,
    lost: AtomicU64,
}

/// A flow at a moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Bytes of frames that have arrived.
    pub bytes: u64,
    /// How many those are.
    pub frames: u64,
    /// Frames that haven't.
    pub lost: u64,
}

impl Flow {
    /// What has gone by now.
    #[must_use]
    pub fn count(&self) -> Count {
        Count {
            bytes: self.bytes.load(Ordering::Relaxed),
            frames: self.frames.load(Ordering::Relaxed),
            lost: self.lost.load(Ordering::Relaxed),
        }
    }

    pub(super) fn pass(&self, bytes: usize) {
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        self.frames.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn lose(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
    }
}
