//! Containers that are saved by containerd's calls, and those that go on from there.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use containerd_shim_protos::TaskClient;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CreateTaskRequest, DeleteRequest, PauseRequest, ResumeRequest,
    StartRequest, StateRequest, Status, WaitRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::Code;
use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::{DEADLINE, Process};

use crate::calls::{Bundle, listen, patient, refusal, shut_down, start_by_message};
use crate::daemon::{Daemon, exit_of};
use crate::kills::{MONITOR, SHIM, await_exit, kill};

/// Counts in its memory and in a file of its root.
const COUNT: &str = "trap 'exit 3' TERM; n=0; while :; do n=$((n+1)); echo $n > /count; \
    sleep 0.1; done";
/// The same on stdout until it is told to go; then it reads a line.
const SPEAK: &str = "n=0; until [ -e /go ]; do n=$((n+1)); echo $n > /count; echo $n; sleep 0.1; \
    done; read line; echo got $line; exit 9";
/// What a task may use: its guest's memory is in the checkpoint, and in containerd's store.
const SMALL: [&str; 2] = ["--memory-limit", "50331648"];

/// Waits until a container has counted past `last`; returns how far it is.
#[track_caller]
fn counted(daemon: &Daemon<'_>, id: &str, last: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let said = daemon.exec(id, &["sh", "-c", "cat /count || sleep 0.2"]);
        match said.text().trim().parse() {
            Ok(now) if now > last => return now,
            _ => assert!(begun.elapsed() < DEADLINE, "{id} doesn't count: {said:?}"),
        }
    }
}

#[test]
fn ctr_saves_a_container_and_goes_on_from_it_twice() {
    let Some(hull) = Hull::new() else { return };
    let daemon = Daemon::new(&hull);
    let mut events = daemon.events();
    let flags = [&["-d"], &SMALL[..]].concat();
    let run = daemon.run("first", &flags, &["sh", "-c", COUNT]);
    run.output().ok();
    let reached = counted(&daemon, "first", 2);
    let saved = "checkpoint.test/first:1";
    let words = [
        "c",
        "checkpoint",
        "--task",
        "--rw",
        "--image",
        "first",
        saved,
    ];
    daemon.ctr(&words).output().ok();
    events.await_stdout("/tasks/checkpointed {\"container_id\":\"first\"");
    // It goes on itself.
    assert_eq!(daemon.state("first").as_deref(), Some("RUNNING"));
    let now = counted(&daemon, "first", reached);
    daemon
        .ctr(&["task", "kill", "-s", "KILL", "first"])
        .output()
        .ok();
    events.await_stdout(&exit_of("first"));
    daemon.remove("first");
    for id in ["second", "third"] {
        let done = daemon.restore(id, &["--live", "--rw"], saved).output();
        assert_eq!(done.code, 0, "{:?}\n{}", done.all(), daemon.log());
        assert_eq!(daemon.state(id).as_deref(), Some("RUNNING"));
        let copy = counted(&daemon, id, reached);
        assert!(copy < now + 1000, "{copy} after {now}");
        lives(&daemon, id);
        daemon.ctr(&["task", "kill", id]).output().ok();
        await_exit(&mut events, id, 3);
        daemon.remove(id);
    }
    // Without what it wrote to its root, files are gone that it knows.
    let done = daemon.restore("bare", &["--live"], saved).output();
    let words = "of share \"root\" is gone";
    assert!(done.errors().contains(words), "{:?}", done.all());
    daemon.ctr(&["c", "rm", "bare"]).output().ok();
    daemon.check();
}

/// It is a task like any other.
fn lives(daemon: &Daemon<'_>, id: &str) {
    let inside = daemon.exec(id, &["sh", "-c", "echo in; exit 5"]);
    assert_eq!(inside.all(), (5, "in\n".into(), String::new()));
    let metrics = daemon.ctr(&["task", "metrics", id]).output().ok();
    assert!(metrics.contains("memory.usage"), "{metrics}");
    for word in ["pause", "resume"] {
        daemon.ctr(&["task", word, id]).output().ok();
    }
}

