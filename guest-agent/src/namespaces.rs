//! The namespaces a container asks for, and entering those of one that runs.
//!
//! Owns: reading `linux.namespaces`, and which are made by clone3, which by unshare and which
//! are joined. Refuses: time namespaces with offsets, and a container without its own mounts:
//! it always gets a mount namespace.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags, move_into_thread_name_spaces};

use crate::fault::{Fault, Tried};
use crate::spec::{IdMap, Linux, NamespaceKind};
use crate::sys::{self, Forked};

const NEWNS: u64 = NamespaceKind::Mount as u64;
const NEWCGROUP: u64 = NamespaceKind::Cgroup as u64;
const NEWPID: u64 = NamespaceKind::Pid as u64;
const NEWUTS: u64 = NamespaceKind::Uts as u64;
const NEWUSER: u64 = NamespaceKind::User as u64;
const NEWNET: u64 = NamespaceKind::Network as u64;
const NEWTIME: u64 = NamespaceKind::Time as u64;

/// The namespaces of a container to be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Namespaces {
    new: u64,
    joined: Vec<(u64, PathBuf)>,
    pid: Option<PathBuf>,
    maps: Option<(String, String)>,
}

impl Namespaces {
    /// Reads the spec's list.
    ///
    /// # Errors
    /// Refuses what the agent can't make.
    pub(crate) fn of(linux: &Linux) -> Result<Self, Fault> {
        let mut asked = Self {
            new: NEWNS,
            ..Self::default()
        };
        for namespace in &linux.namespaces {
            let flag = namespace.kind as u64;
            if flag == NEWTIME {
                return Err(Fault::refused("time namespaces are not supported"));
            }
            match &namespace.path {
                None => asked.new |= flag,
                Some(_) if flag == NEWNS => {
                    return Err(Fault::refused(
                        "joining a mount namespace by path is not supported",
                    ));
                }
                Some(path) if flag == NEWPID => asked.pid = Some(path.clone()),
                Some(path) => asked.joined.push((flag, path.clone())),
            }
        }
        if asked.new & NEWUSER != 0 {
            let (uids, gids) = (&linux.uid_mappings, &linux.gid_mappings);
            asked.maps = Some((map_lines(uids), map_lines(gids)));
        }
        Ok(asked)
    }

    /// Whether all of them are new and can be made before the container is known.
    pub(crate) fn are_any_containers(&self) -> bool {
        self.joined.is_empty() && self.pid.is_none() && !self.has_user()
    }

    /// What clone3 is to make.
    pub(crate) fn clone_flags(&self) -> u64 {
        self.new & !NEWCGROUP
    }

    /// What a later process of the container has to enter besides the pid namespace, which it is
    /// born into.
    pub(crate) fn to_enter(&self) -> u64 {
        let joined = self.joined.iter().fold(0, |flags, (flag, _)| flags | flag);
        (self.new | joined) & !NEWPID
    }

    /// Whether the container's processes are in another pid namespace than the agent.
    pub(crate) fn has_pid(&self) -> bool {
        self.new & NEWPID != 0 || self.pid.is_some()
    }

    /// Whether they are in one that begins with the container's first process.
    pub(crate) fn begins_pids(&self) -> bool {
        self.new & NEWPID != 0
    }

    /// Whether the container has a host name that isn't the guest's.
    pub(crate) fn has_uts(&self) -> bool {
        let joins = |(flag, _): &(u64, PathBuf)| *flag == NEWUTS;
        self.new & NEWUTS != 0 || self.joined.iter().any(joins)
    }

    /// The pid namespace that the process is to be born into.
    ///
    /// # Errors
    /// Refuses a path that can't be opened.
    pub(crate) fn pid_to_join(&self) -> Result<Option<OwnedFd>, Fault> {
        let open = |path: &PathBuf| {
            fs::File::open(path)
                .map(OwnedFd::from)
                .or_refuse(|| format!("cannot open namespace {}", path.display()))
        };
        self.pid.as_ref().map(open).transpose()
    }

    /// Whether the child must wait for [`Self::write_maps`].
    pub(crate) fn has_user(&self) -> bool {
        self.maps.is_some()
    }

    /// Maps the ids of the child's user namespace. For the parent.
    ///
    /// # Errors
    /// Refuses maps that the kernel refuses.
    pub(crate) fn write_maps(&self, child: Pid) -> Result<(), Fault> {
        let Some((uids, gids)) = &self.maps else {
            return Ok(());
        };
        let pid = child.as_raw_nonzero();
        for (file, map) in [("uid_map", uids), ("gid_map", gids)] {
            fs::write(format!("/proc/{pid}/{file}"), map)
                .or_refuse(|| format!("cannot write {file} of the user namespace"))?;
        }
        Ok(())
    }

