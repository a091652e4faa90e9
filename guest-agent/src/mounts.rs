//! Mounts of the OCI runtime spec: their options as data, and placing them.
//!
//! Owns: the table of mount options, making a file system or a bind as a detached mount, and
//! attaching it to a target that is already open. Refuses: paths as targets; a target named by
//! a descriptor can't be swapped for a link on the way.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

use crate::fault::{Fault, Tried};
use crate::sys::{self, MountAttributes};

const RDONLY: u64 = 0x1;
const NOSUID: u64 = 0x2;
const NODEV: u64 = 0x4;
const NOEXEC: u64 = 0x8;
const ATIME: u64 = 0x70;
const RELATIME: u64 = 0x0;
const NOATIME: u64 = 0x10;
const STRICTATIME: u64 = 0x20;
const NODIRATIME: u64 = 0x80;
const NOSYMFOLLOW: u64 = 0x0020_0000;

/// Option, attributes it clears, attributes it then sets (mount_setattr(2)).
const ATTRIBUTES: &[(&str, u64, u64)] = &[
    ("ro", 0, RDONLY),
    ("rw", RDONLY, 0),
    ("nosuid", 0, NOSUID),
    ("suid", NOSUID, 0),
    ("nodev", 0, NODEV),
    ("dev", NODEV, 0),
    ("noexec", 0, NOEXEC),
    ("exec", NOEXEC, 0),
    ("relatime", ATIME, RELATIME),
    ("norelatime", ATIME, RELATIME),
    ("noatime", ATIME, NOATIME),
    ("atime", ATIME, RELATIME),
    ("strictatime", ATIME, STRICTATIME),
    ("nostrictatime", ATIME, RELATIME),
    ("nodiratime", 0, NODIRATIME),
    ("diratime", NODIRATIME, 0),
    ("nosymfollow", 0, NOSYMFOLLOW),
    ("symfollow", NOSYMFOLLOW, 0),
];

/// Option, propagation, whether for the mounts below too (mount_namespaces(7)).
const PROPAGATIONS: &[(&str, u64, bool)] = &[
    ("private", libc::MS_PRIVATE, false),
    ("rprivate", libc::MS_PRIVATE, true),
    ("slave", libc::MS_SLAVE, false),
    ("rslave", libc::MS_SLAVE, true),
    ("shared", libc::MS_SHARED, false),
    ("rshared", libc::MS_SHARED, true),
    ("unbindable", libc::MS_UNBINDABLE, false),
    ("runbindable", libc::MS_UNBINDABLE, true),
];

/// What the options of one mount ask for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Options {
    /// `Some(whether recursive)` for a bind mount.
    pub(crate) bind: Option<bool>,
    /// Attributes of the mount itself.
    pub(crate) own: MountAttributes,
    /// Attributes of the mount and of all below it.
    pub(crate) all: MountAttributes,
    /// Options for the file system: key, and value if it has one.
    pub(crate) data: Vec<(String, Option<String>)>,
    /// Whether a tmpfs starts with a copy of what it covers.
    pub(crate) copy_up: bool,
}

impl Options {
    /// Reads the options of a mount. What isn't an option of every mount is the file system's.
    pub(crate) fn parse<S: AsRef<str>>(options: &[S]) -> Self {
        let mut parsed = Self::default();
        for option in options {
            parsed.add(option.as_ref());
        }
        parsed
    }

    fn add(&mut self, option: &str) {
        if let Some(&(_, clear, set)) = ATTRIBUTES.iter().find(|entry| entry.0 == option) {
            change(&mut self.own, clear, set);
        } else if let Some(&(_, clear, set)) = option
            .strip_prefix('r')
            .and_then(|rest| ATTRIBUTES.iter().find(|entry| entry.0 == rest))
        {
            change(&mut self.all, clear, set);
        } else if let Some(&(_, propagation, all)) =
            PROPAGATIONS.iter().find(|entry| entry.0 == option)
        {
            let place = if all { &mut self.all } else { &mut self.own };
            place.propagation = propagation;
        } else {
            match option {
                "" | "defaults" | "async" => {}
                "bind" => self.bind = Some(self.bind.unwrap_or(false)),
                "rbind" => self.bind = Some(true),
                "tmpcopyup" => self.copy_up = true,
                other => self.data.push(match other.split_once('=') {
                    Some((key, value)) => (key.into(), Some(value.into())),
                    None => (other.into(), None),
                }),
            }
        }
    }

    /// The file system's option `key`, if it is given.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.data.iter().any(|(given, _)| given == key)
    }
}

/// Later options win over earlier ones.
fn change(attributes: &mut MountAttributes, clear: u64, set: u64) {
    attributes.set = (attributes.set & !clear) | set;
    // The kernel wants the whole access-time field cleared when one of it is set.
    let clear = if set & ATIME != 0 {
        clear | ATIME
    } else {
        clear
    };
    attributes.clear = (attributes.clear & !(set & !ATIME)) | clear;
}

