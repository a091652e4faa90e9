//! Operations on contents: opening, reading, writing, allocating, seeking.
//!
//! Only the flags that mean something for a file on the host reach `open(2)`.
//! Set-user-id and set-group-id bits are lost where the guest's kernel leaves
//! that to its host (`FUSE_HANDLE_KILLPRIV_V2`).

use std::fs::File;
use std::io;

use fuse_backend_rs::abi::fuse_abi::{FOPEN_IN_KILL_SUIDGID, WRITE_KILL_PRIV};
use fuse_backend_rs::api::filesystem::{Context, OpenOptions, ZeroCopyReader, ZeroCopyWriter};
use rustix::fs::{FallocateFlags, FileType, OFlags, SeekFrom, Statx};
use rustix::io::Errno;

use super::export::CachePolicy;
use super::files::OpenFile;
use super::identity::WithoutFsetid;
use super::nodes::{ROOT, status};
use super::tree::{State, Tree};

/// The modes of `fallocate(2)` that a guest may ask for.
const ALLOCATIONS: FallocateFlags = FallocateFlags::KEEP_SIZE
    .union(FallocateFlags::PUNCH_HOLE)
    .union(FallocateFlags::ZERO_RANGE)
    .union(FallocateFlags::COLLAPSE_RANGE)
    .union(FallocateFlags::INSERT_RANGE)
    .union(FallocateFlags::UNSHARE_RANGE);

/// `FUSE_WRITE`, without its data.
#[derive(Debug, Clone, Copy)]
pub(super) struct Writing {
    pub(super) handle: u64,
    pub(super) size: u32,
    pub(super) offset: u64,
    /// Out of the guest's page cache, at no particular file's wish.
    pub(super) delayed: bool,
    pub(super) flags: u32,
    pub(super) fuse_flags: u32,
}

impl Tree {
    /// Opens a regular file as the guest's `flags` say.
    pub(super) fn open_contents(
        &self,
        state: &State,
        id: u64,
        flags: u32,
        kill: bool,
    ) -> io::Result<File> {
        let flags = OFlags::from_bits_retain(flags);
        let access = flags & OFlags::RWMODE;
        let node = if access == OFlags::RDONLY && !flags.contains(OFlags::TRUNC) {
            state.nodes.get(id)?
        } else {
            state.changeable(self, id)?
        };
        match node.kind {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR.into()),
            _ => return Err(Errno::BADF.into()),
        }
        let kept = flags & (OFlags::RWMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC);
        let _kill = WithoutFsetid::enter(kill && flags.contains(OFlags::TRUNC))?;
        self.reopen(node, kept)
    }

    /// How the guest's kernel may keep what it reads.
    pub(super) fn open_options(
        &self,
        export: usize,
        is_directory: bool,
    ) -> io::Result<OpenOptions> {
        Ok(match self.export(export)?.cache {
            CachePolicy::Always if is_directory => OpenOptions::KEEP_CACHE | OpenOptions::CACHE_DIR,
            CachePolicy::Always => OpenOptions::KEEP_CACHE,
            CachePolicy::Auto => OpenOptions::empty(),
        })
    }

    pub(super) fn open(
        &self,
        id: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(u64, OpenOptions)> {
        let mut state = self.lock();
        if state.no_open() {
            return Err(Errno::NOSYS.into());
        }
        if id == ROOT {
            return Err(Errno::ISDIR.into());
        }
        state.files.check_room()?;
        let export = state.nodes.get(id)?.export;
        let file =
            self.open_contents(&state, id, flags, fuse_flags & FOPEN_IN_KILL_SUIDGID != 0)?;
        Ok((
            state.files.insert(OpenFile::new(id, file)),
            self.open_options(export, false)?,
        ))
    }

    pub(super) fn release(&self, id: u64, handle: u64) -> io::Result<()> {
        Ok(self.lock().files.release(id, handle)?)
    }

    pub(super) fn read(
        &self,
        id: u64,
        handle: u64,
        to: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let mut state = self.lock();
        let open = state.file(self, id, handle, false)?;
        let size = (size as usize).min(to.available_bytes());
        to.write_from(&mut open.file, size, offset)
    }

    pub(super) fn write(
        &self,
        id: u64,
        from: &mut dyn ZeroCopyReader,
        writing: &Writing,
    ) -> io::Result<usize> {
        let mut state = self.lock();
        // A file kept open for everybody is never made to append: its one writer
        // is the guest, which knows where the end is.
        let appends = !state.no_open()
            && !writing.delayed
            && OFlags::from_bits_retain(writing.flags).contains(OFlags::APPEND);
        let status = status(&state.changeable(self, id)?.fd)?;
        let open = state.file(self, id, writing.handle, true)?;
        if appends != open.appends {
            let flags = if appends {
                OFlags::APPEND
            } else {
                OFlags::empty()
            };
            rustix::fs::fcntl_setfl(&open.file, flags)?;
            open.appends = appends;
        }
        let _kill =
            WithoutFsetid::enter(writing.fuse_flags & WRITE_KILL_PRIV != 0 && has_set_id(&status))?;
        from.read_to(&mut open.file, writing.size as usize, writing.offset)
    }

    pub(super) fn sync(&self, id: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let mut state = self.lock();
        if id == ROOT {
            return Ok(());
        }
        let without_handle = match state.nodes.get(id)?.kind {
            FileType::Directory => state.no_opendir(),
            _ => state.no_open(),
        };
        if without_handle {
            return sync_file(
                &self.reopen(state.nodes.get(id)?, OFlags::RDONLY)?,
                data_only,
            );
        }
        sync_file(&state.files.get(id, handle)?.file, data_only)
    }

    /// Writes back all that is dirty in the exports' file systems.
    pub(super) fn sync_all(&self) -> io::Result<()> {
        let state = self.lock();
        let exports = self.exports();
        let writable = exports.iter().flatten().filter(|export| !export.read_only);
        for export in writable {
            let directory = self.reopen(
                state.nodes.get(export.root)?,
                OFlags::RDONLY | OFlags::DIRECTORY,
            )?;
            rustix::fs::syncfs(&directory)?;
        }
        Ok(())
    }

    pub(super) fn allocate(
        &self,
        ctx: &Context,
        id: u64,
        handle: u64,
        mode: u32,
        range: (u64, u64),
    ) -> io::Result<()> {
        let mut state = self.lock();
        let mode = FallocateFlags::from_bits(mode)
            .filter(|mode| ALLOCATIONS.contains(*mode))
            .ok_or(Errno::OPNOTSUPP)?;
        let status = status(&state.changeable(self, id)?.fd)?;
        let open = state.file(self, id, handle, true)?;
        let _kill = WithoutFsetid::enter(ctx.uid != 0 && has_set_id(&status))?;
        Ok(rustix::fs::fallocate(&open.file, mode, range.0, range.1)?)
    }

    pub(super) fn seek(&self, id: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let mut state = self.lock();
        let target = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL.into()),
        };
        i64::try_from(offset).map_err(|_| Errno::NXIO)?;
        Ok(rustix::fs::seek(
            &state.file(self, id, handle, false)?.file,
            target,
        )?)
    }
}

fn sync_file(file: &File, data_only: bool) -> io::Result<()> {
    if data_only {
        file.sync_data()
    } else {
        file.sync_all()
    }
}

/// The file runs as its owner or group.
pub(super) fn has_set_id(status: &Statx) -> bool {
    u32::from(status.stx_mode) & (libc::S_ISUID | libc::S_ISGID) != 0
}
