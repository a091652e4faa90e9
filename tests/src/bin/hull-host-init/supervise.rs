//! The outer keeper: starts QEMU and its file server, and ends them once nobody has used the
//! machine for a while.
//!
//! Owns: the lives of both. Refuses: to talk to them beyond a signal.
//!
//! `supervise DIR SECONDS VIRTIOFSD ARGS… -- QEMU ARGS…`: DIR holds `alive` (locked as long as
//! QEMU or its keeper lives) and `users` (locked shared by each caller, its time of change the
//! last use).

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hull_tests::host::wire::LIVE_SOCKET;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;
use rustix::io::FdFlags;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Runs QEMU until it ends or has been idle for too long.
///
/// # Errors
/// When one of the two can't be started or the directory can't be used.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    const USAGE: &str = "usage: supervise DIR SECONDS VIRTIOFSD ARGS… -- QEMU ARGS…";
    let [directory, seconds, commands @ ..] = arguments else {
        bail!(USAGE);
    };
    let mut commands = commands.splitn(2, |argument| argument == "--");
    let (Some(server), Some(qemu)) = (commands.next(), commands.next()) else {
        bail!(USAGE);
    };
    // Off the caller's terminal. It fails only for a group's leader, who has none to lose.
    let _session = rustix::process::setsid();
    let directory = Path::new(directory);
    std::env::set_current_dir(directory).context("enter the machine's directory")?;
    let limit = Duration::from_secs(seconds.parse().context("parse the idle time")?);
    let alive = File::create("alive").context("open the lock `alive`")?;
    rustix::fs::flock(&alive, FlockOperation::NonBlockingLockExclusive)
        .context("another machine runs in this directory")?;
    let mut server = serve_files(server)?;
    // QEMU inherits the lock: it stays true should this process be killed.
    rustix::io::fcntl_setfd(&alive, FdFlags::empty())?;
    let mut qemu = start(qemu, Stdio::null())?;
    fs::write("pid", qemu.id().to_string()).context("write the pid")?;
    // The far end of stdout waits for the machine, and for QEMU's end alone.
    let null = File::options().write(true).open("/dev/null")?;
    rustix::stdio::dup2_stdout(&null)?;
    let outcome = watch(&qemu, &server, limit);
    // Whichever is left: one without the other is of no use.
    let _gone = (qemu.kill(), server.kill());
    qemu.wait().context("reap QEMU")?;
    server.wait().context("reap the file server")?;
    outcome
}

/// Starts the server of live directories on a socket that is there before QEMU looks for it.
fn serve_files(server: &[String]) -> Result<Child> {
    let _absent = fs::remove_file(LIVE_SOCKET);
    let socket = UnixListener::bind(LIVE_SOCKET).context("make the file server's socket")?;
    start(server, Stdio::from(OwnedFd::from(socket)))
}

fn start(command: &[String], stdin: Stdio) -> Result<Child> {
    let (program, arguments) = command.split_first().context("a command is missing")?;
    Command::new(program)
        .args(arguments)
        .stdin(stdin)
        .spawn()
        .with_context(|| format!("start {program}"))
}

/// Returns when QEMU is to be ended, or one of the two has ended.
fn watch(qemu: &Child, server: &Child, limit: Duration) -> Result<()> {
    let qemu = pidfd_open(Pid::from_child(qemu), PidfdFlags::empty())?;
    let server = pidfd_open(Pid::from_child(server), PidfdFlags::empty())?;
    let mut wait = limit;
    while !wait.is_zero() {
        let timeout = Timespec::try_from(wait).context("the idle time is too long")?;
        let mut watched = [&qemu, &server].map(|process| PollFd::new(process, PollFlags::IN));
        match poll(&mut watched, Some(&timeout)) {
            Ok(0) => wait = left(limit)?,
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error).context("wait for QEMU"),
        }
    }
    Ok(())
}

/// How long the machine may still be idle; zero when its time is over.
fn left(limit: Duration) -> Result<Duration> {
    let users = File::open("users").context("open the lock `users`")?;
    if rustix::fs::flock(&users, FlockOperation::NonBlockingLockExclusive).is_err() {
        return Ok(limit);
    }
    let idle = users.metadata()?.modified()?.elapsed().unwrap_or_default();
    Ok(limit.saturating_sub(idle))
}
