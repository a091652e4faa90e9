//! An agent under test: the real binary as a plain process, spoken to as the monitor would.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::needless_pass_by_value,
    reason = "a test that can't go on is a test that failed"
)]

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::symlink;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use hull_proto::{
    ContainerStart, Decoder, ExecStart, ExitStatus, Failure, Frame, Hello, LineDecoder,
    MAX_FROM_GUEST, OciJson, Reply, Request, Spawn,
};
use rustix::io::FdFlags;
use serde_json::{Value, json};

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

/// An agent and a root directory for its containers.
pub(crate) struct Guest {
    agent: Child,
    control: UnixStream,
    lines: LineDecoder,
    socket: PathBuf,
    dir: tempfile::TempDir,
}

/// How a process went.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) end: Result<ExitStatus, Failure>,
}

impl Outcome {
    /// Standard output as text, of a process that ended well.
    pub(crate) fn text(&self) -> String {
        assert_eq!(
            self.end,
            Ok(ExitStatus::Exited(0)),
            "stderr: {}",
            String::from_utf8_lossy(&self.stderr)
        );
        String::from_utf8(self.stdout.clone()).unwrap()
    }

    /// Why it was not started.
    pub(crate) fn failure(self) -> Failure {
        self.end.unwrap_err()
    }
}

impl Guest {
    /// Starts an agent; `None`, said aloud, where that's impossible.
    pub(crate) fn start() -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: running containers takes root");
            return None;
        }
        let Some(busybox) = ["/bin/busybox", "/usr/bin/busybox"]
            .into_iter()
            .find(|path| Path::new(path).exists())
        else {
            eprintln!("SKIP: no busybox here (Debian: busybox-static)");
            return None;
        };
        let dir = tempfile::tempdir().unwrap();
        make_root(&dir.path().join("root"), busybox);
        let socket = dir.path().join("processes");
        let listener = UnixListener::bind(&socket).unwrap();
        let (control, agents_end) = UnixStream::pair().unwrap();
        for fd in [listener.as_fd(), agents_end.as_fd()] {
            rustix::io::fcntl_setfd(fd, FdFlags::empty()).unwrap();
        }
        let agent = Command::new(env!("CARGO_BIN_EXE_hull-agent"))
            .args(["--listen-fd", &listener.as_raw_fd().to_string()])
            .args(["--control-fd", &agents_end.as_raw_fd().to_string()])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut guest = Self {
            agent,
            control,
            lines: LineDecoder::default(),
            socket,
            dir,
        };
        let hello: Hello = guest.hear();
        assert_eq!(hello.generation, hull_proto::GENERATION);
        Some(guest)
    }

    fn hear<T: serde::de::DeserializeOwned>(&mut self) -> T {
        loop {
            if let Some(message) = self.lines.take().unwrap() {
                return message;
            }
            let mut bytes = [0; 4096];
            let count = read(&mut self.control, &mut bytes);
            assert!(count > 0, "the agent closed the control stream");
            self.lines.feed(&bytes[..count]);
        }
    }

    /// Asks for something on the control stream.
    pub(crate) fn ask(&mut self, request: &Request) -> Reply {
        let mut line = Vec::new();
        hull_proto::encode_line(request, &mut line).unwrap();
        self.control.write_all(&line).unwrap();
        self.hear()
    }

    /// The root directory of the containers.
    pub(crate) fn root(&self) -> PathBuf {
        self.dir.path().join("root")
    }

    /// A directory beside the root.
    pub(crate) fn beside(&self, name: &str) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// The agent's process id.
    pub(crate) fn agent_pid(&self) -> u32 {
        self.agent.id()
    }

    /// A spec as an engine writes one, that runs a shell script.
    pub(crate) fn spec(&self, script: &str) -> Value {
        spec(&self.root(), &["sh", "-c", script])
    }

    /// A new process stream.
    pub(crate) fn connect(&self) -> Stream {
        let stream = UnixStream::connect(&self.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Stream {
            stream,
            decoder: Decoder::new(MAX_FROM_GUEST),
        }
    }

    /// Asks for a container of this name.
    pub(crate) fn create(&self, id: &str, spec: Value, init: bool) -> Stream {
        self.spawn(ContainerStart {
            id: id.into(),
            spec: OciJson::write(&spec).unwrap(),
            init,
            hold: false,
        })
    }

    /// Asks for a container whose command is to wait.
    pub(crate) fn hold(&self, id: &str, spec: Value) -> Stream {
        self.spawn(ContainerStart {
            id: id.into(),
            spec: OciJson::write(&spec).unwrap(),
            init: false,
            hold: true,
        })
    }

    fn spawn(&self, start: ContainerStart) -> Stream {
        let mut stream = self.connect();
        stream.send(&Frame::Spawn(Spawn::Container(Box::new(start))));
        stream
    }

    /// Asks for a container of a new name.
    pub(crate) fn begin(&self, spec: Value) -> Stream {
        self.create(&fresh_name(), spec, false)
    }

    /// Runs a container to its end.
    pub(crate) fn run(&self, spec: Value) -> Outcome {
        self.begin(spec).finish()
    }

    /// Asks for another process in a container.
    pub(crate) fn exec(&self, id: &str, process: Value) -> Stream {
        let mut stream = self.connect();
        stream.send(&Frame::Spawn(Spawn::Exec(Box::new(ExecStart {
            id: id.into(),
            process: OciJson::write(&process).unwrap(),
        }))));
        stream
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // At the end of its control stream the agent ends its containers and itself.
        let _ = self.control.shutdown(Shutdown::Both);
        let _ = self.agent.wait();
    }
}

