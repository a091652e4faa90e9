//! The tree a guest sees: a pseudo root, under it one directory per export.
//!
//! Owns what all operations share: the exports, the nodes and files the guest
//! knows, and how an inode becomes an open file. Refuses every change to the
//! pseudo root and to read-only exports, names that lead out of a directory,
//! and to open anything but regular files and directories.
//!
//! An inode is only ever reached from its parent's descriptor by one name that
//! isn't followed, or from its own descriptor: no path of the guest's is ever
//! resolved by the host.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use fuse_backend_rs::api::filesystem::{Entry, FsOptions};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::FsLimits;
use super::dax::Dax;
use super::export::{CachePolicy, FsExport, FsRole, KnownBy, is_component, own_descriptors};
use super::files::{Files, OpenFile};
use super::nodes::{Node, Nodes, ROOT, Seen, root_attributes};
use crate::memory::Window;

/// What was agreed on at `FUSE_INIT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Terms {
    /// Files are read and written without being opened.
    pub(super) no_open: bool,
    /// Directories, too.
    pub(super) no_opendir: bool,
    /// Nobody else was to write to any export.
    pub(super) ours_alone: bool,
}

#[derive(Debug, Clone)]
pub(super) struct Export {
    /// Where it is in the pseudo root; more than one if several were given the same directory.
    pub(super) names: Vec<String>,
    pub(super) read_only: bool,
    pub(super) cache: CachePolicy,
    pub(super) known_by: KnownBy,
    pub(super) immutable: bool,
    pub(super) root: u64,
    /// It came while the guest ran, and may be gone at the next look.
    pub(super) passing: bool,
}

/// The exports by their indices, which nodes have. That of one that went is free again: nothing
/// is left that was reached through it.
pub(super) type Exports = Vec<Option<Arc<Export>>>;

#[derive(Debug)]
pub(super) struct State {
    /// Nothing while nobody has mounted the file system.
    pub(super) terms: Option<Terms>,
    pub(super) nodes: Nodes,
    pub(super) files: Files,
    /// Where files can be shown, if there is such a place.
    pub(super) dax: Option<Dax>,
}

#[derive(Debug)]
pub(super) struct Tree {
    exports: RwLock<Exports>,
    role: FsRole,
    own_descriptors: File,
    has_window: bool,
    state: Mutex<State>,
}

impl Tree {
    /// # Errors
    /// Names that can't be, names twice, directories that aren't.
    pub(super) fn new(
        exports: Vec<FsExport>,
        role: FsRole,
        limits: FsLimits,
        window: Option<Arc<Window>>,
    ) -> io::Result<Self> {
        let tree = Self {
            exports: RwLock::default(),
            role,
            own_descriptors: own_descriptors()?,
            has_window: window.is_some(),
            state: Mutex::new(State {
                terms: None,
                nodes: Nodes::new(limits.inodes),
                files: Files::new(limits.handles),
                dax: window.map(Dax::new),
            }),
        };
        for export in exports {
            tree.show(export, false)?;
        }
        Ok(tree)
    }

    /// Adds exports to those of a guest that runs: all, or none.
    ///
    /// # Errors
    /// As [`Tree::new`]; `EBUSY` if the guest was promised that nobody else writes to what it
    /// sees.
    pub(super) fn add(&self, exports: Vec<FsExport>) -> io::Result<()> {
        if self.lock().terms.is_some_and(|terms| terms.ours_alone) {
            return Err(Errno::BUSY.into());
        }
        let mut added = Vec::with_capacity(exports.len());
        for export in exports {
            let name = export.name.clone();
            if let Err(error) = self.show(export, true) {
                self.hide(&added);
                return Err(error);
            }
            added.push(name);
        }
        Ok(())
    }

