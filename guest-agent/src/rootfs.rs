//! A container's view of the file system, made by its first process in its own mount namespace.
//!
//! Owns: binding the root, the spec's mounts, devices and links, changing the root, masked and
//! read-only paths. Refuses: mounts whose target is reached through a link out of the root, and
//! /proc or /sys on anything but a directory of that name.

use std::collections::HashSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, makedev};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::fault::{Fault, Tried};
use crate::mounts::{self, Options};
use crate::resolve::{self, Target};
use crate::spec::{Device, DeviceKind, Mount, Spec};
use crate::stage::Stage;

/// Where devices are.
pub(crate) const DEV: &str = "/dev";

/// The devices that every container has, besides the terminal's (runtime spec, default devices).
const DEVICES: &[(&str, u32, u32)] = &[
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// The links that every container has in /dev.
const LINKS: &[(&str, &str)] = &[
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

/// Binds a root onto itself, so that it can become `/`, and opens it.
///
/// # Errors
/// Refuses a root that isn't there.
pub(crate) fn bind_root(path: &Path) -> Result<OwnedFd, Fault> {
    let what = || format!("cannot use root {}", path.display());
    rustix::mount::mount_bind_recursive(path, path).or_refuse(what)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).or_refuse(what)
}

/// Makes the spec's mounts and devices inside `root`: with a stage, what is left beside that.
///
/// # Errors
/// Refuses what can't be mounted or made, by name.
pub(crate) fn furnish(
    root: BorrowedFd<'_>,
    spec: &Spec,
    staged: Option<&(&Stage<'_>, Vec<&Mount>)>,
) -> Result<(), Fault> {
    let all = &spec.mounts;
    let make = |mount: &Mount| place(root, mount).or_refuse(|| cannot_mount(&mount.destination));
    match staged {
        Some((stage, rest)) => {
            stage.strike(root)?;
            rest.iter().try_for_each(|mount| make(mount))?;
        }
        None => all.iter().try_for_each(make)?,
    }
    let dev_is_bound = all
        .iter()
        .any(|mount| mount.destination == Path::new(DEV) && options_of(mount).bind.is_some());
    if dev_is_bound {
        return Ok(());
    }
    let dev = resolve::ensure_dir(root, Path::new(DEV)).or_refuse(|| "cannot open /dev")?;
    if !staged.is_some_and(|(stage, _)| stage.has_devices()) {
        make_default_devices(dev.as_fd())?;
    }
    for device in &spec.linux.devices {
        make_device(root, device).or_refuse(|| format!("cannot make {}", device.path.display()))?;
    }
    Ok(())
}

/// Why there is no container.
pub(crate) fn cannot_mount(destination: &Path) -> String {
    format!("cannot mount {}", destination.display())
}

/// Makes in `dev` what every container has there and it hasn't.
///
/// # Errors
/// Refuses what can't be made, by name.
pub(crate) fn make_default_devices(dev: BorrowedFd<'_>) -> Result<(), Fault> {
    for &(name, major, minor) in DEVICES {
        make_node(dev, name, FileType::CharacterDevice, (major, minor), 0o666)
            .or_refuse(|| format!("cannot make /dev/{name}"))?;
    }
    for (name, target) in LINKS {
        match rustix::fs::symlinkat(*target, dev, *name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).or_refuse(|| format!("cannot make /dev/{name}")),
        }
    }
    Ok(())
}

/// A mount's options, as the specification has them.
pub(crate) fn options_of(mount: &Mount) -> Options {
    let mut options = Options::parse(&mount.options);
    if mount.kind.as_deref() == Some("bind") && options.bind.is_none() {
        options.bind = Some(false);
    }
    options
}

/// The file system of a mount that is none of something there is.
///
/// # Errors
/// Refuses a mount that names none.
pub(crate) fn kind_of(mount: &Mount) -> Result<&str, Errno> {
    match mount.kind.as_deref() {
        // The spec's name for "the host's cgroups", of which the guest has one kind.
        Some("cgroup") => Ok("cgroup2"),
        Some(kind) => Ok(kind),
        None => Err(Errno::NODEV),
    }
}

/// Makes one mount inside `root`.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn place(root: BorrowedFd<'_>, mount: &Mount) -> Result<(), Errno> {
    let mut options = options_of(mount);
    let source = mount.source.as_deref().unwrap_or(Path::new(""));
    if let Some(recursive) = options.bind {
        if !options.data.is_empty() || !mount.uid_mappings.is_empty() {
            return Err(Errno::INVAL);
        }
        let copy = mounts::copy_of(source, recursive)?;
        mounts::dress(copy.as_fd(), &options)?;
        let mode = rustix::fs::fstat(&copy)?.st_mode;
        let target = if FileType::from_raw_mode(mode) == FileType::Directory {
            Target::Directory
        } else {
            Target::File
        };
        let (target, _) = resolve::ensure(root, &mount.destination, target)?;
        return mounts::attach(copy.as_fd(), target.as_fd());
    }
    let kind = kind_of(mount)?;
    let (target, existed) = directory_for(root, kind, &mount.destination)?;
    if kind == "tmpfs" && existed && !options.has("mode") {
        let mode = rustix::fs::fstat(&target)?.st_mode & 0o7777;
        options
            .data
            .push(("mode".into(), Some(format!("{mode:o}"))));
    }
    let source = source.to_string_lossy();
    let new = mounts::new_file_system(kind, &source, &options)?;
    if options.copy_up && existed {
        copy_up(target.as_fd(), new.as_fd())?;
    }
    mounts::attach(new.as_fd(), target.as_fd())
}

