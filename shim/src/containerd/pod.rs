//! What a pod's sandbox is to be, where no pause container's bundle says it: of CRI's
//! `PodSandboxConfig` and of what containerd's other clients write as `config.json`. Pure.
//!
//! Owns: the bundle's specification in place of a pause container's, and what containers of the
//! pod find in place of the files that containerd makes for one. Refuses: options of another kind.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use oci_spec::runtime::{LinuxNamespaceType, Mount, MountBuilder, Spec};
use prost::Message;
use serde_json::{Map, Value, json};

use crate::fault::{Answer, Fault};

/// CRI's configuration, in the types' registry of containerd.
const CONFIG: &str = "runtime.v1.PodSandboxConfig";
/// CRI's annotations, as containerd writes them into bundles (`internal/cri/annotations`).
const KIND: &str = "io.kubernetes.cri.container-type";
const SANDBOX: &str = "io.kubernetes.cri.sandbox-id";
/// How hard a sandbox is to kill for the host's memory: what containerd asks for a pause container.
const SCORE: i32 = -998;
/// Where memory is shared.
const SHARED_MEMORY: &str = "/dev/shm";

/// `PodSandboxConfig` as far as a sandbox is made by it (CRI's `api.proto`).
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Config {
    #[prost(string, tag = "2")]
    pub(crate) hostname: String,
    #[prost(message, optional, tag = "4")]
    pub(crate) dns: Option<Dns>,
    #[prost(message, optional, tag = "8")]
    pub(crate) linux: Option<Linux>,
}

/// `DNSConfig`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Dns {
    #[prost(string, repeated, tag = "1")]
    pub(crate) servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    pub(crate) searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    pub(crate) options: Vec<String>,
}

/// `LinuxPodSandboxConfig`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct Linux {
    #[prost(string, tag = "1")]
    pub(crate) cgroup_parent: String,
    #[prost(map = "string, string", tag = "3")]
    pub(crate) sysctls: HashMap<String, String>,
    #[prost(message, optional, tag = "5")]
    pub(crate) resources: Option<Resources>,
}

/// `LinuxContainerResources`: the sum of the pod's containers'.
#[derive(Clone, Copy, PartialEq, Message)]
pub(crate) struct Resources {
    #[prost(int64, tag = "1")]
    pub(crate) cpu_period: i64,
    #[prost(int64, tag = "2")]
    pub(crate) cpu_quota: i64,
    #[prost(int64, tag = "3")]
    pub(crate) cpu_shares: i64,
    #[prost(int64, tag = "4")]
    pub(crate) memory_limit_in_bytes: i64,
}

