//! `run`: create, start and, unless detached, the wait for the end.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::thread;

use anyhow::Context;
use hull_sandbox::{Container, Engine, Stdio};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::args::RunArgs;
use crate::create::{make, release};
use crate::log::Log;
use crate::{console, manage};

/// Runs a container; in the foreground, returns its command's code.
pub(crate) fn run(engine: &Engine, args: &RunArgs, log: &Log) -> anyhow::Result<u8> {
    let socket = args.create.console_socket.as_deref();
    let container = make(engine, &args.create, log, |terminal| {
        if terminal && !args.detach && socket.is_none() {
            return Stdio::own(true).context("cannot use the standard streams");
        }
        console::streams(terminal, socket)
    })?;
    let raw = match container.plan().tty && !args.detach && io::stdin().is_terminal() {
        true => Some(Raw::enter()?),
        false => None,
    };
    if let Err(error) = release(&container, log) {
        let _ = container.remove(true);
        return Err(error);
    }
    if args.detach {
        return Ok(0);
    }
    let id = container.id().to_owned();
    let watched = manage::find(engine, &id)?;
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH])
        .context("cannot catch signals")?;
    // It ends with this process.
    thread::spawn(move || {
        resize(&watched);
        for signal in signals.forever() {
            match u8::try_from(signal) {
                Ok(_) if signal == SIGWINCH => resize(&watched),
                // One that comes too late has nobody to reach.
                Ok(signal) => drop(watched.signal(signal)),
                Err(_) => {}
            }
        }
    });
    let record = container.wait();
    drop(raw);
    let record = record?;
    if !args.keep {
        manage::remove(container, log)?;
    }
    Ok(record.code)
}

fn resize(container: &Container) {
    if container.plan().tty
        && let Ok(size) = tcgetwinsize(io::stdout())
    {
        let _ = container.resize(size.ws_row, size.ws_col);
    }
}

/// The terminal in raw mode, until dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> anyhow::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd()).context("cannot read the terminal's modes")?;
        let mut modes = before.clone();
        modes.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Drain, &modes)
            .context("cannot put the terminal in raw mode")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs no modes.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
