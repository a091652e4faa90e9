//! What faces call first: the containers of this host.

use std::cmp::Reverse;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use oci_spec::runtime::Spec;

use crate::cgroup::{self, CgroupError};
use crate::checkpoint::{self, CheckpointError};
use crate::container::{self, Container};
use crate::control::ControlError;
use crate::exit::CODE_HULL_FAILED;
use crate::launch::{self, StartFailure};
use crate::plan::{self, HostFacts, Identity, PlanError, PodFacts};
use crate::request::{BundleRequest, Image, Root, RunRequest, VolumeSource};
use crate::scratch::ScratchError;
use crate::settings::Settings;
use crate::state::{Running, Status};
use crate::store::{Entry, Store, StoreError};
use crate::stream::StreamError;
use crate::template::{self, TemplateError, Templates};

/// Something that could not be done for a face.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The container failed to start.
    #[error(transparent)]
    Start(#[from] StartFailure),
    /// The request can't be met.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The record of containers refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A pod's container whose sandbox isn't one.
    #[error(
        "cannot join the pod's sandbox {0}: it is no running sandbox of Hull's; all containers of a pod need the same runtime"
    )]
    NoSandbox(String),
    /// The operation needs a container that runs.
    #[error("container {0} is not running")]
    NotRunning(String),
    /// The operation needs a container that doesn't run.
    #[error("container {0} is running: stop it before, or force its removal")]
    IsRunning(String),
    /// Somebody starts or removes it, and doesn't come to an end.
    #[error("container {0} is held by another process that starts or removes it")]
    Held(String),
    /// The monitor could not be spoken to.
    #[error("cannot {action} container {id}")]
    Monitor {
        /// What was tried.
        action: &'static str,
        /// On which container.
        id: String,
        /// Why not.
        source: ControlError,
    },
    /// The host refused something.
    #[error("cannot {action}")]
    Host {
        /// What was tried, on what.
        action: String,
        /// Why not.
        source: io::Error,
    },
    /// A limit of the host's can't be set.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A template can't be had.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// A scratch disk can't be had.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// A checkpoint can't be taken or gone on from.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The stream to a process broke.
    #[error(transparent)]
    Stream(#[from] StreamError),
}

impl EngineError {
    /// The code that a face exits with.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Start(failure) => failure.class.run_code(),
            _ => CODE_HULL_FAILED,
        }
    }
}

/// Hull's engine on this host.
#[derive(Debug, Clone)]
pub struct Engine {
    settings: Settings,
    store: Store,
}

