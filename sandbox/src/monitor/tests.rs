//! The driver against a guest of our own: no VM, the same streams.

mod leaving;
mod members;
mod memory;
mod saving;

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use hull_proto::{Decoder, Failure, FailureKind, MAX_FROM_GUEST, MAX_FROM_HOST, encode};
use rustix::event::{EventfdFlags, eventfd};

use super::*;
use crate::control::{self, Reply, Request};
use crate::plan::{HostFacts, Identity};
use crate::request::{Root, RunRequest};
use crate::rootfs::SharedDirectory;
use crate::settings::Settings;
use crate::state::{Phase, Running};
use crate::stream::ProcessStream;

/// A guest whose agent is the test.
struct Fake {
    ended: Arc<OwnedFd>,
    ending: Arc<Mutex<Option<String>>>,
    streams: Sender<UnixStream>,
    shown: Arc<Mutex<Vec<String>>>,
    memory: Arc<memory::Sizes>,
    stands: Arc<AtomicBool>,
}

impl Guest for Fake {
    fn connect(&self, _port: u32) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        self.streams.send(far).map_err(io::Error::other)?;
        Ok(near)
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }

    fn ending(&self) -> Option<String> {
        self.ending.lock().unwrap().clone()
    }

    fn console(&self) -> Vec<String> {
        Vec::new()
    }

    fn show(&self, shares: Vec<SharedDirectory>) -> io::Result<()> {
        let names = shares.into_iter().map(|share| share.name);
        self.shown.lock().unwrap().extend(names);
        Ok(())
    }

    fn hide(&self, names: &[String]) {
        self.shown
            .lock()
            .unwrap()
            .retain(|name| !names.contains(name));
    }

    fn pause(&self) {
        self.stands.store(true, Ordering::SeqCst);
    }

    fn resume(&self) {
        self.stands.store(false, Ordering::SeqCst);
    }

    fn plug(&self, bytes: u64) {
        self.memory.want(bytes);
    }

    fn plugged(&self) -> u64 {
        self.memory.plugged()
    }

    fn plugs(&self) -> Option<BorrowedFd<'_>> {
        Some(self.memory.changed())
    }

    fn plug_refusal(&self) -> Option<String> {
        Some("no more".to_owned())
    }

    fn stop(&mut self) {
        self.ending
            .lock()
            .unwrap()
            .get_or_insert("stopped".to_owned());
    }
}

/// A running driver and everything around it.
struct Bench {
    directory: tempfile::TempDir,
    agent: Agentish,
    /// The agent's end of its control stream.
    questions: UnixStream,
    client: ProcessStream,
    streams: Receiver<UnixStream>,
    ended: Arc<OwnedFd>,
    ending: Arc<Mutex<Option<String>>>,
    /// What the guest is shown beside its own.
    shown: Arc<Mutex<Vec<String>>>,
    /// What it is to have and has beyond its first memory.
    memory: Arc<memory::Sizes>,
    /// Whether the guest stands still.
    stands: Arc<AtomicBool>,
    driver: JoinHandle<(ExitRecord, Vec<u8>)>,
}

/// The agent's side of a process stream.
struct Agentish {
    socket: UnixStream,
    decoder: Decoder,
}

impl Agentish {
    fn send(&mut self, frame: &Frame) {
        let mut bytes = Vec::new();
        encode(frame, &mut bytes).unwrap();
        self.socket.write_all(&bytes).unwrap();
    }

    fn receive(&mut self) -> Option<Frame> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(frame) = self.decoder.take().unwrap() {
                return Some(frame);
            }
            match self.socket.read(&mut chunk).unwrap() {
                0 => return None,
                count => self.decoder.feed(&chunk[..count]),
            }
        }
    }
}

use hull_proto::Frame;

