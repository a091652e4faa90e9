//! A mounted file system in a snapshot: what the guest knows of it, by export and path, and how
//! another process comes to know the same.
//!
//! Owns: the state of [`Tree`] and both ways of it. Refuses to save what has no path any more (a
//! file that was removed and is still in use), and to go on with a file that isn't the one that was
//! saved. Inode numbers don't outlive a copy of a directory, times do so in whole seconds (tar(5)),
//! and contents of a directory that the host writes to may change at any time. So by what beside its
//! path and kind a file is known again is each export's own ([`KnownBy`]). Archives leave sockets
//! out, which are but names of what the guest has: one that is gone with the copy is made again.
//!
//! Paths are resolved by the kernel, below their export's directory, and no link on the way is
//! followed (openat2(2)); a handle is opened from its inode, as it was at first.

use std::ffi::OsStr;
use std::fmt;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Statx, Uid, chownat, mknodat,
};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::dax::{Dax, Shown};
use super::export::{FsRole, KnownBy};
use super::files::OpenFile;
use super::nodes::{Node, ROOT, status};
use super::template::TemplateMount;
use super::tree::{Export, State, Terms, Tree, own_name};
use crate::virtio::device::Unsaveable;

/// What of an opening's flags is kept: others mean nothing once a file is open.
const KEPT_FLAGS: OFlags = OFlags::RWMODE.union(OFlags::SYNC).union(OFlags::DSYNC);

/// More numbers than this no guest has been given: one a nanosecond took a century.
const MOST_GIVEN: u64 = 1 << 62;

/// A mount, as the device's role has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Mount {
    /// Of a guest that goes on with the same files.
    Own(MountState),
    /// Of one that is to be copied.
    Template(TemplateMount),
}

/// What a guest that has the file system mounted knows of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountState {
    terms: Terms,
    /// The names of each.
    exports: Vec<Vec<String>>,
    next_node: u64,
    nodes: Vec<NodeState>,
    next_handle: u64,
    handles: Vec<HandleState>,
    /// What the guest sees in the device's window.
    #[serde(default)]
    shown: Vec<Shown>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct NodeState {
    id: u64,
    export: usize,
    path: Vec<u8>,
    lookups: u64,
    device: Option<usize>,
    mark: Mark,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct HandleState {
    handle: u64,
    node: u64,
    flags: u32,
    appends: bool,
}

/// By what a file is known again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    mode: u16,
    owner: (u32, u32),
    ino: u64,
    size: u64,
    modified: (i64, u32),
}

impl Mark {
    fn of(status: &Statx) -> Self {
        Self {
            mode: status.stx_mode,
            owner: (status.stx_uid, status.stx_gid),
            ino: status.stx_ino,
            size: status.stx_size,
            modified: (status.stx_mtime.tv_sec, status.stx_mtime.tv_nsec),
        }
    }

    fn kind(self) -> FileType {
        FileType::from_raw_mode(self.mode.into())
    }

    /// What tells that the file isn't the one that was saved.
    fn differs(self, now: Self, by: KnownBy) -> Option<&'static str> {
        let is_file = now.kind() == FileType::RegularFile;
        let changed = (self.size, self.modified.0) != (now.size, now.modified.0);
        match by {
            _ if self.kind() != now.kind() => Some("something of another kind is in its place"),
            KnownBy::Inode if self.ino != now.ino => Some("another file is in its place"),
            KnownBy::Content if is_file && changed => Some("it was changed since"),
            _ => None,
        }
    }
}

/// A file of an export, as messages name it.
struct Name<'a>(&'a Export, &'a [u8]);

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(self.1);
        let share = self.0.names.first().map_or("", String::as_str);
        write!(f, "{:?} of share \"{share}\"", format!("/{path}"))
    }
}

/// Opens `path` below `directory` for its attributes.
fn open_below(directory: &OwnedFd, path: &[u8]) -> Result<OwnedFd, Errno> {
    let path = if path.is_empty() { b"." } else { path };
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let within = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = Path::new(OsStr::from_bytes(path));
    // The kernel says EAGAIN when something was renamed meanwhile.
    (0..64)
        .map(|_| rustix::fs::openat2(directory, path, flags, Mode::empty(), within))
        .find(|opened| !matches!(opened, Err(Errno::AGAIN)))
        .unwrap_or(Err(Errno::AGAIN))
}

