//! Files made beneath one directory, whatever their names and links say.
//!
//! Owns: every system call that an image's bytes lead to. Each is relative to a directory that was
//! opened by `openat2(2)` with `RESOLVE_IN_ROOT`: links that the layer itself made are followed as
//! they would be inside the container, never out of the layer. The last component is never
//! followed. Refuses: opening device nodes or anything else but directories and new files.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, UTIME_OMIT,
};
use rustix::io::Errno;

use super::Limits;
use super::error::{Result, UnpackError, quoted, refused};
use super::path::Name;

type Handle = Rc<OwnedFd>;

/// The directory that a layer is unpacked into, and those of the layers below.
pub(super) struct Tree<'l> {
    root: Handle,
    /// Top first.
    below: Vec<OwnedFd>,
    limits: &'l Limits,
    /// The directory used last: entries come sorted by directory.
    recent: Option<(Vec<u8>, Handle)>,
    /// Whether owners and devices can be set.
    pub(super) privileged: bool,
}

/// Owner, permission bits and time of change, as an entry has them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
}

/// Directory and last component, where something is to be made.
pub(super) struct Place<'n> {
    pub(super) name: &'n Name,
    pub(super) parent: Handle,
}

impl Place<'_> {
    pub(super) fn last(&self) -> &OsStr {
        OsStr::from_bytes(self.name.last())
    }

    pub(super) fn failed(&self, action: &'static str) -> impl Fn(Errno) -> UnpackError {
        failed(action, self.name)
    }
}

/// Makes an error from what was tried on which entry.
pub(super) fn failed(action: &'static str, name: &Name) -> impl Fn(Errno) -> UnpackError {
    move |errno| UnpackError::Write {
        action,
        name: quoted(if name.is_root() {
            b"/"
        } else {
            name.as_bytes()
        }),
        source: errno.into(),
    }
}

