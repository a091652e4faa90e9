//! Each of Hull's processes killed at each of its moments: what was promised still holds, and
//! nothing is left.
//!
//! Owns: what happens when the command, the monitor, a load or a pull is killed. Refuses: faults
//! of requests and images; they are the suite `bad_input`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failure is the test's"
)]

#[path = "../bad_input/archive.rs"]
#[allow(dead_code, reason = "the suite bad_input uses the rest")]
mod archive;
mod counts;
mod face;
mod moments;
mod monitor;
#[path = "../bad_input/registry.rs"]
#[allow(dead_code, reason = "the suite bad_input uses the rest")]
mod registry;
mod store;
