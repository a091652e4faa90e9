//! A containerd that serves pods as a kubelet asks for them, its state below that of a Hull.

use std::cell::RefCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::process::{DEADLINE, Process, Running};
use hyper_util::rt::TokioIo;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{
    Container, ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus,
    ContainerStatusRequest, CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, ImageSpec,
    LinuxContainerConfig, LinuxContainerSecurityContext, ListContainersRequest,
    ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    RemoveContainerRequest, RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest,
    StopContainerRequest, StopPodSandboxRequest,
};
use rustix::process::Signal;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};

use super::containerd::{Containerd, IMAGE, ctr, import_images, log, start, write_configuration};

/// Where a node's pods have their cgroups.
const CGROUPS: &str = "hull-pods";

static ALONE: Mutex<()> = Mutex::new(());

/// A node of a cluster, as its kubelet sees it.
pub(crate) struct Node<'a> {
    hull: &'a Hull,
    /// The network, the sockets' directory and the cgroups are everybody's.
    _alone: MutexGuard<'static, ()>,
    containerd: RefCell<Option<Running>>,
    runtime: Runtime,
    ids: RefCell<Vec<String>>,
    path: String,
    pub(crate) client: RuntimeServiceClient<Channel>,
}

impl<'a> Node<'a> {
    /// Starts this machine's containerd and imports the images.
    pub(crate) fn new(hull: &'a Hull) -> Self {
        Self::of(hull, Containerd::Installed)
    }

    /// As [`Self::new`], with the containerd of a release.
    pub(crate) fn of(hull: &'a Hull, whose: Containerd) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        for module in ["bridge", "veth", "tun"] {
            Process::new(["modprobe", module]).output().ok();
        }
        write_configuration(hull, whose);
        let mut path = hull.program().parent().unwrap().display().to_string();
        if let Some(programs) = whose.programs() {
            path = format!("{path}:{}", programs.display());
        }
        let path = format!("{path}:{}", std::env::var("PATH").unwrap());
        let containerd = start(hull, &path);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        import_images(hull, &path);
        let client = runtime.block_on(connect(hull.path().join("c.sock")));
        Self {
            hull,
            _alone: alone,
            containerd: RefCell::new(Some(containerd)),
            runtime,
            ids: RefCell::default(),
            path,
            client,
        }
    }

    /// Kills containerd and starts it again.
    pub(crate) fn restart(&self) {
        let running = self.containerd.take().unwrap();
        running.signal(Signal::KILL);
        let _killed = running.wait();
        *self.containerd.borrow_mut() = Some(start(self.hull, &self.path));
        let until = Instant::now() + DEADLINE;
        let mut client = self.client.clone();
        // The connection is another one.
        let asked = ListPodSandboxRequest::default;
        while let Err(status) = self.runtime.block_on(client.list_pod_sandbox(asked())) {
            assert!(
                Instant::now() < until,
                "{status}\n{}",
                log(self.hull.path())
            );
        }
    }

    /// `ctr` with these words.
    pub(crate) fn ctr(&self, words: &[&str]) -> Process {
        ctr(self.hull, &self.path, words)
    }

    /// Waits for an answer.
    pub(crate) fn wait<T>(
        &self,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> T {
        let limited = async { tokio::time::timeout(DEADLINE, call).await };
        match self.runtime.block_on(limited) {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => panic!("{status}\n{}", log(self.hull.path())),
            Err(_) => panic!("no answer\n{}", log(self.hull.path())),
        }
    }

    /// A directory of the node's own.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.hull.path().join(name)
    }

    /// A pod's configuration, to be changed.
    pub(crate) fn config(&self, name: &str) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: name.to_owned(),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: self.path("logs").join(name).display().to_string(),
            linux: Some(k8s_cri::v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{CGROUPS}/{name}"),
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    /// Runs a pod's sandbox.
    pub(crate) fn run(&self, config: PodSandboxConfig) -> Pod<'_> {
        self.run_by("hull", config)
    }

    /// As [`Self::run`], by the runtime of that name.
    pub(crate) fn run_by(&self, runtime: &str, config: PodSandboxConfig) -> Pod<'_> {
        fs::create_dir_all(&config.log_directory).unwrap();
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: runtime.to_owned(),
        };
        let id = self
            .wait(self.client.clone().run_pod_sandbox(request))
            .pod_sandbox_id;
        self.ids.borrow_mut().push(id.clone());
        Pod {
            node: self,
            id,
            config,
        }
    }

    /// Nothing is left of any pod.
    pub(crate) fn check(&self) {
        let pods = self.wait(
            self.client
                .clone()
                .list_pod_sandbox(ListPodSandboxRequest::default()),
        );
        assert_eq!(pods.items, []);
        let all = ListContainersRequest::default();
        let containers: Vec<Container> = self
            .wait(self.client.clone().list_containers(all))
            .containers;
        assert_eq!(containers, []);
        let root = self.path("hull-containerd/k8s.io");
        for directory in ["containers", "names", "run"] {
            let entries = fs::read_dir(root.join(directory)).into_iter().flatten();
            let mut names = entries.flatten().map(|entry| entry.file_name());
            let left = names.find(|name| name != "mnt");
            assert_eq!(left, None, "left in {directory}");
        }
        let sockets = fs::read_dir("/run/containerd/s").into_iter().flatten();
        assert_eq!(sockets.count(), 0, "sockets of shims");
        let links = Process::new(["ip", "-br", "link"]).output().ok();
        assert!(
            !links.contains("veth") && !links.contains("hull"),
            "{links}"
        );
        let spaces = Process::new(["ip", "netns"]).output().ok();
        assert_eq!(spaces, "");
        let processes = Process::new(["ps", "-eo", "args"]).output().ok();
        for id in self.ids.borrow().iter() {
            assert!(!processes.contains(id), "{processes}");
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains("/rootfs "), "{mounts}");
        let groups = Path::new("/sys/fs/cgroup").join(CGROUPS);
        for pod in fs::read_dir(groups).into_iter().flatten().flatten() {
            let below = fs::read_dir(pod.path()).into_iter().flatten().flatten();
            let mut groups = below.filter(|entry| entry.path().is_dir());
            assert!(groups.next().is_none(), "a cgroup below {:?}", pod.path());
        }
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // For whoever reads of the failure.
            eprintln!("containerd said:\n{}", log(self.hull.path()));
        }
    }
}

