//! The last steps of a process before its command: limits, user, capabilities, directory.
//!
//! Owns: their order, which decides what is still permitted when (as the runtimes have it).
//! Refuses: to go on after any step failed; a process never runs with more than it was given.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::{Gid, Resource, Uid};

use crate::caps::Sets;
use crate::command::{Command, variable};
use crate::fault::{Fault, Tried};
use crate::init;
use crate::seccomp::Filter;
use crate::spec::{Process, Rlimit};
use crate::user::{self, Identity};
use crate::{report, sys};

/// The process's ends of its standard streams.
#[derive(Debug)]
pub(crate) enum Streams {
    /// stdin, stdout and stderr.
    Pipes([OwnedFd; 3]),
    /// One terminal for all.
    Terminal(OwnedFd),
}

/// What a process is to become, besides what its spec says.
#[derive(Debug)]
pub(crate) struct Becoming<'a> {
    /// The spec.
    pub(crate) process: &'a Process,
    /// Its standard streams.
    pub(crate) streams: Streams,
    /// Its system call filter.
    pub(crate) filter: Option<Filter>,
    /// Whether a minimal init comes between.
    pub(crate) init: bool,
    /// Whether it waits for a word before its command.
    pub(crate) hold: bool,
    /// Whether a missing working directory is made.
    pub(crate) make_cwd: bool,
    /// Where the last word before the command goes.
    pub(crate) report: BorrowedFd<'a>,
}

/// Writes this process's out-of-memory score while the guest's own /proc is in sight.
///
/// # Errors
/// Refuses a score out of range.
pub(crate) fn set_oom_score(process: &Process) -> Result<(), Fault> {
    let Some(score) = process.oom_score_adj else {
        return Ok(());
    };
    fs::write("/proc/self/oom_score_adj", score.to_string())
        .or_refuse(|| format!("cannot set oom_score_adj to {score}"))
}

/// Becomes the command.
///
/// # Errors
/// Returns only if that failed, with what did.
pub(crate) fn become_command(becoming: &Becoming<'_>) -> Result<Infallible, Fault> {
    let process = becoming.process;
    let no_new_privileges = process.no_new_privileges;
    set_limits(&process.rlimits)?;
    let identity = user::identify(&process.user)?;
    let environment = environment_of(process, &identity);
    take_streams(&becoming.streams, &identity)?;
    if becoming.make_cwd {
        make_directory(&process.cwd);
    }
    let entered = enter_directory(&process.cwd)?;
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).or_internal(|| "cannot set no_new_privs")?;
    } else if let Some(filter) = &becoming.filter {
        filter.install()?;
    }
    let sets = Sets::of(&process.capabilities)?;
    sets.bound()?;
    become_user(&identity)?;
    sets.apply()?;
    if !entered {
        change_directory(&process.cwd).or_refuse(|| cwd_text(&process.cwd))?;
    }
    check_directory()?;
    let umask = process.user.umask.unwrap_or(0o022);
    rustix::process::umask(Mode::from_raw_mode(umask & 0o777));
    let only_waits = becoming.init && process.args.is_empty();
    let command = match only_waits {
        true => None,
        false => Some(Command::find(&process.args, &environment)?),
    };
    if becoming.hold {
        report::wait_for_go(becoming.report).or_internal(|| "the command was never wanted")?;
    }
    let Some(command) = command else {
        report::about_to_execute(becoming.report);
        init::wait_to_end()
    };
    if becoming.init {
        init::split(matches!(becoming.streams, Streams::Terminal(_)))?;
    }
    sys::close_all_on_exec().or_internal(|| "cannot close the agent's descriptors")?;
    sys::default_signals();
    sys::set_mask(0).or_internal(|| "cannot unblock signals")?;
    report::about_to_execute(becoming.report);
    if no_new_privileges && let Some(filter) = &becoming.filter {
        filter.install()?;
    }
    command.execute()
}

fn environment_of(process: &Process, identity: &Identity) -> Vec<String> {
    let mut environment = process.env.clone();
    if variable(&environment, "HOME").is_none_or(str::is_empty) {
        let home = identity.home.as_deref().filter(|home| !home.is_empty());
        environment.retain(|entry| !entry.starts_with("HOME="));
        environment.push(format!("HOME={}", home.unwrap_or("/")));
    }
    if process.terminal && variable(&environment, "TERM").is_none() {
        environment.push("TERM=xterm".into());
    }
    environment
}

