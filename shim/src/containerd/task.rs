//! One container: its first process, those that were added, and what containerd asks of them.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, bail};
use containerd_shim_protos::api::{CreateTaskRequest, ExecProcessRequest};
use containerd_shim_protos::events::task::{
    TaskCheckpointed, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::topics;
use hull_proto::{ExitStatus, Frame};
use hull_sandbox::control::InterfaceStats;
use hull_sandbox::{
    CgroupStats, Container, Engine, EngineError, FailureClass, ProcessStream, Status, Stdio, carry,
};
use hull_shim::{bundle, lifecycle};
use oci_spec::runtime::{LinuxResources, Process as OciProcess};
use rustix::process::{Pid, WaitOptions, waitpid};

use crate::bootstrap;
use crate::events::Events;
use crate::fault::{Answer, Fault};
use crate::process::{Exit, Held, Phase, Process};
use crate::rootfs;
use crate::sandbox::Sandbox;
use crate::stdio::{self, Names};

const SIGKILL: u8 = 9;
/// The code of what was killed.
const KILLED: u32 = 128 + 9;
/// The names of a checkpoint's options, the older one of which means the same.
const CHECKPOINT_OPTIONS: [&str; 2] = [
    "containerd.runc.v1.CheckpointOptions",
    "containerd.linux.runc.CheckpointOptions",
];

/// A container.
#[derive(Debug)]
pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// Its monitor, the one process that there is of it on the host.
    pub(crate) pid: u32,
    pub(crate) init: Arc<Process>,
    container: Container,
    added: Mutex<HashMap<String, Added>>,
    namespace: String,
    events: Arc<Events>,
    /// Whether a want of memory was announced.
    short_of_memory: AtomicBool,
}

/// A process that was added, and what it is to be.
#[derive(Debug, Clone)]
struct Added {
    process: Arc<Process>,
    spec: Arc<OciProcess>,
}

/// What every task of a shim needs.
#[derive(Debug)]
pub(crate) struct Surroundings {
    pub(crate) engine: Engine,
    pub(crate) namespace: String,
    pub(crate) events: Arc<Events>,
}

impl Task {
    /// Makes a container, in the sandbox if there is one; its command waits. Nothing is left of
    /// one that fails.
    pub(crate) fn create(
        around: &Surroundings,
        sandbox: Option<&Sandbox>,
        request: &CreateTaskRequest,
    ) -> Answer<Arc<Self>> {
        let bundle = Path::new(&request.bundle);
        let made = rootfs::mount_all(&request.rootfs, bundle)
            .and_then(|()| Self::make(around, sandbox, request, bundle));
        let task = made.map_err(|error| {
            if let Err(error) = rootfs::unmount_all(bundle) {
                log::warn!("{error:#}");
            }
            Fault::of("OCI runtime create failed", &error)
        })?;
        Ok(Arc::new(task))
    }

    fn make(
        around: &Surroundings,
        sandbox: Option<&Sandbox>,
        request: &CreateTaskRequest,
        directory: &Path,
    ) -> anyhow::Result<Self> {
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let mut bundle = bundle::read(&request.id, Some(directory))?;
        if let Some(sandbox) = sandbox {
            sandbox.take_in(&mut bundle.spec)?;
        }
        let checkpoint = Some(&request.checkpoint).filter(|path| !path.is_empty());
        bundle.checkpoint = checkpoint.map(PathBuf::from);
        let (mut held, mut pid) = (Held::default(), 0);
        let made = lifecycle::make(
            &around.engine,
            &bundle,
            |_| {
                Ok(keep(
                    stdio::open(&names, &around.namespace, &request.id)?,
                    &mut held,
                ))
            },
            |running| {
                pid = running.monitor_pid;
                // Not the shim's own, which nobody would kill for the container's memory.
                let process = bundle.spec.process().as_ref();
                let score = process.and_then(OciProcess::oom_score_adj);
                bootstrap::set_score(pid, score.unwrap_or(0));
                Ok(())
            },
            |error| log::warn!("{error:#}"),
        );
        let container = made.inspect_err(|_| finish(&mut held))?;
        Ok(Self {
            id: request.id.clone(),
            bundle: directory.to_owned(),
            pid,
            init: Arc::new(Process::new("", names, held)),
            container,
            added: Mutex::default(),
            namespace: around.namespace.clone(),
            events: Arc::clone(&around.events),
            short_of_memory: AtomicBool::new(false),
        })
    }

