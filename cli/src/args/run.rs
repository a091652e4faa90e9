//! The flags of `run`, `exec` and `attach`, in Docker's words.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};
use hull_sandbox::{Tmpfs, Ulimit};

use crate::parse::{self, Mount};

/// What a container that goes on from a checkpoint has already.
const FIXED: [&str; 28] = [
    "interactive",
    "tty",
    "env",
    "env_file",
    "workdir",
    "user",
    "entrypoint",
    "volume",
    "mount",
    "tmpfs",
    "read_only",
    "cpus",
    "memory",
    "storage_opt",
    "pids_limit",
    "ulimit",
    "cap_add",
    "cap_drop",
    "group_add",
    "sysctl",
    "security_opt",
    "init",
    "stop_signal",
    "stop_timeout",
    "platform",
    "no_template",
    "debug",
    "image_and_command",
];

// `hull run`.
#[derive(Debug, Args)]
#[command(
    disable_help_flag = true,
    override_usage = "hull run [OPTIONS] IMAGE [COMMAND] [ARG...]\n       hull run [OPTIONS] --from DIR",
    after_help = "IMAGE is a reference (debian:12, host:5000/name@sha256:…) or a local layout (oci:DIR[:tag])."
)]
pub(crate) struct RunArgs {
    /// Keep STDIN open even if not attached
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Allocate a pseudo-TTY
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Run container in background and print container ID
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Automatically remove the container when it exits
    #[arg(long)]
    pub(crate) rm: bool,
    /// Assign a name to the container
    #[arg(long)]
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Overwrite the default ENTRYPOINT of the image
    #[arg(long, value_name = "COMMAND")]
    pub(crate) entrypoint: Option<String>,
    /// Bind mount a volume ([SOURCE:]TARGET[:ro])
    #[arg(short, long, value_name = "VOLUME", value_parser = volume)]
    pub(crate) volume: Vec<hull_sandbox::Volume>,
    /// Attach a filesystem mount (type=bind,source=…,target=…)
    #[arg(long, value_name = "MOUNT", value_parser = parse::mount)]
    pub(crate) mount: Vec<Mount>,
    /// Mount a tmpfs directory (TARGET[:OPTIONS])
    #[arg(long, value_name = "TMPFS", value_parser = parse::tmpfs)]
    pub(crate) tmpfs: Vec<Tmpfs>,
    /// Mount the container's root filesystem as read only
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Number of CPUs
    #[arg(long, value_name = "DECIMAL", value_parser = parse::cpus)]
    pub(crate) cpus: Option<f64>,
    /// Memory limit (b, k, m, g)
    #[arg(short, long, value_name = "BYTES", value_parser = parse::memory)]
    pub(crate) memory: Option<u64>,
    /// Storage driver options for the container (size=BYTES: its disk's)
    #[arg(long, value_name = "OPTION", value_parser = storage_option)]
    pub(crate) storage_opt: Vec<u64>,
    #[command(flatten)]
    pub(crate) limits: LimitArgs,
    /// Container host name
    #[arg(short = 'h', long)]
    pub(crate) hostname: Option<String>,
    /// Set meta data on a container
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse::label)]
    pub(crate) label: Vec<(String, String)>,
    /// Write the container ID to the file
    #[arg(long, value_name = "FILE")]
    pub(crate) cidfile: Option<PathBuf>,
    /// Run an init that forwards signals and reaps processes
    #[arg(long)]
    pub(crate) init: bool,
    /// Signal to stop the container
    #[arg(long, value_name = "SIGNAL", value_parser = parse::signal)]
    pub(crate) stop_signal: Option<String>,
    /// Timeout (in seconds) to stop a container
    #[arg(long, value_name = "SECONDS", value_parser = parse::whole_seconds)]
    pub(crate) stop_timeout: Option<u32>,
    /// Pull image before running (missing, always, never)
    #[arg(
        long,
        value_enum,
        default_value_t,
        hide_possible_values = true,
        value_name = "POLICY"
    )]
    pub(crate) pull: PullPolicy,
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// Suppress the pull output
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) keys: DetachKeys,
    /// Connect to a network: 'none', or 'ns:PATH' for the network namespace at PATH
    #[arg(long, alias = "net", value_name = "NETWORK", default_value = "none", value_parser = network)]
    pub(crate) network: Network,
    /// Refused: ports are published where the network namespace is made
    #[arg(short, long, value_name = "PORT")]
    pub(crate) publish: Vec<String>,
    /// Go on from a checkpoint, with all that its container was given
    #[arg(long, value_name = "DIR", conflicts_with_all = FIXED)]
    pub(crate) from: Option<PathBuf>,
    /// Boot the virtual machine instead of copying a template
    #[arg(long)]
    pub(crate) no_template: bool,
    /// Boot the debugging kernel, with a talkative console
    #[arg(long)]
    pub(crate) debug: bool,
    /// Print usage
    #[arg(long, action = ArgAction::HelpShort)]
    help: Option<bool>,
    /// The image, then the command and its arguments
    #[arg(
        required_unless_present = "from",
        trailing_var_arg = true,
        value_name = "IMAGE",
        hide = true
    )]
    pub(crate) image_and_command: Vec<String>,
}

