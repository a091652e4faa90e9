//! The machine's kernel: Debian's own package, unpacked and never installed.
//!
//! Owns: which package, its download, and `target/host/kernel/RELEASE`. Refuses: to replace a
//! kernel that is there; delete that directory to have a newer one.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::packages::{self, output, run};
use super::report::Report;

/// Metapackages whose dependency names a kernel, in the archives of Debian 12 and 13.
const METAPACKAGES: [&str; 2] = ["linux-image-6.12-amd64", "linux-image-amd64"];
/// The series that works best under QEMU's emulation and on tmpfs overlays.
const PREFERRED: (u32, u32) = (6, 12);

/// An unpacked kernel.
#[derive(Debug, Clone)]
pub(super) struct Kernel {
    /// What `uname -r` says in the machine.
    pub(super) release: String,
    /// The directory that holds `vmlinux` and `lib/modules/RELEASE`.
    pub(super) dir: PathBuf,
    /// The kernel, uncompressed: unpacking a compressed one under emulation costs seconds.
    pub(super) image: PathBuf,
}

impl Kernel {
    /// The root of its modules.
    #[must_use]
    pub(super) fn modules(&self) -> PathBuf {
        self.dir.join("lib/modules").join(&self.release)
    }
}

/// Gives the kernel under `home`, downloading it the first time.
///
/// # Errors
/// When the archive offers none, or a download or an unpacking fails.
pub(super) fn ensure_kernel(home: &Path, report: &Report) -> Result<Kernel> {
    let kernels = home.join("kernel");
    fs::create_dir_all(&kernels).with_context(|| format!("make {}", kernels.display()))?;
    if let Some(kernel) = newest(&kernels)? {
        return Ok(kernel);
    }
    let package = offered(report)?;
    report.step(&format!("downloading {package} (about 100 MB)"));
    let work = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempdir_in(&kernels)
        .with_context(|| format!("make a directory in {}", kernels.display()))?;
    run(Command::new("apt-get")
        .args(["-o", "APT::Sandbox::User=root", "download", &package])
        .current_dir(work.path()))?;
    report.step(&format!("unpacking {package}"));
    let release = package.trim_start_matches("linux-image-").to_owned();
    let release = release.trim_end_matches("-unsigned");
    unpack(work.path(), release).with_context(|| format!("unpack {package}"))?;
    let ready = kernels.join(release);
    fs::rename(work.path().join("ready"), &ready)
        .with_context(|| format!("move the kernel to {}", ready.display()))?;
    newest(&kernels)?.with_context(|| format!("no kernel in {}", kernels.display()))
}

fn newest(kernels: &Path) -> Result<Option<Kernel>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(kernels)? {
        let release = entry?.file_name().to_string_lossy().into_owned();
        if let Some(version) = version(&release) {
            found.push((version, release));
        }
    }
    found.sort();
    Ok(found.pop().map(|(_, release)| Kernel {
        dir: kernels.join(&release),
        image: kernels.join(&release).join("vmlinux"),
        release,
    }))
}

fn offered(report: &Report) -> Result<String> {
    let ask = || output(Command::new("apt-cache").arg("show").args(METAPACKAGES));
    if let Some(package) = ask().ok().as_deref().and_then(choose) {
        return Ok(package);
    }
    packages::update(report)?;
    choose(&ask()?).context("the package archive offers no linux-image for amd64")
}

/// The kernel package to use, from what `apt-cache show` says of the metapackages: the
/// preferred series first, then the newest.
fn choose(shown: &str) -> Option<String> {
    shown
        .lines()
        .filter_map(|line| line.strip_prefix("Depends:"))
        .flat_map(|line| line.split(','))
        .filter_map(|dependency| dependency.split_whitespace().next())
        .filter(|name| name.starts_with("linux-image-"))
        .filter_map(|name| {
            let version = version(name.trim_start_matches("linux-image-"))?;
            Some((((version.0, version.1) == PREFERRED, version), name))
        })
        .max()
        .map(|(_, name)| name.to_owned())
}

/// `6.12.117+deb12-amd64` → (6, 12, 117).
fn version(release: &str) -> Option<(u32, u32, u32)> {
    let digits = |text: &str| -> Option<u32> {
        let end = text
            .find(|c: char| !c.is_ascii_digit())
            .unwrap_or(text.len());
        text[..end].parse().ok()
    };
    let mut parts = release.splitn(3, '.');
    Some((
        digits(parts.next()?)?,
        digits(parts.next()?)?,
        digits(parts.next()?)?,
    ))
}

