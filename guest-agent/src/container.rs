//! The containers of this guest.
//!
//! Owns: their names, first processes and cgroups, from the request to the last process's end.
//! Refuses: a name in use, a process in a container that doesn't run.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_proto::{CgroupStats, ContainerStart, ExecStart, ProcessPage};
use rustix::process::Pid;

use crate::cgroup::{self, Cgroup, OomWatch};
use crate::fault::{Fault, Tried};
use crate::log::say;
use crate::namespaces::Namespaces;
use crate::processes;
use crate::seccomp::Filter;
use crate::spare::{Habit, Spare};
use crate::spawn::{self, Born, Start};
use crate::spec::{self, Process, Resources};
use crate::stage::Scenery;
use crate::sys;

/// How long processes may take to stand still: one may be deep in the kernel.
const STILL: Duration = Duration::from_secs(2);

/// How long after a container's end what is left of it is cleared up: its host has been told by then,
/// and most have ended the guest, which is less work.
const PEACE: Duration = Duration::from_millis(100);

/// Longest name of a container, in bytes.
const MAX_NAME: usize = 128;

/// The names of the cgroups that are made in advance: none that a container can have.
const FIRST: &str = ".first";
const KEPT: &str = ".kept";

/// One container.
#[derive(Debug)]
pub(crate) struct Container {
    first: Pid,
    pidfd: OwnedFd,
    cgroup: Option<Cgroup>,
    enter: u64,
    own_pids: bool,
    /// Whether its process ids began with its first process.
    began_pids: bool,
    filter: Option<Filter>,
    runs: bool,
    /// Its namespaces, if they are held.
    held: Vec<OwnedFd>,
}

/// What is left of a container that has ended: its cgroup and its namespaces.
#[derive(Debug)]
struct Leftover(Cgroup, Vec<OwnedFd>);

impl Container {
    /// A descriptor for its first process.
    pub(crate) fn pidfd(&self) -> &OwnedFd {
        &self.pidfd
    }

    /// Its cgroup, where the guest has them.
    pub(crate) fn cgroup(&self) -> Option<&Cgroup> {
        self.cgroup.as_ref()
    }

    /// The namespaces that a further process enters, but for the pid namespace.
    pub(crate) fn to_enter(&self) -> u64 {
        self.enter
    }

    /// Whether its process ids are its own.
    pub(crate) fn has_pid_namespace(&self) -> bool {
        self.own_pids
    }

    /// The filter of all its processes.
    pub(crate) fn filter(&self) -> Option<&Filter> {
        self.filter.as_ref()
    }
}

/// All containers.
#[derive(Debug, Default)]
pub(crate) struct Containers {
    all: BTreeMap<String, Container>,
    cgroups: Option<PathBuf>,
    delegated: bool,
    /// Made in advance, for the next container: its cgroup, or its first process in that.
    first: Option<Cgroup>,
    spare: Option<Spare>,
    kept: Option<Cgroup>,
    /// What the first container asked for.
    habit: Option<Habit>,
    leftover: Vec<Leftover>,
    /// When what is left is to be cleared up; at once where nothing stands here.
    peace_until: Option<Instant>,
}

impl Containers {
    /// No containers yet; their cgroups will be made below `cgroups`.
    pub(crate) fn new(cgroups: Option<PathBuf>) -> Self {
        Self {
            cgroups,
            ..Self::default()
        }
    }

    /// Whether nothing of any container is left.
    pub(crate) fn is_empty(&self) -> bool {
        self.all.is_empty() && self.leftover.is_empty()
    }

