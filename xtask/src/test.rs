//! `cargo xtask test`: unit tests on this machine, then the system suites where KVM is real.
//!
//! A suite is one file of `tests/tests/` or `vmm/tests/`; its program is built here and runs on
//! the KVM host, so that a test sees the same machine as the `hull` it tests.

use std::env;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use cargo_metadata::{Message, TargetKind};
use hull_tests::host::{Host, Options, packages, releases};

use crate::check::BUILD_TOOLS;
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
    ("mke2fs", "e2fsprogs"),
    ("ip", "iproute2"),
    ("iptables", "iptables"),
    ("/usr/lib/podman/netavark", "netavark"),
    ("containerd", "containerd"),
    ("catatonit", "catatonit"),
    ("/usr/lib/cni/bridge", "containernetworking-plugins"),
    ("runc", "runc"),
    (
        "/etc/containers/policy.json",
        "golang-github-containers-common",
    ),
];

/// Packages of other releases of Debian that the suites use, each next to its own release's; and
/// Docker's, which would change this machine's firewall if it were installed.
const OTHERS: &[(&str, &str)] = &[
    ("trixie", "containerd"),
    ("forky", "containerd"),
    ("bookworm", "docker.io"),
];

/// The suite that tests the emulated host itself, from outside.
const OUTSIDE: &str = "host";

/// The suite that takes longest.
const LONGEST: &str = "run";

/// The emulated hosts that share the suites; each works on one processor.
const HOSTS: &[&str] = &["default", "second"];

/// Of the agent's own tests, those that need what this machine may lack: cgroups v2.
const AGENTS: &[&str] = &["spare"];

/// A suite that says nothing for longer hangs; no test takes as long.
const SILENCE: Duration = Duration::from_secs(15 * 60);

/// Runs everything, or only the system suites that are named.
pub(crate) fn run(suites: &[String]) -> Result<()> {
    packages::ensure(BUILD_TOOLS, &report("test"))?;
    packages::ensure(TOOLS, &report("test"))?;
    for (release, package) in OTHERS {
        releases::ensure(release, package, &report("test"))?;
    }
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
    let mut chosen: Vec<Suite> = built
        .into_iter()
        .filter(|suite| suites.is_empty() || suites.contains(&suite.name))
        .collect();
    // The rest of the work then fits beside it.
    chosen.sort_by_key(|suite| suite.name != LONGEST);
    let failed = run_suites(&chosen, &prefix)?;
    if !failed.is_empty() {
        bail!("suites that failed: {}", failed.join(", "));
    }
    eprintln!("test: all passed");
    Ok(())
}

/// Runs the suites in their order on as many hosts as there are, and returns those that failed.
/// What they say is printed in that order too, the first that isn't over as it comes.
fn run_suites<'a>(suites: &'a [Suite], prefix: &Path) -> Result<Vec<&'a str>> {
    let mut hosts = Vec::new();
    for name in HOSTS {
        let host = Host::acquire(&Options {
            name: (*name).to_owned(),
            report: report("test"),
            ..Options::default()
        })?;
        let is_native = host.is_native();
        hosts.push((*name, host));
        if is_native {
            break;
        }
    }
    let (sayers, listeners): (Vec<_>, Vec<_>) = suites.iter().map(|_| mpsc::channel()).unzip();
    let waiting = Mutex::new(suites.iter().zip(sayers));
    let next = || {
        let mut waiting = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.next()
    };
    thread::scope(|scope| {
        let runners: Vec<_> = hosts
            .iter()
            .map(|(name, _lease)| {
                scope.spawn(|| {
                    let mut failed = Vec::new();
                    while let Some((suite, say)) = next() {
                        let say = |line| drop(say.send(line));
                        let passed = suite.run(name, prefix, &say).unwrap_or_else(|error| {
                            say(format!("test: {error:#}"));
                            false
                        });
                        if !passed {
                            failed.push(suite.name.as_str());
                        }
                    }
                    failed
                })
            })
            .collect();
        for line in listeners.into_iter().flatten() {
            eprintln!("{line}");
        }
        let mut failed = Vec::new();
        for runner in runners {
            match runner.join() {
                Ok(names) => failed.extend(names),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(failed)
    })
}

/// A test program that runs on the KVM host.
struct Suite {
    name: String,
    program: PathBuf,
}

impl Suite {
    /// Runs it on the host of that name and hands over each line that it says.
    fn run(&self, host: &str, prefix: &Path, say: &impl Fn(String)) -> Result<bool> {
        say(format!("test: suite {}, on the KVM host", self.name));
        let started = Instant::now();
        let (output, writer) = io::pipe().context("cannot make a pipe")?;
        // How often cases that repeat themselves do so (`hull_tests::process::rounds`).
        let asked = env::var_os("HULL_ROUNDS");
        let rounds = asked.iter().flat_map(|_| ["--env", "HULL_ROUNDS"]);
        let mut child = Command::new(env::current_exe().context("cannot find this program")?)
            .args(["host", "--name", host, "--env", "HULL_REQUIRE_KVM=1"])
            .arg("--env")
            .arg(format!("HULL_BIN={}", prefix.join("bin/hull").display()))
            .args(rounds)
            .arg("--")
            .arg(&self.program)
            .arg("--test-threads=2")
            .stdin(Stdio::null())
            .stdout(writer.try_clone().context("cannot share a pipe")?)
            .stderr(writer)
            .spawn()
            .context("cannot run the host")?;
        let (line, lines) = mpsc::channel();
        thread::spawn(move || {
            let mut read = BufReader::new(output).split(b'\n');
            while read.next().is_some_and(|said| line.send(said).is_ok()) {}
        });
        loop {
            match lines.recv_timeout(SILENCE) {
                Ok(said) => {
                    let said = said.context("cannot read what a suite says")?;
                    say(String::from_utf8_lossy(&said).into_owned());
                }
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    say(format!(
                        "test: it has said nothing for {} s",
                        SILENCE.as_secs()
                    ));
                    // Its own end is that of the command on the host, too.
                    child.kill().context("cannot stop a suite")?;
                    break;
                }
            }
        }
        let status = child.wait().context("cannot wait for a suite")?;
        let seconds = started.elapsed().as_secs();
        say(format!("test: suite {} took {seconds} s", self.name));
        Ok(status.success())
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
            "-p",
            "hull-agent",
        ])
        .args(["--test", "*", "--message-format", "json-render-diagnostics"])
        .current_dir(stage::workspace())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let output = child.stdout.take().context("cargo has no output")?;
    let mut suites = Vec::new();
    for message in Message::parse_stream(BufReader::new(output)) {
        let Message::CompilerArtifact(artifact) = message.context("cannot read cargo")? else {
            continue;
        };
        let Some(program) = artifact.executable else {
            continue;
        };
        let is_suite = artifact.target.kind.contains(&TargetKind::Test);
        let name = artifact.target.name.as_str();
        let is_agents = artifact.target.src_path.as_str().contains("guest-agent");
        let runs_there = name != OUTSIDE && (!is_agents || AGENTS.contains(&name));
        if is_suite && runs_there {
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
