//! Open files: those the guest holds handles of, and a few that are kept open
//! for a guest that reads and writes without opening.
//!
//! Owns the descriptors that contents go through. Refuses handles that belong
//! to another inode, and more handles than its limit.

use std::collections::{HashMap, VecDeque};
use std::fs::File;

use rustix::io::Errno;

/// Files kept open for reads and writes that come without a handle.
const KEPT_OPEN: usize = 16;

#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) node: u64,
    pub(super) file: File,
    /// The descriptor has `O_APPEND` now; it follows the guest's flags.
    pub(super) appends: bool,
}

impl OpenFile {
    pub(super) fn new(node: u64, file: File) -> Self {
        Self {
            node,
            file,
            appends: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Files {
    handles: HashMap<u64, OpenFile>,
    next_handle: u64,
    limit: usize,
    kept: VecDeque<(bool, OpenFile)>,
}

impl Files {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            handles: HashMap::new(),
            next_handle: 1,
            limit,
            kept: VecDeque::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.handles.len()
    }

    /// Every file that the guest has a handle of, and the next handle.
    pub(super) fn all(&self) -> (impl Iterator<Item = (u64, &OpenFile)>, u64) {
        let all = self.handles.iter().map(|(handle, open)| (*handle, open));
        (all, self.next_handle)
    }

    /// Has handles given out from here on.
    pub(super) fn go_on_from(&mut self, next_handle: u64) {
        self.next_handle = self.next_handle.max(next_handle);
    }

    /// Takes a file under the handle that the guest knows it by.
    ///
    /// # Errors
    /// `EEXIST` for a handle twice, `ENFILE` at the limit.
    pub(super) fn put_back(&mut self, handle: u64, open: OpenFile) -> Result<(), Errno> {
        self.check_room()?;
        match self.handles.insert(handle, open) {
            None => Ok(()),
            Some(_) => Err(Errno::EXIST),
        }
    }

    /// # Errors
    /// `ENFILE` when the guest has as many handles as it may.
    pub(super) fn check_room(&self) -> Result<(), Errno> {
        if self.handles.len() < self.limit {
            Ok(())
        } else {
            Err(Errno::NFILE)
        }
    }

    /// Gives out a handle.
    pub(super) fn insert(&mut self, open: OpenFile) -> u64 {
        let handle = self.next_handle;
        self.next_handle += 1;
        self.handles.insert(handle, open);
        handle
    }

    /// # Errors
    /// `EBADF` when `handle` isn't one of `node`.
    pub(super) fn get(&mut self, node: u64, handle: u64) -> Result<&mut OpenFile, Errno> {
        self.handles
            .get_mut(&handle)
            .filter(|open| open.node == node)
            .ok_or(Errno::BADF)
    }

    /// # Errors
    /// As [`Files::get`].
    pub(super) fn release(&mut self, node: u64, handle: u64) -> Result<(), Errno> {
        self.get(node, handle)?;
        self.handles.remove(&handle);
        Ok(())
    }

    /// The file kept open for a node, opened by `open` if there is none.
    pub(super) fn kept(
        &mut self,
        node: u64,
        writable: bool,
        open: impl FnOnce() -> std::io::Result<File>,
    ) -> std::io::Result<&mut OpenFile> {
        let known = self
            .kept
            .iter()
            .position(|(w, kept)| kept.node == node && (*w || !writable));
        let index = match known {
            Some(index) => index,
            None => {
                let open = OpenFile::new(node, open()?);
                if writable {
                    self.forget(node);
                }
                self.kept.truncate(KEPT_OPEN - 1);
                self.kept.push_front((writable, open));
                0
            }
        };
        self.kept
            .get_mut(index)
            .map(|(_, open)| open)
            .ok_or_else(|| Errno::BADF.into())
    }

    #[cfg(test)]
    pub(super) fn kept_open(&self) -> usize {
        self.kept.len()
    }

    /// Keeps nothing open for a node: it is forgotten, or about to change other than
    /// through a kept file. On an overlay, a file opened before its first change goes on
    /// showing what it was.
    pub(super) fn forget(&mut self, node: u64) {
        self.kept.retain(|(_, open)| open.node != node);
    }

    /// Closes all that is open of a node, whose handles are nobody's from now on.
    pub(super) fn close_all(&mut self, node: u64) {
        self.handles.retain(|_, open| open.node != node);
        self.forget(node);
    }

    pub(super) fn clear(&mut self) {
        self.handles.clear();
        self.kept.clear();
    }
}
