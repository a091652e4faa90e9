//! Builds the guest kernel from Debian's kernel source and `kernel-config/`, once for each
//! source version, configuration and compiler.
//!
//! The kernel lies in `target/kernel/vmlinux`, the one for debugging in
//! `target/kernel-debug/vmlinux`. Nothing is installed but the build's own tools, and nothing
//! of the kernel's source, but the lines that a patch changes, ever enters the repository.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write as _};
use std::iter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use hull_tests::host::packages;
use indicatif::{ProgressBar, ProgressStyle};

use crate::report;
use crate::stage::workspace;

/// Debian's package of the kernel series that Hull's guest runs.
const PACKAGE: &str = "linux-source-6.12";

/// What a build needs: a file that proves it is there, and the Debian package that brings it.
const TOOLS: &[(&str, &str)] = &[
    ("/usr/bin/make", "make"),
    ("/usr/bin/patch", "patch"),
    ("/usr/bin/gcc", "gcc"),
    ("/usr/bin/objcopy", "binutils"),
    ("/usr/bin/flex", "flex"),
    ("/usr/bin/bison", "bison"),
    ("/usr/bin/bc", "bc"),
    ("/usr/bin/xz", "xz-utils"),
    ("/usr/include/stdlib.h", "libc6-dev"),
    ("/usr/include/gelf.h", "libelf-dev"),
];

/// Parts of the source that no Hull kernel reads; unpacking them takes longer than building.
const LEFT_PACKED: &[&str] = &[
    "*/Documentation/*/*",
    "*/drivers/gpu/drm/*/*.[ch]",
    "*/drivers/net/ethernet/*/*.[ch]",
    "*/drivers/net/wireless/*/*.[ch]",
    "*/drivers/media/*/*.[ch]",
    "*/sound/*/*.[ch]",
    "*/tools/perf",
    "*/tools/testing",
];

/// About how many lines a whole build prints, for the progress bar.
const STEPS: u64 = 1900;

/// One of the kernels that are built here.
struct Variant {
    /// Directory below `target/`.
    directory: &'static str,
    fragments: &'static [&'static str],
}

const NORMAL: Variant = Variant {
    directory: "kernel",
    fragments: &["base", "containers", "netfilter", "hardening"],
};

const DEBUG: Variant = Variant {
    directory: "kernel-debug",
    fragments: &["base", "containers", "netfilter", "hardening", "debug"],
};

/// Builds the kernel, or the one for debugging, and says where it is.
pub(crate) fn run(debug: bool) -> Result<()> {
    let vmlinux = build(if debug { &DEBUG } else { &NORMAL })?;
    eprintln!("kernel: {}", vmlinux.display());
    Ok(())
}

/// The path of an up-to-date guest kernel, built if need be.
pub(crate) fn ensure() -> Result<PathBuf> {
    build(&NORMAL)
}

fn build(variant: &Variant) -> Result<PathBuf> {
    // Beside the sources, not in CARGO_TARGET_DIR: a kernel costs minutes, whoever builds it.
    let target = workspace().join("target");
    let out = target.join(variant.directory);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let lock = File::create(target.join("kernel.lock")).context("cannot create kernel.lock")?;
    lock.lock().context("cannot lock kernel.lock")?;

    let (vmlinux, stamp) = (out.join("vmlinux"), out.join("built-from"));
    let built_from = fs::read_to_string(&stamp).unwrap_or_default();
    let configuration = configuration(variant)?;
    let version = match candidate()? {
        Some(version) => version,
        None if vmlinux.is_file() && built_from.ends_with(&configuration) => return Ok(vmlinux),
        None => refreshed_candidate()?,
    };
    packages::ensure(TOOLS, &report("kernel"))?;
    let key = format!("{PACKAGE} {version}\n{}{configuration}", compiler()?);
    if vmlinux.is_file() && built_from == key {
        return Ok(vmlinux);
    }

    let source = source(&target.join("kernel-source"), &version)?;
    eprintln!("kernel: building {PACKAGE} {version} in {}", out.display());
    compile(&source, &out, variant)?;
    fs::write(&stamp, key).with_context(|| format!("cannot write {}", stamp.display()))?;
    Ok(vmlinux)
}

/// All text that decides what is built, but for the source and the compiler.
fn configuration(variant: &Variant) -> Result<String> {
    let mut text = String::new();
    let script = workspace().join("kernel-config/build.sh");
    for file in iter::once(script)
        .chain(patches()?)
        .chain(fragments(variant))
    {
        let content =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        write!(text, "== {name}\n{content}")?;
    }
    Ok(text)
}