fn unpack(work: &Path, release: &str) -> Result<()> {
    let mut debs = Vec::new();
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            debs.push(path);
        }
    }
    let [deb] = debs.as_slice() else {
        bail!(
            "expected one .deb in {}, found {}",
            work.display(),
            debs.len()
        );
    };
    let tree = work.join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(deb).arg(&tree))?;
    let ready = work.join("ready");
    fs::create_dir(&ready)?;
    let lib = [tree.join("lib"), tree.join("usr/lib")]
        .into_iter()
        .find(|lib| lib.join("modules").is_dir())
        .context("the package holds no modules")?;
    fs::rename(lib, ready.join("lib"))?;
    let image = tree.join(format!("boot/vmlinuz-{release}"));
    let bytes = fs::read(&image).with_context(|| format!("read {}", image.display()))?;
    fs::write(ready.join("vmlinux"), uncompressed(&bytes, work)?)?;
    // So that `modprobe`, and the kernel's own calls of it, work in the machine.
    run(Command::new("depmod").arg("-b").arg(&ready).arg(release))
}

/// The kernel proper out of a bzImage (Documentation/arch/x86/boot.rst).
fn uncompressed(image: &[u8], work: &Path) -> Result<Vec<u8>> {
    let payload = payload(image).context("find the kernel in its bzImage")?;
    let program = match payload {
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        [0xfd, b'7', b'z', ..] => "xz",
        [0x1f, 0x8b, ..] => "gzip",
        [0x02, 0x21, 0x4c, 0x18, ..] => "lz4",
        _ => bail!("the kernel is compressed in an unknown way"),
    };
    let file = work.join("payload");
    fs::write(&file, payload)?;
    let done = Command::new(program).arg("-dc").arg(&file).output();
    let done = done.with_context(|| format!("run {program}"))?;
    // Every program but this check stumbles over the 4 bytes of length behind the data.
    ensure!(
        done.stdout.starts_with(b"\x7fELF"),
        "{program} gave no kernel: {}",
        String::from_utf8_lossy(&done.stderr).trim()
    );
    Ok(done.stdout)
}

fn payload(image: &[u8]) -> Option<&[u8]> {
    let word = |at: usize| -> Option<usize> {
        let bytes = image.get(at..at + 4)?.try_into().ok()?;
        usize::try_from(u32::from_le_bytes(bytes)).ok()
    };
    if image.get(0x202..0x206)? != b"HdrS" {
        return None;
    }
    let setup = (usize::from(*image.get(0x1f1)?) + 1) * 512;
    let start = setup.checked_add(word(0x248)?)?;
    image.get(start..start.checked_add(word(0x24c)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_preferred_series_wins_over_older_and_newer_ones() {
        let shown = "Package: linux-image-amd64\nDepends: linux-image-6.1.0-56-amd64 (= 6.1.2-1)\n\n\
                     Package: a\nDepends: linux-image-6.12.9+deb12-amd64 (= 6.12.9-1), foo\n\n\
                     Package: b\nDepends: linux-image-6.12.117+deb12-amd64 (= 6.12.117-1)\n\n\
                     Package: c\nDepends: linux-image-6.16.1-amd64\n";
        assert_eq!(
            choose(shown).as_deref(),
            Some("linux-image-6.12.117+deb12-amd64")
        );
    }

    #[test]
    fn without_the_preferred_series_the_newest_wins() {
        let shown = "Depends: linux-image-6.1.0-47-amd64\nDepends: linux-image-6.1.0-56-amd64\n\
                     Depends: linux-image-5.10.0-9-amd64\n";
        assert_eq!(
            choose(shown).as_deref(),
            Some("linux-image-6.1.0-56-amd64").or(None)
        );
    }

    #[test]
    fn nothing_offered_is_nothing_chosen() {
        assert_eq!(choose(""), None);
        assert_eq!(choose("Depends: libc6, linux-image-cloud"), None);
    }

    #[test]
    fn a_payload_is_cut_out_by_its_header_and_bad_headers_are_refused() {
        let mut image = vec![0_u8; 2048];
        image[0x1f1] = 1; // one sector of setup code
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x248] = 16;
        image[0x24c] = 4;
        image[1040..1044].copy_from_slice(b"data");
        assert_eq!(payload(&image), Some(b"data".as_slice()));
        image[0x24f] = 0xff;
        assert_eq!(payload(&image), None);
        assert_eq!(payload(b"short"), None);
    }
}
