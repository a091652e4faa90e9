//! Making processes: the fork, and what the child does up to its command.
//!
//! Owns: the order of a start on both sides of the fork. Refuses: to wait; what the child has to
//! say comes over its line, which the agent polls like any other descriptor.
//!
//! ```text
//! agent   pipes, line ── clone3 ──► (user namespace: maps, "go") ── polls the line …
//! child                 └─ close all else, setsid, namespaces, root, terminal, limits, execve
//! ```
//!
//! A spare one does so, too, and waits for its orders where its namespaces are made.

use std::convert::Infallible;
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use hull_proto::ContainerStart;
use rustix::fs::{Mode, OFlags};
use rustix::net::RecvFlags;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;

use crate::cgroup::{Cgroup, OomWatch};
use crate::container::Container;
use crate::fault::{Fault, Tried};
use crate::namespaces::{self, Namespaces};
use crate::process::{Becoming, Streams, become_command, set_oom_score};
use crate::rootfs::{self, Covers};
use crate::seccomp::Filter;
use crate::spare::{Habit, Orders};
use crate::spec::{self, Process, Spec};
use crate::stage::Stage;
use crate::sys::{self, Forked};
use crate::{report, tty};

/// A container to make.
#[derive(Debug)]
pub(crate) struct Start {
    /// Its spec.
    pub(crate) spec: Spec,
    /// Whether a minimal init comes before its command.
    pub(crate) init: bool,
    /// Whether the command waits for a word.
    pub(crate) hold: bool,
}

impl Start {
    /// Reads what the host sent.
    ///
    /// # Errors
    /// Refuses a spec that isn't one.
    pub(crate) fn of(start: &ContainerStart) -> Result<Self, Fault> {
        Ok(Self {
            spec: spec::read(&start.spec)?,
            init: start.init,
            hold: start.hold,
        })
    }

    /// The process that the spec names.
    ///
    /// # Errors
    /// Refuses a spec without one.
    pub(crate) fn process(&self) -> Result<&Process, Fault> {
        let process = self.spec.process.as_ref();
        process.ok_or_else(|| Fault::refused("the spec names no process"))
    }

    /// The filter of its processes.
    ///
    /// # Errors
    /// As [`Filter::of`].
    pub(crate) fn filter(&self) -> Result<Option<Filter>, Fault> {
        self.spec.linux.seccomp.as_ref().map(Filter::of).transpose()
    }
}

/// A process that was just made.
#[derive(Debug)]
pub(crate) struct Born {
    /// Its id, as the agent sees it.
    pub(crate) pid: Pid,
    /// Where it reports.
    pub(crate) line: OwnedFd,
    /// The agent's ends of its stdin, stdout and stderr; none if it has a terminal.
    pub(crate) pipes: Option<[OwnedFd; 3]>,
    /// Of a container's first process, where memory is counted.
    pub(crate) oom_watch: Option<OomWatch>,
}

/// The child's ends.
#[derive(Debug)]
pub(crate) struct Ends {
    pub(crate) line: OwnedFd,
    /// Its stdin, stdout and stderr; none if it is to have a terminal.
    pub(crate) pipes: Option<[OwnedFd; 3]>,
}

/// Makes the first process of a container, and opens it.
///
/// # Errors
/// If it can't be made; what fails later comes over its line.
pub(crate) fn first(
    start: &Start,
    process: &Process,
    namespaces: &Namespaces,
    cgroup: Option<&Cgroup>,
    filter: Option<Filter>,
) -> Result<(Born, OwnedFd), Fault> {
    let wanted = Wanted {
        terminal: process.terminal,
        pid_namespace: namespaces.pid_to_join()?,
        flags: namespaces.clone_flags(),
        cgroup: cgroup.map(Cgroup::directory),
        keep: None,
    };
    let (born, pidfd) = birth(&wanted, |ends| {
        become_first(start, process, namespaces, filter, ends)
    })?;
    if namespaces.has_user() {
        let mapped = namespaces.write_maps(born.pid);
        // Without the word, the child sees the line close and leaves.
        mapped?;
        report::go(born.line.as_fd()).or_internal(|| "cannot let the process go on")?;
    }
    Ok((born, pidfd))
}

/// Makes a first process in `cgroup` that waits for its orders, and opens it.
///
/// # Errors
/// If it can't be made; what fails later comes over its line.
pub(crate) fn spare(habit: &Habit, cgroup: &Cgroup) -> Result<(Born, OwnedFd), Fault> {
    let wanted = Wanted {
        terminal: false,
        pid_namespace: None,
        flags: habit.namespaces.clone_flags(),
        cgroup: Some(cgroup.directory()),
        keep: None,
    };
    birth(&wanted, |ends| become_ordered(habit, ends))
}

