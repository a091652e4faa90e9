//! Paths inside a container's root, before anything in it can be trusted.
//!
//! Owns: opening and creating mount targets below a root directory, however the image's symbolic
//! links are laid. Refuses: every step that would leave the root; the kernel resolves each path
//! with the root as `/` (openat2(2), `RESOLVE_IN_ROOT`) and without magic links.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Deepest chain of dangling links that is followed to create a target.
const MAX_LINKS: usize = 16;

/// What a mount target has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    /// A directory.
    Directory,
    /// Anything else: for binding a file.
    File,
}

/// Opens `path` inside `root` with `flags`, links resolved as if `root` were `/`.
///
/// # Errors
/// As openat2(2) has them.
pub(crate) fn open_in(
    root: BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    mode: Mode,
    more: ResolveFlags,
) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS | more;
    let path = if path.as_os_str().is_empty() {
        Path::new("/")
    } else {
        path
    };
    // The kernel says EAGAIN when something was renamed meanwhile and it can't vouch for `..`.
    for _ in 0..64 {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(Errno::AGAIN) => {}
            other => return other,
        }
    }
    Err(Errno::AGAIN)
}

/// Opens `path` inside `root` as a place to refer to.
///
/// # Errors
/// As openat2(2) has them.
pub(crate) fn find(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    open_in(
        root,
        path,
        OFlags::PATH,
        Mode::empty(),
        ResolveFlags::empty(),
    )
}

/// Opens the mount target `path` inside `root`, and creates what is missing of it. The second
/// value says whether it existed.
///
/// # Errors
/// ENOTDIR or EISDIR if something else is in its place, ELOOP for a circle of links, and what
/// mkdir(2) and openat2(2) say.
pub(crate) fn ensure(
    root: BorrowedFd<'_>,
    path: &Path,
    target: Target,
) -> Result<(OwnedFd, bool), Errno> {
    match find(root, path) {
        Ok(found) => {
            let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
            match target {
                Target::Directory if kind != FileType::Directory => Err(Errno::NOTDIR),
                Target::File if kind == FileType::Directory => Err(Errno::ISDIR),
                _ => Ok((found, true)),
            }
        }
        Err(Errno::NOENT) => Ok((create(root, path, target, MAX_LINKS)?, false)),
        Err(other) => Err(other),
    }
}

