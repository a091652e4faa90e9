//! Operations on names: what is made, linked, moved and removed.
//!
//! Files belong to the guest's user that made them. Nothing crosses from one
//! export to another.

use std::ffi::CStr;
use std::fs::File;
use std::io;

use fuse_backend_rs::abi::fuse_abi::{CreateIn, FOPEN_IN_KILL_SUIDGID};
use fuse_backend_rs::api::filesystem::{Context, Entry, OpenOptions};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::files::OpenFile;
use super::identity::AsUser;
use super::nodes::ROOT;
use super::tree::{State, Tree, own_name};

/// What a new file or directory has.
#[derive(Debug, Clone, Copy)]
pub(super) struct Making {
    pub(super) mode: u32,
    pub(super) umask: u32,
}

impl Making {
    fn permissions(self) -> Mode {
        Mode::from_raw_mode(self.mode & 0o7777 & !(self.umask & 0o777))
    }
}

/// What the guest is told of a file that it made and opened.
type Created = (Entry, Option<u64>, OpenOptions);

impl Tree {
    /// Makes something at `name` by `make`, as the guest's user, and tells of it.
    fn make(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        make: impl FnOnce(&std::os::fd::OwnedFd) -> Result<(), Errno>,
    ) -> io::Result<Entry> {
        let mut state = self.lock();
        let directory = state.changeable_at(self, parent, name)?;
        if state.nodes.is_full() {
            return Err(Errno::NOMEM.into());
        }
        {
            let _user = AsUser::enter(ctx.uid, ctx.gid)?;
            make(&directory.fd)?;
        }
        self.find(&mut state, parent, name)
    }

    pub(super) fn make_directory(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        making: Making,
    ) -> io::Result<Entry> {
        self.make(ctx, parent, name, |directory| {
            rustix::fs::mkdirat(directory, name, making.permissions())
        })
    }

