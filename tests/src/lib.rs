//! Whole-system tests' house: the emulated KVM host and what the test cases share.
//!
//! Owns: [`host`], [`measure`]. Refuses: to be part of any product; nothing but tests, bench and
//! `xtask` depends on it.

pub mod host;
pub mod measure;
