//! Leaving a terminal and coming back.

use hull_tests::hull::Hull;

use super::{inspect, start};

#[test]
fn a_terminal_is_left_and_found_again() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo ready; read x; echo first $x; read y; echo second $y; exit 21";
    let words = ["run", "-it", "--name", "term", &image, "sh", "-c", script];
    let mut running = hull.cmd(words).tty(24, 80).spawn();
    running.await_stdout("ready\r\n");
    running.write("one\r");
    running.await_stdout("first one\r\n");
    // Ctrl-P alone isn't the sequence; both keys are.
    running.write("\u{10}\u{11}");
    assert_eq!(running.wait().code, 0);
    assert_eq!(inspect(&hull, "term")["State"]["Status"], "running");

    let mut again = hull.cmd(["attach", "term"]).tty(24, 80).spawn();
    again.write("two\r");
    again.await_stdout("second two\r\n");
    assert_eq!(again.wait().code, 21);
    assert_eq!(inspect(&hull, "term")["State"]["ExitCode"], 21);
    let log = hull.cmd(["logs", "term"]).output().ok();
    assert!(
        log.contains("first one\r\n") && log.contains("second two\r\n"),
        "{log:?}"
    );
}

#[test]
fn two_callers_hear_the_same() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap 'echo heard; exit 0' USR1; echo ready; sleep 1000 & while :; do wait; done";
    let id = start(
        &hull,
        &["--name", "radio", &image, "sh", "-c", script],
        "ready",
    );
    let callers = [0, 1].map(|_| hull.cmd(["attach", "--no-stdin", "radio"]).spawn());
    // Both are on the line once the monitor counts two.
    while inspect(&hull, "radio")["Hull"]["AttachedClients"] != 2 {}
    hull.cmd(["kill", "-s", "USR1", &id]).output().ok();
    for caller in callers {
        assert_eq!(caller.wait().ok(), "heard\n");
    }
}

#[test]
fn a_terminal_without_stdin_follows_its_size() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap 'test \"$(stty size)\" = \"50 120\" && echo new && exit 6' WINCH
                  echo ready; sleep 1000 & while :; do wait; done";
    let mut running = hull
        .cmd(["run", "--rm", "-t", &image, "sh", "-c", script])
        .tty(24, 80)
        .spawn();
    running.await_stdout("ready");
    running.resize(50, 120);
    running.await_stdout("new");
    assert_eq!(running.wait().code, 6);
}
