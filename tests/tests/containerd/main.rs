//! Hull under Debian's own containerd: what `ctr` sees of it, what it sees of runc, and what is
//! left when the shim, the monitor or containerd are killed.
//!
//! Owns: containerd and its shim. Refuses: what a guest's process sees; that is the suite `run`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failure is the test's"
)]

mod calls;
mod checkpoints;
mod daemon;
mod kills;
mod same;
mod sandbox;
mod streams;