impl Engine {
    /// An engine with these settings. Touches nothing.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            store: Store::new(&settings),
            settings,
        }
    }

    /// An engine with these settings whose containers are kept at `root`, live state and all.
    #[must_use]
    pub fn at(settings: Settings, root: &Path) -> Self {
        Self {
            store: Store::at(root),
            settings,
        }
    }

    /// The settings.
    #[must_use]
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Plans a container and gives it its directory and name. Nothing runs yet.
    ///
    /// # Errors
    /// If the request is invalid, the name is in use, or the disk refuses.
    pub fn create(&self, request: &RunRequest) -> Result<Container, EngineError> {
        self.clear_passing();
        let facts = facts(request)?;
        if matches!(request.root, Root::Image(_)) {
            plan::scratch(request, &self.settings)?.prepare()?;
        }
        self.make(None, request.name.as_deref(), |identity| {
            plan::plan(request, identity, &self.settings, &facts)
        })
    }

    /// As [`Self::create`], from an OCI bundle, with an id of the caller's. Its command, or what
    /// goes on from a checkpoint, will wait for [`Container::release`].
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn create_bundle(&self, request: &BundleRequest) -> Result<Container, EngineError> {
        let mut facts = host_facts();
        for source in plan::bind_sources(&request.spec) {
            let metadata = fs::metadata(&source).map_err(|error| EngineError::Host {
                action: format!("mount \"{}\"", source.display()),
                source: error,
            })?;
            if !metadata.is_dir() {
                facts.files.push(source);
            }
        }
        let id = request.id.as_str();
        facts.pod = self.pod(&request.spec)?;
        let from = request.checkpoint.as_deref().map(checkpoint::open);
        let (file, saved) = from.transpose()?.unzip();
        let container = self.make(Some(id), Some(id), |identity| {
            let plan = plan::plan_bundle(request, identity, &self.settings, &facts)?;
            match saved {
                Some(saved) => plan::going_on(plan, &saved),
                None => Ok(plan),
            }
        })?;
        Ok(match file {
            Some(file) => container.going_on_from(file),
            None => container,
        })
    }

    /// What is known of the sandbox that a bundle's container joins: the one that its annotations
    /// name, or the one whose namespaces it shares.
    fn pod(&self, spec: &Spec) -> Result<Option<PodFacts>, EngineError> {
        let named = plan::pod::named(spec);
        let neighbours: Vec<u32> = plan::pod::neighbours(spec).collect();
        if named.is_none() && neighbours.is_empty() {
            return Ok(None);
        }
        let mut running = Vec::new();
        for container in self.list()? {
            if let Status::Running(state) = container.status()? {
                running.push((container, state));
            }
        }
        let holder_of = |container: &Container| {
            let plan = container.plan();
            plan.sandbox.clone().unwrap_or_else(|| plan.id.clone())
        };
        let is_named = |container: &Container| named.is_some_and(|id| container.id() == id);
        let shares = |state: &Running| neighbours.contains(&state.monitor_pid);
        let found = running
            .iter()
            .find(|(container, _)| is_named(container))
            .or_else(|| running.iter().find(|(_, state)| shares(state)));
        let Some((container, _)) = found else {
            return match named {
                Some(sandbox) => Err(EngineError::NoSandbox(sandbox.to_owned())),
                // Another runtime's, or the host's own.
                None => Ok(None),
            };
        };
        let sandbox = holder_of(container);
        running.retain(|(container, _)| holder_of(container) == sandbox);
        let holder = running
            .iter()
            .find(|(container, _)| container.id() == sandbox);
        let (holder, _) = holder.ok_or_else(|| EngineError::NotRunning(sandbox.clone()))?;
        let mut vm = holder.plan().vm.clone();
        // That is kept once, by the sandbox.
        vm.cpu_quota = None;
        let pids = running
            .iter()
            .map(|(_, state)| (state.monitor_pid, state.guest_pid));
        Ok(Some(PodFacts {
            vm,
            shared_memory: holder.plan().has_shared_memory(),
            pids: pids.collect(),
            sandbox,
        }))
    }

    pub(crate) fn make(
        &self,
        id: Option<&str>,
        name: Option<&str>,
        plan: impl FnOnce(Identity) -> Result<plan::Plan, PlanError>,
    ) -> Result<Container, EngineError> {
        let created_at = Timestamp::now();
        let planned = |id, name| {
            let identity = Identity {
                id,
                name,
                created_at,
            };
            Ok::<_, EngineError>(plan(identity)?)
        };
        let created = self.store.create(id, name, planned)?;
        let container = self.container(created.entry, created.plan);
        Ok(container.claimed_by(created.claim))
    }

    /// The container with exactly this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, id: &str) -> Result<Container, EngineError> {
        let entry = self.store.get(id)?;
        let plan = entry.plan()?;
        Ok(self.container(entry, plan))
    }

    /// The container with this id, unique beginning of an id, or name.
    ///
    /// # Errors
    /// If there is none, or the beginning is several's.
    pub fn find(&self, name_or_id: &str) -> Result<Container, EngineError> {
        let entry = self.store.find(name_or_id)?;
        let plan = entry.plan()?;
        Ok(self.container(entry, plan))
    }

    /// Every container, the newest first; those that were to leave nothing and whose monitor
    /// was killed are removed in passing.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn list(&self) -> Result<Vec<Container>, EngineError> {
        let mut containers = Vec::new();
        for entry in self.store.list()? {
            container::clear_abandoned(&self.store, &entry);
            match entry.plan() {
                Ok(plan) => containers.push(self.container(entry, plan)),
                // Removed just now, or since the directory was read.
                Err(error) if error.is_missing() => {}
                Err(error) => return Err(error.into()),
            }
        }
        containers.sort_by_key(|container| Reverse(container.plan().created_at));
        Ok(containers)
    }

    /// Clears containers that were to leave nothing and whose monitors were killed. Costs one
    /// look at each container; what it finds, little more.
    fn clear_passing(&self) {
        // What can't be cleared now stands in nobody's way, and is tried again.
        for entry in self.store.list().unwrap_or_default() {
            container::clear_abandoned(&self.store, &entry);
        }
    }

    /// Clears what monitors and faces that were killed left behind; returns how many things.
    ///
    /// # Errors
    /// If the store can't be read.
    pub fn sweep(&self) -> Result<usize, EngineError> {
        let mut cleared = self.store.clear_remains()?;
        // Listed first: a container is there before its cgroup, and after.
        for id in cgroup::all() {
            if self.store.find(&id).is_err() && cgroup::remove_empty(&id) {
                cleared += 1;
            }
        }
        let before = self.store.list()?.len();
        let after = self.list()?.len();
        Ok(cleared + before.saturating_sub(after))
    }

    /// The templates of this state.
    #[must_use]
    pub fn templates(&self) -> Templates {
        Templates::new(&self.settings)
    }

    /// Makes the template of VMs with this many processors and this much memory (the settings'
    /// defaults when absent) anew; returns its name.
    ///
    /// # Errors
    /// If no such VM can be had, or its guest doesn't come up.
    pub fn build_template(
        &self,
        cpus: Option<f64>,
        memory_bytes: Option<u64>,
    ) -> Result<String, EngineError> {
        // As of any image, which shapes nothing.
        let mut request = RunRequest::new(Root::Image(Image::default()));
        (request.cpus, request.memory_bytes) = (cpus, memory_bytes);
        let mut vm = plan::machine(&request, &self.settings, &facts(&request)?)?;
        let scratch = plan::scratch(&request, &self.settings)?;
        scratch.prepare()?;
        vm.scratch = Some(scratch);
        vm.templates = Some(self.settings.state_dir.join(template::DIRECTORY));
        let monitor = &self.settings.assets.monitor;
        let built = launch::build_template(monitor, &vm).map_err(|source| EngineError::Host {
            action: format!("start the monitor \"{}\"", monitor.display()),
            source,
        })?;
        Ok(built.map_err(TemplateError::Make)?)
    }

    fn container(&self, entry: Entry, plan: plan::Plan) -> Container {
        Container::new(
            entry,
            plan,
            self.store.clone(),
            self.settings.assets.monitor.clone(),
        )
    }
}

