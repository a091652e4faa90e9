//! What this runtime can do (runtime spec, features.md), and a configuration to begin with.

use std::fs::File;
use std::io::{Write, stdout};

use anyhow::Context;
use oci_spec::runtime::Spec;
use serde_json::json;

use crate::args::SpecArgs;
use crate::manage::SPEC_VERSION;

/// Prints it.
pub(crate) fn features() -> anyhow::Result<u8> {
    let features = json!({
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
    });
    writeln!(stdout(), "{}", serde_json::to_string_pretty(&features)?)?;
    Ok(0)
}

/// Writes `config.json`, which must not be there yet.
pub(crate) fn spec(args: &SpecArgs) -> anyhow::Result<u8> {
    let path = args.bundle.join("config.json");
    let file =
        File::create_new(&path).with_context(|| format!("cannot create \"{}\"", path.display()))?;
    let mut spec = Spec::default();
    spec.set_hostname(Some("hull".to_owned()));
    serde_json::to_writer_pretty(file, &spec)
        .with_context(|| format!("cannot write \"{}\"", path.display()))?;
    Ok(0)
}
