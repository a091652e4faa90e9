//! What strangers' bytes reach, as fuzz targets.
//!
//! Owns: one function for each parser that faces a guest, an image or a registry, and the table
//! of them. `cargo xtask fuzz` runs them under libFuzzer; `tests/replay.rs` runs the seeds of
//! `corpus/` through them as ordinary tests. Refuses: checking results that a unit test could
//! check: a target asserts only what must hold for every input.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failure is the finding"
)]

mod devices;
mod guest;
mod images;
mod words;

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rustix::process::{Resource, Rlimit, setrlimit};

/// A target: any bytes, no panic.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: &[(&str, Target)] = &[
    ("frames", words::frames),
    ("control", words::control),
    ("spec", words::spec),
    ("queue", devices::queue),
    ("registers", devices::registers),
    ("block", devices::block),
    ("console", devices::console),
    ("net", devices::net),
    ("vsock", devices::vsock),
    ("fs", devices::fs),
    ("mem", devices::mem),
    ("layer", images::layer),
    ("document", images::document),
    ("reference", images::reference),
    ("archive", images::archive),
];

/// The target called `name`.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    let found = TARGETS.iter().find(|(known, _)| *known == name);
    found.map(|(_, target)| *target)
}

/// Keeps what a target writes small: a file beyond 1 MiB is `EFBIG`, and no input fills a disk.
pub fn bound_files() {
    const MOST_BYTES: u64 = 1 << 20;
    let ignored = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGXFSZ, ignored).unwrap();
    let limit = Rlimit {
        current: Some(MOST_BYTES),
        maximum: Some(MOST_BYTES),
    };
    setrlimit(Resource::Fsize, limit).unwrap();
}
