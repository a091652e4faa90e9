//! Containerd's calls, word by word: requests into what tasks do, and what they did into answers.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::events::task::{TaskCreate, TaskDelete, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::{Task as Calls, topics, ttrpc};
use ttrpc::{Result, TtrpcContext};

use crate::fault::{Answer, Fault};
use crate::metrics;
use crate::process::Phase;
use crate::sandbox::Sandbox;
use crate::task::{Surroundings, Task};

/// The shim's one service, whatever version of it containerd calls.
#[derive(Debug)]
pub(crate) struct Service {
    pub(crate) around: Surroundings,
    tasks: Mutex<HashMap<String, Arc<Task>>>,
    /// What the tasks join, where containerd has asked for one by name.
    sandbox: Mutex<Option<Arc<Sandbox>>>,
    /// Whether it ends with its last task, as nobody will say so any more.
    closing: AtomicBool,
    end: Mutex<End>,
    ended: Condvar,
}

/// How far its end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum End {
    /// It serves.
    #[default]
    Open,
    /// Nobody needs it any more.
    Wanted,
    /// It can't be reached any more, and whoever ended it may hear so.
    Come,
}

impl Service {
    /// One without a task.
    pub(crate) fn new(around: Surroundings) -> Self {
        Self {
            around,
            tasks: Mutex::default(),
            sandbox: Mutex::default(),
            closing: AtomicBool::new(false),
            end: Mutex::default(),
            ended: Condvar::new(),
        }
    }

    /// Waits until containerd wants no more of it.
    pub(crate) fn until_shut_down(&self) {
        drop(self.until(|end| end != End::Open));
    }

    /// Says that nothing is left by which it could be reached.
    pub(crate) fn has_gone(&self) {
        *self.end() = End::Come;
        self.ended.notify_all();
    }

    fn end(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn until(&self, reached: impl Fn(End) -> bool) -> MutexGuard<'_, End> {
        let mut end = self.end();
        while !reached(*end) {
            end = self.ended.wait(end).unwrap_or_else(PoisonError::into_inner);
        }
        end
    }

    fn tasks(&self) -> MutexGuard<'_, HashMap<String, Arc<Task>>> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All there are.
    pub(crate) fn all_tasks(&self) -> Vec<Arc<Task>> {
        self.tasks().values().map(Arc::clone).collect()
    }

    /// The sandbox, held against others that would make or remove it.
    pub(crate) fn sandbox(&self) -> MutexGuard<'_, Option<Arc<Sandbox>>> {
        self.sandbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends it, now or with its last task.
    pub(crate) fn close(&self) {
        self.closing.store(true, Ordering::SeqCst);
        self.end_if_unused();
    }

    fn end_if_unused(&self) {
        if self.tasks().is_empty() && self.sandbox().is_none() {
            let mut end = self.end();
            if *end == End::Open {
                *end = End::Wanted;
            }
            drop(end);
            self.ended.notify_all();
            drop(self.until(|end| end == End::Come));
        }
    }

    fn task(&self, id: &str) -> Answer<Arc<Task>> {
        let task = self.tasks().get(id).map(Arc::clone);
        task.ok_or_else(|| Fault::NotFound("container not created".to_owned()))
    }
}

impl Calls for Service {
    fn create(&self, _: &TtrpcContext, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        if self.tasks().contains_key(&request.id) {
            return Err(Fault::AlreadyExists(format!("task {}", request.id)).into());
        }
        let sandbox = self.sandbox().clone();
        let task = Task::create(&self.around, sandbox.as_deref(), &request)?;
        let pid = task.pid;
        let event = TaskCreate {
            container_id: request.id.clone(),
            bundle: request.bundle,
            rootfs: request.rootfs,
            io: MessageField::some(TaskIO {
                stdin: request.stdin,
                stdout: request.stdout,
                stderr: request.stderr,
                terminal: request.terminal,
                ..TaskIO::default()
            }),
            checkpoint: request.checkpoint,
            pid,
            ..TaskCreate::default()
        };
        self.around
            .events
            .push(topics::TASK_CREATE_EVENT_TOPIC, &event);
        task.watch()?;
        self.tasks().insert(request.id, task);
        Ok(CreateTaskResponse {
            pid,
            ..CreateTaskResponse::default()
        })
    }

    fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let task = self.task(&request.id)?;
        task.start(&request.exec_id)?;
        Ok(StartResponse {
            pid: task.pid,
            ..StartResponse::default()
        })
    }

    fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let task = self.task(&request.id)?;
        let exit = task.delete(&self.around, &request.exec_id)?;
        if request.exec_id.is_empty() {
            self.tasks().remove(&request.id);
            let event = TaskDelete {
                container_id: request.id,
                pid: task.pid,
                exit_status: exit.code,
                exited_at: exit.timestamp(),
                ..TaskDelete::default()
            };
            self.around
                .events
                .push(topics::TASK_DELETE_EVENT_TOPIC, &event);
            if self.closing.load(Ordering::SeqCst) {
                self.end_if_unused();
            }
        }
        Ok(DeleteResponse {
            pid: task.pid,
            exit_status: exit.code,
            exited_at: exit.timestamp(),
            ..DeleteResponse::default()
        })
    }

    fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> Result<Empty> {
        self.task(&request.id)?.exec(&request)?;
        Ok(Empty::default())
    }

    fn state(&self, _: &TtrpcContext, request: StateRequest) -> Result<StateResponse> {
        let task = self.task(&request.id)?;
        let process = task.process(&request.exec_id)?;
        let phase = process.phase();
        let (status, exit) = match phase {
            Phase::Created | Phase::Starting => (Status::CREATED, None),
            Phase::Running => (Status::RUNNING, None),
            Phase::Paused => (Status::PAUSED, None),
            Phase::Stopped(exit) => (Status::STOPPED, Some(exit)),
        };
        let names = process.names.clone();
        Ok(StateResponse {
            id: match request.exec_id.as_str() {
                "" => request.id,
                exec_id => exec_id.to_owned(),
            },
            bundle: task.bundle.to_string_lossy().into_owned(),
            pid: task.pid,
            status: status.into(),
            stdin: names.stdin,
            stdout: names.stdout,
            stderr: names.stderr,
            terminal: names.terminal,
            exit_status: exit.map_or(0, |exit| exit.code),
            exited_at: exit.map_or_else(MessageField::none, |exit| exit.timestamp()),
            exec_id: request.exec_id,
            ..StateResponse::default()
        })
    }

    fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let task = self.task(&request.id)?;
        let alive = !matches!(task.init.phase(), Phase::Stopped(_));
        let monitor = ProcessInfo {
            pid: task.pid,
            ..ProcessInfo::default()
        };
        Ok(PidsResponse {
            processes: alive.then_some(monitor).into_iter().collect(),
            ..PidsResponse::default()
        })
    }

    fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<Empty> {
        self.task(&request.id)?.pause()?;
        Ok(Empty::default())
    }

    fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<Empty> {
        self.task(&request.id)?.resume()?;
        Ok(Empty::default())
    }

    fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        task.kill(&request.exec_id, request.signal, request.all)?;
        Ok(Empty::default())
    }

    fn resize_pty(&self, _: &TtrpcContext, request: ResizePtyRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        task.resize(&request.exec_id, request.height, request.width)?;
        Ok(Empty::default())
    }

    fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        if request.stdin {
            task.close_stdin(&request.exec_id)?;
        }
        Ok(Empty::default())
    }

    fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let process = self.task(&request.id)?.process(&request.exec_id)?;
        let exit = process.until_ended();
        Ok(WaitResponse {
            exit_status: exit.code,
            exited_at: exit.timestamp(),
            ..WaitResponse::default()
        })
    }

    fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        let task = self.task(&request.id)?;
        let (stats, interfaces) = (task.stats()?, task.interfaces()?);
        Ok(StatsResponse {
            stats: MessageField::some(metrics::of(&stats, &interfaces)),
            ..StatsResponse::default()
        })
    }

    fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        task.update(&request.resources.value)?;
        Ok(Empty::default())
    }

    fn checkpoint(&self, _: &TtrpcContext, request: CheckpointTaskRequest) -> Result<Empty> {
        let task = self.task(&request.id)?;
        task.checkpoint(&request.path, request.options.as_ref())?;
        Ok(Empty::default())
    }

    fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: self.task(&request.id).map_or(0, |task| task.pid),
            ..ConnectResponse::default()
        })
    }

    fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<Empty> {
        // There may be others in the pod.
        self.end_if_unused();
        Ok(Empty::default())
    }
}
