//! The only place that waits for processes.
//!
//! Owns: reaping every child and every orphan, and how each ended. Refuses: to hold up the loop;
//! only at the agent's own end is anything waited for.

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

/// Waits for the next process to end; `None` once there is none left.
pub(crate) fn wait() -> Option<(Pid, ExitStatus)> {
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) => return Some((pid, status_of(status))),
            Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return None,
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
