//! Plans, starts and watches one micro-VM per sandbox.
//!
//! Owns: what a run request means (`plan`), the host's record of containers (`store`), the
//! monitor process that holds one VM, and the words in which faces talk to it. Refuses: flags of
//! any command line, registries, what happens on the far side of the guest's agent.
//!
//! ```text
//! face ── Engine::create ──► directory, plan.json, lock
//!      ── Container::start ──► hull-monitor (plan and lock inherited, readiness pipe back)
//!      ◄── ProcessStream ───── frames of the first process; control.sock serves all others
//! ```

mod carry;
mod cgroup;
mod checkpoint;
mod console;
mod container;
pub mod control;
pub mod doctor;
mod engine;
mod exit;
mod launch;
mod logs;
pub mod monitor;
mod names;
mod network;
mod plan;
mod processes;
mod request;
mod resources;
mod rootfs;
mod rotate;
mod scratch;
mod settings;
mod signal;
mod state;
mod store;
mod stream;
mod sys;
mod template;

pub use carry::{Changes, Stdio, carry};
pub use cgroup::CgroupError;
pub use checkpoint::{CheckpointError, FromRequest, Saved, Staged};
pub use container::Container;
pub use engine::{Engine, EngineError};
pub use exit::{CODE_HULL_FAILED, CODE_NOT_EXECUTABLE, CODE_NOT_FOUND, FailureClass};
pub use hull_proto::{CgroupStats, IoStats, ProcessInfo};
pub use launch::StartFailure;
pub use logs::{LogEntry, LogOptions, LogReader};
pub use plan::{
    Export, ExportSource, HostFacts, Identity, Limits, MIN_MEMORY_BYTES, Plan, PlanError,
    PlannedCgroup, PlannedImage, PlannedRoot, PlannedScratch, PlannedVm, PodFacts,
};
pub use processes::{PS_HEADINGS, ps_row};
pub use request::{
    BundleRequest, ExecRequest, Image, Root, RunRequest, Tmpfs, Ulimit, Volume, VolumeSource,
};
pub use scratch::ScratchError;
pub use settings::{Assets, Defaults, Registries, Settings, SettingsError};
pub use signal::{SignalError, parse_signal, signal_name};
pub use state::{ExitRecord, Phase, Running, Status};
pub use store::{Entry, Store, StoreError};
pub use stream::{ProcessStream, StreamError, StreamReceiver, StreamSender};
pub use sys::spawn_in_session;
pub use template::{TemplateError, TemplateInfo, Templates};
