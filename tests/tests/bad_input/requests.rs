//! Commands, users, flags and names that can't be met.

use std::fs;

use hull_tests::hull::Hull;

use super::{refused, still_usable};

#[test]
fn commands_and_users_that_are_not_there() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let cases: [(&[&str], &str, i32, &str); 9] = [
        (&[], "nosuch", 127, "nosuch"),
        (&[], "/no/such/program", 127, "no such file or directory"),
        (&[], "/srv/plain", 126, "permission denied"),
        (&[], "/srv", 126, "/srv"),
        (&[], "/srv/lost", 127, "/srv/lost"),
        (&["-u", "nobodyatall"], "true", 125, "nobodyatall"),
        (&["-u", "root:nogroupatall"], "true", 125, "nogroupatall"),
        (&["-w", "/srv/plain"], "true", 125, "/srv/plain"),
        (&["-w", "/etc/motd/x"], "true", 125, "/etc/motd"),
    ];
    for (flags, command, code, word) in cases {
        let words = [&["run", "--rm"], flags, &[&image, command]].concat();
        let ran = hull.cmd(words).output();
        refused(&ran, code, &[word]);
        assert_eq!(ran.text(), "");
    }
    still_usable(&hull);
}

/// What is refused before anything is started, so that none of these costs a boot.
#[test]
fn requests_that_cannot_be_met() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let missing = hull.path().join("missing");
    let bind = format!("type=bind,src={},dst=/x", missing.display());
    let dir_over_file = format!("{}/config.toml/x:/x", hull.path().display());
    let cases: [(&[&str], &[&str]); 22] = [
        (&["-p", "80:80"], &["-p", "makes no networks"]),
        (&["--network", "bridge"], &["makes no networks", "ns:PATH"]),
        (&["--memory", "1m"], &["memory of 1 MiB", "64"]),
        (
            &["--memory", "900g"],
            &["memory of 921600 MiB", "on this host"],
        ),
        (&["--memory", "lots"], &["--memory", "lots"]),
        (&["--cpus", "99"], &["range of CPUs"]),
        (&["--cpus=-1"], &["--cpus"]),
        (&["--mount", &bind], &["does not exist"]),
        (&["-v", &dir_over_file], &["volume source"]),
        (&["-v", "named:/x"], &["named volume"]),
        (&["-v", "/a:relative"], &["absolute"]),
        (&["-v", "/tmp:/"], &["'/'"]),
        (&["-v", "/tmp:/x:rx"], &["unknown volume option 'rx'"]),
        (&["-w", "relative"], &["working directory", "relative"]),
        (&["--cap-add", "FLY"], &["invalid capability", "FLY"]),
        (&["--ulimit", "nosuch=1"], &["nosuch"]),
        (&["--stop-signal", "SIGNOSUCH"], &["SIGNOSUCH"]),
        (&["--hostname", "a b"], &["invalid hostname"]),
        (&["--name", "../evil"], &["invalid container name"]),
        (&["--env-file", "/no/such/file"], &["/no/such/file"]),
        (
            &["--platform", "linux/arm64", "--pull", "never"],
            &["No such image"],
        ),
        (&["--nosuchflag"], &["--nosuchflag"]),
    ];
    for (flags, expected) in cases {
        let ran = hull
            .cmd([&["run", "--rm"], flags, &[&image, "true"]].concat())
            .output();
        refused(&ran, 125, expected);
        assert_eq!(ran.text(), "");
    }
    assert!(!missing.exists(), "nothing was made in place of a source");
    let listed = hull.cmd(["ps", "-aq"]).output();
    assert_eq!(listed.all(), (0, String::new(), String::new()));
    for (words, code) in [
        (&["frobnicate"][..], 125),
        (&["run"], 125),
        (&["stop", "nosuch"], 1),
        (&["exec", "nosuch", "true"], 1),
        (&["logs", "nosuch"], 1),
        (&["wait", "nosuch"], 1),
        (&["rm", "nosuch"], 1),
        (&["inspect", "nosuch"], 1),
        (&["rmi", "nosuch"], 1),
        (&["load", "-i", "/no/such/file"], 1),
    ] {
        refused(&hull.cmd(words).output(), code, &[]);
    }
}

#[test]
fn a_name_in_use_and_a_source_that_is_made() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let fresh = hull.path().join("fresh/source");
    let volume = format!("{}:/x", fresh.display());
    let words = ["run", "-d", "--name", "taken", "-v", &volume, &image];
    let first = hull
        .cmd(
            [
                &words[..],
                &["sh", "-c", "echo mine; cat /dev/ttyx; sleep 999"],
            ]
            .concat(),
        )
        .output()
        .ok();
    assert!(fresh.is_dir(), "a missing source of -v becomes a directory");
    let second = hull
        .cmd(["run", "--rm", "--name", "taken", &image, "true"])
        .output();
    refused(
        &second,
        125,
        &["\"/taken\" is already in use", first.trim()],
    );
    // In a running container, what fails fails alone.
    for (words, code) in [
        (&["exec", "taken", "nosuch"][..], 127),
        (&["exec", "taken", "/srv/plain"], 126),
        (&["exec", "taken", "/srv"], 126),
        (&["exec", "-u", "nobodyatall", "taken", "true"], 126),
        (&["exec", "-w", "/srv/plain", "taken", "true"], 126),
        (&["rmi", "busybox:test", "configured:test"], 1),
        (&["rm", "taken"], 1),
    ] {
        refused(&hull.cmd(words).output(), code, &[]);
    }
    let done = hull.cmd(["exec", "taken", "echo", "unharmed"]).output();
    assert_eq!(done.all(), (0, "unharmed\n".into(), String::new()));
    hull.cmd(["kill", "taken"]).output().ok();
    assert_eq!(hull.cmd(["wait", "taken"]).output().ok(), "137\n");
    refused(
        &hull.cmd(["exec", "taken", "true"]).output(),
        1,
        &["is not running"],
    );
    refused(
        &hull.cmd(["kill", "taken"]).output(),
        1,
        &["is not running"],
    );
    assert_eq!(hull.cmd(["rm", "taken"]).output().ok(), "taken\n");
    assert!(fs::read_dir(&fresh).unwrap().next().is_none());
}