    fn show(&self, export: FsExport, passing: bool) -> io::Result<()> {
        export.check()?;
        let mut state = self.lock();
        let mut exports = self.exports_mut();
        if exports
            .iter()
            .flatten()
            .any(|other| other.has(&export.name))
        {
            return Err(Errno::EXIST.into());
        }
        // The same directory once more is the same to the guest, whose cache of it is one.
        for known in exports.iter_mut().flatten() {
            if known.read_only == export.read_only
                && known.cache == export.cache
                && known.known_by == export.known_by
                && known.immutable == export.immutable
                && state.nodes.is_at(known.root, &export.directory)?
            {
                Arc::make_mut(known).names.push(export.name);
                return Ok(());
            }
        }
        let free = exports.iter().position(Option::is_none);
        let index = free.unwrap_or(exports.len());
        let new = Arc::new(Export {
            names: vec![export.name],
            read_only: export.read_only,
            cache: export.cache,
            known_by: export.known_by,
            immutable: export.immutable,
            root: state.nodes.pin(index, export.directory)?,
            passing,
        });
        match exports.get_mut(index) {
            Some(free) => *free = Some(new),
            None => exports.push(Some(new)),
        }
        Ok(())
    }

    /// Takes the exports with these names away. What the guest still holds of them is nothing
    /// any more (`EBADF`).
    pub(super) fn hide(&self, names: &[String]) {
        let mut state = self.lock();
        let mut exports = self.exports_mut();
        for (index, slot) in exports.iter_mut().enumerate() {
            let Some(export) = slot else { continue };
            Arc::make_mut(export)
                .names
                .retain(|name| !names.contains(name));
            if export.names.is_empty() {
                *slot = None;
                let State {
                    nodes, files, dax, ..
                } = &mut *state;
                for node in nodes.drop_export(index) {
                    files.close_all(node);
                    if let Some(dax) = dax {
                        dax.blank(node);
                    }
                }
            }
        }
    }

