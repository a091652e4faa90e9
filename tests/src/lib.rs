//! Whole-system tests' house: the emulated KVM host and what the test cases share.
//!
//! Owns: [`host`], [`measure`], and the fixture of the suites: [`hull`], its [`image`], a
//! [`process`] under test, other people's [`engine`]s, [`leftovers`], the table of [`cases`] with its
//! [`adapters`]. Refuses: to be part of any product; nothing but tests, bench and `xtask` depends on
//! it.

pub mod adapters;
pub mod cases;
pub mod engine;
pub mod host;
pub mod hull;
pub mod image;
pub mod leftovers;
pub mod measure;
pub mod process;