/// What the plan must know of this host. A volume's source that doesn't exist is made, as a
/// directory, as Docker does.
fn facts(request: &RunRequest) -> Result<HostFacts, EngineError> {
    let mut files = Vec::new();
    for volume in &request.volumes {
        let VolumeSource::Host(path) = &volume.source else {
            continue;
        };
        if is_file(path)? {
            files.push(path.clone());
        }
    }
    Ok(HostFacts {
        files,
        ..host_facts()
    })
}

fn host_facts() -> HostFacts {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let memory = rustix::system::sysinfo();
    HostFacts {
        cpus: u32::try_from(cpus).unwrap_or(u32::MAX),
        memory_bytes: memory.totalram.saturating_mul(u64::from(memory.mem_unit)),
        ..HostFacts::default()
    }
}

fn is_file(path: &PathBuf) -> Result<bool, EngineError> {
    let failed = |action: &str, path: &Path, source| EngineError::Host {
        action: format!("{action} volume source \"{}\"", path.display()),
        source,
    };
    match fs::metadata(path) {
        Ok(metadata) => Ok(!metadata.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_absolute() => {
            fs::create_dir_all(path).map_err(|error| failed("create", path, error))?;
            Ok(false)
        }
        // The plan refuses it with better words.
        Err(_) if !path.is_absolute() => Ok(false),
        Err(error) => Err(failed("read", path, error)),
    }
}