    /// Announces its end when it comes.
    pub(crate) fn watch(self: &Arc<Self>) -> Answer<()> {
        let task = Arc::clone(self);
        spawn("watch", move || task.await_end())
    }

    /// Waits for the monitor, which is this process's child and ends when its container has.
    fn await_end(&self) {
        let (code, oom) = await_code(self.pid, &self.container);
        self.over(&self.init, code, oom);
    }

    fn over(&self, process: &Process, code: u32, oom: bool) {
        let mut held = process.held();
        (held.keeper, held.sender) = (None, None);
        drop(held);
        let exit = Exit::now(code);
        let id = match process.exec_id.as_str() {
            "" => self.id.clone(),
            exec_id => exec_id.to_owned(),
        };
        process.ended(exit, || {
            if oom && !self.short_of_memory.load(Ordering::Relaxed) {
                self.announce_oom();
            }
            let event = TaskExit {
                container_id: self.id.clone(),
                id,
                pid: self.pid,
                exit_status: code,
                exited_at: exit.timestamp(),
                ..TaskExit::default()
            };
            self.events.push(topics::TASK_EXIT_EVENT_TOPIC, &event);
        });
    }

    /// Announces each killing for want of memory in its guest, until it ends.
    fn watch_memory(&self) {
        let mut seen = 0;
        while let Ok(Some(count)) = self.container.await_oom(seen) {
            seen = count;
            self.init.unless_ended(|| {
                self.short_of_memory.store(true, Ordering::Relaxed);
                self.announce_oom();
            });
        }
    }

    fn announce_oom(&self) {
        let event = TaskOOM {
            container_id: self.id.clone(),
            ..TaskOOM::default()
        };
        self.events.push(topics::TASK_OOM_EVENT_TOPIC, &event);
    }

    /// The process of that name; the first if it is empty.
    pub(crate) fn process(&self, exec_id: &str) -> Answer<Arc<Process>> {
        match exec_id {
            "" => Ok(Arc::clone(&self.init)),
            _ => Ok(self.find(exec_id)?.process),
        }
    }

    fn find(&self, exec_id: &str) -> Answer<Added> {
        let found = self.added().get(exec_id).cloned();
        found.ok_or_else(|| Fault::NotFound(format!("process does not exist {exec_id}")))
    }

