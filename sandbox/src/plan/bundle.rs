//! What an OCI bundle means: its specification as the host's engine wrote it, translated to what
//! the guest sees. README ("Use it from …") lists what is refused and what is passed over.
//!
//! Owns: which of the host's paths become exports, which namespaces, devices and limits make
//! sense in a guest. Refuses: what can't be had there, by name.

use std::path::{Path, PathBuf};

use hull_proto::OciJson;
use oci_spec::runtime::{
    Linux, LinuxDevice, LinuxDeviceType, LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType,
    Mount, MountBuilder, PosixRlimitBuilder, PosixRlimitType, Process, Root, RootBuilder, Spec,
};

use crate::request::{self, BundleRequest, RunRequest};
use crate::settings::Settings;

use super::mounts::NAMESPACES;
use super::pod;
use super::shape::{Export, ExportSource, FILE_NAME, ROOT_NAME};
use super::{
    HostFacts, Identity, Plan, PlanError, PlannedRoot, SIGTERM, cgroup, guest_path, limits, machine,
};

/// What a guest's kernel and agent take of its memory, in bytes: given beside the limit.
pub(super) const GUEST_OVERHEAD: u64 = 48 << 20;

/// Descriptors that a process of a guest may have at most: its kernel's `fs.nr_open`.
const MOST_DESCRIPTORS: u64 = 1 << 20;

/// Device nodes that every Linux has (character, major, minor).
const EVERYWHERE: [(i64, i64); 8] = [
    (1, 3),
    (1, 5),
    (1, 7),
    (1, 8),
    (1, 9),
    (5, 0),
    (5, 1),
    (5, 2),
];

pub(super) fn cannot(what: impl Into<String>, why: &'static str) -> PlanError {
    PlanError::Bundle {
        what: what.into(),
        why,
    }
}

/// Decides everything about the one container of a bundle.
pub(crate) fn plan(
    request: &BundleRequest,
    identity: Identity,
    settings: &Settings,
    facts: &HostFacts,
) -> Result<Plan, PlanError> {
    let mut spec = request.spec.clone();
    let annotations = spec.annotations().clone().unwrap_or_default();
    let labels = annotations.into_iter().collect();
    if pod::is_sandbox(&labels) {
        pod::size(&mut spec)?;
    }
    let process = process(request)?;
    let tty = process.terminal().unwrap_or(false);
    // What a sandbox shows is named by whom it shows it for.
    let prefix = facts.pod.as_ref().map(|_| format!("{}.", identity.id));
    let prefix = prefix.unwrap_or_default();
    let (exports, mounts) = mounts(&spec, &prefix, facts)?;
    let own_name = spec.hostname().clone().filter(|name| !name.is_empty());
    let hostname = own_name.unwrap_or_else(|| identity.id.chars().take(12).collect());
    let linux = spec.linux().clone().unwrap_or_default();
    let cgroup = cgroup::of_bundle(&linux, &identity.id)?;
    let (vm, network) = match &facts.pod {
        Some(pod) => (pod.vm.clone(), None),
        None => {
            let shape = shape(&linux, facts);
            (machine::plan(&shape, settings, facts)?, shape.network)
        }
    };
    let root = guest_root(&spec, &prefix)?;
    spec.set_linux(Some(self::linux(&linux, facts)?))
        .set_process(Some(process))
        .set_mounts(Some(mounts))
        .set_root(Some(root));
    Ok(Plan {
        generation: Plan::GENERATION,
        id: identity.id,
        name: identity.name,
        created_at: identity.created_at,
        hostname,
        image: None,
        labels,
        vm,
        root: PlannedRoot::Directory(request.root()?),
        network,
        makes_network: facts.pod.is_none() && has_new_network(&linux),
        exports,
        spec: OciJson::write(&spec)?,
        init: request.only_holds,
        tty,
        interactive: true,
        stop_signal: SIGTERM,
        stop_timeout_s: settings.defaults.stop_timeout_s,
        guest_id: None,
        held: true,
        bundle: Some(request.bundle.clone()),
        sandbox: facts.pod.as_ref().map(|pod| pod.sandbox.clone()),
        cgroup,
        limits: None,
        auto_remove: false,
        // Whoever made the bundle reads its output at the source.
        log_limit_bytes: 0,
    })
}