/// Opens the directory `path` inside `root`, and creates what is missing of it.
///
/// # Errors
/// As [`ensure`].
pub(crate) fn ensure_dir(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, Errno> {
    Ok(ensure(root, path, Target::Directory)?.0)
}

fn create(
    root: BorrowedFd<'_>,
    path: &Path,
    target: Target,
    links: usize,
) -> Result<OwnedFd, Errno> {
    let mut prefix = PathBuf::from("/");
    let mut parent = find(root, &prefix)?;
    let mut components = path
        .components()
        .filter(|component| !matches!(component, Component::RootDir | Component::CurDir))
        .peekable();
    while let Some(component) = components.next() {
        let name = Path::new(component.as_os_str());
        let kind = if components.peek().is_some() {
            Target::Directory
        } else {
            target
        };
        let next = prefix.join(name);
        parent = match find(root, &next) {
            Err(Errno::NOENT) => create_one(root, (parent.as_fd(), &prefix), name, kind, links)?,
            other => other?,
        };
        prefix = next;
    }
    Ok(parent)
}

/// Creates `name` in `parent`; a dangling link there has its own target created instead.
fn create_one(
    root: BorrowedFd<'_>,
    (parent, prefix): (BorrowedFd<'_>, &Path),
    name: &Path,
    target: Target,
    links: usize,
) -> Result<OwnedFd, Errno> {
    let made = match target {
        Target::Directory => rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Target::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match made {
        Ok(()) => find(root, &prefix.join(name)),
        Err(Errno::EXIST) => {
            let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
            let link = rustix::fs::readlinkat(parent, name, Vec::new())?;
            let link = PathBuf::from(std::ffi::OsString::from(
                link.to_str().map_err(|_| Errno::ILSEQ)?,
            ));
            create(root, &prefix.join(link), target, links)
        }
        Err(other) => Err(other),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn open(dir: &Path) -> OwnedFd {
        rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap()
    }

    /// A root directory beside which lies something to be left alone.
    fn nest() -> (tempfile::TempDir, PathBuf, PathBuf) {
        let nest = tempfile::tempdir().unwrap();
        let root = nest.path().join("root");
        let outside = nest.path().join("outside");
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        (nest, root, outside)
    }

    fn is_empty(dir: &Path) -> bool {
        fs::read_dir(dir).unwrap().next().is_none()
    }

    #[test]
    fn missing_directories_and_files_are_created_inside() {
        let (_nest, root, _) = nest();
        let fd = open(&root);
        let (_, existed) = ensure(fd.as_fd(), Path::new("/a/b/c"), Target::Directory).unwrap();
        assert!(!existed);
        ensure(fd.as_fd(), Path::new("/a/d/file"), Target::File).unwrap();
        assert!(root.join("a/b/c").is_dir());
        assert!(root.join("a/d/file").is_file());
        let (_, existed) = ensure(fd.as_fd(), Path::new("a/b"), Target::Directory).unwrap();
        assert!(existed);
    }

    #[test]
    fn dots_never_leave_the_root() {
        let (_nest, root, outside) = nest();
        let fd = open(&root);
        let path = Path::new("/../../outside/new");
        ensure(fd.as_fd(), path, Target::Directory).unwrap();
        assert!(is_empty(&outside));
        assert!(root.join("outside/new").is_dir());
    }

    #[test]
    fn links_out_of_the_root_land_inside_it() {
        let (_nest, root, outside) = nest();
        symlink(&outside, root.join("absolute")).unwrap();
        symlink("../outside", root.join("relative")).unwrap();
        let fd = open(&root);
        for path in ["/absolute/new", "/relative/new"] {
            ensure(fd.as_fd(), Path::new(path), Target::Directory).unwrap();
            ensure(fd.as_fd(), &Path::new(path).join("file"), Target::File).unwrap();
        }
        assert!(is_empty(&outside));
        assert!(root.join("outside/new/file").is_file());
    }

    #[test]
    fn a_dangling_link_has_its_target_created() {
        let (_nest, root, _) = nest();
        fs::create_dir(root.join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", root.join("etc/resolv.conf")).unwrap();
        let fd = open(&root);
        ensure(fd.as_fd(), Path::new("/etc/resolv.conf"), Target::File).unwrap();
        assert!(root.join("run/resolve/stub.conf").is_file());
    }

    #[test]
    fn circles_and_wrong_kinds_are_refused() {
        let (_nest, root, _) = nest();
        symlink("two", root.join("one")).unwrap();
        symlink("one", root.join("two")).unwrap();
        fs::write(root.join("file"), "").unwrap();
        fs::create_dir(root.join("dir")).unwrap();
        let fd = open(&root);
        let error = |path: &str, kind| ensure(fd.as_fd(), Path::new(path), kind).unwrap_err();
        assert_eq!(error("/one/x", Target::Directory), Errno::LOOP);
        assert_eq!(error("/file", Target::Directory), Errno::NOTDIR);
        assert_eq!(error("/file/x", Target::Directory), Errno::NOTDIR);
        assert_eq!(error("/dir", Target::File), Errno::ISDIR);
    }

    #[test]
    fn a_link_that_dangles_for_ever_ends() {
        let (_nest, root, _) = nest();
        symlink("loop/deeper", root.join("loop")).unwrap();
        let fd = open(&root);
        assert!(ensure(fd.as_fd(), Path::new("/loop"), Target::Directory).is_err());
    }
}
