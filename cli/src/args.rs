//! The command line's shape. Owns names and one-line descriptions of every command and flag;
//! refuses to act on any of them.
//!
//! Flags are made for the command that is run alone, as a start makes them each time. What `clap`
//! finds in a deferred `Args`' own doc comment would take the place of its command's description:
//! those have plain comments.

mod run;

use clap::{Args, Parser, Subcommand};

use crate::parse;

pub(crate) use run::{
    AttachArgs, DetachKeys, ExecArgs, Platform, ProcessArgs, PullPolicy, RunArgs,
};

/// Runs every container in its own micro-VM.
#[derive(Debug, Parser)]
#[command(
    name = "hull",
    version,
    disable_help_subcommand = true,
    args_override_self = true,
    max_term_width = 100
)]
pub(crate) struct Hull {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
#[command(defer = true)]
pub(crate) enum Command {
    /// Create and run a new container from an image
    Run(Box<RunArgs>),
    /// Execute a command in a running container
    Exec(ExecArgs),
    /// Attach local standard input, output, and error streams to a running container
    Attach(AttachArgs),
    /// List containers
    #[command(visible_alias = "list")]
    Ps(PsArgs),
    /// Display a live stream of container(s) resource usage statistics
    Stats(StatsArgs),
    /// Display the running processes of a container
    Top(TopArgs),
    /// Update the limits of one or more containers while they run
    Update(UpdateArgs),
    /// Fetch the logs of a container
    Logs(LogsArgs),
    /// Start one or more stopped containers
    Start(StartArgs),
    /// Stop one or more running containers
    Stop(StopArgs),
    /// Kill one or more running containers
    Kill(KillArgs),
    /// Save a running container, memory and disk, to a directory
    Checkpoint(CheckpointArgs),
    /// Run copies of a running container, which go on from where it stands
    Fork(ForkArgs),
    /// Remove one or more containers
    Rm(RmArgs),
    /// Block until one or more containers stop, then print their exit codes
    Wait(NamesArgs),
    /// Return low-level information on containers
    Inspect(InspectArgs),
    /// Download an image from a registry
    Pull(PullArgs),
    /// Load images from a tar archive (docker-archive or oci-archive)
    Load(LoadArgs),
    /// List images
    Images(ImagesArgs),
    /// Remove one or more images
    Rmi(RmiArgs),
    /// Manage images
    #[command(subcommand)]
    Image(ImageCommand),
    /// Manage templates, the booted guests that starts are copied from
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Manage the whole
    #[command(subcommand)]
    System(SystemCommand),
    /// Check whether this host can run containers, and say how to mend what is missing
    Doctor(DoctorArgs),
    /// Make Hull known to the container engines of this host
    Install(InstallArgs),
    /// Take Hull out of the configuration of the container engines of this host
    Uninstall(EnginesArgs),
    /// Show Hull's version
    Version,
    /// Hold a detached command's stream, given as stdin
    #[command(name = crate::exec::HOLD, hide = true)]
    HoldStream,
}

/// `hull template`.
#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates
    #[command(visible_alias = "list")]
    Ls(TemplateLsArgs),
    /// Make the template of a shape anew
    Build(TemplateBuildArgs),
    /// Remove one or more templates
    Rm(TemplateRmArgs),
}

// `hull template ls`.
#[derive(Debug, Args)]
pub(crate) struct TemplateLsArgs {
    /// Only display template IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Format output: 'table', 'table TEMPLATE', 'json' or a template such as '{{.ID}}'
    #[arg(long)]
    pub(crate) format: Option<String>,
}

// `hull template build`.
#[derive(Debug, Args)]
pub(crate) struct TemplateBuildArgs {
    /// Number of CPUs
    #[arg(long, value_name = "DECIMAL", value_parser = parse::cpus)]
    pub(crate) cpus: Option<f64>,
    /// Memory (b, k, m, g)
    #[arg(short, long, value_name = "BYTES", value_parser = parse::memory)]
    pub(crate) memory: Option<u64>,
}

// `hull template rm`.
#[derive(Debug, Args)]
pub(crate) struct TemplateRmArgs {
    /// Remove all templates
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Template IDs
    #[arg(required_unless_present = "all", value_name = "TEMPLATE")]
    pub(crate) names: Vec<String>,
}