/// A new mount of file system `kind`, attached nowhere yet.
///
/// # Errors
/// As fsopen(2), fsconfig(2) and fsmount(2) have them: ENODEV for a file system that the guest's
/// kernel lacks, EINVAL for an option that it doesn't know.
pub(crate) fn new_file_system(
    kind: &str,
    source: &str,
    options: &Options,
) -> Result<OwnedFd, Errno> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    if !source.is_empty() {
        fsconfig_set_string(context.as_fd(), "source", source)?;
    }
    for (key, value) in &options.data {
        match value {
            Some(value) => fsconfig_set_string(context.as_fd(), key.as_str(), value.as_str())?,
            None => fsconfig_set_flag(context.as_fd(), key.as_str())?,
        }
    }
    fsconfig_create(context.as_fd())?;
    let mount = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )?;
    dress(mount.as_fd(), options)?;
    Ok(mount)
}

/// Mounts a new file system of the guest's own at `target`, a directory that is made.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn place(
    kind: &str,
    source: &str,
    options: &Options,
    target: &str,
) -> Result<(), Fault> {
    let what = || format!("cannot mount {kind} {source:?} at {target}");
    std::fs::create_dir_all(target).or_internal(what)?;
    let new = new_file_system(kind, source, options).or_internal(what)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = rustix::fs::open(target, flags, Mode::empty()).or_internal(what)?;
    attach(new.as_fd(), target.as_fd()).or_internal(what)
}

/// A copy of the mount at `source` (and of those below it), attached nowhere yet.
///
/// # Errors
/// As open_tree(2) has them.
pub(crate) fn copy_of(source: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let recursive = if recursive {
        OpenTreeFlags::AT_RECURSIVE
    } else {
        OpenTreeFlags::empty()
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursive;
    open_tree(CWD, source, flags)
}

/// A copy of the mount at an open place.
///
/// # Errors
/// As open_tree(2) has them.
pub(crate) fn copy_of_place(place: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let recursive = if recursive {
        OpenTreeFlags::AT_RECURSIVE
    } else {
        OpenTreeFlags::empty()
    };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | recursive;
    open_tree(place, c"", flags)
}

/// Gives a mount its attributes and propagation.
///
/// # Errors
/// As mount_setattr(2) has them.
pub(crate) fn dress(mount: BorrowedFd<'_>, options: &Options) -> Result<(), Errno> {
    for (attributes, recursive) in [(options.all, true), (options.own, false)] {
        if attributes != MountAttributes::default() {
            sys::set_mount_attributes(mount, attributes, recursive)
                .map_err(|error| errno(&error))?;
        }
    }
    Ok(())
}

/// Makes a mount, and those below it if asked, read-only.
///
/// # Errors
/// As mount_setattr(2) has them.
pub(crate) fn make_read_only(mount: BorrowedFd<'_>, recursive: bool) -> Result<(), Errno> {
    let attributes = MountAttributes {
        set: RDONLY,
        ..MountAttributes::default()
    };
    sys::set_mount_attributes(mount, attributes, recursive).map_err(|error| errno(&error))
}

/// Attaches a detached mount on top of `target`.
///
/// # Errors
/// As move_mount(2) has them.
pub(crate) fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(mount, c"", target, c"", flags)
}

fn errno(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_volume_is_a_recursive_private_bind() {
        let options = Options::parse(&["rbind", "rprivate", "ro"]);
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.own.set, RDONLY);
        assert_eq!(options.all.propagation, libc::MS_PRIVATE);
        assert!(options.data.is_empty());
    }

    #[test]
    fn a_tmpfs_keeps_its_own_options() {
        let options =
            Options::parse(&["nosuid", "strictatime", "mode=755", "size=65536k", "noswap"]);
        assert_eq!(options.own.set, NOSUID | STRICTATIME);
        assert_eq!(options.own.clear, ATIME);
        let data: Vec<_> = options
            .data
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_deref()))
            .collect();
        assert_eq!(
            data,
            [
                ("mode", Some("755")),
                ("size", Some("65536k")),
                ("noswap", None)
            ]
        );
        assert!(options.has("mode"));
        assert_eq!(options.bind, None);
    }

    #[test]
    fn the_last_of_two_that_contradict_wins() {
        let options = Options::parse(&["ro", "rw", "noexec", "exec", "dev", "nodev"]);
        assert_eq!(options.own.set, NODEV);
        assert_eq!(options.own.clear, RDONLY | NOEXEC);
    }

    #[test]
    fn bind_after_rbind_stays_recursive() {
        assert_eq!(Options::parse(&["rbind", "bind"]).bind, Some(true));
        assert_eq!(Options::parse(&["bind"]).bind, Some(false));
    }

    #[test]
    fn recursive_attributes_are_kept_apart() {
        let options = Options::parse(&["rro", "nosuid", "rnoatime"]);
        assert_eq!(options.all.set, RDONLY | NOATIME);
        assert_eq!(options.all.clear, ATIME);
        assert_eq!(options.own.set, NOSUID);
    }

    proptest! {
        #[test]
        fn nothing_is_both_set_and_cleared(picks in proptest::collection::vec(0..ATTRIBUTES.len(), 0..12)) {
            let names: Vec<_> = picks.iter().map(|&pick| ATTRIBUTES[pick].0).collect();
            let own = Options::parse(&names).own;
            prop_assert_eq!(own.set & own.clear & !ATIME, 0);
            if own.set & ATIME != 0 {
                prop_assert_eq!(own.clear & ATIME, ATIME);
            }
        }

        #[test]
        fn any_option_is_read(options in proptest::collection::vec(".{0,20}", 0..8)) {
            Options::parse(&options);
        }
    }
}
