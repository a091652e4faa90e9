//! What the agent tells of containers and what it changes of them while they run, on this
//! machine's own kernel.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;

use std::fs;

use guest::{Guest, fresh_name};
use hull_proto::{Frame, Reply, Request};
use serde_json::json;

const GO_ON: &str = "echo up; read line; echo on; read line";

/// An agent on a machine whose cgroups count memory and processes.
fn counting() -> Option<Guest> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if ["memory", "pids", "cpu"]
        .iter()
        .any(|name| !controllers.contains(name))
    {
        eprintln!("SKIP: this machine's unified hierarchy lacks controllers");
        return None;
    }
    Guest::start()
}

#[test]
fn statistics_are_those_of_the_containers_own_group() {
    let Some(mut guest) = counting() else { return };
    let id = fresh_name();
    let mut spec = guest.spec(GO_ON);
    spec["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 9}});
    let mut stream = guest.create(&id, spec, false);
    stream.read_until("up");
    let stats = |guest: &mut Guest| match guest.ask(&Request::Stats { id: id.clone() }) {
        Reply::Stats(stats) => stats,
        other => panic!("{other:?}"),
    };
    let before = stats(&mut guest);
    assert_eq!(before.memory.limit, Some(64 << 20));
    assert_eq!((before.pids.current, before.pids.limit), (1, Some(9)));
    assert!(
        before.memory.usage > 0 && before.memory.stat.pgfault > 0,
        "{before:?}"
    );
    stream.send(&Frame::Stdin(b"\n".to_vec()));
    stream.read_until("on");
    let after = stats(&mut guest);
    assert!(after.cpu.usage_usec > before.cpu.usage_usec, "{after:?}");
    let absent = guest.ask(&Request::Stats {
        id: "absent".into(),
    });
    assert!(matches!(absent, Reply::Error { message } if message.contains("does not exist")));
}

#[test]
fn limits_change_while_the_container_runs() {
    let Some(mut guest) = counting() else { return };
    let id = fresh_name();
    let mut stream = guest.create(&id, guest.spec(GO_ON), false);
    stream.read_until("up");
    let mut update = |resources| {
        let id = id.clone();
        guest.ask(&Request::Update { id, resources })
    };
    let asked = json!({"memory": {"limit": 32 << 20}, "cpu": {"quota": 50_000, "shares": 1024},
        "pids": {"limit": 7}});
    assert_eq!(update(asked), Reply::Ok);
    let careful = update(json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}));
    let Reply::Error { message } = careful else {
        panic!("{careful:?}")
    };
    assert!(message.contains("current usage"), "{message}");
    let refused = update(json!({"unified": {"no.such.file": "1"}}));
    assert!(matches!(refused, Reply::Error { .. }), "{refused:?}");
    let unread = update(json!({"memory": 5}));
    assert!(matches!(unread, Reply::Error { .. }), "{unread:?}");
    let Reply::Stats(stats) = guest.ask(&Request::Stats { id: id.clone() }) else {
        panic!()
    };
    assert_eq!(
        (stats.memory.limit, stats.pids.limit),
        (Some(32 << 20), Some(7))
    );
}

#[test]
fn processes_are_told_page_by_page() {
    let Some(mut guest) = Guest::start() else {
        return;
    };
    let id = fresh_name();
    // Command lines of 4 KiB: twenty of them are more than a page.
    let script = "long=$(head -c 4000 /dev/zero | tr '\\0' x); i=0
        while [ $i -lt 20 ]; do sh -c 'printf i; sleep 100; :' $long & i=$((i+1)); done; wait";
    let mut stream = guest.create(&id, guest.spec(script), false);
    let first = stream.started();
    // Each has its own command line once it speaks.
    stream.read_until(&"i".repeat(20));
    let (mut seen, mut pages, mut after) = (Vec::new(), 0, 0);
    loop {
        let id = id.clone();
        let Reply::Processes(page) = guest.ask(&Request::Processes { id, after }) else {
            panic!("no processes")
        };
        pages += 1;
        after = page
            .processes
            .last()
            .map_or(u32::MAX, |process| process.pid);
        seen.extend(page.processes);
        if !page.more {
            break;
        }
    }
    assert!(pages > 1, "{pages} pages");
    assert!(seen.windows(2).all(|pair| pair[0].pid < pair[1].pid));
    let shells = seen
        .iter()
        .filter(|process| process.command.contains("xxxx"))
        .count();
    assert!(shells >= 20, "{shells} of {}", seen.len());
    assert!(seen.iter().any(|process| process.pid == first));
    assert!(
        seen.iter()
            .filter(|process| process.parent == first)
            .count()
            >= 20
    );
}

#[test]
fn a_killing_for_want_of_memory_is_told_as_it_happens() {
    let Some(guest) = counting() else { return };
    let mut spec = guest.spec("tail /dev/zero; echo survived $?; exec sleep 100");
    spec["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20}});
    let mut stream = guest.create(&fresh_name(), spec, false);
    stream.started();
    let count = loop {
        match stream.next() {
            Some(Frame::OomKilled { count }) => break count,
            Some(Frame::Stdout(_) | Frame::Stderr(_)) => {}
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(count, 1);
}
