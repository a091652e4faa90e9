//! `cargo xtask test`: unit tests on this machine, then the system suites where KVM is real.
//!
//! A suite is one file of `tests/tests/` or `vmm/tests/`; its program is built here and runs on
//! the KVM host, so that a test sees the same machine as the `hull` it tests.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use cargo_metadata::{Message, TargetKind};
use hull_tests::host::{Host, Options, packages};

use crate::{report, stage};

/// Programs that the suites drive beside Hull's own.
const TOOLS: &[(&str, &str)] = &[
    ("crun", "crun"),
    ("umoci", "umoci"),
    ("skopeo", "skopeo"),
    ("docker-registry", "docker-registry"),
    ("busybox", "busybox-static"),
    ("podman", "podman"),
    ("buildah", "buildah"),
    ("conmon", "conmon"),
    (
        "/etc/containers/policy.json",
        "golang-github-containers-common",
    ),
];

/// The suite that tests the emulated host itself, from outside.
const OUTSIDE: &str = "host";

/// Runs everything, or only the system suites that are named.
pub(crate) fn run(suites: &[String]) -> Result<()> {
    packages::ensure(TOOLS, &report("test"))?;
    let prefix = stage::stage()?;
    if suites.is_empty() {
        eprintln!("test: unit tests, on this machine");
        cargo(&["--workspace", "--exclude", "hull-tests"])?;
        cargo(&["-p", "hull-tests", "--lib", "--bins", "--test", OUTSIDE])?;
    }
    let built = build_suites()?;
    let missing = suites
        .iter()
        .find(|name| !built.iter().any(|suite| suite.name == **name));
    if let Some(missing) = missing {
        let names: Vec<&str> = built.iter().map(|suite| suite.name.as_str()).collect();
        bail!(
            "no suite is called {missing}; there are {}",
            names.join(", ")
        );
    }
    let chosen = |suite: &&Suite| suites.is_empty() || suites.contains(&suite.name);
    let host = Host::acquire(&Options {
        report: report("test"),
        ..Options::default()
    })?;
    let mut failed = Vec::new();
    for suite in built.iter().filter(chosen) {
        if !suite.run(&host, &prefix)? {
            failed.push(suite.name.as_str());
        }
    }
    if !failed.is_empty() {
        bail!("suites that failed: {}", failed.join(", "));
    }
    eprintln!("test: all passed");
    Ok(())
}

/// A test program that runs on the KVM host.
struct Suite {
    name: String,
    program: PathBuf,
}

impl Suite {
    fn run(&self, host: &Host, prefix: &std::path::Path) -> Result<bool> {
        eprintln!("test: suite {}, on the KVM host", self.name);
        let started = Instant::now();
        let env = [
            (
                "HULL_BIN".to_owned(),
                prefix.join("bin/hull").display().to_string(),
            ),
            ("HULL_REQUIRE_KVM".to_owned(), "1".to_owned()),
        ];
        let argv = vec![
            self.program.display().to_string(),
            "--test-threads=2".to_owned(),
        ];
        let code = host.attach(argv, &env)?;
        eprintln!(
            "test: suite {} took {} s",
            self.name,
            started.elapsed().as_secs()
        );
        Ok(code == 0)
    }
}

fn cargo(args: &[&str]) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["test", "--locked"])
        .args(args)
        .current_dir(stage::workspace())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("unit tests failed (cargo test {})", args.join(" "));
    }
    Ok(())
}

fn build_suites() -> Result<Vec<Suite>> {
    let mut child = Command::new(env!("CARGO"))
        .args([
            "test",
            "--locked",
            "--no-run",
            "-p",
            "hull-tests",
            "-p",
            "hull-vmm",
        ])
        .args(["--test", "*", "--message-format", "json-render-diagnostics"])
        .current_dir(stage::workspace())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut suites = Vec::new();
    for message in Message::parse_stream(std::io::BufReader::new(output)) {
        let Message::CompilerArtifact(artifact) = message.context("cannot read cargo")? else {
            continue;
        };
        let Some(program) = artifact.executable else {
            continue;
        };
        let is_suite = artifact.target.kind.contains(&TargetKind::Test);
        if is_suite && artifact.target.name != OUTSIDE {
            suites.push(Suite {
                name: artifact.target.name,
                program: program.into(),
            });
        }
    }
    if !child.wait().context("cannot wait for cargo")?.success() {
        bail!("the system suites don't build");
    }
    suites.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(suites)
}