/// The directory for a file system, and whether it was there before. A target for proc or sysfs must
/// not be reached through any link: masks are laid by name.
///
/// # Errors
/// As openat2(2) has them.
pub(crate) fn directory_for(
    root: BorrowedFd<'_>,
    kind: &str,
    path: &Path,
) -> Result<(OwnedFd, bool), Errno> {
    let found = resolve::ensure(root, path, Target::Directory)?;
    if matches!(kind, "proc" | "sysfs") {
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let strict = ResolveFlags::NO_SYMLINKS;
        resolve::open_in(root, path, flags, Mode::empty(), strict)?;
    }
    Ok(found)
}

/// Copies the plain files, directories and links at the top of `from` into a new tmpfs.
fn copy_up(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let from = rustix::fs::openat(from, c".", flags, Mode::empty())?;
    for entry in rustix::fs::Dir::read_from(&from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = rustix::fs::statat(&from, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                rustix::fs::mkdirat(to, name, mode)?;
                let below = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let source = rustix::fs::openat(&from, name, below, Mode::empty())?;
                let target = rustix::fs::openat(to, name, below, Mode::empty())?;
                copy_up(source.as_fd(), target.as_fd())?;
            }
            FileType::Symlink => {
                let link = rustix::fs::readlinkat(&from, name, Vec::new())?;
                rustix::fs::symlinkat(link.as_c_str(), to, name)?;
            }
            FileType::RegularFile => copy_file(from.as_fd(), to, name, mode)?,
            _ => continue,
        }
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        let nofollow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        rustix::fs::chownat(to, name, Some(uid), Some(gid), nofollow)?;
    }
    Ok(())
}

