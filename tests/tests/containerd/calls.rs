//! The shim called as containerd calls it, by whoever listens to its events: bad bundles, calls
//! out of place, the newer start and service, and events while nobody hears them.

use std::fs;
use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use containerd_shim_protos::api::{
    CreateTaskRequest, DeleteRequest, DeleteResponse, Empty, ForwardRequest, KillRequest, Mount,
    ShutdownRequest, StartRequest, StateRequest, StatsRequest, UpdateTaskRequest, WaitRequest,
};
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::ttrpc::context::Context;
use containerd_shim_protos::ttrpc::{self, Code, Server, TtrpcContext};
use containerd_shim_protos::{Client, Events, TaskClient, create_events};
use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::Process;
use serde_json::json;
use tempfile::TempDir;

use crate::daemon::socket;
use crate::kills::{SHIM, kill};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Who hears events.
struct Ear(Mutex<Sender<String>>);

impl Events for Ear {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let topic = request.envelope.topic.clone();
        let _heard = self.0.lock().unwrap().send(topic);
        Ok(Empty::default())
    }
}

pub(crate) fn listen(path: &Path) -> (Server, Receiver<String>) {
    let _stale = fs::remove_file(path);
    let (sender, heard) = mpsc::channel();
    let listener = UnixListener::bind(path).unwrap();
    let mut server = Server::new()
        .add_listener(listener.into_raw_fd())
        .unwrap()
        .register_service(create_events(Arc::new(Ear(Mutex::new(sender)))));
    server.start().unwrap();
    (server, heard)
}

/// A bundle, and the shim that is started in it.
pub(crate) struct Bundle<'a> {
    hull: &'a Hull,
    pub(crate) id: &'static str,
    pub(crate) path: PathBuf,
    /// Where events are heard: the server of that is not Hull's to leave.
    ear: TempDir,
}

impl<'a> Bundle<'a> {
    pub(crate) fn new(hull: &'a Hull, id: &'static str) -> Self {
        let path = hull.path().join("bundles").join(id);
        fs::create_dir_all(&path).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, path.join("log"), 0o600.into()).unwrap();
        fs::write(hull.path().join("config.toml"), "").unwrap();
        Self {
            hull,
            id,
            path,
            ear: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn configure(&self, script: &str) {
        let config = json!({
            "ociVersion": "1.0.2",
            "root": {"path": "rootfs"},
            "process": {"cwd": "/", "args": ["sh", "-c", script], "env": ["PATH=/bin"],
                "user": {"uid": 0, "gid": 0}},
            "mounts": [{"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}],
            "linux": {},
        });
        fs::write(self.path.join("config.json"), config.to_string()).unwrap();
    }

    fn at(&self, name: &str) -> String {
        self.hull.path().join(name).display().to_string()
    }

    pub(crate) fn events(&self) -> PathBuf {
        self.ear.path().join("events")
    }

    pub(crate) fn shim(&self, words: &[&str]) -> Process {
        let program = self
            .hull
            .program()
            .with_file_name("containerd-shim-hull-v2");
        let program = program.display().to_string();
        let address = self.at("c.sock");
        let known = ["-namespace", "ns", "-id", self.id, "-address", &address];
        Process::new([&[program.as_str()], &known[..], words].concat())
            .cwd(&self.path)
            .env("HULL_CONFIG", self.at("config.toml"))
            .env("HULL_STATE_DIR", self.at("state"))
            .env("HULL_RUN_DIR", self.at("run"))
            .env("TTRPC_ADDRESS", self.events().display().to_string())
    }

    fn start(&self) -> TaskClient {
        let address = self
            .shim(&["start"])
            .env("MAX_SHIM_VERSION", "2")
            .output()
            .ok();
        assert_eq!(address, format!("unix://{}", self.socket().display()));
        TaskClient::new(Client::connect(&address).unwrap())
    }

    pub(crate) fn socket(&self) -> PathBuf {
        socket(&self.at("c.sock"), "ns", self.id)
    }

    pub(crate) fn request(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.to_owned(),
            bundle: self.path.display().to_string(),
            ..CreateTaskRequest::default()
        }
    }
}

pub(crate) fn patient() -> Context {
    ttrpc::context::with_duration(PATIENCE)
}

pub(crate) fn refusal<T: std::fmt::Debug>(result: ttrpc::Result<T>) -> (Code, String) {
    match result.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message().to_owned()),
        other => panic!("{other:?}"),
    }
}

