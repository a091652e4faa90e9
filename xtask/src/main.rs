//! `cargo xtask`: everything done to this workspace by one command.
//!
//! Owns: the table of subcommands. Refuses: to do any of it; each has a module of its own.

mod host;

use std::process::ExitCode;

use clap::Parser;

/// Builds, checks, tests, demonstrates and measures Hull.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Task {
    Host(host::Arguments),
}

fn main() -> ExitCode {
    let outcome = match Task::parse() {
        Task::Host(arguments) => host::run(arguments),
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("xtask: {error:#}");
        ExitCode::FAILURE
    })
}
