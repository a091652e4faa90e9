//! A case as an OCI bundle for crun, which shares the host's kernel: the control of the table.
//!
//! Owns: what Docker would write into `config.json` for the case. Refuses: what a bundle can't
//! say (images' configurations, files of variables); such cases are Hull's alone.

#![expect(
    clippy::expect_used,
    reason = "what a fixture can't have ends its test"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::Adapter;
use crate::cases::{Case, Setup};
use crate::image::{self, Image};
use crate::process::Process;

/// Docker's (moby, `oci/caps/defaults.go`).
const CAPABILITIES: [&str; 14] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "FSETID",
    "FOWNER",
    "MKNOD",
    "NET_RAW",
    "SETGID",
    "SETUID",
    "SETFCAP",
    "SETPCAP",
    "NET_BIND_SERVICE",
    "SYS_CHROOT",
    "KILL",
    "AUDIT_WRITE",
];

/// The others of capabilities(7).
const OTHERS: [&str; 27] = [
    "DAC_READ_SEARCH",
    "LINUX_IMMUTABLE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "LEASE",
    "AUDIT_CONTROL",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

const MASKED: [&str; 6] = [
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/timer_list",
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

/// Cases on crun, each with a fresh copy of the image's tree.
#[derive(Debug)]
pub struct CrunAdapter {
    directory: TempDir,
    number: AtomicU32,
}

impl CrunAdapter {
    /// An adapter with the image's tree unpacked.
    ///
    /// # Panics
    /// When the disk refuses.
    #[must_use]
    pub fn new() -> Self {
        let directory = tempfile::Builder::new()
            .prefix("hull-crun-")
            .tempdir()
            .expect("make a directory");
        Image::new().unpack(&directory.path().join("tree"));
        Self {
            directory,
            number: AtomicU32::new(0),
        }
    }
}

impl Default for CrunAdapter {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for CrunAdapter {
    /// A case that failed may have left its container.
    fn drop(&mut self) {
        let state = self.directory.path().join("state");
        let Ok(containers) = fs::read_dir(&state) else {
            return;
        };
        for container in containers.flatten() {
            let mut command = std::process::Command::new("crun");
            command.arg("--root").arg(&state).args(["delete", "-f"]);
            // The failure that left it is the one to tell.
            let _deleted = command.arg(container.file_name()).status();
        }
    }
}

impl Adapter for CrunAdapter {
    fn is_control(&self) -> bool {
        true
    }

    fn process(&self, case: &Case, scratch: &Path) -> Process {
        let bundle = scratch.join("bundle");
        fs::create_dir(&bundle).expect("make a bundle");
        let tree = self.directory.path().join("tree");
        let root = bundle.join("rootfs");
        Process::new([Path::new("cp"), Path::new("-a"), &tree, &root])
            .output()
            .ok();
        let config = config(case, scratch).to_string();
        fs::write(bundle.join("config.json"), config).expect("write a bundle's configuration");
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let base = self.directory.path().file_name().unwrap_or_default();
        let id = format!("{}-{number}", base.to_string_lossy());
        let words: [PathBuf; 7] = [
            "crun".into(),
            "--root".into(),
            self.directory.path().join("state"),
            "run".into(),
            "--bundle".into(),
            bundle,
            id.into(),
        ];
        Process::new(words)
    }
}

fn config(case: &Case, scratch: &Path) -> Value {
    let setup = &case.setup;
    let hostname = setup.hostname.unwrap_or("control");
    json!({
        "ociVersion": "1.0.2",
        "root": { "path": "rootfs", "readonly": setup.read_only },
        "hostname": hostname,
        "process": process(case, hostname),
        "mounts": mounts(setup, scratch),
        "linux": linux(setup),
    })
}

fn process(case: &Case, hostname: &str) -> Value {
    let setup = &case.setup;
    let mut gids = setup.user.groups.to_vec();
    gids.extend(&setup.groups);
    let set = capabilities(setup);
    let mut process = json!({
        "terminal": case.tty.is_some(),
        "args": case.command,
        "env": environment(case, hostname),
        "cwd": setup.cwd.unwrap_or("/"),
        "user": { "uid": setup.user.uid, "gid": setup.user.gid, "additionalGids": gids },
        "capabilities": {
            "bounding": set, "permitted": set, "effective": set, "inheritable": [], "ambient": [],
        },
        "noNewPrivileges": setup.no_new_privileges,
        "rlimits": setup.ulimits.iter().map(|(name, soft, hard)| json!({
            "type": format!("RLIMIT_{}", name.to_uppercase()), "soft": soft, "hard": hard,
        })).collect::<Vec<_>>(),
    });
    if let Some((rows, columns)) = case.tty {
        process["consoleSize"] = json!({ "height": rows, "width": columns });
    }
    process
}

fn environment(case: &Case, hostname: &str) -> Vec<String> {
    let own = |name: &str, value: &str| (name.to_owned(), Some(value.to_owned()));
    let mut all = vec![
        own("PATH", image::PATH),
        own("FROM_IMAGE", "yes"),
        own("HOSTNAME", hostname),
    ];
    if case.tty.is_some() {
        all.push(own("TERM", "xterm"));
    }
    for (name, value) in &case.setup.env {
        all.retain(|(known, _)| known != name);
        all.push((name.clone(), value.clone()));
    }
    all.iter()
        .filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)))
        .collect()
}

