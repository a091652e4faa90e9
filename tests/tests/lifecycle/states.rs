//! From `run -d` to `rm`: what each listing says in each state.

use hull_tests::hull::Hull;
use hull_tests::image;
use serde_json::{Value, json};

use super::{inspect, start};

/// Speaks on both streams, goes on when told, then waits for TERM and ends with 9.
const SPEAKER: &str = "mkfifo /go; echo one; echo two >&2; read x < /go; echo three
                       trap 'echo bye; exit 9' TERM; echo ready; sleep 1000 & wait";

#[test]
fn one_container_through_all_its_states() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = [
        "--name",
        "first",
        "-l",
        "kind=test",
        "-h",
        "box",
        &image,
        "sh",
        "-c",
        SPEAKER,
    ];
    let id = start(&hull, &words, "one");
    assert_eq!(id.len(), 64);
    // Streams come each in order, but not in one order of both: what is on stderr is awaited.
    let mut log = hull.cmd(["logs", "-f", "first"]).spawn();
    log.await_stderr("two");
    let go = hull.cmd(["exec", "first", "sh", "-c", "echo > /go"]);
    go.output().ok();
    log.await_stdout("ready");
    drop(log);
    running(&hull, &id);
    logs_of_the_running(&hull);

    let again = hull
        .cmd(["run", "-d", "--name", "first", &image, "true"])
        .output();
    assert_eq!(again.code, 125);
    assert!(
        again.errors().contains("already in use"),
        "{:?}",
        again.all()
    );

    let mut following = hull.cmd(["logs", "-f", "--tail", "1", "first"]).spawn();
    following.await_stdout("ready\n");
    let waiting = hull.cmd(["wait", "first"]).spawn();
    assert_eq!(hull.cmd(["stop", "first"]).output().ok(), "first\n");
    assert_eq!(waiting.wait().ok(), "9\n");
    assert_eq!(following.wait().ok(), "ready\nbye\n");

    exited(&hull, &id);
    assert_eq!(hull.cmd(["rm", "first"]).output().ok(), "first\n");
    let gone = hull.cmd(["inspect", "first"]).output();
    assert_eq!((gone.code, gone.text()), (1, "[]\n".into()));
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}

fn running(hull: &Hull, id: &str) {
    let short = &id[..12];
    assert_eq!(hull.cmd(["ps", "-q"]).output().ok(), format!("{short}\n"));
    let table = hull.cmd(["ps"]).output().ok();
    let line = table.lines().nth(1).unwrap();
    for part in [short, image::PLAIN, "\"sh -c", "Up ", "first"] {
        assert!(line.contains(part), "no {part:?} in {line:?}");
    }
    let row = hull
        .cmd(["ps", "--format", "json", "-f", "label=kind=test"])
        .output()
        .ok();
    let row: Value = serde_json::from_str(&row).unwrap();
    assert_eq!(
        (&row["Names"], &row["State"]),
        (&json!("first"), &json!("running"))
    );
    assert_eq!(hull.cmd(["ps", "-q", "-f", "name=other"]).output().ok(), "");

    // By name, by whole id, by the beginning of one.
    for name in ["first", id, &id[..5]] {
        let seen = inspect(hull, name);
        assert_eq!(seen["Id"], id, "{name}");
    }
    let seen = inspect(hull, "first");
    assert_eq!(seen["Name"], "/first");
    assert_eq!(seen["Path"], "sh");
    assert_eq!(seen["State"]["Status"], "running");
    assert_eq!(seen["State"]["Running"], true);
    assert_eq!(seen["Config"]["Hostname"], "box");
    assert_eq!(seen["Config"]["Image"], image::PLAIN);
    assert_eq!(seen["Config"]["Labels"]["kind"], "test");
    assert_eq!(seen["Hull"]["Vcpus"], 1);
    let pid = seen["State"]["Pid"].as_i64().unwrap();
    assert!(
        hull.processes()
            .iter()
            .any(|known| i64::from(*known) == pid),
        "{pid}"
    );
    let format = "{{.State.Status}} {{.HostConfig.AutoRemove}}";
    let told = hull.cmd(["inspect", "-f", format, "first"]).output().ok();
    assert_eq!(told, "running false\n");

    let refused = hull.cmd(["rm", "first"]).output();
    assert_eq!(refused.code, 1, "{:?}", refused.all());
}

fn logs_of_the_running(hull: &Hull) {
    let all = hull.cmd(["logs", "first"]).output();
    assert_eq!(all.all(), (0, "one\nthree\nready\n".into(), "two\n".into()));
    let last = hull.cmd(["logs", "--tail", "2", "first"]).output();
    assert_eq!(last.all(), (0, "three\nready\n".into(), String::new()));
    assert_eq!(hull.cmd(["logs", "-n", "0", "first"]).output().ok(), "");
    let stamped = hull
        .cmd(["logs", "-t", "--tail", "1", "first"])
        .output()
        .ok();
    let (stamp, text) = stamped.split_once(' ').unwrap();
    assert_eq!(text, "ready\n");
    assert!(stamp.starts_with("20") && stamp.ends_with('Z'), "{stamp}");
    assert_eq!(hull.cmd(["logs", "--boot", "first"]).output().code, 0);
}

