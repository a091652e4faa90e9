//! Guests that do their worst: panic, hang in the kernel, eat all memory, fork without end.

use std::time::{Duration, Instant};

use hull_tests::hull::Hull;

use super::{refused, still_usable};

/// Makes the guest's kernel panic by its own rules: it may, as its memory is gone. `$1` is what
/// the kernel does after a panic: -1 resets at once, 0 spins for ever.
const PANIC: &str = "mount -t proc proc /mnt && echo $1 > /mnt/sys/kernel/panic && \
    echo 2 > /mnt/sys/vm/panic_on_oom && echo ready && tail /dev/zero";

/// How soon a guest that hangs must be gone when it is to be.
const PROMPT: Duration = Duration::from_secs(30);

fn panicking<'a>(image: &'a str, flags: &[&'a str], after: &'a str) -> Vec<&'a str> {
    let vm = [
        "--memory",
        "64m",
        "--cap-add",
        "SYS_ADMIN",
        "--tmpfs",
        "/mnt",
        image,
    ];
    let command = ["sh", "-c", PANIC, "sh", after];
    [&["run"], flags, &vm, &command].concat()
}

#[test]
fn a_kernel_that_panics() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let ran = hull
        .cmd(panicking(&image, &["--name", "panicked"], "-1"))
        .output();
    refused(&ran, 125, &["the guest's kernel panicked", "Out of memory"]);
    assert_eq!(ran.text(), "ready\n", "what it said before isn't lost");
    // The record says so to whoever asks later.
    assert_eq!(hull.cmd(["wait", "panicked"]).output().ok(), "125\n");
    let inspected = hull.cmd(["inspect", "panicked"]).output().ok();
    assert!(inspected.contains("kernel panicked"), "{inspected}");
    let console = hull.cmd(["logs", "--boot", "panicked"]).output().ok();
    assert!(console.contains("Kernel panic - not syncing"), "{console}");
    assert_eq!(hull.cmd(["logs", "panicked"]).output().ok(), "ready\n");
    hull.cmd(["rm", "panicked"]).output().ok();
    // The same words when nothing is kept.
    let ran = hull.cmd(panicking(&image, &["--rm"], "-1")).output();
    refused(&ran, 125, &["the guest's kernel panicked"]);
    still_usable(&hull);
}

#[test]
fn a_kernel_that_hangs() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    for end in [
        &["kill", "hung"][..],
        &["stop", "-t", "1", "hung"],
        &["rm", "-f", "hung"],
    ] {
        hull.cmd(panicking(&image, &["-d", "--name", "hung"], "0"))
            .output()
            .ok();
        let mut console = hull.cmd(["logs", "-f", "hung"]).spawn();
        console.await_stdout("ready");
        drop(console);
        // It may not have come to its panic yet; it must end in either case.
        let begun = Instant::now();
        let ended = hull.cmd(end).output();
        assert_eq!(ended.all(), (0, "hung\n".into(), String::new()));
        if end[0] != "rm" {
            assert_eq!(hull.cmd(["wait", "hung"]).output().ok(), "137\n");
            hull.cmd(["rm", "hung"]).output().ok();
        }
        assert!(begun.elapsed() < PROMPT, "{end:?}: {:?}", begun.elapsed());
    }
    still_usable(&hull);
}

#[test]
fn commands_that_ignore_every_wish() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap '' TERM INT HUP QUIT; echo ready; while :; do :; done";
    let words = ["run", "-d", "--name", "deaf", &image, "sh", "-c", script];
    hull.cmd(words).output().ok();
    let mut log = hull.cmd(["logs", "-f", "deaf"]).spawn();
    log.await_stdout("ready");
    let begun = Instant::now();
    hull.cmd(["kill", "-s", "TERM", "deaf"]).output().ok();
    assert_eq!(
        hull.cmd(["stop", "-t", "1", "deaf"]).output().ok(),
        "deaf\n"
    );
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    assert_eq!(log.wait().all(), (0, "ready\n".into(), String::new()));
    assert_eq!(hull.cmd(["wait", "deaf"]).output().ok(), "137\n");
    hull.cmd(["rm", "deaf"]).output().ok();
    still_usable(&hull);
}

#[test]
fn memory_that_runs_out() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    // The hog goes; the shell beside it lives on.
    let script = "tail /dev/zero; echo hog: $?; echo alive";
    let words = ["run", "--rm", "--memory", "64m", &image, "sh", "-c", script];
    let ran = hull.cmd(words).output();
    assert_eq!(
        (ran.code, ran.text()),
        (0, "hog: 137\nalive\n".into()),
        "{:?}",
        ran.all()
    );
    let words = [
        "run",
        "--name",
        "hog",
        "--memory",
        "64m",
        &image,
        "tail",
        "/dev/zero",
    ];
    let ran = hull.cmd(words).output();
    assert_eq!(ran.code, 137, "{:?}", ran.all());
    let format = "{{.State.OOMKilled}} {{.State.ExitCode}}";
    let seen = hull.cmd(["inspect", "-f", format, "hog"]).output().ok();
    assert_eq!(seen, "true 137\n");
    hull.cmd(["rm", "hog"]).output().ok();
    still_usable(&hull);
}

#[test]
fn forks_without_end() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo ready; bomb() { bomb | bomb & }; bomb; sleep 999";
    let words = ["run", "-d", "--name", "bomb", "--pids-limit", "32", &image];
    hull.cmd([&words[..], &["sh", "-c", script]].concat())
        .output()
        .ok();
    let mut log = hull.cmd(["logs", "-f", "bomb"]).spawn();
    log.await_stdout("ready");
    // Full of processes, it takes no more, and its neighbours don't notice.
    let neighbour = hull
        .cmd(["run", "--rm", &image, "echo", "unharmed"])
        .output();
    assert_eq!(neighbour.all(), (0, "unharmed\n".into(), String::new()));
    let begun = Instant::now();
    hull.cmd(["kill", "bomb"]).output().ok();
    assert_eq!(hull.cmd(["wait", "bomb"]).output().ok(), "137\n");
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    drop(log);
    hull.cmd(["rm", "bomb"]).output().ok();
    still_usable(&hull);
}
