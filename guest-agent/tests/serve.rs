//! The agent's process streams against real containers, on this machine's own kernel: what
//! comes through, and how processes end.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;

use std::fs;
use std::time::{Duration, Instant};

use guest::{Guest, fresh_name, process};
use hull_proto::{ExitStatus, FailureKind, Frame, MAX_DATA, Reply, Request, STDIN_WINDOW};
use serde_json::json;

macro_rules! guest {
    () => {
        match Guest::start() {
            Some(guest) => guest,
            None => return,
        }
    };
}

#[test]
fn a_command_runs_and_its_code_comes_back() {
    let guest = guest!();
    assert_eq!(guest.run(guest.spec("echo hello")).text(), "hello\n");
    let outcome = guest.run(guest.spec("echo oops >&2; exit 42"));
    assert_eq!(outcome.end, Ok(ExitStatus::Exited(42)));
    assert_eq!(outcome.stderr, b"oops\n");
    assert!(outcome.stdout.is_empty());
}

#[test]
fn signals_reach_the_process_and_tell_how_it_ended() {
    let guest = guest!();
    for (script, signal, end) in [
        (
            "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done",
            15,
            ExitStatus::Exited(7),
        ),
        (
            "trap 'exit 8' USR1; echo up; while :; do sleep 0.05; done",
            10,
            ExitStatus::Exited(8),
        ),
        (
            "echo up; exec sleep 100",
            9,
            ExitStatus::Signaled {
                signal: 9,
                oom: false,
            },
        ),
    ] {
        let mut stream = guest.begin(guest.spec(script));
        stream.read_until("up");
        stream.send(&Frame::Signal { signal, all: false });
        assert_eq!(stream.finish().end, Ok(end), "{script}");
    }
}

#[test]
fn a_signal_for_all_reaches_every_process() {
    let guest = guest!();
    let script = "sh -c 'trap \"echo child; exit\" USR1; echo a; while :; do sleep 0.05; done' &
        trap 'echo parent' USR1; echo b; wait; wait; wait; echo end";
    let mut stream = guest.begin(guest.spec(script));
    let mut seen = stream.read_until("\n");
    while !(seen.contains('a') && seen.contains('b')) {
        seen += &stream.read_until("\n");
    }
    stream.send(&Frame::Signal {
        signal: 10,
        all: true,
    });
    let text = stream.finish().text();
    assert!(text.contains("child") && text.contains("parent"), "{text}");
}

#[test]
fn ten_mebibytes_come_through_with_stderr_apart() {
    let guest = guest!();
    let script = "i=0; while [ $i -lt 10 ]; do dd if=/dev/zero bs=1048576 count=1 2>/dev/null;
        echo $i >&2; i=$((i+1)); done";
    let outcome = guest.run(guest.spec(script));
    assert_eq!(outcome.stdout.len(), 10 << 20);
    assert!(outcome.stdout.iter().all(|&byte| byte == 0));
    assert_eq!(outcome.stderr, b"0\n1\n2\n3\n4\n5\n6\n7\n8\n9\n");
}

#[test]
fn input_is_acknowledged_as_it_is_taken_and_ends() {
    let guest = guest!();
    let mut stream = guest.begin(guest.spec("wc -c"));
    stream.started();
    let (mut sent, mut acknowledged) = (0usize, 0usize);
    while sent < 2 << 20 {
        while sent - acknowledged + MAX_DATA > STDIN_WINDOW {
            match stream.next() {
                Some(Frame::StdinAck(count)) => acknowledged += count as usize,
                other => panic!("{other:?}"),
            }
        }
        stream.send(&Frame::Stdin(vec![b'x'; MAX_DATA]));
        sent += MAX_DATA;
    }
    stream.send(&Frame::StdinEof);
    assert_eq!(stream.finish().text().trim(), sent.to_string());
}

