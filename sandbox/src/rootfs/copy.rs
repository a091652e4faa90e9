//! Copies of whole directories and large files.
//!
//! Owns: what of a file is copied, and how: blocks are shared with the original where the file
//! system can (ioctl_ficlone(2)), holes stay holes. Refuses: to follow a link.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use crate::sys;

/// How deep a tree is copied.
const MAX_DEPTH: usize = 256;
/// Longest list of names, or value, of extended attributes that is copied, in bytes.
const MAX_XATTR: usize = 64 * 1024;
/// Bytes that are copied at once.
const CHUNK: usize = 1 << 20;

/// One copy of a tree.
#[derive(Debug)]
pub(super) struct Copying {
    /// Extended attributes whose names begin so.
    xattrs: &'static [&'static [u8]],
    /// Links to one file stay links to one file, special files keep all that they have.
    whole: bool,
    /// Files with several links, by device and inode, and where the first is in the copy.
    links: HashMap<(u64, u64), PathBuf>,
}

/// Makes `to`, a copy of the directory or file `from` that differs from it in its inodes alone.
///
/// # Errors
/// What the file systems say; what was copied by then stays.
pub(crate) fn copy_whole(from: &Path, to: &Path) -> io::Result<()> {
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let from = rustix::fs::open(from, read, Mode::empty())?;
    let mut copying = Copying {
        xattrs: &[b"user.", b"security.", b"trusted.", b"system.posix_acl_"],
        whole: true,
        links: HashMap::new(),
    };
    let stat = rustix::fs::fstat(&from)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
        let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let to = File::from(rustix::fs::open(to, write, Mode::RUSR | Mode::WUSR)?);
        let from = File::from(from);
        copy_content(&from, &to, stat.st_size.unsigned_abs())?;
        return copying.finish(&from.into(), &to.into(), &stat);
    }
    rustix::fs::mkdir(to, Mode::RWXU)?;
    let to = rustix::fs::open(to, read | OFlags::DIRECTORY, Mode::empty())?;
    copying.directory(&from, &to)
}

impl Copying {
    /// What is copied of an image to a volume.
    pub(super) fn of_image() -> Self {
        Self {
            xattrs: &[b"user.", b"security.capability"],
            whole: false,
            links: HashMap::new(),
        }
    }

    /// Copies what `from` holds into `to`, then its attributes.
    pub(super) fn directory(&mut self, from: &OwnedFd, to: &OwnedFd) -> io::Result<()> {
        self.below(from, to, to, Path::new(""), 0)
    }