/// Puts the streams at 0, 1 and 2 and hands them to the user, who may open them by name.
fn take_streams(streams: &Streams, identity: &Identity) -> Result<(), Fault> {
    let what = || "cannot place the standard streams";
    let ends: [BorrowedFd<'_>; 3] = match streams {
        Streams::Pipes([stdin, stdout, stderr]) => [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
        Streams::Terminal(slave) => {
            rustix::process::ioctl_tiocsctty(slave)
                .or_internal(|| "cannot make the terminal the controlling one")?;
            [slave.as_fd(), slave.as_fd(), slave.as_fd()]
        }
    };
    for (number, end) in (0..).zip(ends) {
        let owner = Some(Uid::from_raw(identity.uid));
        match rustix::fs::fchown(end, owner, None) {
            // In a user namespace the pipe may belong to an id that isn't mapped.
            Ok(()) | Err(Errno::INVAL | Errno::PERM) => {}
            Err(errno) => return Err(errno).or_refuse(what),
        }
        sys::place(end, number).or_internal(what)?;
    }
    Ok(())
}

fn become_user(identity: &Identity) -> Result<(), Fault> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let groups: Vec<Gid> = identity.groups.iter().copied().map(Gid::from_raw).collect();
    rustix::thread::set_keep_capabilities(true).or_internal(|| "cannot keep capabilities")?;
    match rustix::thread::set_thread_groups(&groups) {
        // Denied in a user namespace where setgroups is; there are none to keep either.
        Err(Errno::PERM) if groups.is_empty() => {}
        other => other.or_refuse(|| format!("cannot set supplementary groups {groups:?}"))?,
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid)
        .or_refuse(|| format!("cannot become group {}", identity.gid))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)
        .or_refuse(|| format!("cannot become user {}", identity.uid))?;
    rustix::thread::set_keep_capabilities(false).or_internal(|| "cannot drop capabilities")
}

fn cwd_text(cwd: &Path) -> String {
    format!(
        "chdir to cwd ({:?}) set in config.json failed",
        cwd.display().to_string()
    )
}

fn change_directory(cwd: &Path) -> Result<(), Errno> {
    let cwd = if cwd.as_os_str().is_empty() {
        Path::new("/")
    } else {
        cwd
    };
    rustix::process::chdir(cwd)
}

/// What is in the way shows when the directory is entered.
fn make_directory(cwd: &Path) {
    if cwd.is_absolute() && !cwd.exists() {
        let _ = fs::create_dir_all(cwd);
    }
}

/// Enters the working directory as root already if root may: `false` if only the user may.
fn enter_directory(cwd: &Path) -> Result<bool, Fault> {
    if !cwd.is_absolute() && !cwd.as_os_str().is_empty() {
        return Err(Fault::refused(format!(
            "{}: not an absolute path",
            cwd_text(cwd)
        )));
    }
    match change_directory(cwd) {
        Ok(()) => Ok(true),
        Err(Errno::ACCESS | Errno::PERM) => Ok(false),
        Err(errno) => Err(errno).or_refuse(|| cwd_text(cwd)),
    }
}

/// Whether the directory lies in the root this process is in: through a descriptor that leaked,
/// it might not.
fn check_directory() -> Result<(), Fault> {
    let cwd =
        rustix::process::getcwd(Vec::new()).or_refuse(|| "cannot tell the working directory")?;
    if cwd.to_bytes().starts_with(b"/") {
        Ok(())
    } else {
        Err(Fault::refused(
            "the working directory is outside of the container's root",
        ))
    }
}

fn set_limits(limits: &[Rlimit]) -> Result<(), Fault> {
    for limit in limits {
        let value = |value: u64| (value != u64::MAX).then_some(value);
        let new = rustix::process::Rlimit {
            current: value(limit.soft),
            maximum: value(limit.hard),
        };
        let resource = RESOURCES.iter().find(|entry| entry.0 == limit.kind);
        let (name, resource) =
            resource.ok_or_else(|| Fault::refused(format!("no limit {:?}", limit.kind)))?;
        rustix::process::setrlimit(*resource, new)
            .or_refuse(|| format!("cannot set limit {name}"))?;
    }
    Ok(())
}

/// Limits by name.
const RESOURCES: &[(&str, Resource)] = &[
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_STACK", Resource::Stack),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
];
