//! What a cgroup and its processes are about, in cgroup v2's own terms (kernel documentation,
//! "Control Group v2"). Numbers and bounded words only: a guest's are read like any other
//! stranger's.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// What a cgroup has used and may use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct CgroupStats {
    /// `cpu.stat`.
    pub cpu: CpuStats,
    /// `memory.*` and `memory.stat`.
    pub memory: MemoryStats,
    /// `memory.events`.
    pub memory_events: MemoryEvents,
    /// `pids.*`.
    pub pids: PidsStats,
    /// `io.stat`, a line each.
    pub io: Vec<IoStats>,
}

/// Processor time, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(
    missing_docs,
    reason = "the kernel's names, each as its documentation has it"
)]
pub struct CpuStats {
    pub usage_usec: u64,
    pub user_usec: u64,
    pub system_usec: u64,
    pub nr_periods: u64,
    pub nr_throttled: u64,
    pub throttled_usec: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryStats {
    /// `memory.current`.
    pub usage: u64,
    /// `memory.max`; none is no limit.
    pub limit: Option<u64>,
    /// `memory.peak`.
    pub peak: u64,
    /// `memory.swap.current`.
    pub swap_usage: u64,
    /// `memory.swap.max`; none is no limit, or no swap at all.
    pub swap_limit: Option<u64>,
    /// `memory.swap.peak`.
    pub swap_peak: u64,
    /// `memory.stat`.
    pub stat: MemoryStat,
}

/// `memory.stat`: bytes, and events since the beginning.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(
    missing_docs,
    reason = "the kernel's names, each as its documentation has it"
)]
pub struct MemoryStat {
    pub anon: u64,
    pub file: u64,
    pub kernel: u64,
    pub kernel_stack: u64,
    pub pagetables: u64,
    pub sock: u64,
    pub shmem: u64,
    pub file_mapped: u64,
    pub file_dirty: u64,
    pub file_writeback: u64,
    pub anon_thp: u64,
    pub inactive_anon: u64,
    pub active_anon: u64,
    pub inactive_file: u64,
    pub active_file: u64,
    pub unevictable: u64,
    pub slab_reclaimable: u64,
    pub slab_unreclaimable: u64,
    pub slab: u64,
    pub workingset_refault_anon: u64,
    pub workingset_refault_file: u64,
    pub workingset_activate_anon: u64,
    pub workingset_activate_file: u64,
    pub workingset_nodereclaim: u64,
    pub pgfault: u64,
    pub pgmajfault: u64,
    pub pgrefill: u64,
    pub pgscan: u64,
    pub pgsteal: u64,
    pub pgactivate: u64,
    pub pgdeactivate: u64,
    pub pglazyfree: u64,
    pub pglazyfreed: u64,
    pub thp_fault_alloc: u64,
    pub thp_collapse_alloc: u64,
}

/// `memory.events`: how often memory was short.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(
    missing_docs,
    reason = "the kernel's names, each as its documentation has it"
)]
pub struct MemoryEvents {
    pub low: u64,
    pub high: u64,
    pub max: u64,
    pub oom: u64,
    pub oom_kill: u64,
}

/// Processes and threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PidsStats {
    /// `pids.current`.
    pub current: u64,
    /// `pids.max`; none is no limit.
    pub limit: Option<u64>,
}

/// Bytes and operations of one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(
    missing_docs,
    reason = "the kernel's names, each as its documentation has it"
)]
pub struct IoStats {
    pub major: u64,
    pub minor: u64,
    pub rbytes: u64,
    pub wbytes: u64,
    pub rios: u64,
    pub wios: u64,
    pub dbytes: u64,
    pub dios: u64,
}

/// One process of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessInfo {
    /// Its id in the guest's first namespace.
    pub pid: u32,
    /// Its parent's.
    pub parent: u32,
    /// Its user's number, as the guest's first namespace has it.
    pub uid: u32,
    /// The number of its terminal, `/dev/pts/N`, if it has one.
    pub terminal: Option<u32>,
    /// When it began, in seconds since the epoch by the guest's clock.
    pub started_at_s: u64,
    /// Processor time so far, in milliseconds.
    pub cpu_ms: u64,
    /// Its memory in use, in bytes.
    pub resident_bytes: u64,
    /// Its command line, or its name in brackets.
    pub command: String,
}

/// Some processes of a container, in the order of their ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessPage {
    /// The processes.
    pub processes: Vec<ProcessInfo>,
    /// Whether there are more, with higher ids.
    pub more: bool,
}

impl CgroupStats {
    /// Most block devices that are told of.
    pub const MAX_DEVICES: usize = 16;

