//! What the limits of an OCI specification mean: which the guest keeps itself, which become its
//! VM's shape, which are the monitor's on the host.
//!
//! Owns: that division. Refuses: what a VM that runs can't be given any more.

use std::collections::HashMap;

use oci_spec::runtime::{
    LinuxCpu, LinuxCpuBuilder, LinuxMemoryBuilder, LinuxResources, LinuxResourcesBuilder, Spec,
};

use hull_proto::weight_of_shares;
use hull_vmm::spec::MEM_UNIT_BYTES;
use serde::Deserialize;
use serde_json::Value;

use super::bundle::GUEST_OVERHEAD;
use super::{Plan, PlanError, PlannedVm, machine};

/// The period of a quota that names none, in microseconds: the kernel's default.
const DEFAULT_PERIOD_US: u32 = 100_000;

/// Files of a host's cgroup and what is written to them, in order.
pub(crate) type CgroupFiles = Vec<(String, String)>;

/// Those of cgroup v2's own files that an engine may set in the guest by their names.
const UNIFIED: [&str; 4] = [
    "memory.high",
    "memory.low",
    "memory.min",
    "memory.oom.group",
];

/// Limits that change.
#[derive(Debug, PartialEq)]
pub(crate) struct Update {
    /// In the guest.
    pub(crate) guest: LinuxResources,
    /// On the host.
    pub(crate) host: CgroupFiles,
}

/// What changes of the limits of a container that runs.
///
/// # Errors
/// If its VM can't be given that.
pub(crate) fn update(asked: &LinuxResources, plan: &Plan) -> Result<Update, PlanError> {
    let memory = asked.memory().as_ref();
    let most = plan.vm.memory_bytes.saturating_add(plan.vm.growth_bytes);
    for limit in memory
        .into_iter()
        .flat_map(|m| [m.limit(), m.reservation()])
    {
        let limit = limit.and_then(|limit| u64::try_from(limit).ok());
        if let Some(limit) = limit.filter(|&limit| limit > most) {
            return Err(PlanError::Update(format!(
                "memory of {} MiB: its virtual machine can have {} MiB on this host",
                limit >> 20,
                most >> 20
            )));
        }
    }
    if let Some(cpus) = asked.cpu().as_ref().and_then(processors)
        && cpus > f64::from(plan.vm.vcpus)
    {
        return Err(PlanError::Update(format!(
            "{cpus} processors: its virtual machine was started with {}",
            plan.vm.vcpus
        )));
    }
    let mut host = on_host(asked);
    if plan.host_cgroup().is_none() {
        // The guest keeps all limits but that, and nothing else can.
        if let Some((file, _)) = host.iter().find(|(file, _)| file.starts_with("cpuset.")) {
            return Err(PlanError::Update(format!(
                "{file}: the container has no cgroup of its own on this host"
            )));
        }
        host.clear();
    }
    Ok(Update {
        guest: in_guest(asked)?,
        host,
    })
}

/// What the processes of a container may use of its VM's memory, in bytes, if that is limited.
pub(crate) fn memory_limit(plan: &Plan) -> Option<u64> {
    limit_of(plan.glance().resources()?)
}

/// The same, of limits as the OCI runtime spec writes them.
pub(crate) fn memory_limit_of(resources: &Value) -> Option<u64> {
    limit_of(&LinuxResources::deserialize(resources).ok()?)
}

fn limit_of(resources: &LinuxResources) -> Option<u64> {
    let limit = resources.memory().as_ref()?.limit()?;
    u64::try_from(limit).ok().filter(|&limit| limit > 0)
}

/// How much memory a VM that runs must have beyond that which it was started with, for its
/// containers to use what their limits allow in sum: as far as it can have it.
pub(crate) fn growth(vm: &PlannedVm, limits: u64) -> u64 {
    let wanted = match limits {
        0 => 0,
        limits => limits.saturating_add(GUEST_OVERHEAD),
    };
    let missing = wanted.saturating_sub(vm.memory_bytes);
    // A guest describes memory by the unit, and takes 1/64 of it for that, from what it has.
    let description = MEM_UNIT_BYTES / 64;
    let units = missing.div_ceil(MEM_UNIT_BYTES - description);
    let all = missing.saturating_add(units.saturating_mul(description));
    all.min(vm.growth_bytes)
        .next_multiple_of(machine::MEMORY_UNIT)
}