    /// Makes a container and its first process.
    ///
    /// # Errors
    /// Refuses names in use and specs that can't be met; nothing is left behind.
    pub(crate) fn start(&mut self, start: &ContainerStart) -> Result<Born, Fault> {
        self.check_name(&start.id)?;
        let asked = Start::of(start)?;
        let (spec, process) = (&asked.spec, asked.process()?);
        if let Some(field) = process.unsupported().or(spec.linux.unsupported()) {
            return Err(Fault::refused(format!("{field} is not supported")));
        }
        let namespaces = Namespaces::of(&spec.linux)?;
        let filter = asked.filter()?;
        self.sweep();
        let (born, pidfd, cgroup, held) = match self.order_spare(start, &asked, &namespaces)? {
            Some(spare) => {
                let mut parts = spare.into_parts();
                parts.born.pipes = parts.born.pipes.filter(|_| !process.terminal);
                (parts.born, parts.pidfd, Some(parts.cgroup), parts.held)
            }
            None => {
                let cgroup = self.make_cgroup(&start.id, &spec.linux.resources)?;
                let group = cgroup.as_ref();
                match spawn::first(&asked, process, &namespaces, group, filter.clone()) {
                    Ok((mut born, pidfd)) => {
                        born.oom_watch = group.and_then(OomWatch::of);
                        (born, pidfd, cgroup, Vec::new())
                    }
                    Err(fault) => {
                        self.leave(cgroup);
                        return Err(fault);
                    }
                }
            }
        };
        if self.habit.is_none() && namespaces.are_any_containers() {
            self.habit = Some(Habit {
                namespaces: namespaces.clone(),
                scenery: Scenery::of(spec),
            });
        }
        self.all.insert(
            start.id.clone(),
            Container {
                first: born.pid,
                pidfd,
                cgroup,
                enter: namespaces.to_enter(),
                own_pids: namespaces.has_pid(),
                began_pids: namespaces.begins_pids(),
                filter,
                runs: false,
                held,
            },
        );
        Ok(born)
    }

    /// Has the spare process, if there is one that fits, be the container's first.
    fn order_spare(
        &mut self,
        start: &ContainerStart,
        asked: &Start,
        namespaces: &Namespaces,
    ) -> Result<Option<Spare>, Fault> {
        let Some(spare) = self.spare.take() else {
            return Ok(None);
        };
        if !spare.fits(namespaces) {
            self.discard(spare);
            return Ok(None);
        }
        if let Err(fault) = spare.cgroup().limit(&asked.spec.linux.resources) {
            self.discard(spare);
            return Err(fault);
        }
        if let Err(fault) = spare.order(start) {
            // It has died: the container gets one of its own.
            say(&fault);
            self.discard(spare);
            return Ok(None);
        }
        Ok(Some(spare))
    }

    fn discard(&mut self, spare: Spare) {
        spare.cgroup().kill();
        self.leave(Some(spare.into_parts().cgroup));
    }

    /// Lets go of the spare process: what was mounted since it was made is not in its sight.
    pub(crate) fn discard_spare(&mut self) {
        if let Some(spare) = self.spare.take() {
            self.discard(spare);
        }
    }

