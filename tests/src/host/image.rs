//! What the machine boots besides its kernel: the init, built static, and its initramfs.
//!
//! Owns: `target/host/init` and `target/host/initramfs-KEY`. Refuses: to build when no source
//! has changed.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::initramfs::{self, Archive};
use super::kernel::Kernel;
use super::packages::run;
use super::report::Report;

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// Where the init and what it shares with this crate's library live, below the workspace.
const SOURCES: [&str; 2] = ["tests/src/bin/hull-host-init", "tests/src/host/wire.rs"];

/// A bootable pair of files.
#[derive(Debug, Clone)]
pub(super) struct Image {
    /// The static init, also the keeper on the outer side.
    pub(super) init: PathBuf,
    /// The initramfs without the machine's own settings.
    pub(super) initramfs: PathBuf,
    /// The modules in it, in the order to load them.
    pub(super) modules: Vec<String>,
}

/// Gives the image for `kernel`, building what is missing or stale.
///
/// # Errors
/// When the init doesn't build or a module is missing.
pub(super) fn ensure_image(
    workspace: &Path,
    home: &Path,
    kernel: &Kernel,
    report: &Report,
) -> Result<Image> {
    let key = key(workspace, &kernel.release)?;
    let init = home.join(format!("init-{key:016x}"));
    let initramfs = home.join(format!("initramfs-{key:016x}"));
    let list = home.join(format!("modules-{key:016x}"));
    if !list.is_file() {
        report.step("building the machine's init");
        forget_old(home)?;
        build(workspace, home, &init)?;
        report.step("packing the machine's modules");
        let modules = pack(&init, kernel, &initramfs)?;
        // Last: its presence says that the others are whole.
        let unfinished = home.join(".modules");
        fs::write(&unfinished, modules.join("\n"))?;
        fs::rename(&unfinished, &list)?;
    }
    let modules = fs::read_to_string(&list)?
        .lines()
        .map(str::to_owned)
        .collect();
    Ok(Image {
        init,
        initramfs,
        modules,
    })
}

fn key(workspace: &Path, release: &str) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    hasher.write(release.as_bytes());
    for source in SOURCES {
        let path = workspace.join(source);
        let mut files = vec![path.clone()];
        if path.is_dir() {
            files = fs::read_dir(&path)?
                .map(|entry| entry.map(|entry| entry.path()))
                .collect::<Result<_, _>>()?;
            files.sort();
        }
        for file in files {
            hasher.write(&fs::read(&file).with_context(|| format!("read {}", file.display()))?);
        }
    }
    // The list of modules and the archive's shape are this crate's own.
    hasher.write(include_bytes!("initramfs.rs"));
    hasher.write(include_bytes!("image.rs"));
    Ok(hasher.finish())
}

fn forget_old(home: &Path) -> Result<()> {
    for entry in fs::read_dir(home)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if ["init-", "initramfs-", "modules-"]
            .iter()
            .any(|kind| name.starts_with(kind))
        {
            fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

fn build(workspace: &Path, home: &Path, to: &Path) -> Result<()> {
    let target_dir = home.join("build");
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // With a named target, build scripts and macros stay dynamic.
    run(Command::new(cargo)
        .args(["build", "--quiet", "--release", "--target", TARGET])
        .args(["-p", "hull-tests", "--bin", "hull-host-init"])
        .arg("--target-dir")
        .arg(&target_dir)
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .current_dir(workspace))
    .context("build hull-host-init")?;
    let built = target_dir.join(TARGET).join("release/hull-host-init");
    fs::copy(&built, to).with_context(|| format!("copy {}", built.display()))?;
    Ok(())
}

fn pack(init: &Path, kernel: &Kernel, to: &Path) -> Result<Vec<String>> {
    let mut archive = Archive::default();
    for directory in ["dev", "modules", "proc", "sys"] {
        archive.directory(directory)?;
    }
    archive.character_device("dev/console", 5, 1)?;
    archive.file("init", 0o755, &fs::read(init)?)?;
    let mut names = Vec::new();
    for module in initramfs::modules(&kernel.modules())? {
        archive.file(&format!("modules/{}", module.name), 0o644, &module.bytes)?;
        names.push(module.name);
    }
    fs::write(to, archive.finish()?).with_context(|| format!("write {}", to.display()))?;
    Ok(names)
}
