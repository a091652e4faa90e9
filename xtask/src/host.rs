//! `cargo xtask host`: a command where KVM is real.
//!
//! Owns: its flags and what is shown while the machine comes up. Refuses: everything else, which
//! is `hull_tests::host`'s.

use std::io::{self, IsTerminal};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hull_tests::host::{Host, Options, Report};
use indicatif::{ProgressBar, ProgressStyle};

/// Runs a command where KVM is real: on this machine, or in a warm emulated one.
///
/// Its output, exit code, signals, terminal and directory are as if it ran here. Exit code 125
/// is the host's own failure.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Start a new emulated machine first.
    #[arg(long)]
    fresh: bool,
    /// End the warm machine and all that runs in it.
    #[arg(long, conflicts_with_all = ["fresh", "command"])]
    stop: bool,
    /// Deterministic time: an instruction takes 2 ns, on one processor, one command at a time.
    #[arg(long)]
    icount: bool,
    /// Memory of the emulated machine, MiB.
    #[arg(long, value_name = "MIB", default_value_t = Options::default().memory)]
    memory: u32,
    /// Use a machine apart from the one that everybody shares.
    #[arg(long, default_value = "default", value_parser = machine_name)]
    name: String,
    /// Pass a variable to the command (KEY takes its value from here).
    #[arg(long, value_name = "KEY[=VALUE]")]
    env: Vec<String>,
    /// The command and its arguments.
    #[arg(last = true, required_unless_present = "stop")]
    command: Vec<String>,
}

/// Runs the subcommand.
///
/// # Errors
/// When there's no host to be had.
pub(crate) fn run(arguments: Arguments) -> Result<ExitCode> {
    match command(arguments) {
        Ok(code) => Ok(code),
        Err(error) => {
            eprintln!("host: {error:#}");
            Ok(ExitCode::from(125))
        }
    }
}

fn command(arguments: Arguments) -> Result<ExitCode> {
    let steps = Steps::new();
    let options = Options {
        fresh: arguments.fresh,
        icount: arguments.icount,
        memory: arguments.memory,
        name: arguments.name,
        report: steps.report(),
    };
    if arguments.stop {
        let was_there = Host::stop(&options)?;
        eprintln!(
            "host: {}",
            if was_there {
                "stopped"
            } else {
                "nothing to stop"
            }
        );
        return Ok(ExitCode::SUCCESS);
    }
    let env: Vec<(String, String)> = arguments
        .env
        .iter()
        .map(|text| variable(text))
        .collect::<Result<_>>()?;
    let host = Host::acquire(&options);
    steps.finish();
    let host = host?;
    if host.is_native() {
        let (program, rest) = arguments.command.split_first().context("no command")?;
        let error = Command::new(program).args(rest).envs(env).exec();
        eprintln!("host: can't start {program}: {error}");
        let is_absent = error.kind() == io::ErrorKind::NotFound;
        return Ok(ExitCode::from(if is_absent { 127 } else { 126 }));
    }
    host.attach(arguments.command, &env).map(ExitCode::from)
}

fn variable(text: &str) -> Result<(String, String)> {
    match text.split_once('=') {
        Some(("", _)) => bail!("--env {text}: no name"),
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => {
            let value = std::env::var(text).with_context(|| format!("--env {text}"))?;
            Ok((text.to_owned(), value))
        }
    }
}

fn machine_name(text: &str) -> Result<String, String> {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '-';
    if !text.is_empty() && text.len() <= 40 && text.chars().all(is_plain) {
        Ok(text.to_owned())
    } else {
        Err("a name is 1 to 40 letters, digits, - or _".to_owned())
    }
}

/// The steps of a start: a spinner on a terminal, else a line each.
struct Steps {
    spinner: Option<ProgressBar>,
}

impl Steps {
    fn new() -> Self {
        let spinner = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{spinner} host: {msg} ({elapsed})");
            let bar = ProgressBar::new_spinner();
            bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()))
        });
        Self { spinner }
    }

    fn report(&self) -> Report {
        let Some(spinner) = self.spinner.clone() else {
            return Report::default();
        };
        Report::to(move |text| {
            spinner.set_message(text.to_owned());
            spinner.reset_elapsed();
            spinner.enable_steady_tick(Duration::from_millis(100));
        })
    }

    fn finish(&self) {
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
    }
}
