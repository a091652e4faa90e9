//! What Hull can do with a bundle (runtime spec, features.md).

use serde_json::{Value, json};

/// The version of the runtime spec that is spoken.
pub const SPEC_VERSION: &str = "1.2.0";

/// The features, as the spec has them written.
#[must_use]
pub fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": ["prestart", "createRuntime", "createContainer", "poststart", "poststop"],
        "mountOptions": [
            "bind", "rbind", "ro", "rw", "nosuid", "suid", "nodev", "dev", "noexec", "exec",
            "relatime", "noatime", "strictatime", "nodiratime", "private", "rprivate", "slave",
            "rslave", "shared", "rshared", "unbindable", "runbindable", "rro", "tmpcopyup",
        ],
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "pid", "user", "uts"],
            "cgroup": {"v1": false, "v2": true, "systemd": false, "systemdUser": false, "rdma": false},
            "seccomp": {"enabled": true, "archs": ["SCMP_ARCH_X86", "SCMP_ARCH_X86_64", "SCMP_ARCH_X32"]},
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
    })
}
