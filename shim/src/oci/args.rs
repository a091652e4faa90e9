//! The command line, flag by flag as runc has it. Plain data.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs OCI bundles, each in its own micro-VM. Of a flag that is given more than once, the last
/// counts: wrappers go before what engines say.
#[derive(Debug, Parser)]
#[command(
    name = "hull-oci",
    disable_version_flag = true,
    args_override_self = true
)]
pub(crate) struct HullOci {
    #[command(flatten)]
    pub(crate) global: Global,
    /// Prints the version.
    #[arg(short = 'v', long)]
    pub(crate) version: bool,
    #[command(subcommand)]
    pub(crate) command: Option<Command>,
}

/// Flags before the command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// Where the state of containers is kept.
    #[arg(long, default_value = "/run/hull-oci")]
    pub(crate) root: PathBuf,
    /// A file to which messages are appended, beside stderr.
    #[arg(long)]
    pub(crate) log: Option<PathBuf>,
    /// How that file is written.
    #[arg(long, value_enum, default_value = "text")]
    pub(crate) log_format: LogFormat,
    /// Accepted: errors are always told in full.
    #[arg(long)]
    pub(crate) debug: bool,
    /// Accepted: a cgroupsPath is known by its spelling, and systemd isn't asked.
    #[arg(long)]
    pub(crate) systemd_cgroup: bool,
    /// Accepted, for engines that say it.
    #[arg(long, hide = true)]
    pub(crate) rootless: Option<String>,
    /// Accepted, for engines that say it.
    #[arg(long, hide = true)]
    pub(crate) criu: Option<String>,
}

/// How a log is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Makes a container; its command waits for start.
    Create(CreateArgs),
    /// Runs the command of a created container.
    Start(IdArgs),
    /// Makes a container and runs its command.
    Run(RunArgs),
    /// Prints what a container is, as JSON.
    State(IdArgs),
    /// Sends a signal to a container's first process.
    Kill(KillArgs),
    /// Removes what is kept of a container.
    Delete(DeleteArgs),
    /// Lists the containers.
    List(ListArgs),
    /// Lists a container's processes, by their ids in its guest.
    Ps(PsArgs),
    /// Has a container stand still.
    Pause(IdArgs),
    /// Lets a paused container go on.
    Resume(IdArgs),
    /// Runs another process in a container.
    Exec(ExecArgs),
    /// Prints what this runtime can do, as JSON.
    Features,
    /// Writes a config.json to begin with.
    Spec(SpecArgs),
    /// Changes the limits of a container that runs.
    Update(UpdateArgs),
    /// Prints statistics of a container, and when its memory runs out, as JSON lines.
    Events(EventsArgs),
}

/// A container's id alone.
#[derive(Debug, Args)]
pub(crate) struct IdArgs {
    pub(crate) id: String,
    /// What else an engine says.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub(crate) rest: Vec<String>,
}

/// What create and run have both.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The bundle's directory.
    #[arg(short, long)]
    pub(crate) bundle: Option<PathBuf>,
    /// A Unix socket to which the terminal's other end is sent.
    #[arg(long)]
    pub(crate) console_socket: Option<PathBuf>,
    /// A file for the id of the process whose end is the container's.
    #[arg(long)]
    pub(crate) pid_file: Option<PathBuf>,
    /// Refused: descriptors can't be handed to a virtual machine.
    #[arg(long, default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Accepted: the guest's root is always changed by pivot_root.
    #[arg(long)]
    pub(crate) no_pivot: bool,
    /// Accepted: a guest has no keyring of the host's.
    #[arg(long)]
    pub(crate) no_new_keyring: bool,
    /// The container's id.
    pub(crate) id: String,
}

/// Flags of run.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    pub(crate) create: CreateArgs,
    /// Doesn't wait for the container's end.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Keeps what is known of the container when it has ended.
    #[arg(long)]
    pub(crate) keep: bool,
    /// Accepted: nothing of the container is ever a child of this process's.
    #[arg(long)]
    pub(crate) no_subreaper: bool,
}

/// Flags of kill.
#[derive(Debug, Args)]
pub(crate) struct KillArgs {
    /// Sends it to every process of the container.
    #[arg(short, long)]
    pub(crate) all: bool,
    pub(crate) id: String,
    #[arg(default_value = "SIGTERM")]
    pub(crate) signal: String,
}

/// Flags of delete.
#[derive(Debug, Args)]
pub(crate) struct DeleteArgs {
    /// Kills it if it runs; a container that isn't there is no error.
    #[arg(short, long)]
    pub(crate) force: bool,
    pub(crate) id: String,
}

/// Flags of list.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// `table` or `json`.
    #[arg(short, long, default_value = "table")]
    pub(crate) format: String,
    /// Only ids.
    #[arg(short, long)]
    pub(crate) quiet: bool,
}

/// Flags of ps.
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// `table` or `json`.
    #[arg(short, long, default_value = "table")]
    pub(crate) format: String,
    pub(crate) id: String,
    /// Options of ps(1); passed over.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) options: Vec<String>,
}

