//! `delete`: what containerd has done when a shim is gone. Clears all that the shim, its monitor
//! and its container left, whatever killed them, and says how the container ended.

use std::env;
use std::io::{Write, stdout};

use anyhow::Context;
use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use hull_sandbox::{Engine, Status};

use crate::args::Flags;
use crate::process::Exit;
use crate::{bootstrap, engine, serve, task};

/// The code of a container that had to be killed.
const KILLED: u32 = 128 + 9;

/// Clears, and answers.
pub(crate) fn delete(flags: &Flags) -> anyhow::Result<()> {
    let bundle = match &flags.bundle {
        Some(bundle) => bundle.clone(),
        None => env::current_dir().context("cannot tell the bundle")?,
    };
    let engine = engine(&flags.namespace)?;
    let (mut pid, mut code) = (0, KILLED);
    if let Ok(container) = engine.get(&flags.id) {
        match container.status() {
            Ok(Status::Running(running)) => pid = running.monitor_pid,
            // It ended by itself, and nobody was there to say so.
            Ok(Status::Exited(record)) => code = record.code.into(),
            _ => {}
        }
    }
    remove_members(&engine, &flags.id)?;
    task::remove(&engine, &flags.id, &bundle)?;
    serve::remove_socket(&bundle, &bootstrap::socket(flags))
        .context("cannot remove the shim's socket")?;
    let exit = Exit::now(code);
    let answer = DeleteResponse {
        pid,
        exit_status: exit.code,
        exited_at: exit.timestamp(),
        ..DeleteResponse::default()
    };
    stdout()
        .write_all(&answer.write_to_bytes()?)
        .context("cannot answer containerd")
}

/// Removes the other containers of a sandbox, as far as nobody else will. Containerd has `delete`
/// run for those that it had `start` run for, which left the shim's address in their bundle; from
/// 2.3 on that is the sandbox alone.
fn remove_members(engine: &Engine, sandbox: &str) -> anyhow::Result<()> {
    for member in engine.list()? {
        let plan = member.plan();
        let (Some(holder), Some(bundle)) = (&plan.sandbox, &plan.bundle) else {
            continue;
        };
        if holder == sandbox && !bundle.join(bootstrap::ADDRESS_FILE).exists() {
            task::remove(engine, &plan.id, bundle)?;
        }
    }
    Ok(())
}
