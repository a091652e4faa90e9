//! What a guest may see of its host: directories, each under a name, each with
//! the rights and the caching it was given.
//!
//! Owns the words only. Refuses names that couldn't be a directory entry, and
//! exports that aren't directories.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;
use std::{fmt, io};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

/// As long as the guest's kernel remembers anything.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// Who else writes to an exported directory, and so what the guest may keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nobody but this guest: names, attributes and contents are kept until the
    /// guest itself changes them. A file read before is read again without a
    /// request.
    Always,
    /// The host, too: a name may be a second old, a file that is opened shows
    /// what was written before it was opened.
    Auto,
}

impl CachePolicy {
    /// How long a name, and how long the attributes of a file may be believed.
    pub(super) fn timeouts(self, is_directory: bool) -> (Duration, Duration) {
        match self {
            Self::Always => (FOREVER, FOREVER),
            Self::Auto if is_directory => (Duration::from_secs(1), Duration::from_secs(1)),
            Self::Auto => (Duration::from_secs(1), Duration::ZERO),
        }
    }
}

/// By what a file is known again when a guest goes on from a saved state, beside its path and its
/// kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KnownBy {
    /// Its size, and the second in which it was last written to: the directory may be a copy, in
    /// which nobody but the guest has written.
    Content,
    /// Its inode: the directory is the same one, and the host may write to its files.
    Inode,
    /// Nothing else: what is there now is meant.
    Path,
}

/// What the directories of a device are to a guest that is saved with them mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FsRole {
    /// Its own: a guest that goes on finds the same ones.
    #[default]
    Own,
    /// They stand in for those of copies: the guest keeps nothing of them but their names.
    Template,
    /// A copy's own, in place of the template's of the same names.
    Copy,
}

/// A host directory that the guest sees as `/NAME` of the file system.
#[derive(Debug)]
pub struct FsExport {
    /// The name: one component, neither empty nor `.` nor `..`.
    pub name: String,
    /// The directory, opened with `O_PATH` or for reading.
    pub directory: OwnedFd,
    /// Whether every change is refused.
    pub read_only: bool,
    /// Who else writes to it.
    pub cache: CachePolicy,
    /// By what a guest that goes on finds its files again.
    pub known_by: KnownBy,
    /// Its files never change, whoever may, for as long as the guest can see them: large ones
    /// are shown as the host's own pages where the device has a DAX window. Whoever says so is
    /// answerable for it; a file that is cut nevertheless ends the guest that looks behind its
    /// new end. Takes `read_only` and [`CachePolicy::Always`].
    pub immutable: bool,
}

impl FsExport {
    /// An export of the directory at `path`, which is resolved now.
    ///
    /// # Errors
    /// What `open(2)` says; `ENOTDIR` for anything but a directory.
    pub fn open(name: &str, path: &Path, read_only: bool, cache: CachePolicy) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        Ok(Self {
            name: name.to_owned(),
            directory,
            read_only,
            cache,
            known_by: match cache {
                CachePolicy::Always => KnownBy::Content,
                CachePolicy::Auto => KnownBy::Inode,
            },
            immutable: false,
        })
    }

    /// Checks the name, the rights and the directory.
    pub(super) fn check(&self) -> io::Result<()> {
        let name = self.name.as_bytes();
        if !is_component(name) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                BadName(self.name.clone()),
            ));
        }
        if self.immutable && !(self.read_only && self.cache == CachePolicy::Always) {
            return Err(Errno::INVAL.into());
        }
        let status =
            rustix::fs::statx(&self.directory, c"", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?;
        if FileType::from_raw_mode(status.stx_mode.into()) != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(())
    }
}

#[derive(Debug)]
struct BadName(String);

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} can't be the name of an export", self.0)
    }
}

impl std::error::Error for BadName {}

/// One name in one directory: no way out of it, no way down.
pub(super) fn is_component(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && name != b"."
        && name != b".."
        && !name.contains(&b'/')
        && !name.contains(&0)
}

/// The table of this process's descriptors, through which a file that is held
/// by `O_PATH` is opened: its one path, and no way to any other file.
pub(super) fn own_descriptors() -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::openat(
        CWD,
        c"/proc/self/fd",
        flags,
        Mode::empty(),
    )?))
}