    /// Joins what is joined by path and makes the rest. For the child, which clone3 put into the
    /// new namespaces and whose ids are mapped.
    ///
    /// # Errors
    /// Refuses paths that aren't such namespaces.
    pub(crate) fn enter(&self) -> Result<(), Fault> {
        if self.new & NEWUSER != 0 {
            become_root()?;
        }
        for (flag, path) in &self.joined {
            let what = || format!("cannot join namespace {}", path.display());
            let file = fs::File::open(path).or_refuse(what)?;
            move_into_thread_name_spaces(file.as_fd(), kinds(*flag)).or_refuse(what)?;
        }
        if self.new & NEWCGROUP != 0 {
            sys::unshare(UnshareFlags::NEWCGROUP).or_refuse(|| "cannot make a cgroup namespace")?;
        }
        if self.new & NEWNET != 0 {
            sys::loopback_up().or_refuse(|| "cannot bring up the loopback interface")?;
        }
        Ok(())
    }
}

/// Opens the namespaces of a process, to hold them: what can't be opened isn't held.
pub(crate) fn all_of(process: Pid) -> Vec<OwnedFd> {
    let files = fs::read_dir(format!("/proc/{}/ns", process.as_raw_nonzero()));
    let files = files.into_iter().flatten().flatten();
    let opened = files.flat_map(|file| fs::File::open(file.path()));
    opened.map(OwnedFd::from).collect()
}

/// Enters the namespaces `flags` of the process behind `target`.
///
/// # Errors
/// ESRCH, as a fault, if that process has ended.
pub(crate) fn enter_all_of(target: &OwnedFd, flags: u64) -> Result<(), Fault> {
    move_into_thread_name_spaces(target.as_fd(), kinds(flags))
        .or_refuse(|| "cannot enter the container's namespaces")?;
    if flags & NEWUSER != 0 {
        become_root()?;
    }
    Ok(())
}

/// Forks into new namespaces `flags` and into `cgroup`, with the child born into the pid namespace
/// of `target` (a pidfd, or an open namespace file) if there is one.
///
/// # Errors
/// What entering, forking or coming back said.
pub(crate) fn fork_into(
    target: Option<&OwnedFd>,
    flags: u64,
    cgroup: Option<BorrowedFd<'_>>,
) -> Result<Forked, Fault> {
    let fork = || sys::fork(flags, cgroup).or_refuse(|| "cannot make the process");
    let Some(target) = target else {
        return fork();
    };
    let own = pidfd_open(rustix::process::getpid(), PidfdFlags::empty())
        .or_internal(|| "cannot open the agent's own pidfd")?;
    let pid = ThreadNameSpaceType::PROCESS_ID;
    move_into_thread_name_spaces(target.as_fd(), pid)
        .or_refuse(|| "cannot enter the container's pid namespace")?;
    let forked = fork();
    if !matches!(forked, Ok(Forked::Child)) {
        move_into_thread_name_spaces(own.as_fd(), pid)
            .or_internal(|| "cannot come back to the agent's pid namespace")?;
    }
    forked
}

fn become_root() -> Result<(), Fault> {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_res_gid, set_thread_res_uid};
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)
        .or_refuse(|| "cannot become group 0 of the user namespace")?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .or_refuse(|| "cannot become user 0 of the user namespace")
}

fn kinds(flags: u64) -> ThreadNameSpaceType {
    ThreadNameSpaceType::from_bits_retain(flags as u32)
}

fn map_lines(maps: &[IdMap]) -> String {
    let mut lines = String::new();
    for map in maps {
        let line = format!("{} {} {}\n", map.container, map.host, map.size);
        lines.push_str(&line);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(namespaces: &str) -> Linux {
        let json = format!(
            r#"{{"namespaces":{namespaces},"uidMappings":[{{"containerID":0,"hostID":1000,"size":10}}]}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    #[test]
    fn a_container_always_has_its_own_mounts() {
        let asked = Namespaces::of(&spec("[]")).unwrap();
        assert_eq!(asked.clone_flags(), NEWNS);
        assert!(!asked.has_pid());
    }

    #[test]
    fn the_cgroup_namespace_is_not_made_by_clone() {
        let asked = Namespaces::of(&spec(r#"[{"type":"pid"},{"type":"cgroup"}]"#)).unwrap();
        assert_eq!(asked.clone_flags(), NEWNS | NEWPID);
        assert_eq!(asked.to_enter(), NEWNS | NEWCGROUP);
    }

    #[test]
    fn a_user_namespace_has_maps() {
        let asked = Namespaces::of(&spec(r#"[{"type":"user"}]"#)).unwrap();
        assert_eq!(asked.maps, Some(("0 1000 10\n".into(), String::new())));
    }

    #[test]
    fn what_cannot_be_made_is_refused() {
        for list in [r#"[{"type":"time"}]"#, r#"[{"type":"mount","path":"/x"}]"#] {
            assert!(Namespaces::of(&spec(list)).is_err());
        }
    }
}