pub(crate) fn shut_down(client: &TaskClient, bundle: &Bundle<'_>, id: &str) {
    let request = ShutdownRequest {
        id: id.to_owned(),
        ..ShutdownRequest::default()
    };
    // The shim may be gone before its answer is read.
    let _gone = client.shutdown(patient(), &request);
    let deleted = bundle
        .shim(&["-bundle", bundle.path.to_str().unwrap(), "delete"])
        .output();
    assert_eq!(deleted.code, 0, "{:?}", deleted.all());
    let answer = DeleteResponse::parse_from_bytes(&deleted.stdout).unwrap();
    assert_eq!(answer.exit_status, 137);
    assert!(!bundle.socket().exists());
}

#[test]
fn a_bad_bundle_is_refused_with_the_reason() {
    let Some(hull) = Hull::new() else { return };
    let bundle = Bundle::new(&hull, "bad");
    let (_server, heard) = listen(&bundle.events());
    let client = bundle.start();
    let failure = |request: &CreateTaskRequest| {
        let (code, words) = refusal(client.create(patient(), request));
        assert!(words.starts_with("OCI runtime create failed: "), "{words}");
        assert_eq!(code, Code::UNKNOWN);
        words
    };
    let words = failure(&bundle.request());
    assert!(words.contains("config.json not found"), "{words}");
    fs::write(bundle.path.join("config.json"), "{").unwrap();
    let words = failure(&bundle.request());
    assert!(words.contains("is no OCI runtime configuration"), "{words}");
    bundle.configure("true");
    let words = failure(&bundle.request());
    assert!(words.contains("cannot use rootfs"), "{words}");
    let mut request = bundle.request();
    request.rootfs.push(Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec!["lowerdir=/no/such".to_owned()],
        ..Mount::default()
    });
    let words = failure(&request);
    assert!(
        words.contains("cannot mount rootfs component overlay"),
        "{words}"
    );
    let state = StateRequest {
        id: "bad".to_owned(),
        ..StateRequest::default()
    };
    let (code, words) = refusal(client.state(patient(), &state));
    assert_eq!(
        (code, words.as_str()),
        (Code::NOT_FOUND, "container not created: not found")
    );
    shut_down(&client, &bundle, "bad");
    assert_eq!(heard.try_iter().count(), 0);
}

#[test]
fn delete_clears_the_socket_of_a_shim_that_died_before_anybody_called_it() {
    let Some(hull) = Hull::new() else { return };
    let bundle = Bundle::new(&hull, "uncalled");
    // What starts it may have been killed, too, before it could say where it listens.
    for is_said in [true, false] {
        bundle.shim(&["start"]).output().ok();
        kill(SHIM, "uncalled");
        assert!(bundle.socket().exists());
        if !is_said {
            fs::remove_file(bundle.path.join("address")).unwrap();
        }
        let delete = ["-bundle", bundle.path.to_str().unwrap(), "delete"];
        assert_eq!(bundle.shim(&delete).output().code, 0);
        assert!(!bundle.socket().exists(), "said: {is_said}");
    }
}