    fn below(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        root: &OwnedFd,
        place: &Path,
        depth: usize,
    ) -> io::Result<()> {
        if depth > MAX_DEPTH {
            return Err(io::Error::other("directories are nested too deeply"));
        }
        for entry in Dir::read_from(from)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            let name = Path::new(OsStr::from_bytes(name));
            let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
            let open = OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::RDONLY | OFlags::DIRECTORY;
            if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
                rustix::fs::mkdirat(to, name, Mode::RWXU)?;
                let from = rustix::fs::openat(from, name, open, Mode::empty())?;
                let to = rustix::fs::openat(to, name, open, Mode::empty())?;
                self.below(&from, &to, root, &place.join(name), depth + 1)?;
            } else {
                self.file(from, to, root, &place.join(name), &stat)
                    .map_err(|error| named(&error, &place.join(name)))?;
            }
        }
        let stat = rustix::fs::fstat(from)?;
        self.finish(from, to, &stat)
    }

    fn file(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        root: &OwnedFd,
        place: &Path,
        stat: &Stat,
    ) -> io::Result<()> {
        let name = Path::new(place.file_name().unwrap_or_default());
        if self.whole && stat.st_nlink > 1 {
            let inode = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&inode) {
                rustix::fs::linkat(root, first, to, name, AtFlags::empty())?;
                return Ok(());
            }
            self.links.insert(inode, place.to_owned());
        }
        let open = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => {
                let read = open | OFlags::RDONLY | OFlags::NONBLOCK;
                let write = open | OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
                let source = rustix::fs::openat(from, name, read, Mode::empty())?;
                let target = rustix::fs::openat(to, name, write, Mode::RUSR | Mode::WUSR)?;
                let (source, target) = (File::from(source), File::from(target));
                copy_content(&source, &target, stat.st_size.unsigned_abs())?;
                return self.finish(&source.into(), &target.into(), stat);
            }
            FileType::Symlink => {
                let text = rustix::fs::readlinkat(from, name, Vec::new())?;
                rustix::fs::symlinkat(&text, to, name)?;
            }
            kind => {
                let mode = Mode::from_raw_mode(stat.st_mode);
                rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?;
            }
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(to, name, Some(uid), Some(gid), flags)?;
        if self.whole {
            let path = |directory: &OwnedFd| Path::new(&sys::descriptor_path(directory)).join(name);
            self.copy_xattrs(&path(from), &path(to), true)?;
            rustix::fs::utimensat(to, name, &times(stat), flags)?;
        }
        Ok(())
    }

    /// Owner, extended attributes, mode and times, in an order in which none undoes another.
    fn finish(&self, from: &OwnedFd, to: &OwnedFd, stat: &Stat) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        rustix::fs::fchown(to, Some(uid), Some(gid))?;
        // By path, as a file opened for writing alone lists nothing.
        let path = |descriptor: &OwnedFd| PathBuf::from(sys::descriptor_path(descriptor.as_fd()));
        self.copy_xattrs(&path(from), &path(to), false)?;
        rustix::fs::fchmod(to, Mode::from_raw_mode(stat.st_mode))?;
        Ok(rustix::fs::futimens(to, &times(stat))?)
    }

    /// Those of the files at these paths; of a link itself where one is, if it `is_named`.
    fn copy_xattrs(&self, from: &Path, to: &Path, is_named: bool) -> io::Result<()> {
        let mut names = vec![0; MAX_XATTR];
        let length = match is_named {
            true => rustix::fs::llistxattr(from, &mut names),
            false => rustix::fs::listxattr(from, &mut names),
        };
        let length = match length {
            Ok(length) => length,
            Err(Errno::NOTSUP) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut value = vec![0; MAX_XATTR];
        for name in names[..length].split(|&byte| byte == 0) {
            if !self.xattrs.iter().any(|begin| name.starts_with(begin)) {
                continue;
            }
            let length = match is_named {
                true => rustix::fs::lgetxattr(from, name, &mut value),
                false => rustix::fs::getxattr(from, name, &mut value),
            }?;
            match is_named {
                true => rustix::fs::lsetxattr(to, name, &value[..length], XattrFlags::empty()),
                false => rustix::fs::setxattr(to, name, &value[..length], XattrFlags::empty()),
            }?;
        }
        Ok(())
    }
}

fn named(error: &io::Error, place: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", place.display()))
}

fn times(stat: &Stat) -> Timestamps {
    let time = |seconds, nanoseconds: u64| Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds.cast_signed(),
    };
    Timestamps {
        last_access: time(stat.st_atime, stat.st_atime_nsec),
        last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
    }
}

/// Has `to`, an empty file, hold the first `length` bytes of `from`.
///
/// # Errors
/// What the file systems say.
pub(crate) fn copy_content(from: &File, to: &File, length: u64) -> io::Result<()> {
    // A file system that can't, or another one.
    if length == 0 || rustix::fs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    to.set_len(length)?;
    each_run(from, length, |run| {
        let (place, end) = (run.start, run.end);
        copy_run(from, run, to, place)?;
        Ok(end)
    })
}

/// Shows where the first `length` bytes of `file` hold data. What is shown returns where to go on.
pub(crate) fn each_run(
    file: &File,
    length: u64,
    mut show: impl FnMut(std::ops::Range<u64>) -> io::Result<u64>,
) -> io::Result<()> {
    let mut at = 0;
    while let Some(run) = next_run(file, at, length)? {
        at = show(run)?;
    }
    Ok(())
}

