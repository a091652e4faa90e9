//! Registration in a host that is a directory.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

/// A host below a directory of its own.
struct Bench {
    directory: tempfile::TempDir,
    host: Host,
}

const CONTAINERD: &str = "/etc/containerd/config.toml";
const DOCKER: &str = "/etc/docker/daemon.json";
const PODMAN: &str = "/etc/containers/containers.conf.d/hull.conf";

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let host = Host {
            root: directory.path().to_path_buf(),
            programs: "/usr/local/bin".into(),
            has_shim: true,
        };
        Self { directory, host }
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.host.at(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn read(&self, path: &str) -> String {
        fs::read_to_string(self.host.at(path)).unwrap()
    }

    fn install(&self) -> String {
        let (report, failed) = carry_out(&self.host, Wish::Known, false);
        assert!(!failed, "{report}");
        report
    }

    fn uninstall(&self) {
        let (report, failed) = carry_out(&self.host, Wish::Forgotten, false);
        assert!(!failed, "{report}");
    }

    /// Everything below the root: paths and contents.
    fn all(&self) -> Vec<(PathBuf, String)> {
        let mut found = Vec::new();
        let mut left = vec![self.directory.path().to_path_buf()];
        while let Some(directory) = left.pop() {
            for entry in fs::read_dir(directory).unwrap().flatten() {
                match entry.path() {
                    path if path.is_dir() => left.push(path),
                    path => found.push((path.clone(), fs::read_to_string(path).unwrap())),
                }
            }
        }
        found.sort();
        found
    }
}

const V2: &str = r#"# by the admin
version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    sandbox_image = "pause:3" # kept
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"#;

const DAEMON: &str =
    "{\n  \"log-level\": \"warn\",\n  \"dns\": [ \"1.1.1.1\" ],\n  \"bip\":\"10.0.0.1/24\"\n}\n";

#[test]
fn every_engine_is_told_and_nothing_else_changes() {
    let bench = Bench::new();
    bench.write(CONTAINERD, V2);
    bench.write(DOCKER, DAEMON);
    bench.write("/etc/containers/policy.json", "{}");
    let report = bench.install();
    for words in [
        "systemctl restart containerd",
        "systemctl reload docker",
        "nothing to restart",
    ] {
        assert!(report.contains(words), "{report}");
    }
    let containerd = bench.read(CONTAINERD);
    assert!(containerd.starts_with(V2), "{containerd}");
    assert_eq!(
        containerd.strip_prefix(V2).unwrap().trim(),
        "[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.hull]\n\
         runtime_type = \"io.containerd.hull.v2\"\nprivileged_without_host_devices = true"
    );
    let docker = bench.read(DOCKER);
    assert!(
        docker.starts_with(DAEMON.trim_end_matches("\n}\n")),
        "{docker}"
    );
    let docker: Value = serde_json::from_str(&docker).unwrap();
    let shim = "/usr/local/bin/containerd-shim-hull-v2";
    assert_eq!(docker["runtimes"]["hull"]["runtimeType"], shim);
    assert_eq!(docker["bip"], "10.0.0.1/24");
    let podman: toml_edit::DocumentMut = bench.read(PODMAN).parse().unwrap();
    let program = podman["engine"]["runtimes"]["hull"][0].as_str();
    assert_eq!(program, Some("/usr/local/bin/hull-oci"));

    let once = bench.all();
    let again = bench.install();
    assert_eq!(again.matches("as it should be").count(), 3, "{again}");
    assert_eq!(bench.all(), once);

    bench.uninstall();
    assert_eq!(bench.read(CONTAINERD).trim_end(), V2.trim_end());
    assert_eq!(bench.read(DOCKER), DAEMON);
    assert!(!bench.host.at(PODMAN).exists());
}

#[test]
fn containerd_2_has_another_table() {
    let bench = Bench::new();
    bench.write(CONTAINERD, "version = 3\n");
    bench.install();
    let table = "[plugins.\"io.containerd.cri.v1.runtime\".containerd.runtimes.hull]";
    // Without it, there would be no other any more.
    assert!(
        bench
            .read(CONTAINERD)
            .contains("runtimes.runc]\nruntime_type = \"io.containerd.runc.v2\"")
    );
    assert!(
        bench.read(CONTAINERD).contains(table),
        "{}",
        bench.read(CONTAINERD)
    );
    bench.uninstall();
    assert_eq!(bench.read(CONTAINERD), "version = 3\n");
}

