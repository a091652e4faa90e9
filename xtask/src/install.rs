//! `cargo xtask install`: builds Hull and copies it to a prefix, by default `/usr/local`.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::stage;

/// Installs below `prefix` what [`stage::stage`] lays out.
pub(crate) fn run(prefix: &Path) -> Result<()> {
    let staged = stage::stage()?;
    for (file, mode) in [
        ("bin/hull", "755"),
        ("bin/hull-oci", "755"),
        ("bin/containerd-shim-hull-v2", "755"),
        ("lib/hull/hull-monitor", "755"),
        ("lib/hull/vmlinux", "644"),
        ("lib/hull/initrd", "644"),
    ] {
        let to = prefix.join(file);
        eprintln!("install: {}", to.display());
        let status = Command::new("install")
            .args(["-D", "-m", mode])
            .arg(staged.join(file))
            .arg(&to)
            .status()
            .context("cannot run install(1)")?;
        if !status.success() {
            bail!("cannot install {} (as root, or with sudo?)", to.display());
        }
    }
    eprintln!("install: done; `hull doctor` says whether this machine can run it");
    Ok(())
}
