//! Every way to end a container from outside.

use hull_tests::hull::Hull;

use super::{inspect, start};

#[test]
fn one_that_ignores_the_asking_is_killed_after_its_time() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let stubborn = "trap '' TERM; echo ready; while :; do sleep 1000; done";
    let words = [
        "--stop-timeout",
        "1",
        "--name",
        "deaf",
        &image,
        "sh",
        "-c",
        stubborn,
    ];
    start(&hull, &words, "ready");
    assert_eq!(hull.cmd(["stop", "deaf"]).output().ok(), "deaf\n");
    assert_eq!(hull.cmd(["wait", "deaf"]).output().ok(), "137\n");
    // Stopping what has stopped is no failure.
    assert_eq!(hull.cmd(["stop", "deaf"]).output().ok(), "deaf\n");
}

#[test]
fn one_can_be_asked_by_another_signal() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap 'exit 7' HUP; trap '' TERM; echo ready; while :; do sleep 0.1; done";
    start(
        &hull,
        &["--name", "choosy", &image, "sh", "-c", script],
        "ready",
    );
    let words = ["stop", "-s", "HUP", "-t", "999", "choosy"];
    assert_eq!(hull.cmd(words).output().ok(), "choosy\n");
    assert_eq!(inspect(&hull, "choosy")["State"]["ExitCode"], 7);
}

#[test]
fn one_that_spins_is_killed_too() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    start(
        &hull,
        &[
            "--name",
            "mill",
            &image,
            "sh",
            "-c",
            "echo ready; while :; do :; done",
        ],
        "ready",
    );
    assert_eq!(
        hull.cmd(["stop", "-t", "0", "mill"]).output().ok(),
        "mill\n"
    );
    assert_eq!(inspect(&hull, "mill")["State"]["ExitCode"], 137);
}

#[test]
fn signals_are_sent_by_name_and_number() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap 'echo one' USR1; trap 'echo two' USR2; echo ready
                  sleep 1000 & while :; do wait; done";
    let id = start(
        &hull,
        &["--name", "ears", &image, "sh", "-c", script],
        "ready\n",
    );
    let mut log = hull.cmd(["logs", "-f", &id]).spawn();
    hull.cmd(["kill", "-s", "USR1", "ears"]).output().ok();
    log.await_stdout("one\n");
    hull.cmd(["kill", "--signal", "12", "ears"]).output().ok();
    log.await_stdout("two\n");
    assert_eq!(inspect(&hull, "ears")["State"]["Status"], "running");
    assert_eq!(hull.cmd(["kill", "ears"]).output().ok(), "ears\n");
    assert_eq!(hull.cmd(["wait", "ears"]).output().ok(), "137\n");
    assert_eq!(log.wait().ok(), "ready\none\ntwo\n");
}

#[test]
fn an_image_says_how_it_is_stopped() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.configured_image();
    let script = "trap 'exit 12' USR1; echo ready; sleep 1000 & wait";
    let words = [
        "--name",
        "polite",
        "--entrypoint",
        "sh",
        &image,
        "-c",
        script,
    ];
    start(&hull, &words, "ready");
    assert_eq!(inspect(&hull, "polite")["Config"]["StopSignal"], "SIGUSR1");
    hull.cmd(["stop", "polite"]).output().ok();
    assert_eq!(hull.cmd(["wait", "polite"]).output().ok(), "12\n");
}

#[test]
fn force_removes_what_runs() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    // Half a processor makes a cgroup on the host, which must go too.
    let words = [
        "--cpus",
        "0.5",
        "--name",
        "busy",
        &image,
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ];
    start(&hull, &words, "ready");
    assert_eq!(hull.cmd(["rm", "-f", "busy"]).output().ok(), "busy\n");
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}
