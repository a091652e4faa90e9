//! Programs of other Debian releases than this machine's: unpacked beside each other and never
//! installed.
//!
//! Owns: the lists and downloads of `target/host/releases`, which apt checks by the archive's
//! signature. Refuses: to replace a package that is there; delete its directory to have a newer.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::packages::{output, run};
use super::report::Report;

/// Whose signatures count: Debian's own.
const KEYS: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The root of a package of that release, if [`ensure`] has unpacked it.
#[must_use]
pub fn find(release: &str, package: &str) -> Option<PathBuf> {
    // Tests run where their workspace is seen, wherever they are run from.
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent()?;
    let root = place(&super::home(workspace).ok()?, release, package);
    root.is_dir().then_some(root)
}

/// Downloads and unpacks a package of that release the first time it is asked for.
///
/// # Errors
/// If the archive has none, or the download or the unpacking fails.
pub fn ensure(release: &str, package: &str, report: &Report) -> Result<()> {
    let home = super::home(&super::workspace()?)?;
    let root = place(&home, release, package);
    if root.is_dir() {
        return Ok(());
    }
    report.step(&format!("downloading {package} of Debian's {release}"));
    let base = root.parent().unwrap_or(&home);
    fs::create_dir_all(base).with_context(|| format!("make {}", base.display()))?;
    let work = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(base)
        .with_context(|| format!("make a directory in {}", base.display()))?;
    let work = work.path();
    let failed = || format!("{package} of Debian's {release}");
    fs::create_dir_all(work.join("lists/partial"))?;
    fs::create_dir_all(work.join("cache/archives/partial"))?;
    let line = format!("deb [signed-by={KEYS}] {} {release} main\n", archive()?);
    fs::write(work.join("sources.list"), line)?;
    run(apt(work).arg("update")).with_context(failed)?;
    run(apt(work).args(["download", package]).current_dir(work)).with_context(failed)?;
    let unpacked = work.join("ready");
    run(Command::new("sh")
        .args(["-c", "exec dpkg-deb -x ./*.deb ready"])
        .current_dir(work))
    .with_context(failed)?;
    fs::rename(unpacked, &root).with_context(|| format!("move it to {}", root.display()))
}

fn place(home: &Path, release: &str, package: &str) -> PathBuf {
    home.join("releases").join(release).join(package)
}

/// Where this machine has Debian's packages from.
fn archive() -> Result<String> {
    let format = "$(ORIGIN) $(COMPONENT) $(RELEASE) $(REPO_URI)";
    let asked = ["indextargets", "--format", format, "Created-By: Packages"];
    let listed = output(Command::new("apt-get").args(asked))?;
    of_debian(&listed).context("this machine's packages are not Debian's")
}

/// That of the release itself: updates of its security are elsewhere.
fn of_debian(listed: &str) -> Option<String> {
    let fields = listed
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>());
    fields.into_iter().find_map(|fields| match fields[..] {
        ["Debian", "main", release, uri] if !release.contains('-') => Some(uri.to_owned()),
        _ => None,
    })
}

/// `apt-get` with lists and packages of its own.
fn apt(work: &Path) -> Command {
    let mut command = Command::new("apt-get");
    let below = |name: &str| work.join(name).display().to_string();
    for (option, value) in [
        ("Dir::Etc::SourceList", below("sources.list")),
        ("Dir::Etc::SourceParts", "-".to_owned()),
        ("Dir::State::Lists", below("lists")),
        ("Dir::Cache", below("cache")),
        ("APT::Sandbox::User", "root".to_owned()),
        ("Acquire::Languages", "none".to_owned()),
        (
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled",
            "no".to_owned(),
        ),
    ] {
        command.arg("-o").arg(format!("{option}={value}"));
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_is_that_of_the_release_itself() {
        let listed = "x main x http://x/\nDebian main bookworm-security http://s/\n\
                      Debian contrib bookworm http://c/\nDebian main bookworm http://d/debian/\n";
        assert_eq!(of_debian(listed).as_deref(), Some("http://d/debian/"));
        assert_eq!(of_debian("Debian main bookworm-updates http://u/"), None);
    }
}
