//! The same commands on runc and on Hull, side by side.

use hull_tests::hull::Hull;
use hull_tests::process::Running;
use serde_json::Value;

use crate::daemon::{Daemon, exit_of};

/// What may differ, and why:
/// - numbers of processes and times, which are blanked out;
/// - the values of `task metrics`, not its rows;
/// - `task ps`: a guest's processes have no number on the host, the monitor is the one there;
/// - runc's own words before the reason why a process can't be started.
fn alike(text: &str, id: &str) -> String {
    let text = text
        .replace(id, "ID")
        .replace("exec failed: unable to start container process: ", "");
    let lines = text.lines().map(|line| match line.split_once(" level=") {
        Some((_time, rest)) => rest.to_owned(),
        None => {
            let words = line.split_whitespace();
            let blank = |word: &str| match word.parse::<u32>() {
                Ok(_) => "N".to_owned(),
                Err(_) => word.to_owned(),
            };
            words.map(blank).collect::<Vec<_>>().join(" ")
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn told(daemon: &Daemon<'_>, id: &str, words: &[&str], stdin: &str) -> String {
    let done = daemon.ctr(words).stdin(stdin).output();
    alike(&format!("{words:?}: {:?}", done.all()), id)
}

/// Everything that `ctr` says of a container's life.
fn life(daemon: &Daemon<'_>, id: &str, events: &mut Running) -> Vec<String> {
    let mut said = Vec::new();
    let mut step = |words: &[&str], stdin: &str| said.push(told(daemon, id, words, stdin));
    let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
    daemon.run_detached(id, script);
    step(&["task", "ls"], "");
    let exec = ["task", "exec", "--exec-id"].as_slice();
    let with = |name: &'static str, words: &[&'static str]| [exec, &[name, id], words].concat();
    step(
        &with("e1", &["sh", "-c", "echo in; echo err >&2; exit 5"]),
        "",
    );
    step(&with("e2", &["cat"]), "through\n");
    step(&with("e3", &["no-such-command"]), "");
    let ps = daemon.ctr(&["task", "ps", id]).output().ok();
    assert!(ps.starts_with("PID") && ps.lines().count() > 1, "{ps}");
    let metrics = daemon.ctr(&["task", "metrics", id]).output().ok();
    let rows = metrics
        .lines()
        .filter_map(|line| line.split_whitespace().next());
    said.push(rows.collect::<Vec<_>>().join(" ").replace(id, "ID"));
    let mut step = |words: &[&str], stdin: &str| said.push(told(daemon, id, words, stdin));
    step(&["task", "pause", id], "");
    step(&["task", "ls"], "");
    step(&["task", "pause", id], "");
    step(&with("e4", &["true"]), "");
    step(&["task", "resume", id], "");
    step(&["task", "rm", id], "");
    step(&["container", "rm", id], "");
    step(&["task", "kill", "--signal", "SIGTERM", id], "");
    events.await_stdout(&exit_of(id));
    step(&["task", "ls"], "");
    step(&["task", "kill", id], "");
    step(&with("e5", &["true"]), "");
    step(&["task", "rm", id], "");
    step(&["task", "rm", id], "");
    step(&["task", "kill", id], "");
    step(&["container", "rm", id], "");
    said
}

/// What was announced of a container, without numbers of processes, times and the place of it.
fn announced(events: &str, id: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for line in events.lines() {
        let Some(place) = line.find(" /tasks/") else {
            continue;
        };
        let (topic, fields) = line[place + 1..].split_once(' ').unwrap();
        let mut fields: Value = serde_json::from_str(fields).unwrap();
        if fields["container_id"] != id {
            continue;
        }
        for name in ["pid", "exited_at", "bundle", "rootfs", "io"] {
            fields.as_object_mut().unwrap().remove(name);
        }
        lines.push(format!("{topic} {fields}").replace(id, "ID"));
    }
    lines
}

#[test]
fn ctr_says_the_same_of_runc_and_of_hull() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    let mut events = daemon.events();
    let runc = life(&daemon, "on-runc", &mut events);
    let own = life(&daemon, "on-hull", &mut events);
    for (own, runc) in own.iter().zip(&runc) {
        assert_eq!(own, runc, "Hull's, and runc's");
    }
    events.await_stdout("/containers/delete {\"id\":\"on-hull\"}");
    let said = events.said();
    let own = announced(&said, "on-hull");
    assert_eq!(own, announced(&said, "on-runc"));
    assert_eq!(
        own,
        [
            r#"/tasks/create {"container_id":"ID"}"#,
            r#"/tasks/start {"container_id":"ID"}"#,
            r#"/tasks/exec-added {"container_id":"ID","exec_id":"e1"}"#,
            r#"/tasks/exec-started {"container_id":"ID","exec_id":"e1"}"#,
            r#"/tasks/exit {"container_id":"ID","exit_status":5,"id":"e1"}"#,
            r#"/tasks/exec-added {"container_id":"ID","exec_id":"e2"}"#,
            r#"/tasks/exec-started {"container_id":"ID","exec_id":"e2"}"#,
            r#"/tasks/exit {"container_id":"ID","id":"e2"}"#,
            r#"/tasks/exec-added {"container_id":"ID","exec_id":"e3"}"#,
            r#"/tasks/paused {"container_id":"ID"}"#,
            r#"/tasks/resumed {"container_id":"ID"}"#,
            r#"/tasks/exit {"container_id":"ID","exit_status":3,"id":"ID"}"#,
            r#"/tasks/delete {"container_id":"ID","exit_status":3}"#,
        ]
    );
    daemon.check();
}
