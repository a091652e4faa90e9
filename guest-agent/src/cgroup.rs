//! The cgroup of each container (cgroup v2, cgroups(7)).
//!
//! Owns: turning the spec's limits into the kernel's files, making the group, changing its
//! limits, reading what it has used, watching its out-of-memory count, freezing, killing and
//! removing it. Refuses: a limit whose controller the guest's kernel lacks; it is never dropped
//! in silence.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Instant;

use hull_proto::{CgroupStats, weight_of_shares};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, Timespec};
use rustix::io::Errno;

use crate::fault::{Fault, Tried};
use crate::spec::{BlockIo, Cpu, Memory, Resources, Throttle};

/// How deep a container's own groups are followed.
const MAX_DEPTH: u32 = 64;

/// One container's group.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: OwnedFd,
}

impl Cgroup {
    /// Makes the group `id` below `parent`, without limits.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn make(parent: &Path, id: &str) -> Result<Self, Fault> {
        let path = parent.join(id);
        match fs::create_dir(&path) {
            // A group of that name without processes is a container's that ended.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                fs::remove_dir(&path).and_then(|()| fs::create_dir(&path))
            }
            other => other,
        }
        .or_internal(|| format!("cannot make cgroup {id}"))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&path, flags, Mode::empty())
            .or_internal(|| format!("cannot open cgroup {id}"))?;
        Ok(Self { path, directory })
    }

    /// Gives a group that was just made its limits.
    ///
    /// # Errors
    /// Refuses limits that the kernel refuses; those set before such a one stay.
    pub(crate) fn limit(&self, resources: &Resources) -> Result<(), Fault> {
        self.set(&limits(resources)?)
    }

    /// Changes its limits while it is in use.
    ///
    /// # Errors
    /// Refuses limits that the kernel refuses; those set before such a one stay.
    pub(crate) fn update(&self, mut resources: Resources) -> Result<(), Fault> {
        let cpu = &mut resources.cpu;
        if cpu.quota.is_none_or(|quota| quota == 0) && cpu.period.is_some() {
            // The kernel takes a quota without a period, not the other way round.
            let now = fs::read_to_string(self.path.join("cpu.max")).unwrap_or_default();
            cpu.quota = now.split(' ').next().and_then(|quota| quota.parse().ok());
        }
        let files = limits(&resources)?;
        if resources.memory.check_before_update
            && let Some(limit) = resources.memory.limit.filter(|&limit| limit > 0)
            && let usage = self.stats().memory.usage
            && usage > limit.unsigned_abs()
        {
            return Err(Fault::refused(format!(
                "unable to set memory limit to {limit} (current usage: {usage})"
            )));
        }
        self.set(&files)
    }

    fn set(&self, files: &[(String, String)]) -> Result<(), Fault> {
        for (file, value) in files {
            self.write(file, value)
                .or_refuse(|| format!("cannot set {file} to {value:?}"))?;
        }
        Ok(())
    }

    /// What it has used and may use.
    pub(crate) fn stats(&self) -> CgroupStats {
        CgroupStats::read(|file| fs::read_to_string(self.path.join(file)).ok())
    }

    /// The group's directory, for clone3.
    pub(crate) fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// How many of its processes the kernel killed for want of memory.
    pub(crate) fn oom_kills(&self) -> u64 {
        let events = fs::read_to_string(self.path.join("memory.events")).unwrap_or_default();
        count_of(&events, "oom_kill")
    }

    /// Every process in the group, and in those that the container made below it.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let mut pids = Vec::new();
        add_processes(&self.path, 0, &mut pids);
        pids
    }

    /// Has every process in it and below stand still, or go on.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub(crate) fn freeze(&self, frozen: bool) -> Result<(), Fault> {
        self.write("cgroup.freeze", if frozen { "1" } else { "0" })
            .or_refuse(|| "cannot set cgroup.freeze")
    }

    /// Has every process in it and below stand still, and waits until they do.
    ///
    /// # Errors
    /// ETIMEDOUT at `until`.
    pub(crate) fn stand_still(&self, until: Instant) -> io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let events = rustix::fs::openat(&self.directory, "cgroup.events", flags, Mode::empty())?;
        self.write("cgroup.freeze", "1")?;
        loop {
            let mut text = [0; 256];
            let count = rustix::io::pread(&events, &mut text, 0)?;
            let text = str::from_utf8(text.get(..count).unwrap_or_default()).unwrap_or_default();
            if count_of(text, "frozen") == 1 {
                return Ok(());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Errno::TIMEDOUT.into());
            }
            let timeout = Timespec::try_from(left).ok();
            match poll(
                &mut [PollFd::new(&events, PollFlags::PRI)],
                timeout.as_ref(),
            ) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Kills every process in it and below.
    pub(crate) fn kill(&self) {
        let _ = self.write("cgroup.kill", "1");
    }

    /// Removes it and what the container made below it, and says whether it is gone.
    pub(crate) fn remove(&self) -> bool {
        remove_tree(&self.path, 0)
    }

    fn write(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.path.join(file), value)
    }
}

