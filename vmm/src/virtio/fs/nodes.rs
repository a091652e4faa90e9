//! The inodes a guest knows, by the numbers it was given for them.
//!
//! Owns one `O_PATH` descriptor per remembered inode, and the count of times
//! the guest was told of it. Numbers are never used twice. Refuses numbers it
//! didn't give, and to remember more than its limit.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;

use fuse_backend_rs::abi::fuse_abi::{Attr, stat64};
use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;

/// The number of the pseudo root, which holds the exports (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;

/// The pseudo root's inode number as the guest's users see it: out of the way
/// of every file system's own.
const ROOT_INO: u64 = 1 << 63 | 1;

/// What makes two looks at a file the same file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    export: usize,
    device: (u32, u32),
    mount: u64,
    ino: u64,
}

/// As many file systems as can be told apart by [`Nodes::visible_ino`].
const MAX_DEVICES: usize = 1 << 15;
/// A file system of which no file is left.
const NO_DEVICE: (u32, u32) = (u32::MAX, u32::MAX);

impl Identity {
    fn of(export: usize, status: &Statx) -> Self {
        Self {
            export,
            device: (status.stx_dev_major, status.stx_dev_minor),
            mount: status.stx_mnt_id,
            ino: status.stx_ino,
        }
    }
}

#[derive(Debug)]
pub(super) struct Node {
    /// Index of the export it was reached through.
    pub(super) export: usize,
    /// Opened with `O_PATH`: good for names and attributes, not for contents.
    pub(super) fd: OwnedFd,
    pub(super) kind: FileType,
    identity: Identity,
    /// How often the guest was told of it, beyond what it has forgotten.
    pub(super) lookups: u64,
    pinned: bool,
}

/// A file just looked at, see [`Nodes::remember`].
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    pub(super) id: u64,
    pub(super) kind: FileType,
    pub(super) attributes: stat64,
}

#[derive(Debug)]
pub(super) struct Nodes {
    by_id: HashMap<u64, Node>,
    by_identity: HashMap<Identity, u64>,
    devices: Vec<(u32, u32)>,
    next_id: u64,
    limit: usize,
}

impl Nodes {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            by_id: HashMap::new(),
            by_identity: HashMap::new(),
            devices: Vec::new(),
            next_id: ROOT + 1,
            limit,
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Every node with its number, and the next number.
    pub(super) fn all(&self) -> (impl Iterator<Item = (u64, &Node)>, u64) {
        let all = self.by_id.iter().map(|(id, node)| (*id, node));
        (all, self.next_id)
    }

    /// Has numbers given out from here on.
    pub(super) fn go_on_from(&mut self, next_id: u64) {
        self.next_id = self.next_id.max(next_id);
    }

    /// The place of a node's file system among those that have been seen.
    pub(super) fn device_of(&self, node: &Node) -> Option<usize> {
        let same = |known: &(u32, u32)| *known == node.identity.device;
        self.devices.iter().position(same)
    }

    /// Remembers the inode behind `fd` under the number that the guest knows it by, and what file
    /// system it was on among those seen; an export's own directory must have this number already.
    ///
    /// # Errors
    /// `EEXIST` for a number twice, `ENOMEM` at the limit; what `statx(2)` says.
    pub(super) fn put_back(
        &mut self,
        id: u64,
        export: usize,
        fd: OwnedFd,
        lookups: u64,
        device: Option<usize>,
    ) -> io::Result<()> {
        let status = status(&fd)?;
        let identity = Identity::of(export, &status);
        if let Some(index) = device.filter(|index| *index < MAX_DEVICES) {
            let fresh = self.devices.len().max(index + 1);
            self.devices.resize(fresh, NO_DEVICE);
            if let Some(known) = self.devices.get_mut(index) {
                *known = identity.device;
            }
        }
        if let Some(node) = self.by_id.get_mut(&id) {
            if !node.pinned || node.identity != identity {
                return Err(Errno::EXIST.into());
            }
            node.lookups = lookups;
            return Ok(());
        }
        if self.is_full() {
            return Err(Errno::NOMEM.into());
        }
        self.by_identity.insert(identity, id);
        self.by_id.insert(
            id,
            Node {
                export,
                fd,
                kind: FileType::from_raw_mode(status.stx_mode.into()),
                identity,
                lookups,
                pinned: false,
            },
        );
        Ok(())
    }

    /// The node with this number.
    ///
    /// # Errors
    /// `EBADF` for numbers that aren't, or no longer, given out.
    pub(super) fn get(&self, id: u64) -> Result<&Node, Errno> {
        self.by_id.get(&id).ok_or(Errno::BADF)
    }

    /// No further inode can be remembered.
    pub(super) fn is_full(&self) -> bool {
        self.by_id.len() >= self.limit
    }

    /// Remembers the inode behind `fd` and counts that the guest is told of it.
    ///
    /// # Errors
    /// `ENOMEM` at the limit; what `statx(2)` says.
    pub(super) fn remember(&mut self, export: usize, fd: OwnedFd) -> io::Result<Seen> {
        let status = status(&fd)?;
        let kind = FileType::from_raw_mode(status.stx_mode.into());
        let identity = Identity::of(export, &status);
        let id = match self.by_identity.get(&identity) {
            Some(id) => *id,
            None if self.is_full() => return Err(Errno::NOMEM.into()),
            None => self.insert(Node {
                export,
                fd,
                kind,
                identity,
                lookups: 0,
                pinned: false,
            }),
        };
        self.tell(id);
        Ok(Seen {
            id,
            kind,
            attributes: self.attributes(&status),
        })
    }

