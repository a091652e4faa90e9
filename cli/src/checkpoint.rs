//! `hull checkpoint | fork`, and `hull run --from`: containers that go on from where one stood.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::Path;

use anyhow::bail;
use hull_sandbox::{Container, Engine, FromRequest};

use crate::args::{CheckpointArgs, ForkArgs, RunArgs};
use crate::images;

/// Where the copies of a fork come from, below the state directory: gone when they run.
const FORKS: &str = "forks";

/// `hull checkpoint`.
pub(crate) fn checkpoint(engine: &Engine, args: &CheckpointArgs) -> anyhow::Result<u8> {
    let container = engine.find(&args.name)?;
    let saved = container.checkpoint(&args.directory)?;
    if !args.leave_running {
        saved.end()?;
    }
    writeln!(stdout(), "{}", args.directory.display())?;
    Ok(0)
}

/// `hull fork`: all of the copies run, or none is left.
pub(crate) fn fork(engine: &Engine, args: &ForkArgs) -> anyhow::Result<u8> {
    if args.name.is_some() && args.count > 1 {
        bail!("--name names one copy, and {} are asked for", args.count);
    }
    let container = engine.find(&args.container)?;
    let staged = container.stage(&engine.settings().state_dir.join(FORKS))?;
    let request = FromRequest {
        name: args.name.clone(),
        hostname: None,
        network: None,
        labels: args.label.iter().cloned().collect(),
        auto_remove: args.rm,
    };
    let mut copies = Vec::new();
    for _ in 0..args.count {
        match run_copy(engine, staged.path(), &request) {
            Ok(copy) => copies.push(copy),
            Err(error) => {
                for copy in copies {
                    // The first error is the one to tell.
                    let _ = Container::remove(copy, true);
                }
                return Err(error);
            }
        }
    }
    drop(staged);
    for copy in &copies {
        writeln!(stdout(), "{}", copy.id())?;
    }
    Ok(0)
}

fn run_copy(
    engine: &Engine,
    checkpoint: &Path,
    request: &FromRequest,
) -> anyhow::Result<Container> {
    let mut copy = create(engine, checkpoint, request)?;
    if let Err(error) = copy.start(false) {
        let _ = copy.remove(true);
        return Err(error.into());
    }
    Ok(copy)
}

/// Makes the container of `hull run --from`.
pub(crate) fn create_from(
    engine: &Engine,
    args: &RunArgs,
    checkpoint: &Path,
) -> anyhow::Result<Container> {
    let labels: BTreeMap<String, String> = args.label.iter().cloned().collect();
    let request = FromRequest {
        name: args.name.clone(),
        hostname: args.hostname.clone(),
        network: args.network.0.clone(),
        labels,
        auto_remove: args.rm,
    };
    create(engine, checkpoint, &request)
}

fn create(engine: &Engine, checkpoint: &Path, request: &FromRequest) -> anyhow::Result<Container> {
    // Its image's layers stay until its plan, which names them, is on disk.
    let store = images::store(engine)?;
    let _hold = store.hold()?;
    Ok(engine.create_from(checkpoint, request)?)
}
