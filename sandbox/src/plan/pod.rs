//! Pods: containers that share one sandbox, in the words of the engines that make them.
//!
//! Owns: whose sandbox a container joins; how large a pod's sandbox is; which of its namespaces
//! are shared. Refuses: a namespace that isn't the sandbox's.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    LinuxCpuBuilder, LinuxMemoryBuilder, LinuxNamespace, LinuxNamespaceType, LinuxResources, Spec,
};

use super::bundle::cannot;
use super::{PlanError, PlannedVm};

/// What the plan of a container that joins a sandbox must know of it.
#[derive(Debug, Clone, PartialEq)]
pub struct PodFacts {
    /// The id of the container that holds it.
    pub sandbox: String,
    /// Its VM.
    pub vm: PlannedVm,
    /// Whether there is memory for all of them to share.
    pub shared_memory: bool,
    /// Its containers, by their monitors: each one's process id on the host, and its first
    /// process's in the guest.
    pub pids: Vec<(u32, u32)>,
}

/// (type, sandbox's id): containerd's `pkg/cri/annotations`, CRI-O's `pkg/annotations`. What
/// podman writes in the place of CRI-O's id is the pod's, which is no container.
const NAMES: [(&str, &str); 2] = [
    (
        "io.kubernetes.cri.container-type",
        "io.kubernetes.cri.sandbox-id",
    ),
    (
        "io.kubernetes.cri-o.ContainerType",
        "io.kubernetes.cri-o.SandboxID",
    ),
];

/// The sandbox that a container is to join, by its annotations.
pub(crate) fn named(spec: &Spec) -> Option<&str> {
    let annotations = spec.annotations().as_ref()?;
    NAMES.iter().find_map(|(kind, sandbox)| {
        let kind = annotations.get(*kind);
        let joins = kind.is_some_and(|kind| kind == "container");
        annotations
            .get(*sandbox)
            .filter(|_| joins)
            .map(String::as_str)
    })
}

/// The processes of the host by whose namespaces (`/proc/PID/ns/KIND`) it names its own.
pub(crate) fn neighbours(spec: &Spec) -> impl Iterator<Item = u32> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let all = all.unwrap_or_default().iter();
    all.filter_map(|namespace| pid_of(namespace.path().as_deref()?))
}

/// Whether this is the container that holds a pod's sandbox, by its annotations, which are its
/// plan's labels.
pub(crate) fn is_sandbox(annotations: &BTreeMap<String, String>) -> bool {
    let mut kinds = NAMES.iter().filter_map(|(kind, _)| annotations.get(*kind));
    kinds.any(|kind| kind == "sandbox")
}

/// Has a sandbox be as large as its pod: what its engine says of that, else what it asks for the
/// sandbox's own container.
pub(super) fn size(spec: &mut Spec) -> Result<(), PlanError> {
    let whole = resources(spec)?;
    if let Some(linux) = spec.linux_mut() {
        linux.set_resources(Some(whole));
    }
    Ok(())
}

fn resources(spec: &Spec) -> Result<LinuxResources, PlanError> {
    let linux = spec.linux().as_ref();
    let mut resources = linux
        .and_then(|linux| linux.resources().clone())
        .unwrap_or_default();
    let number = |name: &str| {
        let annotations = spec.annotations().as_ref()?;
        let text = annotations.get(&format!("io.kubernetes.cri.sandbox-{name}"))?;
        text.parse::<i64>().ok().filter(|&number| number > 0)
    };
    if let Some(limit) = number("memory") {
        let memory = LinuxMemoryBuilder::default().limit(limit);
        resources.set_memory(Some(memory.build()?));
    }
    // Those of the sandbox's own container are next to nothing: it only waits.
    let unsigned = |name| number(name).map(i64::unsigned_abs);
    let mut cpu = LinuxCpuBuilder::default();
    if let Some(shares) = unsigned("cpu-shares") {
        cpu = cpu.shares(shares);
    }
    let own = resources.cpu().as_ref();
    if let Some(quota) = number("cpu-quota").or(own.and_then(|own| own.quota())) {
        cpu = cpu.quota(quota);
    }
    if let Some(period) = unsigned("cpu-period").or(own.and_then(|own| own.period())) {
        cpu = cpu.period(period);
    }
    resources.set_cpu(Some(cpu.build()?));
    Ok(resources)
}