/// A bundle's root directory, and streams that are files.
struct Place {
    root: PathBuf,
    stdin: PathBuf,
    stdout: PathBuf,
}

impl Place {
    /// One with the image in it.
    fn new(bundle: &Bundle<'_>) -> Self {
        let place = Self::without_root(bundle);
        Image::new().unpack(&place.root);
        place
    }

    /// One to whose root an engine has copied all of another's.
    fn copied(bundle: &Bundle<'_>, from: &Self) -> Self {
        let place = Self::without_root(bundle);
        let tar = "tar -C \"$1\" -cf - . | tar -C \"$2\" -xpf -";
        fs::create_dir(&place.root).unwrap();
        let [from, to] = [from, &place].map(|place| place.root.display().to_string());
        Process::new(["sh", "-c", tar, "sh", &from, &to])
            .output()
            .ok();
        place
    }

    fn without_root(bundle: &Bundle<'_>) -> Self {
        let at = |name: &str| bundle.path.join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, at("in"), 0o600.into()).unwrap();
        Self {
            root: at("rootfs"),
            stdin: at("in"),
            stdout: at("out"),
        }
    }

    fn request(&self, bundle: &Bundle<'_>, checkpoint: &Path) -> CreateTaskRequest {
        CreateTaskRequest {
            stdin: self.stdin.display().to_string(),
            stdout: format!("file://{}", self.stdout.display()),
            checkpoint: checkpoint.display().to_string(),
            ..bundle.request()
        }
    }

    /// The last line that its process wrote.
    fn said(&self) -> String {
        let text = fs::read_to_string(&self.stdout).unwrap_or_default();
        text.lines().last().unwrap_or_default().to_owned()
    }

    /// Waits until it has counted past `last`.
    fn counted(&self, last: u64) -> u64 {
        let begun = Instant::now();
        loop {
            match self.said().parse() {
                Ok(now) if now > last => return now,
                _ => assert!(begun.elapsed() < DEADLINE, "it says {:?}", self.said()),
            }
            std::thread::yield_now();
        }
    }
}

/// A task that runs, and has begun to count.
fn counting(bundle: &Bundle<'_>) -> (Place, TaskClient) {
    let place = Place::new(bundle);
    let client = TaskClient::new(start_by_message(bundle));
    let request = place.request(bundle, Path::new(""));
    client.create(patient(), &request).unwrap();
    start(&client, bundle.id);
    place.counted(1);
    (place, client)
}

fn start(client: &TaskClient, id: &str) {
    let request = StartRequest {
        id: id.to_owned(),
        ..StartRequest::default()
    };
    client.start(patient(), &request).unwrap();
}

fn state(client: &TaskClient, id: &str) -> Status {
    let request = StateRequest {
        id: id.to_owned(),
        ..StateRequest::default()
    };
    let state = client.state(patient(), &request).unwrap();
    state.status.enum_value().unwrap()
}

fn ended(client: &TaskClient, id: &str) -> u32 {
    let request = WaitRequest {
        id: id.to_owned(),
        ..WaitRequest::default()
    };
    client.wait(patient(), &request).unwrap().exit_status
}

fn delete(client: &TaskClient, id: &str) {
    let request = DeleteRequest {
        id: id.to_owned(),
        ..DeleteRequest::default()
    };
    client.delete(patient(), &request).unwrap();
}

fn checkpoint(id: &str, path: &Path, exit: bool) -> CheckpointTaskRequest {
    let options = CheckpointOptions {
        exit,
        ..CheckpointOptions::default()
    };
    CheckpointTaskRequest {
        id: id.to_owned(),
        path: path.display().to_string(),
        options: MessageField::some(Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        }),
        ..CheckpointTaskRequest::default()
    }
}