/// A pod.
pub(crate) struct Pod<'a> {
    node: &'a Node<'a>,
    pub(crate) id: String,
    config: PodSandboxConfig,
}

impl Pod<'_> {
    /// Makes a container of it and runs it.
    pub(crate) fn start(&self, name: &str, script: &str) -> String {
        self.start_with(name, script, |_| {})
    }

    /// As [`Self::start`], with more to its configuration.
    pub(crate) fn start_with(
        &self,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> String {
        let mut config = ContainerConfig {
            metadata: Some(ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(ImageSpec {
                image: IMAGE.to_owned(),
                ..Default::default()
            }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                security_context: Some(own_pids()),
                ..Default::default()
            }),
            ..Default::default()
        };
        change(&mut config);
        let request = CreateContainerRequest {
            pod_sandbox_id: self.id.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        let mut client = self.node.client.clone();
        let id = self
            .node
            .wait(client.create_container(request))
            .container_id;
        self.node.ids.borrow_mut().push(id.clone());
        let container_id = id.clone();
        self.node
            .wait(client.start_container(StartContainerRequest { container_id }));
        id
    }

    /// Runs a command in a container of it.
    pub(crate) fn exec(&self, container: &str, script: &str) -> ExecSyncResponse {
        let request = ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
            timeout: 100,
        };
        self.node.wait(self.node.client.clone().exec_sync(request))
    }

    /// What a command in a container of it says; it ends well.
    pub(crate) fn says(&self, container: &str, script: &str) -> String {
        let done = self.exec(container, script);
        let said = String::from_utf8(done.stdout).unwrap();
        let errors = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(
            (done.exit_code, errors.as_str()),
            (0, ""),
            "{script}: {said}"
        );
        said
    }

    /// What a container has written.
    pub(crate) fn log(&self, name: &str) -> String {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        fs::read_to_string(path).unwrap()
    }

    /// Waits until a container has written this.
    pub(crate) fn await_log(&self, name: &str, text: &str) {
        let until = Instant::now() + DEADLINE;
        while !self.log(name).contains(text) {
            assert!(Instant::now() < until, "{}", self.log(name));
            // Its file has no event of its own worth the words: any call passes the time.
            self.node.wait(
                self.node
                    .client
                    .clone()
                    .list_containers(ListContainersRequest::default()),
            );
        }
    }

    /// Waits for a container's end; its code.
    pub(crate) fn await_exit(&self, container: &str) -> i32 {
        let until = Instant::now() + DEADLINE;
        loop {
            let status = self.status(container);
            if status.state == ContainerState::ContainerExited as i32 {
                return status.exit_code;
            }
            assert!(Instant::now() < until, "{status:?}");
        }
    }

    fn status(&self, container: &str) -> ContainerStatus {
        let request = ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let response = self
            .node
            .wait(self.node.client.clone().container_status(request));
        response.status.unwrap()
    }

    /// Stops and removes a container.
    pub(crate) fn remove_container(&self, container: &str) {
        let container_id = container.to_owned();
        let mut client = self.node.client.clone();
        let stop = StopContainerRequest {
            container_id: container_id.clone(),
            timeout: 0,
        };
        self.node.wait(client.stop_container(stop));
        self.node
            .wait(client.remove_container(RemoveContainerRequest { container_id }));
    }

    /// Stops and removes it.
    pub(crate) fn remove(self) {
        let pod_sandbox_id = self.id.clone();
        let mut client = self.node.client.clone();
        let stop = StopPodSandboxRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
        };
        self.node.wait(client.stop_pod_sandbox(stop));
        self.node
            .wait(client.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }));
    }
}

/// A container whose process ids are its own: what a kubelet asks for unless told otherwise.
fn own_pids() -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext {
        namespace_options: Some(NamespaceOption {
            pid: NamespaceMode::Container.into(),
            ..Default::default()
        }),
        ..Default::default()
    }
}

async fn connect(socket: PathBuf) -> RuntimeServiceClient<Channel> {
    let reach = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(socket).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    // The address is asked for, and not used.
    let channel = Endpoint::from_static("http://containerd")
        .connect_with_connector(reach)
        .await;
    RuntimeServiceClient::new(channel.unwrap())
}