/// Makes a socket again at `path` below `directory`.
fn make_socket(directory: &OwnedFd, path: &[u8], mark: Mark) -> Result<OwnedFd, Errno> {
    let path = Path::new(OsStr::from_bytes(path));
    let parent = path.parent().unwrap_or(Path::new(""));
    let parent = open_below(directory, parent.as_os_str().as_bytes())?;
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let mode = Mode::from_raw_mode(mark.mode.into());
    mknodat(&parent, name, FileType::Socket, mode, 0)?;
    let (user, group) = (Uid::from_raw(mark.owner.0), Gid::from_raw(mark.owner.1));
    let flags = AtFlags::SYMLINK_NOFOLLOW;
    chownat(&parent, name, Some(user), Some(group), flags)?;
    open_below(&parent, name.as_bytes())
}

impl Tree {
    /// What the guest knows; nothing if it hasn't mounted the file system.
    pub(super) fn saved(&self) -> Result<Option<Mount>, Unsaveable> {
        let state = self.lock();
        let Some(terms) = state.terms else {
            return Ok(None);
        };
        let mount = match self.role() {
            FsRole::Template => Mount::Template(self.save_template(&state, terms)?),
            FsRole::Own | FsRole::Copy => Mount::Own(self.save_mount(&state, terms)?),
        };
        Ok(Some(mount))
    }

    fn save_mount(&self, state: &State, terms: Terms) -> Result<MountState, Unsaveable> {
        if self.exports().iter().flatten().any(|export| export.passing) {
            let why = "it was given further directories while it ran";
            return Err(Unsaveable(why.to_owned()));
        }
        let (nodes, next_node) = state.nodes.all();
        let mut nodes: Vec<(u64, &Node)> = nodes.collect();
        // Of several that can't be saved the same one is told each time.
        nodes.sort_by_key(|(id, _)| *id);
        let nodes = nodes
            .into_iter()
            .map(|(id, node)| self.save_node(state, id, node))
            .collect::<Result<Vec<_>, _>>()?;
        let (handles, next_handle) = state.files.all();
        // One whose file is forgotten is about to be released.
        let mut handles = handles
            .filter(|(_, open)| state.nodes.get(open.node).is_ok())
            .map(|(handle, open)| save_handle(handle, open))
            .collect::<Result<Vec<_>, _>>()?;
        handles.sort_by_key(|handle| handle.handle);
        Ok(MountState {
            terms,
            exports: self.names(),
            next_node,
            nodes,
            next_handle,
            handles,
            shown: state.dax.as_ref().map_or_else(Vec::new, Dax::all),
        })
    }

    fn save_node(&self, state: &State, id: u64, node: &Node) -> Result<NodeState, Unsaveable> {
        let unsaveable = |errno: Errno| Unsaveable(format!("a file can't be looked at: {errno}"));
        let export = self.export(node.export).map_err(unsaveable)?;
        let root = &state.nodes.get(export.root).map_err(unsaveable)?.fd;
        let path = self.path_below(root, &node.fd).map_err(unsaveable)?;
        let own = status(&node.fd);
        // What the kernel calls it need not be where it is: it says so of removed files, too.
        let there = open_below(root, &path)
            .map_err(Into::into)
            .and_then(|fd| status(&fd));
        let same = |one: &Statx, other: &Statx| {
            let of = |s: &Statx| (s.stx_dev_major, s.stx_dev_minor, s.stx_ino, s.stx_mnt_id);
            of(one) == of(other)
        };
        match (own, there) {
            (Ok(own), Ok(there)) if same(&own, &there) => Ok(NodeState {
                id,
                export: node.export,
                path,
                lookups: node.lookups,
                device: state.nodes.device_of(node),
                mark: Mark::of(&own),
            }),
            _ => {
                let path = path.strip_suffix(b" (deleted)").unwrap_or(&path);
                Err(Unsaveable(format!(
                    "{} was removed, or lost the name it was opened by, and is still in use",
                    Name(&export, path)
                )))
            }
        }
    }

    /// The path of `fd` from `root` on, as the kernel has it.
    fn path_below(&self, root: &OwnedFd, fd: &OwnedFd) -> Result<Vec<u8>, Errno> {
        let path = |fd| rustix::fs::readlinkat(self.descriptors(), own_name(fd), Vec::new());
        let (root, path) = (path(root)?, path(fd)?);
        let root = root.to_bytes();
        let root = root.strip_suffix(b"/").unwrap_or(root);
        let below = path.to_bytes().strip_prefix(root).ok_or(Errno::XDEV)?;
        Ok(below.strip_prefix(b"/").unwrap_or(below).to_vec())
    }