    fn check_name(&self, id: &str) -> Result<(), Fault> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
        let good = !id.is_empty()
            && id.len() <= MAX_NAME
            && id.bytes().all(plain)
            && !id.starts_with('.')
            // No file of the cgroup file system itself.
            && !["cgroup.", "memory.", "cpu.", "cpuset.", "io.", "pids.", "misc."]
                .iter()
                .any(|prefix| id.starts_with(prefix));
        if !good {
            return Err(Fault::refused(format!("{id:?} is no name for a container")));
        }
        if self.all.contains_key(id) {
            return Err(Fault::refused(format!("container {id} already exists")));
        }
        Ok(())
    }

    fn make_cgroup(&mut self, id: &str, resources: &Resources) -> Result<Option<Cgroup>, Fault> {
        let group = match self.first.take() {
            Some(first) => first,
            None => {
                let Some(parent) = self.parent() else {
                    return Ok(None);
                };
                Cgroup::make(&parent, id)?
            }
        };
        if let Err(fault) = group.limit(resources) {
            self.leave(Some(group));
            return Err(fault);
        }
        Ok(Some(group))
    }

    /// Where the containers' cgroups are made, able to hand on every controller.
    fn parent(&mut self) -> Option<PathBuf> {
        let parent = self.cgroups.clone()?;
        if !self.delegated {
            if let Err(error) = cgroup::delegate(&parent) {
                say(format_args!(
                    "cannot hand controllers to containers: {error}"
                ));
            }
            self.delegated = true;
        }
        Some(parent)
    }

    /// Makes the next container's cgroup in advance, with its first process if there was a container
    /// before and nothing is mounted until the next, and a cgroup that stays for good: when a first
    /// one is made, and when the last one goes, the kernel patches its own code, which copies of
    /// this guest share.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn prepare(&mut self, all_is_mounted: bool) -> Result<(), Fault> {
        if self.first.is_some() || self.spare.is_some() {
            return Ok(());
        }
        let Some(parent) = self.parent() else {
            return Ok(());
        };
        self.kept = Some(Cgroup::make(&parent, KEPT)?);
        let first = Cgroup::make(&parent, FIRST)?;
        let Some(habit) = self.habit.as_ref().filter(|_| all_is_mounted) else {
            self.first = Some(first);
            return Ok(());
        };
        match Spare::make(habit, first) {
            Ok(spare) => self.spare = Some(spare),
            // The next container gets all of its own then.
            Err((fault, first)) => {
                say(&fault);
                first.kill();
                self.leave(Some(first));
            }
        }
        Ok(())
    }

    /// Makes another process in a container.
    ///
    /// # Errors
    /// Refuses if the container doesn't run.
    pub(crate) fn exec(&self, start: &ExecStart) -> Result<Born, Fault> {
        let container = self
            .all
            .get(&start.id)
            .filter(|container| container.runs)
            .ok_or_else(|| Fault::refused(format!("container {} is not running", start.id)))?;
        let process: Process = spec::read(&start.process)?;
        if let Some(field) = process.unsupported() {
            return Err(Fault::refused(format!("{field} is not supported")));
        }
        spawn::another(container, &process)
    }

    /// Notes that the container's command runs.
    pub(crate) fn runs(&mut self, first: Pid) {
        let mut all = self.all.values_mut();
        if let Some(container) = all.find(|container| container.first == first) {
            container.runs = true;
        }
    }

    /// How many processes of the container the kernel killed for want of memory.
    pub(crate) fn oom_kills(&self, id: &str) -> u64 {
        let group = self.all.get(id).and_then(Container::cgroup);
        group.map_or(0, Cgroup::oom_kills)
    }

    /// What a container has used and may use.
    ///
    /// # Errors
    /// Refuses if there is no such container, or nothing counts.
    pub(crate) fn stats(&self, id: &str) -> Result<CgroupStats, Fault> {
        Ok(self.group(id)?.stats())
    }

    /// Changes a container's limits.
    ///
    /// # Errors
    /// As [`Self::stats`], and if the kernel refuses.
    pub(crate) fn update(&self, id: &str, resources: Resources) -> Result<(), Fault> {
        self.group(id)?.update(resources)
    }

    /// Every container.
    pub(crate) fn each(&self) -> impl Iterator<Item = &Container> {
        self.all.values()
    }

    /// Has every process of every container stand still.
    ///
    /// # Errors
    /// If they don't; all go on then.
    pub(crate) fn stand_still(&self) -> Result<(), Fault> {
        let until = Instant::now() + STILL;
        for (id, container) in &self.all {
            let group = container.cgroup();
            let group = group.ok_or_else(|| Fault::refused("this guest has no cgroups"))?;
            let frozen = group.stand_still(until);
            if let Err(fault) = frozen.or_refuse(|| format!("container {id} can't be frozen")) {
                self.go_on()?;
                return Err(fault);
            }
        }
        Ok(())
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn go_on(&self) -> Result<(), Fault> {
        let groups = self.all.values().filter_map(Container::cgroup);
        for group in groups {
            group.freeze(false)?;
        }
        Ok(())
    }

    fn group(&self, id: &str) -> Result<&Cgroup, Fault> {
        let group = self.known(id)?.cgroup();
        group.ok_or_else(|| Fault::refused("this guest has no cgroups"))
    }

    fn known(&self, id: &str) -> Result<&Container, Fault> {
        let container = self.all.get(id);
        container.ok_or_else(|| Fault::refused(format!("container {id} does not exist")))
    }

    /// A container's processes with ids above `after`.
    ///
    /// # Errors
    /// Refuses if there is no such container.
    pub(crate) fn processes(&self, id: &str, after: u32) -> Result<ProcessPage, Fault> {
        let container = self.known(id)?;
        let pids = match &container.cgroup {
            Some(group) => group.processes(),
            None => vec![container.first.as_raw_nonzero().get()],
        };
        Ok(processes::page(pids, after))
    }

    /// Sends a signal to every process of a container.
    pub(crate) fn signal_all(&self, id: &str, signal: i32) {
        let Some(container) = self.all.get(id) else {
            return;
        };
        match &container.cgroup {
            Some(group) if signal == libc::SIGKILL => group.kill(),
            Some(group) => {
                for pid in group.processes() {
                    let _ = sys::kill(pid, signal);
                }
            }
            None => {
                let _ = sys::kill(container.first.as_raw_nonzero().get(), signal);
            }
        }
    }

    /// Clears up if this process, which has ended, was a container's first: the rest of the
    /// container ends with it.
    pub(crate) fn ended(&mut self, pid: Pid) {
        if self.spare.as_ref().is_some_and(|spare| spare.pid() == pid) {
            self.discard_spare();
            return;
        }
        let name = self
            .all
            .iter()
            .find(|(_, container)| container.first == pid)
            .map(|(name, _)| name.clone());
        if let Some(container) = name.and_then(|name| self.all.remove(&name))
            && let Some(group) = container.cgroup
        {
            // The first of a pid namespace of its own is reaped after all others in there have
            // ended (pid_namespaces(7)).
            if !container.began_pids {
                group.kill();
            }
            self.leftover.push(Leftover(group, container.held));
            self.peace_until = Some(Instant::now() + PEACE);
        }
    }

    /// Has a container's processes stand still, or go on.
    ///
    /// # Errors
    /// As [`Self::stats`], and if the kernel refuses.
    pub(crate) fn freeze(&self, id: &str, frozen: bool) -> Result<(), Fault> {
        self.group(id)?.freeze(frozen)
    }

    /// Kills a container, in whatever state it is.
    pub(crate) fn kill(&self, id: &str) {
        self.signal_all(id, libc::SIGKILL);
        if let Some(container) = self.all.get(id) {
            // It may be in no cgroup yet.
            let _ = sys::kill(container.first.as_raw_nonzero().get(), libc::SIGKILL);
        }
    }

    /// Kills every container, and takes back what was made in advance.
    pub(crate) fn end_all(&mut self) {
        self.all.keys().for_each(|id| self.kill(id));
        self.discard_spare();
        let (first, kept) = (self.first.take(), self.kept.take());
        self.leave(first);
        self.leave(kept);
    }

    fn leave(&mut self, group: Option<Cgroup>) {
        let left = group.map(|group| Leftover(group, Vec::new()));
        self.leftover.extend(left);
    }

    /// When there will be something to clear up.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.peace_until
    }

    /// Clears up, if it is time.
    pub(crate) fn sweep_at(&mut self, now: Instant) {
        if self.peace_until.is_none_or(|until| until <= now) {
            self.sweep();
        }
    }

    /// Lets go of ended containers' namespaces, and removes their cgroups if their last process is
    /// gone by now.
    pub(crate) fn sweep(&mut self) {
        self.peace_until = None;
        self.leftover.retain_mut(|Leftover(group, held)| {
            held.clear();
            !group.remove()
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain() {
        let containers = Containers::default();
        for good in ["a", "web-1", "A_b.c", &"x".repeat(128)] {
            assert!(containers.check_name(good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "memory.max", "ä", &"x".repeat(129)] {
            assert!(containers.check_name(bad).is_err(), "{bad}");
        }
    }
}
