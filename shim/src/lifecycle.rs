//! A bundle's container from its making to its removal, with the hooks in their places.

use anyhow::bail;
use hull_sandbox::{BundleRequest, Container, Engine, Phase, PlannedRoot, Running, Status, Stdio};
use serde_json::{Value, json};

use crate::features::SPEC_VERSION;
use crate::hooks;

/// Makes a container with the streams that `streams` gives for a process that has a terminal or
/// not; `made` is the last that may fail. Nothing is left of one that fails; what can't be
/// removed then is told to `warn`.
///
/// # Errors
/// If the bundle can't be a container, or the VM doesn't come up.
pub fn make(
    engine: &Engine,
    request: &BundleRequest,
    streams: impl FnOnce(bool) -> anyhow::Result<Stdio>,
    made: impl FnOnce(&Running) -> anyhow::Result<()>,
    warn: impl FnOnce(&anyhow::Error),
) -> anyhow::Result<Container> {
    hooks::check(&request.spec)?;
    let mut container = engine.create_bundle(request)?;
    let result = streams(container.plan().tty)
        .and_then(|stdio| Ok(container.start_with(stdio)?))
        .and_then(|()| running(&container))
        .and_then(|running| {
            hooks::on_create(&request.spec, &describe(&container)?)?;
            made(&running)
        });
    match result {
        Ok(()) => Ok(container),
        Err(error) => {
            if let Err(remains) = container.remove(true) {
                let what = format!("cannot remove container {}", request.id);
                warn(&anyhow::Error::from(remains).context(what));
            }
            Err(error)
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

/// Runs the command of a container that was made.
///
/// # Errors
/// If it can't be executed; a hook that fails is told to `warn`, as the spec has it.
pub fn release(container: &Container, warn: impl FnOnce(&anyhow::Error)) -> anyhow::Result<()> {
    // What can't be read is said before anything runs.
    let spec = container.plan().read_spec()?;
    container.release()?;
    let state = describe(container)?;
    if let Err(error) = hooks::on_start(&spec, &state) {
        warn(&error);
    }
    Ok(())
}

/// Removes a container, killing it if need be, and runs its last hooks.
///
/// # Errors
/// If it can't be removed; a hook that fails is told to `warn`, as the spec has it.
pub fn remove(container: Container, warn: impl FnOnce(&anyhow::Error)) -> anyhow::Result<()> {
    let mut state = describe(&container)?;
    state["status"] = json!("stopped");
    state["pid"] = json!(0);
    let spec = container.plan().read_spec()?;
    container.remove(true)?;
    if let Err(error) = hooks::on_delete(&spec, &state) {
        warn(&error);
    }
    Ok(())
}

/// A container's state as the runtime spec has it, with what runc adds.
///
/// # Errors
/// If its directory can't be read.
pub fn describe(container: &Container) -> anyhow::Result<Value> {
    let plan = container.plan();
    let (status, pid) = match container.status()? {
        Status::Created | Status::Starting => ("creating", 0),
        Status::Running(running) => {
            let word = match running.phase {
                Phase::Held => "created",
                Phase::Running => "running",
                Phase::Paused => "paused",
            };
            (word, running.monitor_pid)
        }
        Status::Exited(_) => ("stopped", 0),
    };
    let rootfs = match &plan.root {
        PlannedRoot::Directory(path) => Some(path),
        PlannedRoot::Layers(_) => None,
    };
    Ok(json!({
        "ociVersion": SPEC_VERSION,
        "id": plan.id,
        "pid": pid,
        "status": status,
        "bundle": plan.bundle,
        "rootfs": rootfs,
        "created": plan.created_at.to_string(),
        "annotations": plan.labels,
        "owner": "",
    }))
}
