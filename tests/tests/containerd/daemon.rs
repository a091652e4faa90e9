//! A containerd of a test's own, its state below that of a Hull.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::{DEADLINE, Output, Process, Running};
use rustix::process::Signal;

/// The image that is imported, as containerd names it.
pub(crate) const IMAGE: &str = "docker.io/library/busybox:test";
/// Where shims listen.
const SOCKETS: &str = "/run/containerd/s";
/// Where `ctr` wants the cgroups of the containers of its namespace.
const CGROUPS: &str = "/sys/fs/cgroup/default";
/// How long a containerd may live whose test doesn't end it.
const LIFE: Duration = Duration::from_secs(900);
const STEP: Duration = Duration::from_millis(300);

/// A containerd that runs.
pub(crate) struct Daemon<'a> {
    hull: &'a Hull,
    running: Option<Running>,
    ids: RefCell<Vec<String>>,
}

impl<'a> Daemon<'a> {
    /// Starts one and imports the image.
    pub(crate) fn new(hull: &'a Hull) -> Self {
        let at = |name: &str| hull.path().join(name).display().to_string();
        // A machine of a million instructions a second takes its time.
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{}\"\n[ttrpc]\naddress = \"{}\"\n[timeouts]\n\
             \"io.containerd.timeout.shim.cleanup\" = \"60s\"\n\
             \"io.containerd.timeout.shim.load\" = \"60s\"\n\
             \"io.containerd.timeout.shim.shutdown\" = \"30s\"\n\
             \"io.containerd.timeout.task.state\" = \"30s\"\n",
            at("root"),
            at("tasks"),
            at("c.sock"),
            at("c.ttrpc"),
        );
        fs::write(hull.path().join("containerd.toml"), config).unwrap();
        fs::write(hull.path().join("config.toml"), "").unwrap();
        let mut daemon = Self {
            hull,
            running: None,
            ids: RefCell::default(),
        };
        daemon.start();
        let archive = hull.path().join("image.tar");
        Image::new().save(&archive);
        let archive = archive.display().to_string();
        daemon.ctr(&["image", "import", &archive]).output().ok();
        daemon
    }

    /// Starts it, or starts it again.
    pub(crate) fn start(&mut self) {
        let programs = self.hull.program().parent().unwrap().display().to_string();
        let path = std::env::var("PATH").unwrap();
        let script = "exec containerd -c \"$0/containerd.toml\" >> \"$0/containerd.log\" 2>&1";
        let directory = self.hull.path().display().to_string();
        let running = Process::new(["sh", "-c", script, &directory])
            .env("PATH", format!("{programs}:{path}"))
            .env("HULL_CONFIG", self.at("config.toml"))
            .env("HULL_STATE_DIR", self.at("state"))
            .env("HULL_RUN_DIR", self.at("run"))
            .deadline(LIFE)
            .spawn();
        self.running = Some(running);
        let until = Instant::now() + DEADLINE;
        while self.ctr(&["version"]).output().code != 0 {
            assert!(Instant::now() < until, "no containerd: {}", self.log());
        }
    }

    /// Kills it.
    pub(crate) fn kill(&mut self) {
        let running = self.running.take().unwrap();
        running.signal(Signal::KILL);
        let _killed = running.wait();
    }

    fn at(&self, name: &str) -> String {
        self.hull.path().join(name).display().to_string()
    }

    /// `ctr` with these words.
    pub(crate) fn ctr(&self, words: &[&str]) -> Process {
        let address = self.at("c.sock");
        let argv = [&["ctr", "--address", &address], words].concat();
        Process::new(argv)
    }

    /// Runs a container, with flags and the image's name and command in `words`.
    pub(crate) fn run(&self, id: &str, flags: &[&str], command: &[&str]) -> Process {
        self.ids.borrow_mut().push(id.to_owned());
        let runtime = match id.contains("runc") {
            true => "io.containerd.runc.v2",
            false => "io.containerd.hull.v2",
        };
        let begin = ["run", "--runtime", runtime];
        self.ctr(&[&begin, flags, &[IMAGE, id], command].concat())
    }

    /// Runs one in the background.
    pub(crate) fn run_detached(&self, id: &str, script: &str) {
        let done = self.run(id, &["-d"], &["sh", "-c", script]).output();
        assert_eq!(done.code, 0, "{:?}\n{}", done.all(), self.log());
    }

    /// Makes a container of a checkpoint, with `ctr`'s flags.
    pub(crate) fn restore(&self, id: &str, flags: &[&str], checkpoint: &str) -> Process {
        self.ids.borrow_mut().push(id.to_owned());
        let begin = ["container", "restore"];
        self.ctr(&[&begin, flags, &[id, checkpoint]].concat())
    }

    /// Runs a process in one.
    pub(crate) fn exec(&self, id: &str, command: &[&str]) -> Output {
        let begin = ["task", "exec", "--exec-id", "e", id];
        self.ctr(&[&begin, command].concat()).output()
    }

    /// Removes a task and its container.
    pub(crate) fn remove(&self, id: &str) {
        // It may be gone, as after the death of its shim.
        let _gone = self.ctr(&["task", "rm", "-f", id]).output();
        self.ctr(&["container", "rm", id]).output().ok();
    }

    /// Waits until events are heard, and hears them.
    pub(crate) fn events(&self) -> Running {
        let mut events = self.ctr(&["events"]).deadline(LIFE).spawn();
        for number in 0.. {
            let name = format!("heard{number}");
            self.ctr(&["namespaces", "create", &name]).output().ok();
            let heard = events.says_within("heard", STEP);
            self.ctr(&["namespaces", "rm", &name]).output().ok();
            if heard {
                break;
            }
        }
        events
    }

    /// A container's state in `task ls`.
    pub(crate) fn state(&self, id: &str) -> Option<String> {
        let listed = self.ctr(&["task", "ls"]).output().ok();
        let mut lines = listed.lines().map(str::split_whitespace);
        let line = lines.find(|line| line.clone().next() == Some(id));
        line.and_then(|mut line| line.nth(2)).map(str::to_owned)
    }

    /// Its bundle.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        let tasks = self.hull.path().join("tasks/io.containerd.runtime.v2.task");
        tasks.join("default").join(id)
    }

    /// What containerd and its shims have said.
    pub(crate) fn log(&self) -> String {
        let log = fs::read(self.hull.path().join("containerd.log")).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).into_owned();
        let lines: Vec<&str> = log
            .lines()
            .filter(|line| !line.contains("plugin"))
            .collect();
        lines.join("\n")
    }

    /// Nothing is left of any container.
    pub(crate) fn check(&self) {
        let left = self.ctr(&["containers", "ls", "-q"]).output().ok();
        assert_eq!(left, "", "{}", self.log());
        for id in self.ids.borrow().iter() {
            let bundle = self.bundle(id);
            assert!(!bundle.exists(), "{} is left", bundle.display());
            let socket = self.socket(id);
            assert!(!socket.exists(), "{} of {id} is left", socket.display());
            let cgroup = Path::new(CGROUPS).join(id);
            assert!(!cgroup.exists(), "{} is left", cgroup.display());
        }
        let root = self.hull.path().join("hull-containerd/default");
        for directory in ["containers", "names", "run"] {
            let Ok(entries) = fs::read_dir(root.join(directory)) else {
                continue;
            };
            let mut names = entries.flatten().map(|entry| entry.file_name());
            let left = names.find(|name| name != "mnt");
            assert_eq!(left, None, "left in {directory}");
        }
    }

    /// Where the shim of a container listens: containerd's rule.
    fn socket(&self, id: &str) -> PathBuf {
        socket(&self.at("c.sock"), "default", id)
    }
}

/// How the event of a container's exit begins.
pub(crate) fn exit_of(id: &str) -> String {
    format!("/tasks/exit {{\"container_id\":\"{id}\",\"id\":\"{id}\"")
}

/// Where the shim of a container listens: containerd's rule.
pub(crate) fn socket(address: &str, namespace: &str, id: &str) -> PathBuf {
    let about = format!("{address}/{namespace}/{id}");
    let sum = Process::new(["sha256sum"]).stdin(about).output().ok();
    Path::new(SOCKETS).join(sum.split_whitespace().next().unwrap())
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // For whoever reads of the failure.
            eprintln!("containerd said:\n{}", self.log());
            for id in self.ids.borrow().iter() {
                let _gone = self.ctr(&["task", "rm", "-f", id]).output();
            }
        }
    }
}