/// The root as the guest sees it.
fn guest_root(spec: &Spec, prefix: &str) -> Result<Root, PlanError> {
    let read_only = spec.root().as_ref().and_then(|root| root.readonly());
    let root = RootBuilder::default()
        .path(guest_path(&format!("{prefix}{ROOT_NAME}")))
        .readonly(read_only.unwrap_or(false));
    Ok(root.build()?)
}

impl BundleRequest {
    /// The root directory on the host.
    fn root(&self) -> Result<PathBuf, PlanError> {
        let root = self.spec.root().as_ref();
        let root = root.ok_or_else(|| cannot("the bundle", "its specification names no root"))?;
        Ok(self.bundle.join(root.path()))
    }
}

fn process(request: &BundleRequest) -> Result<Process, PlanError> {
    let process = request.spec.process().as_ref();
    let process =
        process.ok_or_else(|| cannot("the bundle", "its specification names no process"))?;
    let has_command = process.args().as_ref().is_some_and(|args| !args.is_empty());
    if has_command == request.only_holds {
        return Err(PlanError::NoCommand);
    }
    guest_process(process)
}

/// A process as the guest can have it.
pub(crate) fn guest_process(process: &Process) -> Result<Process, PlanError> {
    let mut process = process.clone();
    // Windows has names here; to the agent one would be a name to look up.
    let mut user = process.user().clone();
    user.set_username(None);
    let limits = process.rlimits().iter().flatten().map(|limit| {
        let most = match limit.typ() {
            PosixRlimitType::RlimitNofile => MOST_DESCRIPTORS,
            _ => u64::MAX,
        };
        PosixRlimitBuilder::default()
            .typ(limit.typ())
            .soft(limit.soft().min(most))
            .hard(limit.hard().min(most))
            .build()
    });
    let limits = limits.collect::<Result<Vec<_>, _>>()?;
    process
        .set_user(user)
        .set_rlimits(Some(limits))
        .set_apparmor_profile(None)
        .set_selinux_label(None);
    Ok(process)
}

/// The VM's shape and network, as a run request has them: the limits that the host's engine asked
/// for, the namespace that it set up.
fn shape(linux: &Linux, facts: &HostFacts) -> RunRequest {
    let mut request = RunRequest::new(request::Root::Directory(PathBuf::new()));
    let resources = linux.resources().as_ref();
    let limit = resources
        .and_then(|resources| resources.memory().as_ref()?.limit())
        .and_then(|limit| u64::try_from(limit).ok())
        .filter(|&limit| limit > 0);
    request.memory_bytes = limit.map(|limit| {
        limit
            .saturating_add(GUEST_OVERHEAD)
            .clamp(machine::MIN_MEMORY_BYTES, facts.memory_bytes)
    });
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let most = f64::from(facts.cpus.max(1));
    request.cpus = cpu
        .and_then(limits::processors)
        .map(|cpus| cpus.clamp(0.01, most));
    request.network = network(linux).and_then(path).map(Path::to_owned);
    request
}

/// Whether its network namespace is one that the runtime makes. Nothing is in it then, and whoever
/// made the bundle may put it there before the command runs.
fn has_new_network(linux: &Linux) -> bool {
    network(linux).is_some_and(|namespace| path(namespace).is_none())
}

fn network(linux: &Linux) -> Option<&LinuxNamespace> {
    let mut namespaces = linux.namespaces().iter().flatten();
    namespaces.find(|namespace| namespace.typ() == LinuxNamespaceType::Network)
}

fn path(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref();
    path.filter(|path| !path.as_os_str().is_empty())
}

