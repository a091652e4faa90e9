//! Limits that were changed since the plan was made, which the next start is to have, too.
//!
//! Owns: what changes add up to, and a plan as they make it. Refuses: to judge them, which was
//! done when they were asked for.

use hull_proto::OciJson;
use hull_vmm::spec::MEM_UNIT_BYTES;
use oci_spec::runtime::LinuxResources;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::Plan;
use super::limits::{CgroupFiles, Update, growth, memory_limit};

/// All changes so far, as `limits.json` holds them.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    /// In the guest.
    pub guest: LinuxResources,
    /// On the host: files of the monitor's cgroup and what is written to them.
    pub host: CgroupFiles,
}

impl Limits {
    /// These, and one more change.
    pub(crate) fn and(mut self, update: &Update) -> serde_json::Result<Self> {
        self.guest = merged(&self.guest, &update.guest)?;
        for (file, value) in &update.host {
            self.host.retain(|(name, _)| name != file);
            self.host.push((file.clone(), value.clone()));
        }
        Ok(self)
    }
}

impl Plan {
    /// This plan with other limits than it was made with.
    pub(crate) fn limited(mut self, limits: Limits) -> serde_json::Result<Self> {
        let mut spec: Value = self.spec.read()?;
        if let Some(Value::Object(linux)) = spec.get_mut("linux") {
            let resources = linux.entry("resources").or_insert(Value::Null);
            merge(resources, serde_json::to_value(&limits.guest)?);
        }
        self.spec = OciJson::write(&spec)?;
        // A checkpoint's plan has those that it was taken with.
        let before = self.limits.take().unwrap_or_default();
        let (guest, host) = (limits.guest, limits.host);
        self.limits = Some(before.and(&Update { guest, host })?);
        Ok(self)
    }

    /// This plan with a VM that begins with what it grew to while it ran, for limits that were changed.
    pub(crate) fn grown(mut self) -> Self {
        if self.limits.is_none() {
            return self;
        }
        let more = growth(&self.vm, memory_limit(&self).unwrap_or(0));
        self.vm.memory_bytes += more;
        let left = self.vm.growth_bytes - more;
        self.vm.growth_bytes = left / MEM_UNIT_BYTES * MEM_UNIT_BYTES;
        self
    }
}

/// What `change` says, and where it says nothing what there was.
fn merged(before: &LinuxResources, change: &LinuxResources) -> serde_json::Result<LinuxResources> {
    let mut both = serde_json::to_value(before)?;
    merge(&mut both, serde_json::to_value(change)?);
    serde_json::from_value(both)
}

fn merge(before: &mut Value, change: Value) {
    match (before, change) {
        (Value::Object(before), Value::Object(change)) => {
            for (key, value) in change {
                merge(before.entry(key).or_insert(Value::Null), value);
            }
        }
        (before, change) => *before = change,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::plan::update;

    #[test]
    fn changes_add_up_and_the_last_one_counts() {
        let mut plan = crate::plan::tests::sample();
        plan.vm.cpu_quota = Some(0.5);
        let mut limits = Limits::default();
        for change in [
            json!({"memory": {"limit": 64 << 20, "reservation": 32 << 20}}),
            json!({"memory": {"limit": 48 << 20}, "cpu": {"shares": 2, "cpus": "0"}}),
            json!({"cpu": {"quota": 25_000, "period": 50_000}, "pids": {"limit": 9}}),
            json!({"cpu": {"shares": 1024}}),
        ] {
            let change = serde_json::from_value(change).unwrap();
            limits = limits.and(&update(&change, &plan).unwrap()).unwrap();
        }
        let text = serde_json::to_string(&limits).unwrap();
        let limits: Limits = serde_json::from_str(&text).unwrap();
        let files = [
            ("cpuset.cpus", "0"),
            ("cpu.max", "25000 50000"),
            ("cpu.weight", "39"),
        ];
        let plan = plan.limited(limits).unwrap();
        let spec: Value = plan.spec.read().unwrap();
        let guest = &spec["linux"]["resources"];
        assert_eq!(
            (&guest["memory"], &guest["cpu"], &guest["pids"]),
            (
                &json!({"limit": 48 << 20, "reservation": 32 << 20}),
                &json!({"shares": 1024, "quota": 25_000, "period": 50_000}),
                &json!({"limit": 9})
            )
        );
        let again = serde_json::from_str("{\"guest\": {}, \"host\": [[\"cpu.weight\", \"1\"]]}");
        let changed = plan.clone().limited(again.unwrap()).unwrap();
        let files_then = changed.host_cgroup().unwrap().files;
        assert!(files_then.contains(&("cpuset.cpus".to_owned(), "0".to_owned())));
        assert!(!files_then.contains(&("cpu.weight".to_owned(), "39".to_owned())));
        // Those that it was made with come first, so that these are what stays.
        let written = plan.host_cgroup().unwrap().files;
        let written: Vec<_> = written.iter().map(|(f, v)| (&**f, &**v)).collect();
        assert_eq!(written[0], ("cpu.max", "50000 100000"));
        assert_eq!(written[1..], files);
    }

    #[test]
    fn a_limit_that_its_vm_grew_for_is_what_it_begins_with() {
        let mut plan = crate::plan::tests::sample();
        plan.vm.growth_bytes = 4 << 30;
        let had = plan.vm.memory_bytes;
        let change = json!({"memory": {"limit": had + (1 << 30)}});
        let change = serde_json::from_value(change).unwrap();
        let limits = Limits::default().and(&update(&change, &plan).unwrap());
        let same = plan.limited(limits.unwrap()).unwrap();
        assert_eq!(same.vm.memory_bytes, had);
        let later = same.grown();
        assert!(later.vm.memory_bytes > had + (1 << 30));
        let (has, left) = (later.vm.memory_bytes, later.vm.growth_bytes);
        assert!(has + left <= had + (4 << 30) && has + left > had + (3 << 30));
        // Of which a memory device can be made.
        assert!(left.is_multiple_of(MEM_UNIT_BYTES), "{left}");
    }
}
