//! A guest whose memory follows the limits of its containers.

use std::sync::MutexGuard;

use serde_json::json;

use super::*;
use crate::control::JoiningShare;

const MIB: u64 = 1 << 20;

/// What a guest is to have beyond its first memory, what it has, and how its host hears of that.
pub(super) struct Sizes {
    bytes: Mutex<(u64, u64)>,
    changed: OwnedFd,
    asked: Sender<u64>,
    heard: Mutex<Receiver<u64>>,
}

impl Default for Sizes {
    fn default() -> Self {
        let (asked, heard) = mpsc::channel();
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        Self {
            bytes: Mutex::default(),
            changed: eventfd(0, flags).unwrap(),
            asked,
            heard: Mutex::new(heard),
        }
    }
}

impl Sizes {
    fn bytes(&self) -> MutexGuard<'_, (u64, u64)> {
        self.bytes.lock().unwrap()
    }

    pub(super) fn want(&self, bytes: u64) {
        let before = std::mem::replace(&mut self.bytes().0, bytes);
        if before != bytes {
            self.asked.send(bytes).unwrap();
        }
    }

    pub(super) fn plugged(&self) -> u64 {
        let _ = rustix::io::read(&self.changed, &mut [0; 8]);
        self.bytes().1
    }

    pub(super) fn changed(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }

    /// Waits until it is to have another size.
    fn heard(&self) -> u64 {
        let heard = self.heard.lock().unwrap();
        heard.recv_timeout(Duration::from_secs(30)).unwrap()
    }

    /// Has so much.
    fn has(&self, bytes: u64) {
        self.bytes().1 = bytes;
        rustix::io::write(&self.changed, &1u64.to_ne_bytes()).unwrap();
    }
}

/// Of 512 MiB, 48 of them for itself.
fn guest() -> Bench {
    bench(|request| request.memory_bytes = Some(512 * MIB))
}

fn limits(mib: u64) -> serde_json::Value {
    json!({"memory": {"limit": mib * MIB}})
}

fn update(bench: &Bench, mib: u64) -> UnixStream {
    let socket = bench.control();
    let resources = limits(mib);
    control::ask(&socket, Request::Update { resources }).unwrap();
    socket
}

fn updates(id: &str, mib: u64) -> hull_proto::Request {
    hull_proto::Request::Update {
        id: id.to_owned(),
        resources: limits(mib),
    }
}

fn refusal(socket: &UnixStream) -> String {
    control::answer(socket).unwrap_err().to_string()
}

fn join(bench: &Bench, id: &str, mib: u64) -> UnixStream {
    let socket = bench.control();
    let request = Request::Join {
        id: id.to_owned(),
        shares: Vec::<JoiningShare>::new(),
        memory_bytes: Some(mib * MIB),
    };
    control::ask(&socket, request).unwrap();
    socket
}

#[test]
fn a_limit_is_raised_when_the_memory_is_there_and_lowered_before_it_goes() {
    let mut bench = guest();
    let own = "a".repeat(64);
    // 100 MiB beyond what the guest has, and what describes them.
    let raising = update(&bench, 564);
    assert_eq!(bench.memory.heard(), 102 * MIB);
    let second = update(&bench, 600);
    assert!(refusal(&second).contains("under way"));
    bench.memory.has(50 * MIB);
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    bench.memory.has(102 * MIB);
    assert_eq!(asked(&mut bench.questions), updates(&own, 564));
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(control::answer(&raising).unwrap(), Reply::Ok);

    let lowering = update(&bench, 100);
    assert_eq!(asked(&mut bench.questions), updates(&own, 100));
    assert_eq!(bench.memory.bytes().0, 102 * MIB);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(control::answer(&lowering).unwrap(), Reply::Ok);
    assert_eq!(bench.memory.heard(), 0);

    // What the agent refuses isn't kept.
    bench.memory.has(0);
    let refused = update(&bench, 564);
    assert_eq!(bench.memory.heard(), 102 * MIB);
    bench.memory.has(102 * MIB);
    asked(&mut bench.questions);
    let message = "no".to_owned();
    answer(&mut bench.questions, &hull_proto::Reply::Error { message });
    assert_eq!(refusal(&refused), "no");
    assert_eq!(bench.memory.heard(), 0);
    bench.exit(0);
    bench.driver.join().unwrap();
}

#[test]
fn a_guest_that_does_not_grow_in_time_shrinks_again() {
    let mut bench = patient_bench(
        |request| request.memory_bytes = Some(512 * MIB),
        Duration::from_millis(10),
    );
    let raising = update(&bench, 564);
    assert_eq!(bench.memory.heard(), 102 * MIB);
    bench.memory.has(64 * MIB);
    let why = refusal(&raising);
    assert!(why.contains("took 64 of 102 MiB"), "{why}");
    assert!(why.ends_with(": no more"), "{why}");
    assert_eq!(bench.memory.heard(), 0);
    let joining = join(&bench, "m1", 564);
    assert_eq!(bench.memory.heard(), 102 * MIB);
    assert!(refusal(&joining).contains("took 64 of 102 MiB"));
    assert_eq!(bench.memory.heard(), 0);
    bench.exit(0);
    bench.driver.join().unwrap();
}

#[test]
fn a_guest_has_room_for_all_of_its_containers() {
    let mut bench = guest();
    let first = join(&bench, "m1", 464);
    assert_eq!(control::answer(&first).unwrap(), Reply::Ok);
    let mut second = join(&bench, "m2", 100);
    assert_eq!(bench.memory.heard(), 102 * MIB);
    bench.memory.has(102 * MIB);
    assert_eq!(control::answer(&second).unwrap(), Reply::Ok);

    // What it asks after an update waits for that.
    let mut lines = Vec::new();
    let stats = hull_proto::Request::Stats {
        id: "m2".to_owned(),
    };
    hull_proto::encode_line(&updates("m2", 200), &mut lines).unwrap();
    hull_proto::encode_line(&stats, &mut lines).unwrap();
    second.write_all(&lines).unwrap();
    assert_eq!(bench.memory.heard(), 204 * MIB);
    bench.memory.has(204 * MIB);
    assert_eq!(asked(&mut bench.questions), updates("m2", 200));
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(asked(&mut bench.questions), stats);
    let message = "none".to_owned();
    let none = hull_proto::Reply::Error { message };
    answer(&mut bench.questions, &none);
    let heard: hull_proto::Reply = line_of(&mut second);
    assert_eq!(heard, hull_proto::Reply::Ok);
    assert_eq!(line_of::<hull_proto::Reply>(&mut second), none);

    // One that goes needs nothing any more, once it is gone.
    drop(first);
    let remove = asked(&mut bench.questions);
    assert!(matches!(remove, hull_proto::Request::Remove { .. }));
    assert_eq!(bench.memory.bytes().0, 204 * MIB);
    answer(&mut bench.questions, &hull_proto::Reply::Ok);
    assert_eq!(bench.memory.heard(), 0);
    bench.exit(0);
    bench.driver.join().unwrap();
}