impl Config {
    /// Reads a sandbox's options; none is what `ctr` gives.
    pub(crate) fn read(options: Option<&Any>) -> Answer<Self> {
        let Some(options) = options.filter(|options| !options.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let name = options.type_url.rsplit('/').next().unwrap_or_default();
        if name != CONFIG {
            return Err(Fault::Invalid(format!("options of type {name}")));
        }
        Self::decode(options.value.as_slice())
            .map_err(|error| Fault::Invalid(format!("{name}: {error}")))
    }

    /// The lines of `resolv.conf`; none if it is to be the host's.
    pub(crate) fn resolver(&self) -> Option<String> {
        let dns = self.dns.as_ref()?;
        let mut lines = String::new();
        let mut line = |word: &str, values: &[String]| {
            if !values.is_empty() {
                lines.push_str(&format!("{word} {}\n", values.join(" ")));
            }
        };
        line("search", &dns.searches);
        for server in &dns.servers {
            line("nameserver", std::slice::from_ref(server));
        }
        line("options", &dns.options);
        (!lines.is_empty()).then_some(lines)
    }

    /// What containerd says of a pod as a whole in its pause container's annotations.
    fn sums(&self) -> Vec<(String, String)> {
        let resources = self.linux.as_ref().and_then(|linux| linux.resources);
        let Some(of) = resources else {
            return Vec::new();
        };
        let numbers = [
            ("cpu-period", of.cpu_period),
            ("cpu-quota", of.cpu_quota),
            ("cpu-shares", of.cpu_shares),
            ("memory", of.memory_limit_in_bytes),
        ];
        let named = numbers.into_iter().filter(|(_, number)| *number != 0);
        named
            .map(|(name, number)| {
                let name = format!("io.kubernetes.cri.sandbox-{name}");
                (name, number.to_string())
            })
            .collect()
    }
}

/// The specification of what holds a sandbox: as a pause container's would be, but for a command.
/// `own` is what the bundle's `config.json` says, which has the last word where CRI says nothing.
pub(crate) fn holder(
    request: &CreateSandboxRequest,
    config: &Config,
    own: &Spec,
    root: &Path,
) -> anyhow::Result<Spec> {
    let linux = config.linux.clone().unwrap_or_default();
    let mut spec = json!({
        "ociVersion": Spec::default().version(),
        "root": {"path": root, "readonly": true},
        "process": {"args": [], "cwd": "/", "user": {"uid": 0, "gid": 0},
            "noNewPrivileges": true, "oomScoreAdj": SCORE},
        "mounts": [
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "mode=755", "size=65536"]},
            {"destination": SHARED_MEMORY, "type": "bind", "source": SHARED_MEMORY,
                "options": ["bind"]},
        ],
    });
    let own_linux = own.linux().clone().unwrap_or_default();
    let mut sysctls = own_linux.sysctl().clone().unwrap_or_default();
    sysctls.extend(linux.sysctls);
    let cgroup = match linux.cgroup_parent.as_str() {
        "" => own_linux.cgroups_path().clone(),
        // As containerd names a container's below it.
        slice if slice.ends_with(".slice") => {
            let slice = Path::new(slice).file_name().unwrap_or_default();
            let slice = slice.to_string_lossy();
            Some(format!("{slice}:cri-containerd:{}", request.sandbox_id).into())
        }
        parent => Some(Path::new(parent).join(&request.sandbox_id)),
    };
    let network = match request.netns_path.as_str() {
        "" => own_linux.namespaces().iter().flatten().find_map(|known| {
            let is_network = known.typ() == LinuxNamespaceType::Network;
            known.path().clone().filter(|_| is_network)
        }),
        path => Some(path.into()),
    };
    let mut namespaces = vec![json!({"type": "pid"}), json!({"type": "ipc"})];
    // Without one to join there is none: a new one would be for somebody to fill.
    namespaces.extend(network.map(|path: PathBuf| json!({"type": "network", "path": path})));
    spec["linux"] = json!({"namespaces": namespaces, "sysctl": sysctls,
        "resources": own_linux.resources(), "cgroupsPath": cgroup});
    let mut annotations: Map<String, Value> = Map::new();
    let given = own.annotations().iter().flatten();
    let asked = request.annotations.iter();
    annotations.extend(given.chain(asked).map(|(k, v)| (k.clone(), json!(v))));
    annotations.extend(config.sums().into_iter().map(|(k, v)| (k, json!(v))));
    annotations.insert(KIND.to_owned(), json!("sandbox"));
    annotations.insert(SANDBOX.to_owned(), json!(request.sandbox_id));
    spec["annotations"] = Value::Object(annotations);
    spec["hostname"] = match config.hostname.as_str() {
        "" => json!(own.hostname()),
        name => json!(name),
    };
    serde_json::from_value(spec).context("cannot describe the sandbox")
}