// Several containers.
#[derive(Debug, Args)]
pub(crate) struct NamesArgs {
    /// Names or ids
    #[arg(required = true, value_name = "CONTAINER")]
    pub(crate) names: Vec<String>,
}

// `hull ps`.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// Show all containers (default shows just running)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only display container IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Filter output (id=, name=, status=, label=, exited=)
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse::pair)]
    pub(crate) filter: Vec<(String, String)>,
    /// Format output: 'table', 'table TEMPLATE', 'json' or a template such as '{{.ID}}'
    #[arg(long)]
    pub(crate) format: Option<String>,
}

// `hull stats`.
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// Show all containers (default shows just running)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Format output: 'table', 'table TEMPLATE', 'json' or a template such as '{{.ID}}'
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Disable streaming stats and only pull the first result
    #[arg(long)]
    pub(crate) no_stream: bool,
    /// Do not truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Names or ids
    #[arg(value_name = "CONTAINER")]
    pub(crate) names: Vec<String>,
}

// `hull top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
}

// `hull update`.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// Number of CPUs
    #[arg(long, value_name = "DECIMAL", value_parser = parse::cpus, conflicts_with_all = ["cpu_quota", "cpu_period"])]
    pub(crate) cpus: Option<f64>,
    /// Period of the CPU quota, in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    pub(crate) cpu_period: Option<i64>,
    /// CPU time in each period, in microseconds (-1 for unlimited)
    #[arg(long, value_name = "MICROSECONDS", allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// CPU shares (relative weight)
    #[arg(short, long, value_name = "SHARES")]
    pub(crate) cpu_shares: Option<u64>,
    /// CPUs of the host in which to allow execution (0-3, 0,1)
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes of the host in which to allow execution (0-3, 0,1)
    #[arg(long, value_name = "LIST")]
    pub(crate) cpuset_mems: Option<String>,
    /// Memory limit (b, k, m, g), up to what the container was started with
    #[arg(short, long, value_name = "BYTES", value_parser = parse::memory)]
    pub(crate) memory: Option<u64>,
    /// Memory soft limit
    #[arg(long, value_name = "BYTES", value_parser = parse::memory)]
    pub(crate) memory_reservation: Option<u64>,
    /// Tune container pids limit (-1 for unlimited)
    #[arg(long, value_name = "LIMIT", allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull logs`.
#[derive(Debug, Args)]
pub(crate) struct LogsArgs {
    /// Follow log output
    #[arg(short, long)]
    pub(crate) follow: bool,
    /// Number of lines to show from the end of the logs
    #[arg(short = 'n', long, value_name = "LINES", default_value = "all", value_parser = tail)]
    pub(crate) tail: Tail,
    /// Show logs since timestamp (2026-01-02T13:23:37Z) or relative (42m)
    #[arg(long, value_name = "TIME", value_parser = moment)]
    pub(crate) since: Option<jiff::Timestamp>,
    /// Show timestamps
    #[arg(short, long)]
    pub(crate) timestamps: bool,
    /// Show the console of the container's virtual machine instead
    #[arg(long, conflicts_with_all = ["follow", "since", "timestamps"])]
    pub(crate) boot: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
}

/// How many lines from the end; `None` is all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tail(pub(crate) Option<usize>);

fn tail(text: &str) -> Result<Tail, parse::Invalid> {
    match text {
        // Docker takes any negative number for all.
        "all" | "-1" => Ok(Tail(None)),
        _ => text
            .parse()
            .map(|count| Tail(Some(count)))
            .map_err(|_| parse::Invalid::new("expected a number or 'all'")),
    }
}

fn moment(text: &str) -> Result<jiff::Timestamp, parse::Invalid> {
    parse::moment(text, jiff::Timestamp::now())
}

// `hull start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    /// Attach STDOUT/STDERR and forward signals
    #[arg(short, long)]
    pub(crate) attach: bool,
    /// Attach container's STDIN, too
    #[arg(short, long)]
    pub(crate) interactive: bool,
    #[command(flatten)]
    pub(crate) keys: DetachKeys,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull stop`.
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// Signal to send to the container [default: the one that it was made with]
    #[arg(short, long, value_parser = parse::signal)]
    pub(crate) signal: Option<String>,
    /// Seconds to wait before killing the container
    #[arg(short, long, alias = "timeout", value_name = "SECONDS", value_parser = parse::whole_seconds)]
    pub(crate) time: Option<u32>,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull checkpoint`.
