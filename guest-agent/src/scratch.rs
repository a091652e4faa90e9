//! The scratch disk: what containers write over the layers of an image.
//!
//! Owns: the disk's file system and the overlay on it, from a guest's setup to its end. Refuses:
//! to make that file system; the host hands in a disk that has one, with two empty directories.
//! The host never reads it.

use std::fs::File;
use std::os::fd::AsFd;

use hull_proto::{
    LAYERED_ROOT_DIR, SCRATCH_DEVICE, SCRATCH_DIR, SCRATCH_UPPER, SCRATCH_WORK, SHARES_DIR,
};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::fault::{Fault, Tried};
use crate::mounts::{self, Options};
use crate::sys;

/// No thread fills tables in that a sparse disk has as zeroes, or reads maps before they are
/// needed; extended attributes, which are few, aren't looked for to be shared; what is deleted is
/// the host's again.
const OPTIONS: [&str; 4] = [
    "noinit_itable",
    "no_prefetch_block_bitmaps",
    "nombcache",
    "discard",
];

/// Mounts the disk.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn open() -> Result<(), Fault> {
    mounts::place(
        "ext4",
        SCRATCH_DEVICE,
        &Options::parse(&OPTIONS),
        SCRATCH_DIR,
    )
}

/// Has all that was written to the disk be on it.
///
/// # Errors
/// What the disk refuses.
pub(crate) fn write_out() -> Result<(), Fault> {
    let what = || "cannot write to the scratch disk";
    let disk = File::open(SCRATCH_DIR).or_internal(what)?;
    rustix::fs::syncfs(disk).or_internal(what)
}

/// Lays the disk, which is mounted, over the layers of a share.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn lay_over(layers: &str) -> Result<(), Fault> {
    let on_disk = |name| format!("{SCRATCH_DIR}/{name}");
    let options = [
        format!("lowerdir={SHARES_DIR}/{layers}"),
        format!("upperdir={}", on_disk(SCRATCH_UPPER)),
        format!("workdir={}", on_disk(SCRATCH_WORK)),
        // Files of both have one device number, as `du -x` and its like expect.
        "xino=on".to_owned(),
        // An id of its own would be one more write.
        "uuid=null".to_owned(),
    ];
    without_handles(|| {
        mounts::place(
            "overlay",
            "overlay",
            &Options::parse(&options),
            LAYERED_ROOT_DIR,
        )
    })
}

/// Does something without the right to open files by handles. An overlay that is mounted so
/// doesn't note the handles of the layers' files: those of a share mean another file each time
/// that it is mounted.
fn without_handles(mount: impl FnOnce() -> Result<(), Fault>) -> Result<(), Fault> {
    let what = || "cannot set its own capabilities";
    let held = rustix::thread::capabilities(None).or_internal(what)?;
    let less = CapabilitySets {
        effective: held.effective - CapabilitySet::DAC_READ_SEARCH,
        ..held
    };
    rustix::thread::set_capabilities(None, less).or_internal(what)?;
    let done = mount();
    rustix::thread::set_capabilities(None, held).or_internal(what)?;
    done
}

/// Writes all there is to the disk, whose journal is empty then, and lets nothing more be written.
///
/// # Errors
/// What the disk or the kernel refuses.
pub(crate) fn put_away() -> Result<(), Fault> {
    let what = || "cannot put the scratch disk away";
    let disk = File::open(SCRATCH_DIR).or_internal(what)?;
    sys::freeze(disk.as_fd()).or_internal(what)
}

/// Takes both mounts back, if there were any; the disk is nobody's then.
///
/// # Errors
/// If somebody still has it.
pub(crate) fn unmount() -> Result<(), Fault> {
    for place in [LAYERED_ROOT_DIR, SCRATCH_DIR] {
        match rustix::mount::unmount(place, UnmountFlags::empty()) {
            Ok(()) => {}
            // There was no setup with one.
            Err(Errno::NOENT | Errno::INVAL) => return Ok(()),
            Err(errno) => return Err(errno).or_internal(|| format!("cannot unmount {place}")),
        }
    }
    // Of a block device: that nobody has it mounted (open(2)).
    let flags = OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC;
    rustix::fs::open(SCRATCH_DEVICE, flags, Mode::empty())
        .map(drop)
        .or_internal(|| "the scratch disk is still in use")
}
