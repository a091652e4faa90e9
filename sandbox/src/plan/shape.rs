//! The shapes of a plan, as `plan.json` holds them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use hull_proto::{OciJson, SHARED_MEMORY_DIR};
use jiff::Timestamp;
use oci_spec::runtime::{LinuxResources, Mount, Process, Root, Spec};
use serde::{Deserialize, Serialize};

use super::cgroup::PlannedCgroup;
use super::kept::Limits;

/// All that the monitor needs to know about one container. Written once, never changed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// [`Plan::GENERATION`] of whoever wrote it.
    pub generation: u32,
    /// The container's id, 64 hexadecimal digits.
    pub id: String,
    /// The container's unique name.
    pub name: String,
    /// When it was created.
    pub created_at: Timestamp,
    /// Its host name.
    pub hostname: String,
    /// The image it came from, if any.
    pub image: Option<PlannedImage>,
    /// Labels, the image's and the request's.
    pub labels: BTreeMap<String, String>,
    /// The virtual machine.
    pub vm: PlannedVm,
    /// The root file system.
    pub root: PlannedRoot,
    /// The network namespace whose interfaces the guest has, joined at each start; without,
    /// there is no network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<PathBuf>,
    /// It has a network namespace of its own, that others fill until its command is released.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub makes_network: bool,
    /// What else of the host is shared with the guest.
    pub exports: Vec<Export>,
    /// The container as the agent creates it, with paths as the guest sees them: an OCI runtime
    /// specification that the monitor hands on and hardly looks into ([`Self::read_spec`]).
    pub spec: OciJson,
    /// Runs a minimal init as process 1.
    pub init: bool,
    /// Whether the first process has a terminal (`spec` says it too).
    pub tty: bool,
    /// Whether the first process's stdin stays open.
    pub interactive: bool,
    /// Signal that asks it to stop.
    pub stop_signal: u8,
    /// Seconds between that signal and SIGKILL.
    pub stop_timeout_s: u32,
    /// What its guest knows it by, if it went on from another container's checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest_id: Option<String>,
    /// Everything is made and the command waits until it is released.
    #[serde(default)]
    pub held: bool,
    /// The OCI bundle it came from, if any.
    #[serde(default)]
    pub bundle: Option<PathBuf>,
    /// The container in whose VM it runs, if it has none of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// The monitor's cgroup on the host, where its engine names one or a limit needs it; see
    /// [`Plan::host_cgroup`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cgroup: Option<PlannedCgroup>,
    /// Limits that have been changed since; those of the guest are in `spec`, too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limits: Option<Limits>,
    /// Removes the container when it ends.
    pub auto_remove: bool,
    /// Bytes that its log may take.
    pub log_limit_bytes: u64,
}

impl Plan {
    /// Version of the shape of `plan.json`.
    pub const GENERATION: u32 = 2;

    /// What the guest knows it by that is running: after a checkpoint, the id that it had before.
    #[must_use]
    pub fn guest_id(&self) -> &str {
        self.guest_id.as_deref().unwrap_or(&self.id)
    }

    /// Its specification. Not for the monitor, which would carry all that reads one, regular
    /// expressions among it, and pay for it at each start.
    ///
    /// # Errors
    /// If a stranger wrote it.
    pub fn read_spec(&self) -> serde_json::Result<Spec> {
        self.spec.read()
    }

    /// Its first process, as others in the container begin.
    ///
    /// # Errors
    /// As [`Self::read_spec`].
    pub fn read_process(&self) -> serde_json::Result<Process> {
        Ok(self.read_spec()?.process().clone().unwrap_or_default())
    }

    /// Program and arguments of the first process, if there is one.
    #[must_use]
    pub fn command(&self) -> Vec<String> {
        let process = self.glance().process;
        process.and_then(|process| process.args).unwrap_or_default()
    }
}

/// As much of a specification as a monitor looks at.
#[derive(Default, Deserialize)]
pub(crate) struct Glance {
    root: Option<Root>,
    mounts: Option<Vec<Mount>>,
    process: Option<GlanceProcess>,
    linux: Option<GlanceLinux>,
}

#[derive(Deserialize)]
struct GlanceProcess {
    args: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct GlanceLinux {
    resources: Option<LinuxResources>,
}

impl Glance {
    /// Whether nobody may write to its root.
    pub(crate) fn has_read_only_root(&self) -> bool {
        let root = self.root.as_ref();
        root.and_then(Root::readonly).unwrap_or(false)
    }

    /// Its mounts.
    pub(crate) fn mounts(&self) -> impl Iterator<Item = &Mount> {
        self.mounts.iter().flatten()
    }

    /// Its limits.
    pub(crate) fn resources(&self) -> Option<&LinuxResources> {
        self.linux.as_ref()?.resources.as_ref()
    }
}

impl Plan {
    /// As much of its specification as a monitor looks at; nothing of what isn't one.
    pub(crate) fn glance(&self) -> Glance {
        self.spec.read().unwrap_or_default()
    }