/// Starts a shim by a message on stdin.
pub(crate) fn start_by_message(bundle: &Bundle<'_>) -> Client {
    let params = BootstrapParams {
        instance_id: bundle.id.to_owned(),
        namespace: "ns".to_owned(),
        containerd_ttrpc_address: bundle.events().display().to_string(),
        containerd_grpc_address: bundle.at("c.sock"),
        ..BootstrapParams::default()
    };
    let input = params.write_to_bytes().unwrap();
    let started = bundle.shim(&["start"]).stdin(input).output();
    let result = BootstrapResult::parse_from_bytes(&started.stdout).unwrap();
    assert_eq!((result.version, result.protocol.as_str()), (3, "ttrpc"));
    Client::connect(&result.address).unwrap()
}

/// Runs it to its end, which is `go`'s to begin, with calls that come too early and too late; what
/// its end was.
fn live(client: &TaskClient, request: &CreateTaskRequest, go: impl FnOnce()) -> u32 {
    let id = request.id.clone();
    let created = client.create(patient(), request).unwrap();
    assert_eq!(
        refusal(client.create(patient(), request)).0,
        Code::ALREADY_EXISTS
    );
    let start = StartRequest {
        id: id.clone(),
        ..StartRequest::default()
    };
    assert_eq!(client.start(patient(), &start).unwrap().pid, created.pid);
    let stats = StatsRequest {
        id: id.clone(),
        ..StatsRequest::default()
    };
    let limit = |client: &TaskClient| {
        let stats = client.stats(patient(), &stats).unwrap().stats.unwrap();
        assert_eq!(stats.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&stats.value).unwrap();
        assert!(metrics.pids.current > 0 && metrics.memory.usage > 0);
        metrics.pids.limit
    };
    assert_eq!(limit(client), u64::MAX);
    let update = UpdateTaskRequest {
        id: id.clone(),
        resources: MessageField::some(Any {
            value: br#"{"pids": {"limit": 77}}"#.to_vec(),
            ..Any::default()
        }),
        ..UpdateTaskRequest::default()
    };
    client.update(patient(), &update).unwrap();
    assert_eq!(limit(client), 77);
    go();
    let wait = WaitRequest {
        id: id.clone(),
        ..WaitRequest::default()
    };
    let code = client.wait(patient(), &wait).unwrap().exit_status;
    let (_, words) = refusal(client.start(patient(), &start));
    assert_eq!(words, "cannot start a stopped process");
    let kill = KillRequest {
        id,
        signal: 15,
        ..KillRequest::default()
    };
    let gone = "process already finished: not found".to_owned();
    let refused = refusal(client.kill(patient(), &kill));
    assert_eq!(refused, (Code::NOT_FOUND, gone));
    code
}

#[test]
fn calls_have_their_places_and_events_wait_to_be_heard() {
    let Some(hull) = Hull::new() else { return };
    let bundle = Bundle::new(&hull, "good");
    bundle.configure("until [ -e /go ]; do sleep 0.1; done; exit 9");
    let tree = hull.path().join("tree");
    Image::new().unpack(&tree);
    let client = TaskClient::new(start_by_message(&bundle));
    let mut request = bundle.request();
    request.rootfs.push(Mount {
        type_: "bind".to_owned(),
        source: tree.display().to_string(),
        options: vec!["rbind".to_owned(), "ro".to_owned()],
        ..Mount::default()
    });
    let go = || fs::write(tree.join("go"), "").unwrap();
    assert_eq!(live(&client, &request, go), 9);
    // Nobody has heard anything until now.
    let (_server, heard) = listen(&bundle.events());
    for word in ["create", "start", "exit"] {
        let topic = heard.recv_timeout(PATIENCE).unwrap();
        assert_eq!(topic, format!("/tasks/{word}"));
    }
    let delete = DeleteRequest {
        id: "good".to_owned(),
        ..DeleteRequest::default()
    };
    assert_eq!(client.delete(patient(), &delete).unwrap().exit_status, 9);
    let again = refusal(client.delete(patient(), &delete));
    assert_eq!(again.0, Code::NOT_FOUND);
    assert_eq!(heard.recv_timeout(PATIENCE).unwrap(), "/tasks/delete");
    shut_down(&client, &bundle, "good");
}
