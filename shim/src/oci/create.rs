//! `create` and `start`: a container is made by one process and started by another.

use std::fs;
use std::path::Path;

use anyhow::{Context, bail};
use hull_sandbox::{Container, Engine, EngineError, Phase, Running, Status, Stdio, StoreError};

use crate::args::CreateArgs;
use crate::log::Log;
use crate::{bundle, console, hooks, manage};

/// Makes a container; its command waits.
pub(crate) fn create(engine: &Engine, args: &CreateArgs, log: &Log) -> anyhow::Result<u8> {
    make(engine, args, log, |terminal| {
        console::streams(terminal, args.console_socket.as_deref())
    })?;
    Ok(0)
}

/// Makes a container with the streams that `streams` gives for a process that has a terminal or
/// not. Nothing is left of one that fails.
pub(crate) fn make(
    engine: &Engine,
    args: &CreateArgs,
    log: &Log,
    streams: impl FnOnce(bool) -> anyhow::Result<Stdio>,
) -> anyhow::Result<Container> {
    if args.preserve_fds > 0 {
        bail!("--preserve-fds is refused: descriptors can't be handed to a virtual machine");
    }
    let request = bundle::read(&args.id, args.bundle.as_deref())?;
    hooks::check(&request.spec)?;
    let mut container = match engine.create_bundle(&request) {
        Err(EngineError::Store(StoreError::NameInUse { .. })) => {
            bail!("container with id exists: {}", args.id);
        }
        made => made?,
    };
    let id = args.id.as_str();
    let terminal = container.plan().tty;
    let made = streams(terminal)
        .and_then(|stdio| Ok(container.start_with(stdio)?))
        .and_then(|()| running(&container))
        .and_then(|running| {
            hooks::on_create(&request.spec, &manage::describe(&container)?)?;
            match &args.pid_file {
                Some(path) => write_pid(path, running.monitor_pid),
                None => Ok(()),
            }
        });
    match made {
        Ok(()) => Ok(container),
        Err(error) => {
            if let Err(remains) = container.remove(true) {
                let remains = anyhow::Error::from(remains);
                log.warn(&remains.context(format!("cannot remove container {id}")));
            }
            Err(error.context("container create failed"))
        }
    }
}

fn running(container: &Container) -> anyhow::Result<Running> {
    match container.status()? {
        Status::Running(running) => Ok(running),
        Status::Exited(record) => bail!(
            record
                .error
                .unwrap_or_else(|| "the container ended before it was started".to_owned())
        ),
        Status::Created | Status::Starting => bail!("the container is still being made"),
    }
}

/// Written whole or not at all: engines read it as soon as it is there.
pub(crate) fn write_pid(path: &Path, pid: u32) -> anyhow::Result<()> {
    let what = || format!("cannot write pid file \"{}\"", path.display());
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let fresh = path.with_file_name(format!(".{name}"));
    fs::write(&fresh, pid.to_string()).with_context(what)?;
    fs::rename(&fresh, path).with_context(what)
}

/// Runs the command of a container that was made.
pub(crate) fn start(engine: &Engine, id: &str, log: &Log) -> anyhow::Result<u8> {
    let container = manage::find(engine, id)?;
    match container.status()? {
        Status::Running(running) if running.phase == Phase::Held => {}
        Status::Exited(_) => bail!("cannot start a container that has stopped"),
        Status::Running(_) => bail!("cannot start an already running container"),
        Status::Created | Status::Starting => bail!("the container is still being made"),
    }
    release(&container, log)?;
    Ok(0)
}

pub(crate) fn release(container: &Container, log: &Log) -> anyhow::Result<()> {
    container.release()?;
    let state = manage::describe(container)?;
    if let Err(error) = hooks::on_start(&container.plan().spec, &state) {
        // The spec has it logged and the container go on.
        log.warn(&error);
    }
    Ok(())
}
