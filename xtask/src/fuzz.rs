//! `cargo xtask fuzz`: strangers' bytes, made up by the thousand, against each parser.
//!
//! Owns: compiling `fuzz/` with the coverage that libFuzzer steers by, and running its targets
//! one after the other. Refuses: sanitizers, which need another compiler: what finds faults is
//! what Rust itself checks (bounds, overflows, assertions).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hull_tests::host::packages;

use crate::{report, stage};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// What cargo-fuzz asks of the compiler, but for the sanitizer.
const COVERAGE: &str = "-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters \
    -Cllvm-args=-sanitizer-coverage-pc-table -Cllvm-args=-sanitizer-coverage-trace-compares \
    -Ccodegen-units=1";

/// Largest input, in bytes.
const MAX_INPUT: u32 = 16 * 1024;

/// Runs fuzz targets, each from its seeds and from what earlier runs found.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only this one.
    target: Option<String>,
    /// How long each runs.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    packages::ensure(&[("g++", "build-essential")], &report("fuzz"))?;
    let program = build()?;
    let seeds = stage::workspace().join("fuzz/corpus");
    let names: Vec<String> = match &arguments.target {
        Some(name) => vec![name.clone()],
        None => directories(&seeds)?,
    };
    let mut failed = Vec::new();
    for name in names {
        if !seeds.join(&name).is_dir() {
            let known = directories(&seeds)?.join(", ");
            bail!("no fuzz target is called {name}; there are {known}");
        }
        if !one(&program, &seeds, &name, arguments.seconds)? {
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("found faults in: {}", failed.join(", "));
    }
    Ok(())
}

/// Runs one target; whether it found nothing.
fn one(program: &Path, seeds: &Path, name: &str, seconds: u32) -> Result<bool> {
    let work = stage::target_dir().join("fuzz").join(name);
    let (found, faults) = (work.join("corpus"), work.join("faults"));
    for directory in [&found, &faults] {
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
    }
    eprintln!(
        "fuzz: {name}, {seconds} s; what it finds goes to {}",
        faults.display()
    );
    let started = Instant::now();
    let status = Command::new(program)
        .env("HULL_FUZZ", name)
        // Many small files: in memory.
        .env("TMPDIR", "/dev/shm")
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_INPUT}"))
        .arg(format!("-artifact_prefix={}/", faults.display()))
        .args([
            "-timeout=20",
            "-rss_limit_mb=1024",
            "-print_final_stats=1",
            "-verbosity=0",
            "-len_control=10",
        ])
        .arg(&found)
        .arg(seeds.join(name))
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    let took = started.elapsed().as_secs();
    eprintln!(
        "fuzz: {name}: {} after {took} s",
        if status.success() {
            "no fault"
        } else {
            "FAULT"
        }
    );
    Ok(status.success())
}

/// Compiles the program that holds all targets.
fn build() -> Result<PathBuf> {
    let target = stage::target_dir().join("fuzz/build");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--profile", "fuzz", "-p", "hull-fuzz"])
        .args(["--features", "libfuzzer", "--target", TRIPLE])
        .current_dir(stage::workspace())
        .env("CARGO_TARGET_DIR", &target)
        .env("RUSTFLAGS", COVERAGE)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("the fuzz targets don't build");
    }
    Ok(target.join(TRIPLE).join("fuzz/fuzz"))
}

fn directories(path: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}
