//! The shim, the monitor and containerd killed: the end is announced, and nothing is left.

use std::fs;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::{Duration, Instant};

use hull_tests::hull::Hull;
use hull_tests::process::{Process, Running, rounds};
use rustix::process::{Pid, Signal, kill_process};

use crate::daemon::{Daemon, exit_of};

pub(crate) const SHIM: &str = "containerd-shim-hull-v2";
pub(crate) const MONITOR: &str = "hull-monitor";
const FOREVER: &str = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
/// How long a process may take to appear.
const APPEARING: Duration = Duration::from_secs(60);

/// Processes of that program which were started for a container.
fn processes(program: &str, id: &str) -> Vec<Pid> {
    let entries = fs::read_dir("/proc").unwrap().flatten();
    let ours = entries.filter_map(|entry| {
        let pid: i32 = entry.file_name().to_str()?.parse().ok()?;
        let exe = fs::read_link(entry.path().join("exe")).ok()?;
        let command = fs::read(entry.path().join("cmdline")).ok()?;
        let mut words = command.split(|&byte| byte == 0);
        let named = words.any(|word| word == id.as_bytes());
        // What starts a shim has the same program, and goes at once.
        let starts = command
            .split(|&byte| byte == 0)
            .any(|word| word == b"start");
        (exe.file_name()? == program && named && !starts).then_some(pid)
    });
    ours.filter_map(Pid::from_raw).collect()
}

pub(crate) fn kill(program: &str, id: &str) {
    kill_process(appeared(program, id), Signal::KILL).unwrap();
}

fn appeared(program: &str, id: &str) -> Pid {
    let until = Instant::now() + APPEARING;
    loop {
        if let [pid] = processes(program, id)[..] {
            return pid;
        }
        assert!(Instant::now() < until, "no {program} of {id}");
        std::thread::yield_now();
    }
}

pub(crate) fn await_exit(events: &mut Running, id: &str, code: u32) {
    let exit = exit_of(id);
    events.await_stdout(&exit);
    let said = events.said();
    let line = said.lines().find(|line| line.contains(&exit)).unwrap();
    assert!(line.contains(&format!("\"exit_status\":{code}")), "{line}");
}

#[test]
fn a_shim_or_a_monitor_that_is_killed_is_an_end_and_leaves_nothing() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    let mut events = daemon.events();
    for (id, program) in [("shim-up", SHIM), ("monitor-up", MONITOR)] {
        daemon.run_detached(id, FOREVER);
        kill(program, id);
        await_exit(&mut events, id, 137);
        if program == MONITOR {
            assert_eq!(daemon.state(id).as_deref(), Some("STOPPED"));
        }
        daemon.remove(id);
        assert_eq!(processes(SHIM, id), []);
        assert_eq!(processes(MONITOR, id), []);
    }
    for (id, program) in [("shim-early", SHIM), ("monitor-early", MONITOR)] {
        let starting = daemon.run(id, &["-d"], &["sh", "-c", FOREVER]).spawn();
        // While its guest boots.
        appeared(MONITOR, id);
        kill(program, id);
        let failed = starting.wait();
        assert_ne!(failed.code, 0, "{:?}", failed.all());
        daemon.remove(id);
    }
    short_of_memory(&daemon, &mut events);
    daemon.check();
}

/// Which of several, by chance.
fn any_of(count: u64) -> u64 {
    RandomState::new().build_hasher().finish() % count
}