    /// Remembers an export's own directory for as long as it is one, beside all others.
    pub(super) fn pin(&mut self, export: usize, fd: OwnedFd) -> io::Result<u64> {
        self.limit += 1;
        let seen = self.remember(export, fd).inspect_err(|_| self.limit -= 1)?;
        if let Some(node) = self.by_id.get_mut(&seen.id) {
            node.pinned = true;
            node.lookups = 0;
        }
        Ok(seen.id)
    }

    /// Counts that the guest is told of a node.
    pub(super) fn tell(&mut self, id: u64) {
        if let Some(node) = self.by_id.get_mut(&id) {
            node.lookups = node.lookups.saturating_add(1);
        }
    }

    fn insert(&mut self, node: Node) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.by_identity.insert(node.identity, id);
        self.by_id.insert(id, node);
        id
    }

    /// The guest forgets `count` times that it was told of a node; `true` when
    /// nothing of it is left.
    pub(super) fn forget(&mut self, id: u64, count: u64) -> bool {
        let Some(node) = self.by_id.get_mut(&id) else {
            return false;
        };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 || node.pinned {
            return false;
        }
        self.by_identity.remove(&node.identity);
        self.by_id.remove(&id);
        true
    }

    /// Whether `directory` is the one that the node `id` is, whatever way led to it.
    pub(super) fn is_at(&self, id: u64, directory: &OwnedFd) -> io::Result<bool> {
        let known = self.get(id)?.identity;
        let status = status(directory)?;
        let device = (status.stx_dev_major, status.stx_dev_minor);
        Ok((known.device, known.ino) == (device, status.stx_ino))
    }

    /// Forgets all that was reached through an export; what that was.
    pub(super) fn drop_export(&mut self, export: usize) -> Vec<u64> {
        let gone = self.by_id.extract_if(|_, node| node.export == export);
        let gone: Vec<(u64, Node)> = gone.collect();
        self.limit -= gone.iter().filter(|(_, node)| node.pinned).count();
        for (_, node) in &gone {
            self.by_identity.remove(&node.identity);
        }
        gone.into_iter().map(|(id, _)| id).collect()
    }

    /// Forgets all but the exports' own directories.
    pub(super) fn clear(&mut self) {
        self.by_id.retain(|_, node| node.pinned);
        self.by_id.values_mut().for_each(|node| node.lookups = 0);
        self.by_identity.retain(|_, id| self.by_id.contains_key(id));
    }

    /// The attributes of a node, as of now.
    pub(super) fn attributes_of(&mut self, id: u64) -> io::Result<stat64> {
        let status = status(&self.get(id)?.fd)?;
        Ok(self.attributes(&status))
    }

    /// The number a file has in the guest: its own, unless files of several
    /// host file systems meet in one export tree.
    pub(super) fn visible_ino(&mut self, device: (u32, u32), ino: u64) -> u64 {
        let index = self
            .devices
            .iter()
            .position(|known| *known == device)
            .unwrap_or_else(|| {
                self.devices.push(device);
                self.devices.len() - 1
            });
        ino ^ ((index as u64 & 0x7fff) << 48)
    }

    /// As [`Nodes::visible_ino`], for an entry of the directory `id`.
    pub(super) fn visible_ino_in(&mut self, id: u64, ino: u64) -> u64 {
        match self.by_id.get(&id).map(|node| node.identity.device) {
            Some(device) => self.visible_ino(device, ino),
            None => ino,
        }
    }

    fn attributes(&mut self, status: &Statx) -> stat64 {
        let ino = self.visible_ino((status.stx_dev_major, status.stx_dev_minor), status.stx_ino);
        stat64::from(Attr {
            ino,
            size: status.stx_size,
            blocks: status.stx_blocks,
            atime: status.stx_atime.tv_sec.cast_unsigned(),
            mtime: status.stx_mtime.tv_sec.cast_unsigned(),
            ctime: status.stx_ctime.tv_sec.cast_unsigned(),
            atimensec: status.stx_atime.tv_nsec,
            mtimensec: status.stx_mtime.tv_nsec,
            ctimensec: status.stx_ctime.tv_nsec,
            mode: status.stx_mode.into(),
            nlink: status.stx_nlink,
            uid: status.stx_uid,
            gid: status.stx_gid,
            rdev: device_number(status.stx_rdev_major, status.stx_rdev_minor),
            blksize: status.stx_blksize,
            flags: 0,
        })
    }
}

/// The attributes of the pseudo root over `exports` directories.
pub(super) fn root_attributes(exports: usize) -> stat64 {
    stat64::from(Attr {
        ino: ROOT_INO,
        mode: libc::S_IFDIR | 0o555,
        nlink: u32::try_from(exports).unwrap_or(u32::MAX).saturating_add(2),
        blksize: 4096,
        ..Attr::default()
    })
}

pub(super) fn status(fd: &OwnedFd) -> io::Result<Statx> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    Ok(rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, wanted)?)
}

/// A device number in the 32 bits that FUSE has for it (`new_encode_dev` of Linux).
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}
