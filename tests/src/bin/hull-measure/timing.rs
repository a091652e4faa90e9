//! One program from just before its exec to its end, by the clock that counts instructions.
//!
//! Owns: spawning, the first byte on stdout, deadlines. Refuses: to know what it runs.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::time::{ClockId, clock_gettime};

/// Host time that a program may take, in its own clock: a thousand times what the slowest takes.
const LIMIT: Duration = Duration::from_secs(30);

/// How long nothing is started, so that what ended before leaves nothing to do: a virtual machine
/// is freed after its monitor's end, and a network namespace some time after that.
const PAUSE: Duration = Duration::from_millis(500);

/// What one run took, in nanoseconds since just before its exec.
#[derive(Debug)]
pub(crate) struct Timing {
    /// Until its first byte on stdout was there.
    pub(crate) first_byte: Option<u64>,
    /// Until it was waited for.
    pub(crate) end: u64,
}

/// A program that was started.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) child: Child,
    /// `CLOCK_MONOTONIC` just before the exec.
    pub(crate) at: u64,
}

/// `CLOCK_MONOTONIC` in nanoseconds.
pub(crate) fn now() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}

/// Lets the machine come to rest: there is nothing to wait for but that nothing happens.
pub(crate) fn pause() -> Result<()> {
    let limit = Timespec::try_from(PAUSE).context("a time")?;
    poll(&mut [], Some(&limit)).context("let time pass")?;
    Ok(())
}

/// Nanoseconds that the first processor has worked for anybody (kernel documentation,
/// "Scheduler Statistics": the seventh field of its line).
pub(crate) fn worked() -> Result<u64> {
    let text = fs::read_to_string("/proc/schedstat").context("read /proc/schedstat")?;
    let line = text.lines().find(|line| line.starts_with("cpu0 "));
    let field = line.and_then(|line| line.split(' ').nth(7)?.parse().ok());
    field.context("/proc/schedstat doesn't say how long its processor worked")
}

/// Starts `argv`, in a machine at rest, with stdout in a pipe and stderr in `log`.
pub(crate) fn start(argv: &[String], log: &Path) -> Result<Started> {
    let (program, arguments) = argv.split_first().context("no program was named")?;
    let errors = File::create(log).context("make a log")?;
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors);
    pause()?;
    let at = now();
    let child = command.spawn().with_context(|| format!("run {program}"))?;
    Ok(Started { child, at })
}

/// Runs `argv` to its successful end.
pub(crate) fn time(argv: &[String], log: &Path) -> Result<Timing> {
    let mut started = start(argv, log)?;
    let timing = attend(&mut started);
    if timing.is_err() {
        // It may be gone already.
        let _ = started.child.kill();
    }
    let status = started.child.wait().context("wait for the program")?;
    let timing = timing?;
    if !status.success() {
        let words = fs::read_to_string(log).unwrap_or_default();
        bail!("{} ended with {status}: {}", argv.join(" "), words.trim());
    }
    Ok(timing)
}

/// Watches a program to its end, or to its first byte at least.
fn attend(started: &mut Started) -> Result<Timing> {
    let pid = Pid::from_child(&started.child);
    let process = pidfd_open(pid, PidfdFlags::empty()).context("watch the program")?;
    let mut stdout = started.child.stdout.take();
    let limit = Timespec::try_from(LIMIT).context("a deadline")?;
    let mut first_byte = None;
    loop {
        let mut fds = vec![PollFd::new(&process, PollFlags::IN)];
        if let Some(stdout) = &stdout {
            fds.push(PollFd::new(stdout, PollFlags::IN));
        }
        let count = poll(&mut fds, Some(&limit)).context("wait for the program")?;
        let seen = now() - started.at;
        if count == 0 {
            bail!("it did not end in {} s", LIMIT.as_secs());
        }
        let wrote = fds.get(1).is_some_and(|fd| !fd.revents().is_empty());
        let ended = fds.first().is_some_and(|fd| !fd.revents().is_empty());
        drop(fds);
        if wrote && let Some(pipe) = &mut stdout {
            if pipe.read(&mut [0; 4096]).context("read its output")? == 0 {
                stdout = None;
            } else {
                first_byte.get_or_insert(seen);
                continue;
            }
        }
        if ended {
            return Ok(Timing {
                first_byte,
                end: seen,
            });
        }
    }
}

/// Waits for the first byte that a started program writes.
pub(crate) fn await_byte(started: &mut Started) -> Result<()> {
    let stdout = started.child.stdout.as_mut().context("no stdout")?;
    let limit = Timespec::try_from(LIMIT).context("a deadline")?;
    let mut fds = [PollFd::new(stdout, PollFlags::IN)];
    if poll(&mut fds, Some(&limit)).context("wait for a byte")? == 0 {
        bail!("it said nothing in {} s", LIMIT.as_secs());
    }
    if stdout.read(&mut [0; 1]).context("read its output")? == 0 {
        bail!("it ended without a word");
    }
    Ok(())
}

/// Lets time pass while a process lives.
pub(crate) fn pass(pid: u32, time: Duration) -> Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let process = pidfd_open(pid.context("no process")?, PidfdFlags::empty())
        .context("watch the idle program")?;
    let limit = Timespec::try_from(time).context("a time")?;
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    if poll(&mut fds, Some(&limit)).context("watch the idle program")? > 0 {
        bail!("the idle program ended");
    }
    Ok(())
}