#[test]
fn whenever_it_is_killed_nothing_is_left() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    for round in 0..rounds(4) {
        let program = [SHIM, MONITOR][any_of(2) as usize];
        let id = format!("any-{round}");
        let mut running = daemon
            .run(&id, &[], &["sh", "-c", "echo up; sleep 3"])
            .spawn();
        let (later, up) = (any_of(400), any_of(4) == 0);
        appeared(program, &id);
        if up {
            running.await_stdout("up\n");
        }
        // Every look takes a moment.
        let gone = (0..later).any(|_| processes(program, &id).is_empty());
        if !gone {
            kill_process(appeared(program, &id), Signal::KILL).unwrap();
        }
        let ended = running.wait();
        let what = format!("{program} of {id}, up: {up}, after {later} looks, gone: {gone}");
        assert!(gone || ended.code != 0, "{what}: {:?}", ended.all());
        // `ctr run` removes what it can reach.
        let _gone = daemon.ctr(&["task", "rm", "-f", &id]).output();
        let _gone = daemon.ctr(&["container", "rm", &id]).output();
        // Containerd has `delete` run, and waits for it less long than this.
        let until = Instant::now() + APPEARING;
        while !processes(SHIM, &id).is_empty() {
            assert!(Instant::now() < until, "{what}");
        }
        assert_eq!(processes(MONITOR, &id), [], "{what}");
    }
    daemon.check();
}

#[test]
fn a_full_disk_is_an_error_and_leaves_nothing() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    let state = hull.path().join("hull-containerd");
    let place = state.display().to_string();
    fs::create_dir_all(&state).unwrap();
    let mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", &place];
    Process::new(mount).output().ok();
    fs::write(state.join("fill"), [0; 60 << 10]).unwrap();
    let refused = daemon.run("full", &[], &["true"]).output();
    assert!(
        refused.errors().contains("No space left on device"),
        "{refused:?}"
    );
    daemon.ctr(&["container", "rm", "full"]).output().ok();
    fs::remove_file(state.join("fill")).unwrap();
    let left = fs::read_dir(state.join("default/containers"))
        .into_iter()
        .flatten();
    assert_eq!(left.count(), 0);
    Process::new(["umount", &place]).output().ok();
    assert_eq!(processes(SHIM, "full"), []);
    assert_eq!(processes(MONITOR, "full"), []);
    let ran = daemon.run("full", &["--rm"], &["echo", "fits"]).output();
    assert_eq!(ran.all(), (0, "fits\n".into(), String::new()));
    daemon.check();
}

/// The kernel's own killing.
fn short_of_memory(daemon: &Daemon<'_>, events: &mut Running) {
    let limit = ["-d", "--memory-limit", "50331648"];
    let ran = daemon.run("hog", &limit, &["tail", "/dev/zero"]);
    ran.output().ok();
    await_exit(events, "hog", 137);
    let said = events.said();
    let oom = said.find("/tasks/oom {\"container_id\":\"hog\"}");
    assert!(oom.is_some_and(|place| place < said.find(&exit_of("hog")).unwrap()));
    daemon.remove("hog");
}

#[test]
fn containerd_comes_back_to_what_it_left() {
    let Some(hull) = Hull::new() else { return };
    let mut daemon = Daemon::new(&hull);
    daemon.run_detached("stays", FOREVER);
    daemon.run_detached("goes", FOREVER);
    daemon.kill();
    // Its end is nobody's to see but the shim's.
    kill(MONITOR, "goes");
    daemon.start();
    let until = Instant::now() + APPEARING;
    while daemon.state("goes").as_deref() != Some("STOPPED") {
        assert!(Instant::now() < until, "{:?}", daemon.state("goes"));
    }
    assert_eq!(daemon.state("stays").as_deref(), Some("RUNNING"));
    let removed = daemon.ctr(&["task", "rm", "goes"]).output();
    assert!(
        removed.errors().contains("non-zero exit code 137"),
        "{removed:?}"
    );
    daemon.remove("goes");
    let inside = daemon.exec("stays", &["sh", "-c", "echo in; exit 5"]);
    assert_eq!(inside.all(), (5, "in\n".into(), String::new()));
    let mut events = daemon.events();
    daemon.ctr(&["task", "kill", "stays"]).output().ok();
    await_exit(&mut events, "stays", 3);
    daemon.remove("stays");
    daemon.check();
}
