//! A hundred idle sandboxes at once: what each costs the host that no other shares, whether all of
//! them answer, and what is left when they are removed.
//!
//! Owns: the sandboxes, and reading what they hold before anything is asked of them. Refuses: to
//! give a figure if one didn't answer, or left anything.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use hull_tests::leftovers::Traces;

use crate::programs::{Place, Program};
use crate::{idle, memory, timing};

/// Sandboxes at once.
const SANDBOXES: usize = 100;
/// Starts before them: the template is there, and what a copy touches is known.
const WARM: usize = 2;
/// Time from the last start until what was begun at the starts is done.
const SETTLE: Duration = Duration::from_secs(10);
/// Time that monitors have to end when they are removed.
const END: Duration = Duration::from_secs(60);

/// What was seen: bytes of one sandbox, in the mean of all.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Private pages: the guest's and the monitor's.
    pub(crate) private: u64,
    /// Those of them that are the monitor's own.
    pub(crate) monitor: u64,
    /// Page tables of the monitor, which map its guest's memory, too.
    pub(crate) tables: u64,
    /// Page tables of the guest's, by which the processor finds its memory.
    pub(crate) nested_tables: u64,
    /// What the machine could give to others before and can't give now.
    pub(crate) unavailable: u64,
}

/// Has all of them, and nothing after.
pub(crate) fn seen(place: &Place, log: &Path) -> Result<Seen> {
    for _ in 0..WARM {
        idle::marks(place, false, log)?;
    }
    let (state, run) = (place.join("state"), place.join("run"));
    let mut traces = Traces {
        base: &place.0,
        state: &state,
        run: &run,
        ids: &[],
    };
    let before: BTreeSet<String> = traces.all().into_iter().collect();
    let names: Vec<String> = (0..SANDBOXES)
        .map(|number| format!("bench-crowd-{number}"))
        .collect();
    let mut ids = Vec::new();
    let together = together(place, &names, &mut ids, log);
    let words = ["rm", "-f"].into_iter();
    let removal: Vec<&str> = words.chain(names.iter().map(String::as_str)).collect();
    let removed = crate::output(&place.hull(&removal), log);
    let seen = together?;
    removed?;
    traces.ids = &ids;
    traces.await_processes(END);
    let mut left = traces.all();
    left.retain(|line| !before.contains(line));
    ensure!(left.is_empty(), "these are left: {}", left.join("; "));
    Ok(seen)
}

/// Starts all, reads, and then has each answer.
fn together(place: &Place, names: &[String], ids: &mut Vec<String>, log: &Path) -> Result<Seen> {
    let before = memory::of_machine()?;
    for (number, name) in names.iter().enumerate() {
        let id = crate::output(&place.idle(Program::Hull, name), log)
            .with_context(|| format!("start one beside {number} others"))?;
        ids.push(id.trim().to_owned());
    }
    let mut pids = Vec::new();
    for name in names {
        pids.push(idle::inspect(place, name, log)?.monitor_pid);
    }
    timing::pass(*pids.last().context("nobody came")?, SETTLE)?;
    let after = memory::of_machine()?;
    let mut sum = Seen {
        nested_tables: after.nested_tables.saturating_sub(before.nested_tables),
        unavailable: before.available.saturating_sub(after.available),
        ..Seen::default()
    };
    for &pid in &pids {
        sum.private += memory::whole(pid)?;
        sum.monitor += memory::of(pid)?.private;
        sum.tables += memory::tables(pid)?;
    }
    for name in names {
        let said = crate::output(&place.hull(&["exec", name, "stat", "-c", "%n", "/"]), log)
            .with_context(|| format!("have {name} answer"))?;
        ensure!(said.trim() == "/", "{name} answers {said:?}");
    }
    let count = u64::try_from(names.len()).context("too many")?;
    Ok(Seen {
        private: sum.private / count,
        monitor: sum.monitor / count,
        tables: sum.tables / count,
        nested_tables: sum.nested_tables / count,
        unavailable: sum.unavailable / count,
    })
}
