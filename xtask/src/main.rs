//! `cargo xtask`: everything done to this workspace by one command.
//!
//! Owns: the table of subcommands. Refuses: to do any of it; each has a module of its own.

mod bench;
mod check;
mod demo;
mod fuzz;
mod host;
mod install;
mod kernel;
mod stage;
mod test;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use hull_tests::host::Report;

/// Builds, checks, tests, demonstrates and measures Hull.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    /// Format, clippy, house rules, dependency policy.
    Check,
    /// Set up all that is needed and run every test.
    Test {
        /// Only this system suite (repeatable).
        #[arg(long = "suite", value_name = "NAME")]
        suites: Vec<String>,
    },
    /// Set up all that is needed, boot a real image and run a command in it.
    Demo,
    /// Build the guest kernel.
    Kernel {
        /// The one with a serial console, symbols and early messages.
        #[arg(long)]
        debug: bool,
    },
    Host(host::Arguments),
    Bench(bench::Arguments),
    Fuzz(fuzz::Arguments),
    /// Build Hull and copy it to a prefix.
    Install {
        /// Where to.
        #[arg(long, default_value = "/usr/local")]
        prefix: PathBuf,
    },
}

fn main() -> ExitCode {
    match run(Task::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Host(arguments) => return host::run(arguments),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Fuzz(arguments) => fuzz::run(&arguments),
        Task::Check => check::run(),
        Task::Test { suites } => test::run(&suites),
        Task::Demo => demo::run(),
        Task::Kernel { debug } => kernel::run(debug),
        Task::Install { prefix } => install::run(&prefix),
    }?;
    Ok(ExitCode::SUCCESS)
}

/// Steps on stderr, as `name: step`.
fn report(name: &'static str) -> Report {
    Report::to(move |text| eprintln!("{name}: {text}"))
}
