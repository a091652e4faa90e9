//! The outer machine's packages: the only thing ever installed on it.
//!
//! Owns: finding programs, `apt-get`, running tools with their words kept for the error.
//! Refuses: any other package manager; it then names what is missing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::report::Report;

/// The programs this house runs and the packages that bring them.
const NEEDED: [(&str, &str); 6] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("depmod", "kmod"),
    ("cc", "build-essential"),
];

/// Installs what is missing, saying so.
///
/// # Errors
/// When a package is missing and can't be installed.
pub(super) fn ensure_needed(report: &Report) -> Result<()> {
    let missing: Vec<&str> = NEEDED
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    report.step(&format!("installing {}", missing.join(" ")));
    let install = || {
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        arguments.extend(&missing);
        run(&mut apt_get(&arguments))
    };
    if install().is_err() {
        update(report)?;
        install()?;
    }
    for (program, package) in NEEDED {
        if find(program).is_none() {
            bail!("{program} is still missing with the package {package} installed");
        }
    }
    Ok(())
}

/// Brings the package lists up to date.
///
/// # Errors
/// When `apt-get update` fails.
pub(super) fn update(report: &Report) -> Result<()> {
    report.step("updating the package lists");
    run(&mut apt_get(&["update"]))
}

fn apt_get(arguments: &[&str]) -> Command {
    let mut command = if rustix::process::geteuid().is_root() {
        Command::new("apt-get")
    } else {
        let mut sudo = Command::new("sudo");
        sudo.args(["-n", "apt-get"]);
        sudo
    };
    command
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    command
}

/// The program's path, by `PATH` and the system's own directories.
pub(super) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// Runs a tool quietly; its last words are the error.
///
/// # Errors
/// When it can't be started or fails.
pub(super) fn run(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// As [`run`], giving the tool's stdout.
///
/// # Errors
/// When it can't be started or fails.
pub(super) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    if let Some(path) = find(&name).filter(|_| !name.contains('/')) {
        // `depmod` is outside of an ordinary user's PATH.
        let mut full = Command::new(path);
        full.args(command.get_args());
        for (key, value) in command.get_envs() {
            match value {
                Some(value) => full.env(key, value),
                None => full.env_remove(key),
            };
        }
        if let Some(directory) = command.get_current_dir() {
            full.current_dir(directory);
        }
        *command = full;
    }
    let done = command.output().with_context(|| format!("run {name}"))?;
    if !done.status.success() {
        let words = String::from_utf8_lossy(&done.stderr);
        let last: Vec<&str> = words.lines().rev().take(8).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        bail!("{name} failed ({}):\n{}", done.status, last.join("\n"));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}