/// The kernel's notices of killings in one group for want of memory.
#[derive(Debug)]
pub(crate) struct OomWatch {
    events: OwnedFd,
    seen: u64,
}

impl OomWatch {
    /// Watches a group; nothing where memory isn't counted.
    pub(crate) fn of(group: &Cgroup) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let events =
            rustix::fs::openat(&group.directory, "memory.events", flags, Mode::empty()).ok()?;
        let mut watch = Self { events, seen: 0 };
        // Never read, it would be news to the first poll.
        watch.read()?;
        Some(watch)
    }

    /// How many killings there were when it was last looked at.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// What to poll, for `PRI`.
    pub(crate) fn fd(&self) -> &OwnedFd {
        &self.events
    }

    /// The count of killings, if it has grown.
    pub(crate) fn news(&mut self) -> Option<u64> {
        let at_once = Timespec::default();
        let mut fds = [PollFd::new(&self.events, PollFlags::PRI)];
        if let Ok(0) = poll(&mut fds, Some(&at_once)) {
            return None;
        }
        let before = self.seen;
        let now = self.read()?;
        (now > before).then_some(now)
    }

    fn read(&mut self) -> Option<u64> {
        let mut text = [0; 512];
        let count = rustix::io::pread(&self.events, &mut text, 0).ok()?;
        let text = str::from_utf8(text.get(..count)?).ok()?;
        self.seen = count_of(text, "oom_kill");
        Some(self.seen)
    }
}

fn add_processes(path: &Path, depth: u32, pids: &mut Vec<i32>) {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
    if depth < MAX_DEPTH {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            add_processes(&entry.path(), depth + 1, pids);
        }
    }
}

fn remove_tree(path: &Path, depth: u32) -> bool {
    match fs::remove_dir(path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::NotFound => true,
        Err(_) if depth > MAX_DEPTH => false,
        Err(_) => {
            let entries = fs::read_dir(path).into_iter().flatten().flatten();
            for entry in entries.filter(|entry| entry.path().is_dir()) {
                remove_tree(&entry.path(), depth + 1);
            }
            fs::remove_dir(path).is_ok()
        }
    }
}

/// Lets the children of `parent` use every controller that it has.
///
/// # Errors
/// As the file system has them.
pub(crate) fn delegate(parent: &Path) -> io::Result<()> {
    let controllers = fs::read_to_string(parent.join("cgroup.controllers"))?;
    let all: Vec<String> = controllers
        .split_whitespace()
        .map(|name| format!("+{name}"))
        .collect();
    if all.is_empty() {
        return Ok(());
    }
    fs::write(parent.join("cgroup.subtree_control"), all.join(" "))
}

fn count_of(events: &str, name: &str) -> u64 {
    let value = |line: &str| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok();
    events.lines().find_map(value).unwrap_or(0)
}

/// The kernel's files for these limits, in the order in which they are written.
fn limits(resources: &Resources) -> Result<Vec<(String, String)>, Fault> {
    let mut files = Vec::new();
    add_memory(&resources.memory, &mut files)?;
    add_cpu(&resources.cpu, &mut files);
    if let Some(pids) = &resources.pids {
        add(
            &mut files,
            "pids.max",
            &or_max(pids.limit.max(0), pids.limit > 0),
        );
    }
    add_io(&resources.block_io, &mut files);
    for limit in &resources.hugepage_limits {
        let file = format!("hugetlb.{}.max", limit.page_size);
        add(&mut files, &file, &limit.limit);
    }
    for (file, value) in &resources.unified {
        if file.contains('/') || !file.contains('.') || file.starts_with("cgroup.") {
            return Err(Fault::refused(format!("no cgroup limit is named {file:?}")));
        }
        add(&mut files, file, value);
    }
    Ok(files)
}

fn add<V: ToString + ?Sized>(files: &mut Vec<(String, String)>, file: &str, value: &V) {
    files.push((file.to_owned(), value.to_string()));
}

fn or_max(value: i64, limited: bool) -> String {
    if limited {
        value.to_string()
    } else {
        "max".into()
    }
}

fn add_memory(memory: &Memory, files: &mut Vec<(String, String)>) -> Result<(), Fault> {
    // 0 and below mean "no limit" to the engines.
    let limit = memory.limit.filter(|&limit| limit != 0);
    if let Some(limit) = limit {
        add(files, "memory.max", &or_max(limit, limit > 0));
    }
    match (memory.swap.filter(|&swap| swap != 0), limit) {
        (None, _) => {}
        (Some(swap), _) if swap < 0 => add(files, "memory.swap.max", "max"),
        // The spec's swap is memory and swap together.
        (Some(swap), Some(limit)) if limit > 0 && swap >= limit => {
            add(files, "memory.swap.max", &(swap - limit));
        }
        (Some(swap), _) => {
            return Err(Fault::refused(format!(
                "memory and swap together ({swap}) must be at least the memory limit, and need one"
            )));
        }
    }
    if let Some(reservation) = memory.reservation.filter(|&low| low > 0) {
        add(files, "memory.low", &reservation);
    }
    Ok(())
}

