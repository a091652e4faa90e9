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

/// Wall time that all measurements may take: emulated instructions are slow.
const LIMIT: Duration = Duration::from_secs(3600);

/// The root directory that everything is measured in, all of it memory: a path that leads over the
/// emulated host's own root waits for this machine, for as long as it takes and not as long as the
/// instructions of anybody do.
///
/// The inputs ($2) are laid out at their place ($1), with nothing of an earlier run.
const SCRIPT: &str = "set -e; root=/tmp/hull-bench-root
    mkdir -p $root; mount -t tmpfs bench $root; cd $root
    mkdir dev proc sys tmp run etc lib lib64 sbin
    ln -s $1/lib lib/x86_64-linux-gnu; ln -s $1/bin/mke2fs sbin
    for each in dev proc sys tmp run; do mount --rbind /$each $each; done
    cp -L /lib64/ld-linux-x86-64.so.2 lib64; cp /etc/passwd /etc/group etc
    rm -rf $1; cp -a $2 $1; echo 'templates = true' > $1/config.toml
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

/// Each figure in its kind of host. Twenty guests at once are too much for the one that counts: now
/// and then a guest hangs there, in a handler that was entered twice (QEMU's `helper_vmrun` leaves
/// the vector of an interrupt that it has delivered behind, to be found when counting stops it).
fn measure_all(order: &Order, inputs: &Path, report: &Report) -> Result<Findings> {
    let is_memory =
        |figure: &String| [table::LAYER_COPIES, table::CROWD_BYTES].contains(&&**figure);
    let (memory, counts): (Vec<_>, Vec<_>) = order.figures.iter().cloned().partition(is_memory);
    let mut findings = Findings::default();
    for (figures, icount) in [(counts, true), (memory, false)] {
        if !figures.is_empty() {
            let part = Order {
                figures,
                ..order.clone()
            };
            findings.join(measure(&part, icount, inputs, report)?);
        }
    }
    Ok(findings)
}

fn measure(order: &Order, icount: bool, inputs: &Path, report: &Report) -> Result<Findings> {
    let host = Host::acquire(&Options {
        icount,
        name: "bench".to_owned(),
        report: report.clone(),
        ..Options::default()
    })?;
    report.step(&format!("measuring {}", order.programs.join(", ")));
    let place = inputs::PLACE;
    let laid_out = inputs.display().to_string();
    let apart = ["unshare", "-m", "--propagation", "private"];
    let inside = ["sh", "-c", SCRIPT, "bench", place, &laid_out];
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