    pub(super) fn make_symlink(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> io::Result<Entry> {
        self.make(ctx, parent, name, |directory| {
            rustix::fs::symlinkat(target, directory, name)
        })
    }

    pub(super) fn make_node(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        making: Making,
        rdev: u32,
    ) -> io::Result<Entry> {
        let kind = FileType::from_raw_mode(making.mode);
        if matches!(
            kind,
            FileType::Directory | FileType::Symlink | FileType::Unknown
        ) {
            return Err(Errno::INVAL.into());
        }
        let (major, minor) = (
            (rdev >> 8) & 0xfff,
            (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00),
        );
        let device = rustix::fs::makedev(major, minor);
        self.make(ctx, parent, name, |directory| {
            rustix::fs::mknodat(directory, name, kind, making.permissions(), device)
        })
    }

    /// `open(2)` with `O_CREAT`: the new or, without `O_EXCL`, the old file,
    /// and a handle of it.
    pub(super) fn create(
        &self,
        ctx: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<Created> {
        let mut state = self.lock();
        let flags = OFlags::from_bits_retain(args.flags);
        let directory = state.changeable_at(self, parent, name)?;
        let export = directory.export;
        state.files.check_room()?;
        if state.nodes.is_full() {
            return Err(Errno::NOMEM.into());
        }
        let making = Making {
            mode: args.mode,
            umask: args.umask,
        };
        let made = {
            let _user = AsUser::enter(ctx.uid, ctx.gid)?;
            let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            rustix::fs::openat(
                &directory.fd,
                name,
                exclusive | (flags & OFlags::RWMODE),
                making.permissions(),
            )
        };
        let (entry, file) = match made {
            Ok(fd) => {
                let file = File::from(fd);
                let seen = state.nodes.remember(export, self.path_of(&file)?)?;
                (self.entry(export, seen)?, file)
            }
            Err(Errno::EXIST) if !flags.contains(OFlags::EXCL) => {
                let entry = self.find(&mut state, parent, name)?;
                match self.open_contents(
                    &state,
                    entry.inode,
                    args.flags,
                    args.fuse_flags & FOPEN_IN_KILL_SUIDGID != 0,
                ) {
                    Ok(file) => (entry, file),
                    Err(error) => {
                        self.forget_locked(&mut state, entry.inode, 1);
                        return Err(error);
                    }
                }
            }
            Err(errno) => return Err(errno.into()),
        };
        self.opened(&mut state, export, entry, file)
    }

    /// `open(2)` with `O_TMPFILE`: a file that has no name yet, in `parent`.
    pub(super) fn make_temporary(
        &self,
        user: (u32, u32),
        parent: u64,
        flags: u32,
        making: Making,
    ) -> io::Result<Created> {
        let mut state = self.lock();
        let directory = state.changeable(self, parent)?;
        let export = directory.export;
        if directory.kind != FileType::Directory {
            return Err(Errno::NOTDIR.into());
        }
        state.files.check_room()?;
        if state.nodes.is_full() {
            return Err(Errno::NOMEM.into());
        }
        let access = OFlags::from_bits_retain(flags) & (OFlags::RWMODE | OFlags::EXCL);
        let fd = {
            let _user = AsUser::enter(user.0, user.1)?;
            rustix::fs::openat(
                self.descriptors(),
                own_name(&directory.fd),
                OFlags::TMPFILE | OFlags::CLOEXEC | access,
                making.permissions(),
            )?
        };
        let file = File::from(fd);
        let seen = state.nodes.remember(export, self.path_of(&file)?)?;
        let entry = self.entry(export, seen)?;
        self.opened(&mut state, export, entry, file)
    }

    /// Gives out a handle of a file just made, to guests that use handles.
    fn opened(
        &self,
        state: &mut State,
        export: usize,
        entry: Entry,
        file: File,
    ) -> io::Result<Created> {
        let options = self.open_options(export, false)?;
        let open = OpenFile::new(entry.inode, file);
        let handle = (!state.no_open()).then(|| state.files.insert(open));
        Ok((entry, handle, options))
    }

    pub(super) fn remove(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let state = self.lock();
        let directory = state.changeable_at(self, parent, name)?;
        Ok(rustix::fs::unlinkat(&directory.fd, name, flags)?)
    }

    pub(super) fn rename(
        &self,
        from: (u64, &CStr),
        to: (u64, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let state = self.lock();
        let old = state.changeable_at(self, from.0, from.1)?;
        let new = state.changeable_at(self, to.0, to.1)?;
        if old.export != new.export {
            return Err(Errno::XDEV.into());
        }
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        Ok(rustix::fs::renameat_with(
            &old.fd, from.1, &new.fd, to.1, flags,
        )?)
    }

    pub(super) fn link(&self, id: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        let mut state = self.lock();
        let directory = state.changeable_at(self, parent, name)?;
        let file = state.changeable(self, id)?;
        if file.export != directory.export {
            return Err(Errno::XDEV.into());
        }
        // By way of the descriptor table, whose entry stands for the inode itself,
        // a symbolic link's, too: linking by descriptor alone takes a capability more.
        rustix::fs::linkat(
            self.descriptors(),
            own_name(&file.fd),
            &directory.fd,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.find(&mut state, parent, name)
    }

    pub(super) fn read_link(&self, id: u64) -> io::Result<Vec<u8>> {
        let state = self.lock();
        if id == ROOT {
            return Err(Errno::INVAL.into());
        }
        Ok(rustix::fs::readlinkat(&state.nodes.get(id)?.fd, c"", Vec::new())?.into_bytes())
    }

    pub(super) fn forget(&self, forgotten: impl IntoIterator<Item = (u64, u64)>) {
        let mut state = self.lock();
        for (id, count) in forgotten {
            self.forget_locked(&mut state, id, count);
        }
    }

    pub(super) fn forget_locked(&self, state: &mut State, id: u64, count: u64) {
        if state.nodes.forget(id, count) {
            state.files.forget(id);
            if let Some(dax) = &mut state.dax {
                dax.forget(id);
            }
        }
    }
}
