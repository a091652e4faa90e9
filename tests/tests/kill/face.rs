//! The command in the foreground, killed or asked to end.

use hull_tests::hull::Hull;
use rustix::process::Signal;

use super::moments::{later, run_takes};

/// Says "ready", and "done" when somebody writes into `/go`.
const UNTIL_TOLD: &str = "mkfifo /go; echo ready; read word < /go; echo done";

#[test]
fn killed_and_the_container_goes_on() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = ["run", "--name", "on", &image, "sh", "-c", UNTIL_TOLD];
    let mut face = hull.cmd(words).spawn();
    face.await_stdout("ready");
    face.signal(Signal::KILL);
    assert_eq!(face.wait().code, 137);
    let running = hull
        .cmd(["ps", "--format", "{{.Names}} {{.State}}"])
        .output();
    assert_eq!(running.ok(), "on running\n");
    let mut log = hull.cmd(["logs", "-f", "on"]).spawn();
    let waiting = hull.cmd(["wait", "on"]).spawn();
    let executed = hull.cmd(["exec", "on", "sh", "-c", "echo > /go"]).output();
    // The end that it brings about may be its own, too.
    assert!([0, 137].contains(&executed.code), "{:?}", executed.all());
    log.await_stdout("done");
    assert_eq!(waiting.wait().all(), (0, "0\n".into(), String::new()));
    assert_eq!(log.wait().text(), "ready\ndone\n");
    assert_eq!(hull.cmd(["rm", "on"]).output().ok(), "on\n");
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}

#[test]
fn killed_and_the_container_still_leaves_nothing() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = [
        "run", "--rm", "--name", "on", &image, "sh", "-c", UNTIL_TOLD,
    ];
    let mut face = hull.cmd(words).spawn();
    face.await_stdout("ready");
    face.signal(Signal::KILL);
    assert_eq!(face.wait().code, 137);
    let waiting = hull.cmd(["wait", "on"]).spawn();
    let mut log = hull.cmd(["logs", "-f", "on"]).spawn();
    log.await_stdout("ready");
    let executed = hull.cmd(["exec", "on", "sh", "-c", "echo > /go"]).output();
    assert!([0, 137].contains(&executed.code), "{:?}", executed.all());
    let _ended = (waiting.wait(), log.wait());
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}

#[test]
fn killed_on_the_way_up() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let whole = run_takes(&hull);
    const MOMENTS: u32 = 6;
    for moment in 1..=MOMENTS {
        let kept = moment % 2 == 0;
        let words: &[&str] = match kept {
            true => &["run", "--name", "up", &image, "sleep", "999"],
            false => &["run", "--rm", "--name", "up", &image, "sleep", "999"],
        };
        let face = hull.cmd(words).spawn();
        later(face.pid(), whole * moment / MOMENTS);
        face.signal(Signal::KILL);
        assert_eq!(face.wait().code, 137);
        let listed = hull
            .cmd(["ps", "-a", "--format", "{{.Names}}"])
            .output()
            .ok();
        match listed.as_str() {
            // It was never made.
            "" => {}
            "up\n" => {
                // Whatever has become of it by now, a second time does no harm.
                for _ in 0..2 {
                    let removed = hull.cmd(["rm", "-f", "up"]).output();
                    assert_eq!(removed.code, 0, "{:?}", removed.all());
                }
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
    }
}

#[test]
fn asked_to_end_at_each_stage() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let whole = run_takes(&hull);
    const MOMENTS: u32 = 6;
    for moment in 1..=MOMENTS {
        let (signal, code) = match moment % 2 {
            0 => (Signal::TERM, 143),
            _ => (Signal::INT, 130),
        };
        // Its init makes sure that the command hears of it, however young it is.
        let words = ["run", "--rm", "--init", &image, "sleep", "999"];
        let face = hull.cmd(words).spawn();
        later(face.pid(), whole * moment / MOMENTS);
        face.signal(signal);
        let ended = face.wait();
        assert_eq!(ended.code, code, "at {moment}/{MOMENTS}: {:?}", ended.all());
        assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
        assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
    }
}

#[test]
fn asked_to_end_while_it_runs() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "trap 'echo int; exit 3' INT; trap 'echo term; exit 4' TERM; echo ready; \
        while :; do sleep 1; done";
    for (signal, code, said) in [(Signal::INT, 3, "int"), (Signal::TERM, 4, "term")] {
        let mut face = hull
            .cmd(["run", "--rm", &image, "sh", "-c", script])
            .spawn();
        face.await_stdout("ready");
        face.signal(signal);
        let ended = face.wait();
        assert_eq!(
            ended.all(),
            (code, format!("ready\n{said}\n"), String::new())
        );
    }
    // A second command in it is asked alone.
    hull.cmd(["run", "-d", "--name", "host", &image, "sleep", "999"])
        .output()
        .ok();
    let mut face = hull.cmd(["exec", "host", "sh", "-c", script]).spawn();
    face.await_stdout("ready");
    face.signal(Signal::TERM);
    assert_eq!(face.wait().code, 4);
    let mut face = hull.cmd(["exec", "host", "sh", "-c", script]).spawn();
    face.await_stdout("ready");
    face.signal(Signal::KILL);
    assert_eq!(face.wait().code, 137);
    assert_eq!(
        hull.cmd(["exec", "host", "echo", "alive"]).output().ok(),
        "alive\n"
    );
    assert_eq!(hull.cmd(["rm", "-f", "host"]).output().ok(), "host\n");
}
