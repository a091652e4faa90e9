//! The outer keeper: starts QEMU, and ends it once nobody has used it for a while.
//!
//! Owns: QEMU's life. Refuses: to talk to it beyond a signal.
//!
//! `supervise DIR SECONDS QEMU ARGS…`: DIR holds `alive` (locked as long as QEMU or its keeper
//! lives) and `users` (locked shared by each caller, its time of change the last use).

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Runs QEMU until it ends or has been idle for too long.
///
/// # Errors
/// When QEMU can't be started or the directory can't be used.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let [directory, seconds, qemu, rest @ ..] = arguments else {
        bail!("usage: supervise DIR SECONDS QEMU ARGS…");
    };
    // Off the caller's terminal. It fails only for a group's leader, who has none to lose.
    let _session = rustix::process::setsid();
    let directory = Path::new(directory);
    let limit = Duration::from_secs(seconds.parse().context("parse the idle time")?);
    let alive = File::create(directory.join("alive")).context("open the lock `alive`")?;
    rustix::fs::flock(&alive, FlockOperation::NonBlockingLockExclusive)
        .context("another machine runs in this directory")?;
    // QEMU inherits the lock: it stays true should this process be killed.
    rustix::io::fcntl_setfd(&alive, FdFlags::empty())?;
    let mut child = Command::new(qemu)
        .args(rest)
        .current_dir(directory)
        .stdin(Stdio::null())
        .spawn()
        .with_context(|| format!("start {qemu}"))?;
    fs::write(directory.join("pid"), child.id().to_string()).context("write the pid")?;
    // The far end of stdout waits for the machine, and for QEMU's end alone.
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    let handle = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())?;
    let mut wait = limit;
    loop {
        let timeout = Timespec::try_from(wait).context("the idle time is too long")?;
        let mut watched = [PollFd::new(&handle, PollFlags::IN)];
        match poll(&mut watched, Some(&timeout)) {
            Ok(0) => wait = left(directory, limit)?,
            Ok(_) => break,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for QEMU"),
        }
        if wait.is_zero() {
            pidfd_send_signal(&handle, Signal::TERM).context("end the idle machine")?;
            wait = limit;
        }
    }
    child.wait().context("reap QEMU")?;
    Ok(())
}

/// How long the machine may still be idle; zero when its time is over.
fn left(directory: &Path, limit: Duration) -> Result<Duration> {
    let users = File::open(directory.join("users")).context("open the lock `users`")?;
    if rustix::fs::flock(&users, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(limit);
    }
    let idle = users.metadata()?.modified()?.elapsed().unwrap_or_default();
    Ok(limit.saturating_sub(idle))
}
