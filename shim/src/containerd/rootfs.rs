//! A container's root as containerd describes it: mounts, made at `rootfs` in the bundle.

use std::ffi::CString;
use std::fs::{self, DirBuilder};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, ensure};
use containerd_shim_protos::api::Mount;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// Its name in a bundle.
pub(crate) const NAME: &str = "rootfs";
/// What mount(2) takes of options, with room to spare: one page.
const PAGE: usize = 4000;

/// Options that are flags of mount(2): name, flag, whether it sets or clears.
const FLAGS: [(&str, MountFlags, bool); 20] = [
    ("async", MountFlags::SYNCHRONOUS, false),
    ("atime", MountFlags::NOATIME, false),
    ("bind", MountFlags::BIND, true),
    ("dev", MountFlags::NODEV, false),
    ("diratime", MountFlags::NODIRATIME, false),
    ("dirsync", MountFlags::DIRSYNC, true),
    ("exec", MountFlags::NOEXEC, false),
    ("noatime", MountFlags::NOATIME, true),
    ("nodev", MountFlags::NODEV, true),
    ("nodiratime", MountFlags::NODIRATIME, true),
    ("noexec", MountFlags::NOEXEC, true),
    ("nosuid", MountFlags::NOSUID, true),
    ("rbind", MountFlags::BIND.union(MountFlags::REC), true),
    ("relatime", MountFlags::RELATIME, true),
    ("norelatime", MountFlags::RELATIME, false),
    ("ro", MountFlags::RDONLY, true),
    ("rw", MountFlags::RDONLY, false),
    ("strictatime", MountFlags::STRICTATIME, true),
    ("suid", MountFlags::NOSUID, false),
    ("sync", MountFlags::SYNCHRONOUS, true),
];

/// Makes all mounts, each on top of those before; none is left if one fails.
pub(crate) fn mount_all(mounts: &[Mount], bundle: &Path) -> anyhow::Result<()> {
    if mounts.is_empty() {
        return Ok(());
    }
    let root = bundle.join(NAME);
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o711);
    builder
        .create(&root)
        .with_context(|| format!("cannot create \"{}\"", root.display()))?;
    for wanted in mounts {
        let made = target(&root, &wanted.target).and_then(|target| make(wanted, &target));
        if let Err(error) = made {
            // The error at hand is the one to tell.
            let _ = unmount_all(bundle);
            let (kind, source) = (&wanted.type_, &wanted.source);
            return Err(error.context(format!("cannot mount rootfs component {kind} {source}")));
        }
    }
    Ok(())
}

fn target(root: &Path, below: &str) -> anyhow::Result<PathBuf> {
    let below = Path::new(below);
    let mut target = root.to_owned();
    for part in below.components() {
        match part {
            Component::Normal(name) => target.push(name),
            Component::RootDir | Component::CurDir => {}
            _ => anyhow::bail!("target \"{}\" leads out", below.display()),
        }
        let is_link = fs::symlink_metadata(&target).is_ok_and(|found| found.is_symlink());
        ensure!(!is_link, "target \"{}\" goes by a link", below.display());
    }
    Ok(target)
}

fn make(wanted: &Mount, target: &Path) -> anyhow::Result<()> {
    let (flags, data) = options(&wanted.options);
    let (data, _open) = match data.len() > PAGE {
        true => by_descriptor(&data)?,
        false => (data, Vec::new()),
    };
    let data = CString::new(data)?;
    if !flags.contains(MountFlags::BIND) {
        let kind = wanted.type_.as_str();
        return Ok(mount(&wanted.source, target, kind, flags, data.as_c_str())?);
    }
    let bind = flags & (MountFlags::BIND | MountFlags::REC);
    mount(&wanted.source, target, "", bind, None)?;
    // A bind takes no more than that at first (mount(2)).
    let rest = flags.difference(MountFlags::REC);
    if rest != MountFlags::BIND {
        mount_remount(target, rest, "")?;
    }
    Ok(())
}

fn options(words: &[String]) -> (MountFlags, String) {
    let mut flags = MountFlags::empty();
    let mut data = Vec::new();
    for word in words {
        match FLAGS.iter().find(|(name, ..)| name == word) {
            Some((_, flag, sets)) => flags.set(*flag, *sets),
            None if word == "defaults" || word == "loop" || word.is_empty() => {}
            None => data.push(word.as_str()),
        }
    }
    (flags, data.join(","))
}

/// Overlay options whose lower directories are named by descriptor, so that many fit into the
/// one page that there is.
fn by_descriptor(data: &str) -> anyhow::Result<(String, Vec<OwnedFd>)> {
    let mut open = Vec::new();
    let mut words = Vec::new();
    for word in data.split(',') {
        let Some(lowers) = word.strip_prefix("lowerdir=") else {
            words.push(word.to_owned());
            continue;
        };
        let mut names = Vec::new();
        for lower in lowers.split(':') {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(lower, flags, Mode::empty())
                .with_context(|| format!("cannot open \"{lower}\""))?;
            names.push(format!("/proc/self/fd/{}", directory.as_raw_fd()));
            open.push(directory);
        }
        words.push(format!("lowerdir={}", names.join(":")));
    }
    Ok((words.join(","), open))
}

/// Undoes all that is mounted at a bundle's root, whoever did it.
pub(crate) fn unmount_all(bundle: &Path) -> anyhow::Result<()> {
    let root = bundle.join(NAME);
    loop {
        let result = match unmount(&root, UnmountFlags::NOFOLLOW) {
            // Somebody looks into it, who won't hold the container up.
            Err(Errno::BUSY) => unmount(&root, UnmountFlags::NOFOLLOW | UnmountFlags::DETACH),
            result => result,
        };
        match result {
            Ok(()) => {}
            // No mount point, or nothing at all.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => {
                let what = format!("cannot unmount \"{}\"", root.display());
                return Err(anyhow::Error::from(error).context(what));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_flags_or_data() {
        let words = [
            "ro",
            "rbind",
            "nosuid",
            "suid",
            "defaults",
            "index=off",
            "lowerdir=/a:/b",
        ];
        let (flags, data) = options(&words.map(str::to_owned));
        assert_eq!(
            flags,
            MountFlags::RDONLY | MountFlags::BIND | MountFlags::REC
        );
        assert_eq!(data, "index=off,lowerdir=/a:/b");
    }

    #[test]
    fn lower_directories_are_named_by_descriptor() {
        let (data, open) = by_descriptor("upperdir=/u,lowerdir=/:/tmp").unwrap();
        let numbers: Vec<i32> = open.iter().map(AsRawFd::as_raw_fd).collect();
        let (first, second) = (numbers[0], numbers[1]);
        assert_eq!(
            data,
            format!("upperdir=/u,lowerdir=/proc/self/fd/{first}:/proc/self/fd/{second}")
        );
        assert!(by_descriptor("lowerdir=/no/such").is_err());
    }

    #[test]
    fn a_target_stays_in_the_root() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", root.path().join("out")).unwrap();
        assert_eq!(
            target(root.path(), "/a/b").unwrap(),
            root.path().join("a/b")
        );
        assert!(target(root.path(), "../x").is_err());
        assert!(target(root.path(), "out/etc").is_err());
    }
}
