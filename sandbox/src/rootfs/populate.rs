//! Fills an anonymous volume with what the image has at its place, as Docker does.
//!
//! The image is a stranger's: its paths are resolved within its root, its links are copied and
//! never followed.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};

use super::{RootfsError, at, make};
use crate::sys;

/// How deep a tree is copied.
const MAX_DEPTH: usize = 256;
/// Longest list of names, or value, of extended attributes that is copied, in bytes.
const MAX_XATTR: usize = 64 * 1024;

/// The directory `volume`, filled on its first use with `root`'s directory at `target`.
pub(super) fn volume(volume: &Path, root: &Path, target: &str) -> Result<PathBuf, RootfsError> {
    if volume.is_dir() {
        return Ok(volume.to_owned());
    }
    let fresh = volume.with_extension("new");
    match fs::remove_dir_all(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(at("remove", &fresh)(error));
        }
        _ => {}
    }
    make(&fresh)?;
    fill(&fresh, root, target).map_err(at("copy the image's files to", &fresh))?;
    fs::rename(&fresh, volume).map_err(at("rename", &fresh))?;
    Ok(volume.to_owned())
}

fn fill(fresh: &Path, root: &Path, target: &str) -> io::Result<()> {
    let read = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, read, Mode::empty())?;
    let to = rustix::fs::open(fresh, read, Mode::empty())?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let from = match rustix::fs::openat2(&root, target, read, Mode::empty(), inside) {
        Ok(from) => from,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
            rustix::fs::fchmod(&to, Mode::from_raw_mode(0o755))?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    copy_directory(&from, &to, 0)
}

/// Copies what `from` holds into `to`, then its attributes.
fn copy_directory(from: &OwnedFd, to: &OwnedFd, depth: usize) -> io::Result<()> {
    if depth > MAX_DEPTH {
        return Err(io::Error::other("directories are nested too deeply"));
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            let name = <OsStr as std::os::unix::ffi::OsStrExt>::from_bytes(name);
            copy_entry(from, to, Path::new(name), depth)?;
        }
    }
    let stat = rustix::fs::fstat(from)?;
    finish(from, to, &stat)
}

fn copy_entry(from: &OwnedFd, to: &OwnedFd, name: &Path, depth: usize) -> io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let open = OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::RWXU)?;
            let open = open | OFlags::RDONLY | OFlags::DIRECTORY;
            let from = rustix::fs::openat(from, name, open, Mode::empty())?;
            let to = rustix::fs::openat(to, name, open, Mode::empty())?;
            copy_directory(&from, &to, depth + 1)
        }
        FileType::RegularFile => {
            let read = open | OFlags::RDONLY | OFlags::NONBLOCK;
            let write = open | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let source = rustix::fs::openat(from, name, read, Mode::empty())?;
            let target = rustix::fs::openat(to, name, write, Mode::RUSR | Mode::WUSR)?;
            let (mut source, mut target) = (File::from(source), File::from(target));
            io::copy(&mut source, &mut target)?;
            finish(&OwnedFd::from(source), &OwnedFd::from(target), &stat)
        }
        FileType::Symlink => {
            let text = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&text, to, name)?;
            own(to, name, &stat)
        }
        kind => {
            let mode = Mode::from_raw_mode(stat.st_mode);
            rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?;
            own(to, name, &stat)
        }
    }
}

fn own(directory: &OwnedFd, name: &Path, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    Ok(rustix::fs::chownat(
        directory,
        name,
        Some(uid),
        Some(gid),
        flags,
    )?)
}

/// Owner, extended attributes, mode and times, in an order in which none undoes another.
fn finish(from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::fchown(to, Some(uid), Some(gid))?;
    copy_xattrs(from, to)?;
    rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.cast_signed(),
    };
    let times = Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    };
    Ok(rustix::fs::futimens(to, &times)?)
}

fn copy_xattrs(from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
    // By path, as a file opened for writing alone lists nothing.
    let (from, to) = (
        sys::descriptor_path(from.as_fd()),
        sys::descriptor_path(to.as_fd()),
    );
    let mut names = vec![0; MAX_XATTR];
    let length = match rustix::fs::listxattr(from.as_str(), &mut names) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let mut value = vec![0; MAX_XATTR];
    for name in names[..length].split(|&byte| byte == 0) {
        let wanted = name.starts_with(b"user.") || name.starts_with(b"security.capability");
        if wanted {
            let length = rustix::fs::getxattr(from.as_str(), name, &mut value)?;
            rustix::fs::setxattr(to.as_str(), name, &value[..length], XattrFlags::empty())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn links_are_copied_and_stay_within_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("real/sub")).unwrap();
        fs::write(root.join("real/sub/file"), "x").unwrap();
        fs::set_permissions(
            root.join("real/sub/file"),
            PermissionsExt::from_mode(0o4751),
        )
        .unwrap();
        symlink("/etc/passwd", root.join("real/link")).unwrap();
        symlink("/../../real", root.join("data")).unwrap();
        let volume = directory.path().join("v1");
        super::volume(&volume, &root, "/data").unwrap();
        assert_eq!(fs::read_to_string(volume.join("sub/file")).unwrap(), "x");
        let mode = fs::metadata(volume.join("sub/file"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o4751);
        assert_eq!(
            fs::read_link(volume.join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
    }

    #[test]
    fn a_target_that_the_image_lacks_is_an_empty_volume() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let volume = directory.path().join("v1");
        super::volume(&volume, &root, "/data").unwrap();
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    }
}