/// Makes another process in a container that runs.
///
/// # Errors
/// If it can't be made; what fails later comes over its line.
pub(crate) fn another(container: &Container, process: &Process) -> Result<Born, Fault> {
    let pidfd = container.pidfd();
    let own_pids = container.has_pid_namespace();
    let copy = rustix::io::fcntl_dupfd_cloexec(pidfd, 3)
        .or_internal(|| "cannot copy the container's pidfd")?;
    let wanted = Wanted {
        terminal: process.terminal,
        pid_namespace: own_pids.then_some(copy),
        flags: 0,
        cgroup: container.cgroup().map(Cgroup::directory),
        keep: Some(pidfd.as_fd()),
    };
    birth(&wanted, |ends| become_another(container, process, ends)).map(|(born, _)| born)
}

/// Makes a process of the agent's own, in no container.
///
/// # Errors
/// If it can't be made; what fails later comes over its line.
pub(crate) fn beside(child: impl FnOnce(Ends) -> Result<Infallible, Fault>) -> Result<Born, Fault> {
    let wanted = Wanted {
        terminal: false,
        pid_namespace: None,
        flags: 0,
        cgroup: None,
        keep: None,
    };
    birth(&wanted, child).map(|(born, _)| born)
}

struct Wanted<'a> {
    terminal: bool,
    pid_namespace: Option<OwnedFd>,
    flags: u64,
    cgroup: Option<BorrowedFd<'a>>,
    keep: Option<BorrowedFd<'a>>,
}

fn birth(
    wanted: &Wanted<'_>,
    child: impl FnOnce(Ends) -> Result<Infallible, Fault>,
) -> Result<(Born, OwnedFd), Fault> {
    let (line, childs_line) = report::line().or_internal(|| "cannot make the report line")?;
    let (pipes, childs_pipes) = if wanted.terminal {
        (None, None)
    } else {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).or_internal(|| "cannot make a pipe");
        let (stdin, stdout, stderr) = (pipe()?, pipe()?, pipe()?);
        (
            Some([stdin.1, stdout.0, stderr.0]),
            Some([stdin.0, stdout.1, stderr.1]),
        )
    };
    let target = wanted.pid_namespace.as_ref();
    match namespaces::fork_into(target, wanted.flags, wanted.cgroup)? {
        Forked::Parent(pid, pidfd) => {
            let born = Born {
                pid,
                line,
                pipes,
                oom_watch: None,
            };
            Ok((born, pidfd))
        }
        Forked::Child => {
            let ends = Ends {
                line: childs_line,
                pipes: childs_pipes,
            };
            live(ends, wanted.keep, child)
        }
    }
}

/// The whole life of the child before its command.
fn live(
    ends: Ends,
    keep: Option<BorrowedFd<'_>>,
    child: impl FnOnce(Ends) -> Result<Infallible, Fault>,
) -> ! {
    let mut kept = vec![ends.line.as_fd()];
    kept.extend(ends.pipes.iter().flatten().map(AsFd::as_fd));
    kept.extend(keep);
    let _ = sys::close_all_but(&kept);
    let _ = rustix::process::setsid();
    // A word on the line is worth a descriptor of its own: the other goes with `ends`.
    let line = rustix::io::fcntl_dupfd_cloexec(&ends.line, 3);
    let Err(fault) = child(ends);
    if let Ok(line) = line {
        report::failed(line.as_fd(), fault);
    }
    sys::leave(1)
}

fn become_first(
    start: &Start,
    process: &Process,
    namespaces: &Namespaces,
    filter: Option<Filter>,
    ends: Ends,
) -> Result<Infallible, Fault> {
    if namespaces.has_user() {
        let mut word = [0u8; 2];
        let (length, _) = rustix::net::recv(&ends.line, &mut word, RecvFlags::empty())
            .or_internal(|| "cannot wait for the id maps")?;
        if length == 0 {
            return Err(Fault::internal("the ids were not mapped"));
        }
    }
    // Before the ids change: the file is the guest's root's.
    set_oom_score(process)?;
    namespaces.enter()?;
    become_root_of(start, namespaces, filter, None, ends)
}

/// As [`become_first`], of a container that isn't known yet.
fn become_ordered(habit: &Habit, ends: Ends) -> Result<Infallible, Fault> {
    habit.namespaces.enter()?;
    let stage = habit.scenery.set()?;
    report::ready_for_orders(ends.line.as_fd());
    let orders = report::wait_for_orders(ends.line.as_fd());
    let orders = orders.or_internal(|| "the process was never wanted")?;
    let [orders, spec] = orders;
    let what = || "the orders can't be read";
    let orders: Orders<'_> = serde_json::from_slice(&orders).or_internal(what)?;
    // The guest was called something else when this process's namespace was made.
    rustix::system::sethostname(orders.hostname.as_bytes())
        .or_internal(|| "cannot take the guest's host name")?;
    let start = Start {
        spec: serde_json::from_slice(&spec).or_internal(what)?,
        init: orders.init,
        hold: orders.hold,
    };
    set_oom_score(start.process()?)?;
    let filter = start.filter()?;
    become_root_of(&start, &habit.namespaces, filter, Some(&stage), ends)
}