#[test]
fn input_that_nobody_reads_does_not_hold_up_a_signal() {
    let guest = guest!();
    let mut stream = guest.begin(guest.spec("echo up; exec sleep 100"));
    stream.read_until("up");
    for _ in 0..STDIN_WINDOW / MAX_DATA {
        stream.send(&Frame::Stdin(vec![0; MAX_DATA]));
    }
    stream.send(&Frame::Signal {
        signal: 9,
        all: false,
    });
    let killed = ExitStatus::Signaled {
        signal: 9,
        oom: false,
    };
    assert_eq!(stream.finish().end, Ok(killed));
}

#[test]
fn input_that_was_closed_is_acknowledged_all_the_same() {
    let guest = guest!();
    let mut stream = guest.begin(guest.spec("exec 0<&-; echo up; exec sleep 100"));
    stream.read_until("up");
    stream.send(&Frame::Stdin(vec![0; MAX_DATA]));
    assert_eq!(stream.next(), Some(Frame::StdinAck(MAX_DATA as u32)));
    stream.send(&Frame::Signal {
        signal: 9,
        all: false,
    });
    stream.finish();
}

#[test]
fn a_terminal_has_a_size_a_line_discipline_and_a_hangup() {
    let guest = guest!();
    let mut spec = guest.spec("tty; stty size; read line; echo got $line; stty size; exec cat");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 33, "width": 99});
    // A container's process 1 has no default signals: behind an init, the command does.
    let mut stream = guest.create(&fresh_name(), spec, true);
    let seen = stream.read_until("33 99");
    assert!(seen.contains("/dev/pts/0"), "{seen}");
    stream.send(&Frame::Resize {
        rows: 44,
        cols: 111,
    });
    stream.send(&Frame::Stdin(b"word\r".to_vec()));
    stream.read_until("44 111");
    // The shell is the command by then: it might take what follows for itself.
    stream.send(&Frame::Stdin(b"echoed\r".to_vec()));
    stream.read_until("echoed\r\nechoed\r\n");
    // Ctrl-C.
    stream.send(&Frame::Stdin(vec![3]));
    let interrupted = stream.finish().end.unwrap();
    assert_eq!(interrupted.code(), 130);
}

#[test]
fn no_signal_is_ignored_or_blocked_from_the_start() {
    let guest = guest!();
    // No shell, which ignores some of its own accord.
    let mut spec = guest.spec("");
    spec["process"]["args"] = json!(["grep", "-E", "^Sig(Ign|Blk)", "/proc/self/status"]);
    let said = guest.create(&fresh_name(), spec, false).finish();
    let text = said.text();
    let masks = text.lines().map(|line| {
        let (_, mask) = line.split_once('\t').unwrap();
        u64::from_str_radix(mask, 16).unwrap()
    });
    // The C library keeps 32 to 34 for itself.
    let masks: Vec<u64> = masks.map(|mask| mask & !(7 << 31)).collect();
    assert_eq!(masks, [0, 0], "{text}");
}

#[test]
fn under_init_orphans_are_reaped_and_signals_forwarded() {
    let guest = guest!();
    let script = "trap 'exit 9' TERM; (sleep 0.01 &) ; sleep 0.3;
        ps -o pid,stat,comm | grep -c ' Z' ; cat /proc/1/comm; echo up;
        while :; do sleep 0.05; done";
    let mut stream = guest.create(&fresh_name(), guest.spec(script), true);
    let seen = stream.read_until("up");
    assert!(seen.starts_with("0\n"), "{seen}");
    stream.send(&Frame::Signal {
        signal: 15,
        all: false,
    });
    assert_eq!(stream.finish().end, Ok(ExitStatus::Exited(9)));
}