/// Reads some, in time; an interrupted call is only tried again.
fn read(stream: &mut UnixStream, bytes: &mut [u8]) -> usize {
    loop {
        match stream.read(bytes) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other.expect("an answer in time"),
        }
    }
}

/// A name that no other test's container has: tests share the machine's cgroups.
pub(crate) fn fresh_name() -> String {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("hull-test-{}-{number}", std::process::id())
}

/// The host's end of a process stream.
pub(crate) struct Stream {
    stream: UnixStream,
    decoder: Decoder,
}

impl Stream {
    /// Says something.
    pub(crate) fn send(&mut self, frame: &Frame) {
        self.try_send(frame).unwrap();
    }

    /// Says something that the agent may not want to hear any more.
    pub(crate) fn try_send(&mut self, frame: &Frame) -> std::io::Result<()> {
        let mut bytes = Vec::new();
        hull_proto::encode(frame, &mut bytes).unwrap();
        self.stream.write_all(&bytes)
    }

    /// Hears the next frame; `None` at the stream's end.
    pub(crate) fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.take().unwrap() {
                return Some(frame);
            }
            let mut bytes = [0; 65536];
            let count = read(&mut self.stream, &mut bytes);
            if count == 0 {
                return None;
            }
            self.decoder.feed(&bytes[..count]);
        }
    }

    /// Waits until the process runs and returns its id.
    pub(crate) fn started(&mut self) -> u32 {
        match self.next() {
            Some(Frame::Started { pid }) => pid,
            other => panic!("not started: {other:?}"),
        }
    }

    /// Reads output until it contains `text`.
    pub(crate) fn read_until(&mut self, text: &str) -> String {
        let mut seen = Vec::new();
        loop {
            match self.next() {
                Some(Frame::Stdout(data)) => seen.extend(data),
                Some(Frame::Started { .. } | Frame::StdinAck(_)) => {}
                other => panic!("{other:?} after {:?}", String::from_utf8_lossy(&seen)),
            }
            let seen = String::from_utf8_lossy(&seen);
            if seen.contains(text) {
                return seen.into_owned();
            }
        }
    }

    /// Reads to the last frame.
    pub(crate) fn finish(mut self) -> Outcome {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let end = loop {
            match self.next().expect("a last frame") {
                Frame::Started { .. } | Frame::StdinAck(_) | Frame::OomKilled { .. } => {}
                Frame::Stdout(data) => stdout.extend(data),
                Frame::Stderr(data) => stderr.extend(data),
                Frame::Exited(status) => break Ok(status),
                Frame::Failed(failure) => break Err(failure),
                other => panic!("{other:?} from the agent"),
            }
        };
        assert_eq!(self.next(), None, "a frame after the last");
        Outcome {
            stdout,
            stderr,
            end,
        }
    }
}

/// Copies a program, by another process: a child that another test forks has whatever this one
/// has open for writing, and nobody can execute that (execve(2), `ETXTBSY`).
pub(crate) fn install(from: &Path, to: &Path) {
    let mut command = Command::new("install");
    let installed = command.args(["-m", "755"]).args([from, to]).status();
    assert!(installed.unwrap().success());
}

fn make_root(root: &Path, busybox: &str) {
    for dir in ["bin", "etc", "tmp", "proc", "sys", "dev", "home/app"] {
        fs::create_dir_all(root.join(dir)).unwrap();
    }
    install(Path::new(busybox), &root.join("bin/busybox"));
    let list = Command::new(busybox).arg("--list").output().unwrap();
    for name in String::from_utf8(list.stdout).unwrap().lines() {
        if name != "busybox" {
            symlink("busybox", root.join("bin").join(name)).unwrap();
        }
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:/bin/sh\n";
    let group = "root:x:0:\napp:x:1001:\nstaff:x:50:app\naudio:x:63:app\n";
    fs::write(root.join("etc/passwd"), passwd).unwrap();
    fs::write(root.join("etc/group"), group).unwrap();
}

/// A process as an engine describes one.
pub(crate) fn process(args: &[&str]) -> Value {
    let capabilities = json!([
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_NET_RAW",
        "CAP_SYS_CHROOT",
        "CAP_MKNOD"
    ]);
    json!({
        "args": args,
        "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
        "cwd": "/",
        "user": {"uid": 0, "gid": 0},
        "capabilities": {"bounding": capabilities, "effective": capabilities,
            "permitted": capabilities},
    })
}

fn spec(root: &Path, args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": process(args),
        "root": {"path": root},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
                "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["ro", "nosuid", "noexec", "nodev"]},
        ],
        "linux": {
            "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"}],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi",
                "/sys/firmware", "/proc/acpi"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys",
                "/proc/sysrq-trigger"],
        },
    })
}