    pub(super) fn exports(&self) -> RwLockReadGuard<'_, Exports> {
        self.exports.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exports_mut(&self) -> RwLockWriteGuard<'_, Exports> {
        self.exports.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether there is a place to show files at.
    pub(super) fn has_window(&self) -> bool {
        self.has_window
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What its directories are to a guest that is saved with them mounted.
    pub(super) fn role(&self) -> FsRole {
        self.role
    }

    /// The terms on which a guest that is capable of all of them may mount what is shown.
    ///
    /// Opening is left out only when nobody else writes to any export: the
    /// guest's kernel decides it for the whole file system, and with it that
    /// contents are kept from one opening to the next.
    pub(super) fn offered(&self) -> Terms {
        let exports = self.exports();
        let mut all = exports.iter().flatten();
        let ours_alone = all.all(|export| export.cache == CachePolicy::Always);
        let mut all = exports.iter().flatten();
        Terms {
            no_open: ours_alone,
            no_opendir: ours_alone && all.all(|export| export.read_only),
            ours_alone,
        }
    }

    /// A guest mounts the file system: what it may do of what it can.
    pub(super) fn mount(&self, capable: FsOptions) -> FsOptions {
        self.unmount();
        let offered = self.offered();
        let ours_alone = offered.ours_alone;
        let no_open = offered.no_open && capable.contains(FsOptions::ZERO_MESSAGE_OPEN);
        let no_opendir = offered.no_opendir && capable.contains(FsOptions::ZERO_MESSAGE_OPENDIR);
        self.lock().terms = Some(Terms {
            no_open,
            no_opendir,
            ours_alone,
        });
        let mut options = FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::ASYNC_DIO
            | FsOptions::MAX_PAGES
            | FsOptions::DO_READDIRPLUS
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::INIT_EXT
            | FsOptions::ABORT_ERROR;
        options.set(FsOptions::ZERO_MESSAGE_OPEN, no_open);
        options.set(FsOptions::ATOMIC_O_TRUNC, !no_open);
        options.set(FsOptions::ZERO_MESSAGE_OPENDIR, no_opendir);
        options.set(FsOptions::CACHE_SYMLINKS, ours_alone);
        let shows_files = FsOptions::PERFILE_DAX | FsOptions::MAP_ALIGNMENT;
        options.set(shows_files, self.has_window);
        // Contents the guest holds are never wrong, whatever their size and time
        // become. Else they are dropped at the next opening, or when the size changed.
        options.set(FsOptions::EXPLICIT_INVAL_DATA, ours_alone);
        options.set(FsOptions::READDIRPLUS_AUTO, !ours_alone);
        options & capable
    }

    /// Nobody has the file system mounted: nothing the guest knew is left.
    pub(super) fn unmount(&self) {
        let mut state = self.lock();
        state.terms = None;
        if let Some(dax) = &mut state.dax {
            dax.clear_all();
        }
        state.files.clear();
        state.nodes.clear();
    }

    pub(super) fn export(&self, index: usize) -> Result<Arc<Export>, Errno> {
        let exports = self.exports();
        exports.get(index).cloned().flatten().ok_or(Errno::BADF)
    }

    /// Opens the contents of a node by its own descriptor. Its access time stays as it is: the
    /// guest's kernel relies on that (`kernel-config/fuse-reads-keep-atime.patch`).
    ///
    /// # Errors
    /// `EBADF` for anything but regular files and directories; `open(2)`'s.
    pub(super) fn reopen(&self, node: &Node, flags: OFlags) -> io::Result<File> {
        match node.kind {
            FileType::RegularFile | FileType::Directory => {}
            _ => return Err(Errno::BADF.into()),
        }
        let open = |flags: OFlags| {
            rustix::fs::openat(
                &self.own_descriptors,
                own_name(&node.fd),
                flags | OFlags::CLOEXEC | OFlags::NOCTTY,
                Mode::empty(),
            )
        };
        let opened = match open(flags | OFlags::NOATIME) {
            // Only a file's owner and the privileged may ask for that.
            Err(Errno::PERM) => open(flags),
            opened => opened,
        };
        Ok(File::from(opened?))
    }

    /// The `O_PATH` descriptor of a file that was just made.
    pub(super) fn path_of(&self, file: &File) -> io::Result<OwnedFd> {
        Ok(rustix::fs::openat(
            &self.own_descriptors,
            file.as_raw_fd().to_string(),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }

    /// Where [`own_name`]s are looked up.
    pub(super) fn descriptors(&self) -> &File {
        &self.own_descriptors
    }

    /// The guest is told of what `seen` is.
    pub(super) fn entry(&self, export: usize, seen: Seen) -> io::Result<Entry> {
        let export = self.export(export)?;
        let is_directory = seen.kind == FileType::Directory;
        let (entry_timeout, attr_timeout) = self.timeouts(&export, is_directory);
        Ok(Entry {
            inode: seen.id,
            generation: 0,
            attr: seen.attributes,
            attr_flags: self.flags_of(&export, &seen.attributes),
            attr_timeout,
            entry_timeout,
        })
    }

    /// Looks `name` up in `parent` and tells the guest of it.
    pub(super) fn find(&self, state: &mut State, parent: u64, name: &CStr) -> io::Result<Entry> {
        if parent == ROOT {
            return self.find_export(state, name);
        }
        check_name(name)?;
        let directory = state.nodes.get(parent)?;
        let export = directory.export;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&directory.fd, name, flags, Mode::empty()) {
            Ok(fd) => {
                let seen = state.nodes.remember(export, fd)?;
                self.entry(export, seen)
            }
            // A name that isn't there stays so until the guest itself makes it.
            Err(Errno::NOENT) if self.export(export)?.cache == CachePolicy::Always => {
                let (entry_timeout, _) = CachePolicy::Always.timeouts(false);
                Ok(Entry {
                    entry_timeout,
                    ..Entry::default()
                })
            }
            Err(errno) => Err(errno.into()),
        }
    }

    fn find_export(&self, state: &mut State, name: &CStr) -> io::Result<Entry> {
        let exports = self.exports();
        let export = exports
            .iter()
            .flatten()
            .find(|export| {
                let mut names = export.names.iter();
                names.any(|own| own.as_bytes() == name.to_bytes())
            })
            .ok_or(Errno::NOENT)?;
        let entry = self.export_entry(state, export)?;
        state.nodes.tell(export.root);
        Ok(entry)
    }

    /// What the guest is told of an export.
    pub(super) fn export_entry(&self, state: &mut State, export: &Export) -> io::Result<Entry> {
        let (entry_timeout, attr_timeout) = match export.passing {
            true => (Duration::ZERO, Duration::ZERO),
            false => self.timeouts(export, true),
        };
        let attributes = state.nodes.attributes_of(export.root)?;
        Ok(Entry {
            inode: export.root,
            generation: 0,
            attr: attributes,
            attr_flags: 0,
            attr_timeout,
            entry_timeout,
        })
    }

    /// How long a name, and how long the attributes of a file may be believed.
    pub(super) fn timeouts(&self, export: &Export, is_directory: bool) -> (Duration, Duration) {
        let (name, attributes) = export.cache.timeouts(is_directory);
        (name, self.believed(attributes))
    }

    /// How long attributes may be believed for which it would be so long: a copy of the guest has
    /// other files in their place.
    pub(super) fn believed(&self, attributes: Duration) -> Duration {
        match self.role {
            FsRole::Template => Duration::ZERO,
            FsRole::Own | FsRole::Copy => attributes,
        }
    }

    pub(super) fn root_attributes(&self) -> fuse_backend_rs::abi::fuse_abi::stat64 {
        root_attributes(self.exports().iter().flatten().count())
    }
}

impl Export {
    pub(super) fn has(&self, name: &str) -> bool {
        self.names.iter().any(|own| own == name)
    }
}

impl State {
    pub(super) fn no_open(&self) -> bool {
        self.terms.is_some_and(|terms| terms.no_open)
    }

    pub(super) fn no_opendir(&self) -> bool {
        self.terms.is_some_and(|terms| terms.no_opendir)
    }

    /// The node `id`, to be changed.
    ///
    /// # Errors
    /// `EROFS` for the pseudo root and in read-only exports.
    pub(super) fn changeable(&self, tree: &Tree, id: u64) -> io::Result<&Node> {
        if id == ROOT {
            return Err(Errno::ROFS.into());
        }
        let node = self.nodes.get(id)?;
        if tree.export(node.export)?.read_only {
            return Err(Errno::ROFS.into());
        }
        Ok(node)
    }

    /// The node `id`, a directory to be changed at `name`.
    ///
    /// # Errors
    /// As [`State::changeable`], and `EINVAL` for names that lead elsewhere.
    pub(super) fn changeable_at(&self, tree: &Tree, id: u64, name: &CStr) -> io::Result<&Node> {
        check_name(name)?;
        self.changeable(tree, id)
    }

    /// The open file for a request: by its handle, or without one for guests
    /// that don't open.
    pub(super) fn file(
        &mut self,
        tree: &Tree,
        id: u64,
        handle: u64,
        writable: bool,
    ) -> io::Result<&mut OpenFile> {
        if !self.no_open() {
            return Ok(self.files.get(id, handle)?);
        }
        let node = if writable {
            self.changeable(tree, id)?
        } else {
            self.nodes.get(id)?
        };
        if node.kind != FileType::RegularFile {
            return Err(Errno::BADF.into());
        }
        let flags = if writable {
            OFlags::RDWR
        } else {
            OFlags::RDONLY
        };
        let Self { nodes, files, .. } = self;
        files.kept(id, writable, || tree.reopen(nodes.get(id)?, flags))
    }
}

/// # Errors
/// `EINVAL` for names that lead elsewhere, `ENAMETOOLONG` for long ones.
pub(super) fn check_name(name: &CStr) -> Result<(), Errno> {
    match name.to_bytes() {
        bytes if is_component(bytes) => Ok(()),
        bytes if bytes.len() > 255 => Err(Errno::NAMETOOLONG),
        _ => Err(Errno::INVAL),
    }
}

/// A descriptor's name in the table of descriptors.
pub(super) fn own_name(fd: &OwnedFd) -> String {
    fd.as_raw_fd().to_string()
}