#[test]
fn orphans_outside_of_a_pid_namespace_are_reaped_by_the_agent() {
    let guest = guest!();
    let mut spec = guest.spec("(sleep 0.01 &); (sleep 0.01 &); exit 0");
    spec["linux"]["namespaces"] = json!([{"type": "mount"}, {"type": "uts"}]);
    spec["mounts"] = json!([{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}]);
    spec["linux"]["maskedPaths"] = json!([]);
    spec["linux"]["readonlyPaths"] = json!([]);
    guest.run(spec.clone()).text();
    // By the time of the next container, the agent has seen the first one's children end.
    spec["process"]["args"] = json!(["sleep", "0.2"]);
    guest.run(spec).text();
    let pid = guest.agent_pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    assert_eq!(children.trim(), "");
}

#[test]
fn the_rest_of_a_container_ends_with_its_first_process() {
    let guest = guest!();
    let mut stream = guest.begin(guest.spec("sleep 1000 & sleep 1000 & exit 3"));
    stream.started();
    assert_eq!(stream.finish().end, Ok(ExitStatus::Exited(3)));
}

#[test]
fn exec_joins_the_container() {
    let guest = guest!();
    let id = fresh_name();
    let mut first = guest.create(
        &id,
        guest.spec("echo mark > /dev/shm/mark; exec tail -f /dev/shm/mark"),
        false,
    );
    first.read_until("mark");
    let script = "cat /dev/shm/mark; hostname; cat /proc/1/comm; cat /proc/self/cgroup";
    let text = guest
        .exec(&id, process(&["sh", "-c", script]))
        .finish()
        .text();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines[..3], ["mark", "box", "tail"]);
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("0::/") && line.len() == 4),
        "{text}"
    );

    let mut other = process(&["sh", "-c", "id; exit 5"]);
    other["user"] = json!({"uid": 0, "gid": 0, "username": "app"});
    let outcome = guest.exec(&id, other).finish();
    assert_eq!(outcome.end, Ok(ExitStatus::Exited(5)));
    let text = String::from_utf8(outcome.stdout).unwrap();
    assert!(
        text.starts_with("uid=1000(app) gid=1001(app) groups=50(staff),63(audio)"),
        "{text}"
    );

    let mut terminal = process(&["tty"]);
    terminal["terminal"] = json!(true);
    assert!(
        guest
            .exec(&id, terminal)
            .finish()
            .text()
            .contains("/dev/pts/")
    );

    first.send(&Frame::Signal {
        signal: 9,
        all: true,
    });
    first.finish();
    let failure = guest.exec(&id, process(&["true"])).finish().failure();
    assert_eq!(failure.kind, FailureKind::Refused);
    assert!(
        failure.message.contains("is not running"),
        "{}",
        failure.message
    );
}

#[test]
fn an_exec_that_leaves_its_output_to_others_ends_all_the_same() {
    let guest = guest!();
    let id = fresh_name();
    let mut first = guest.create(&id, guest.spec("echo up; exec sleep 1000"), false);
    first.read_until("up");
    let begun = Instant::now();
    let stream = guest.exec(&id, process(&["sh", "-c", "sleep 1000 & echo out"]));
    assert_eq!(stream.finish().text(), "out\n");
    assert!(begun.elapsed().as_secs() < 20);
    first.send(&Frame::Signal {
        signal: 9,
        all: true,
    });
    first.finish();
}

#[test]
fn a_name_in_use_is_refused_and_free_again_afterwards() {
    let guest = guest!();
    let id = fresh_name();
    let mut first = guest.create(&id, guest.spec("echo up; exec sleep 1000"), false);
    first.read_until("up");
    let second = guest.create(&id, guest.spec("true"), false).finish();
    assert_eq!(
        second.failure().message,
        format!("container {id} already exists")
    );
    first.send(&Frame::Signal {
        signal: 9,
        all: false,
    });
    first.finish();
    guest.create(&id, guest.spec("true"), false).finish().text();
}

