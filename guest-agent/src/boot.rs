//! Being born as PID 1.
//!
//! Owns: the guest's own mounts, as a table, and what else a kernel leaves undone. Refuses: work
//! before the hello that the hello doesn't need: until then every instruction is part of the
//! start.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit};

use crate::fault::{Fault, Tried, errno_text};
use crate::mounts::{self, Options};
use crate::sys;

/// Where the guest's cgroups are.
pub(crate) const CGROUPS: &str = "/sys/fs/cgroup";

/// A mount of the guest's own.
struct Own {
    kind: &'static str,
    target: &'static str,
    options: &'static [&'static str],
    /// Whether a guest without it is of use.
    needed: bool,
}

const fn own(
    kind: &'static str,
    target: &'static str,
    options: &'static [&'static str],
    needed: bool,
) -> Own {
    Own {
        kind,
        target,
        options,
        needed,
    }
}

/// In the order in which they are mounted.
const MOUNTS: &[Own] = &[
    own("proc", "/proc", &["nosuid", "nodev", "noexec"], true),
    own("sysfs", "/sys", &["nosuid", "nodev", "noexec"], true),
    own("devtmpfs", "/dev", &["nosuid", "noexec", "mode=755"], true),
    own(
        "devpts",
        "/dev/pts",
        &["nosuid", "noexec", "mode=620", "gid=5", "ptmxmode=666"],
        false,
    ),
    own(
        "tmpfs",
        "/dev/shm",
        &["nosuid", "nodev", "mode=1777"],
        false,
    ),
    own(
        "mqueue",
        "/dev/mqueue",
        &["nosuid", "nodev", "noexec"],
        false,
    ),
    own("cgroup2", CGROUPS, &["nosuid", "nodev", "noexec"], true),
    own("tmpfs", "/run", &["nosuid", "nodev", "mode=755"], true),
];

/// Makes descriptors 0 to 2 valid: without a console the kernel leaves them closed, and the next
/// thing opened would be taken for standard error. Says whether it had to.
pub(crate) fn fill_standard_streams() -> bool {
    let mut filled = false;
    while !sys::is_open(2) {
        // Nothing but `/` is sure to exist.
        match rustix::fs::open(c"/", OFlags::PATH, Mode::empty()) {
            Ok(fd) => std::mem::forget(fd),
            Err(_) => return true,
        }
        filled = true;
    }
    filled
}

/// Mounts what the guest's programs expect. Comes after the hello.
///
/// # Errors
/// What is missing, if a guest without it is of no use.
pub(crate) fn furnish(mute: bool) -> Result<(), Fault> {
    stand_on_a_mount().or_internal(|| "cannot mount over the boot's root")?;
    rustix::process::umask(Mode::from_raw_mode(0o022));
    for own in MOUNTS {
        match mount(own) {
            Ok(()) => {}
            Err(errno) if own.needed => {
                return Err(errno).or_internal(|| format!("cannot mount {}", own.target));
            }
            Err(errno) => {
                crate::log::say(format_args!("no {}: {}", own.target, errno_text(errno)));
            }
        }
    }
    if mute {
        find_voice();
    }
    end_thrashing();
    sys::loopback_up().or_internal(|| "cannot bring up the loopback interface")?;
    let files = Rlimit {
        current: Some(1_048_576),
        maximum: Some(1_048_576),
    };
    rustix::process::setrlimit(Resource::Nofile, files)
        .or_internal(|| "cannot raise the limit of open files")
}

/// Has the kernel kill a process once it can't keep what was used within the last second (kernel
/// documentation, admin-guide/mm/multigen_lru, "Thrashing prevention"). Without it a guest out of
/// memory drops and re-reads its programs for minutes first.
fn end_thrashing() {
    if let Err(error) = fs::write("/sys/kernel/mm/lru_gen/min_ttl_ms", "1000") {
        crate::log::say(format_args!("no end to thrashing: {error}"));
    }
}

/// Opens the console for what the agent has to say, or nothing if there is none.
fn find_voice() {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let open = |path: &str| rustix::fs::open(path, flags, Mode::empty());
    if let Ok(voice) = open("/dev/console").or_else(|_| open("/dev/null")) {
        for number in 0..3 {
            let _ = sys::place(voice.as_fd(), number);
        }
    }
}

/// Mounts a copy of the root over itself. The boot's own root has no parent, and pivot_root(2),
/// by which containers leave it for good, refuses such a root.
fn stand_on_a_mount() -> Result<(), Errno> {
    let copy = mounts::copy_of(Path::new("/"), false)?;
    let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    mounts::attach(copy.as_fd(), root.as_fd())?;
    rustix::process::fchdir(&copy)?;
    rustix::process::chroot(c".")
}

fn mount(own: &Own) -> Result<(), Errno> {
    match rustix::fs::mkdirat(CWD, own.target, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let target = rustix::fs::open(own.target, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let mount = mounts::new_file_system(own.kind, own.kind, &Options::parse(own.options))?;
    mounts::attach(mount.as_fd(), target.as_fd())
}

/// Where this process may make cgroups, if the machine has them: for the agent that isn't PID 1.
pub(crate) fn find_cgroups() -> Option<&'static str> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .into_iter()
        .find(|dir| fs::exists(format!("{dir}/cgroup.procs")).unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_mount_of_the_table_can_be_made() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: making mounts takes root");
            return;
        }
        for own in MOUNTS {
            let made = mounts::new_file_system(own.kind, own.kind, &Options::parse(own.options));
            made.unwrap_or_else(|errno| panic!("{}: {errno}", own.target));
        }
    }

    #[test]
    fn a_mount_comes_after_the_one_it_lies_in() {
        for (at, own) in MOUNTS.iter().enumerate() {
            let parent = Path::new(own.target).parent().unwrap();
            let before = MOUNTS[..at]
                .iter()
                .any(|other| parent.starts_with(other.target));
            assert!(parent == Path::new("/") || before, "{}", own.target);
        }
    }
}