fn linux(asked: &Linux, facts: &HostFacts) -> Result<Linux, PlanError> {
    let mut linux = asked.clone();
    let has_user = asked
        .uid_mappings()
        .as_ref()
        .is_some_and(|maps| !maps.is_empty());
    let kinds = NAMESPACES
        .into_iter()
        .chain(has_user.then_some(LinuxNamespaceType::User));
    let namespaces = kinds
        .map(|kind| namespace(kind, asked, facts))
        .collect::<Result<Vec<_>, _>>()?;
    let devices = asked.devices().as_deref().unwrap_or_default();
    if let Some(device) = devices.iter().find(|device| !is_everywhere(device)) {
        return Err(cannot(
            format!("device {}", device.path().display()),
            "a virtual machine has none of the host's devices",
        ));
    }
    let resources = asked
        .resources()
        .as_ref()
        .map(limits::in_guest)
        .transpose()?;
    linux
        .set_namespaces(Some(namespaces))
        .set_resources(resources)
        .set_cgroups_path(None)
        .set_mount_label(None)
        .set_rootfs_propagation(None)
        .set_intel_rdt(None)
        .set_net_devices(None);
    Ok(linux)
}

/// A namespace of the container's own, or its pod's.
fn namespace(
    kind: LinuxNamespaceType,
    asked: &Linux,
    facts: &HostFacts,
) -> Result<LinuxNamespace, PlanError> {
    let mut all = asked.namespaces().iter().flatten();
    let path = match (all.find(|namespace| namespace.typ() == kind), &facts.pod) {
        (Some(namespace), Some(pod)) => pod::shared(namespace, pod)?,
        _ => None,
    };
    let new = LinuxNamespaceBuilder::default().typ(kind);
    Ok(match path {
        Some(path) => new.path(path).build()?,
        None => new.build()?,
    })
}

fn is_everywhere(device: &LinuxDevice) -> bool {
    let numbers = (device.major(), device.minor());
    match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => EVERYWHERE.contains(&numbers),
        LinuxDeviceType::P => true,
        LinuxDeviceType::A | LinuxDeviceType::B => false,
    }
}

/// The host's directories behind the mounts, and the mounts as the guest makes them.
fn mounts(
    spec: &Spec,
    prefix: &str,
    facts: &HostFacts,
) -> Result<(Vec<Export>, Vec<Mount>), PlanError> {
    // Engines bind a shm of theirs, which is the host's memory: the guest has its own.
    let shared_memory = facts
        .pod
        .as_ref()
        .is_none_or(|pod| pod.shared_memory && pod::shares(spec, LinuxNamespaceType::Ipc));
    let mut exports = Vec::new();
    let mut mounts = Vec::new();
    for mount in spec.mounts().as_deref().unwrap_or_default() {
        if !is_bind(mount) {
            mounts.push(mount.clone());
            continue;
        }
        if shared_memory && mount.destination() == Path::new("/dev/shm") {
            let mut seen = mount.clone();
            seen.set_source(Some(hull_proto::SHARED_MEMORY_DIR.into()));
            mounts.push(seen);
            continue;
        }
        let source = mount.source().clone().unwrap_or_default();
        if let Some(own) = guests_own(mount, &source)? {
            mounts.push(own);
            continue;
        }
        let name = format!("{prefix}v{}", exports.len());
        let (shown, seen) = match facts.files.contains(&source) {
            true => (
                ExportSource::File(source.clone()),
                guest_path(&name).join(FILE_NAME),
            ),
            false => (ExportSource::Directory(source), guest_path(&name)),
        };
        let mut seen_mount = mount.clone();
        seen_mount
            .set_source(Some(seen))
            .set_typ(Some("bind".to_owned()));
        mounts.push(seen_mount);
        exports.push(Export {
            name,
            source: shown,
            read_only: has(mount, "ro"),
        });
    }
    Ok((exports, mounts))
}

/// The paths of the host that a bundle's bind mounts show.
pub(crate) fn bind_sources(spec: &Spec) -> Vec<PathBuf> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let binds = mounts.iter().filter(|mount| is_bind(mount));
    binds
        .filter_map(|mount| mount.source().clone())
        .filter(|source| !is_of_kernel(source))
        .collect()
}

fn has(mount: &Mount, option: &str) -> bool {
    let options = mount.options().as_deref().unwrap_or_default();
    options.iter().any(|given| given == option)
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has(mount, "bind") || has(mount, "rbind")
}