#[test]
fn a_paused_task_is_saved_and_goes_on_in_another_root() {
    let Some(hull) = Hull::new() else { return };
    let bundle = Bundle::new(&hull, "saved");
    let (_server, heard) = listen(&bundle.events());
    bundle.configure(SPEAK);
    let place = Place::new(&bundle);
    let client = TaskClient::new(start_by_message(&bundle));
    let request = place.request(&bundle, Path::new(""));
    client.create(patient(), &request).unwrap();
    let to = hull.path().join("checkpoint");
    let (_, why) = refusal(client.checkpoint(patient(), &checkpoint("saved", &to, false)));
    assert_eq!(why, "cannot checkpoint a created process");
    start(&client, "saved");
    place.counted(2);
    let pause = PauseRequest {
        id: "saved".to_owned(),
        ..PauseRequest::default()
    };
    client.pause(patient(), &pause).unwrap();
    // Clients make the directory.
    fs::create_dir(&to).unwrap();
    client
        .checkpoint(patient(), &checkpoint("saved", &to, false))
        .unwrap();
    // It is paused as it was: what it has written is what was saved.
    let stood = place.said();
    assert_eq!(state(&client, "saved"), Status::PAUSED);
    let again = refusal(client.checkpoint(patient(), &checkpoint("saved", &to, false)));
    assert!(again.1.contains("it exists"), "{again:?}");
    let copied = Bundle::new(&hull, "copied");
    copied.configure(SPEAK);
    let copy = Place::copied(&copied, &place);
    assert_eq!(place.said(), stood);
    let resume = ResumeRequest {
        id: "saved".to_owned(),
        ..ResumeRequest::default()
    };
    client.resume(patient(), &resume).unwrap();
    let stood = stood.parse().unwrap();
    place.counted(stood + 2);
    let last = hull.path().join("last");
    client
        .checkpoint(patient(), &checkpoint("saved", &last, true))
        .unwrap();
    assert_eq!(ended(&client, "saved"), 137);
    delete(&client, "saved");
    for word in [
        "create",
        "start",
        "paused",
        "checkpointed",
        "resumed",
        "checkpointed",
        "exit",
    ] {
        let topic = heard.recv_timeout(crate::calls::PATIENCE).unwrap();
        assert_eq!(topic, format!("/tasks/{word}"));
    }
    shut_down(&client, &bundle, "saved");
    goes_on(&copied, &copy, &to, stood);
}

/// A copy of a task that had counted so far: it waits to be started, goes on, hears and ends.
fn goes_on(bundle: &Bundle<'_>, place: &Place, checkpoint: &Path, stood: u64) {
    let client = TaskClient::new(start_by_message(bundle));
    let request = place.request(bundle, checkpoint);
    client.create(patient(), &request).unwrap();
    // Whoever unpacked it may remove it now.
    fs::remove_dir_all(checkpoint).unwrap();
    assert_eq!(state(&client, "copied"), Status::CREATED);
    let count = |place: &Place| fs::read_to_string(place.root.join("count")).unwrap();
    let before = count(place);
    start(&client, "copied");
    let now = place.counted(stood);
    assert!(now < stood + 1000);
    assert!(count(place) != before);
    fs::write(place.root.join("go"), "").unwrap();
    let mut stdin = File::options().write(true).open(&place.stdin).unwrap();
    stdin.write_all(b"a line\n").unwrap();
    assert_eq!(ended(&client, "copied"), 9);
    assert_eq!(place.said(), "got a line");
    delete(&client, "copied");
    shut_down(&client, bundle, "copied");
}

/// A way to spoil a checkpoint or what is to go on from it, and the words that tell of it.
type Harm = (&'static str, fn(&Bundle<'_>, &Path));

const HARMS: [Harm; 6] = [
    ("no such checkpoint", |_, from| {
        fs::remove_file(from.join("guest")).unwrap()
    }),
    ("it was cut", |_, from| {
        let file = File::options()
            .write(true)
            .open(from.join("guest"))
            .unwrap();
        file.set_len(file.metadata().unwrap().len() - 1).unwrap();
    }),
    ("its state was changed", |_, from| {
        let mut options = File::options();
        let file = options.write(true).open(from.join("guest")).unwrap();
        let at = file.metadata().unwrap().len() - 1000;
        file.write_all_at(b"something else", at).unwrap();
    }),
    ("command was", |bundle, _| bundle.configure("true")),
    (
        "\"/count\" of share \"root\" is not what it was",
        |bundle, _| {
            fs::write(bundle.path.join("rootfs/count"), "something else\n").unwrap();
        },
    ),
    ("\"/bin/busybox\" of share \"root\" is gone", |bundle, _| {
        fs::remove_file(bundle.path.join("rootfs/bin/busybox")).unwrap();
    }),
];