/// What a container's first process does once it is in the container's namespaces.
fn become_root_of(
    start: &Start,
    namespaces: &Namespaces,
    filter: Option<Filter>,
    stage: Option<&Stage<'_>>,
    ends: Ends,
) -> Result<Infallible, Fault> {
    let (spec, process) = (&start.spec, start.process()?);
    let path = spec.root.as_ref().map(|root| root.path.as_path());
    let path = path.ok_or_else(|| Fault::refused("the spec names no root"))?;
    let bound;
    let root = match stage.and_then(|stage| stage.root(path)) {
        Some(root) => root,
        None => {
            bound = rootfs::bind_root(path)?;
            bound.as_fd()
        }
    };
    let staged = stage.and_then(|stage| {
        let rest = stage.rest_of(spec)?;
        Some((stage, rest))
    });
    rootfs::furnish(root, spec, staged.as_ref())?;
    let pipes = ends.pipes.filter(|_| !process.terminal);
    let streams = streams_of(&ends.line, pipes, root, process, true)?;
    // What is on the stage is covered; what covers the rest is of the guest.
    let covers = match &staged {
        Some(_) => None,
        None => Some(Covers::take()?),
    };
    set_names(spec, namespaces)?;
    set_sysctls(spec)?;
    rootfs::change_root(root)?;
    rootfs::restrict(spec, covers)?;
    become_command(&Becoming {
        process,
        streams,
        filter,
        init: start.init,
        hold: start.hold,
        make_cwd: true,
        report: ends.line.as_fd(),
    })
}

fn become_another(
    container: &Container,
    process: &Process,
    ends: Ends,
) -> Result<Infallible, Fault> {
    set_oom_score(process)?;
    namespaces::enter_all_of(container.pidfd(), container.to_enter())?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        rustix::fs::open(c"/", flags, Mode::empty()).or_internal(|| "cannot open the root")?;
    let streams = streams_of(&ends.line, ends.pipes, root.as_fd(), process, false)?;
    become_command(&Becoming {
        process,
        streams,
        filter: container.filter().cloned(),
        init: false,
        hold: false,
        make_cwd: false,
        report: ends.line.as_fd(),
    })
}

fn streams_of(
    line: &OwnedFd,
    pipes: Option<[OwnedFd; 3]>,
    root: BorrowedFd<'_>,
    process: &Process,
    console: bool,
) -> Result<Streams, Fault> {
    if let Some(pipes) = pipes {
        return Ok(Streams::Pipes(pipes));
    }
    let terminal = tty::open(root, process)?;
    if console {
        tty::place_console(root, terminal.slave.as_fd())?;
    }
    report::hand_over(line.as_fd(), terminal.master.as_fd())
        .or_internal(|| "cannot hand over the terminal")?;
    Ok(Streams::Terminal(terminal.slave))
}

fn set_names(spec: &Spec, namespaces: &Namespaces) -> Result<(), Fault> {
    let given = |name: &Option<String>| name.clone().filter(|name| !name.is_empty());
    let (host, domain) = (given(&spec.hostname), given(&spec.domainname));
    if !namespaces.has_uts() && (host.is_some() || domain.is_some()) {
        return Err(Fault::refused(
            "unable to set hostname without a private UTS namespace",
        ));
    }
    if let Some(name) = host {
        rustix::system::sethostname(name.as_bytes())
            .or_refuse(|| format!("cannot set hostname {name:?}"))?;
    }
    if let Some(name) = domain {
        rustix::system::setdomainname(name.as_bytes())
            .or_refuse(|| format!("cannot set domain name {name:?}"))?;
    }
    Ok(())
}

/// Writes sysctls through the guest's own /proc, while nothing of the container is in sight.
fn set_sysctls(spec: &Spec) -> Result<(), Fault> {
    for (name, value) in &spec.linux.sysctl {
        let path = sysctl_path(name)
            .ok_or_else(|| Fault::refused(format!("no sysctl is named {name:?}")))?;
        fs::write(&path, value).or_refuse(|| format!("cannot set sysctl {name} to {value:?}"))?;
    }
    Ok(())
}

/// `net.ipv4.ip_forward`, or with slashes where a name has dots in it (sysctl(8)).
fn sysctl_path(name: &str) -> Option<PathBuf> {
    let relative = match name.find(['.', '/']) {
        Some(at) if name.get(at..)?.starts_with('/') => name.to_owned(),
        _ => name.replace('.', "/"),
    };
    let plain = relative
        .split('/')
        .all(|part| !part.is_empty() && part != ".." && part != ".");
    plain.then(|| Path::new("/proc/sys").join(relative))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_are_named_with_dots_or_slashes() {
        let path = |name| sysctl_path(name).map(|path| path.display().to_string());
        assert_eq!(
            path("net.ipv4.ip_forward").as_deref(),
            Some("/proc/sys/net/ipv4/ip_forward")
        );
        assert_eq!(
            path("net/ipv4/conf/eth0.1/forwarding").as_deref(),
            Some("/proc/sys/net/ipv4/conf/eth0.1/forwarding")
        );
        for name in ["", "/etc/passwd", "net/../../x", "net..x", "."] {
            assert_eq!(path(name), None, "{name}");
        }
    }
}
