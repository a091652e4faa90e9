//! The command as a real process, on a state of its own. No test here needs a virtual machine.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use sha2::{Digest, Sha256};
use tempfile::TempDir;

struct Host {
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        Self {
            directory: TempDir::new().unwrap(),
        }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_hull"));
        let config = self.path().join("config.toml");
        File::create(&config).unwrap();
        command
            .args(words)
            .env("HULL_CONFIG", config)
            .env("HULL_STATE_DIR", self.path().join("state"))
            .env("HULL_RUN_DIR", self.path().join("run"))
            .stdin(Stdio::null());
        command
    }

    fn hull(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    /// The exit code, stdout and stderr.
    fn said(&self, words: &[&str]) -> (i32, String, String) {
        said(self.hull(words))
    }
}

fn said(output: Output) -> (i32, String, String) {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    let code = output.status.code().unwrap();
    (code, text(output.stdout), text(output.stderr))
}

/// Asserts that it fails with this code, says nothing on stdout, and this on stderr.
#[track_caller]
fn refused(host: &Host, words: &[&str], code: i32, reason: &str) {
    let (seen, out, err) = host.said(words);
    assert_eq!(seen, code, "{words:?}: {err}");
    assert_eq!(out, "", "{words:?}");
    assert!(
        err.starts_with("hull: ") && err.contains(reason),
        "{words:?}: {err}"
    );
}