fn is_of_kernel(source: &Path) -> bool {
    ["/dev", "/proc", "/sys"]
        .iter()
        .any(|top| source.starts_with(top))
}

/// A bind of what belongs to the host's kernel is the same of the guest's kernel, or nothing.
fn guests_own(mount: &Mount, source: &Path) -> Result<Option<Mount>, PlanError> {
    let target = mount.destination().clone();
    let new = |kind: &str, options: &[&str]| {
        MountBuilder::default()
            .destination(target.clone())
            .typ(kind)
            .source(kind)
            .options(
                options
                    .iter()
                    .map(|&option| option.to_owned())
                    .collect::<Vec<_>>(),
            )
            .build()
    };
    let access = if has(mount, "ro") { "ro" } else { "rw" };
    let closed = ["nosuid", "noexec", "nodev"];
    if target == Path::new("/dev/shm") {
        let own = [&closed[..], &["mode=1777", "size=67108864"]].concat();
        return Ok(Some(new("tmpfs", &own)?));
    }
    if !is_of_kernel(source) {
        return Ok(None);
    }
    let own = [&closed[..], &[access]].concat();
    let whole = match source.to_str() {
        Some("/proc") => Some("proc"),
        Some("/sys") => Some("sysfs"),
        Some("/sys/fs/cgroup") => Some("cgroup"),
        Some("/dev/mqueue") => Some("mqueue"),
        _ => None,
    };
    if let Some(kind) = whole {
        return Ok(Some(new(kind, &own)?));
    }
    let node = source.strip_prefix("/dev").ok().and_then(Path::to_str);
    if let Some("null" | "zero" | "full" | "random" | "urandom" | "tty") = node {
        return Ok(Some(mount.clone()));
    }
    Err(cannot(
        format!("mount {}", target.display()),
        "its source belongs to the host's kernel, and a virtual machine has its own",
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use jiff::Timestamp;
    use serde_json::{Value, json};

    use super::*;

    pub(in crate::plan) fn planned(change: impl FnOnce(&mut Value)) -> Result<Plan, PlanError> {
        planned_for(false, change)
    }

    fn planned_for(only_holds: bool, change: impl FnOnce(&mut Value)) -> Result<Plan, PlanError> {
        let mut config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs", "readonly": true},
            "process": {"args": ["true"], "cwd": "/", "terminal": true,
                "user": {"uid": 1, "gid": 2, "username": "x"},
                "rlimits": [{"type": "RLIMIT_NOFILE", "soft": 9, "hard": 1u64 << 40}],
                "apparmorProfile": "p"},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/h/hosts", "options": ["bind", "ro"]},
                {"destination": "/data", "type": "bind", "source": "/h/data", "options": ["rbind"]},
                {"destination": "/dev/shm", "type": "bind", "source": "/h/shm", "options": ["bind"]},
                {"destination": "/sys", "type": "bind", "source": "/sys", "options": ["rbind", "ro"]},
            ],
            "linux": {
                "cgroupsPath": "/x", "devices": [],
                "namespaces": [{"type": "network", "path": "/run/netns/x"}, {"type": "pid", "path": "/proc/1/ns/pid"}],
                "resources": {"memory": {"limit": 268_435_456, "swap": 5}, "cpu": {"quota": 150_000, "period": 100_000},
                    "devices": [{"allow": false}], "pids": {"limit": 99}},
            },
        });
        change(&mut config);
        let request = BundleRequest {
            id: "c1".into(),
            bundle: "/b".into(),
            spec: serde_json::from_value(config).unwrap(),
            checkpoint: None,
            only_holds,
        };
        let identity = Identity {
            id: "c1".into(),
            name: "c1".into(),
            created_at: Timestamp::UNIX_EPOCH,
        };
        let facts = HostFacts {
            cpus: 4,
            memory_bytes: 8 << 30,
            files: vec!["/h/hosts".into()],
            pod: None,
        };
        let settings = crate::plan::tests::settings();
        plan(&request, identity, &settings, &facts)
    }

    #[test]
    fn a_bundle_becomes_what_its_guest_sees() {
        let plan = planned(|_| {}).unwrap();
        assert_eq!(plan.root, PlannedRoot::Directory("/b/rootfs".into()));
        assert!(plan.held && plan.tty);
        assert_eq!(plan.vm.memory_bytes, (256 << 20) + GUEST_OVERHEAD);
        assert_eq!((plan.vm.vcpus, plan.vm.cpu_quota), (2, Some(1.5)));
        let spec: Value = plan.spec.read().unwrap();
        assert_eq!(
            spec["root"],
            json!({"path": "/run/hull/shares/root", "readonly": true})
        );
        let sources: Vec<_> = spec["mounts"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| &m["source"])
            .collect();
        assert_eq!(
            sources,
            [
                "proc",
                "/run/hull/shares/v0/file",
                "/run/hull/shares/v1",
                "/run/hull/shm",
                "sysfs"
            ]
        );
        let exports: Vec<_> = plan
            .exports
            .iter()
            .map(|export| (&export.source, export.read_only))
            .collect();
        assert_eq!(
            exports,
            [
                (&ExportSource::File("/h/hosts".into()), true),
                (&ExportSource::Directory("/h/data".into()), false)
            ]
        );
        let linux = &spec["linux"];
        assert_eq!(linux["resources"]["pids"], json!({"limit": 99}));
        assert_eq!(linux["cgroupsPath"], Value::Null);
        let kinds: Vec<_> = linux["namespaces"]
            .as_array()
            .unwrap()
            .iter()
            .map(|n| (&n["type"], &n["path"]))
            .collect();
        assert!(
            kinds
                .iter()
                .all(|(kind, path)| **kind != "network" && path.is_null()),
            "{kinds:?}"
        );
        let process = &spec["process"];
        assert_eq!(process["user"], json!({"uid": 1, "gid": 2}));
        assert_eq!(process["rlimits"][0]["hard"], MOST_DESCRIPTORS);
        assert_eq!(process["apparmorProfile"], Value::Null);
    }

    #[test]
    fn the_network_namespace_is_joined_if_it_is_there_already() {
        let network = |namespaces: Value| {
            let plan = planned(|config| config["linux"]["namespaces"] = namespaces).unwrap();
            (plan.network, plan.makes_network)
        };
        let named = json!([{"type": "pid", "path": "/p"}, {"type": "network", "path": "/run/x"}]);
        assert_eq!(network(named), (Some("/run/x".into()), false));
        assert_eq!(network(json!([])), (None, false));
        for new in [
            json!([{"type": "network"}]),
            json!([{"type": "network", "path": ""}]),
        ] {
            assert_eq!(network(new), (None, true));
        }
    }

    #[test]
    fn what_only_holds_a_sandbox_has_no_command() {
        let plan = planned_for(true, |config| config["process"]["args"] = json!([])).unwrap();
        assert!(plan.init && plan.held && plan.command().is_empty());
        let refused = planned_for(true, |_| {}).unwrap_err();
        assert!(matches!(refused, PlanError::NoCommand), "{refused}");
    }

    #[test]
    fn what_a_guest_cannot_have_is_refused_by_name() {
        let disk = json!([{"path": "/dev/sda", "type": "b", "major": 8, "minor": 0}]);
        let refused = [
            planned(|config| config["linux"]["devices"] = disk),
            planned(|config| config["mounts"][2]["source"] = json!("/dev/dri")),
            planned(|config| config["process"] = Value::Null),
            planned(|config| config["root"] = Value::Null),
            planned(|config| config["process"]["args"] = json!([])),
        ];
        let words: Vec<_> = refused
            .into_iter()
            .map(|plan| plan.unwrap_err().to_string())
            .collect();
        assert_eq!(
            words,
            [
                "cannot use device /dev/sda: a virtual machine has none of the host's devices",
                "cannot use mount /data: its source belongs to the host's kernel, and a virtual machine has its own",
                "cannot use the bundle: its specification names no process",
                "cannot use the bundle: its specification names no root",
                "no command specified",
            ]
        );
    }
}
