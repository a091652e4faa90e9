//! What this host must have for VMs to start: facts, what is wrong, how to mend it.
//!
//! Owns the questions and the advice. Prints nothing, mends nothing.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use rustix::fs::{Access, access};
use serde::Serialize;

use crate::settings::Settings;
use crate::{cgroup, rootfs, scratch, sys};

/// First bytes of an ELF image.
const ELF: [u8; 4] = *b"\x7fELF";

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, a few words.
    pub subject: String,
    /// How it stands.
    pub health: Health,
    /// What was seen.
    pub seen: String,
    /// What to do about it, when there is something to do.
    pub remedy: Option<String>,
}

/// How a finding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// As needed.
    Good,
    /// Something works less well or not at all, but VMs start.
    Limited,
    /// No VM starts.
    Broken,
}

fn good(subject: &str, seen: impl Into<String>) -> Finding {
    Finding {
        subject: subject.to_owned(),
        health: Health::Good,
        seen: seen.into(),
        remedy: None,
    }
}

fn wrong(
    health: Health,
    subject: &str,
    seen: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        subject: subject.to_owned(),
        health,
        seen: seen.into(),
        remedy: Some(remedy.into()),
    }
}

/// Looks at everything.
#[must_use]
pub fn examine(settings: &Settings) -> Vec<Finding> {
    let assets = &settings.assets;
    vec![
        processor(settings),
        kvm(&settings.kvm),
        privileges(),
        part("monitor", &assets.monitor),
        kernel(&assets.kernel),
        part("first root", &assets.initrd),
        overlay(),
        scratch(),
        directory("state directory", &settings.state_dir, true),
        directory("run directory", &settings.run_dir, false),
        memory(settings),
        cgroup2(),
    ]
}

fn processor(settings: &Settings) -> Finding {
    let subject = "processor";
    match (sys::has_virtualization(), settings.allow_emulated_kvm) {
        (true, _) => good(subject, "runs guests itself (vmx or svm)"),
        (false, allowed) => wrong(
            if allowed {
                Health::Limited
            } else {
                Health::Broken
            },
            subject,
            "has neither vmx nor svm: whatever /dev/kvm is here emulates a guest's kernel \
             instruction by instruction, thousands of times slower",
            "use a machine with VT-x or AMD-V, switch it on in the firmware, or let the \
             hypervisor around this machine pass it on (nested virtualization); \
             `allow_emulated_kvm = true` in the settings goes on regardless",
        ),
    }
}

fn kvm(path: &Path) -> Finding {
    let subject = "hypervisor";
    match File::options().read(true).write(true).open(path) {
        Ok(_) => good(subject, format!("{} opens", path.display())),
        Err(error) => {
            let remedy = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load the module: modprobe kvm_intel, or modprobe kvm_amd"
                }
                io::ErrorKind::PermissionDenied => {
                    "join the device's group: usermod -aG kvm $USER, then log in again"
                }
                _ => "see what dmesg says about kvm",
            };
            let seen = format!("{} does not open: {error}", path.display());
            wrong(Health::Broken, subject, seen, remedy)
        }
    }
}

fn privileges() -> Finding {
    let subject = "privileges";
    match rustix::process::geteuid().is_root() {
        true => good(subject, "root"),
        false => wrong(
            Health::Broken,
            subject,
            "not root, so the container's root can't be mounted",
            "run hull as root: sudo hull …",
        ),
    }
}

fn part(subject: &str, path: &Path) -> Finding {
    match File::open(path) {
        Ok(_) => good(subject, path.display().to_string()),
        Err(error) => missing_part(subject, path, &error.to_string()),
    }
}

fn kernel(path: &Path) -> Finding {
    let subject = "guest kernel";
    let mut magic = [0; 4];
    match File::open(path).and_then(|mut file| file.read_exact(&mut magic)) {
        Ok(()) if magic == ELF => good(subject, path.display().to_string()),
        Ok(()) => missing_part(subject, path, "it is no uncompressed ELF image"),
        Err(error) => missing_part(subject, path, &error.to_string()),
    }
}

fn missing_part(subject: &str, path: &Path, why: &str) -> Finding {
    wrong(
        Health::Broken,
        subject,
        format!("{}: {why}", path.display()),
        "install Hull whole (cargo xtask install), or name the file under [assets] in the settings",
    )
}

