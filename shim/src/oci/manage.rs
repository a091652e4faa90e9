//! Containers that exist: what they are, signals, stillness, removal.

use std::io::{Write, stdout};

use anyhow::{anyhow, bail};
use hull_sandbox::{Container, Engine, EngineError, Phase, Status, parse_signal};
use hull_shim::lifecycle::{self, describe};
use serde_json::{Value, json};

use crate::args::{DeleteArgs, KillArgs, ListArgs};
use crate::log::Log;

/// The container with this id, or the words by which engines know that there is none.
pub(crate) fn find(engine: &Engine, id: &str) -> anyhow::Result<Container> {
    find_if_any(engine, id)?.ok_or_else(|| absent(id))
}

fn absent(id: &str) -> anyhow::Error {
    anyhow!("container does not exist: {id}")
}

/// As [`find`], or none if there is none of that id.
fn find_if_any(engine: &Engine, id: &str) -> anyhow::Result<Option<Container>> {
    match engine.get(id) {
        Err(EngineError::Store(error)) if error.is_missing() => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// Prints it.
pub(crate) fn state(engine: &Engine, id: &str) -> anyhow::Result<u8> {
    let state = describe(&find(engine, id)?)?;
    writeln!(stdout(), "{}", serde_json::to_string_pretty(&state)?)?;
    Ok(0)
}

/// Sends a signal.
pub(crate) fn kill(engine: &Engine, args: &KillArgs) -> anyhow::Result<u8> {
    let signal = parse_signal(&args.signal)?;
    let container = find(engine, &args.id)?;
    let sent = match container.status()? {
        Status::Exited(_) => bail!("container not running"),
        _ if args.all => container.send_signal(signal, true),
        _ => container.signal(signal),
    };
    match sent {
        Err(EngineError::NotRunning(_)) => bail!("container not running"),
        sent => sent?,
    }
    Ok(0)
}

/// Removes a container.
pub(crate) fn delete(engine: &Engine, args: &DeleteArgs, log: &Log) -> anyhow::Result<u8> {
    let container = match find_if_any(engine, &args.id)? {
        None if args.force => return Ok(0),
        None => return Err(absent(&args.id)),
        Some(container) => container,
    };
    let status = container.status()?;
    let idle = match &status {
        Status::Running(running) => running.phase == Phase::Held,
        Status::Created | Status::Exited(_) => true,
        Status::Starting => false,
    };
    if !idle && !args.force {
        bail!("cannot delete container {} that is not stopped", args.id);
    }
    lifecycle::remove(container, |error| log.warn(error))?;
    Ok(0)
}

/// Lists the containers.
pub(crate) fn list(engine: &Engine, args: &ListArgs) -> anyhow::Result<u8> {
    let containers = engine.list()?;
    let mut out = stdout().lock();
    if args.quiet {
        for container in &containers {
            writeln!(out, "{}", container.id())?;
        }
        return Ok(0);
    }
    let states = containers.iter().map(describe);
    let states = states.collect::<anyhow::Result<Vec<Value>>>()?;
    if args.format == "json" {
        writeln!(out, "{}", json!(states))?;
        return Ok(0);
    }
    writeln!(
        out,
        "{:<24} {:<10} {:<10} {:<32} CREATED",
        "ID", "PID", "STATUS", "BUNDLE"
    )?;
    for state in &states {
        let word = |name: &str| state[name].as_str().unwrap_or_default().to_owned();
        writeln!(
            out,
            "{:<24} {:<10} {:<10} {:<32} {}",
            word("id"),
            state["pid"],
            word("status"),
            word("bundle"),
            word("created")
        )?;
    }
    Ok(0)
}

/// Has it stand still.
pub(crate) fn pause(engine: &Engine, id: &str) -> anyhow::Result<u8> {
    find(engine, id)?.pause()?;
    Ok(0)
}

/// Lets it go on.
pub(crate) fn resume(engine: &Engine, id: &str) -> anyhow::Result<u8> {
    find(engine, id)?.resume()?;
    Ok(0)
}