#[test]
fn an_empty_state_lists_nothing() {
    let host = Host::new();
    let (code, out, err) = host.said(&["ps", "-a"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        out.trim(),
        "CONTAINER ID   IMAGE   COMMAND   CREATED   STATUS   NAMES"
    );
    let (code, out, _) = host.said(&["images"]);
    assert_eq!(
        (code, out.trim()),
        (0, "REPOSITORY   TAG   IMAGE ID   CREATED   SIZE")
    );
    for words in [
        &["ps", "-q"][..],
        &["images", "-q"],
        &["ps", "--format", "json"],
    ] {
        assert_eq!(
            host.said(words),
            (0, String::new(), String::new()),
            "{words:?}"
        );
    }
    let (code, out, err) = host.said(&["system", "prune", "-f"]);
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(out, "Total reclaimed space: 0B\n");
}

#[test]
fn unknown_containers_and_images_are_said_with_code_1() {
    let host = Host::new();
    for command in ["stop", "kill", "rm", "wait", "logs", "attach"] {
        refused(&host, &[command, "nope"], 1, "No such container: nope");
    }
    refused(&host, &["exec", "nope", "ls"], 1, "No such container: nope");
    refused(&host, &["rmi", "nope"], 1, "nope");
    let (code, out, err) = host.said(&["inspect", "nope"]);
    assert_eq!((code, out.as_str()), (1, "[]\n"));
    assert!(err.contains("No such container: nope"), "{err}");
    // Force asks that it be gone, and it is.
    let (code, _, err) = host.said(&["rm", "-f", "nope"]);
    assert_eq!(code, 0);
    assert!(err.contains("No such container: nope"), "{err}");
}

#[test]
fn each_of_several_is_tried() {
    let (code, _, err) = Host::new().said(&["rm", "one", "two"]);
    assert_eq!(code, 1);
    assert!(err.contains("one") && err.contains("two"), "{err}");
}

#[test]
fn what_is_typed_wrongly_is_hulls_own_failure() {
    let host = Host::new();
    for (words, reason) in [
        (&["run"][..], "required arguments"),
        (&["run", "--nope", "x"], "unexpected argument '--nope'"),
        (&["run", "-m", "x", "i"], "invalid suffix"),
        (&["dance"], "unrecognized subcommand"),
        (&["ps", "--filter", "x"], "NAME=VALUE"),
        (&["ps", "--filter", "color=red"], "invalid filter 'color'"),
        (&["run", "-p", "80:80", "i"], "makes no networks"),
    ] {
        refused(&host, words, 125, reason);
    }
    let (code, _, err) = host.said(&[]);
    assert_eq!(code, 125);
    assert!(err.contains("Usage: hull"), "{err}");
}

#[test]
fn an_image_that_may_not_be_pulled_is_missing() {
    let host = Host::new();
    refused(
        &host,
        &["run", "--rm", "--pull", "never", "nope:local"],
        125,
        "No such image: nope:local",
    );
    refused(
        &host,
        &["run", "--rm", "Bad Name"],
        125,
        "invalid reference format",
    );
    refused(&host, &["run", "oci:/nonexistent"], 125, "/nonexistent");
    // Nothing of these runs is left.
    assert_eq!(host.said(&["ps", "-aq"]).1, "");
}

#[test]
fn a_container_id_file_is_neither_overwritten_nor_left_empty() {
    let host = Host::new();
    let file = host.path().join("cid");
    let name = file.to_str().unwrap();
    let words = ["run", "--cidfile", name, "--pull", "never", "nope:local"];
    refused(&host, &words, 125, "No such image");
    assert!(!file.exists());
    fs::write(&file, "other").unwrap();
    refused(&host, &words, 125, "container ID file found");
    assert_eq!(fs::read_to_string(&file).unwrap(), "other");
}

#[test]
fn a_terminal_is_needed_for_it() {
    refused(&Host::new(), &["run", "-it", "x"], 125, "not a TTY");
}

#[test]
fn bad_environment_files_are_named() {
    let host = Host::new();
    let run = |file: &str| ["run", "--env-file", file, "thing:1"].map(str::to_owned);
    let missing = run("/nonexistent/env");
    let words: Vec<&str> = missing.iter().map(String::as_str).collect();
    refused(&host, &words, 125, "/nonexistent/env");
    let file = host.path().join("env");
    fs::write(&file, "A=1\nB C=2\n").unwrap();
    let bad = run(file.to_str().unwrap());
    let words: Vec<&str> = bad.iter().map(String::as_str).collect();
    refused(
        &host,
        &words,
        125,
        "line 2: variable 'B C' contains whitespaces",
    );
}

#[test]
fn an_archive_is_loaded_listed_and_removed() {
    let host = Host::new();
    assert_eq!(load(&host, "thing:1"), "Loaded image: thing:1\n");
    let (code, out, _) = host.said(&["images", "--format", "{{.Repository}}:{{.Tag}}"]);
    assert_eq!((code, out.as_str()), (0, "thing:1\n"));
    assert_eq!(host.said(&["images", "other"]).1.lines().count(), 1);
    assert_eq!(host.said(&["images", "thing"]).1.lines().count(), 2);
    let (_, id, _) = host.said(&["images", "-q"]);
    let (code, out, _) = host.said(&["rmi", id.trim()]);
    assert_eq!(code, 0);
    assert!(
        out.contains("Untagged: thing:1") && out.contains("Deleted: sha256:"),
        "{out}"
    );
    assert_eq!(host.said(&["images", "-aq"]).1, "");
}

#[test]
fn a_stream_that_is_no_archive_is_refused() {
    let host = Host::new();
    let mut child = host
        .command(&["load", "-q"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(&[0x5a; 4096])
        .unwrap();
    let (code, _, err) = said(child.wait_with_output().unwrap());
    assert_eq!(code, 1);
    assert!(err.contains("standard input"), "{err}");
    assert_eq!(host.said(&["images", "-aq"]).1, "");
}

#[test]
fn the_doctor_says_the_same_in_both_forms() {
    let host = Host::new();
    let (code, text, _) = host.said(&["doctor"]);
    let (json_code, json, _) = host.said(&["doctor", "--json"]);
    assert_eq!(code, json_code);
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(report["ready"].as_bool().unwrap(), code == 0);
    for finding in report["findings"].as_array().unwrap() {
        let subject = finding["subject"].as_str().unwrap();
        assert!(text.contains(subject), "{subject} is missing in {text}");
        if finding["health"] != "good" {
            assert!(finding["remedy"].is_string(), "{subject} has no remedy");
        }
    }
}

#[test]
fn output_that_nobody_reads_ends_it_quietly() {
    let host = Host::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = host.command(&["ps"]).stdout(writer).output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn help_is_no_failure() {
    let host = Host::new();
    for words in [
        &["--help"][..],
        &["run", "--help"],
        &["--version"],
        &["version"],
    ] {
        let (code, out, err) = host.said(words);
        assert_eq!((code, err.as_str()), (0, ""), "{words:?}");
        assert!(!out.is_empty(), "{words:?}");
    }
}

/// Loads an image of one small layer by way of `docker save`'s format; returns what was said.
fn load(host: &Host, name: &str) -> String {
    let path = host.path().join("image.tar");
    fs::write(&path, docker_archive(name)).unwrap();
    let (code, out, err) = host.said(&["load", "-q", "-i", path.to_str().unwrap()]);
    assert_eq!((code, err.as_str()), (0, ""));
    out
}

fn docker_archive(name: &str) -> Vec<u8> {
    let layer = tarball(&[("etc/motd", b"hello\n")]);
    let config = serde_json::json!({
        "architecture": "amd64",
        "os": "linux",
        "created": "2026-01-01T00:00:00Z",
        "config": { "Cmd": ["/bin/true"] },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{}", hex(&layer))] },
    });
    let config = config.to_string().into_bytes();
    let config_name = format!("{}.json", hex(&config));
    let manifest = serde_json::json!([{
        "Config": config_name, "RepoTags": [name], "Layers": ["layer/layer.tar"],
    }]);
    tarball(&[
        (&config_name, &config),
        ("layer/layer.tar", &layer),
        ("manifest.json", manifest.to_string().as_bytes()),
    ])
}

fn tarball(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, contents) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(contents.len() as u64);
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        builder.append_data(&mut header, path, *contents).unwrap();
    }
    builder.into_inner().unwrap()
}

fn hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[test]
fn a_detached_commands_stream_is_held_until_it_ends() {
    let host = Host::new();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut holder = host
        .command(&["hold-stream"])
        .stdin(Stdio::from(std::os::fd::OwnedFd::from(far)))
        .spawn()
        .unwrap();
    (&near).write_all(&[7; 100_000]).unwrap();
    assert!(holder.try_wait().unwrap().is_none());
    near.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(holder.wait().unwrap().success());
}
