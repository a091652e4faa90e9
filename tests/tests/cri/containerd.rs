//! The containerds that nodes have: whose programs, what is configured, what they have said.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_tests::host::releases;
use hull_tests::hull::Hull;
use hull_tests::image::{Image, PATH};
use hull_tests::process::{DEADLINE, Process, Running};
use serde_json::json;

/// The image of containers, as containerd names it.
pub(crate) const IMAGE: &str = "docker.io/library/work:test";
/// The image of sandboxes' own containers.
const PAUSE: &str = "docker.io/library/pause:test";

/// How long a containerd may live whose test doesn't end it.
const LIFE: Duration = Duration::from_secs(1500);

/// Whose containerd a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Containerd {
    /// This machine's: 1.6 on Debian 12.
    Installed,
    /// Debian 13's: 1.7.
    Trixie,
    /// Debian 14's: 2.x, which knows sandboxes that are no container's.
    Forky,
}

impl Containerd {
    /// Where its programs are, if they aren't where programs are.
    pub(crate) fn programs(self) -> Option<PathBuf> {
        let release = match self {
            Self::Installed => return None,
            Self::Trixie => "trixie",
            Self::Forky => "forky",
        };
        let root = releases::find(release, "containerd");
        let root = root.unwrap_or_else(|| {
            panic!("there is no containerd of {release} (use `cargo xtask test --suite cri`)")
        });
        Some(root.join("usr/bin"))
    }
}

/// A runtime's name for pods whose sandbox is no container (2.x's `sandboxer = "shim"`).
pub(crate) const BOXED: &str = "boxed";

/// What containerd and its shims have said.
pub(crate) fn log(directory: &Path) -> String {
    let log = fs::read(directory.join("containerd.log")).unwrap_or_default();
    let log = String::from_utf8_lossy(&log).into_owned();
    let lines: Vec<&str> = log
        .lines()
        .filter(|line| !line.contains("level=info"))
        .collect();
    lines.join("\n")
}

/// Starts the first containerd of a `PATH`.
pub(crate) fn start(hull: &Hull, path: &str) -> Running {
    let at = |name: &str| hull.path().join(name).display().to_string();
    let script = "exec containerd -c \"$0/containerd.toml\" >> \"$0/containerd.log\" 2>&1";
    let containerd = Process::new(["sh", "-c", script, &hull.path().display().to_string()])
        .env("PATH", path)
        .env("HULL_CONFIG", at("config.toml"))
        .env("HULL_STATE_DIR", at("state"))
        .env("HULL_RUN_DIR", at("run"))
        .deadline(LIFE)
        .spawn();
    let until = Instant::now() + DEADLINE;
    while ctr(hull, path, &["version"]).output().code != 0 {
        let said = log(hull.path());
        assert!(Instant::now() < until, "no containerd: {said}");
    }
    containerd
}

/// `ctr` of that `PATH`.
pub(crate) fn ctr(hull: &Hull, path: &str, words: &[&str]) -> Process {
    let address = hull.path().join("c.sock").display().to_string();
    let begin = ["ctr", "--address", &address, "--namespace", "k8s.io"];
    Process::new([&begin[..], words].concat()).env("PATH", path)
}

/// Imports what containers and sandboxes are made of.
pub(crate) fn import_images(hull: &Hull, path: &str) {
    let archive = hull.path().join("images.tar");
    let entry = |words: &[&str]| json!({"Env": [format!("PATH={PATH}")], "Entrypoint": words});
    let images = [
        ("work:test", entry(&[])),
        ("pause:test", entry(&["sleep", "99999"])),
    ];
    Image::new().save_as(&archive, images);
    let archive = archive.display().to_string();
    ctr(hull, path, &["image", "import", &archive])
        .output()
        .ok();
}

/// Writes the configuration of a containerd, and of its pods' network.
pub(crate) fn write_configuration(hull: &Hull, whose: Containerd) {
    let at = |name: &str| hull.path().join(name).display().to_string();
    let cri = match whose {
        Containerd::Forky => newer_cri(&at("cni")),
        _ => cri(&at("cni")),
    };
    fs::write(hull.path().join("containerd.toml"), config(&at, &cri)).unwrap();
    fs::write(hull.path().join("config.toml"), "").unwrap();
    fs::create_dir_all(hull.path().join("cni")).unwrap();
    let network = json!({"cniVersion": "0.4.0", "name": "pods", "plugins": [{
        "type": "bridge", "bridge": "pods0", "isGateway": true,
        "ipam": {"type": "host-local", "dataDir": at("ipam"),
            "ranges": [[{"subnet": "10.99.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }]});
    fs::write(hull.path().join("cni/pods.conflist"), network.to_string()).unwrap();
}

fn config(at: &impl Fn(&str) -> String, cri: &str) -> String {
    format!(
        r#"root = "{root}"
state = "{state}"
disabled_plugins = ["io.containerd.internal.v1.opt"]
{cri}
[grpc]
address = "{grpc}"
[ttrpc]
address = "{ttrpc}"
[timeouts]
"io.containerd.timeout.shim.cleanup" = "60s"
"io.containerd.timeout.shim.load" = "60s"
"io.containerd.timeout.shim.shutdown" = "30s"
"io.containerd.timeout.task.state" = "30s"
"#,
        root = at("root"),
        state = at("tasks"),
        grpc = at("c.sock"),
        ttrpc = at("c.ttrpc"),
    )
}

/// The first lines of containerd 1.x's configuration, and the part of CRI.
fn cri(cni: &str) -> String {
    format!(
        r#"version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
stream_server_address = "127.0.0.1"
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "{cni}"
[plugins."io.containerd.grpc.v1.cri".containerd]
default_runtime_name = "hull"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.hull]
runtime_type = "io.containerd.hull.v2"
"#
    )
}

/// The same for containerd 2.x.
fn newer_cri(cni: &str) -> String {
    format!(
        r#"version = 3
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
[plugins."io.containerd.nri.v1.nri"]
disable = true
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{PAUSE}"
[plugins."io.containerd.cri.v1.runtime"]
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.cri.v1.runtime".cni]
bin_dirs = ["/usr/lib/cni"]
conf_dir = "{cni}"
[plugins."io.containerd.cri.v1.runtime".containerd]
default_runtime_name = "hull"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.hull]
runtime_type = "io.containerd.hull.v2"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{BOXED}]
runtime_type = "io.containerd.hull.v2"
sandboxer = "shim"
"#
    )
}