/// What the guest itself limits: what it has and what names nothing of the host's.
pub(super) fn in_guest(asked: &LinuxResources) -> Result<LinuxResources, PlanError> {
    let mut kept = LinuxResourcesBuilder::default();
    if let Some(memory) = asked.memory() {
        let mut own = LinuxMemoryBuilder::default();
        if let Some(limit) = memory.limit() {
            own = own.limit(limit);
        }
        if let Some(reservation) = memory.reservation() {
            own = own.reservation(reservation);
        }
        if let Some(careful) = memory.check_before_update() {
            own = own.check_before_update(careful);
        }
        kept = kept.memory(own.build()?);
    }
    if let Some(cpu) = asked.cpu() {
        let mut own = LinuxCpuBuilder::default();
        if let Some(quota) = cpu.quota() {
            own = own.quota(quota);
        }
        if let Some(period) = cpu.period() {
            own = own.period(period);
        }
        if let Some(shares) = cpu.shares() {
            own = own.shares(shares);
        }
        if let Some(burst) = cpu.burst() {
            own = own.burst(burst);
        }
        if let Some(idle) = cpu.idle() {
            own = own.idle(idle);
        }
        kept = kept.cpu(own.build()?);
    }
    if let Some(pids) = asked.pids() {
        kept = kept.pids(*pids);
    }
    if let Some(unified) = asked.unified() {
        let own = unified
            .iter()
            .filter(|(file, _)| UNIFIED.contains(&file.as_str()));
        let own: HashMap<String, String> = own.map(|(f, v)| (f.clone(), v.clone())).collect();
        if !own.is_empty() {
            kept = kept.unified(own);
        }
    }
    Ok(kept.build()?)
}

/// What the monitor's cgroup limits. The guest's memory is limited by its size, and no limit
/// is put on what the monitor needs beside it.
pub(super) fn on_host(asked: &LinuxResources) -> CgroupFiles {
    let mut files = CgroupFiles::new();
    let Some(cpu) = asked.cpu() else { return files };
    let mut add = |file: &str, value: String| files.push((file.to_owned(), value));
    if let Some(shares) = cpu.shares().filter(|&shares| shares != 0) {
        add("cpu.weight", weight_of_shares(shares).to_string());
    }
    if let Some(quota) = cpu.quota().filter(|&quota| quota != 0) {
        let mut value = match quota > 0 {
            true => quota.to_string(),
            false => "max".to_owned(),
        };
        // Without one the kernel keeps that which there is.
        if let Some(period) = cpu.period().filter(|&period| period != 0) {
            value = format!("{value} {period}");
        }
        add("cpu.max", value);
    }
    for (file, list) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(list) = list.as_ref().filter(|list| !list.is_empty()) {
            add(file, list.clone());
        }
    }
    files
}

/// Has the container see the fraction of processors that it may use, as programs look for it to
/// decide how many threads they start.
pub(super) fn show_quota(spec: &mut Spec, cpus: Option<f64>) -> Result<(), PlanError> {
    let (Some(cpus), Some(linux)) = (cpus, spec.linux_mut().as_mut()) else {
        return Ok(());
    };
    let mut resources = linux.resources().clone().unwrap_or_default();
    let (quota, period) = quota(cpus);
    let cpu = LinuxCpuBuilder::default().quota(quota).period(period);
    resources.set_cpu(Some(cpu.build()?));
    linux.set_resources(Some(resources));
    Ok(())
}

/// A number of processors as a quota and its period, in microseconds.
pub(super) fn quota(cpus: f64) -> (i64, u64) {
    // A plan's processors are 0.01 to 32, so the product is a small positive number.
    let quota = (cpus * f64::from(DEFAULT_PERIOD_US)).round() as i64;
    (quota, DEFAULT_PERIOD_US.into())
}