impl<'l> Tree<'l> {
    pub(super) fn open(
        root: &Path,
        below: &[impl AsRef<Path>],
        limits: &'l Limits,
    ) -> Result<Self> {
        let open = |path: &Path| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            rustix::fs::openat(CWD, path, flags, Mode::empty())
                .map_err(failed("open", &Name::default()))
        };
        let below = below
            .iter()
            .rev()
            .map(|path| open(path.as_ref()))
            .collect::<Result<_>>()?;
        let privileged = rustix::process::geteuid().is_root();
        Ok(Self {
            root: Rc::new(open(root)?),
            below,
            limits,
            recent: None,
            privileged,
        })
    }

    /// The place called `name`; directories above it that no entry described are made.
    pub(super) fn place<'n>(&mut self, name: &'n Name) -> Result<Place<'n>> {
        if name.is_root() {
            return Err(refused(b"/", "the root can only be a directory"));
        }
        let parent = self.directory(name.parent(), name)?;
        Ok(Place { name, parent })
    }

    /// The directory `path`, made when it is not there.
    fn directory(&mut self, path: &[u8], name: &Name) -> Result<Handle> {
        match &self.recent {
            Some((recent, handle)) if recent == path => return Ok(Rc::clone(handle)),
            _ => {}
        }
        let handle = match self.look_up(path, name)? {
            Some(handle) => handle,
            None => self.make_implied(path, name)?,
        };
        self.recent = Some((path.to_vec(), Rc::clone(&handle)));
        Ok(handle)
    }

    /// The directory `path` if it is there.
    pub(super) fn look_up(&self, path: &[u8], name: &Name) -> Result<Option<Handle>> {
        if path.is_empty() {
            return Ok(Some(Rc::clone(&self.root)));
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let strict =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        match open_beneath(&self.root, path, flags, strict) {
            Ok(handle) => return Ok(Some(Rc::new(handle))),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP | Errno::NOTDIR) => {} // a link on the way, or a file
            Err(errno) => return Err(failed("look up the directory of", name)(errno)),
        }
        match open_beneath(&self.root, path, flags, within) {
            Ok(handle) => {
                self.check_depth(&handle, name)?;
                Ok(Some(Rc::new(handle)))
            }
            Err(Errno::NOENT) => Ok(None),
            Err(Errno::NOTDIR) => Err(refused(
                name.as_bytes(),
                "a part of its path is not a directory",
            )),
            Err(errno) => Err(failed("look up the directory of", name)(errno)),
        }
    }

    /// Links make short names for deep places; how deep a place may be stays the same, else
    /// nothing could delete the tree again.
    fn check_depth(&self, handle: &OwnedFd, name: &Name) -> Result<()> {
        let real = |fd: BorrowedFd<'_>| {
            let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
            std::fs::read_link(link).map(|path| path.into_os_string().into_encoded_bytes())
        };
        let wrong = |source: io::Error| UnpackError::Write {
            action: "find the depth of",
            name: quoted(name.as_bytes()),
            source,
        };
        let root = real(self.root.as_fd()).map_err(wrong)?;
        let place = real(handle.as_fd()).map_err(wrong)?;
        let Some(relative) = place.strip_prefix(&root[..]) else {
            return Err(refused(name.as_bytes(), "it leaves the layer's root"));
        };
        let depth = relative
            .split(|b| *b == b'/')
            .filter(|c| !c.is_empty())
            .count();
        if depth >= self.limits.depth || relative.len() > self.limits.path_bytes {
            let text = format!("links make the path {} too deep", quoted(name.as_bytes()));
            return Err(UnpackError::Limit(text));
        }
        Ok(())
    }

    /// Makes the directory `path` and those above it. Nothing in this layer describes them, so
    /// they look as they do in the layers below.
    fn make_implied(&mut self, path: &[u8], name: &Name) -> Result<Handle> {
        let mut handle = Rc::clone(&self.root);
        let ends = path
            .iter()
            .enumerate()
            .filter(|(_, b)| **b == b'/')
            .map(|(at, _)| at);
        for end in ends.chain([path.len()]).collect::<Vec<_>>() {
            let here = &path[..end];
            if let Some(present) = self.look_up(here, name)? {
                handle = present;
                continue;
            }
            let last = here.rsplit(|b| *b == b'/').next().unwrap_or(here);
            let last = OsStr::from_bytes(last);
            match rustix::fs::mkdirat(&handle, last, Mode::from(0o755)) {
                Ok(()) => {}
                Err(Errno::EXIST) => {
                    return Err(refused(name.as_bytes(), "its directory is a dangling link"));
                }
                Err(errno) => return Err(failed("make the directory of", name)(errno)),
            }
            let made = open_directory(&handle, last).map_err(failed("open directory of", name))?;
            self.check_depth(&made, name)?;
            if let Some(stat) = self.attributes_below(here) {
                self.set_attributes(&made, &stat, name)?;
                set_times(&made, stat.mtime).map_err(failed("set times of", name))?;
            }
            handle = Rc::new(made);
        }
        Ok(handle)
    }

    /// Whether this layer has something that is no directory where `path` needs one, so that
    /// nothing of the layers below is to be seen there.
    pub(super) fn is_blocked(&self, path: &[u8]) -> bool {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let within = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let ends = path
            .iter()
            .enumerate()
            .filter(|(_, b)| **b == b'/')
            .map(|(at, _)| at);
        for end in ends.chain([path.len()]) {
            let here = if end == 0 { b"." } else { &path[..end] };
            match open_beneath(&self.root, here, flags | OFlags::DIRECTORY, within) {
                Ok(_) => {}
                Err(Errno::NOENT) => {
                    // Nothing at all, or a link that leads nowhere?
                    return open_beneath(&self.root, here, flags | OFlags::NOFOLLOW, within)
                        .is_ok();
                }
                Err(errno) => return matches!(errno, Errno::NOTDIR | Errno::LOOP),
            }
        }
        false
    }

    /// Attributes of the directory `path` in the layers below, if it is a directory there.
    pub(super) fn attributes_below(&self, path: &[u8]) -> Option<Attributes> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let path = if path.is_empty() { b"." } else { path };
        for layer in &self.below {
            match open_beneath(layer, path, flags, resolve) {
                Err(Errno::NOENT) => {}
                Err(_) => return None,
                Ok(found) => {
                    let stat = rustix::fs::fstat(&found).ok()?;
                    let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
                    return directory.then(|| Attributes {
                        mode: stat.st_mode & 0o7777,
                        uid: stat.st_uid,
                        gid: stat.st_gid,
                        mtime: (
                            stat.st_mtime,
                            u32::try_from(stat.st_mtime_nsec).unwrap_or(0),
                        ),
                    });
                }
            }
        }
        None
    }

    /// Runs `make`, which fails with `EEXIST` when something has that name; that is removed then,
    /// with all below it: of two entries with one name, the last counts.
    pub(super) fn make<T>(
        &mut self,
        place: &Place<'_>,
        make: impl Fn(BorrowedFd<'_>, &OsStr) -> rustix::io::Result<T>,
    ) -> Result<T> {
        match make(place.parent.as_fd(), place.last()) {
            Err(Errno::EXIST) => {
                self.remove(place)?;
                make(place.parent.as_fd(), place.last())
            }
            other => other,
        }
        .map_err(place.failed("create"))
    }

    fn remove(&mut self, place: &Place<'_>) -> Result<()> {
        self.recent = None;
        remove_at(place.parent.as_fd(), place.last()).map_err(place.failed("replace"))
    }

    /// What has the name of `place` now.
    pub(super) fn present(&self, place: &Place<'_>) -> Result<Option<Stat>> {
        match rustix::fs::statat(&place.parent, place.last(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(place.failed("examine")(errno)),
        }
    }

    /// Opens the directory `place` or makes it; says whether a whiteout of that name gave way.
    pub(super) fn make_directory(&mut self, place: &Place<'_>) -> Result<(OwnedFd, bool)> {
        let mut hides = false;
        match rustix::fs::mkdirat(&place.parent, place.last(), Mode::from(0o700)) {
            Ok(()) => {}
            Err(Errno::EXIST) => match self.present(place)? {
                Some(stat) if is_directory(&stat) => {}
                stat => {
                    hides = stat.as_ref().is_some_and(is_whiteout);
                    self.remove(place)?;
                    rustix::fs::mkdirat(&place.parent, place.last(), Mode::from(0o700))
                        .map_err(place.failed("create"))?;
                }
            },
            Err(errno) => return Err(place.failed("create")(errno)),
        }
        let made = open_directory(&place.parent, place.last()).map_err(place.failed("open"))?;
        Ok((made, hides))
    }

    /// The layer's root, readable.
    pub(super) fn open_root(&self) -> Result<OwnedFd> {
        open_directory(&self.root, OsStr::new(".")).map_err(failed("open", &Name::default()))
    }

    /// The directory `name` again, readable; `None` when something else took its name.
    pub(super) fn reopen(&self, name: &Name) -> Result<Option<OwnedFd>> {
        if name.is_root() {
            return self.open_root().map(Some);
        }
        let Ok(Some(parent)) = self.look_up(name.parent(), name) else {
            return Ok(None);
        };
        match open_directory(&parent, OsStr::from_bytes(name.last())) {
            Ok(directory) => Ok(Some(directory)),
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(errno) => Err(failed("open", name)(errno)),
        }
    }

    /// Owner first: changing it clears setuid.
    pub(super) fn set_attributes(
        &self,
        file: &OwnedFd,
        attributes: &Attributes,
        name: &Name,
    ) -> Result<()> {
        if self.privileged {
            let (uid, gid) = owner(attributes);
            rustix::fs::fchown(file, uid, gid).map_err(failed("set the owner of", name))?;
        }
        rustix::fs::fchmod(file, Mode::from_bits_retain(attributes.mode))
            .map_err(failed("set the mode of", name))
    }

    /// Owner (and mode, where it has one) and time of something that cannot be opened.
    pub(super) fn set_attributes_at(
        &self,
        place: &Place<'_>,
        attributes: &Attributes,
        has_mode: bool,
    ) -> Result<()> {
        let (parent, last) = (&place.parent, place.last());
        if self.privileged {
            let (uid, gid) = owner(attributes);
            rustix::fs::chownat(parent, last, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
                .map_err(place.failed("set the owner of"))?;
        }
        if has_mode {
            // fchmodat(2) follows links; ours made this name an inode that is none, just now.
            let mode = Mode::from_bits_retain(attributes.mode);
            rustix::fs::chmodat(parent, last, mode, AtFlags::empty())
                .map_err(place.failed("set the mode of"))?;
        }
        let times = timestamps(attributes.mtime);
        rustix::fs::utimensat(parent, last, &times, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(place.failed("set times of"))
    }
}

fn owner(attributes: &Attributes) -> (Option<rustix::fs::Uid>, Option<rustix::fs::Gid>) {
    let Attributes { uid, gid, .. } = *attributes;
    (
        Some(rustix::fs::Uid::from_raw(uid)),
        Some(rustix::fs::Gid::from_raw(gid)),
    )
}

fn timestamps((tv_sec, nanos): (i64, u32)) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec,
            tv_nsec: nanos.into(),
        },
    }
}

