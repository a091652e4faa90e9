//! The part of the OCI runtime spec (1.2, config.md and config-linux.md) that the agent honours.
//!
//! Owns: reading a container's or a process's JSON into plain data. Refuses: values of a known
//! field that it doesn't know, and what the agent can't do though a guest could. Fields that mean nothing in a guest of its own are passed over:
//! hooks and annotations (the host's), security labels (no such modules here), the device list of
//! the cgroup (the guest has only its own devices), the root's propagation (all mounts of a guest
//! are private).

use std::collections::BTreeMap;
use std::path::PathBuf;

use hull_proto::OciJson;
use serde::de::IgnoredAny;
use serde::{Deserialize, Deserializer};

use crate::fault::Fault;

/// Reads a document of the runtime spec.
///
/// # Errors
/// Refuses what isn't such a document.
pub(crate) fn read<T: serde::de::DeserializeOwned>(document: &OciJson) -> Result<T, Fault> {
    document
        .read()
        .map_err(|error| Fault::refused(format!("the spec can't be read: {error}")))
}

/// A container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Spec {
    pub(crate) process: Option<Process>,
    pub(crate) root: Option<Root>,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) mounts: Vec<Mount>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) linux: Linux,
}

/// The root directory.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Root {
    pub(crate) path: PathBuf,
    #[serde(default)]
    pub(crate) readonly: bool,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Mount {
    pub(crate) destination: PathBuf,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) source: Option<PathBuf>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) options: Vec<String>,
    #[serde(default, rename = "uidMappings", deserialize_with = "or_empty")]
    pub(crate) uid_mappings: Vec<IdMap>,
}

/// A process.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Process {
    pub(crate) terminal: bool,
    pub(crate) console_size: Option<Size>,
    pub(crate) user: User,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) args: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) env: Vec<String>,
    pub(crate) cwd: PathBuf,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) capabilities: Capabilities,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) rlimits: Vec<Rlimit>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) no_new_privileges: bool,
    pub(crate) oom_score_adj: Option<i32>,
    scheduler: Option<IgnoredAny>,
    io_priority: Option<IgnoredAny>,
    #[serde(rename = "execCPUAffinity")]
    exec_cpu_affinity: Option<IgnoredAny>,
}

impl Process {
    /// The first field that is set and can't be honoured.
    pub(crate) fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("scheduler", self.scheduler.is_some()),
            ("ioPriority", self.io_priority.is_some()),
            ("execCPUAffinity", self.exec_cpu_affinity.is_some()),
        ];
        first_set(&fields)
    }
}

/// A terminal's size in characters.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Size {
    pub(crate) height: u64,
    pub(crate) width: u64,
}

/// Who a process runs as.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct User {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) umask: Option<u32>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) additional_gids: Vec<u32>,
    pub(crate) username: Option<String>,
}

/// Capabilities, by name.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Capabilities {
    #[serde(deserialize_with = "or_empty")]
    pub(crate) bounding: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) effective: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) inheritable: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) permitted: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) ambient: Vec<String>,
}

/// A resource limit of a process.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Rlimit {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) soft: u64,
    pub(crate) hard: u64,
}

/// What is Linux's own.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Linux {
    #[serde(deserialize_with = "or_empty")]
    pub(crate) namespaces: Vec<Namespace>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) uid_mappings: Vec<IdMap>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) gid_mappings: Vec<IdMap>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) sysctl: BTreeMap<String, String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) resources: Resources,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) devices: Vec<Device>,
    pub(crate) seccomp: Option<Seccomp>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) masked_paths: Vec<String>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) readonly_paths: Vec<String>,
    personality: Option<IgnoredAny>,
    time_offsets: Option<IgnoredAny>,
    memory_policy: Option<IgnoredAny>,
    intel_rdt: Option<IgnoredAny>,
}

impl Linux {
    /// The first field that is set and can't be honoured.
    pub(crate) fn unsupported(&self) -> Option<&'static str> {
        let fields = [
            ("personality", self.personality.is_some()),
            ("timeOffsets", self.time_offsets.is_some()),
            ("memoryPolicy", self.memory_policy.is_some()),
            ("intelRdt", self.intel_rdt.is_some()),
        ];
        first_set(&fields)
    }
}

/// A namespace: a new one, or the one at a path.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Namespace {
    #[serde(rename = "type")]
    pub(crate) kind: NamespaceKind,
    pub(crate) path: Option<PathBuf>,
}

/// The kinds of namespaces, with their `CLONE_NEW*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum NamespaceKind {
    Time = 0x80,
    Mount = 0x0002_0000,
    Cgroup = 0x0200_0000,
    Uts = 0x0400_0000,
    Ipc = 0x0800_0000,
    User = 0x1000_0000,
    Pid = 0x2000_0000,
    Network = 0x4000_0000,
}

/// A range of mapped ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) struct IdMap {
    #[serde(rename = "containerID")]
    pub(crate) container: u32,
    #[serde(rename = "hostID")]
    pub(crate) host: u32,
    pub(crate) size: u32,
}

/// A device node.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Device {
    pub(crate) path: PathBuf,
    #[serde(rename = "type")]
    pub(crate) kind: DeviceKind,
    #[serde(default)]
    pub(crate) major: u32,
    #[serde(default)]
    pub(crate) minor: u32,
    pub(crate) file_mode: Option<u32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
}