/// The guest's name for a namespace that the host's engine names by a process of the pod's,
/// `/proc/PID/ns/KIND`.
pub(super) fn shared(
    namespace: &LinuxNamespace,
    facts: &PodFacts,
) -> Result<Option<PathBuf>, PlanError> {
    let Some(path) = namespace.path().as_deref() else {
        return Ok(None);
    };
    if path.as_os_str().is_empty() {
        return Ok(None);
    }
    let guest = pid_of(path).and_then(|pid| facts.pids.iter().find(|(monitor, _)| *monitor == pid));
    let (_, guest) = guest.ok_or_else(|| {
        cannot(
            format!("namespace {}", path.display()),
            "it is none of the pod's containers'",
        )
    })?;
    let file = path.file_name().unwrap_or_default();
    Ok(Some(
        Path::new("/proc")
            .join(guest.to_string())
            .join("ns")
            .join(file),
    ))
}

/// Whether a specification shares a kind of namespace with others of its pod.
pub(super) fn shares(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    all.unwrap_or_default().iter().any(|namespace| {
        let path = namespace.path().as_deref();
        namespace.typ() == kind && path.is_some_and(|path| !path.as_os_str().is_empty())
    })
}

fn pid_of(path: &Path) -> Option<u32> {
    let (pid, kind) = path.to_str()?.strip_prefix("/proc/")?.split_once("/ns/")?;
    let known = ["pid", "ipc", "uts", "net", "cgroup", "mnt", "user"].contains(&kind);
    known.then(|| pid.parse().ok())?
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::{LinuxNamespaceBuilder, SpecBuilder};
    use serde_json::json;

    use super::*;

    fn spec(annotations: serde_json::Value) -> Spec {
        let mut spec = SpecBuilder::default().build().unwrap();
        spec.set_annotations(serde_json::from_value(annotations).unwrap());
        spec
    }

    #[test]
    fn each_engine_says_who_is_whose() {
        for (annotations, holds, joins) in [
            (json!({}), false, None),
            (
                json!({"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "s"}),
                true,
                None,
            ),
            (
                json!({"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "s"}),
                false,
                Some("s"),
            ),
            (
                json!({"io.kubernetes.cri-o.ContainerType": "sandbox"}),
                true,
                None,
            ),
            (
                json!({"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "s"}),
                false,
                Some("s"),
            ),
            (json!({"io.kubernetes.cri-o.SandboxID": "pod"}), false, None),
        ] {
            let labels = serde_json::from_value(annotations.clone()).unwrap();
            let spec = spec(annotations);
            assert_eq!(
                (is_sandbox(&labels), named(&spec)),
                (holds, joins),
                "{spec:?}"
            );
        }
    }

    #[test]
    fn neighbours_are_known_by_their_processes() {
        let mut spec = spec(json!({}));
        let namespaces = json!([{"type": "pid"}, {"type": "ipc", "path": "/proc/40/ns/ipc"},
            {"type": "network", "path": "/run/netns/x"}, {"type": "uts", "path": "/proc/50/ns/uts"}]);
        spec.set_linux(serde_json::from_value(json!({"namespaces": namespaces})).unwrap());
        assert_eq!(neighbours(&spec).collect::<Vec<_>>(), [40, 50]);
    }

    #[test]
    fn a_sandbox_is_as_large_as_its_pod() {
        let mut spec = spec(json!({
            "io.kubernetes.cri.sandbox-memory": "536870912",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "150000",
            "io.kubernetes.cri.sandbox-cpu-shares": "1024",
        }));
        let linux = json!({"resources": {"cpu": {"shares": 2}, "memory": {"limit": 1}}});
        spec.set_linux(serde_json::from_value(linux).unwrap());
        let said = serde_json::to_value(resources(&spec).unwrap()).unwrap();
        assert_eq!(said["memory"]["limit"], 536_870_912);
        let cpu = json!({"shares": 1024, "quota": 150_000, "period": 100_000});
        assert_eq!(said["cpu"], cpu);
        spec.set_annotations(None);
        let said = serde_json::to_value(resources(&spec).unwrap()).unwrap();
        assert_eq!(
            (&said["cpu"], &said["memory"]["limit"]),
            (&json!({}), &json!(1))
        );
    }

    #[test]
    fn namespaces_are_named_by_the_guests_processes() {
        let facts = PodFacts {
            sandbox: "s".to_owned(),
            shared_memory: true,
            vm: crate::plan::tests::vm(),
            pids: vec![(40, 4), (50, 5)],
        };
        let named = |path: &str| {
            let namespace = LinuxNamespaceBuilder::default()
                .typ(LinuxNamespaceType::Ipc)
                .path(path)
                .build()
                .unwrap();
            shared(&namespace, &facts)
        };
        assert_eq!(
            named("/proc/50/ns/ipc").unwrap(),
            Some("/proc/5/ns/ipc".into())
        );
        assert_eq!(named("").unwrap(), None);
        for strange in [
            "/proc/60/ns/ipc",
            "/run/ipc",
            "/proc/40/ns/../../1/ns/ipc",
            "/proc/self/ns/ipc",
        ] {
            assert!(named(strange).is_err(), "{strange}");
        }
    }
}