/// Flags of events.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// The time between statistics.
    #[arg(long, default_value = "5s", allow_hyphen_values = true)]
    pub(crate) interval: String,
    /// Prints statistics once.
    #[arg(long)]
    pub(crate) stats: bool,
    pub(crate) id: String,
}

/// Flags of update.
#[derive(Debug, Args)]
pub(crate) struct UpdateArgs {
    /// A file with the limits as the runtime specification has them, or `-` for stdin; all other
    /// flags are passed over then.
    #[arg(short, long)]
    pub(crate) resources: Option<PathBuf>,
    /// Memory limit in bytes; -1 is none.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory: Option<String>,
    /// Soft limit of memory in bytes.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory_reservation: Option<String>,
    /// Accepted: a guest has no swap.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) memory_swap: Option<String>,
    /// Accepted: no kernel has it any more.
    #[arg(long, allow_hyphen_values = true, hide = true)]
    pub(crate) kernel_memory: Option<String>,
    /// Accepted: no kernel has it any more.
    #[arg(long, allow_hyphen_values = true, hide = true)]
    pub(crate) kernel_memory_tcp: Option<String>,
    /// The period of the processor quota, in microseconds.
    #[arg(long)]
    pub(crate) cpu_period: Option<i64>,
    /// Processor time in each period, in microseconds; -1 is no limit.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) cpu_quota: Option<i64>,
    /// Processor time above the quota for once, in microseconds.
    #[arg(long)]
    pub(crate) cpu_burst: Option<i64>,
    /// Weight against others.
    #[arg(long)]
    pub(crate) cpu_share: Option<i64>,
    /// Runs only where nobody else does.
    #[arg(long)]
    pub(crate) cpu_idle: Option<i64>,
    /// Processors of the host.
    #[arg(long)]
    pub(crate) cpuset_cpus: Option<String>,
    /// Memory nodes of the host.
    #[arg(long)]
    pub(crate) cpuset_mems: Option<String>,
    /// Most processes; -1 is no limit.
    #[arg(long, allow_hyphen_values = true)]
    pub(crate) pids_limit: Option<i64>,
    /// Refused.
    #[arg(long, hide = true)]
    pub(crate) blkio_weight: Option<u64>,
    /// Refused.
    #[arg(long, hide = true)]
    pub(crate) cpu_rt_period: Option<u64>,
    /// Refused.
    #[arg(long, hide = true, allow_hyphen_values = true)]
    pub(crate) cpu_rt_runtime: Option<i64>,
    /// Refused.
    #[arg(long, hide = true)]
    pub(crate) l3_cache_schema: Option<String>,
    /// Refused.
    #[arg(long, hide = true)]
    pub(crate) mem_bw_schema: Option<String>,
    pub(crate) id: String,
}

/// Flags of spec.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// The bundle's directory.
    #[arg(short, long, default_value = ".")]
    pub(crate) bundle: PathBuf,
}

/// Flags of exec.
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// A Unix socket to which the terminal's other end is sent.
    #[arg(long)]
    pub(crate) console_socket: Option<PathBuf>,
    /// The working directory.
    #[arg(long)]
    pub(crate) cwd: Option<PathBuf>,
    /// A variable, NAME=VALUE.
    #[arg(short, long)]
    pub(crate) env: Vec<String>,
    /// Gives the process a terminal.
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// UID or UID:GID.
    #[arg(short, long)]
    pub(crate) user: Option<String>,
    /// Additional group ids.
    #[arg(short = 'g', long)]
    pub(crate) additional_gids: Vec<u32>,
    /// A file that describes the process.
    #[arg(short, long)]
    pub(crate) process: Option<PathBuf>,
    /// Doesn't wait for the process's end.
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// A file for the id of a process whose end is this one's.
    #[arg(long)]
    pub(crate) pid_file: Option<PathBuf>,
    /// Forbids gaining privileges.
    #[arg(long)]
    pub(crate) no_new_privs: bool,
    /// A capability to add.
    #[arg(short, long)]
    pub(crate) cap: Vec<String>,
    /// Refused: descriptors can't be handed to a virtual machine.
    #[arg(long, default_value_t = 0)]
    pub(crate) preserve_fds: u32,
    /// Where a detached process's carrier says how the start went.
    #[arg(long, hide = true)]
    pub(crate) report_to: Option<PathBuf>,
    pub(crate) id: String,
    /// The command.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub(crate) command: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_of_a_flag_counts_and_lists_are_whole() {
        let words = "hull-oci --root /a --root /b exec -e A=1 -e B=2 c true";
        let parsed = HullOci::try_parse_from(words.split(' ')).unwrap();
        assert_eq!(parsed.global.root, PathBuf::from("/b"));
        let Some(Command::Exec(exec)) = parsed.command else {
            panic!("{words}");
        };
        assert_eq!(exec.env, ["A=1", "B=2"]);
    }
}
