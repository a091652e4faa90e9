//! The monitor, killed.

use std::time::{Duration, Instant};

use hull_tests::hull::Hull;

use super::moments::{PROMPT, kill_monitors, later, run_takes};

/// Says "ready", then "asked" whenever it is asked to stop, and lives on.
const STUBBORN: &str = "trap 'echo asked' TERM; echo ready; while :; do sleep 1; done";

/// Asserts that a container whose monitor was killed is known to be dead, and goes for good.
#[track_caller]
fn dead_and_removable(hull: &Hull, name: &str) {
    let begun = Instant::now();
    let filter = format!("name={name}");
    let state = hull
        .cmd(["ps", "-a", "--filter", &filter, "--format", "{{.State}}"])
        .output()
        .ok();
    let waited = hull.cmd(["wait", name]).output();
    match state.as_str() {
        "exited\n" => assert!(["137\n", "125\n"].contains(&&*waited.ok()), "{waited:?}"),
        // Its monitor was killed before it had done anything.
        "created\n" => assert_eq!(waited.code, 1, "{:?}", waited.all()),
        other => panic!("{name} is {other:?}"),
    }
    hull.cmd(["logs", name]).output().ok();
    hull.cmd(["logs", "--boot", name]).output().ok();
    hull.cmd(["inspect", name]).output().ok();
    hull.cmd(["stop", name]).output().ok();
    let executed = hull.cmd(["exec", name, "true"]).output();
    assert!(executed.errors().contains("is not running"), "{executed:?}");
    assert_eq!(hull.cmd(["rm", name]).output().ok(), format!("{name}\n"));
    let again = hull.cmd(["rm", name]).output();
    assert_eq!(again.code, 1, "{:?}", again.all());
    assert!(again.errors().contains("No such container"), "{again:?}");
    hull.cmd(["rm", "-f", name]).output().ok();
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

#[test]
fn while_it_starts() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let whole = run_takes(&hull);
    const MOMENTS: u32 = 6;
    for moment in 1..=MOMENTS {
        let name = format!("at-{moment}");
        let words = [
            "run", "-d", "--cpus", "0.9", "--name", &name, &image, "sleep", "999",
        ];
        let starting = hull.cmd(words).spawn();
        later(starting.pid(), whole * moment / MOMENTS);
        let killed = kill_monitors(&hull);
        let started = starting.wait();
        match started.code {
            0 if killed == 0 => assert_eq!(kill_monitors(&hull), 1, "it runs"),
            0 => {}
            _ => {
                assert_eq!((started.code, killed), (125, 1), "{:?}", started.all());
                assert!(started.errors().contains("monitor died"), "{started:?}");
            }
        }
        dead_and_removable(&hull, &name);
    }
}

#[test]
fn while_everybody_listens() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = [
        "run", "-d", "--cpus", "0.9", "--name", "k", &image, "sh", "-c", STUBBORN,
    ];
    hull.cmd(words).output().ok();
    let mut log = hull.cmd(["logs", "-f", "k"]).spawn();
    log.await_stdout("ready");
    let waiting = hull.cmd(["wait", "k"]).spawn();
    let mut attached = hull.cmd(["attach", "--no-stdin", "k"]).spawn();
    let mut executing = hull.cmd(["exec", "-i", "k", "cat"]).stdin_open().spawn();
    executing.write("echoed\n");
    executing.await_stdout("echoed");
    let stopping = hull.cmd(["stop", "-t", "999", "k"]).spawn();
    log.await_stdout("asked");
    attached.await_stdout("asked");
    let begun = Instant::now();
    assert_eq!(kill_monitors(&hull), 1);
    let followed = log.wait();
    assert_eq!(followed.all(), (0, "ready\nasked\n".into(), String::new()));
    assert_eq!(waiting.wait().all(), (0, "137\n".into(), String::new()));
    assert_eq!(stopping.wait().all(), (0, "k\n".into(), String::new()));
    let executed = executing.wait();
    assert_eq!((executed.code, executed.text()), (125, "echoed\n".into()));
    assert!(executed.errors().contains("was lost"), "{executed:?}");
    let left = attached.wait();
    assert!(left.code != 0, "{left:?}");
    assert!(begun.elapsed() < PROMPT, "{:?}", begun.elapsed());
    let logs = hull.cmd(["logs", "k"]).output();
    assert_eq!(logs.all(), (0, "ready\nasked\n".into(), String::new()));
    dead_and_removable(&hull, "k");
}

#[test]
fn while_output_flows() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let mut running = hull.cmd(["run", "--name", "k", &image, "yes"]).spawn();
    running.await_stdout(&"y\n".repeat(50_000));
    assert_eq!(kill_monitors(&hull), 1);
    let ran = running.wait();
    assert_eq!(ran.code, 137, "{}", ran.errors());
    assert!(ran.errors().contains("monitor died"), "{}", ran.errors());
    // A last line that was cut off in the file is no line.
    let last = hull.cmd(["logs", "-n", "2", "k"]).output();
    assert_eq!((last.code, last.errors()), (0, String::new()));
    assert!(last.text().starts_with('y'), "{}", last.text());
    dead_and_removable(&hull, "k");
}

#[test]
fn of_a_container_that_was_to_leave_nothing() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let whole = run_takes(&hull);
    let mut running = hull
        .cmd(["run", "--rm", "--cpus", "0.9", &image, "sh", "-c", STUBBORN])
        .spawn();
    running.await_stdout("ready");
    assert_eq!(kill_monitors(&hull), 1);
    let ran = running.wait();
    assert_eq!(ran.code, 137, "{:?}", ran.all());
    assert!(ran.errors().contains("monitor died"), "{}", ran.errors());
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
    // In the background, so that nobody sees it go; the next command clears it.
    hull.cmd(["run", "-d", "--rm", &image, "sleep", "999"])
        .output()
        .ok();
    assert_eq!(kill_monitors(&hull), 1);
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
    // On its way up.
    let starting = hull.cmd(["run", "--rm", &image, "sleep", "999"]).spawn();
    later(starting.pid(), whole / 2);
    let mut killed = kill_monitors(&hull);
    if killed == 0 {
        later(starting.pid(), whole / 2);
        killed = kill_monitors(&hull);
    }
    let started = starting.wait();
    assert_eq!(killed, 1, "{:?}", started.all());
    assert!([125, 137].contains(&started.code), "{:?}", started.all());
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    assert_eq!(hull.leftovers(), Vec::<String>::new());
}

/// Between the command's end and the last word of it.
#[test]
fn while_it_ends() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    for moment in 0..3 {
        let name = format!("end-{moment}");
        let words = ["run", "--name", &name, &image, "sh", "-c", "echo bye"];
        let mut running = hull.cmd(words).spawn();
        running.await_stdout("bye");
        later(running.pid(), Duration::from_millis(20) * moment);
        kill_monitors(&hull);
        let ran = running.wait();
        // Either its own end was recorded, or its monitor's.
        assert!([0, 137].contains(&ran.code), "{:?}", ran.all());
        let waited = hull.cmd(["wait", &name]).output().ok();
        assert!(["0\n", "137\n"].contains(&&*waited), "{waited}");
        assert_eq!(hull.cmd(["logs", &name]).output().ok(), "bye\n");
        assert_eq!(hull.cmd(["rm", &name]).output().ok(), format!("{name}\n"));
        assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
    }
}
