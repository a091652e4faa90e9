//! Operations on what a file has beside its contents: attributes, extended
//! attributes, and its file system's figures.
//!
//! Of the extended attributes a guest sees and sets its own (`user.*`) and the
//! file capabilities of programs (`security.capability`): other names mean
//! something to the host, or promise a check that nobody makes.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use fuse_backend_rs::abi::fuse_abi::{Attr, AttrOut, stat64, statvfs64};
use fuse_backend_rs::api::filesystem::{
    Context, FileSystem, GetxattrReply, ListxattrReply, SetattrValid,
};
use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::contents::has_set_id;
use super::identity::WithoutFsetid;
use super::nodes::{ROOT, status};
use super::tree::{State, Tree, own_name};

/// The longest value, and the longest list of names (`XATTR_SIZE_MAX` of Linux).
const MAX_XATTR_BYTES: usize = 64 * 1024;

/// Takes the default figures of a file system from the trait.
struct Figures;

impl FileSystem for Figures {
    type Inode = u64;
    type Handle = u64;
}

impl Tree {
    pub(super) fn attributes(&self, id: u64) -> io::Result<(stat64, Duration)> {
        self.attributes_locked(&mut self.lock(), id)
    }

    /// `FUSE_GETATTR`, whose answer from the parser would lack [`Tree::flags_of`] the file.
    pub(super) fn attributes_told(&self, id: u64) -> io::Result<AttrOut> {
        let mut state = self.lock();
        let (attributes, timeout) = self.attributes_locked(&mut state, id)?;
        let flags = match state.nodes.get(id) {
            Ok(node) => self.flags_of(&*self.export(node.export)?, &attributes),
            Err(_) => 0,
        };
        Ok(AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: Attr::with_flags(attributes, flags),
        })
    }

    fn attributes_locked(&self, state: &mut State, id: u64) -> io::Result<(stat64, Duration)> {
        if id == ROOT {
            let timeout = self.believed(Duration::from_secs(1));
            return Ok((self.root_attributes(), timeout));
        }
        let node = state.nodes.get(id)?;
        let is_directory = node.kind == FileType::Directory;
        let (_, timeout) = self.timeouts(&*self.export(node.export)?, is_directory);
        Ok((state.nodes.attributes_of(id)?, timeout))
    }

    pub(super) fn set_attributes(
        &self,
        id: u64,
        wanted: &stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(stat64, Duration)> {
        let mut state = self.lock();
        state.files.forget(id);
        let node = state.changeable(self, id)?;
        if valid.contains(SetattrValid::MODE) {
            if node.kind == FileType::Symlink {
                return Err(Errno::OPNOTSUPP.into());
            }
            let mode = Mode::from_raw_mode(wanted.st_mode & 0o7777);
            rustix::fs::chmodat(
                self.descriptors(),
                own_name(&node.fd),
                mode,
                AtFlags::empty(),
            )?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let id_of = |id: u32, which| {
                if valid.contains(which) {
                    Some(id)
                        .filter(|id| *id != u32::MAX)
                        .ok_or(Errno::INVAL)
                        .map(Some)
                } else {
                    Ok(None)
                }
            };
            let owner = id_of(wanted.st_uid, SetattrValid::UID)?.map(Uid::from_raw);
            let group = id_of(wanted.st_gid, SetattrValid::GID)?.map(Gid::from_raw);
            rustix::fs::chownat(&node.fd, c"", owner, group, AtFlags::EMPTY_PATH)?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            self.truncate(&mut state, id, handle, wanted.st_size, kill)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let times = times(wanted, valid);
            rustix::fs::utimensat(
                &state.changeable(self, id)?.fd,
                c"",
                &times,
                AtFlags::EMPTY_PATH,
            )?;
        }
        self.attributes_locked(&mut state, id)
    }

    fn truncate(
        &self,
        state: &mut State,
        id: u64,
        handle: Option<u64>,
        size: i64,
        kill: bool,
    ) -> io::Result<()> {
        let size = u64::try_from(size).map_err(|_| Errno::INVAL)?;
        let node = state.changeable(self, id)?;
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::INVAL.into()),
        }
        let kill = kill && has_set_id(&status(&node.fd)?);
        let reopened;
        let file = match handle.filter(|_| !state.no_open()) {
            Some(handle) => &state.files.get(id, handle)?.file,
            None => {
                reopened = self.reopen(node, OFlags::WRONLY)?;
                &reopened
            }
        };
        let _kill = WithoutFsetid::enter(kill)?;
        Ok(rustix::fs::ftruncate(file, size)?)
    }

    pub(super) fn figures(&self, ctx: &Context, id: u64) -> io::Result<statvfs64> {
        let mut figures = Figures.statfs(ctx, id)?;
        let state = self.lock();
        let id = if id == ROOT {
            let first = self.exports().iter().flatten().next().map(Arc::clone);
            first.map_or(ROOT, |export| export.root)
        } else {
            id
        };
        let host = rustix::fs::fstatvfs(&state.nodes.get(id)?.fd)?;
        figures.f_bsize = host.f_bsize;
        figures.f_frsize = host.f_frsize;
        figures.f_blocks = host.f_blocks;
        figures.f_bfree = host.f_bfree;
        figures.f_bavail = host.f_bavail;
        figures.f_files = host.f_files;
        figures.f_ffree = host.f_ffree;
        figures.f_favail = host.f_favail;
        figures.f_namemax = host.f_namemax;
        Ok(figures)
    }

    /// A descriptor that extended attributes can be had by; a file that can't
    /// be opened has none.
    fn attributed(&self, state: &State, id: u64, none: Errno) -> io::Result<std::fs::File> {
        if id == ROOT {
            return Err(none.into());
        }
        let node = state.nodes.get(id)?;
        match node.kind {
            FileType::RegularFile | FileType::Directory => {
                self.reopen(node, OFlags::RDONLY | OFlags::NONBLOCK)
            }
            _ => Err(none.into()),
        }
    }

    pub(super) fn get_xattr(&self, id: u64, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let state = self.lock();
        if !is_shown(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let file = self.attributed(&state, id, Errno::NODATA)?;
        if size == 0 {
            let length = rustix::fs::fgetxattr_query(&file, name)?;
            return Ok(GetxattrReply::Count(
                u32::try_from(length).unwrap_or(u32::MAX),
            ));
        }
        let mut value = Vec::with_capacity((size as usize).min(MAX_XATTR_BYTES));
        rustix::fs::fgetxattr(&file, name, spare_capacity(&mut value))?;
        if value.len() > size as usize {
            return Err(Errno::RANGE.into());
        }
        Ok(GetxattrReply::Value(value))
    }

    pub(super) fn list_xattrs(&self, id: u64, size: u32) -> io::Result<ListxattrReply> {
        let state = self.lock();
        let mut names = Vec::with_capacity(MAX_XATTR_BYTES);
        match self.attributed(&state, id, Errno::NODATA) {
            Ok(file) => {
                rustix::fs::flistxattr(&file, spare_capacity(&mut names))?;
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODATA) => {}
            Err(error) => return Err(error),
        }
        let shown: Vec<u8> = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| is_shown(name.strip_suffix(&[0]).unwrap_or(name)))
            .flatten()
            .copied()
            .collect();
        match u32::try_from(shown.len()) {
            Ok(length) if size == 0 => Ok(ListxattrReply::Count(length)),
            Ok(length) if length <= size => Ok(ListxattrReply::Names(shown)),
            _ => Err(Errno::RANGE.into()),
        }
    }

    pub(super) fn set_xattr(
        &self,
        id: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        let state = self.lock();
        state.changeable(self, id)?;
        if !is_shown(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let flags = XattrFlags::from_bits(flags)
            .filter(|flags| (XattrFlags::CREATE | XattrFlags::REPLACE).contains(*flags))
            .ok_or(Errno::INVAL)?;
        let file = self.attributed(&state, id, Errno::PERM)?;
        Ok(rustix::fs::fsetxattr(&file, name, value, flags)?)
    }

    pub(super) fn remove_xattr(&self, id: u64, name: &CStr) -> io::Result<()> {
        let state = self.lock();
        state.changeable(self, id)?;
        if !is_shown(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP.into());
        }
        let file = self.attributed(&state, id, Errno::NODATA)?;
        Ok(rustix::fs::fremovexattr(&file, name)?)
    }
}

fn is_shown(name: &[u8]) -> bool {
    name == b"security.capability" || (name.starts_with(b"user.") && name.len() <= 255)
}

fn times(wanted: &stat64, valid: SetattrValid) -> Timestamps {
    let time = |set, now, seconds, nanoseconds| Timespec {
        tv_sec: seconds,
        tv_nsec: match () {
            () if valid.contains(now) => UTIME_NOW,
            () if valid.contains(set) => i64::clamp(nanoseconds, 0, 999_999_999),
            () => UTIME_OMIT,
        },
    };
    Timestamps {
        last_access: time(
            SetattrValid::ATIME,
            SetattrValid::ATIME_NOW,
            wanted.st_atime,
            wanted.st_atime_nsec,
        ),
        last_modification: time(
            SetattrValid::MTIME,
            SetattrValid::MTIME_NOW,
            wanted.st_mtime,
            wanted.st_mtime_nsec,
        ),
    }
}