fn exited(hull: &Hull, id: &str) {
    assert_eq!(hull.cmd(["ps", "-q"]).output().ok(), "");
    let all = ["ps", "-a", "--format", "{{.ID}} {{.State}} {{.Status}}"];
    let line = hull.cmd(all).output().ok();
    let expected = format!("{} exited Exited (9) ", &id[..12]);
    assert!(line.starts_with(&expected), "{line}");
    assert_eq!(
        hull.cmd(["ps", "-q", "-f", "exited=9"])
            .output()
            .ok()
            .lines()
            .count(),
        1
    );
    let seen = inspect(hull, "first");
    assert_eq!(seen["State"]["Status"], "exited");
    assert_eq!(seen["State"]["ExitCode"], 9);
    assert_eq!(seen["State"]["Pid"], 0);
    assert_eq!(seen["State"]["OOMKilled"], false);
    assert_eq!(hull.cmd(["wait", "first"]).output().ok(), "9\n");
    let log = hull.cmd(["logs", "first"]).output();
    assert_eq!(
        log.all(),
        (0, "one\nthree\nready\nbye\n".into(), "two\n".into())
    );
    let late = hull.cmd(["exec", "first", "true"]).output();
    assert_eq!(late.code, 1, "{:?}", late.all());
    assert!(late.errors().contains("not running"), "{}", late.errors());
    let late = hull.cmd(["kill", "first"]).output();
    assert_eq!(late.code, 1, "{:?}", late.all());
}

#[test]
fn what_asked_for_it_is_removed_at_its_end() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo ready; read x; exit 4";
    let mut running = hull
        .cmd([
            "run", "--rm", "-i", "--name", "brief", &image, "sh", "-c", script,
        ])
        .stdin_open()
        .spawn();
    running.await_stdout("ready");
    assert_eq!(inspect(&hull, "brief")["HostConfig"]["AutoRemove"], true);
    running.write("go\n");
    assert_eq!(running.wait().code, 4);
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}

#[test]
fn what_a_container_writes_is_its_own_and_goes_with_it() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let change = "echo mine > /etc/motd; rm /srv/plain; echo x > /new; cat /etc/motd";
    let done = hull
        .cmd(["run", "--name", "one", &image, "sh", "-c", change])
        .output();
    assert_eq!(done.all(), (0, "mine\n".into(), String::new()));
    let look = "cat /etc/motd; ls /srv; test -e /new || echo clean";
    let done = hull.cmd(["run", "--rm", &image, "sh", "-c", look]).output();
    assert_eq!(
        done.ok(),
        "a busybox for tests\nlost\nplain\nscript\nclean\n"
    );
    assert_eq!(inspect(&hull, "one")["State"]["ExitCode"], 0);
    hull.cmd(["rm", "one"]).output().ok();
}

#[test]
fn one_that_has_ended_runs_again() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo run >> /runs; cat /runs; exit $(wc -l < /runs)";
    let first = ["run", "--name", "again", &image, "sh", "-c", script];
    let (once, twice) = ("run\n", "run\nrun\n");
    let all = |output: hull_tests::process::Output| output.all();
    assert_eq!(
        all(hull.cmd(first).output()),
        (1, once.into(), String::new())
    );
    let second = hull.cmd(["start", "-a", "again"]).output();
    assert_eq!(all(second), (2, twice.into(), String::new()));
    assert_eq!(hull.cmd(["start", "again"]).output().ok(), "again\n");
    assert_eq!(hull.cmd(["wait", "again"]).output().ok(), "3\n");
    let log = hull.cmd(["logs", "again"]).output().ok();
    assert_eq!(log, format!("{once}{twice}run\nrun\nrun\n"));
    hull.cmd(["run", "-d", "--name", "lives", &image, "sleep", "999"])
        .output()
        .ok();
    let some = hull.cmd(["start", "lives", "nobody"]).output();
    assert_eq!((some.code, some.text()), (1, "lives\n".into()));
    assert!(
        some.errors().contains("No such container: nobody"),
        "{some:?}"
    );
    hull.cmd(["rm", "-f", "again", "lives"]).output().ok();
}

#[test]
fn a_lack_of_memory_is_told() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    // In small pieces: one large one would be refused, as no machine could give it.
    let script = "BEGIN { for (;;) a[n++] = sprintf(\"%50000d\", n) }";
    let hog = ["run", "--name", "hog", "-m", "96m", &image, "awk", script];
    assert_eq!(hull.cmd(hog).output().code, 137);
    let state = &inspect(&hull, "hog")["State"];
    assert_eq!(
        (&state["OOMKilled"], &state["ExitCode"]),
        (&json!(true), &json!(137))
    );
}
