//! What is left on a host of a Hull that was used: it must be nothing.
//!
//! Owns: looking at processes, mounts, files, sockets, cgroups. Refuses: to remove anything.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Hull's own processes on the host.
const PROGRAMS: [&str; 4] = [
    "hull",
    "hull-monitor",
    "hull-oci",
    "containerd-shim-hull-v2",
];
const CGROUPS: &str = "/sys/fs/cgroup/hull";

/// Where one Hull keeps things, and the ids of the containers it ever had.
#[derive(Debug, Clone, Copy)]
pub struct Traces<'a> {
    /// The directory that holds all others.
    pub base: &'a Path,
    /// What survives a reboot.
    pub state: &'a Path,
    /// What doesn't.
    pub run: &'a Path,
    /// Containers' ids, 64 digits each.
    pub ids: &'a [String],
}

impl Traces<'_> {
    /// Everything that is left, one line each.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        let mut all = Vec::new();
        for pid in self.processes() {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            all.push(format!("process {pid}: {command}"));
        }
        all.extend(self.lines("/proc/self/mountinfo", "mount"));
        all.extend(self.lines("/proc/net/unix", "socket"));
        for directory in ["containers", "names"] {
            let left = names(&self.state.join(directory));
            all.extend(left.iter().map(|path| format!("file {}", path.display())));
        }
        for path in names(self.run) {
            // Where each monitor's own mounts begin: an empty directory, made once.
            let is_mount_point = path.ends_with("mnt") && names(&path).is_empty();
            if !is_mount_point {
                all.push(format!("file {}", path.display()));
            }
        }
        for id in self.ids {
            let cgroup = Path::new(CGROUPS).join(id);
            if cgroup.exists() {
                all.push(format!("cgroup {}", cgroup.display()));
            }
        }
        all
    }

    /// Waits until Hull's processes here have ended, or the time is over.
    pub fn await_processes(&self, limit: Duration) {
        let limit = Timespec::try_from(limit).ok();
        for pid in self.processes() {
            let Some(pid) = Pid::from_raw(pid) else {
                continue;
            };
            // One that can't be opened has ended.
            if let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) {
                let mut ended = [PollFd::new(&process, PollFlags::IN)];
                let _is_late = poll(&mut ended, limit.as_ref());
            }
        }
    }

    /// Hull's processes that have something to do with these directories.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        let own = i32::try_from(std::process::id()).ok();
        names(Path::new("/proc"))
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.parse::<i32>().ok())
            .filter(|pid| Some(*pid) != own && self.is_ours(*pid))
            .collect()
    }

    fn is_ours(&self, pid: i32) -> bool {
        let of = |name: &str| PathBuf::from(format!("/proc/{pid}/{name}"));
        let Ok(program) = fs::read_link(of("exe")) else {
            return false; // a kernel thread, a zombie, or one that has just gone
        };
        let program = program.file_name().unwrap_or_default().to_string_lossy();
        if !PROGRAMS.contains(&program.trim_end_matches(" (deleted)")) {
            return false;
        }
        let base = self.base.as_os_str().as_encoded_bytes();
        let says = |bytes: &[u8], what: &[u8]| bytes.windows(what.len()).any(|part| part == what);
        let command = fs::read(of("cmdline")).unwrap_or_default();
        let environment = fs::read(of("environ")).unwrap_or_default();
        let holds = |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.starts_with(self.base));
        says(&command, base)
            || says(&environment, base)
            || self.ids.iter().any(|id| says(&command, id.as_bytes()))
            || names(&of("fd")).iter().any(holds)
    }

    fn lines(&self, file: &str, what: &str) -> Vec<String> {
        let text = fs::read_to_string(file).unwrap_or_default();
        let base = self.base.to_string_lossy();
        text.lines()
            .filter(|line| line.contains(base.as_ref()))
            .map(|line| format!("{what} {line}"))
            .collect()
    }
}

/// What a directory holds; nothing if it isn't there.
fn names(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Vec::new();
    };
    entries.flatten().map(|entry| entry.path()).collect()
}