/// The processors that a quota amounts to, if it is one.
pub(super) fn processors(cpu: &LinuxCpu) -> Option<f64> {
    let period = cpu.period().filter(|&period| period != 0);
    let period = u32::try_from(period.unwrap_or(DEFAULT_PERIOD_US.into())).ok()?;
    let quota = cpu.quota().filter(|&quota| quota > 0)?;
    // Above a few thousand processors a float's precision is nobody's concern.
    let quota = u32::try_from(quota).unwrap_or(u32::MAX);
    Some(f64::from(quota) / f64::from(period))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn resources(json: Value) -> LinuxResources {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn each_limit_goes_where_it_means_something() {
        let asked = resources(json!({
            "memory": {"limit": 1 << 20, "reservation": 1 << 19, "swap": 9, "swappiness": 1},
            "cpu": {"quota": 50_000, "period": 200_000, "shares": 1024, "cpus": "2-3"},
            "pids": {"limit": 5}, "blockIO": {"weight": 10},
            "unified": {"memory.oom.group": "1", "memory.swap.max": "0"},
        }));
        let guest = serde_json::to_value(in_guest(&asked).unwrap()).unwrap();
        assert_eq!(
            guest,
            json!({"memory": {"limit": 1 << 20, "reservation": 1 << 19}, "pids": {"limit": 5},
                "unified": {"memory.oom.group": "1"},
                "cpu": {"quota": 50_000, "period": 200_000, "shares": 1024}})
        );
        let host = on_host(&asked);
        let host: Vec<_> = host
            .iter()
            .map(|(file, value)| (&**file, &**value))
            .collect();
        assert_eq!(
            host,
            [
                ("cpu.weight", "39"),
                ("cpu.max", "50000 200000"),
                ("cpuset.cpus", "2-3")
            ]
        );
        let unlimited = resources(json!({"cpu": {"quota": -1}}));
        assert_eq!(on_host(&unlimited)[0].1, "max");
        assert_eq!(on_host(&resources(json!({"pids": {"limit": 1}}))), []);
    }

    #[test]
    fn quotas_are_shares_of_a_period() {
        assert_eq!(quota(0.5), (50_000, 100_000));
        assert_eq!(quota(1.75), (175_000, 100_000));
        assert_eq!(quota(0.01), (1000, 100_000));
    }

    #[test]
    fn a_vm_grows_by_what_its_containers_need() {
        let mut vm = crate::plan::tests::vm();
        let mib = |vm: &PlannedVm, limits: u64| growth(vm, limits << 20) >> 20;
        (vm.memory_bytes, vm.growth_bytes) = (176 << 20, 4 << 30);
        // With what describes it: 2 MiB for each begun 126.
        for (limits, more) in [
            (0, 0),
            (100, 0),
            (128, 0),
            (129, 4),
            (128 + 126, 128),
            (128 + 127, 131 + 1),
            (512, 384 + 8),
            (8 << 10, 4 << 10),
        ] {
            assert_eq!(mib(&vm, limits), more, "{limits}");
        }
        assert_eq!(growth(&vm, u64::MAX), vm.growth_bytes);
        vm.growth_bytes = 0;
        assert_eq!(mib(&vm, 512), 0);
        let limits = |json: Value| memory_limit_of(&json!({"memory": json}));
        assert_eq!(limits(json!({"limit": 5})), Some(5));
        assert_eq!(limits(json!({"limit": -1})), None);
        assert_eq!(limits(json!({"reservation": 5})), None);
    }

    #[test]
    fn a_running_vm_gets_no_more_than_it_can_have() {
        let mut plan = crate::plan::tests::sample();
        plan.vm.growth_bytes = 1 << 30;
        let most = plan.vm.memory_bytes + plan.vm.growth_bytes;
        for (asked, words) in [
            (
                json!({"memory": {"limit": most + 1}}),
                format!("can have {} MiB on this host", most >> 20),
            ),
            (
                json!({"cpu": {"quota": 100_001 * u64::from(plan.vm.vcpus)}}),
                format!("started with {}", plan.vm.vcpus),
            ),
        ] {
            let error = update(&resources(asked), &plan).unwrap_err().to_string();
            assert!(error.ends_with(&words), "{error}");
        }
        for fine in [
            json!({"memory": {"limit": most}}),
            json!({"memory": {"limit": -1}, "cpu": {"quota": -1}}),
            json!({"cpu": {"quota": 100_000 * u64::from(plan.vm.vcpus)}}),
            json!({}),
        ] {
            assert!(update(&resources(fine.clone()), &plan).is_ok(), "{fine}");
        }
    }
}
