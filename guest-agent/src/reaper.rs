//! The only place that waits for processes.
//!
//! Owns: reaping every child and every orphan, and how each ended. Refuses: to wait for one.

use hull_proto::ExitStatus;
use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions, WaitStatus};

/// Takes every process that has ended.
pub(crate) fn reap() -> Vec<(Pid, ExitStatus)> {
    let mut ended = Vec::new();
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) => ended.push((pid, status_of(status))),
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return ended,
        }
    }
}

/// How a process ended; whether for want of memory, its container's cgroup knows.
fn status_of(status: WaitStatus) -> ExitStatus {
    let byte = |number: i32| u8::try_from(number).unwrap_or(u8::MAX);
    match status.terminating_signal() {
        Some(signal) => ExitStatus::Signaled {
            signal: byte(signal),
            oom: false,
        },
        None => ExitStatus::Exited(byte(status.exit_status().unwrap_or(255))),
    }
}
