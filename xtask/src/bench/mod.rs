//! `cargo xtask bench`: what starts and idle sandboxes cost, beside other programs.
//!
//! Owns: choosing figures and programs, and a run of `hull-measure` in the KVM host with
//! deterministic time; what isn't counted in instructions is measured in a faster one. Refuses:
//! wall clocks, and to fail because of a figure. The method is written down in
//! docs/performance.md.

mod bundle;
mod inputs;
mod table;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use hull_tests::host::{Host, Options, Report};
use hull_tests::measure::{Findings, Order};

use crate::stage;

/// How often a program is measured before it is said that it can't be.
const ATTEMPTS: usize = 3;

/// Wall time that all measurements may take: emulated instructions are slow.
const LIMIT: Duration = Duration::from_secs(3600);

/// The root directory that everything is measured in, all of it memory: a path that leads over the
/// emulated host's own root waits for this machine, for as long as it takes and not as long as the
/// instructions of anybody do.
///
/// The inputs ($2) are laid out at their place ($1), with nothing of an earlier run. A guest that
/// doesn't boot in so many seconds ($3) hangs.
const SCRIPT: &str = "set -e; root=/tmp/hull-bench-root
    mkdir -p $root; mount -t tmpfs bench $root; cd $root
    mkdir dev proc sys tmp run etc lib lib64 sbin
    ln -s $1/lib lib/x86_64-linux-gnu; ln -s $1/bin/mke2fs sbin
    for each in dev proc sys tmp run; do mount --rbind /$each $each; done
    cp -L /lib64/ld-linux-x86-64.so.2 lib64; cp /etc/passwd /etc/group etc
    rm -rf $1; cp -a $2 $1
    printf 'templates = true\n[defaults]\nboot_timeout_s = %d\n' $3 > $1/config.toml
    ldconfig -r $root; exec chroot $root $1/hull-measure";

/// Measures starts and idle sandboxes beside QEMU, crun and runc.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Figures or programs; all if none is named.
    names: Vec<String>,
    /// Prints one flat JSON object: figure, program, median.
    #[arg(long)]
    json: bool,
    /// Samples of each figure.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    runs: u16,
    /// Measures the Hull that is installed there, not this workspace's.
    #[arg(long)]
    prefix: Option<PathBuf>,
}

/// Measures and prints.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let order = order(arguments)?;
    let report = crate::report("bench");
    let prefix = match &arguments.prefix {
        Some(prefix) => Some(prefix.clone()),
        None if order.programs.iter().any(|name| name == "hull") => Some(stage::stage()?),
        None => None,
    };
    let has_large = order.figures.iter().any(|name| name == table::LAYER_COPIES);
    let inputs = inputs::make(prefix.as_deref(), has_large, &report)?;
    let findings = measure_all(&order, &inputs, &report)?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&findings.medians())?);
        for failure in &findings.failures {
            eprintln!("bench: not measured: {failure}");
        }
    } else {
        print!("{}", table::render(&findings));
    }
    Ok(())
}

/// Names say figures, programs or both; what isn't named at all is taken whole.
fn order(arguments: &Arguments) -> Result<Order> {
    let (all_figures, all_programs) = (table::figures(), table::programs());
    for name in &arguments.names {
        if !all_figures.contains(name) && !all_programs.contains(name) {
            bail!(
                "no figure or program is called {name}; there are {} and {}",
                all_figures.join(", "),
                all_programs.join(", ")
            );
        }
    }
    let named = |all: Vec<String>| {
        let is_named = |name: &&String| arguments.names.contains(name);
        let some: Vec<String> = all.iter().filter(is_named).cloned().collect();
        if some.is_empty() { all } else { some }
    };
    Ok(Order {
        place: PathBuf::from(inputs::PLACE),
        runs: usize::from(arguments.runs),
        figures: named(all_figures),
        programs: named(all_programs),
    })
}

