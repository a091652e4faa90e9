//! The monitor's cgroup on the host: where an engine wants a container accounted for, and limits
//! that a VM's shape can't express, such as a fraction of a processor. cgroup v2 only.
//!
//! Owns: making it, entering it, its removal, whoever was killed meanwhile. Refuses: one that
//! somebody is in; ending processes of anybody else's.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_proto::CgroupStats;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::statfs;

use crate::names;
use crate::plan::PlannedCgroup;

const ROOT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// The cgroup of all whose engine names none.
const PARENT: &str = "hull";
/// How long processes that end or were killed may take to leave.
const EMPTYING: Duration = Duration::from_secs(10);
/// What a container's cgroup counts and limits, as far as the host has it.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// A limit of the host's that could not be set.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The host has no cgroup v2 where it is looked for.
    #[error("cannot limit the container's processors on this host: {ROOT} is not cgroup v2")]
    NotVersion2,
    /// Somebody else's processes are in it.
    #[error("container's cgroup is not empty: \"{path}\" has processes in it")]
    InUse {
        /// Which.
        path: PathBuf,
    },
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
    /// Moves this process into a cgroup with these limits. Without cgroup v2 there is none, which
    /// is a failure only if there are limits.
    pub(crate) fn enter(planned: &PlannedCgroup) -> Result<Option<Self>, CgroupError> {
        if !is_version_2() {
            return match planned.files.is_empty() {
                true => Ok(None),
                false => Err(CgroupError::NotVersion2),
            };
        }
        let path = Path::new(ROOT).join(&planned.path);
        let before = own_cgroup().unwrap_or_else(|| PathBuf::from(ROOT));
        let join = || {
            create_above(&planned.path)?;
            create(&path)?;
            // A monitor that was killed may still be on its way out.
            if await_empty(&path).is_err_and(|error| error.kind() == io::ErrorKind::TimedOut) {
                return Err(CgroupError::InUse { path: path.clone() });
            }
            write_all(&path, &planned.files)?;
            write(&path.join("cgroup.procs"), "0")
        };
        // As long as nobody is in it, somebody's sweep may take it away.
        let joined = match join() {
            Err(error) if error.is_missing() => join(),
            result => result,
        };
        if joined.is_err() {
            // Only an empty one goes.
            let _ = fs::remove_dir(&path);
        }
        joined.map(|()| Some(Self { path, before }))
    }
}

impl Drop for Cgroup {
    /// A process can't remove the cgroup it is in, so it goes back first.
    fn drop(&mut self) {
        let back = |to: &Path| write(&to.join("cgroup.procs"), "0").is_ok();
        if back(&self.before) || back(Path::new(ROOT)) {
            // One that stays goes when the container is removed, or is the next sweep's.
            let _ = fs::remove_dir(&self.path);
        }
    }
}

/// Removes a container's cgroup once it is empty: the lock of a monitor that was killed is free
/// before the kernel has taken the monitor out. Whoever calls has the container's lock. One that
/// is nobody else's is emptied by force.
pub(crate) fn remove(planned: &PlannedCgroup, by_force: bool) {
    // One that stays is the next sweep's, or its engine's.
    let _ = remove_path(&Path::new(ROOT).join(&planned.path), by_force);
}

/// As [`remove`], of a container that has an id and whose plan isn't read for it.
pub(crate) fn remove_own(id: &str) {
    let _ = remove_path(&Path::new(ROOT).join(PARENT).join(id), true);
}

/// Removes the cgroup of a container that nothing is known of, unless somebody is in it: it may
/// be another state directory's.
pub(crate) fn remove_empty(id: &str) -> bool {
    fs::remove_dir(Path::new(ROOT).join(PARENT).join(id)).is_ok()
}

/// What the processes of a container's cgroup have used, if it is there.
pub(crate) fn stats(planned: &PlannedCgroup) -> Option<CgroupStats> {
    let path = Path::new(ROOT).join(&planned.path);
    path.is_dir()
        .then(|| CgroupStats::read(|file| fs::read_to_string(path.join(file)).ok()))
}

/// Changes the limits of a container's cgroup.
pub(crate) fn update(
    planned: &PlannedCgroup,
    files: &[(String, String)],
) -> Result<(), CgroupError> {
    write_all(&Path::new(ROOT).join(&planned.path), files)
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

fn remove_path(path: &Path, by_force: bool) -> io::Result<()> {
    match fs::remove_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        result => return result,
    }
    // Its last process may be about to end by itself.
    if let Err(error) = await_empty(path) {
        if !by_force {
            return Err(error);
        }
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

fn own_cgroup() -> Option<PathBuf> {
    let text = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    Some(Path::new(ROOT).join(path))
}

/// Makes the cgroups above one and has them hand controllers down.
fn create_above(path: &Path) -> Result<(), CgroupError> {
    let mut above: Vec<&Path> = path.ancestors().skip(1).collect();
    above.reverse();
    for part in above {
        let above = Path::new(ROOT).join(part);
        create(&above)?;
        hand_down(&above);
    }
    Ok(())
}

/// Has a cgroup hand controllers down, as far as it can: what is missing shows when a limit is
/// written.
fn hand_down(path: &Path) {
    let words = |file: &str| fs::read_to_string(path.join(file)).unwrap_or_default();
    let (there, enabled) = (words("cgroup.controllers"), words("cgroup.subtree_control"));
    let has = |list: &str, name: &str| list.split_whitespace().any(|word| word == name);
    let missing: Vec<String> = CONTROLLERS
        .iter()
        .filter(|name| has(&there, name) && !has(&enabled, name))
        .map(|name| format!("+{name}"))
        .collect();
    let control = path.join("cgroup.subtree_control");
    if !missing.is_empty() && fs::write(&control, missing.join(" ")).is_err() {
        for one in missing {
            let _ = fs::write(&control, one);
        }
    }
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

fn write_all(path: &Path, files: &[(String, String)]) -> Result<(), CgroupError> {
    files
        .iter()
        .try_for_each(|(file, value)| write(&path.join(file), value))
}
