//! What a run request means: a pure function of request, image configuration and settings.
//!
//! Owns: every default, limit, name and path of a container and its VM. Refuses: the disk. What
//! it must know of the host comes in as [`HostFacts`].
//!
//! The container gets no seccomp profile: a profile protects a kernel shared with others, and
//! here the kernel is the container's own, behind the VM. A filter would cost every system call
//! and forbid what people run VMs for. One in an OCI spec is honoured.

mod bundle;
mod capability;
mod cgroup;
mod going_on;
mod kept;
mod limits;
mod machine;
mod mounts;
pub(crate) mod pod;
mod process;
mod shape;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_proto::OciJson;
use jiff::Timestamp;
use oci_spec::OciSpecError;
use oci_spec::image::Config;

use crate::request::{ExecRequest, Image, Root, RunRequest};
use crate::settings::Settings;
use crate::signal::{SignalError, parse_signal};

pub(crate) use bundle::{bind_sources, guest_process, plan as plan_bundle};
pub use cgroup::PlannedCgroup;
pub(crate) use going_on::going_on;
pub use kept::Limits;
pub(crate) use limits::{Update, growth, memory_limit, memory_limit_of, update};
pub use machine::MIN_MEMORY_BYTES;
use machine::{MAX_SCRATCH_BYTES, MIN_SCRATCH_BYTES};
pub(crate) use machine::{plan as machine, scratch};
pub use pod::PodFacts;
pub(crate) use pod::is_sandbox;
pub use shape::{Export, ExportSource, Plan, PlannedImage, PlannedRoot, PlannedScratch, PlannedVm};
pub(crate) use shape::{FILE_NAME, IDENTITY_NAME, ROOT_NAME};

/// SIGTERM, what a container is asked to stop with when nobody says.
const SIGTERM: u8 = 15;

/// What makes a container this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// 64 hexadecimal digits.
    pub id: String,
    /// Its name.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
}

/// What a plan must know of the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct HostFacts {
    /// Processors.
    pub cpus: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Those of the request's volume sources that are no directories.
    pub files: Vec<PathBuf>,
    /// The pod that the container joins.
    pub pod: Option<PodFacts>,
}