/// Each figure in its kind of host. Twenty guests at once are too much for the one that counts:
/// too often one of them would hang ([`count`]).
fn measure_all(order: &Order, inputs: &Path, report: &Report) -> Result<Findings> {
    let is_memory =
        |figure: &String| [table::LAYER_COPIES, table::CROWD_BYTES].contains(&&**figure);
    let (memory, counts): (Vec<_>, Vec<_>) = order.figures.iter().cloned().partition(is_memory);
    let of = |figures: &Vec<String>| Order {
        figures: figures.clone(),
        ..order.clone()
    };
    let mut findings = Findings::default();
    if !counts.is_empty() {
        findings.join(count(&of(&counts), inputs, report)?);
    }
    if !memory.is_empty() {
        findings.join(measure(&of(&memory), &machine(report), inputs)?);
    }
    Ok(findings)
}

/// Measures where instructions are counted. There a guest hangs now and then, in a handler that
/// was entered twice (docs/decisions/0002, "An interrupt twice": the counter stops the processor at
/// each of its timers). So a program that fails is measured anew as a whole, in a new machine, and
/// that is said.
fn count(order: &Order, inputs: &Path, report: &Report) -> Result<Findings> {
    let mut machine = Options {
        icount: true,
        ..machine(report)
    };
    let mut findings = measure(order, &machine, inputs)?;
    for _ in 1..ATTEMPTS {
        let failed = |name: &&String| findings.failures.iter().any(|f| f.program == **name);
        let programs: Vec<String> = order.programs.iter().filter(failed).cloned().collect();
        if programs.is_empty() {
            break;
        }
        for failure in &findings.failures {
            report.step(&format!("once more, as {failure}"));
        }
        for program in &programs {
            findings.forget(program);
        }
        let again = Order {
            programs,
            ..order.clone()
        };
        machine.fresh = true;
        findings.join(measure(&again, &machine, inputs)?);
    }
    Ok(findings)
}

fn machine(report: &Report) -> Options {
    Options {
        name: "bench".to_owned(),
        report: report.clone(),
        ..Options::default()
    }
}

fn measure(order: &Order, machine: &Options, inputs: &Path) -> Result<Findings> {
    // Where instructions are counted, ten seconds are five thousand million of them.
    let boot_limit = if machine.icount { "10" } else { "60" };
    let host = Host::acquire(machine)?;
    machine
        .report
        .step(&format!("measuring {}", order.programs.join(", ")));
    let place = inputs::PLACE;
    let laid_out = inputs.display().to_string();
    let apart = ["unshare", "-m", "--propagation", "private"];
    let inside = ["sh", "-c", SCRIPT, "bench", place, &laid_out, boot_limit];
    let words = apart.into_iter().chain(inside);
    let done = host
        .command(words)
        .env("HULL_STATE_DIR", &format!("{place}/state"))
        .env("HULL_CONFIG", &format!("{place}/config.toml"))
        .env("HULL_RUN_DIR", &format!("{place}/run"))
        .cwd("/")
        .live(inputs)
        .stdin(serde_json::to_vec(order)?)
        .deadline(LIMIT)
        .output()?;
    let words = done.errors();
    if done.code != 0 {
        bail!(
            "hull-measure ended with code {}: {}",
            done.code,
            words.trim()
        );
    }
    serde_json::from_slice(&done.stdout)
        .with_context(|| format!("hull-measure's findings make no sense; it said: {words}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(names: &[&str]) -> Result<Order> {
        order(&Arguments {
            names: names.iter().map(ToString::to_string).collect(),
            json: false,
            runs: 5,
            prefix: None,
        })
    }

    #[test]
    fn names_choose_figures_and_programs_apart() {
        let all = asked(&[]).unwrap();
        assert_eq!(
            (all.figures, all.programs),
            (table::figures(), table::programs())
        );
        let some = asked(&["hull", "cold_run_true_exits"]).unwrap();
        assert_eq!(some.programs, ["hull"]);
        assert_eq!(some.figures, ["cold_run_true_exits"]);
        let programs = asked(&["crun", "runc"]).unwrap();
        assert_eq!(programs.figures, table::figures());
        assert!(asked(&["docker"]).is_err());
    }
}
