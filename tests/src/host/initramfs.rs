//! The machine's first root: one static binary and the modules it needs to see the real one.
//!
//! Owns: the closure of modules, and the cpio archive (Documentation/driver-api/early-userspace/
//! buffer-format.rst). Refuses: modules that can wait for `modprobe` in the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use cpio::newc::{self, Builder};

/// What the machine has from the start, without their dependencies.
const MODULES: [&str; 11] = [
    "virtio_pci",
    "9pnet_virtio",
    "9p",
    "overlay",
    "virtio_net",
    "kvm_amd",
    "tun",
    "virtiofs",
    "loop",
    "vhost_vsock",
    "vsock_loopback",
];

/// A module, uncompressed.
pub(super) struct Module {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
}

/// The modules under `tree` (a `lib/modules/RELEASE`) in the order to load them.
///
/// # Errors
/// When one is missing or can't be read.
pub(super) fn modules(tree: &Path) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    index(&tree.join("kernel"), &mut files)?;
    let builtin =
        fs::read_to_string(tree.join("modules.builtin")).context("read modules.builtin")?;
    let builtin: Vec<String> = builtin
        .lines()
        .map(|line| canonical(Path::new(line)))
        .collect();
    let mut loaded: Vec<Module> = Vec::new();
    for name in MODULES {
        add(name, &files, &builtin, &mut loaded)?;
    }
    Ok(loaded)
}

fn add(
    name: &str,
    files: &BTreeMap<String, PathBuf>,
    builtin: &[String],
    loaded: &mut Vec<Module>,
) -> Result<()> {
    if builtin.iter().any(|known| known == name) || loaded.iter().any(|done| done.name == name) {
        return Ok(());
    }
    let path = files
        .get(name)
        .with_context(|| format!("the kernel package holds no module {name}"))?;
    let bytes = read(path).with_context(|| format!("read {}", path.display()))?;
    for dependency in depends(&bytes) {
        add(&dependency, files, builtin, loaded)?;
    }
    loaded.push(Module {
        name: name.to_owned(),
        bytes,
    });
    Ok(())
}

fn index(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))?;
    for entry in entries {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else {
            files.insert(canonical(&path), path);
        }
    }
    Ok(())
}

/// `kernel/arch/x86/kvm/kvm-amd.ko.xz` → `kvm_amd`.
fn canonical(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let stem = name.split(".ko").next().unwrap_or_default();
    stem.replace('-', "_")
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let program = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        _ => return Ok(fs::read(path)?),
    };
    let done = Command::new(program).arg("-dc").arg(path).output()?;
    ensure!(done.status.success(), "{program} can't unpack it");
    Ok(done.stdout)
}

/// The modules that a module names in its `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    String::from_utf8_lossy(&value[..end])
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

/// A cpio archive in the making. Archives may be joined: the kernel unpacks them in turn.
#[derive(Default)]
pub(super) struct Archive(Vec<u8>);

impl Archive {
    pub(super) fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(Builder::new(name).mode(0o040_755), &[])
    }

    pub(super) fn file(&mut self, name: &str, permissions: u32, content: &[u8]) -> Result<()> {
        self.entry(Builder::new(name).mode(0o100_000 | permissions), content)
    }

    pub(super) fn character_device(&mut self, name: &str, major: u32, minor: u32) -> Result<()> {
        let device = Builder::new(name).mode(0o020_600);
        self.entry(device.rdev_major(major).rdev_minor(minor), &[])
    }

    /// The whole archive.
    pub(super) fn finish(self) -> Result<Vec<u8>> {
        let mut bytes = newc::trailer(self.0).context("end an archive")?;
        bytes.resize(bytes.len().next_multiple_of(512), 0);
        Ok(bytes)
    }

    fn entry(&mut self, entry: Builder, content: &[u8]) -> Result<()> {
        let size = u32::try_from(content.len()).context("a file is past 4 GiB")?;
        let mut writer = entry.nlink(1).write(&mut self.0, size);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_compared_as_the_kernel_does() {
        assert_eq!(canonical(Path::new("a/kvm-amd.ko.xz")), "kvm_amd");
        assert_eq!(canonical(Path::new("tun.ko")), "tun");
    }

    #[test]
    fn dependencies_are_read_from_the_modinfo() {
        let module = b"ELF\0license=GPL\0depends=kvm,ccp,irq-bypass\0intree=Y\0";
        assert_eq!(depends(module), ["kvm", "ccp", "irq_bypass"]);
        assert!(depends(b"\0depends=\0").is_empty());
        assert!(depends(b"nothing").is_empty());
    }

    #[test]
    fn joined_archives_read_back() {
        let mut first = Archive::default();
        first.directory("dir").unwrap();
        first.file("dir/file", 0o755, b"hello").unwrap();
        let mut joined = first.finish().unwrap();
        assert_eq!(joined.len() % 512, 0);
        let start = joined.len();
        let mut second = Archive::default();
        second.character_device("null", 1, 3).unwrap();
        joined.extend(second.finish().unwrap());
        let names = |bytes: &[u8]| -> Vec<(String, u32)> {
            let mut rest = std::io::Cursor::new(bytes);
            let mut found = Vec::new();
            loop {
                let reader = newc::Reader::new(&mut rest).unwrap();
                if reader.entry().is_trailer() {
                    return found;
                }
                let entry = reader.entry();
                found.push((entry.name().to_owned(), entry.file_size()));
                reader.finish().unwrap();
            }
        };
        assert_eq!(names(&joined), [("dir".into(), 0), ("dir/file".into(), 5)]);
        assert_eq!(names(&joined[start..]), [("null".into(), 0)]);
    }
}
