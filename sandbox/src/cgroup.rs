//! The monitor's cgroup on the host, for limits that a VM's shape can't express: a fraction of a
//! processor.
//!
//! Made only when there is such a limit. Lies at `hull/ID` below the root of cgroup v2.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_proto::CgroupStats;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::statfs;

use crate::names;

const ROOT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// The cgroup of all of Hull's.
const PARENT: &str = "hull";
/// How long processes that end or were killed may take to leave.
const EMPTYING: Duration = Duration::from_secs(5);
/// Microseconds over which a quota is counted, the kernel's default.
const PERIOD_US: u32 = 100_000;

/// A limit of the host's that could not be set.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has no cgroup v2 where it is looked for.
    #[error("cannot limit processors to a fraction: {ROOT} is not cgroup v2")]
    NotVersion2,
    /// A file of the hierarchy refused.
    #[error("cannot write \"{value}\" to \"{path}\"")]
    Write {
        /// What was to be written.
        value: String,
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A limit of the host's for a container whose monitor is in no cgroup of its own.
    #[error("cannot set {file}: the container has no cgroup of its own on this host")]
    None {
        /// The limit's file.
        file: String,
    },
    /// The cgroup could not be made.
    #[error("cannot create cgroup \"{path}\"")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl CgroupError {
    fn is_missing(&self) -> bool {
        matches!(self, Self::Write { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

/// A cgroup with this process in it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    /// Where this process was before.
    before: PathBuf,
}

impl Cgroup {
    /// Moves this process into a cgroup that may use `cpus` processors.
    pub(crate) fn enter(id: &str, cpus: f64) -> Result<Self, CgroupError> {
        if !is_version_2() {
            return Err(CgroupError::NotVersion2);
        }
        let root = Path::new(ROOT);
        let parent = root.join(PARENT);
        let path = parent.join(id);
        let before = own_cgroup().unwrap_or_else(|| root.to_owned());
        write(&root.join("cgroup.subtree_control"), "+cpu")?;
        create(&parent)?;
        write(&parent.join("cgroup.subtree_control"), "+cpu")?;
        let join = || {
            create(&path)?;
            write(&path.join("cpu.max"), &cpu_max(cpus))?;
            write(&path.join("cgroup.procs"), "0")
        };
        // As long as nobody is in it, somebody's sweep may take it away.
        match join() {
            Err(error) if error.is_missing() => join()?,
            result => result?,
        }
        Ok(Self { path, before })
    }
}

impl Drop for Cgroup {
    /// A process can't remove the cgroup it is in, so it goes back first.
    fn drop(&mut self) {
        if write(&self.before.join("cgroup.procs"), "0").is_ok() {
            // One that stays is the next sweep's.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Removes a container's cgroup, and with it whatever a monitor that was killed still has in it:
/// its lock is free before the kernel has taken it out. Whoever calls has the container's lock.
pub(crate) fn remove(id: &str) {
    // One that stays is the next sweep's.
    let _ = remove_path(&Path::new(ROOT).join(PARENT).join(id));
}

/// Removes the cgroup of a container that nothing is known of, unless somebody is in it: it may
/// be another state directory's.
pub(crate) fn remove_empty(id: &str) -> bool {
    fs::remove_dir(Path::new(ROOT).join(PARENT).join(id)).is_ok()
}

/// What the processes of a container's cgroup have used, if it has one.
pub(crate) fn stats(id: &str) -> Option<CgroupStats> {
    let path = Path::new(ROOT).join(PARENT).join(id);
    path.is_dir()
        .then(|| CgroupStats::read(|file| fs::read_to_string(path.join(file)).ok()))
}

/// Changes the limits of a container's cgroup. Without one there are none but what processors it
/// runs on, which nothing else can stand in for.
pub(crate) fn update(id: &str, files: &[(String, String)]) -> Result<(), CgroupError> {
    let path = Path::new(ROOT).join(PARENT).join(id);
    let exists = path.is_dir();
    for (file, value) in files {
        match exists {
            true => write(&path.join(file), value)?,
            false if file.starts_with("cpuset.") => {
                return Err(CgroupError::None { file: file.clone() });
            }
            false => {}
        }
    }
    Ok(())
}

/// The ids of those there are.
pub(crate) fn all() -> Vec<String> {
    let Ok(entries) = fs::read_dir(Path::new(ROOT).join(PARENT)) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| names::is_id(name))
        .collect()
}

fn remove_path(path: &Path) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        result => return result,
    }
    // Its last process may be about to end by itself.
    if await_empty(path).is_err() {
        fs::write(path.join("cgroup.kill"), "1")?;
        await_empty(path)?;
    }
    fs::remove_dir(path)
}

/// Waits until no process is in it (kernel documentation, "Control Group v2", "[Un]populated
/// Notification").
fn await_empty(path: &Path) -> io::Result<()> {
    let events = File::open(path.join("cgroup.events"))?;
    let deadline = Instant::now() + EMPTYING;
    let mut text = [0; 256];
    loop {
        let count = events.read_at(&mut text, 0)?;
        let lines = text.get(..count).unwrap_or_default();
        if lines
            .split(|&b| b == b'\n')
            .any(|line| line == b"populated 0")
        {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        match poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left)) {
            Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Whether cgroup v2 is where it is looked for.
pub(crate) fn is_version_2() -> bool {
    statfs(ROOT).is_ok_and(|stat| stat.f_type == CGROUP2_MAGIC)
}

fn cpu_max(cpus: f64) -> String {
    // A plan's processors are 0.01 to 32, so the product is a small positive number.
    let quota = (cpus * f64::from(PERIOD_US)).round();
    format!("{quota:.0} {PERIOD_US}")
}

fn own_cgroup() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(ROOT).join(path))
}

fn create(path: &Path) -> Result<(), CgroupError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != io::ErrorKind::AlreadyExists => Err(CgroupError::Create {
            path: path.to_owned(),
            source,
        }),
        _ => Ok(()),
    }
}

fn write(path: &Path, value: &str) -> Result<(), CgroupError> {
    fs::write(path, value).map_err(|source| CgroupError::Write {
        value: value.to_owned(),
        path: path.to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_shares_of_a_period() {
        assert_eq!(cpu_max(0.5), "50000 100000");
        assert_eq!(cpu_max(1.75), "175000 100000");
        assert_eq!(cpu_max(0.01), "1000 100000");
    }
}
