//! When to kill, and whom.

use std::fs;
use std::time::{Duration, Instant};

use hull_tests::hull::Hull;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

/// How soon an end must be known to whoever waits for it: a deadline, on a host whose every
/// command takes a second.
pub(crate) const PROMPT: Duration = Duration::from_secs(45);

/// Lets this much time go by, or less if the process ends before.
pub(crate) fn later(process: Pid, time: Duration) {
    // One that can't be opened has ended.
    if let Ok(process) = pidfd_open(process, PidfdFlags::empty()) {
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut ended, Some(&Timespec::try_from(time).unwrap())).unwrap();
    }
}

/// How long a whole run takes on this host, so that moments can be spread over it.
pub(crate) fn run_takes(hull: &Hull) -> Duration {
    let image = hull.image();
    let begun = Instant::now();
    hull.cmd(["run", "--rm", &image, "true"]).output().ok();
    begun.elapsed()
}

/// Kills every monitor of this Hull; returns how many there were.
pub(crate) fn kill_monitors(hull: &Hull) -> usize {
    let is_monitor = |pid: &i32| {
        fs::read_link(format!("/proc/{pid}/exe"))
            .is_ok_and(|program| program.ends_with("hull-monitor"))
    };
    let monitors: Vec<i32> = hull.processes().into_iter().filter(is_monitor).collect();
    monitors
        .iter()
        .filter(|pid| {
            // It may have ended since.
            let pid = Pid::from_raw(**pid).unwrap();
            let process = pidfd_open(pid, PidfdFlags::empty());
            let killed = kill_process(pid, Signal::KILL).is_ok();
            if let Ok(process) = process {
                let mut ended = [PollFd::new(&process, PollFlags::IN)];
                let limit = Timespec::try_from(PROMPT).unwrap();
                assert_eq!(poll(&mut ended, Some(&limit)), Ok(1), "it outlives SIGKILL");
            }
            killed
        })
        .count()
}
