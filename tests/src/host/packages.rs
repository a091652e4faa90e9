//! The outer machine's packages: the only thing ever installed on it.
//!
//! Owns: finding programs, `apt-get`, running tools with their words kept for the error.
//! Refuses: any other package manager; it then names what is missing.

use std::path::PathBuf;
use std::process::Command;
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail};

use super::report::Report;

/// The programs this house runs and the packages that bring them.
const NEEDED: [(&str, &str); 7] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("dpkg-deb", "dpkg"),
    ("xz", "xz-utils"),
    ("zstd", "zstd"),
    ("depmod", "kmod"),
    ("cc", "build-essential"),
    // What Hull needs in the machine is had from this one.
    ("mke2fs", "e2fsprogs"),
];

/// Installs what is missing, saying so.
///
/// # Errors
/// When a package is missing and can't be installed.
pub(super) fn ensure_needed(report: &Report) -> Result<()> {
    ensure(&NEEDED, report)?;
    // Since Debian 13 it doesn't come with QEMU.
    match find_file_server() {
        Some(_) => Ok(()),
        None => ensure(&[("/usr/libexec/virtiofsd", "virtiofsd")], report),
    }
}

/// Installs the packages (second) of the programs (first) that this machine lacks, saying so. A
/// first word with a slash is a file to look for rather than a program.
///
/// # Errors
/// When a package is missing and can't be installed.
pub fn ensure(needed: &[(&str, &str)], report: &Report) -> Result<()> {
    let missing: Vec<&str> = needed
        .iter()
        .filter(|(program, _)| find(program).is_none())
        .map(|(_, package)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    report.step(&format!("installing {}", missing.join(" ")));
    let attempt = || {
        let mut arguments = vec!["install", "-y", "--no-install-recommends"];
        arguments.extend_from_slice(&missing);
        run(&mut apt_get(&arguments))
    };
    if attempt().is_err() {
        update(report)?;
        attempt()?;
    }
    for (program, package) in needed {
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
#[must_use]
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
}

/// The virtio-fs server, outside of every `PATH`.
pub(super) fn find_file_server() -> Option<PathBuf> {
    ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"]
        .map(PathBuf::from)
        .into_iter()
        .find(|candidate| candidate.is_file())
}

/// Changes whenever a package is installed or removed.
pub(super) fn epoch() -> u64 {
    let status = std::fs::metadata("/var/lib/dpkg/status").and_then(|data| data.modified());
    let since = status
        .ok()
        .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    since.map_or(0, |time| time.as_secs())
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