fn copy_file(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    name: &std::ffi::CStr,
    mode: Mode,
) -> Result<(), Errno> {
    let read = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let write = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let source = rustix::fs::openat(from, name, read, Mode::empty())?;
    let target = rustix::fs::openat(to, name, write, mode)?;
    let (mut source, mut target) = (std::fs::File::from(source), std::fs::File::from(target));
    std::io::copy(&mut source, &mut target)
        .map(drop)
        .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

fn make_device(root: BorrowedFd<'_>, device: &Device) -> Result<(), Errno> {
    let path = &device.path;
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let dir = resolve::ensure_dir(root, path.parent().unwrap_or(Path::new("/")))?;
    let kind = match device.kind {
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Character => FileType::CharacterDevice,
        DeviceKind::Fifo => FileType::Fifo,
    };
    let numbers = (device.major, device.minor);
    let mode = device.file_mode.unwrap_or(0o666);
    make_node(dir.as_fd(), Path::new(name), kind, numbers, mode)?;
    let uid = device.uid.map(Uid::from_raw);
    let gid = device.gid.map(Gid::from_raw);
    let nofollow = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(&dir, name, uid, gid, nofollow)
}

/// Makes a device node; where nodes can't be made, in a user namespace, binds the guest's own.
fn make_node<P: rustix::path::Arg + AsRef<Path> + Copy>(
    dir: BorrowedFd<'_>,
    name: P,
    kind: FileType,
    (major, minor): (u32, u32),
    mode: u32,
) -> Result<(), Errno> {
    let bits = Mode::from_raw_mode(mode & 0o7777);
    match rustix::fs::mknodat(dir, name, kind, bits, makedev(major, minor)) {
        Ok(()) => {
            // The umask took its part.
            rustix::fs::chmodat(dir, name, bits, rustix::fs::AtFlags::empty())
        }
        Err(Errno::EXIST) => Ok(()),
        Err(Errno::PERM) => {
            let copy = mounts::copy_of(&Path::new("/dev").join(name), false)?;
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop(rustix::fs::openat(dir, name, flags, bits)?);
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let target = rustix::fs::openat(dir, name, flags, Mode::empty())?;
            mounts::attach(copy.as_fd(), target.as_fd())
        }
        Err(other) => Err(other),
    }
}

/// Makes `root` the root of this process and lets go of the old one.
///
/// # Errors
/// None that a bound root can have.
pub(crate) fn change_root(root: BorrowedFd<'_>) -> Result<(), Fault> {
    let steps = || -> Result<(), Errno> {
        rustix::process::fchdir(root)?;
        // The old root is stacked on the new one's place, and `.` then names the upper, old one.
        rustix::process::pivot_root(c".", c".")?;
        rustix::mount::unmount(c".", UnmountFlags::DETACH)?;
        rustix::process::chdir(c"/")
    };
    steps().or_internal(|| "cannot change the root")
}

/// What hides paths: taken from the guest before the root is changed, so that nothing in the
/// container can stand in for it.
#[derive(Debug)]
pub(crate) struct Covers {
    null: OwnedFd,
    null_is_attached: bool,
    empty: Option<OwnedFd>,
}

impl Covers {
    /// Takes the guest's /dev/null.
    ///
    /// # Errors
    /// If the guest has none.
    pub(crate) fn take() -> Result<Self, Fault> {
        let null = mounts::copy_of(Path::new("/dev/null"), false)
            .or_internal(|| "cannot take the guest's /dev/null")?;
        Ok(Self {
            null,
            null_is_attached: false,
            empty: None,
        })
    }

    fn cover(&mut self, target: BorrowedFd<'_>) -> Result<(), Errno> {
        let mode = rustix::fs::fstat(target)?.st_mode;
        if FileType::from_raw_mode(mode) == FileType::Directory {
            if let Some(empty) = &self.empty {
                let copy = mounts::copy_of_place(empty.as_fd(), false)?;
                return mounts::attach(copy.as_fd(), target);
            }
            let empty = mounts::new_file_system("tmpfs", "tmpfs", &Options::parse(&["ro"]))?;
            mounts::attach(empty.as_fd(), target)?;
            self.empty = Some(empty);
        } else if self.null_is_attached {
            let copy = mounts::copy_of_place(self.null.as_fd(), false)?;
            mounts::attach(copy.as_fd(), target)?;
        } else {
            mounts::attach(self.null.as_fd(), target)?;
            self.null_is_attached = true;
        }
        Ok(())
    }
}

/// Lays the spec's restrictions over the root this process is now in: `covers` where they aren't yet.
///
/// # Errors
/// Refuses paths that can't be covered; those that don't exist need no cover.
pub(crate) fn restrict(spec: &Spec, covers: Option<Covers>) -> Result<(), Fault> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root =
        rustix::fs::openat(CWD, c"/", flags, Mode::empty()).or_internal(|| "cannot open /")?;
    if let Some(mut covers) = covers {
        let linux = &spec.linux;
        cover(
            root.as_fd(),
            &linux.readonly_paths,
            &linux.masked_paths,
            &mut covers,
        )?;
    }
    if spec.root.as_ref().is_some_and(|root| root.readonly) {
        mounts::make_read_only(root.as_fd(), false)
            .or_refuse(|| "cannot make the root read-only")?;
    }
    Ok(())
}

/// Makes some paths inside `root` read-only and hides others.
///
/// # Errors
/// As [`restrict`].
pub(crate) fn cover(
    root: BorrowedFd<'_>,
    read_only: &[String],
    masked: &[String],
    covers: &mut Covers,
) -> Result<(), Fault> {
    for path in distinct(read_only) {
        each(root, &path, |target| {
            let copy = mounts::copy_of_place(target, true)?;
            mounts::make_read_only(copy.as_fd(), true)?;
            mounts::attach(copy.as_fd(), target)
        })
        .or_refuse(|| format!("cannot make {} read-only", path.display()))?;
    }
    for path in distinct(masked) {
        each(root, &path, |target| covers.cover(target))
            .or_refuse(|| format!("cannot mask {}", path.display()))?;
    }
    Ok(())
}

fn distinct(paths: &[String]) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    paths
        .iter()
        .filter(|path| seen.insert(path.as_str()))
        .map(PathBuf::from)
        .collect()
}

fn each(
    root: BorrowedFd<'_>,
    path: &Path,
    change: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>,
) -> Result<(), Errno> {
    match resolve::find(root, path) {
        Ok(target) => change(target.as_fd()),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => Ok(()),
        Err(other) => Err(other),
    }
}