fn add_cpu(cpu: &Cpu, files: &mut Vec<(String, String)>) {
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        add(files, "cpu.weight", &weight_of_shares(shares));
    }
    // 0 says nothing, to the engines.
    let period = cpu.period.filter(|&period| period != 0);
    let quota = cpu.quota.filter(|&quota| quota != 0);
    if quota.is_some() || period.is_some() {
        let quota = quota.unwrap_or(-1);
        let mut value = or_max(quota, quota > 0);
        // Without one the kernel keeps that which there is.
        if let Some(period) = period {
            value = format!("{value} {period}");
        }
        add(files, "cpu.max", &value);
    }
    if let Some(burst) = cpu.burst {
        add(files, "cpu.max.burst", &burst);
    }
    if let Some(idle) = cpu.idle {
        add(files, "cpu.idle", &idle);
    }
    for (file, list) in [("cpuset.cpus", &cpu.cpus), ("cpuset.mems", &cpu.mems)] {
        if let Some(list) = list.as_deref().filter(|list| !list.is_empty()) {
            add(files, file, list);
        }
    }
}

/// blkio's weight (10 to 1000) to io's (1 to 10000).
fn weight_of_blkio(weight: u16) -> u64 {
    let weight = u64::from(weight.clamp(10, 1000));
    1 + (weight - 10) * 9999 / 990
}

fn add_io(io: &BlockIo, files: &mut Vec<(String, String)>) {
    if let Some(weight) = io.weight.filter(|&weight| weight != 0) {
        add(
            files,
            "io.weight",
            &format!("default {}", weight_of_blkio(weight)),
        );
    }
    let throttles: [(&str, &[Throttle]); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        for device in devices {
            let (major, minor, rate) = (device.major, device.minor, device.rate);
            add(files, "io.max", &format!("{major}:{minor} {key}={rate}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn files(json: &str) -> Vec<(String, String)> {
        limits(&serde_json::from_str(json).unwrap()).unwrap()
    }

    fn pairs(files: &[(String, String)]) -> Vec<(&str, &str)> {
        files
            .iter()
            .map(|(file, value)| (file.as_str(), value.as_str()))
            .collect()
    }

    #[test]
    fn an_engines_limits_become_files() {
        let files = files(
            r#"{"memory":{"limit":1000,"swap":3000,"reservation":500},
                "cpu":{"quota":150000,"period":100000,"cpus":"0-1"},"pids":{"limit":64}}"#,
        );
        assert_eq!(
            pairs(&files),
            [
                ("memory.max", "1000"),
                ("memory.swap.max", "2000"),
                ("memory.low", "500"),
                ("cpu.max", "150000 100000"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", "64"),
            ]
        );
    }

    #[test]
    fn no_limit_is_max() {
        let files =
            files(r#"{"memory":{"limit":-1,"swap":-1},"cpu":{"quota":-1},"pids":{"limit":-1}}"#);
        assert_eq!(
            pairs(&files),
            [
                ("memory.max", "max"),
                ("memory.swap.max", "max"),
                ("cpu.max", "max"),
                ("pids.max", "max"),
            ]
        );
    }

    #[test]
    fn zero_says_nothing() {
        let said = files(r#"{"memory":{"limit":0},"cpu":{"quota":0,"period":0,"shares":0}}"#);
        assert_eq!(pairs(&said), []);
        let period = files(r#"{"cpu":{"quota":0,"period":50000}}"#);
        assert_eq!(pairs(&period), [("cpu.max", "max 50000")]);
    }

    #[test]
    fn io_limits_name_their_device() {
        let files = files(
            r#"{"blockIO":{"weight":1000,
                "throttleReadBpsDevice":[{"major":254,"minor":0,"rate":99}]}}"#,
        );
        assert_eq!(
            pairs(&files),
            [("io.weight", "default 10000"), ("io.max", "254:0 rbps=99")]
        );
    }

    #[test]
    fn unified_files_stay_in_the_group() {
        for name in ["../memory.max", "procs", "cgroup.procs"] {
            let json = format!(r#"{{"unified":{{"{name}":"1"}}}}"#);
            assert!(
                limits(&serde_json::from_str(&json).unwrap()).is_err(),
                "{name}"
            );
        }
    }

    #[test]
    fn swap_below_memory_is_refused() {
        let resources = serde_json::from_str(r#"{"memory":{"limit":10,"swap":5}}"#).unwrap();
        assert!(limits(&resources).is_err());
    }

    #[test]
    fn the_kill_count_is_not_the_group_kill_count() {
        let events = "low 0\noom 2\noom_kill 3\noom_group_kill 9\n";
        assert_eq!(count_of(events, "oom_kill"), 3);
        assert_eq!(count_of("", "oom_kill"), 0);
    }

    proptest! {
        #[test]
        fn weights_stay_in_range(weight: u16) {
            prop_assert!((1..=10_000).contains(&weight_of_blkio(weight)));
        }
    }
}