/// Where the first `length` bytes of `file` next hold data, from `offset` on.
pub(crate) fn next_run(
    file: &File,
    offset: u64,
    length: u64,
) -> io::Result<Option<std::ops::Range<u64>>> {
    if offset >= length {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data < length => {
            let end = rustix::fs::seek(file, SeekFrom::Hole(data))?;
            Ok(Some(data..end.min(length)))
        }
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Copies the bytes `run` of `from` to `place` in `to`, as many as there are.
///
/// # Errors
/// What the file systems say.
pub(crate) fn copy_run(
    from: &File,
    run: std::ops::Range<u64>,
    to: &File,
    place: u64,
) -> io::Result<()> {
    let mut chunk = Vec::new();
    let mut at = run.start;
    while at < run.end {
        let left = usize::try_from(run.end - at).unwrap_or(usize::MAX);
        let (mut source, mut target) = (at, place + (at - run.start));
        match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
            // It was cut since it was looked at.
            Ok(0) => break,
            Ok(count) => at += count as u64,
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                chunk.resize(left.min(CHUNK), 0);
                let count = from.read_at(&mut chunk, at)?;
                if count == 0 {
                    break;
                }
                to.write_all_at(chunk.get(..count).unwrap_or_default(), target)?;
                at += count as u64;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};
    use std::time::{Duration, SystemTime};

    use super::*;

    /// A directory with what only whole copies have.
    fn filled(from: &Path) {
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/file"), "content").unwrap();
        fs::hard_link(from.join("a/file"), from.join("a/b/again")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(8 << 20).unwrap();
        sparse.write_all_at(b"in the middle", 4 << 20).unwrap();
        let long_ago = SystemTime::UNIX_EPOCH + Duration::new(7, 5);
        let file = File::open(from.join("a/file")).unwrap();
        file.set_modified(long_ago).unwrap();
    }

    #[track_caller]
    fn assert_same(from: &Path, to: &Path, name: &str) {
        let of = |directory: &Path| {
            let m = directory.join(name).symlink_metadata().unwrap();
            let times = (m.mtime(), m.mtime_nsec());
            (
                (m.mode(), m.uid(), m.len(), m.rdev(), m.nlink()),
                times,
                m.ino(),
            )
        };
        let (one, other) = (of(from), of(to));
        assert_eq!((one.0, one.1), (other.0, other.1), "{name}");
        assert_ne!(one.2, other.2, "{name}");
    }

    #[test]
    fn a_whole_copy_differs_in_its_inodes_alone() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        filled(&from);
        copy_whole(&from, &to).unwrap();
        for name in ["a", "a/b", "a/file", "a/b/again", "link", "sparse"] {
            assert_same(&from, &to, name);
        }
        let read = |at: &Path, name: &str| fs::read(at.join(name)).unwrap();
        assert_eq!(read(&to, "a/b/again"), b"content");
        assert!(read(&to, "sparse") == read(&from, "sparse"));
        assert!(to.join("sparse").metadata().unwrap().blocks() < 1024);
        let inode = |name: &str| to.join(name).metadata().unwrap().ino();
        assert_eq!(inode("a/file"), inode("a/b/again"));
    }

    #[test]
    fn a_copy_of_a_sparse_file_has_its_holes() {
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        let sparse = File::create(&from).unwrap();
        sparse.set_len(1 << 30).unwrap();
        sparse.write_all_at(b"in the middle", 4 << 20).unwrap();
        copy_whole(&from, &to).unwrap();
        let copied = to.metadata().unwrap();
        assert_eq!(copied.len(), 1 << 30);
        assert!(copied.blocks() < 1024);
        let mut seen = [0; 13];
        File::open(&to)
            .unwrap()
            .read_exact_at(&mut seen, 4 << 20)
            .unwrap();
        assert_eq!(&seen, b"in the middle");
    }

    #[test]
    fn what_an_overlay_says_of_its_files_is_copied() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: device nodes take root");
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        let (from, to) = (directory.path().join("from"), directory.path().join("to"));
        filled(&from);
        let (kind, whiteout) = (FileType::CharacterDevice, rustix::fs::makedev(0, 0));
        let gone = from.join("gone");
        rustix::fs::mknodat(rustix::fs::CWD, gone, kind, Mode::empty(), whiteout).unwrap();
        let opaque = "trusted.overlay.opaque";
        rustix::fs::setxattr(from.join("a"), opaque, b"y", XattrFlags::empty()).unwrap();
        copy_whole(&from, &to).unwrap();
        assert_same(&from, &to, "gone");
        let mut value = [0; 8];
        let length = rustix::fs::getxattr(to.join("a"), opaque, &mut value).unwrap();
        assert_eq!(&value[..length], b"y");
    }
}