fn plan(change: impl FnOnce(&mut RunRequest)) -> Plan {
    let mut request = RunRequest::new(Root::Directory("/".into()));
    request.command = vec!["/bin/true".to_owned()];
    change(&mut request);
    let settings = Settings::load().unwrap();
    let identity = Identity {
        id: "a".repeat(64),
        name: "a".to_owned(),
        created_at: Timestamp::UNIX_EPOCH,
    };
    let facts = HostFacts {
        cpus: 1,
        memory_bytes: 1 << 40,
        ..HostFacts::default()
    };
    plan::plan(&request, identity, &settings, &facts).unwrap()
}

fn running(held: bool) -> Record {
    Record {
        entry: None,
        running: Running {
            monitor_pid: 1,
            guest_pid: 7,
            started_at: Timestamp::UNIX_EPOCH,
            phase: if held { Phase::Held } else { Phase::Running },
            kernel: String::new(),
        },
    }
}

fn first_process(stream: UnixStream) -> Started {
    Started {
        peer: peer::Peer::new(stream).unwrap(),
        decoder: Decoder::new(MAX_FROM_GUEST),
        guest_pid: 7,
    }
}

fn bench(change: impl FnOnce(&mut RunRequest)) -> Bench {
    patient_bench(change, Duration::from_secs(60))
}

fn patient_bench(change: impl FnOnce(&mut RunRequest), patience: Duration) -> Bench {
    bench_of(plan(change), patience)
}

fn bench_of(plan: Plan, patience: Duration) -> Bench {
    let directory = tempfile::tempdir().unwrap();
    let (near, far) = UnixStream::pair().unwrap();
    let (client, attached) = UnixStream::pair().unwrap();
    let (control, questions) = UnixStream::pair().unwrap();
    let (streams_in, streams) = mpsc::channel();
    let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
    let ending = Arc::new(Mutex::new(None));
    let (shown, memory) = (Arc::default(), Arc::<memory::Sizes>::default());
    let stands = Arc::<AtomicBool>::default();
    let guest = Fake {
        ended: Arc::clone(&ended),
        ending: Arc::clone(&ending),
        streams: streams_in,
        shown: Arc::clone(&shown),
        memory: Arc::clone(&memory),
        stands: Arc::clone(&stands),
    };
    let listener = UnixListener::bind(directory.path().join("control.sock")).unwrap();
    let log_path = directory.path().join("log.json");
    let driver = thread::spawn(move || {
        let record = to_its_end(Parts {
            plan: &plan,
            guest: Box::new(guest),
            started: first_process(near),
            carried: CarriedStreams::default(),
            agent: Agent::mute(control),
            log: LogWriter::open(log_path.clone(), 1 << 30).unwrap(),
            listener,
            attached: Some(attached),
            record: running(plan.held),
            jail: Vec::new(),
            kill_grace: Duration::from_millis(10),
            patience,
        });
        (record, fs::read(log_path).unwrap())
    });
    let mut bench = Bench {
        directory,
        agent: Agentish {
            socket: far,
            decoder: Decoder::new(MAX_FROM_HOST),
        },
        questions,
        client: ProcessStream::new(client).unwrap(),
        streams,
        ended,
        ending,
        shown,
        memory,
        stands,
        driver,
    };
    let started = bench.client.receive().unwrap();
    assert_eq!(started, Some(Frame::Started { pid: 7 }));
    bench
}

/// Runs a driver, and tells its clients of the end.
fn to_its_end(parts: Parts<'_>) -> ExitRecord {
    let mut driver = Driver::new(parts).unwrap();
    let end = driver.run().unwrap();
    let (mut clients, (record, status)) = (driver.finish().clients, record(end, None));
    for client in &mut clients {
        client.tell_end(&record, status);
    }
    driver::flush(clients, None).unwrap();
    record
}

impl Bench {
    fn control(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join("control.sock")).unwrap()
    }

    fn ask(&self, request: Request) -> Reply {
        let socket = self.control();
        control::ask(&socket, request).unwrap();
        control::answer(&socket).unwrap()
    }

    fn exit(&mut self, code: u8) {
        self.agent.send(&Frame::Exited(ExitStatus::Exited(code)));
    }

    fn end(&self, why: &str) {
        *self.ending.lock().unwrap() = Some(why.to_owned());
        rustix::io::write(&*self.ended, &1u64.to_ne_bytes()).unwrap();
    }
}

