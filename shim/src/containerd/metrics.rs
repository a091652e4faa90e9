//! Statistics in containerd's form: cgroup v2's own numbers, of the container's cgroup in its
//! guest, and its VM's cards as they are counted on the host.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use hull_sandbox::CgroupStats;
use hull_sandbox::control::InterfaceStats;
use serde_json::{Value, json};

/// The message's name.
const NAME: &str = "io.containerd.cgroups.v2.Metrics";
/// How no limit is written.
const NO_LIMIT: u64 = u64::MAX;

/// What a sandbox's holder and its containers have used together, of the memory that their guest
/// was started with or has grown to, for the containers' limits. What no sum tells, their peaks and
/// limits, is left out.
pub(crate) fn total(
    holder: &CgroupStats,
    containers: &[CgroupStats],
    memory_bytes: u64,
) -> CgroupStats {
    let mut sum = json!(holder);
    for one in containers {
        add(&mut sum, &json!(one));
    }
    let limits = containers.iter().filter_map(|one| one.memory.limit);
    let memory_bytes = memory_bytes.max(limits.fold(0, u64::saturating_add));
    let mut total: CgroupStats = serde_json::from_value(sum).unwrap_or_default();
    (total.memory.peak, total.memory.swap_peak) = (0, 0);
    (total.memory.limit, total.memory.swap_limit) = (Some(memory_bytes), None);
    total.pids.limit = None;
    total
}

/// Adds number to number, and list to list.
fn add(sum: &mut Value, other: &Value) {
    match (sum, other) {
        (Value::Object(sum), Value::Object(other)) => {
            for (name, value) in other {
                add(sum.entry(name.as_str()).or_insert(Value::Null), value);
            }
        }
        (Value::Array(sum), Value::Array(other)) => sum.extend(other.iter().cloned()),
        (sum, other) => {
            if let (Some(a), Some(b)) = (sum.as_u64(), other.as_u64()) {
                *sum = json!(a.saturating_add(b));
            }
        }
    }
}

/// A message with these numbers.
pub(crate) fn of(stats: &CgroupStats, interfaces: &[InterfaceStats]) -> Any {
    let (cpu, events) = (&stats.cpu, &stats.memory_events);
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids.current,
            limit: stats.pids.limit.unwrap_or(NO_LIMIT),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
            nr_periods: cpu.nr_periods,
            nr_throttled: cpu.nr_throttled,
            throttled_usec: cpu.throttled_usec,
            ..CPUStat::default()
        }),
        memory: MessageField::some(memory(stats)),
        memory_events: MessageField::some(MemoryEvents {
            low: events.low,
            high: events.high,
            max: events.max,
            oom: events.oom,
            oom_kill: events.oom_kill,
            ..MemoryEvents::default()
        }),
        io: MessageField::some(io(stats)),
        network: interfaces.iter().map(network).collect(),
        ..Metrics::default()
    };
    Any {
        type_url: NAME.to_owned(),
        // Nothing of it can fail to be written: no field is required.
        value: metrics.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

fn memory(stats: &CgroupStats) -> MemoryStat {
    let (memory, stat) = (&stats.memory, &stats.memory.stat);
    MemoryStat {
        anon: stat.anon,
        file: stat.file,
        kernel_stack: stat.kernel_stack,
        slab: stat.slab,
        sock: stat.sock,
        shmem: stat.shmem,
        file_mapped: stat.file_mapped,
        file_dirty: stat.file_dirty,
        file_writeback: stat.file_writeback,
        anon_thp: stat.anon_thp,
        inactive_anon: stat.inactive_anon,
        active_anon: stat.active_anon,
        inactive_file: stat.inactive_file,
        active_file: stat.active_file,
        unevictable: stat.unevictable,
        slab_reclaimable: stat.slab_reclaimable,
        slab_unreclaimable: stat.slab_unreclaimable,
        pgfault: stat.pgfault,
        pgmajfault: stat.pgmajfault,
        workingset_refault: stat
            .workingset_refault_anon
            .saturating_add(stat.workingset_refault_file),
        workingset_activate: stat
            .workingset_activate_anon
            .saturating_add(stat.workingset_activate_file),
        workingset_nodereclaim: stat.workingset_nodereclaim,
        pgrefill: stat.pgrefill,
        pgscan: stat.pgscan,
        pgsteal: stat.pgsteal,
        pgactivate: stat.pgactivate,
        pgdeactivate: stat.pgdeactivate,
        pglazyfree: stat.pglazyfree,
        pglazyfreed: stat.pglazyfreed,
        thp_fault_alloc: stat.thp_fault_alloc,
        thp_collapse_alloc: stat.thp_collapse_alloc,
        usage: memory.usage,
        usage_limit: memory.limit.unwrap_or(NO_LIMIT),
        max_usage: memory.peak,
        swap_usage: memory.swap_usage,
        swap_limit: memory.swap_limit.unwrap_or(NO_LIMIT),
        swap_max_usage: memory.swap_peak,
        ..MemoryStat::default()
    }
}

fn network(interface: &InterfaceStats) -> NetworkStat {
    NetworkStat {
        name: interface.name.clone(),
        rx_bytes: interface.rx_bytes,
        rx_packets: interface.rx_packets,
        rx_dropped: interface.rx_dropped,
        tx_bytes: interface.tx_bytes,
        tx_packets: interface.tx_packets,
        tx_dropped: interface.tx_dropped,
        ..NetworkStat::default()
    }
}

fn io(stats: &CgroupStats) -> IOStat {
    let entries = stats.io.iter().map(|device| IOEntry {
        major: device.major,
        minor: device.minor,
        rbytes: device.rbytes,
        wbytes: device.wbytes,
        rios: device.rios,
        wios: device.wios,
        ..IOEntry::default()
    });
    IOStat {
        usage: entries.collect(),
        ..IOStat::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pods_numbers_are_its_containers_together() {
        let mut one = CgroupStats::default();
        (one.cpu.usage_usec, one.memory.usage, one.memory.stat.anon) = (5, 100, 60);
        (one.memory.limit, one.memory.peak, one.pids.current) = (Some(9), 300, 2);
        one.io.push(hull_sandbox::IoStats::default());
        let others = [one.clone(), CgroupStats::default()];
        let sum = total(&one, &others, 1 << 29);
        assert_eq!((sum.cpu.usage_usec, sum.memory.usage), (10, 200));
        assert_eq!((sum.memory.stat.anon, sum.pids.current), (120, 4));
        assert_eq!((sum.memory.limit, sum.memory.peak), (Some(1 << 29), 0));
        assert_eq!(sum.io.len(), 2);
        // A guest that has grown has room for all its containers.
        assert_eq!(total(&one, &others, 8).memory.limit, Some(9));
    }
}
