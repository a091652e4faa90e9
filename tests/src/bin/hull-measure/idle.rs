//! A sandbox that has nothing to do: what it holds and how often it wakes.
//!
//! Owns: starting it, waiting, reading. Refuses: to count before it has settled.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::exits::Exits;
use crate::memory::{self, Memory};
use crate::programs::{COLD, Place, Program};
use crate::timing::{self, now};

/// Time from a start until what was begun at the start is done.
const SETTLE: Duration = Duration::from_secs(10);
/// Time that exits are counted for.
const WATCH: Duration = Duration::from_secs(60);

/// The name of the sandbox in question.
pub(crate) const NAME: &str = "bench-idle";

/// What an idle sandbox was seen to be.
#[derive(Debug)]
pub(crate) struct Seen {
    pub(crate) memory: Memory,
    pub(crate) exits_per_second: f64,
    pub(crate) reasons: Vec<(String, f64)>,
}

/// A start's stages, in nanoseconds since just before the exec of `hull`.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Marks {
    pub(crate) monitor: u64,
    built: u64,
    pub(crate) agent: u64,
    pub(crate) ready: u64,
    started: u64,
}

impl Marks {
    fn since(self, start: u64) -> Self {
        Self {
            monitor: self.monitor.saturating_sub(start),
            built: self.built.saturating_sub(start),
            agent: self.agent.saturating_sub(start),
            ready: self.ready.saturating_sub(start),
            started: self.started.saturating_sub(start),
        }
    }

    /// Each stage's name and instructions.
    pub(crate) fn stages(self) -> Vec<(String, f64)> {
        [
            ("monitor's main", self.monitor),
            ("machine built", self.built),
            ("guest's first process", self.agent),
            ("agent ready", self.ready),
            ("command started", self.started),
        ]
        .map(|(name, at)| (name.to_owned(), crate::instructions(at)))
        .to_vec()
    }
}

/// What `hull inspect` says of a running sandbox.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Inspected {
    pub(crate) monitor_pid: u32,
    start_marks: Marks,
    pub(crate) share_requests: u64,
}

/// Asks Hull about a sandbox.
pub(crate) fn inspect(place: &Place, name: &str, log: &Path) -> Result<Inspected> {
    #[derive(Deserialize)]
    #[serde(rename_all = "PascalCase")]
    struct Whole {
        hull: Inspected,
    }
    let text = crate::output(&place.hull(&["inspect", name]), log)?;
    let mut all: Vec<Whole> = serde_json::from_str(&text)
        .with_context(|| format!("understand what `hull inspect` says: {text}"))?;
    Ok(all.pop().context("`hull inspect` says nothing")?.hull)
}

/// Starts an idle sandbox of Hull's and gives when, and what it says of itself.
fn start_hull(place: &Place, cold: bool, log: &Path) -> Result<(u64, Inspected)> {
    let start = now();
    let mut run = vec!["run", "-d", "--name", NAME];
    run.extend(cold.then_some(COLD));
    run.extend(["bench", "sleep", "infinity"]);
    crate::output(&place.hull(&run), log)?;
    Ok((start, inspect(place, NAME, log)?))
}

/// Ends a sandbox of Hull's.
pub(crate) fn remove(place: &Place, name: &str, log: &Path) -> Result<()> {
    crate::output(&place.hull(&["rm", "-f", name]), log).map(drop)
}

/// The stages of one start.
pub(crate) fn marks(place: &Place, cold: bool, log: &Path) -> Result<Marks> {
    let seen = start_hull(place, cold, log);
    remove(place, NAME, log)?;
    let (start, inspected) = seen?;
    Ok(inspected.start_marks.since(start))
}

/// Pages of its guest's memory that a copy has for itself as soon as its command runs.
pub(crate) fn pages_copied(place: &Place, log: &Path) -> Result<u64> {
    let seen = start_hull(place, false, log);
    let memory = seen.and_then(|(_, inspected)| memory::of(inspected.monitor_pid));
    remove(place, NAME, log)?;
    Ok(memory?.copied / 4096)
}

/// Has `each` done while a container of the program's idles.
pub(crate) fn beside(
    place: &Place,
    program: Program,
    log: &Path,
    each: impl FnOnce() -> Result<()>,
) -> Result<()> {
    timing::time(&place.idle(program, NAME), log)?;
    let done = each();
    timing::time(&place.remove(program, NAME), log)?;
    done
}

/// Starts an idle sandbox, watches it and ends it.
pub(crate) fn watch(place: &Place, program: Program, log: &Path) -> Result<Seen> {
    if program == Program::Hull {
        let seen =
            start_hull(place, false, log).and_then(|(_, inspected)| settled(inspected.monitor_pid));
        remove(place, NAME, log)?;
        return seen;
    }
    let mut started = timing::start(&place.qemu("stay"), log)?;
    let seen = timing::await_byte(&mut started).and_then(|()| settled(started.child.id()));
    started.child.kill().context("end the idle program")?;
    started.child.wait().context("end the idle program")?;
    seen
}

fn settled(pid: u32) -> Result<Seen> {
    timing::pass(pid, SETTLE)?;
    let memory = memory::of(pid)?;
    let exits = Exits::count()?;
    timing::pass(pid, WATCH)?;
    let reasons = exits.read()?;
    let total: f64 = reasons.iter().map(|(_, count)| count).sum();
    Ok(Seen {
        memory,
        exits_per_second: total / WATCH.as_secs_f64(),
        reasons,
    })
}