/// The kinds of device nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum DeviceKind {
    #[serde(rename = "b")]
    Block,
    #[serde(rename = "c", alias = "u")]
    Character,
    #[serde(rename = "p")]
    Fifo,
}

/// Limits of a container.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct Resources {
    #[serde(deserialize_with = "or_empty")]
    pub(crate) memory: Memory,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) cpu: Cpu,
    pub(crate) pids: Option<Pids>,
    #[serde(rename = "blockIO", deserialize_with = "or_empty")]
    pub(crate) block_io: BlockIo,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) hugepage_limits: Vec<HugePages>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) unified: BTreeMap<String, String>,
}

/// Limits of memory, in bytes.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Memory {
    pub(crate) limit: Option<i64>,
    pub(crate) reservation: Option<i64>,
    pub(crate) swap: Option<i64>,
    #[serde(rename = "checkBeforeUpdate", deserialize_with = "or_empty")]
    pub(crate) check_before_update: bool,
}

/// Limits of processor time.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Cpu {
    pub(crate) shares: Option<u64>,
    pub(crate) quota: Option<i64>,
    pub(crate) burst: Option<u64>,
    pub(crate) period: Option<u64>,
    pub(crate) idle: Option<i64>,
    pub(crate) cpus: Option<String>,
    pub(crate) mems: Option<String>,
}

/// The limit of processes and threads.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Pids {
    pub(crate) limit: i64,
}

/// Limits of block devices.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(crate) struct BlockIo {
    pub(crate) weight: Option<u16>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) throttle_read_bps_device: Vec<Throttle>,
    #[serde(deserialize_with = "or_empty")]
    pub(crate) throttle_write_bps_device: Vec<Throttle>,
    #[serde(rename = "throttleReadIOPSDevice", deserialize_with = "or_empty")]
    pub(crate) throttle_read_iops_device: Vec<Throttle>,
    #[serde(rename = "throttleWriteIOPSDevice", deserialize_with = "or_empty")]
    pub(crate) throttle_write_iops_device: Vec<Throttle>,
}

/// The limit of one block device.
#[derive(Debug, Clone, Copy, Deserialize)]
pub(crate) struct Throttle {
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) rate: u64,
}

/// The limit of huge pages of one size.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HugePages {
    pub(crate) page_size: String,
    pub(crate) limit: u64,
}

/// A system call filter.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Seccomp {
    pub(crate) default_action: Action,
    pub(crate) default_errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) architectures: Vec<String>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) flags: Vec<String>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) syscalls: Vec<Syscalls>,
}

/// What to do about some system calls.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Syscalls {
    pub(crate) names: Vec<String>,
    pub(crate) action: Action,
    pub(crate) errno_ret: Option<u32>,
    #[serde(default, deserialize_with = "or_empty")]
    pub(crate) args: Vec<Condition>,
}

/// What a filter does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum Action {
    #[serde(rename = "SCMP_ACT_KILL", alias = "SCMP_ACT_KILL_THREAD")]
    KillThread,
    #[serde(rename = "SCMP_ACT_KILL_PROCESS")]
    KillProcess,
    #[serde(rename = "SCMP_ACT_TRAP")]
    Trap,
    #[serde(rename = "SCMP_ACT_ERRNO")]
    Errno,
    #[serde(rename = "SCMP_ACT_NOTIFY")]
    Notify,
    #[serde(rename = "SCMP_ACT_TRACE")]
    Trace,
    #[serde(rename = "SCMP_ACT_LOG")]
    Log,
    #[serde(rename = "SCMP_ACT_ALLOW")]
    Allow,
}

/// A condition on an argument of a system call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Condition {
    pub(crate) index: u32,
    pub(crate) value: u64,
    #[serde(default)]
    pub(crate) value_two: u64,
    pub(crate) op: Operator,
}

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub(crate) enum Operator {
    #[serde(rename = "SCMP_CMP_NE")]
    NotEqual,
    #[serde(rename = "SCMP_CMP_LT")]
    Less,
    #[serde(rename = "SCMP_CMP_LE")]
    AtMost,
    #[serde(rename = "SCMP_CMP_EQ")]
    Equal,
    #[serde(rename = "SCMP_CMP_GE")]
    AtLeast,
    #[serde(rename = "SCMP_CMP_GT")]
    Greater,
    #[serde(rename = "SCMP_CMP_MASKED_EQ")]
    MaskedEqual,
}

fn first_set(fields: &[(&'static str, bool)]) -> Option<&'static str> {
    let set = fields.iter().find(|(_, is_set)| *is_set);
    set.map(|(name, _)| *name)
}

/// `null`, as Go writes what is empty, is empty.
fn or_empty<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_go_leaves_null_is_empty() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.2.0","mounts":null,"linux":{"namespaces":null,"devices":null,
            "resources":null,"unknown":1},"process":{"args":null,"cwd":"/","capabilities":null,
            "user":{"uid":1,"gid":2,"additionalGids":null}}}"#,
        )
        .unwrap();
        assert!(spec.mounts.is_empty());
        let process = spec.process.unwrap();
        assert_eq!((process.user.uid, process.user.gid), (1, 2));
    }

    #[test]
    fn a_namespace_or_device_of_an_unknown_kind_is_refused() {
        for json in [
            r#"{"linux":{"namespaces":[{"type":"dream"}]}}"#,
            r#"{"linux":{"devices":[{"path":"/dev/x","type":"z"}]}}"#,
        ] {
            assert!(serde_json::from_str::<Spec>(json).is_err());
        }
    }
}