/// A request that can't be met.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Neither request nor image has a command.
    #[error("no command specified")]
    NoCommand,
    /// A name that isn't one.
    #[error(
        "invalid container name ({0}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, up to 128 characters"
    )]
    Name(String),
    /// A working directory that isn't absolute.
    #[error("the working directory '{0}' is invalid, it needs to be an absolute path")]
    WorkingDir(String),
    /// A host name that isn't one.
    #[error("invalid hostname '{0}': 1 to 63 of [a-zA-Z0-9.-] are allowed")]
    Hostname(String),
    /// A variable without a name, or with a zero byte.
    #[error("invalid environment variable: {0:?}")]
    Variable(String),
    /// A mount over the root, or not absolute.
    #[error("invalid mount target '{target}': {why}")]
    Target {
        /// The path in the container.
        target: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// Two mounts at one place.
    #[error("duplicate mount point: {0}")]
    DuplicateTarget(String),
    /// A volume's source that isn't absolute.
    #[error("volume source \"{0}\" is not an absolute path")]
    Source(PathBuf),
    /// A capability that doesn't exist.
    #[error("invalid capability: \"{0}\"")]
    Capability(String),
    /// A resource limit that doesn't exist, or whose soft value is above the hard one.
    #[error("invalid ulimit '{name}': {why}")]
    Ulimit {
        /// The limit's name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An additional group that isn't a number.
    #[error("additional group '{0}' is not a number")]
    Group(String),
    /// More processors than there are, or none.
    #[error(
        "range of CPUs is from 0.01 to {most}.00, as there are only {most} CPUs available: {asked} asked for"
    )]
    Cpus {
        /// What was asked for.
        asked: f64,
        /// What this host can give one VM.
        most: u32,
    },
    /// Too little memory, or more than the host has.
    #[error(
        "memory of {asked_mib} MiB asked for: a VM can have {least_mib} to {most_mib} MiB on this host"
    )]
    Memory {
        /// What was asked for.
        asked_mib: u64,
        /// What a kernel and its agent need.
        least_mib: u64,
        /// What this host has.
        most_mib: u64,
    },
    /// A scratch disk that is too small for a file system, or too large for one.
    #[error(
        "a scratch disk of {asked} bytes asked for: a container can have {} MiB to {} GiB",
        MIN_SCRATCH_BYTES >> 20, MAX_SCRATCH_BYTES >> 30
    )]
    Scratch {
        /// What was asked for.
        asked: u64,
    },
    /// Something of a bundle that a virtual machine can't have.
    #[error("cannot use {what}: {why}")]
    Bundle {
        /// What.
        what: String,
        /// Why not.
        why: &'static str,
    },
    /// A bundle of another container than the one that was saved.
    #[error(
        "cannot go on from the checkpoint: its container's {what} was {then}, and is to be {now}"
    )]
    Differs {
        /// What.
        what: String,
        /// As it was.
        then: String,
        /// As the bundle has it.
        now: String,
    },
    /// A limit that a running virtual machine can't be given.
    #[error("cannot update to {0}")]
    Update(String),
    /// A stop signal that doesn't exist.
    #[error("cannot use the stop signal")]
    StopSignal(#[from] SignalError),
    /// The OCI specification could not be put together.
    #[error("cannot put the container's specification together")]
    Spec(#[from] OciSpecError),
    /// The specification isn't what an OCI runtime reads, or can't be written as JSON.
    #[error("cannot use the container's specification")]
    Json(#[from] serde_json::Error),
}

/// Decides everything about one container.
///
/// # Errors
/// The first thing in the request that can't be met.
pub(crate) fn plan(
    request: &RunRequest,
    identity: Identity,
    settings: &Settings,
    facts: &HostFacts,
) -> Result<Plan, PlanError> {
    check_name(&identity.name)?;
    let empty = Config::default();
    let (image, root, config) = match &request.root {
        Root::Image(image) => (
            Some(PlannedImage {
                reference: image.reference.clone(),
                id: image.id.clone(),
            }),
            PlannedRoot::Layers(image.layers.clone()),
            image.config.config().as_ref().unwrap_or(&empty),
        ),
        Root::Directory(path) => (None, PlannedRoot::Directory(path.clone()), &empty),
    };
    let hostname = hostname(request.hostname.as_deref(), &identity)?;
    let vm = machine::plan(request, settings, facts)?;
    let (exports, mounts) = mounts::plan(request, config, facts)?;
    let process = process::plan(request, config, &hostname)?;
    let mut spec = mounts::spec(request, process, mounts, &hostname)?;
    limits::show_quota(&mut spec, vm.cpu_quota)?;
    let stop_signal = match request
        .stop_signal
        .as_ref()
        .or(config.stop_signal().as_ref())
    {
        Some(signal) if !signal.is_empty() => parse_signal(signal)?,
        _ => SIGTERM,
    };
    Ok(Plan {
        generation: Plan::GENERATION,
        vm,
        id: identity.id,
        name: identity.name,
        created_at: identity.created_at,
        hostname,
        image,
        labels: labels(request, config),
        root,
        network: request.network.clone(),
        makes_network: false,
        exports,
        spec: OciJson::write(&spec)?,
        init: request.init,
        tty: request.tty,
        interactive: request.interactive,
        stop_signal,
        stop_timeout_s: request
            .stop_timeout_s
            .unwrap_or(settings.defaults.stop_timeout_s),
        guest_id: None,
        held: false,
        bundle: None,
        sandbox: None,
        cgroup: None,
        limits: None,
        auto_remove: request.auto_remove,
        log_limit_bytes: settings.defaults.log_limit_bytes,
    })
}

/// The specification of a container that stands for all others: what a request has that asks for
/// nothing but a command, of an image if it is `on_layers`.
///
/// # Errors
/// None that the command can cause.
pub(crate) fn rehearsal(
    command: &str,
    on_layers: bool,
) -> Result<oci_spec::runtime::Spec, PlanError> {
    let root = match on_layers {
        true => Root::Image(Image::default()),
        false => Root::Directory(PathBuf::from("/")),
    };
    let mut request = RunRequest::new(root);
    request.command = vec![command.to_owned()];
    let nothing = HostFacts::default();
    let (_, mounts) = mounts::plan(&request, &Config::default(), &nothing)?;
    let hostname = "rehearsal";
    let process = process::plan(&request, &Config::default(), hostname)?;
    mounts::spec(&request, process, mounts, hostname)
}

/// The process that an exec runs in the container of `plan`.
///
/// # Errors
/// If the request has no command, or something in it is invalid.
pub(crate) fn exec(
    request: &ExecRequest,
    plan: &Plan,
) -> Result<oci_spec::runtime::Process, PlanError> {
    process::exec(request, plan)
}

fn labels(request: &RunRequest, config: &Config) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    if let Some(theirs) = config.labels() {
        labels.extend(
            theirs
                .iter()
                .map(|(key, value)| (key.clone(), value.clone())),
        );
    }
    labels.extend(request.labels.clone());
    labels
}

/// Refuses a name that a container can't have.
pub(crate) fn check_name(name: &str) -> Result<(), PlanError> {
    let mut bytes = name.bytes();
    let first = bytes
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if first
        && name.len() <= 128
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
    {
        Ok(())
    } else {
        Err(PlanError::Name(name.to_owned()))
    }
}

/// The host name that was asked for, or the beginning of the id.
pub(crate) fn hostname(asked: Option<&str>, identity: &Identity) -> Result<String, PlanError> {
    let Some(asked) = asked else {
        return Ok(identity.id.chars().take(12).collect());
    };
    let fits = (1..=63).contains(&asked.len())
        && asked
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b".-_".contains(&byte));
    if fits {
        Ok(asked.to_owned())
    } else {
        Err(PlanError::Hostname(asked.to_owned()))
    }
}

/// An absolute path without `.`, `..`, doubled or trailing slashes, resolved as text.
fn clean(path: &str) -> Option<String> {
    if !path.starts_with('/') || path.contains('\0') {
        return None;
    }
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// Where the guest sees `name` of the exports.
fn guest_path(name: &str) -> PathBuf {
    Path::new(hull_proto::SHARES_DIR).join(name)
}