pub(super) fn set_times(file: &OwnedFd, mtime: (i64, u32)) -> rustix::io::Result<()> {
    rustix::fs::futimens(file, &timestamps(mtime))
}

pub(super) fn is_directory(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Directory
}

/// Overlayfs's mark of a file that is gone: a character device 0:0.
pub(super) fn is_whiteout(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice && stat.st_rdev == 0
}

fn open_beneath(
    root: &OwnedFd,
    path: &[u8],
    flags: OFlags,
    resolve: ResolveFlags,
) -> rustix::io::Result<OwnedFd> {
    let path = OsStr::from_bytes(path);
    let mut attempts = 0;
    loop {
        match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
            // Something on this host was renamed meanwhile: openat2(2) asks to try again.
            Err(Errno::AGAIN) if attempts < 100 => attempts += 1,
            other => return other,
        }
    }
}

fn open_directory(parent: &OwnedFd, name: &OsStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

/// Removes `name` in `parent`, with all below it, following nothing. No deeper than
/// `Limits::depth`, which holds for every path made here.
fn remove_at(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ISDIR | Errno::PERM) => {}
        other => return other,
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(parent, name, flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(&directory)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    for name in names {
        remove_at(directory.as_fd(), OsStr::from_bytes(name.to_bytes()))?;
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Makes a new file for writing; fails when the name is taken.
pub(super) fn create_file(parent: BorrowedFd<'_>, name: &OsStr) -> rustix::io::Result<File> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from(0o600)).map(File::from)
}