fn capabilities(setup: &Setup) -> Vec<String> {
    let is_in = |list: &[&str], name: &str| {
        list.iter()
            .any(|known| known.trim_start_matches("CAP_") == name || *known == "ALL")
    };
    let added = |name: &&&str| is_in(&setup.cap_add, name);
    let mut set: Vec<&str> = CAPABILITIES.to_vec();
    set.extend(OTHERS.iter().filter(added));
    set.retain(|name| !is_in(&setup.cap_drop, name));
    set.iter().map(|name| format!("CAP_{name}")).collect()
}

fn mount(kind: &str, target: &str, options: &[&str]) -> Value {
    json!({ "destination": target, "type": kind, "source": kind, "options": options })
}

fn mounts(setup: &Setup, scratch: &Path) -> Vec<Value> {
    let quiet = ["nosuid", "noexec", "nodev"];
    let mut mounts = vec![
        mount("proc", "/proc", &quiet),
        mount(
            "tmpfs",
            "/dev",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "devpts",
            "/dev/pts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "tmpfs",
            "/dev/shm",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("mqueue", "/dev/mqueue", &quiet),
        mount("sysfs", "/sys", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "cgroup",
            "/sys/fs/cgroup",
            &["nosuid", "noexec", "nodev", "ro"],
        ),
    ];
    for share in &setup.shares {
        let access = if share.read_only { "ro" } else { "rw" };
        let mut bind = mount("bind", share.target, &["rbind", "rprivate", access]);
        bind["source"] = json!(scratch.join(&share.source));
        mounts.push(bind);
    }
    for (target, options) in &setup.tmpfs {
        let mut words = quiet.to_vec();
        words.extend(options.split(',').filter(|word| !word.is_empty()));
        mounts.push(mount("tmpfs", target, &words));
    }
    mounts
}

fn linux(setup: &Setup) -> Value {
    let namespaces = ["pid", "ipc", "uts", "mount", "cgroup", "network"];
    let mut resources = json!({});
    if let Some(limit) = setup.pids {
        resources["pids"] = json!({ "limit": limit });
    }
    if let Some(mebibytes) = setup.memory {
        resources["memory"] = json!({ "limit": mebibytes << 20, "swap": mebibytes << 20 });
    }
    if let Some(count) = setup.cpus {
        resources["cpu"] = json!({ "cpus": format!("0-{}", count - 1) });
    }
    let sysctls: serde_json::Map<String, Value> = setup
        .sysctls
        .iter()
        .map(|(name, value)| ((*name).to_owned(), json!(value)))
        .collect();
    json!({
        "namespaces": namespaces.map(|kind| json!({ "type": kind })),
        "resources": resources,
        "sysctl": sysctls,
        "maskedPaths": MASKED,
        "readonlyPaths": READ_ONLY,
    })
}
