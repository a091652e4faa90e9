//! What both faces do with a bundle: read it, make its container, run its hooks, remove it.
//!
//! Owns: the order of these. Refuses: command lines, containerd's words, and what is on the far
//! side of the engine.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod features;
pub mod hooks;
pub mod lifecycle;