    /// The name of its root in the tree that the guest sees.
    pub(crate) fn root_name(&self) -> String {
        let root = match self.root {
            PlannedRoot::Layers(_) => None,
            PlannedRoot::Directory(_) => self.glance().root,
        };
        let name = root.and_then(|root| Some(root.path().file_name()?.to_str()?.to_owned()));
        name.unwrap_or_else(|| ROOT_NAME.to_owned())
    }

    /// The share over which the guest's disk is to be laid: an image's layers.
    pub(crate) fn layers(&self) -> Option<&'static str> {
        self.vm.scratch.as_ref().map(|_| ROOT_NAME)
    }

    /// Whether nobody but its guest changes what that is shown.
    pub(crate) fn is_guests_alone(&self) -> bool {
        let mut exports = self.exports.iter();
        self.root.is_guests_alone() && exports.all(|export| export.source.is_guests_alone())
    }

    /// Whether it has memory that other containers of its VM may share.
    pub(crate) fn has_shared_memory(&self) -> bool {
        let glance = self.glance();
        let mut mounts = glance.mounts();
        mounts.any(|mount| mount.source().as_deref() == Some(Path::new(SHARED_MEMORY_DIR)))
    }

    /// The files in which the guest has its host name, as the guest sees them.
    pub(crate) fn identity_files(&self) -> Vec<String> {
        let is_identity = |export: &&Export| export.source == ExportSource::Identity;
        let identity = self.exports.iter().find(is_identity);
        let path = |export: &Export, file: &str| {
            let path = super::guest_path(&export.name).join(file);
            path.to_string_lossy().into_owned()
        };
        identity.map_or_else(Vec::new, |export| {
            ["hostname", "hosts"].map(|file| path(export, file)).into()
        })
    }
}

/// The image a container came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedImage {
    /// What the person asked for.
    pub reference: String,
    /// Digest of its configuration.
    pub id: String,
}

/// The virtual machine's shape.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PlannedVm {
    /// Processors the guest sees.
    pub vcpus: u8,
    /// Processors it may use in the long run, when fewer.
    pub cpu_quota: Option<f64>,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of the guest's address space in which it sees files of unchanging shares.
    #[serde(default)]
    pub window_bytes: u64,
    /// The most memory that it can be given beyond that while it runs, in bytes.
    #[serde(default)]
    pub growth_bytes: u64,
    /// The guest kernel.
    pub kernel: PathBuf,
    /// The guest's first root.
    pub initrd: PathBuf,
    /// The kernel's command line.
    pub cmdline: String,
    /// Adds a serial port.
    pub debug: bool,
    /// The hypervisor's device.
    pub kvm: PathBuf,
    /// The guest's own disk, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<PlannedScratch>,
    /// Where templates of such VMs are kept; without, the VM boots.
    #[serde(default)]
    pub templates: Option<PathBuf>,
    /// Goes on where that device emulates a guest's kernel.
    pub allow_emulated_kvm: bool,
    /// Seconds from the first instruction to the agent's word.
    pub boot_timeout_s: u32,
}

/// A disk of the guest's own, which holds what is written over an image's layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedScratch {
    /// Its size in bytes: the most that can be written.
    pub bytes: u64,
    /// Where the empty disks are that it begins as a copy of.
    pub pristine: PathBuf,
    /// It is gone with the container's end, so no write to it waits for the host's disk.
    #[serde(default)]
    pub fleeting: bool,
}

/// Where the root file system comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedRoot {
    /// Layers, the lowest first, which nobody writes to; what the container writes is on its
    /// guest's disk.
    #[serde(alias = "overlay")]
    Layers(Vec<PathBuf>),
    /// A directory used in place.
    Directory(PathBuf),
}

impl PlannedRoot {
    /// Whether nobody changes what the guest is shown of it but the guest, if it may.
    pub(crate) fn is_guests_alone(&self) -> bool {
        matches!(self, Self::Layers(_))
    }
}

/// One name in the tree that the guest sees beside its root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// The name, a single path component.
    pub name: String,
    /// What is seen there.
    pub source: ExportSource,
    /// Refuses writes.
    pub read_only: bool,
}

/// What an export shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExportSource {
    /// A directory of the host.
    Directory(PathBuf),
    /// One file of the host, seen under [`FILE_NAME`] in an otherwise empty directory.
    File(PathBuf),
    /// A directory of the container's own, first filled from the image's directory at this path.
    Anonymous(String),
    /// The container's own `hostname`, `hosts` and `resolv.conf`.
    Identity,
}

impl ExportSource {
    /// Whether nobody but the guest changes it.
    pub(crate) fn is_guests_alone(&self) -> bool {
        matches!(self, Self::Anonymous(_) | Self::Identity)
    }
}

/// The name of the one file that an [`ExportSource::File`] shows.
pub(crate) const FILE_NAME: &str = "file";
/// The name of the container's root among the exports.
pub(crate) const ROOT_NAME: &str = "root";
/// The name of [`ExportSource::Identity`] among the exports.
pub(crate) const IDENTITY_NAME: &str = "identity";
