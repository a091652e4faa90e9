//! `hull-oci`: Hull behind the command line that engines drive OCI runtimes with (runc's).
//!
//! Owns: the words, the exit codes and the log that engines look at. Refuses: everything else;
//! the engine makes the container, its monitor carries it on when this program has ended.

#![forbid(unsafe_code)]

mod args;
mod console;
mod create;
mod events;
mod exec;
mod features;
mod log;
mod manage;
mod run;
mod update;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use hull_sandbox::{Engine, Settings};

use crate::args::{Command, HullOci};
use crate::log::Log;

fn main() -> ExitCode {
    let oci = match HullOci::try_parse() {
        Ok(oci) => oci,
        Err(error) => {
            // Nothing more can be done about a stream that doesn't work.
            let _ = error.print();
            let asked = matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            );
            return ExitCode::from(u8::from(!asked));
        }
    };
    let log = Log::open(&oci.global);
    match dispatch(&oci, &log) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            log.error(&error);
            ExitCode::from(match oci.command {
                // What runc's callers take for the runtime's own failure.
                Some(Command::Exec(_)) => 255,
                _ => 1,
            })
        }
    }
}

fn dispatch(oci: &HullOci, log: &Log) -> anyhow::Result<u8> {
    if oci.version {
        return version();
    }
    let engine = || -> anyhow::Result<Engine> {
        let settings = Settings::load()?;
        Ok(Engine::at(settings, &oci.global.root))
    };
    let Some(command) = &oci.command else {
        anyhow::bail!("no command was given; see hull-oci --help");
    };
    match command {
        Command::Create(args) => create::create(&engine()?, args, log),
        Command::Start(args) => create::start(&engine()?, &args.id, log),
        Command::Run(args) => run::run(&engine()?, args, log),
        Command::State(args) => manage::state(&engine()?, &args.id),
        Command::Kill(args) => manage::kill(&engine()?, args),
        Command::Delete(args) => manage::delete(&engine()?, args, log),
        Command::List(args) => manage::list(&engine()?, args),
        Command::Ps(args) => events::ps(&engine()?, args),
        Command::Pause(args) => manage::pause(&engine()?, &args.id),
        Command::Resume(args) => manage::resume(&engine()?, &args.id),
        Command::Exec(args) => exec::exec(&engine()?, args),
        Command::Features => features::features(),
        Command::Spec(args) => features::spec(args),
        Command::Update(args) => update::update(&engine()?, args),
        Command::Events(args) => events::events(&engine()?, args, log),
    }
}

fn version() -> anyhow::Result<u8> {
    writeln!(
        std::io::stdout(),
        "hull-oci version {}\nspec: {}",
        env!("CARGO_PKG_VERSION"),
        hull_shim::features::SPEC_VERSION
    )?;
    Ok(0)
}