#[test]
fn output_reaches_the_client_and_the_log_and_the_end_comes_last() {
    let mut bench = bench(|_| {});
    assert_eq!(bench.agent.receive(), Some(Frame::StdinEof));
    bench.agent.send(&Frame::Stdout(b"out\n".to_vec()));
    bench.agent.send(&Frame::Stderr(b"err".to_vec()));
    bench.exit(3);
    assert_eq!(
        bench.client.receive().unwrap(),
        Some(Frame::Stdout(b"out\n".to_vec()))
    );
    assert_eq!(
        bench.client.receive().unwrap(),
        Some(Frame::Stderr(b"err".to_vec()))
    );
    let exited = Frame::Exited(ExitStatus::Exited(3));
    assert_eq!(bench.client.receive().unwrap(), Some(exited));
    assert_eq!(bench.client.receive().unwrap(), None);
    let (record, log) = bench.driver.join().unwrap();
    assert_eq!((record.code, record.error), (3, None));
    let log = String::from_utf8(log).unwrap();
    assert!(
        log.contains(r#"{"log":"out\n","stream":"stdout","#),
        "{log}"
    );
    assert!(log.contains(r#"{"log":"err","stream":"stderr","#), "{log}");
}

#[test]
fn a_client_that_leaves_ends_stdin_and_nothing_else() {
    let mut bench = bench(|request| request.interactive = true);
    bench.client.send(&Frame::Stdin(b"hi".to_vec())).unwrap();
    assert_eq!(bench.agent.receive(), Some(Frame::Stdin(b"hi".to_vec())));
    let (near, _far) = UnixStream::pair().unwrap();
    drop(std::mem::replace(
        &mut bench.client,
        ProcessStream::new(near).unwrap(),
    ));
    assert_eq!(bench.agent.receive(), Some(Frame::StdinEof));
    bench.agent.send(&Frame::StdinAck(2));
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    bench.exit(0);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

#[test]
fn a_slow_client_holds_the_process_up_and_loses_nothing() {
    let mut bench = bench(|_| {});
    let total = 50 * 65536;
    let mut agent = bench.agent;
    let sender = thread::spawn(move || {
        for _ in 0..50 {
            agent.send(&Frame::Stdout(vec![7; 65536]));
        }
        agent.send(&Frame::Exited(ExitStatus::Exited(0)));
        agent
    });
    let mut seen = 0;
    while let Some(frame) = bench.client.receive().unwrap() {
        if let Frame::Stdout(data) = frame {
            seen += data.len();
        }
    }
    assert_eq!(seen, total);
    drop(sender.join().unwrap());
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

#[test]
fn stop_asks_kills_and_ends_the_vm_of_a_guest_that_ignores_all() {
    let mut bench = bench(|request| request.stop_signal = Some("QUIT".to_owned()));
    assert_eq!(bench.agent.receive(), Some(Frame::StdinEof));
    let waiter = bench.control();
    control::ask(&waiter, Request::Wait).unwrap();
    let stopper = bench.control();
    let request = Request::Stop {
        signal: None,
        timeout_ms: Some(10),
    };
    control::ask(&stopper, request).unwrap();
    let signal = |signal, all| Some(Frame::Signal { signal, all });
    assert_eq!(bench.agent.receive(), signal(3, false));
    assert_eq!(bench.agent.receive(), signal(9, true));
    for socket in [waiter, stopper] {
        let Reply::Ended(record) = control::answer(&socket).unwrap() else {
            panic!("no end");
        };
        assert_eq!((record.code, record.signal), (137, Some(9)));
    }
    bench.driver.join().unwrap();
}

#[test]
fn a_guest_that_dies_is_told_with_what_it_said_before() {
    let mut bench = bench(|_| {});
    bench.agent.send(&Frame::Stdout(b"last words\n".to_vec()));
    bench.end("the guest's kernel panicked");
    assert_eq!(
        bench.client.receive().unwrap(),
        Some(Frame::Stdout(b"last words\n".to_vec()))
    );
    assert_eq!(
        bench.client.receive().unwrap(),
        Some(Frame::Failed(Failure {
            kind: FailureKind::Internal,
            message: "the guest's kernel panicked".to_owned(),
        }))
    );
    assert_eq!(bench.client.receive().unwrap(), None);
    let (record, log) = bench.driver.join().unwrap();
    assert_eq!(record.code, CODE_HULL_FAILED);
    assert_eq!(record.error.as_deref(), Some("the guest's kernel panicked"));
    assert!(String::from_utf8(log).unwrap().contains("last words"));
}

#[test]
fn an_agent_that_breaks_the_rules_ends_its_container() {
    let mut bench = bench(|_| {});
    bench.agent.socket.write_all(&[0, 0, 0, 0, 99]).unwrap();
    let (record, _) = bench.driver.join().unwrap();
    assert_eq!(record.code, CODE_HULL_FAILED);
    assert!(record.error.unwrap().contains("unknown kind"));
}

#[test]
fn an_exec_gets_a_stream_of_its_own() {
    let mut bench = bench(|_| {});
    let socket = bench.control();
    control::ask(&socket, Request::Exec).unwrap();
    let mut stream = UnixStream::from(control::answer_with_fd(&socket).unwrap());
    let mut agent = bench.streams.recv().unwrap();
    stream.write_all(b"spawn").unwrap();
    let mut seen = [0; 5];
    agent.read_exact(&mut seen).unwrap();
    assert_eq!(&seen, b"spawn");
    bench.exit(0);
    bench.driver.join().unwrap();
}

#[test]
fn only_one_client_gives_stdin_and_all_hear() {
    let mut bench = bench(|request| request.interactive = true);
    let second = bench.control();
    control::ask(&second, Request::Attach { stdin: true }).unwrap();
    assert_eq!(control::answer(&second).unwrap(), Reply::Ok);
    let mut second = ProcessStream::new(second).unwrap();
    assert_eq!(second.receive().unwrap(), Some(Frame::Started { pid: 7 }));
    second.send(&Frame::Stdin(b"ignored".to_vec())).unwrap();
    second.send(&Frame::Resize { rows: 1, cols: 2 }).unwrap();
    assert_eq!(
        bench.agent.receive(),
        Some(Frame::Resize { rows: 1, cols: 2 })
    );
    bench.client.send(&Frame::Stdin(b"taken".to_vec())).unwrap();
    assert_eq!(bench.agent.receive(), Some(Frame::Stdin(b"taken".to_vec())));
    bench.agent.send(&Frame::Stdout(b"x".to_vec()));
    assert_eq!(
        second.receive().unwrap(),
        Some(Frame::Stdout(b"x".to_vec()))
    );
    assert_eq!(
        bench.client.receive().unwrap(),
        Some(Frame::Stdout(b"x".to_vec()))
    );
    bench.exit(0);
    bench.driver.join().unwrap();
}

#[test]
fn noise_and_strangers_on_the_control_socket_change_nothing() {
    let mut bench = bench(|_| {});
    let mut noise = bench.control();
    noise.write_all(b"\x00{]\n").unwrap();
    assert!(control::answer(&noise).is_err());
    let mut stranger = bench.control();
    stranger
        .write_all(b"{\"generation\":99,\"request\":\"ping\"}\n")
        .unwrap();
    assert!(matches!(
        control::answer(&stranger),
        Err(control::ControlError::Refused(why)) if why.contains("generation")
    ));
    let mut endless = bench.control();
    // The monitor hangs up somewhere in here.
    let _ = endless.write_all(&vec![b'x'; 4 * control::MAX_LINE]);
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    bench.exit(0);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

/// What the agent is asked next.
fn asked(questions: &mut UnixStream) -> hull_proto::Request {
    line_of(questions)
}

fn line_of<T: serde::de::DeserializeOwned>(stream: &mut UnixStream) -> T {
    let mut lines = hull_proto::LineDecoder::default();
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte).unwrap();
        lines.feed(&byte);
        if let Some(line) = lines.take().unwrap() {
            return line;
        }
    }
}

fn answer(questions: &mut UnixStream, reply: &hull_proto::Reply) {
    let mut line = Vec::new();
    hull_proto::encode_line(reply, &mut line).unwrap();
    questions.write_all(&line).unwrap();
}

fn stats(usage: u64) -> Box<hull_proto::CgroupStats> {
    let mut stats = hull_proto::CgroupStats::default();
    stats.memory.usage = usage;
    Box::new(stats)
}

#[test]
fn questions_are_answered_in_order_whoever_left_meanwhile() {
    let mut bench = bench(|_| {});
    let id = "a".repeat(64);
    let sockets = [(); 3].map(|()| {
        let socket = bench.control();
        control::ask(&socket, Request::Stats).unwrap();
        let question = asked(&mut bench.questions);
        assert_eq!(question, hull_proto::Request::Stats { id: id.clone() });
        socket
    });
    let [first, second, third] = sockets;
    drop(second);
    for usage in [1, 2, 3] {
        answer(
            &mut bench.questions,
            &hull_proto::Reply::Stats(stats(usage)),
        );
    }
    assert_eq!(control::answer(&first).unwrap(), Reply::Stats(stats(1)));
    assert_eq!(control::answer(&third).unwrap(), Reply::Stats(stats(3)));
    bench.exit(0);
    bench.driver.join().unwrap();
}

#[test]
fn a_question_that_cannot_be_answered_is_refused_at_once() {
    let mut bench = bench(|_| {});
    let refusal = |socket: &UnixStream| control::answer(socket).unwrap_err().to_string();
    assert_eq!(bench.ask(Request::Pause), Reply::Ok);
    let paused = bench.control();
    control::ask(&paused, Request::Stats).unwrap();
    assert!(refusal(&paused).contains("paused"));
    assert_eq!(bench.ask(Request::Resume), Reply::Ok);

    let waiting = bench.control();
    control::ask(&waiting, Request::Processes { after: 0 }).unwrap();
    asked(&mut bench.questions);
    bench.questions.write_all(b"no JSON\n").unwrap();
    assert!(refusal(&waiting).contains("closed"));
    let late = bench.control();
    control::ask(&late, Request::Stats).unwrap();
    assert!(refusal(&late).contains("no more questions"));
    bench.exit(0);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for() {
    let mut bench = patient_bench(|_| {}, Duration::from_millis(10));
    let late = bench.control();
    control::ask(&late, Request::Stats).unwrap();
    asked(&mut bench.questions);
    let refused = control::answer(&late).unwrap_err().to_string();
    assert!(refused.contains("did not answer"), "{refused}");
    // What it says then is for nobody.
    answer(&mut bench.questions, &hull_proto::Reply::Stats(stats(1)));
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    bench.exit(0);
    assert_eq!(bench.driver.join().unwrap().0.code, 0);
}

#[test]
fn memory_that_ran_out_is_told_to_who_waits_for_it() {
    let mut bench = bench(|_| {});
    let waiting = bench.control();
    control::ask(&waiting, Request::AwaitOom { seen: 0 }).unwrap();
    bench.agent.send(&Frame::OomKilled { count: 2 });
    let told = Reply::OomKilled { count: 2 };
    assert_eq!(control::answer(&waiting).unwrap(), told);
    assert_eq!(bench.ask(Request::AwaitOom { seen: 1 }), told);
    let until_the_end = bench.control();
    control::ask(&until_the_end, Request::AwaitOom { seen: 2 }).unwrap();
    assert_eq!(bench.ask(Request::Ping), Reply::Ok);
    bench.exit(137);
    let ended = control::answer(&until_the_end).unwrap();
    assert!(matches!(ended, Reply::Ended(_)), "{ended:?}");
    bench.driver.join().unwrap();
}
