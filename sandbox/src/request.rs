//! What a face asks for: every notion of a run, none of its flags. Plain data; nothing is checked
//! or defaulted here.

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::ImageConfiguration;
use oci_spec::runtime::Spec;
use serde::{Deserialize, Serialize};

/// One container to create.
#[derive(Debug, Clone, PartialEq)]
pub struct RunRequest {
    /// The root file system.
    pub root: Root,
    /// Unique name; made up when absent.
    pub name: Option<String>,
    /// Replaces the image's command when not empty.
    pub command: Vec<String>,
    /// Replaces the image's entrypoint, and drops its command; `Some([])` clears it.
    pub entrypoint: Option<Vec<String>>,
    /// Variables over the image's, in order; `None` removes one.
    pub env: Vec<(String, Option<String>)>,
    /// Working directory, absolute; the image's, or `/`.
    pub working_dir: Option<String>,
    /// `user`, `uid`, `user:group`, `uid:gid`; the image's, or root.
    pub user: Option<String>,
    /// Additional groups by name or number.
    pub groups: Vec<String>,
    /// Host name; the id's first 12 digits when absent.
    pub hostname: Option<String>,
    /// The network namespace to join; without, there is no network.
    pub network: Option<PathBuf>,
    /// Gives the process a terminal.
    pub tty: bool,
    /// The terminal's first size (rows, columns).
    pub terminal_size: Option<(u16, u16)>,
    /// Keeps stdin open; else it is at its end from the start.
    pub interactive: bool,
    /// Host paths and anonymous volumes.
    pub volumes: Vec<Volume>,
    /// Memory file systems.
    pub tmpfs: Vec<Tmpfs>,
    /// Mounts the root read-only.
    pub read_only: bool,
    /// Processors, fractions allowed; the settings' default when absent.
    pub cpus: Option<f64>,
    /// The guest's memory in bytes; the settings' default when absent.
    pub memory_bytes: Option<u64>,
    /// The size in bytes of the disk that holds what the container writes over its image; the
    /// settings' default when absent.
    pub scratch_bytes: Option<u64>,
    /// Most processes the container may have.
    pub pids_limit: Option<i64>,
    /// Capabilities beside the default ones, with or without `CAP_`, or `ALL`.
    pub cap_add: Vec<String>,
    /// Capabilities taken away, with or without `CAP_`, or `ALL`.
    pub cap_drop: Vec<String>,
    /// Resource limits.
    pub ulimits: Vec<Ulimit>,
    /// Kernel parameters of the container's namespaces.
    pub sysctls: BTreeMap<String, String>,
    /// Runs a minimal init as process 1.
    pub init: bool,
    /// Forbids gaining privileges by set-uid programs.
    pub no_new_privileges: bool,
    /// Signal that asks the container to stop; the image's, or SIGTERM.
    pub stop_signal: Option<String>,
    /// Seconds between that signal and SIGKILL; the settings' default (10) when absent.
    pub stop_timeout_s: Option<u32>,
    /// Removes the container when it ends, whoever watches.
    pub auto_remove: bool,
    /// Labels, over the image's.
    pub labels: BTreeMap<String, String>,
    /// Boots, whatever templates there are.
    pub no_template: bool,
    /// Boots the kernel made for debugging, with a serial console and a talkative log.
    pub debug: bool,
}

impl RunRequest {
    /// A request that leaves everything but the root to the image and the settings.
    #[must_use]
    pub fn new(root: Root) -> Self {
        Self {
            root,
            name: None,
            command: Vec::new(),
            entrypoint: None,
            env: Vec::new(),
            working_dir: None,
            user: None,
            groups: Vec::new(),
            hostname: None,
            network: None,
            tty: false,
            terminal_size: None,
            interactive: false,
            volumes: Vec::new(),
            tmpfs: Vec::new(),
            read_only: false,
            cpus: None,
            memory_bytes: None,
            scratch_bytes: None,
            pids_limit: None,
            cap_add: Vec::new(),
            cap_drop: Vec::new(),
            ulimits: Vec::new(),
            sysctls: BTreeMap::new(),
            init: false,
            no_new_privileges: false,
            stop_signal: None,
            stop_timeout_s: None,
            auto_remove: false,
            labels: BTreeMap::new(),
            no_template: false,
            debug: false,
        }
    }
}

/// A container as an engine hands it to an OCI runtime.
#[derive(Debug, Clone, PartialEq)]
pub struct BundleRequest {
    /// The container's id, which is its name too.
    pub id: String,
    /// The bundle's directory, absolute.
    pub bundle: PathBuf,
    /// Its `config.json`.
    pub spec: Spec,
    /// The checkpoint that it goes on from, if it doesn't begin.
    pub checkpoint: Option<PathBuf>,
    /// Whether it only holds a sandbox for others: it has no command, and what waits is the
    /// agent's own.
    pub only_holds: bool,
}

/// Where the root file system comes from.
#[derive(Debug, Clone, PartialEq)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one, and it is rarely moved"
)]
pub enum Root {
    /// An unpacked image; the container writes to a layer of its own.
    Image(Image),
    /// A directory that the container reads and writes in place.
    Directory(PathBuf),
}

/// An image as it lies unpacked on this host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Image {
    /// What the person asked for, for `ps` and `inspect`.
    pub reference: String,
    /// Digest of the configuration: the image's id.
    pub id: String,
    /// The image's configuration.
    pub config: ImageConfiguration,
    /// Unpacked layers, the lowest first, in overlayfs's form of whiteouts.
    pub layers: Vec<PathBuf>,
}

/// Something of the host to be seen in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// What is seen.
    pub source: VolumeSource,
    /// Where, an absolute path in the container.
    pub target: String,
    /// Refuses writes.
    pub read_only: bool,
}

/// What a volume shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeSource {
    /// A directory or file of the host, absolute. A missing one is made, as a directory.
    Host(PathBuf),
    /// A directory that lives and dies with the container, first filled with what the image has
    /// at the target.
    Anonymous,
}

/// A memory file system in the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tmpfs {
    /// Where, an absolute path in the container.
    pub target: String,
    /// Mount options (`size=64m`, `mode=1777`, `ro`, `exec`…) over `noexec,nosuid,nodev`.
    pub options: Vec<String>,
}

/// One resource limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ulimit {
    /// The limit's name as `ulimit`-like options have it: `nofile`, `nproc`, `core`…
    pub name: String,
    /// The soft value; `u64::MAX` is unlimited.
    pub soft: u64,
    /// The hard value.
    pub hard: u64,
}

/// One more process for a container that runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecRequest {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Variables over the container's; `None` removes one.
    pub env: Vec<(String, Option<String>)>,
    /// Working directory; the container's when absent.
    pub working_dir: Option<String>,
    /// User; the container's when absent.
    pub user: Option<String>,
    /// Gives the process a terminal.
    pub tty: bool,
    /// The terminal's first size (rows, columns).
    pub terminal_size: Option<(u16, u16)>,
    /// Grants every capability.
    pub privileged: bool,
}
