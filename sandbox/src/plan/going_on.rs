//! A bundle whose container goes on from a checkpoint.
//!
//! Owns: what it must have in common with the container that was saved, and what is its own: ids,
//! root, sources of its mounts, cgroup, limits, labels, hooks and streams. Refuses what doesn't fit,
//! by name. What a program has in its memory (environment, user) isn't looked at.

use oci_spec::runtime::Mount;

use super::bundle::cannot;
use super::shape::Glance;
use super::{Plan, PlanError, PlannedVm, pod};

/// The plan of a bundle as one that goes on from where the container of `saved` stood.
pub(crate) fn going_on(new: Plan, saved: &Plan) -> Result<Plan, PlanError> {
    if saved.bundle.is_none() {
        return Err(cannot("the checkpoint", "it is of no engine's container"));
    }
    if new.sandbox.is_some() || pod::is_sandbox(&new.labels) {
        return Err(cannot("the checkpoint", "the container is a pod's"));
    }
    // As the guests see them, whatever is behind them on the host.
    let glances = (new.glance(), saved.glance());
    let seen = |plan: &Plan, glance: &Glance| {
        [
            ("command", format!("{:?}", plan.command())),
            ("terminal", yes(plan.tty)),
            ("read-only root", yes(glance.has_read_only_root())),
            ("network", network(plan)),
            ("number of processors", plan.vm.vcpus.to_string()),
            (
                "virtual machine's memory",
                format!("{} MiB", plan.vm.memory_bytes >> 20),
            ),
        ]
    };
    for ((what, now), (_, then)) in seen(&new, &glances.0)
        .into_iter()
        .zip(seen(saved, &glances.1))
    {
        differ(what.to_owned(), now, then)?;
    }
    let [now, then] = [&glances.0, &glances.1].map(|glance| glance.mounts().collect::<Vec<_>>());
    for number in 0..now.len().max(then.len()) {
        let [now, then] = [&now, &then].map(|mounts| mounts.get(number).copied());
        if now != then {
            let what = format!("mount number {}", number + 1);
            differ(what, shown(now), shown(then))?;
        }
    }
    Ok(Plan {
        vm: PlannedVm {
            window_bytes: saved.vm.window_bytes,
            growth_bytes: saved.vm.growth_bytes,
            ..new.vm
        },
        guest_id: Some(saved.guest_id().to_owned()),
        ..new
    })
}

fn differ(what: String, now: String, then: String) -> Result<(), PlanError> {
    match now == then {
        true => Ok(()),
        false => Err(PlanError::Differs { what, then, now }),
    }
}

fn yes(whether: bool) -> String {
    if whether { "there" } else { "not there" }.to_owned()
}

fn network(plan: &Plan) -> String {
    match &plan.network {
        Some(_) => "its engine's".to_owned(),
        None if plan.makes_network => "a new one".to_owned(),
        None => "none".to_owned(),
    }
}

fn shown(mount: Option<&Mount>) -> String {
    let Some(mount) = mount else {
        return "none".to_owned();
    };
    let options = mount.options().as_deref().unwrap_or_default().join(",");
    let source = mount.source().clone().unwrap_or_default();
    let kind = mount.typ().as_deref().unwrap_or_default();
    format!(
        "{kind} {} on {} ({options})",
        source.display(),
        mount.destination().display()
    )
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::bundle::tests::planned;
    use super::*;

    fn bundle(change: impl FnOnce(&mut Value)) -> Plan {
        let plan = planned(|config| {
            config["linux"]["namespaces"] = json!([{"type": "network"}]);
            change(config);
        });
        plan.unwrap()
    }

    #[test]
    fn a_copy_has_its_bundles_things_and_the_saved_ones_guest() {
        let mut saved = bundle(|_| {});
        saved.id = "before".to_owned();
        saved.vm.growth_bytes = 128 << 20;
        // A copy of a copy.
        saved.guest_id = Some("first".to_owned());
        let new = bundle(|config| {
            config["root"]["path"] = json!("/other");
            config["mounts"][1]["source"] = json!("/h/hosts");
            config["mounts"][2]["source"] = json!("/other/data");
            config["process"]["env"] = json!(["A=1"]);
            config["linux"]["resources"]["pids"] = json!({"limit": 7});
        });
        let copy = going_on(new.clone(), &saved).unwrap();
        assert_eq!((copy.id.as_str(), copy.guest_id()), ("c1", "first"));
        assert_eq!(copy.vm.growth_bytes, 128 << 20);
        assert_eq!((&copy.root, &copy.exports), (&new.root, &new.exports));
        assert_eq!(copy.spec, new.spec);
        assert!(copy.held);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let saved = bundle(|_| {});
        type Change = fn(&mut Value);
        let changes: [(&str, Change); 9] = [
            ("command was [\"true\"], and is to be [\"x\"]", |config| {
                config["process"]["args"] = json!(["x"]);
            }),
            ("terminal was there, and is to be not there", |config| {
                config["process"]["terminal"] = json!(false);
            }),
            ("read-only root was there", |config| {
                config["root"]["readonly"] = json!(false);
            }),
            ("memory was 304 MiB, and is to be 112 MiB", |config| {
                config["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
            }),
            ("number of processors was 2, and is to be 1", |config| {
                config["linux"]["resources"]["cpu"] = json!({});
            }),
            ("network was a new one, and is to be none", |config| {
                config["linux"]["namespaces"] = json!([]);
            }),
            ("on /data (rbind), and is to be bind", |config| {
                config["mounts"][2]["destination"] = json!("/elsewhere");
            }),
            ("mount number 5 was sysfs", |config| {
                config["mounts"].as_array_mut().unwrap().pop();
            }),
            ("a pod's", |config| {
                config["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
            }),
        ];
        for (words, change) in changes {
            let refused = going_on(bundle(change), &saved).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
        let mut own = saved.clone();
        own.bundle = None;
        let refused = going_on(saved, &own).unwrap_err().to_string();
        assert!(refused.contains("of no engine's container"), "{refused}");
    }
}