// What `run` and `exec` give to a process alike.
#[derive(Debug, Args)]
pub(crate) struct ProcessArgs {
    /// Set environment variables
    #[arg(short, long, value_name = "NAME[=VALUE]", value_parser = variable)]
    pub(crate) env: Vec<parse::Variable>,
    /// Read in a file of environment variables
    #[arg(long, value_name = "FILE")]
    pub(crate) env_file: Vec<PathBuf>,
    /// Working directory inside the container
    #[arg(short, long, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// Username or UID (format: <name|uid>[:<group|gid>])
    #[arg(short, long)]
    pub(crate) user: Option<String>,
}

// What the container may do and use.
#[derive(Debug, Args)]
pub(crate) struct LimitArgs {
    /// Tune container pids limit (-1 for unlimited)
    #[arg(long, value_name = "COUNT", allow_negative_numbers = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Ulimit options (type=soft[:hard])
    #[arg(long, value_name = "ULIMIT", value_parser = parse::ulimit)]
    pub(crate) ulimit: Vec<Ulimit>,
    /// Add Linux capabilities
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_add: Vec<String>,
    /// Drop Linux capabilities
    #[arg(long, value_name = "CAP")]
    pub(crate) cap_drop: Vec<String>,
    /// Add additional groups to join
    #[arg(long, value_name = "GROUP")]
    pub(crate) group_add: Vec<String>,
    /// Sysctl options (name=value)
    #[arg(long, value_name = "SYSCTL", value_parser = parse::pair)]
    pub(crate) sysctl: Vec<(String, String)>,
    /// Security options: only 'no-new-privileges' yet
    #[arg(long, value_name = "OPTION", value_parser = security_option)]
    pub(crate) security_opt: Vec<bool>,
}

/// When `run` asks the registry.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum PullPolicy {
    /// Only when the image isn't here.
    #[default]
    Missing,
    /// Each time.
    Always,
    /// Not at all.
    Never,
}

// Which of a multi-platform image.
#[derive(Debug, Args)]
pub(crate) struct Platform {
    /// Set platform if the image has several (os/arch)
    #[arg(long)]
    pub(crate) platform: Option<String>,
}

// How to leave a terminal without ending its command.
#[derive(Debug, Args)]
pub(crate) struct DetachKeys {
    /// Override the key sequence for detaching
    #[arg(
        id = "detach-keys", long = "detach-keys", value_name = "KEYS",
        default_value = "ctrl-p,ctrl-q", value_parser = keys
    )]
    pub(crate) keys: Keys,
    /// Proxy received signals to the process
    #[arg(
        long, value_name = "BOOL", action = ArgAction::Set, default_value_t = true,
        default_missing_value = "true", num_args = 0..=1, require_equals = true,
        hide_possible_values = true
    )]
    pub(crate) sig_proxy: bool,
}

/// The bytes of a detach sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Keys(pub(crate) Vec<u8>);

// `hull exec`.
#[derive(Debug, Args)]
#[command(override_usage = "hull exec [OPTIONS] CONTAINER COMMAND [ARG...]")]
pub(crate) struct ExecArgs {
    /// Keep STDIN open even if not attached
    #[arg(short, long)]
    pub(crate) interactive: bool,
    /// Allocate a pseudo-TTY
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Detached mode: run command in the background
    #[arg(short, long)]
    pub(crate) detach: bool,
    #[command(flatten)]
    pub(crate) process: ProcessArgs,
    /// Give extended privileges to the command
    #[arg(long)]
    pub(crate) privileged: bool,
    #[command(flatten)]
    pub(crate) keys: DetachKeys,
    /// The container, then the command and its arguments
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, value_name = "CONTAINER", hide = true)]
    pub(crate) name_and_command: Vec<String>,
}

// `hull attach`.
#[derive(Debug, Args)]
pub(crate) struct AttachArgs {
    /// Do not attach STDIN
    #[arg(long)]
    pub(crate) no_stdin: bool,
    #[command(flatten)]
    pub(crate) keys: DetachKeys,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
}

fn keys(text: &str) -> Result<Keys, parse::Invalid> {
    parse::detach_keys(text).map(Keys)
}

fn variable(text: &str) -> Result<parse::Variable, parse::Invalid> {
    parse::variable(text, |name| std::env::var(name).ok())
}

fn volume(text: &str) -> Result<hull_sandbox::Volume, parse::Invalid> {
    let cwd = std::env::current_dir()
        .map_err(|error| parse::Invalid::new(format!("no working directory: {error}")))?;
    parse::volume(text, &cwd)
}

/// The network namespace to join, if any.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Network(pub(crate) Option<PathBuf>);

fn network(text: &str) -> Result<Network, parse::Invalid> {
    if text == "none" {
        return Ok(Network(None));
    }
    let path = text.strip_prefix("ns:").filter(|path| !path.is_empty());
    let path = path.and_then(|path| std::path::absolute(path).ok());
    path.map(|path| Network(Some(path))).ok_or_else(|| {
        parse::Invalid::new("hull makes no networks; possible are --network none or ns:PATH")
    })
}

/// The one option that there is: the size of the container's disk in bytes.
fn storage_option(text: &str) -> Result<u64, parse::Invalid> {
    match text.split_once('=') {
        Some(("size", size)) => parse::memory(size),
        _ => Err(parse::Invalid::new("only 'size=BYTES' is known")),
    }
}

fn security_option(text: &str) -> Result<bool, parse::Invalid> {
    match text {
        "no-new-privileges" | "no-new-privileges:true" | "no-new-privileges=true" => Ok(true),
        "no-new-privileges:false" | "no-new-privileges=false" => Ok(false),
        _ => Err(parse::Invalid::new("only 'no-new-privileges' is known")),
    }
}
