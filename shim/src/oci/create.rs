//! `create` and `start`: a container is made by one process and started by another.

use std::fs;
use std::path::Path;

use anyhow::{Context, anyhow, bail};
use hull_sandbox::{Container, Engine, EngineError, Phase, Running, Status, Stdio, StoreError};
use hull_shim::{bundle, lifecycle};

use crate::args::CreateArgs;
use crate::log::Log;
use crate::{console, manage};

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
    let pid_file = |running: &Running| match &args.pid_file {
        Some(path) => write_pid(path, running.monitor_pid),
        None => Ok(()),
    };
    let made = lifecycle::make(engine, &request, streams, pid_file, |error| log.warn(error));
    made.map_err(|error| match error.downcast_ref() {
        Some(EngineError::Store(StoreError::NameInUse { .. })) => {
            anyhow!("container with id exists: {}", args.id)
        }
        _ => error.context("container create failed"),
    })
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
    lifecycle::release(&container, |error| log.warn(error))?;
    Ok(0)
}