    /// Reads a cgroup whose files `read` reads. What isn't there is zero, or no limit.
    #[must_use]
    pub fn read(mut read: impl FnMut(&str) -> Option<String>) -> Self {
        let mut text = |file| read(file).unwrap_or_default();
        Self {
            cpu: flat(&text("cpu.stat")),
            memory: MemoryStats {
                usage: number(&text("memory.current")).unwrap_or(0),
                limit: number(&text("memory.max")),
                peak: number(&text("memory.peak")).unwrap_or(0),
                swap_usage: number(&text("memory.swap.current")).unwrap_or(0),
                swap_limit: number(&text("memory.swap.max")),
                swap_peak: number(&text("memory.swap.peak")).unwrap_or(0),
                stat: flat(&text("memory.stat")),
            },
            memory_events: flat(&text("memory.events")),
            pids: PidsStats {
                current: number(&text("pids.current")).unwrap_or(0),
                limit: number(&text("pids.max")),
            },
            io: devices(&text("io.stat")),
        }
    }
}

/// A file that holds one number; `max` is none.
fn number(text: &str) -> Option<u64> {
    text.trim().parse().ok()
}

/// A flat keyed file, as far as its keys are known.
fn flat<T: Default + for<'a> Deserialize<'a>>(text: &str) -> T {
    let pairs = text.lines().filter_map(|line| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), Value::from(number(value)?)))
    });
    serde_json::from_value(Value::Object(pairs.collect())).unwrap_or_default()
}

/// `io.stat`, a nested keyed file: `254:0 rbytes=1 wbytes=2 …`.
fn devices(text: &str) -> Vec<IoStats> {
    let device = |line: &str| {
        let mut words = line.split(' ');
        let (major, minor) = words.next()?.split_once(':')?;
        let mut fields = Map::new();
        fields.insert("major".into(), number(major)?.into());
        fields.insert("minor".into(), number(minor)?.into());
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            fields.insert(key.into(), number(value)?.into());
        }
        serde_json::from_value(Value::Object(fields)).ok()
    };
    text.lines()
        .filter_map(device)
        .take(CgroupStats::MAX_DEVICES)
        .collect()
}

/// CPU shares (2 to 262144) as cgroup v2's weight (1 to 10000), by the line that the runtimes
/// agreed on.
#[must_use]
pub fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + ((shares - 2) * 9999) / 262_142
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sample(file: &str) -> Option<String> {
        let text = match file {
            "cpu.stat" => "usage_usec 30\nuser_usec 10\nsystem_usec 20\nnr_periods 4\n",
            "memory.current" => "4096\n",
            "memory.max" => "max\n",
            "memory.stat" => "anon 7\nslab 9\nsomething_new 1\npgfault 18446744073709551615\n",
            "memory.events" => "low 0\noom 2\noom_kill 1\noom_group_kill 5\n",
            "pids.max" => "64\n",
            "io.stat" => "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n8:x rbytes=1\n",
            _ => return None,
        };
        Some(text.to_owned())
    }

    #[test]
    fn the_kernels_files_become_numbers() {
        let stats = CgroupStats::read(sample);
        assert_eq!((stats.cpu.usage_usec, stats.cpu.nr_periods), (30, 4));
        assert_eq!((stats.memory.usage, stats.memory.limit), (4096, None));
        assert_eq!(
            (stats.memory.stat.slab, stats.memory.stat.pgfault),
            (9, u64::MAX)
        );
        assert_eq!(
            (stats.memory_events.oom, stats.memory_events.oom_kill),
            (2, 1)
        );
        assert_eq!((stats.pids.current, stats.pids.limit), (0, Some(64)));
        assert_eq!(stats.io.len(), 1);
        assert_eq!((stats.io[0].major, stats.io[0].dios), (254, 6));
    }

    #[test]
    fn statistics_round_trip_in_a_line() {
        let mut stats = CgroupStats::read(sample);
        stats.io = vec![stats.io[0]; CgroupStats::MAX_DEVICES];
        let line = serde_json::to_string(&stats).unwrap();
        assert!(line.len() < 8192, "{}", line.len());
        assert_eq!(serde_json::from_str::<CgroupStats>(&line).unwrap(), stats);
    }

    proptest! {
        #[test]
        fn noise_is_statistics_too(noise in "[a-z0-9:= \n]{0,300}") {
            let stats = CgroupStats::read(|_| Some(noise.clone()));
            prop_assert!(stats.io.len() <= CgroupStats::MAX_DEVICES);
        }

        #[test]
        fn weights_stay_in_range_and_in_order(a: u64, b: u64) {
            let (low, high) = (a.min(b), a.max(b));
            prop_assert!(weight_of_shares(low) <= weight_of_shares(high));
            prop_assert!((1..=10_000).contains(&weight_of_shares(a)));
        }
    }
}
