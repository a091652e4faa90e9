//! Builds Hull and lays it out as it is installed, under `target/hull/`:
//!
//! ```text
//! bin/hull   bin/hull-oci   bin/containerd-shim-hull-v2
//! lib/hull/hull-monitor   lib/hull/vmlinux   lib/hull/initrd
//! ```
//!
//! The programs find each other by this layout, so what is tested is what is installed.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use cpio::newc::Builder as Entry;

use crate::kernel;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Everything is static: programs that start with each container have no libraries to find and to
/// be bound to (1.5 M instructions of a start), and the agent is alone in the guest's first root.
/// Their parts begin where huge pages do, in the file and in memory: what the host's page cache holds
/// as huge pages (`sandbox/src/template/mod.rs`), it maps as such (2 M).
const PROGRAM_FLAGS: &str = "-C target-feature=+crt-static \
    -C link-arg=-Wl,-z,max-page-size=0x200000,-z,separate-loadable-segments";
const AGENT_FLAGS: &str = "-C target-feature=+crt-static -C relocation-model=static";

/// What people and engines run.
const PROGRAMS: &[&str] = &["hull", "hull-oci", "containerd-shim-hull-v2"];

/// Builds whatever is out of date and returns the prefix that holds it.
pub(crate) fn stage() -> Result<PathBuf> {
    let vmlinux = kernel::ensure()?;
    eprintln!("stage: building hull, hull-monitor and hull-agent");
    cargo_build(
        &[
            "--profile",
            "release",
            "-p",
            "hull",
            "-p",
            "hull-sandbox",
            "-p",
            "hull-shim",
        ],
        PROGRAM_FLAGS,
    )?;
    cargo_build(&["--profile", "agent", "-p", "hull-agent"], AGENT_FLAGS)?;
    let built = target_dir().join(TARGET).join("release");
    let agent = target_dir().join(TARGET).join("agent/hull-agent");
    let prefix = target_dir().join("hull");
    let library = prefix.join("lib/hull");
    for program in PROGRAMS {
        place(&built.join(program), &prefix.join("bin").join(program))?;
    }
    place(&built.join("hull-monitor"), &library.join("hull-monitor"))?;
    place(&vmlinux, &library.join("vmlinux"))?;
    write_initrd(&agent, &library.join("initrd"))?;
    Ok(prefix)
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// The top of the source tree.
pub(crate) fn workspace() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here).to_path_buf()
}

/// `flags` reach only what is built for [`TARGET`]: build scripts and macros stay dynamic.
fn cargo_build(args: &[&str], flags: &str) -> Result<()> {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--locked", "--target", TARGET])
        .args(args)
        .env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS", flags)
        .current_dir(workspace())
        .status()
        .context("cannot run cargo")?;
    if !status.success() {
        bail!("cargo build ended with {status}");
    }
    Ok(())
}

/// Copies `from` to `to` unless they are alike, and never writes to a file that may be running.
fn place(from: &Path, to: &Path) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
    if fs::read(to).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let directory = to.parent().context("a staged file has no directory")?;
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot create {}", directory.display()))?;
    let fresh = to.with_extension("new");
    fs::copy(from, &fresh).with_context(|| format!("cannot write {}", fresh.display()))?;
    fs::rename(&fresh, to).with_context(|| format!("cannot replace {}", to.display()))
}

/// The guest's first root as a cpio archive (kernel documentation, "initramfs buffer format"):
/// the agent as `/init`, and the console that the kernel opens for it.
fn write_initrd(agent: &Path, to: &Path) -> Result<()> {
    let mut program =
        File::open(agent).with_context(|| format!("cannot read {}", agent.display()))?;
    let size = u32::try_from(program.metadata()?.len()).context("the agent is past 4 GiB")?;
    let fresh = to.with_extension("building");
    let mut sink = BufWriter::new(File::create(&fresh)?);
    for (entry, size, from) in [
        (Entry::new("dev").mode(0o040_755), 0, None),
        (
            Entry::new("dev/console")
                .mode(0o020_600)
                .rdev_major(5)
                .rdev_minor(1),
            0,
            None,
        ),
        (Entry::new("init").mode(0o100_755), size, Some(&mut program)),
    ] {
        let mut writer = entry.nlink(1).write(sink, size);
        if let Some(from) = from {
            io::copy(from, &mut writer).context("cannot write the initrd")?;
        }
        sink = writer.finish()?;
    }
    let sink = cpio::newc::trailer(sink)?;
    sink.into_inner()
        .context("cannot write the initrd")?
        .sync_all()?;
    place(&fresh, to)?;
    fs::remove_file(&fresh).context("cannot remove the initrd's scratch file")
}