#[test]
fn what_does_not_fit_is_refused_and_leaves_nothing() {
    let Some(hull) = Hull::new() else { return };
    let bundle = Bundle::new(&hull, "whole");
    bundle.configure(SPEAK);
    let (place, client) = counting(&bundle);
    let whole = hull.path().join("whole");
    client
        .checkpoint(patient(), &checkpoint("whole", &whole, true))
        .unwrap();
    assert_eq!(ended(&client, "whole"), 137);
    delete(&client, "whole");
    let from = hull.path().join("from");
    for (words, harm) in HARMS {
        fs::create_dir(&from).unwrap();
        fs::copy(whole.join("guest"), from.join("guest")).unwrap();
        let root = bundle.path.join("rootfs");
        let [kept, busybox] = ["count", "bin/busybox"].map(|name| root.join(name));
        let [count, program] =
            [&kept, &busybox].map(|path| bundle.path.join(path.file_name().unwrap()));
        for (from, to) in [(&kept, &count), (&busybox, &program)] {
            let copy = ["cp", "-a", from.to_str().unwrap(), to.to_str().unwrap()];
            Process::new(copy).output().ok();
        }
        harm(&bundle, &from);
        let (code, why) = refusal(client.create(patient(), &place.request(&bundle, &from)));
        assert!(why.contains(words), "{words}: {why}");
        assert_eq!(code, Code::UNKNOWN);
        fs::rename(&count, &kept).unwrap();
        fs::rename(&program, &busybox).unwrap();
        bundle.configure(SPEAK);
        fs::remove_dir_all(&from).unwrap();
        let left = hull.path().join("hull-containerd/ns/containers");
        assert_eq!(fs::read_dir(left).unwrap().count(), 0, "after {words}");
    }
    // `hull` itself has no bundle to go on in.
    let words = ["run", "--from", whole.to_str().unwrap()];
    let said = hull.cmd(words).output();
    assert!(
        said.errors().contains("of an engine's container"),
        "{said:?}"
    );
    shut_down(&client, &bundle, "whole");
}

#[test]
fn whoever_is_killed_while_it_saves_nothing_is_left() {
    let Some(hull) = Hull::new() else { return };
    for (id, program) in [("by-shim", SHIM), ("by-monitor", MONITOR)] {
        let bundle = Bundle::new(&hull, id);
        bundle.configure(SPEAK);
        let (_, client) = counting(&bundle);
        let parent = hull.path().join(format!("{id}-checkpoints"));
        fs::create_dir(&parent).unwrap();
        let begun = Instant::now();
        let is_empty = || fs::read_dir(&parent).unwrap().next().is_none();
        let request = checkpoint(id, &parent.join("c"), false);
        std::thread::scope(|scope| {
            let saving = scope.spawn(|| client.checkpoint(patient(), &request));
            while is_empty() {
                assert!(begun.elapsed() < DEADLINE, "nothing was begun");
                std::thread::yield_now();
            }
            kill(program, id);
            let said = saving.join().unwrap();
            assert!(said.is_err() || parent.join("c").exists());
        });
        while !is_empty() && !parent.join("c").exists() {
            assert!(begun.elapsed() < DEADLINE, "something is left");
            std::thread::yield_now();
        }
        let words = ["-bundle", bundle.path.to_str().unwrap(), "delete"];
        if program == MONITOR {
            assert_eq!(ended(&client, id), 137);
            delete(&client, id);
            shut_down(&client, &bundle, id);
        } else {
            let deleted = bundle.shim(&words).output();
            assert_eq!(deleted.code, 0, "{:?}", deleted.all());
        }
        let left = hull.path().join("hull-containerd/ns/containers");
        assert_eq!(fs::read_dir(left).unwrap().count(), 0, "of {id}");
    }
}