    fn added(&self) -> MutexGuard<'_, HashMap<String, Added>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a process, to be started.
    pub(crate) fn exec(&self, request: &ExecProcessRequest) -> Answer<()> {
        self.takes_processes()?;
        let mut spec: OciProcess = serde_json::from_slice(&request.spec.value)
            .map_err(|error| Fault::Invalid(format!("process of {}: {error}", request.exec_id)))?;
        spec.set_terminal(Some(request.terminal));
        let names = Names {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let mut added = self.added();
        if added.contains_key(&request.exec_id) {
            return Err(Fault::AlreadyExists(format!("id {}", request.exec_id)));
        }
        let process = Process::new(&request.exec_id, names, Held::default());
        let new = Added {
            process: Arc::new(process),
            spec: Arc::new(spec),
        };
        added.insert(request.exec_id.clone(), new);
        drop(added);
        let event = TaskExecAdded {
            container_id: self.id.clone(),
            exec_id: request.exec_id.clone(),
            ..TaskExecAdded::default()
        };
        self.events
            .push(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    fn takes_processes(&self) -> Answer<()> {
        match self.init.phase() {
            Phase::Running => Ok(()),
            other => Err(Fault::Failed(format!(
                "cannot exec in a {} state",
                other.word()
            ))),
        }
    }

    /// Starts a process.
    pub(crate) fn start(self: &Arc<Self>, exec_id: &str) -> Answer<()> {
        if !exec_id.is_empty() {
            return self.start_added(&self.find(exec_id)?);
        }
        self.init.begin()?;
        self.init
            .held()
            .keeper
            .take_if(|keeper| keeper.client_has_gone());
        let released = lifecycle::release(&self.container, |error| log::warn!("{error:#}"));
        if let Err(error) = released {
            self.init.not_started(None);
            return Err(Fault::of("OCI runtime start failed", &error));
        }
        self.init.started(|| {
            let event = TaskStart {
                container_id: self.id.clone(),
                pid: self.pid,
                ..TaskStart::default()
            };
            self.events.push(topics::TASK_START_EVENT_TOPIC, &event);
        });
        let task = Arc::clone(self);
        spawn("memory", move || task.watch_memory())
    }

    fn start_added(self: &Arc<Self>, added: &Added) -> Answer<()> {
        self.takes_processes()?;
        let process = &added.process;
        process.begin()?;
        let (stream, stdio) = match self.spawn(added) {
            Ok(begun) => begun,
            Err(error) => {
                finish(&mut process.held());
                process.not_started(Some(Exit::now(255)));
                return Err(Fault::of("OCI runtime exec failed", &error));
            }
        };
        process.started(|| {
            let event = TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: process.exec_id.clone(),
                pid: self.pid,
                ..TaskExecStarted::default()
            };
            self.events
                .push(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        });
        let (task, carried) = (Arc::clone(self), Arc::clone(process));
        spawn("exec", move || {
            let (code, oom) = code(carry(stream, stdio, None));
            task.over(&carried, code, oom);
        })
    }

    fn spawn(&self, added: &Added) -> anyhow::Result<(ProcessStream, Stdio)> {
        let opened = stdio::open(&added.process.names, &self.namespace, &self.id)?;
        let mut held = added.process.held();
        let stdio = keep(opened, &mut held);
        let mut stream = self.container.exec_oci(&added.spec)?;
        match stream.receive()? {
            Some(Frame::Started { .. }) => {}
            Some(Frame::Failed(failure)) => bail!(failure.message),
            _ => bail!("the container ended before the process began"),
        }
        held.sender = Some(stream.sender());
        Ok((stream, stdio))
    }

    /// Sends a signal.
    pub(crate) fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Answer<()> {
        let process = self.process(exec_id)?;
        let number = u8::try_from(signal)
            .ok()
            .filter(|number| (1..=64).contains(number));
        let signal = number.ok_or_else(|| Fault::Invalid(format!("signal {signal}")))?;
        let finished = || Fault::NotFound("process already finished".to_owned());
        match process.phase() {
            Phase::Stopped(_) => return Err(finished()),
            Phase::Created | Phase::Starting if !exec_id.is_empty() => {
                return Err(Fault::FailedPrecondition("process not created".to_owned()));
            }
            _ => {}
        }
        if exec_id.is_empty() {
            let sent = self.container.send_signal(signal, all || signal == SIGKILL);
            return sent.map_err(|error| Fault::of_engine("cannot send a signal", error));
        }
        let sender = process.held().sender.clone().ok_or_else(finished)?;
        let frame = Frame::Signal { signal, all: false };
        // A stream that broke has ended.
        sender.send(&frame).map_err(|_| finished())
    }

    /// Gives a process's terminal a new size.
    pub(crate) fn resize(&self, exec_id: &str, rows: u32, cols: u32) -> Answer<()> {
        let process = self.process(exec_id)?;
        let size = |count: u32| u16::try_from(count).unwrap_or(u16::MAX);
        let (rows, cols) = (size(rows), size(cols));
        if let Phase::Stopped(_) = process.phase() {
            return Err(Fault::Failed(
                "cannot resize a stopped container".to_owned(),
            ));
        }
        if exec_id.is_empty() {
            let sent = self.container.resize(rows, cols);
            return sent.map_err(|error| Fault::of_engine("cannot resize the terminal", error));
        }
        let sender = process.held().sender.clone();
        if let Some(sender) = sender {
            // A stream that broke has nobody to tell.
            let _ = sender.send(&Frame::Resize { rows, cols });
        }
        Ok(())
    }

    /// Lets stdin end when its clients are gone.
    pub(crate) fn close_stdin(&self, exec_id: &str) -> Answer<()> {
        self.process(exec_id)?.held().keeper = None;
        Ok(())
    }

    /// Has the guest stand still.
    pub(crate) fn pause(&self) -> Answer<()> {
        let event = TaskPaused {
            container_id: self.id.clone(),
            ..TaskPaused::default()
        };
        self.hold(
            Phase::Running,
            Phase::Paused,
            "pause",
            Container::pause,
            || {
                self.events.push(topics::TASK_PAUSED_EVENT_TOPIC, &event);
            },
        )
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) -> Answer<()> {
        let event = TaskResumed {
            container_id: self.id.clone(),
            ..TaskResumed::default()
        };
        self.hold(
            Phase::Paused,
            Phase::Running,
            "resume",
            Container::resume,
            || {
                self.events.push(topics::TASK_RESUMED_EVENT_TOPIC, &event);
            },
        )
    }

    fn hold(
        &self,
        from: Phase,
        to: Phase,
        action: &str,
        act: fn(&Container) -> Result<(), EngineError>,
        announce: impl FnOnce(),
    ) -> Answer<()> {
        let phase = self.init.phase();
        if phase != from {
            return Err(phase.forbids(action));
        }
        act(&self.container).map_err(|error| Fault::of_engine("OCI runtime failed", error))?;
        self.init.pass(from, to, action, announce)
    }

    /// Saves it, running or paused, to a directory; then it goes on as it was, or ends if the
    /// options say so.
    pub(crate) fn checkpoint(&self, path: &str, options: Option<&Any>) -> Answer<()> {
        let options = checkpoint_options(options)?;
        match self.init.phase() {
            Phase::Running | Phase::Paused => {}
            other => return Err(other.forbids("checkpoint")),
        }
        let failed = |error| Fault::of_engine("OCI runtime checkpoint failed", error);
        let saved = self.container.checkpoint(Path::new(path)).map_err(failed)?;
        let event = TaskCheckpointed {
            container_id: self.id.clone(),
            checkpoint: path.to_owned(),
            ..TaskCheckpointed::default()
        };
        self.init.unless_ended(|| {
            self.events
                .push(topics::TASK_CHECKPOINTED_EVENT_TOPIC, &event);
        });
        match options.exit {
            true => saved.end().map_err(failed),
            false => Ok(()),
        }
    }

    /// What it has used and may use, in its guest.
    pub(crate) fn stats(&self) -> Answer<CgroupStats> {
        let read = self.container.stats();
        read.map_err(|error| Fault::of_engine("cannot read the statistics", error))
    }

    /// What has gone over its VM's cards.
    pub(crate) fn interfaces(&self) -> Answer<Vec<InterfaceStats>> {
        let read = self.container.interfaces();
        read.map_err(|error| Fault::of_engine("cannot read the statistics", error))
    }

    /// Changes its limits.
    pub(crate) fn update(&self, resources: &[u8]) -> Answer<()> {
        if let phase @ Phase::Stopped(_) = self.init.phase() {
            return Err(phase.forbids("update"));
        }
        let resources: LinuxResources = serde_json::from_slice(resources)
            .map_err(|error| Fault::Invalid(format!("resources: {error}")))?;
        let done = self.container.update(&resources);
        done.map_err(|error| Fault::of_engine("cannot update", error))
    }

    /// Forgets a process that was added and is over, or removes the whole container.
    pub(crate) fn delete(&self, around: &Surroundings, exec_id: &str) -> Answer<Exit> {
        let process = self.process(exec_id)?;
        let exit = match process.phase() {
            Phase::Stopped(exit) => exit,
            Phase::Created if !exec_id.is_empty() => Exit::now(0),
            Phase::Created => {
                // One that has just ended needs no signal.
                let _ = self.container.send_signal(SIGKILL, true);
                process.until_ended()
            }
            other => return Err(other.forbids("delete")),
        };
        if exec_id.is_empty() {
            remove(&around.engine, &self.id, &self.bundle)
                .map_err(|error| Fault::of("OCI runtime delete failed", &error))?;
        } else {
            self.added().remove(exec_id);
        }
        finish(&mut process.held());
        Ok(exit)
    }
}

/// Removes a container, whatever became of its shim and monitor, and the mounts of its root.
pub(crate) fn remove(engine: &Engine, id: &str, bundle: &Path) -> anyhow::Result<()> {
    match engine.get(id) {
        Ok(container) => {
            lifecycle::remove(container, |error| log::warn!("{error:#}"))
                .with_context(|| format!("cannot remove container {id}"))?;
        }
        Err(EngineError::Store(error)) if error.is_missing() => {}
        Err(error) => return Err(error.into()),
    }
    rootfs::unmount_all(bundle)
}

/// What runc's shim is told, which clients tell every shim; or nothing.
fn checkpoint_options(options: Option<&Any>) -> Answer<CheckpointOptions> {
    let Some(options) = options.filter(|options| !options.type_url.is_empty()) else {
        return Ok(CheckpointOptions::default());
    };
    let name = options.type_url.rsplit('/').next().unwrap_or_default();
    if !CHECKPOINT_OPTIONS.contains(&name) {
        return Err(Fault::Invalid(format!("options of type {name}")));
    }
    CheckpointOptions::parse_from_bytes(&options.value)
        .map_err(|error| Fault::Invalid(format!("{name}: {error}")))
}

/// What is the process's own, once the rest is held.
fn keep(open: stdio::Open, held: &mut Held) -> Stdio {
    (held.keeper, held.logger) = (open.keeper, open.logger);
    open.stdio
}

/// Lets go of what was held.
fn finish(held: &mut Held) {
    let Held { logger, .. } = std::mem::take(held);
    if let Some(logger) = logger {
        logger.finish();
    }
}

fn code(end: std::io::Result<Option<Frame>>) -> (u32, bool) {
    match end {
        Ok(Some(Frame::Exited(status))) => {
            let oom = matches!(status, ExitStatus::Signaled { oom: true, .. });
            (u32::try_from(status.code()).unwrap_or(KILLED), oom)
        }
        Ok(Some(Frame::Failed(failure))) => {
            (FailureClass::from(failure.kind).exec_code().into(), false)
        }
        // It was killed with its container.
        _ => (KILLED, false),
    }
}

/// Waits for a container's monitor, a child of this process; its code, and whether memory was short.
pub(crate) fn await_code(monitor: u32, container: &Container) -> (u32, bool) {
    await_child(monitor);
    match container.status() {
        Ok(Status::Exited(record)) => {
            if let Some(why) = &record.error {
                log::warn!("container {} ended: {why}", container.id());
            }
            (record.code.into(), record.oom)
        }
        // Nobody knows better.
        _ => (KILLED, false),
    }
}

/// Starts a thread.
pub(crate) fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Answer<()> {
    let thread = thread::Builder::new().name(name.to_owned()).spawn(body);
    thread
        .map(drop)
        .map_err(|error| Fault::Failed(format!("cannot start a thread: {error}")))
}

fn await_child(pid: u32) {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else {
        return;
    };
    while let Err(rustix::io::Errno::INTR) = waitpid(Some(pid), WaitOptions::empty()) {}
}