/// What Hull changes in the kernel's source, in the order in which the script applies it.
fn patches() -> Result<Vec<PathBuf>> {
    let directory = workspace().join("kernel-config");
    let mut found = Vec::new();
    for entry in fs::read_dir(&directory).context("cannot list kernel-config")? {
        let path = entry.context("cannot list kernel-config")?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "patch")
        {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn fragments(variant: &Variant) -> impl Iterator<Item = PathBuf> {
    let directory = workspace().join("kernel-config");
    variant
        .fragments
        .iter()
        .map(move |name| directory.join(format!("{name}.config")))
}

/// The newest version of [`PACKAGE`] that the archive offers, if apt knows any.
fn candidate() -> Result<Option<String>> {
    let answer = output(
        Command::new("apt-cache")
            .args(["policy", PACKAGE])
            .env("LC_ALL", "C"),
    )?;
    let version = answer
        .lines()
        .find_map(|line| line.trim().strip_prefix("Candidate: "));
    Ok(version
        .filter(|version| *version != "(none)")
        .map(str::to_owned))
}

fn refreshed_candidate() -> Result<String> {
    eprintln!("kernel: apt knows no {PACKAGE} yet: apt-get update");
    succeed(Command::new("apt-get").args(["-q", "update"]))?;
    candidate()?.with_context(|| format!("the configured archives offer no {PACKAGE}"))
}

fn compiler() -> Result<String> {
    let banner = output(Command::new("gcc").arg("--version"))?;
    Ok(format!("{}\n", banner.lines().next().unwrap_or_default()))
}

/// The unpacked source of `version` below `directory`, fetched from the archive if need be.
fn source(directory: &Path, version: &str) -> Result<PathBuf> {
    let source = directory.join(version);
    if source.join("Makefile").is_file() {
        return Ok(source);
    }
    let fresh = directory.join("new");
    if fresh.exists() {
        fs::remove_dir_all(&fresh).context("cannot remove a half-done unpacking")?;
    }
    let unpacked = fresh.join("linux");
    fs::create_dir_all(&unpacked)
        .with_context(|| format!("cannot create {}", unpacked.display()))?;

    eprintln!("kernel: fetching {PACKAGE} {version} (about 150 MB)");
    let mut fetch = Command::new("apt-get");
    fetch.args(["-qq", "-o", "APT::Sandbox::User=root", "download"]);
    succeed(
        fetch
            .arg(format!("{PACKAGE}={version}"))
            .current_dir(&fresh),
    )?;
    let package = only_deb(&fresh)?;

    eprintln!("kernel: unpacking its source");
    succeed(
        Command::new("dpkg-deb")
            .arg("-x")
            .arg(&package)
            .arg(fresh.join("package")),
    )?;
    let archive = fresh.join(format!("package/usr/src/{PACKAGE}.tar.xz"));
    let mut tar = Command::new("tar");
    tar.args(["--strip-components=1", "-C"]).arg(&unpacked);
    tar.args(
        LEFT_PACKED
            .iter()
            .map(|pattern| format!("--exclude={pattern}")),
    );
    succeed(tar.arg("-xJf").arg(&archive))?;

    fs::rename(&unpacked, &source).context("cannot put the unpacked source in place")?;
    fs::remove_dir_all(&fresh).context("cannot remove the fetched package")?;
    Ok(source)
}

fn only_deb(directory: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(path);
        }
    }
    bail!(
        "apt-get download left no package in {}",
        directory.display()
    )
}

/// Runs the build script, its words in `build.log`, its progress on the terminal.
fn compile(source: &Path, out: &Path, variant: &Variant) -> Result<()> {
    let started = Instant::now();
    let log_path = out.join("build.log");
    let mut log = File::create(&log_path).context("cannot create build.log")?;
    let mut child = Command::new(workspace().join("kernel-config/build.sh"))
        .args([source, out])
        .args(fragments(variant))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log.try_clone().context("cannot share build.log")?)
        .spawn()
        .context("cannot run kernel-config/build.sh")?;
    let bar = progress_bar()?;
    let printed = child.stdout.take().context("the build has no output")?;
    for line in BufReader::new(printed).split(b'\n') {
        let line = line.context("cannot read the build's output")?;
        log.write_all(&line)
            .and_then(|()| log.write_all(b"\n"))
            .context("cannot write build.log")?;
        show(&bar, &String::from_utf8_lossy(&line), started);
    }
    let status = child.wait().context("cannot wait for the build")?;
    bar.finish_and_clear();
    if !status.success() {
        let text = fs::read(&log_path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines
            .get(lines.len().saturating_sub(30)..)
            .unwrap_or_default();
        bail!(
            "the kernel's build ended with {status}:\n{}",
            tail.join("\n")
        );
    }
    eprintln!("kernel: built in {} s", started.elapsed().as_secs());
    Ok(())
}

fn progress_bar() -> Result<ProgressBar> {
    let style =
        ProgressStyle::with_template("kernel: {bar:30} {percent:>3}% {elapsed} {wide_msg}")?;
    Ok(ProgressBar::new(STEPS).with_style(style))
}

/// A step of make moves the bar; the script's own sentences are printed. Without a terminal, a
/// line now and then tells that the build is alive.
fn show(bar: &ProgressBar, line: &str, started: Instant) {
    if let Some(step) = line.strip_prefix("  ") {
        bar.set_message(
            step.split_whitespace()
                .last()
                .unwrap_or_default()
                .to_owned(),
        );
        bar.set_position((bar.position() + 1).min(STEPS));
        if bar.is_hidden() && bar.position().is_multiple_of(300) {
            let (done, seconds) = (bar.position(), started.elapsed().as_secs());
            eprintln!("kernel: {done} of about {STEPS} steps, {seconds} s");
        }
    } else if line.starts_with("configuration: ") || line.starts_with("vmlinux: ") {
        bar.suspend(|| eprintln!("kernel: {line}"));
    }
}

fn output(command: &mut Command) -> Result<String> {
    let done = command
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !done.status.success() {
        bail!(
            "{} ended with {}",
            command.get_program().display(),
            done.status
        );
    }
    String::from_utf8(done.stdout).context("a program's answer is not text")
}

fn succeed(command: &mut Command) -> Result<()> {
    let status = command
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
