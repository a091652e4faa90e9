//! Many sandboxes that read one large file of their image: how often the host then holds it.
//!
//! Owns: the sandboxes and what the host's memory grows by. Refuses: to guess whose it is. Images
//! lie in memory here, so one copy is there from the start.

use std::path::Path;

use anyhow::{Context, Result};

use crate::idle::remove;
use crate::memory;
use crate::programs::Place;

/// Sandboxes that read at the same time.
const SANDBOXES: usize = 20;
/// The file, as `xtask` made it.
const FILE: &str = "/large";

/// What was seen.
#[derive(Debug)]
pub(crate) struct Growth {
    /// Bytes of the file.
    pub(crate) file: u64,
    /// Bytes of contents that the host had to hold beyond it when all of them had read it.
    pub(crate) contents: u64,
    /// Bytes of page tables that it had to make.
    pub(crate) tables: u64,
}

/// Starts all of them, and has each read the file.
pub(crate) fn growth(place: &Place, log: &Path) -> Result<Growth> {
    let image = place.join("large.tar").display().to_string();
    crate::output(&place.hull(&["load", "-i", &image]), log)?;
    let names: Vec<String> = (0..SANDBOXES)
        .map(|n| format!("bench-layers-{n}"))
        .collect();
    let seen = read(place, &names, log);
    for name in &names {
        // Not all of them need be there.
        let _ = remove(place, name, log);
    }
    seen
}

fn read(place: &Place, names: &[String], log: &Path) -> Result<Growth> {
    for name in names {
        let run = [
            "run",
            "-d",
            "--name",
            name,
            "bench-large",
            "sleep",
            "infinity",
        ];
        crate::output(&place.hull(&run), log)?;
    }
    let copy = |name: &str, from: &str, count: &str| {
        let (from, count) = (format!("if={from}"), format!("count={count}"));
        let dd = ["exec", name, "dd", &from, "of=/dev/null", "bs=64k", &count];
        crate::output(&place.hull(&dd), log)
    };
    let size = crate::output(
        &place.hull(&["exec", &names[0], "stat", "-c", "%s", FILE]),
        log,
    )?;
    // The reader itself, and its buffer, are there before.
    for name in names {
        copy(name, "/dev/zero", "1")?;
    }
    let before = memory::of_machine()?;
    for name in names {
        copy(name, FILE, "1000000")?;
    }
    let after = memory::of_machine()?;
    Ok(Growth {
        file: size.trim().parse().context("understand the file's size")?,
        contents: after.contents.saturating_sub(before.contents),
        tables: (after.tables + after.nested_tables)
            .saturating_sub(before.tables + before.nested_tables),
    })
}