#[test]
fn engines_without_files_get_new_ones_that_go_again() {
    let bench = Bench::new();
    for program in ["containerd", "dockerd", "podman"] {
        bench.write(&format!("/usr/bin/{program}"), "");
    }
    let before = bench.all();
    bench.install();
    assert!(bench.read(CONTAINERD).contains("version = 2"));
    let mode = fs::metadata(bench.host.at(DOCKER))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o644);
    bench.uninstall();
    // Docker's can't say whose it is, and stays, empty.
    fs::remove_file(bench.host.at(DOCKER)).unwrap();
    assert_eq!(bench.all(), before);
}

#[test]
fn without_engines_and_when_dry_nothing_is_written() {
    let bench = Bench::new();
    let report = bench.install();
    assert_eq!(report.matches("not found").count(), 3, "{report}");
    assert!(bench.all().is_empty());
    bench.write(CONTAINERD, V2);
    let before = bench.all();
    let (report, _) = carry_out(&bench.host, Wish::Known, true);
    assert!(report.contains("would write"), "{report}");
    assert_eq!(bench.all(), before);
}

#[test]
fn what_cannot_be_understood_is_left_alone() {
    let odd = "[plugins]\n\"io.containerd.grpc.v1.cri\" = { a = 1 }\n";
    for (path, text, words) in [
        (CONTAINERD, "version = [", "is no TOML"),
        (CONTAINERD, "disabled_plugins = [\"cri\"]\n", "of version 1"),
        (
            CONTAINERD,
            &format!("version = 2\n{odd}"),
            "no table of its own",
        ),
        (
            CONTAINERD,
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.hull]\nruntime_type = \"x\"\n",
            "is not of type",
        ),
        (DOCKER, "{,}", "is no JSON"),
        (DOCKER, "{} // a comment", "is no JSON"),
        (DOCKER, "[]", "holds no object"),
        (DOCKER, r#"{"runtimes": 5}"#, "is no object"),
        (
            DOCKER,
            r#"{"runtimes": {"hull": {"path": "/bin/sh"}}}"#,
            "another program",
        ),
        (
            PODMAN,
            "[engine.runtimes]\nhull = [\"/mine\"]\n",
            "didn't make it",
        ),
    ] {
        let bench = Bench::new();
        bench.write(path, text);
        let (report, failed) = carry_out(&bench.host, Wish::Known, false);
        assert!(failed && report.contains(words), "{report}");
        assert_eq!(bench.read(path), text);
    }
}

#[test]
fn without_a_shim_docker_has_the_command_line_and_containerd_nothing() {
    let mut bench = Bench::new();
    (bench.host.has_shim, bench.host.programs) = (false, "/opt/hull/bin".into());
    bench.write(CONTAINERD, V2);
    bench.write(DOCKER, "");
    let (report, failed) = carry_out(&bench.host, Wish::Known, false);
    assert!(
        failed && report.contains("there is no \"/opt/hull/bin/containerd-shim"),
        "{report}"
    );
    assert_eq!(bench.read(CONTAINERD), V2);
    let docker: Value = serde_json::from_str(&bench.read(DOCKER)).unwrap();
    assert_eq!(docker["runtimes"]["hull"]["path"], "/opt/hull/bin/hull-oci");
    bench.host.has_shim = true;
    bench.install();
    assert!(
        bench
            .read(CONTAINERD)
            .contains("runtime_path = \"/opt/hull/bin/")
    );
}

#[test]
fn a_file_keeps_its_mode_and_its_link() {
    let bench = Bench::new();
    bench.write("/srv/daemon.json", DAEMON);
    let real = bench.host.at("/srv/daemon.json");
    fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir_all(bench.host.at("/etc/docker")).unwrap();
    std::os::unix::fs::symlink(&real, bench.host.at(DOCKER)).unwrap();
    bench.install();
    assert!(
        fs::symlink_metadata(bench.host.at(DOCKER))
            .unwrap()
            .is_symlink()
    );
    let mode = fs::metadata(&real).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert!(fs::read_to_string(&real).unwrap().contains("hull"));
}

use serde_json::Value;
