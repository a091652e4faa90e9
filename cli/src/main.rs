//! `hull`: Docker's commands, each container in its own micro-VM.
//!
//! Owns: dispatch, and the one place where errors are printed and become exit codes. Refuses:
//! everything else; commands turn flags into a request to the engine and its answer into words.

#![forbid(unsafe_code)]

mod args;
mod attach;
mod checkpoint;
mod containers;
mod detach;
mod doctor;
mod exec;
mod failure;
mod foreground;
mod format;
mod images;
mod inspect;
mod install;
mod logs;
mod parse;
mod progress;
mod relay;
mod request;
mod resources;
mod run;
mod signals;
mod system;
mod templates;
mod terminal;

use std::io::{Write, stderr};
use std::process::ExitCode;

use clap::Parser;
use clap::error::ErrorKind;
use hull_sandbox::{CODE_HULL_FAILED, Engine, Settings};

use crate::args::{Command, Hull, ImageCommand};

fn main() -> ExitCode {
    let hull = match Hull::try_parse() {
        Ok(hull) => hull,
        Err(error) => return usage(&error),
    };
    let failing_code = failure::default_code(&hull.command);
    match dispatch(hull.command) {
        Ok(code) => ExitCode::from(code),
        Err(error) => ExitCode::from(failure::report(&error, failing_code)),
    }
}

/// Help and version go to stdout; what was typed wrongly to stderr, with Hull's own code.
fn usage(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => match error.print() {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::from(CODE_HULL_FAILED),
        },
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // Nothing more can be done about a stderr that doesn't work.
            let _ = error.print();
            ExitCode::from(CODE_HULL_FAILED)
        }
        _ => {
            let text = error.render().to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            let _ = write!(stderr(), "hull: {text}");
            ExitCode::from(CODE_HULL_FAILED)
        }
    }
}

fn dispatch(command: Command) -> anyhow::Result<u8> {
    let settings = Settings::load()?;
    let engine = Engine::new(settings);
    match command {
        Command::Run(args) => run::run(&engine, &args),
        Command::Exec(args) => exec::exec(&engine, &args),
        Command::Attach(args) => attach::attach(&engine, &args),
        Command::Install(args) => install::install(&args),
        Command::Uninstall(args) => install::uninstall(&args),
        Command::Ps(args) => containers::ps(&engine, &args),
        Command::Stats(args) => resources::stats(&engine, &args),
        Command::Top(args) => resources::top(&engine, &args),
        Command::Update(args) => resources::update(&engine, &args),
        Command::Logs(args) => logs::logs(&engine, &args),
        Command::Start(args) => run::start_again(&engine, &args),
        Command::Stop(args) => containers::stop(&engine, &args),
        Command::Kill(args) => containers::kill(&engine, &args),
        Command::Checkpoint(args) => checkpoint::checkpoint(&engine, &args),
        Command::Fork(args) => checkpoint::fork(&engine, &args),
        Command::Rm(args) => containers::rm(&engine, &args),
        Command::Wait(args) => containers::wait(&engine, &args),
        Command::Inspect(args) => inspect::inspect(&engine, &args),
        Command::Pull(args) => images::pull(&engine, &args),
        Command::Load(args) => images::load(&engine, &args),
        Command::Images(args) => images::list(&engine, &args),
        Command::Rmi(args) => images::remove(&engine, &args),
        Command::Image(ImageCommand::Prune(args)) => images::prune(&engine, &args),
        Command::System(command) => system::system(&engine, &command),
        Command::Template(command) => templates::template(&engine, &command),
        Command::Doctor(args) => doctor::doctor(&engine, &args),
        Command::Version => version(),
        Command::HoldStream => exec::hold(),
    }
}

fn version() -> anyhow::Result<u8> {
    writeln!(
        std::io::stdout(),
        "Hull version {}",
        env!("CARGO_PKG_VERSION")
    )?;
    Ok(0)
}
