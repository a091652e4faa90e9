//! `run`: create, start and, unless detached, the wait for the end.

use std::io;
use std::thread;

use anyhow::Context;
use hull_sandbox::{Container, Engine, Stdio};
use hull_shim::lifecycle;
use rustix::termios::tcgetwinsize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::args::RunArgs;
use crate::console::Raw;
use crate::create::make;
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
    let raw = (container.plan().tty && !args.detach)
        .then(Raw::enter)
        .transpose()?;
    if let Err(error) = lifecycle::release(&container, |error| log.warn(error)) {
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
        lifecycle::remove(container, |error| log.warn(error))?;
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
