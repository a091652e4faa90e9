//! The OCI bundles that crun and runc are given: what Hull's plan makes of the same `run`.
//!
//! Owns: one `config.json`. Refuses: anything that would make a runtime's work larger than
//! Hull's: no network namespace, no seccomp profile, no cgroup limits.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::inputs::PLACE;

/// The search path of every process.
pub(super) const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The files that tell a container who it is; Docker and Hull bind each.
pub(super) const IDENTITY_FILES: [&str; 3] = ["resolv.conf", "hostname", "hosts"];

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

/// Writes a bundle whose process is `command`, in a directory of its first word's name.
pub(super) fn write(bundles: &Path, command: &[&str]) -> Result<()> {
    let name = command.first().context("a bundle has no command")?;
    let bundle = &bundles.join(name);
    fs::create_dir_all(bundle).with_context(|| format!("cannot create {}", bundle.display()))?;
    for file in IDENTITY_FILES {
        fs::write(bundle.join(file), "bench\n").context("cannot write a bundle's files")?;
    }
    let place = Path::new(PLACE).join("bundles").join(name);
    fs::write(
        bundle.join("config.json"),
        config(&place, command).to_string(),
    )
    .context("cannot write a bundle's config.json")
}

fn config(bundle: &Path, command: &[&str]) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup"].map(|kind| json!({ "type": kind }));
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": format!("{PLACE}/root"), "readonly": false },
        "hostname": "bench",
        "mounts": mounts(bundle),
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0 },
            "args": command,
            "env": [PATH, "HOSTNAME=bench"],
            "cwd": "/",
            "noNewPrivileges": false,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1024, "hard": 524_288 }],
        },
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
        },
    })
}

fn mounts(bundle: &Path) -> Vec<Value> {
    let mount = |target: &str, kind: &str, options: &[&str]| json!({ "destination": target, "type": kind, "source": kind, "options": options });
    let quiet = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        mount("/proc", "proc", &quiet),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/sys/fs/cgroup",
            "cgroup",
            &["ro", "nosuid", "noexec", "nodev"],
        ),
        mount("/dev/mqueue", "mqueue", &quiet),
        mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"],
        ),
    ];
    mounts.extend(IDENTITY_FILES.map(|file| {
        json!({
            "destination": format!("/etc/{file}"),
            "type": "bind",
            "source": bundle.join(file),
            "options": ["rbind", "rprivate"],
        })
    }));
    mounts
}