fn overlay() -> Finding {
    let subject = "overlayfs";
    let known = fs::read_to_string("/proc/filesystems")
        .is_ok_and(|text| text.split_whitespace().any(|word| word == "overlay"));
    let release = rustix::system::uname();
    let module = Path::new("/lib/modules")
        .join(release.release().to_string_lossy().as_ref())
        .join("kernel/fs/overlayfs");
    match (known, module.is_dir()) {
        (true, _) => good(subject, "in the kernel"),
        (false, true) => good(subject, "a module that the first mount loads"),
        (false, false) => wrong(
            Health::Broken,
            subject,
            "the kernel doesn't have it",
            "load or install the module overlay",
        ),
    }
}

/// What gives a container of an image its disk.
fn scratch() -> Finding {
    let subject = "scratch disks";
    match scratch::tool() {
        Some(tool) => good(subject, format!("made by {}", tool.display())),
        None => wrong(
            Health::Broken,
            subject,
            "mke2fs, which makes their file systems, is missing",
            scratch::TOOL_REMEDY,
        ),
    }
}

/// A directory that Hull makes when it is first needed: what counts is where it will be.
fn directory(subject: &str, path: &Path, holds_layers: bool) -> Finding {
    let Some(place) = path.ancestors().find(|place| place.exists()) else {
        let seen = format!("{} can't be made", path.display());
        return wrong(
            Health::Broken,
            subject,
            seen,
            "choose another in the settings",
        );
    };
    if access(place, Access::WRITE_OK).is_err() {
        let seen = format!("{} can't be written to", place.display());
        let remedy = "choose another in the settings, or change its owner";
        return wrong(Health::Broken, subject, seen, remedy);
    }
    match rootfs::unfit_for_layers(place) {
        Some(kind) if holds_layers => wrong(
            Health::Broken,
            subject,
            format!(
                "{} lies on {kind}, which can't hold an image's layers",
                path.display()
            ),
            rootfs::FIT_FOR_LAYERS,
        ),
        _ => good(subject, path.display().to_string()),
    }
}

fn memory(settings: &Settings) -> Finding {
    let subject = "memory";
    let available = fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| available_kib(&text));
    let Some(available) = available else {
        return good(subject, "unknown");
    };
    let wanted = settings.defaults.memory_bytes >> 20;
    let seen = format!("{} MiB available, a VM gets {wanted} MiB", available >> 10);
    match available >> 10 >= wanted {
        true => good(subject, seen),
        false => wrong(
            Health::Limited,
            subject,
            seen,
            "give VMs less (--memory, or [defaults] memory_bytes), or end something else",
        ),
    }
}

fn available_kib(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.split_whitespace().next()?.parse().ok()
}

fn cgroup2() -> Finding {
    let subject = "cgroup v2";
    match cgroup::is_version_2() {
        true => good(subject, "at /sys/fs/cgroup"),
        false => wrong(
            Health::Limited,
            subject,
            "not at /sys/fs/cgroup, so --cpus takes whole numbers only",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_must_be_an_elf_image() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinux");
        assert_eq!(kernel(&path).health, Health::Broken);
        fs::write(&path, "MZ, a bzImage").unwrap();
        assert!(kernel(&path).seen.contains("no uncompressed ELF image"));
        fs::write(&path, b"\x7fELF\x02").unwrap();
        assert_eq!(kernel(&path).health, Health::Good);
    }

    #[test]
    fn a_directory_need_not_exist_yet() {
        let directory = tempfile::tempdir().unwrap();
        let finding = super::directory("state", &directory.path().join("a/b"), false);
        assert_eq!(finding.health, Health::Good);
    }

    #[test]
    fn available_memory_is_read() {
        let text = "MemTotal:       2048 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(available_kib(text), Some(1024));
        assert_eq!(available_kib("MemTotal: 1 kB\n"), None);
    }

    #[test]
    fn what_is_wrong_can_be_mended() {
        let finding = kvm(Path::new("/nonexistent/kvm"));
        assert_eq!(finding.health, Health::Broken);
        assert!(finding.remedy.unwrap().contains("modprobe"));
    }
}
