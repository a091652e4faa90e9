//! A sandbox asked for by name, as containerd 2.3 and later do it: one shim is started, by message,
//! and later containers come to it without a start of their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Instant;

use containerd_shim_protos::api::{
    ConnectRequest, CreateTaskRequest, DeleteRequest, DeleteResponse, Mount, StartRequest,
    WaitRequest,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, PingRequest, SandboxStatusRequest, ShutdownSandboxRequest,
    StartSandboxRequest, StopSandboxRequest, WaitSandboxRequest,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::{Client, TaskClient};
use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::Process;
use rustix::process::{Pid, Signal, kill_process};

use super::calls::{Bundle, PATIENCE, patient, refusal, start_by_message};

/// A sandbox that runs, and its containers.
struct Pod<'a> {
    hull: &'a Hull,
    bundle: Bundle<'a>,
    calls: SandboxClient,
    tasks: TaskClient,
    tree: PathBuf,
}

impl<'a> Pod<'a> {
    fn new(hull: &'a Hull) -> Self {
        let bundle = Bundle::new(hull, "box");
        fs::create_dir_all(bundle.path.join("rootfs")).unwrap();
        let tree = hull.path().join("tree");
        Image::new().unpack(&tree);
        let client: Client = start_by_message(&bundle);
        let calls = SandboxClient::new(client.clone());
        let mut create = CreateSandboxRequest::default();
        "box".clone_into(&mut create.sandbox_id);
        create.bundle_path = bundle.path.display().to_string();
        calls.create_sandbox(patient(), &create).unwrap();
        let refused = refusal(calls.create_sandbox(patient(), &create));
        assert_eq!(refused.0, Code::ALREADY_EXISTS);
        let mut start = StartSandboxRequest::default();
        "box".clone_into(&mut start.sandbox_id);
        let started = calls.start_sandbox(patient(), &start).unwrap();
        assert!(started.pid > 0 && started.created_at.is_some());
        Self {
            hull,
            bundle,
            calls,
            tasks: TaskClient::new(client),
            tree,
        }
    }

    /// Runs a container of it that says which machine it is in; containerd makes its bundle, and
    /// no more.
    fn start(&self, id: &'static str) -> String {
        let bundle = Bundle::new(self.hull, id);
        bundle.configure(&format!(
            "cat /proc/sys/kernel/random/boot_id > /new; mv /new /{id}; sleep 9999"
        ));
        let request = CreateTaskRequest {
            rootfs: vec![Mount {
                type_: "bind".to_owned(),
                source: self.tree.display().to_string(),
                options: vec!["rbind".to_owned(), "rw".to_owned()],
                ..Mount::default()
            }],
            ..bundle.request()
        };
        self.tasks.create(patient(), &request).unwrap();
        let start = StartRequest {
            id: id.to_owned(),
            ..StartRequest::default()
        };
        self.tasks.start(patient(), &start).unwrap();
        let said = self.tree.join(id);
        until(|| said.exists());
        fs::read_to_string(said).unwrap()
    }

    fn state(&self) -> String {
        let mut ask = SandboxStatusRequest::default();
        "box".clone_into(&mut ask.sandbox_id);
        self.calls.sandbox_status(patient(), &ask).unwrap().state
    }

    fn check(&self) {
        let root = self.hull.path().join("hull-containerd/ns");
        for directory in ["containers", "names", "run"] {
            let entries = fs::read_dir(root.join(directory)).into_iter().flatten();
            let mut names = entries.flatten().map(|entry| entry.file_name());
            let left = names.find(|name| name != "mnt");
            assert_eq!(left, None, "left in {directory}");
        }
        assert!(!self.bundle.socket().exists());
        let bundles = self.hull.path().join("bundles").display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&bundles), "{mounts}");
        // The shim ends when it has answered.
        let own = self.hull.path().display().to_string();
        let processes = || Process::new(["ps", "-eo", "args"]).output().ok();
        until(|| !processes().contains(&own));
        // Containerd removes an empty directory, and only that.
        fs::remove_dir(self.bundle.path.join("rootfs")).unwrap();
    }
}

fn until(reached: impl Fn() -> bool) {
    let limit = Instant::now() + PATIENCE;
    while !reached() {
        assert!(Instant::now() < limit);
        thread::yield_now();
    }
}

#[test]
fn a_sandbox_lives_and_ends_with_its_containers() {
    let Some(hull) = Hull::new() else { return };
    let sandbox = Pod::new(&hull);
    assert_eq!(sandbox.start("a"), sandbox.start("b"));
    assert_eq!(sandbox.state(), "SANDBOX_READY");
    let mut wait = WaitSandboxRequest::default();
    "box".clone_into(&mut wait.sandbox_id);
    let (calls, early) = (sandbox.calls.clone(), wait.clone());
    let early = thread::spawn(move || calls.wait_sandbox(patient(), &early).unwrap());
    let mut stop = StopSandboxRequest::default();
    "box".clone_into(&mut stop.sandbox_id);
    stop.timeout_secs = 100;
    sandbox.calls.stop_sandbox(patient(), &stop).unwrap();
    let late = sandbox.calls.wait_sandbox(patient(), &wait).unwrap();
    assert_eq!((late.exit_status, late.exited_at.is_some()), (0, true));
    assert_eq!(early.join().unwrap(), late);
    assert_eq!(sandbox.state(), "SANDBOX_NOTREADY");
    let mut ping = PingRequest::default();
    "box".clone_into(&mut ping.sandbox_id);
    let refused = refusal(sandbox.calls.ping_sandbox(patient(), &ping));
    assert_eq!(refused.0, Code::NOT_FOUND);
    sandbox.calls.stop_sandbox(patient(), &stop).unwrap();
    let mut shutdown = ShutdownSandboxRequest::default();
    "box".clone_into(&mut shutdown.sandbox_id);
    sandbox
        .calls
        .shutdown_sandbox(patient(), &shutdown)
        .unwrap();
    // The shim stays for those that are to be removed, and no longer.
    for id in ["a", "b"] {
        let wait = WaitRequest {
            id: id.to_owned(),
            ..WaitRequest::default()
        };
        let ended = sandbox.tasks.wait(patient(), &wait).unwrap();
        assert_ne!(ended.exit_status, 0);
        let delete = DeleteRequest {
            id: id.to_owned(),
            ..DeleteRequest::default()
        };
        sandbox.tasks.delete(patient(), &delete).unwrap();
    }
    assert!(!sandbox.bundle.socket().exists());
    sandbox.check();
}

#[test]
fn delete_clears_a_sandbox_and_its_containers() {
    let Some(hull) = Hull::new() else { return };
    let sandbox = Pod::new(&hull);
    sandbox.start("a");
    let shim = sandbox.tasks.connect(patient(), &ConnectRequest::default());
    let shim = i32::try_from(shim.unwrap().shim_pid).unwrap();
    kill_process(Pid::from_raw(shim).unwrap(), Signal::KILL).unwrap();
    until(|| !Path::new(&format!("/proc/{shim}/exe")).exists());
    let path = sandbox.bundle.path.to_str().unwrap();
    let deleted = sandbox.bundle.shim(&["-bundle", path, "delete"]).output();
    assert_eq!(deleted.code, 0, "{:?}", deleted.all());
    let answer = DeleteResponse::parse_from_bytes(&deleted.stdout).unwrap();
    assert_eq!(answer.exit_status, 137);
    sandbox.check();
}