    /// Knows from here on what the guest knows, or says what stands against it.
    pub(super) fn take_up(&self, saved: &Mount) -> Result<(), String> {
        match (saved, self.role()) {
            (Mount::Own(saved), FsRole::Own) => self.go_on(saved),
            (Mount::Template(saved), FsRole::Copy) => self.take_over(saved),
            (Mount::Own(_), _) => Err("it was saved to go on with its own files".to_owned()),
            (Mount::Template(_), _) => Err("it was saved to be copied".to_owned()),
        }
    }

    fn go_on(&self, saved: &MountState) -> Result<(), String> {
        let exports = self.names();
        if exports != saved.exports {
            return Err(format!("it showed {:?}, not {exports:?}", saved.exports));
        }
        if saved.next_node > MOST_GIVEN || saved.next_handle > MOST_GIVEN {
            return Err("it leaves no numbers for further files".to_owned());
        }
        self.unmount();
        let mut state = self.lock();
        for node in &saved.nodes {
            self.put_node_back(&mut state, node)?;
        }
        for handle in &saved.handles {
            self.put_handle_back(&mut state, handle)?;
        }
        for &shown in &saved.shown {
            self.map_again(&mut state, shown)
                .map_err(|error| format!("a file can't be mapped again: {error}"))?;
        }
        state.nodes.go_on_from(saved.next_node);
        state.files.go_on_from(saved.next_handle);
        state.terms = Some(saved.terms);
        Ok(())
    }

    /// The names of each export, in their order.
    fn names(&self) -> Vec<Vec<String>> {
        let exports = self.exports();
        let names = exports.iter().flatten().map(|export| export.names.clone());
        names.collect()
    }

    fn put_node_back(&self, state: &mut State, saved: &NodeState) -> Result<(), String> {
        let damaged = |errno: Errno| format!("its files don't belong together: {errno}");
        let export = self.export(saved.export).map_err(damaged)?;
        if saved.id <= ROOT {
            return Err(damaged(Errno::INVAL));
        }
        let name = Name(&export, &saved.path);
        let root = &state.nodes.get(export.root).map_err(damaged)?.fd;
        let is_socket = saved.mark.kind() == FileType::Socket;
        let is_copy = export.known_by == KnownBy::Content && !export.read_only;
        let opened = match open_below(root, &saved.path) {
            Err(Errno::NOENT) if is_socket && is_copy => make_socket(root, &saved.path, saved.mark),
            opened => opened,
        };
        let fd = opened.map_err(|errno| match errno {
            Errno::NOENT | Errno::NOTDIR => format!("{name} is gone"),
            errno => format!("{name} can't be opened: {errno}"),
        })?;
        let now = status(&fd).map_err(|error| format!("{name} can't be looked at: {error}"))?;
        if let Some(difference) = saved.mark.differs(Mark::of(&now), export.known_by) {
            return Err(format!("{name} is not what it was: {difference}"));
        }
        let nodes = &mut state.nodes;
        nodes
            .put_back(saved.id, saved.export, fd, saved.lookups, saved.device)
            .map_err(|error| format!("{name} can't be taken up again: {error}"))
    }

    fn put_handle_back(&self, state: &mut State, saved: &HandleState) -> Result<(), String> {
        let put = || {
            let flags = OFlags::from_bits_retain(saved.flags) & KEPT_FLAGS;
            let node = match flags & OFlags::RWMODE {
                OFlags::RDONLY => state.nodes.get(saved.node)?,
                _ => state.changeable(self, saved.node)?,
            };
            let mut open = OpenFile::new(saved.node, self.reopen(node, flags)?);
            if saved.appends {
                rustix::fs::fcntl_setfl(&open.file, OFlags::APPEND)?;
                open.appends = true;
            }
            Ok::<_, std::io::Error>(open)
        };
        let open = put();
        open.and_then(|open| Ok(state.files.put_back(saved.handle, open)?))
            .map_err(|error| format!("an open file can't be opened again: {error}"))
    }
}

fn save_handle(handle: u64, open: &OpenFile) -> Result<HandleState, Unsaveable> {
    let flags = rustix::fs::fcntl_getfl(&open.file)
        .map_err(|errno| Unsaveable(format!("an open file can't be looked at: {errno}")))?;
    Ok(HandleState {
        handle,
        node: open.node,
        flags: (flags & KEPT_FLAGS).bits(),
        appends: open.appends,
    })
}