/// Makes a container one of a sandbox, with the sandbox's `files` (target, source) where it has
/// none of its own, and the memory that the sandbox's containers share where it shares IPC.
pub(crate) fn join(
    spec: &mut Spec,
    sandbox: &str,
    files: &[(&str, impl AsRef<Path>)],
) -> anyhow::Result<()> {
    let mut annotations = spec.annotations().clone().unwrap_or_default();
    annotations.insert(KIND.to_owned(), "container".to_owned());
    annotations.insert(SANDBOX.to_owned(), sandbox.to_owned());
    spec.set_annotations(Some(annotations));
    let read_only = spec.root().as_ref().and_then(|root| root.readonly());
    let access = if read_only == Some(true) { "ro" } else { "rw" };
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (target, source) in files {
        if !mounts.iter().any(|mount| is_at(mount, target)) {
            mounts.push(bind(target, source.as_ref(), access)?);
        }
    }
    let namespaces = spec.linux().as_ref().and_then(|it| it.namespaces().clone());
    let shares_memory = namespaces.iter().flatten().any(|known| {
        known.typ() == LinuxNamespaceType::Ipc
            && known
                .path()
                .as_ref()
                .is_some_and(|path| path != Path::new(""))
    });
    let own = mounts.iter_mut().find(|mount| is_at(mount, SHARED_MEMORY));
    // One that is bound there was asked for.
    if let Some(own) = own.filter(|own| shares_memory && own.typ().as_deref() == Some("tmpfs")) {
        *own = bind(SHARED_MEMORY, Path::new(SHARED_MEMORY), "rw")?;
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn is_at(mount: &Mount, target: &str) -> bool {
    mount.destination() == Path::new(target)
}

fn bind(target: &str, source: &Path, access: &str) -> anyhow::Result<Mount> {
    let options = ["rbind", "rprivate", access].map(str::to_owned).to_vec();
    let mount = MountBuilder::default()
        .destination(target)
        .typ("bind")
        .source(source)
        .options(options);
    Ok(mount.build()?)
}

#[cfg(test)]
mod tests {
    use k8s_cri::v1::{
        DnsConfig, LinuxContainerResources, LinuxPodSandboxConfig, PodSandboxConfig,
    };

    use super::*;

    fn any(name: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: name.to_owned(),
            value,
            ..Any::default()
        }
    }

    fn config() -> Config {
        let whole = PodSandboxConfig {
            hostname: "pod".to_owned(),
            log_directory: "/logs".to_owned(),
            dns_config: Some(DnsConfig {
                servers: vec!["10.0.0.1".to_owned(), "10.0.0.2".to_owned()],
                searches: vec!["a.b".to_owned(), "c".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            labels: HashMap::from([("l".to_owned(), "v".to_owned())]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kube/pod1".to_owned(),
                sysctls: HashMap::from([("net.core.somaxconn".to_owned(), "7".to_owned())]),
                resources: Some(LinuxContainerResources {
                    cpu_period: 100_000,
                    cpu_quota: 50_000,
                    memory_limit_in_bytes: 1 << 28,
                    ..Default::default()
                }),
                ..Default::default()
            }),
            ..Default::default()
        };
        Config::read(Some(&any(CONFIG, whole.encode_to_vec()))).unwrap()
    }

    fn request() -> CreateSandboxRequest {
        CreateSandboxRequest {
            sandbox_id: "s1".to_owned(),
            netns_path: "/run/netns/x".to_owned(),
            annotations: HashMap::from([("own".to_owned(), "1".to_owned())]),
            ..CreateSandboxRequest::default()
        }
    }

    #[test]
    fn cris_configuration_becomes_a_specification() {
        let spec = holder(&request(), &config(), &Spec::default(), Path::new("/r")).unwrap();
        let said = serde_json::to_value(&spec).unwrap();
        assert_eq!(said["hostname"], "pod");
        assert_eq!(said["root"], json!({"path": "/r", "readonly": true}));
        assert_eq!(said["linux"]["cgroupsPath"], "/kube/pod1/s1");
        assert_eq!(said["linux"]["sysctl"], json!({"net.core.somaxconn": "7"}));
        let network = json!({"type": "network", "path": "/run/netns/x"});
        assert_eq!(said["linux"]["namespaces"][2], network);
        let expected = json!({"own": "1", KIND: "sandbox", SANDBOX: "s1",
            "io.kubernetes.cri.sandbox-cpu-period": "100000",
            "io.kubernetes.cri.sandbox-cpu-quota": "50000",
            "io.kubernetes.cri.sandbox-memory": "268435456"});
        assert_eq!(said["annotations"], expected);
    }

    #[test]
    fn a_bundles_own_specification_counts_where_cri_says_nothing() {
        let own = json!({"ociVersion": "1.1.0", "hostname": "own",
            "process": {"args": ["sh"], "cwd": "/x", "user": {"uid": 1, "gid": 1}},
            "annotations": {"io.kubernetes.cri.sandbox-memory": "1"},
            "linux": {"cgroupsPath": "/c", "namespaces": [{"type": "network", "path": "/n"}],
                "resources": {"memory": {"limit": 5}}}});
        let own: Spec = serde_json::from_value(own).unwrap();
        let mut asked = request();
        asked.netns_path.clear();
        let spec = holder(&asked, &Config::read(None).unwrap(), &own, Path::new("/r")).unwrap();
        let said = serde_json::to_value(&spec).unwrap();
        assert_eq!(
            (&said["hostname"], &said["process"]["args"]),
            (&json!("own"), &json!([]))
        );
        assert_eq!(said["annotations"]["io.kubernetes.cri.sandbox-memory"], "1");
        assert_eq!(said["linux"]["cgroupsPath"], "/c");
        assert_eq!(said["linux"]["namespaces"][2]["path"], "/n");
        assert_eq!(said["linux"]["resources"]["memory"]["limit"], 5);
        let spec = holder(
            &asked,
            &Config::default(),
            &Spec::default(),
            Path::new("/r"),
        )
        .unwrap();
        let said = serde_json::to_value(&spec).unwrap();
        assert_eq!(said["linux"]["namespaces"][2], Value::Null);
    }

    #[test]
    fn slices_are_named_as_containerd_names_them() {
        let mut config = config();
        config.linux.as_mut().unwrap().cgroup_parent = "/kubepods.slice/kubepods-pod1.slice".into();
        let spec = holder(&request(), &config, &Spec::default(), Path::new("/r")).unwrap();
        let path = spec.linux().as_ref().unwrap().cgroups_path().clone();
        assert_eq!(path, Some("kubepods-pod1.slice:cri-containerd:s1".into()));
    }

    #[test]
    fn names_are_resolved_as_asked_or_as_on_the_host() {
        let lines = "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n";
        assert_eq!(config().resolver().as_deref(), Some(lines));
        assert_eq!(Config::default().resolver(), None);
    }

    #[test]
    fn options_of_another_kind_are_refused() {
        for (options, words) in [
            (any("containerd.runc.v1.Options", vec![]), "options of type"),
            (any(CONFIG, vec![0x12, 0xff]), CONFIG),
        ] {
            let refused = Config::read(Some(&options)).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
    }

    #[test]
    fn a_container_has_the_sandboxs_files_unless_it_has_its_own() {
        let spec = |ipc: Value| {
            let spec = json!({"ociVersion": "1.1.0", "root": {"path": "rootfs", "readonly": true},
                "mounts": [{"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
                    {"destination": "/etc/hosts", "type": "bind", "source": "/own"}],
                "linux": {"namespaces": [ipc]}});
            let mut spec: Spec = serde_json::from_value(spec).unwrap();
            join(
                &mut spec,
                "s1",
                &[("/etc/hosts", "/s/hosts"), ("/etc/hostname", "/s/name")],
            )
            .unwrap();
            serde_json::to_value(&spec).unwrap()
        };
        let joined = spec(json!({"type": "ipc", "path": "/proc/7/ns/ipc"}));
        assert_eq!(
            joined["annotations"],
            json!({KIND: "container", SANDBOX: "s1"})
        );
        let mounts = &joined["mounts"];
        assert_eq!(
            (&mounts[0]["type"], &mounts[0]["source"]),
            (&json!("bind"), &json!("/dev/shm"))
        );
        assert_eq!(mounts[1]["source"], "/own");
        assert_eq!(mounts[2]["source"], "/s/name");
        assert_eq!(mounts[2]["options"], json!(["rbind", "rprivate", "ro"]));
        assert_eq!(mounts[3], Value::Null);
        assert_eq!(spec(json!({"type": "ipc"}))["mounts"][0]["type"], "tmpfs");
    }
}
