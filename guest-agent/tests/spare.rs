//! A first process that was made before its container: it is taken, and shows in nothing else.

#[allow(dead_code, reason = "each test file uses a part of it")]
mod guest;

use std::fs;
use std::ops::Deref;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use guest::{Guest, fresh_name};
use hull_proto::{ExitStatus, Frame, Reply, Request};
use serde_json::{Value, json};

/// The cgroups that are made in advance have one name on a machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A guest that has seen a container and made the next one's process.
struct Prepared(
    Guest,
    #[expect(dead_code, reason = "held")] MutexGuard<'static, ()>,
);

impl Deref for Prepared {
    type Target = Guest;

    fn deref(&self) -> &Guest {
        &self.0
    }
}

fn prepared() -> Option<Prepared> {
    if !Path::new("/sys/fs/cgroup/cgroup.procs").exists() {
        eprintln!("SKIP: no cgroup v2 here, so nothing is made in advance");
        return None;
    }
    let turn = ONE_AT_A_TIME.lock();
    let turn = turn.unwrap_or_else(PoisonError::into_inner);
    let mut guest = Guest::start()?;
    guest.run(guest.spec("true")).text();
    let prepare = Request::Furnish { layers: None };
    assert!(matches!(guest.ask(&prepare), Reply::Ok));
    assert!(spare(&guest).is_some());
    Some(Prepared(guest, turn))
}

macro_rules! prepared {
    () => {
        match prepared() {
            Some(guest) => guest,
            None => return,
        }
    };
}

/// The only child that the agent has.
fn spare(guest: &Guest) -> Option<u32> {
    let pid = guest.agent_pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.unwrap_or_default();
    let mut children = children.split_whitespace();
    let first = children.next()?;
    assert_eq!(children.next(), None);
    first.parse().ok()
}

/// All that a process can tell of how it was made.
const SELF_PORTRAIT: &str = "echo $$; hostname; umask; ulimit -a; pwd; id; env | sort
    cat /proc/self/oom_score_adj /proc/self/cgroup
    grep -E '^(Cap|Sig|NSpid|NSsid|Seccomp|NoNewPrivs|Groups|Uid|Gid)' /proc/self/status
    cut -d ' ' -f 3- /proc/self/mountinfo | sed 's/^[0-9:]* //; s/ino=[0-9]*//' | sort
    ls /proc/self/fd /dev /dev/pts /dev/shm /sys/fs/cgroup
    stat -c '%n %a %u %g %t %T' / /dev /dev/* /dev/pts /dev/shm /proc /sys
    ip -o link | wc -l; cat /proc/kcore | wc -c";

#[test]
fn a_container_of_the_spare_process_is_as_any_other() {
    for change in [
        |_: &mut Value| {},
        |spec: &mut Value| spec["hostname"] = Value::Null,
        |spec: &mut Value| {
            spec["process"]["oomScoreAdj"] = json!(77);
            spec["linux"]["resources"] = json!({"pids": {"limit": 50}});
            spec["root"]["readonly"] = json!(true);
        },
        // Not what the last one had: other file systems and fewer of them.
        |spec: &mut Value| {
            let mounts = spec["mounts"].as_array_mut().unwrap();
            mounts.retain(|mount| mount["destination"] != "/dev/mqueue");
            mounts[1]["options"] = json!(["nosuid", "mode=711", "size=1m"]);
        },
        // More than one packet.
        |spec: &mut Value| {
            let long: Vec<String> = (0..1000).map(|n| format!("V{n}={n:0>200}")).collect();
            spec["annotations"] = json!({"long": long.join(" ")});
        },
    ] {
        let guest = prepared!();
        let mut spec = guest.spec(SELF_PORTRAIT);
        change(&mut spec);
        let pid = spare(&guest).unwrap();
        let mut of_spare = guest.begin(spec.clone());
        assert_eq!(of_spare.started(), pid);
        let of_spare = of_spare.finish().text();
        let any = guest.run(spec).text();
        assert_eq!(of_spare, any);
        assert_eq!(of_spare.lines().next(), Some("1"));
    }
}

#[test]
fn the_spare_process_can_have_a_terminal() {
    let guest = prepared!();
    let pid = spare(&guest).unwrap();
    let mut spec = guest.spec("tty; stty size; read line; echo got $line");
    spec["process"]["terminal"] = json!(true);
    spec["process"]["consoleSize"] = json!({"height": 33, "width": 101});
    let mut stream = guest.begin(spec);
    assert_eq!(stream.started(), pid);
    let seen = stream.read_until("33 101");
    assert!(seen.contains("/dev/pts/0"), "{seen}");
    stream.send(&Frame::Stdin(b"this\n".to_vec()));
    stream.read_until("got this");
    assert_eq!(stream.finish().end, Ok(ExitStatus::Exited(0)));
}

#[test]
fn the_spare_process_can_be_held_and_can_fail() {
    let guest = prepared!();
    let pid = spare(&guest).unwrap();
    let mut held = guest.hold(&fresh_name(), guest.spec("echo went"));
    assert_eq!(held.next(), Some(Frame::Prepared { pid }));
    held.send(&Frame::Go);
    assert_eq!(held.finish().text(), "went\n");
    drop(guest);

    let guest = prepared!();
    let mut spec = guest.spec("");
    spec["process"]["args"] = json!(["/no/such/program"]);
    let failure = guest.run(spec).failure();
    assert!(failure.message.contains("/no/such/program"), "{failure:?}");
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
}

#[test]
fn who_needs_other_namespaces_gets_a_process_of_its_own_and_the_spare_one_goes() {
    let guest = prepared!();
    let pid = spare(&guest).unwrap();
    let mut spec = guest.spec("echo mine; read line");
    spec["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
    spec["hostname"] = Value::Null;
    let mut stream = guest.begin(spec);
    let own = stream.started();
    assert_ne!(own, pid);
    stream.read_until("mine");
    let deadline = Instant::now() + Duration::from_secs(20);
    while fs::exists(format!("/proc/{pid}")).unwrap() {
        assert!(Instant::now() < deadline, "the spare process stays");
        std::thread::yield_now();
    }
    assert_eq!(spare(&guest), Some(own));
    stream.send(&Frame::StdinEof);
    stream.finish();
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
}

#[test]
fn a_spare_process_that_was_killed_is_not_missed() {
    let guest = prepared!();
    let pid = spare(&guest).unwrap();
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    // Whether the agent knows of it by then or not.
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
}

#[test]
fn limits_that_cannot_be_are_refused_and_the_next_container_runs() {
    let guest = prepared!();
    let mut spec = guest.spec("true");
    spec["linux"]["resources"] = json!({"cpu": {"cpus": "4000-4001"}});
    let failure = guest.run(spec).failure();
    assert!(failure.message.contains("cpuset"), "{failure:?}");
    assert_eq!(guest.run(guest.spec("echo fine")).text(), "fine\n");
}
