//! Terminals of processes.
//!
//! Owns: opening a pair in the container's own devpts, its size, and its place as the process's
//! controlling terminal and /dev/console. Refuses: a ptmx that isn't the kernel's; the container
//! could have put anything in its place.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, major, minor};
use rustix::io::Errno;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::fault::{Fault, Tried};
use crate::mounts;
use crate::resolve::{self, Target};
use crate::spec::Process;

/// `DEVPTS_SUPER_MAGIC` of linux/magic.h.
const DEVPTS_MAGIC: i64 = 0x1cd1;

/// A terminal's two ends.
#[derive(Debug)]
pub(crate) struct Terminal {
    /// The agent's end.
    pub(crate) master: OwnedFd,
    /// The process's end.
    pub(crate) slave: OwnedFd,
}

/// Opens a terminal in the devpts of `root`, in the size that the process asks for.
///
/// # Errors
/// Refuses a root without a devpts at /dev/pts.
pub(crate) fn open(root: BorrowedFd<'_>, process: &Process) -> Result<Terminal, Fault> {
    let what = || "cannot open a terminal in /dev/pts";
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK;
    let none = ResolveFlags::empty();
    let ptmx = Path::new("/dev/pts/ptmx");
    // First without opening the device behind it, to see what it is.
    let place = resolve::find(root, ptmx).or_refuse(what)?;
    genuine(place.as_fd()).or_refuse(what)?;
    let master = resolve::open_in(root, ptmx, flags, Mode::empty(), none).or_refuse(what)?;
    genuine(master.as_fd()).or_refuse(what)?;
    rustix::pty::unlockpt(&master).or_refuse(what)?;
    let peer = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, peer).or_refuse(what)?;
    if let Some(size) = process.console_size {
        let cut = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
        resize(slave.as_fd(), cut(size.height), cut(size.width));
    }
    Ok(Terminal { master, slave })
}

fn genuine(ptmx: BorrowedFd<'_>) -> Result<(), Errno> {
    let stat = rustix::fs::fstat(ptmx)?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
    let is_ptmx = (major(stat.st_rdev), minor(stat.st_rdev)) == (5, 2);
    let is_devpts = rustix::fs::fstatfs(ptmx)?.f_type == DEVPTS_MAGIC;
    if is_device && is_ptmx && is_devpts {
        Ok(())
    } else {
        Err(Errno::NXIO)
    }
}

/// Puts the process's end at /dev/console of `root`.
///
/// # Errors
/// Refuses a root where that can't be.
pub(crate) fn place_console(root: BorrowedFd<'_>, slave: BorrowedFd<'_>) -> Result<(), Fault> {
    let steps = || -> Result<(), Errno> {
        let (target, _) = resolve::ensure(root, Path::new("/dev/console"), Target::File)?;
        let copy = mounts::copy_of_place(slave, false)?;
        mounts::attach(copy.as_fd(), target.as_fd())
    };
    steps().or_refuse(|| "cannot place /dev/console")
}

/// Sets a terminal's size in lines and characters a line. A terminal that is gone has none.
pub(crate) fn resize(terminal: BorrowedFd<'_>, rows: u16, cols: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let _ = rustix::termios::tcsetwinsize(terminal, size);
}
