//! `cargo xtask check`: format, clippy with warnings denied, the house rules and the dependency
//! policy. Needs no KVM and changes nothing.

mod dependencies;
mod house;

use std::process::Command;

use anyhow::{Context, Result, bail};
use hull_tests::host::packages;

use crate::report;

/// Programs that building the tests takes: the protocol of kubelets comes as its definition.
pub(crate) const BUILD_TOOLS: &[(&str, &str)] = &[("protoc", "protobuf-compiler")];

type Check = fn() -> Result<()>;

/// Runs every check and reports all that fail, not only the first.
pub(crate) fn run() -> Result<()> {
    packages::ensure(BUILD_TOOLS, &report("check"))?;
    let checks: [(&str, Check); 4] = [
        ("format", format),
        ("house rules", house::check),
        ("dependency policy", dependencies::check),
        ("clippy", clippy),
    ];
    let mut failed = Vec::new();
    for (name, check) in checks {
        eprintln!("check: {name}");
        if let Err(error) = check() {
            eprintln!("check: {name} failed: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    eprintln!("check: all passed");
    Ok(())
}

fn format() -> Result<()> {
    cargo(&["fmt", "--all", "--check"])
}

fn clippy() -> Result<()> {
    cargo(&[
        "clippy",
        "--workspace",
        "--all-targets",
        "--locked",
        "--quiet",
        "--",
        "-D",
        "warnings",
    ])
}

fn cargo(args: &[&str]) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(args)
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo {} ended with {status}", args[0]);
    }
    Ok(())
}
