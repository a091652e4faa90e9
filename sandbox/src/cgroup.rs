//! The monitor's cgroup on the host, for limits that a VM's shape can't express: a fraction of a
//! processor.
//!
//! Made only when there is such a limit. Lies at `hull/ID` below the root of cgroup v2.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::statfs;

const ROOT: &str = "/sys/fs/cgroup";
/// `CGROUP2_SUPER_MAGIC` of linux/magic.h.
const CGROUP2_MAGIC: i64 = 0x6367_7270;
/// Microseconds over which a quota is counted, the kernel's default.
const PERIOD_US: u32 = 100_000;

/// A limit that could not be set.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
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
    /// The cgroup could not be made.
    #[error("cannot create cgroup \"{path}\"")]
    Create {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
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
        let parent = root.join("hull");
        let path = parent.join(id);
        let before = own_cgroup().unwrap_or_else(|| root.to_owned());
        write(&root.join("cgroup.subtree_control"), "+cpu")?;
        create(&parent)?;
        write(&parent.join("cgroup.subtree_control"), "+cpu")?;
        create(&path)?;
        let cgroup = Self { path, before };
        write(&cgroup.path.join("cpu.max"), &cpu_max(cpus))?;
        write(&cgroup.path.join("cgroup.procs"), "0")?;
        Ok(cgroup)
    }
}

impl Drop for Cgroup {
    /// A process can't remove the cgroup it is in, so it goes back first.
    fn drop(&mut self) {
        if write(&self.before.join("cgroup.procs"), "0").is_ok() {
            remove_path(&self.path);
        }
    }
}

/// Removes what a monitor that was killed has left.
pub(crate) fn remove(id: &str) {
    remove_path(&Path::new(ROOT).join("hull").join(id));
}

/// An absent cgroup is as removed as one can be, and a busy one is somebody else's to remove.
fn remove_path(path: &Path) {
    let _ = fs::remove_dir(path);
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
