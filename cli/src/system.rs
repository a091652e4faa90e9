//! `hull system prune`, and the question that every prune asks first.

use std::io::{self, BufRead, Read, Write, stdin, stdout};

use anyhow::bail;
use hull_sandbox::{Engine, EngineError, Status};

use crate::args::{PruneArgs, SystemCommand};
use crate::{format, images};

/// What goes, as Docker words it.
const WARNING: &str = "WARNING! This will remove:\n  \
    - all stopped containers\n  \
    - all images without a name, and interrupted downloads\n  \
    - all templates\n\n";

/// Does what is asked of the whole.
pub(crate) fn system(engine: &Engine, command: &SystemCommand) -> anyhow::Result<u8> {
    match command {
        SystemCommand::Prune(args) => prune(engine, args),
    }
}

fn prune(engine: &Engine, args: &PruneArgs) -> anyhow::Result<u8> {
    if !args.force && !confirmed(WARNING)? {
        return Ok(0);
    }
    let mut freed = containers(engine)?;
    freed += templates(engine)?;
    // Last: a container that is gone needs no image.
    let pruned = images::prune_store(engine)?;
    writeln!(
        stdout(),
        "Total reclaimed space: {}",
        format::size(freed + pruned.freed_bytes)
    )?;
    if pruned.busy {
        bail!(images::BUSY);
    }
    Ok(0)
}

/// Asks whether it is to be done; anything but yes is no.
pub(crate) fn confirmed(warning: &str) -> io::Result<bool> {
    write!(
        stdout(),
        "{warning}Are you sure you want to continue? [y/N] "
    )?;
    stdout().flush()?;
    let mut answer = String::new();
    stdin().lock().take(16).read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y"))
}

/// Removes those that don't run; returns the bytes they took.
fn containers(engine: &Engine) -> anyhow::Result<u64> {
    let mut freed = 0;
    let mut title = Some("Deleted Containers:");
    for container in engine.list()? {
        if !matches!(container.status()?, Status::Created | Status::Exited(_)) {
            continue;
        }
        let (id, bytes) = (container.id().to_owned(), container.disk_bytes());
        match container.remove(false) {
            Ok(()) => tell(&mut title, &id)?,
            // Somebody starts it just now.
            Err(EngineError::IsRunning(_)) => continue,
            Err(error) => return Err(error.into()),
        }
        freed += bytes;
    }
    Ok(freed)
}

fn templates(engine: &Engine) -> anyhow::Result<u64> {
    let templates = engine.templates();
    let mut freed = 0;
    let mut title = Some("Deleted Templates:");
    for template in templates.list()? {
        templates.remove(&template.name)?;
        tell(&mut title, &template.name)?;
        freed += template.size_bytes;
    }
    Ok(freed)
}

fn tell(title: &mut Option<&str>, name: &str) -> io::Result<()> {
    if let Some(title) = title.take() {
        writeln!(stdout(), "{title}")?;
    }
    writeln!(stdout(), "{name}")
}