#[derive(Debug, Args)]
pub(crate) struct CheckpointArgs {
    /// Leave the container running after the checkpoint
    #[arg(short = 'R', long)]
    pub(crate) leave_running: bool,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    pub(crate) name: String,
    /// The directory to make
    #[arg(value_name = "DIR")]
    pub(crate) directory: std::path::PathBuf,
}

// `hull fork`.
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// Number of copies
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    pub(crate) count: u16,
    /// Assign a name to the copy
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Automatically remove the copies when they exit
    #[arg(long)]
    pub(crate) rm: bool,
    /// Set meta data on the copies
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = parse::label)]
    pub(crate) label: Vec<(String, String)>,
    /// Name or id
    #[arg(value_name = "CONTAINER")]
    pub(crate) container: String,
}

// `hull kill`.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Signal to send to the container
    #[arg(short, long, default_value = "KILL", value_parser = parse::signal)]
    pub(crate) signal: String,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull rm`.
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// Force the removal of a running container (uses SIGKILL)
    #[arg(short, long)]
    pub(crate) force: bool,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull inspect`.
#[derive(Debug, Args)]
pub(crate) struct InspectArgs {
    /// Format output: 'json' or a template such as '{{.State.Pid}}'
    #[arg(short, long)]
    pub(crate) format: Option<String>,
    #[command(flatten)]
    pub(crate) containers: NamesArgs,
}

// `hull pull`.
#[derive(Debug, Args)]
pub(crate) struct PullArgs {
    /// Suppress progress output
    #[arg(short, long)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) platform: Platform,
    /// NAME[:TAG|@DIGEST]
    #[arg(value_name = "IMAGE")]
    pub(crate) image: String,
}

// `hull load`.
#[derive(Debug, Args)]
pub(crate) struct LoadArgs {
    /// Read from tar archive file, instead of STDIN
    #[arg(short, long, value_name = "FILE")]
    pub(crate) input: Option<std::path::PathBuf>,
    /// Suppress progress output
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

// `hull images`.
#[derive(Debug, Args)]
pub(crate) struct ImagesArgs {
    /// Show all images (default hides images without a name)
    #[arg(short, long)]
    pub(crate) all: bool,
    /// Only show image IDs
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// Show digests
    #[arg(long)]
    pub(crate) digests: bool,
    /// Don't truncate output
    #[arg(long)]
    pub(crate) no_trunc: bool,
    /// Format output: 'table', 'table TEMPLATE', 'json' or a template such as '{{.Repository}}'
    #[arg(long)]
    pub(crate) format: Option<String>,
    /// Only images of this repository, or REPOSITORY:TAG
    #[arg(value_name = "REPOSITORY[:TAG]")]
    pub(crate) only: Option<String>,
}

// `hull rmi`.
#[derive(Debug, Args)]
pub(crate) struct RmiArgs {
    /// Force removal of the image
    #[arg(short, long)]
    pub(crate) force: bool,
    /// Names or ids
    #[arg(required = true, value_name = "IMAGE")]
    pub(crate) images: Vec<String>,
}

/// `hull image`.
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Remove images without a name, interrupted downloads, and all else that no image needs
    Prune(PruneArgs),
}

/// `hull system`.
#[derive(Debug, Subcommand)]
pub(crate) enum SystemCommand {
    /// Remove stopped containers, images without a name, interrupted downloads and templates
    Prune(PruneArgs),
}

// `hull image prune`, `hull system prune`.
#[derive(Debug, Args)]
pub(crate) struct PruneArgs {
    /// Do not prompt for confirmation
    #[arg(short, long)]
    pub(crate) force: bool,
}

// `hull doctor`.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print the facts as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

// `hull install`.
#[derive(Debug, Args)]
pub(crate) struct InstallArgs {
    #[command(flatten)]
    pub(crate) engines: EnginesArgs,
    /// Print a RuntimeClass for Kubernetes, and do nothing else
    #[arg(long)]
    pub(crate) runtime_class: bool,
}

// Where engines are registered with, and whether really.
#[derive(Debug, Args)]
pub(crate) struct EnginesArgs {
    /// Only say what would be done
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Directory that all paths of engines begin with
    #[arg(long, value_name = "DIR", default_value = "/")]
    pub(crate) root: std::path::PathBuf,
}

#[cfg(test)]
mod tests;