#[test]
fn a_stream_that_the_host_drops_leaves_the_process_alone() {
    let guest = guest!();
    let id = fresh_name();
    let mark = guest.beside("volume");
    let script =
        "echo up; while [ ! -e /v/go ]; do sleep 0.02; done; touch /v/done; exec sleep 1000";
    let mut spec = guest.spec(script);
    spec["mounts"].as_array_mut().unwrap().push(json!(
        {"destination": "/v", "type": "bind", "source": mark, "options": ["rbind", "rw"]}));
    let mut stream = guest.create(&id, spec, false);
    stream.read_until("up");
    drop(stream);
    fs::write(mark.join("go"), "").unwrap();
    let wait = "while [ ! -e /v/done ]; do sleep 0.02; done; echo seen";
    let text = guest
        .exec(&id, process(&["sh", "-c", wait]))
        .finish()
        .text();
    assert_eq!(text, "seen\n");
}

#[test]
fn a_stream_that_breaks_the_rules_is_closed_and_the_others_go_on() {
    let mut guest = guest!();
    let mut stream = guest.connect();
    stream.send(&Frame::Stdin(vec![1]));
    assert_eq!(stream.finish().failure().kind, FailureKind::Internal);

    let mut stream = guest.begin(guest.spec("echo up; exec sleep 100"));
    stream.read_until("up");
    for _ in 0..2 + 2 * STDIN_WINDOW / MAX_DATA {
        if stream.try_send(&Frame::Stdin(vec![0; MAX_DATA])).is_err() {
            break;
        }
    }
    assert!(matches!(guest.ask(&Request::Ping), Reply::Ok));
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
}

#[test]
fn the_agent_leaks_no_descriptors() {
    let mut guest = guest!();
    let text = guest.run(guest.spec("ls /proc/self/fd")).text();
    // 3 is the listing's own.
    assert_eq!(text, "0\n1\n2\n3\n");
    let fds = format!("/proc/{}/fd", guest.agent_pid());
    let count = || fs::read_dir(&fds).unwrap().count();
    guest.run(guest.spec("true")).text();
    let before = count();
    for _ in 0..5 {
        guest.run(guest.spec("true")).text();
        guest.run(guest.spec("")).end.ok();
    }
    // A stream is closed a moment after its last frame.
    let deadline = Instant::now() + Duration::from_secs(20);
    while count() > before {
        assert!(
            Instant::now() < deadline,
            "{} after {before}: {fds}",
            count()
        );
        assert!(matches!(guest.ask(&Request::Ping), Reply::Ok));
    }
}

#[test]
fn a_held_container_is_made_and_waits_for_its_word() {
    let guest = guest!();
    let name = fresh_name();
    let mut stream = guest.hold(&name, guest.spec("echo ran; cat"));
    assert!(matches!(stream.next(), Some(Frame::Prepared { .. })));
    stream.send(&Frame::Stdin(b"early".to_vec()));
    stream.send(&Frame::StdinEof);
    let refused = guest.exec(&name, process(&["true"])).finish().failure();
    assert!(refused.message.contains("is not running"), "{refused:?}");
    stream.send(&Frame::Go);
    assert_eq!(stream.finish().text(), "ran\nearly");
}

#[test]
fn a_held_container_can_be_killed_or_left_and_a_missing_command_shows_at_once() {
    let guest = guest!();
    let mut stream = guest.hold(&fresh_name(), guest.spec("echo ran"));
    assert!(matches!(stream.next(), Some(Frame::Prepared { .. })));
    stream.send(&Frame::Signal {
        signal: 9,
        all: true,
    });
    let killed = ExitStatus::Signaled {
        signal: 9,
        oom: false,
    };
    assert_eq!(stream.finish().end, Ok(killed));
    let name = fresh_name();
    let mut left = guest.hold(&name, guest.spec("echo ran"));
    assert!(matches!(left.next(), Some(Frame::Prepared { .. })));
    drop(left);
    let mut spec = guest.spec("");
    spec["process"]["args"] = serde_json::json!(["no-such-command"]);
    let failure = guest.hold(&fresh_name(), spec).finish().failure();
    assert_eq!(failure.kind, FailureKind::NotFound);
}
