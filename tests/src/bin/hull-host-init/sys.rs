//! The two system calls that no safe wrapper covers.
//!
//! Owns: new namespaces, and a child that leads a session on its terminal. Refuses:
//! everything that `rustix` or `std` does safely.
#![expect(
    unsafe_code,
    reason = "unshare and pre_exec have no safe form: the caller's threads and the child between fork and exec"
)]

use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Moves the calling thread to a new, empty network namespace.
///
/// # Errors
/// Those of unshare(2).
pub(crate) fn new_network_namespace() -> io::Result<()> {
    // SAFETY: descriptors stay shared among the threads: NEWNET doesn't touch the file table.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
}

/// Moves the calling thread to a copy of its mount namespace, and off the process's shared
/// current directory.
///
/// # Errors
/// Those of unshare(2).
pub(crate) fn new_mount_namespace() -> io::Result<()> {
    // SAFETY: descriptors stay shared among the threads: NEWNS doesn't touch the file table.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.map_err(io::Error::from)
}

/// Has the child lead a new session whose terminal is its standard input.
pub(crate) fn lead_session_on_stdin(command: &mut Command) {
    let lead = || {
        rustix::process::setsid()?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        Ok(())
    };
    // SAFETY: the closure makes two system calls and neither allocates nor locks, so it may run
    // between fork and exec.
    unsafe { command.pre_exec(lead) };
}
