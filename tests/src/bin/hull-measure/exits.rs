//! VM exits by reason, counted by the host kernel.
//!
//! Owns: a histogram on the trace event `kvm:kvm_exit` (kernel documentation, "Event
//! Histograms"). Refuses: to run while instructions are counted; its own work would be in them.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use rustix::mount::{MountFlags, mount};

const TRACING: &str = "/sys/kernel/tracing";
const EVENT: &str = "/sys/kernel/tracing/events/kvm/kvm_exit";

/// A page that the guest has not touched before.
pub(crate) const FAULT: &str = "nested page fault";

/// Exit codes of AMD's SVM (APM volume 2, appendix C) that are met here.
const REASONS: [(u64, &str); 24] = [
    (0x40, "exception: divide"),
    (0x41, "exception: debug"),
    (0x46, "exception: invalid opcode"),
    (0x47, "exception: no device"),
    (0x4d, "exception: protection"),
    (0x4e, "exception: page fault"),
    (0x52, "exception: machine check"),
    (0x60, "host interrupt"),
    (0x61, "nmi"),
    (0x62, "smi"),
    (0x64, "interrupt window"),
    (0x6e, "rdtsc"),
    (0x6f, "rdpmc"),
    (0x72, "cpuid"),
    (0x74, "iret"),
    (0x76, "invd"),
    (0x77, "pause"),
    (0x78, "hlt"),
    (0x7b, "port"),
    (0x7c, "msr"),
    (0x7f, "shutdown"),
    (0x81, "vmmcall"),
    (0x8d, "xsetbv"),
    (0x400, FAULT),
];

/// Counts from its making on; dropping it stops.
#[derive(Debug)]
pub(crate) struct Exits(());

impl Exits {
    /// Starts to count at zero.
    pub(crate) fn count() -> Result<Self> {
        if !Path::new(EVENT).exists() {
            mount(c"tracefs", TRACING, c"tracefs", MountFlags::empty(), None)
                .context("mount tracefs")?;
        }
        write("trigger", "hist:keys=exit_reason:size=128")?;
        Ok(Self(()))
    }

    /// What was counted so far, most frequent first.
    pub(crate) fn read(&self) -> Result<Vec<(String, f64)>> {
        let text = fs::read_to_string(format!("{EVENT}/hist")).context("read the exits")?;
        Ok(parse(&text))
    }
}

impl Drop for Exits {
    fn drop(&mut self) {
        // It can't be told, and the next count would fail on it.
        let _ = write("trigger", "!hist:keys=exit_reason:size=128");
    }
}

fn write(file: &str, text: &str) -> Result<()> {
    let path = format!("{EVENT}/{file}");
    fs::write(&path, text).with_context(|| format!("write {text:?} to {path}"))
}

/// Lines such as `{ exit_reason:       1024 } hitcount:       5203`.
fn parse(text: &str) -> Vec<(String, f64)> {
    let line = |line: &str| {
        let (_, rest) = line.split_once("exit_reason:")?;
        let (reason, rest) = rest.split_once('}')?;
        let (_, count) = rest.split_once("hitcount:")?;
        let reason = reason.trim();
        let name = number(reason).and_then(name);
        let name = name.map_or_else(|| format!("reason {reason}"), str::to_owned);
        Some((name, count.trim().parse::<f64>().ok()?))
    };
    let mut counts: Vec<(String, f64)> = Vec::new();
    for (name, count) in text.lines().filter_map(line) {
        match counts.iter_mut().find(|(known, _)| *known == name) {
            Some((_, sum)) => *sum += count,
            None => counts.push((name, count)),
        }
    }
    counts.sort_by(|a, b| b.1.total_cmp(&a.1));
    counts
}

fn name(code: u64) -> Option<&'static str> {
    match code {
        0x00..=0x1f | 0x65 => Some("control register"),
        0x20..=0x3f => Some("debug register"),
        _ => {
            let known = REASONS.iter().find(|(known, _)| *known == code);
            known.map(|(_, name)| *name)
        }
    }
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_named_and_sorted() {
        let text = "# event histogram\n#\n\
            { exit_reason:        123 } hitcount:        520\n\
            { exit_reason:       1024 } hitcount:       5203\n\
            { exit_reason:          4 } hitcount:          2\n\
            { exit_reason:         20 } hitcount:         35\n\
            { exit_reason:         99 } hitcount:          1\n\n\
            Totals:\n    Hits: 5761\n";
        let expected = [
            ("nested page fault", 5203.0),
            ("port", 520.0),
            ("control register", 37.0),
            ("reason 99", 1.0),
        ];
        let seen = parse(text);
        let seen: Vec<(&str, f64)> = seen.iter().map(|(n, c)| (n.as_str(), *c)).collect();
        assert_eq!(seen, expected);
    }
}
