//! Files of which the guest sees the host's own pages: `FUSE_SETUPMAPPING` and
//! `FUSE_REMOVEMAPPING` (virtio 1.3 §5.11.6.5), on a [`Window`].
//!
//! Owns what each chunk of the window shows. Refuses everything but reading of files that never
//! change: a page that is gone when the guest looks ends the guest, and what the guest wrote
//! would go past every check of the file server's. Which files those are is said to the guest at
//! each look at them (`FUSE_ATTR_DAX`), and holds whatever it then asks for.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{FUSE_ATTR_DAX, stat64};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::nodes::{Node, status};
use super::tree::{Export, State, Tree};
use crate::memory::Window;

/// Files smaller than this are read: each that is shown takes a chunk of the window.
pub(super) const LEAST_BYTES: i64 = 64 << 10;

/// Chunks are 2 to the power of this, as `FUSE_INIT` tells the guest.
pub(super) const ALIGNMENT: u16 = Window::CHUNK.ilog2() as u16;

/// `FUSE_SETUPMAPPING_FLAG_READ`; the other one is that for writing.
const READ: u64 = 1 << 1;

/// The node of a chunk that shows zeros: no file has this number.
const NOBODY: u64 = 0;

/// No handle: the node alone says which file it is.
const NO_HANDLE: u64 = u64::MAX;

/// `struct fuse_setupmapping_in`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) flags: u64,
    pub(super) place: u64,
}

impl Wanted {
    pub(super) fn of(bytes: &[u8; 40]) -> Self {
        let [handle, offset, length, flags, place] =
            std::array::from_fn(|index| match bytes.as_chunks().0.get(index) {
                Some(word) => u64::from_le_bytes(*word),
                None => 0,
            });
        Self {
            handle,
            offset,
            length,
            flags,
            place,
        }
    }
}

/// What a chunk shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Shown {
    /// Which chunk.
    index: usize,
    pub(super) node: u64,
    offset: u64,
}

/// The window, and what each chunk of it shows.
#[derive(Debug)]
pub(super) struct Dax {
    window: Arc<Window>,
    chunks: Vec<Option<Shown>>,
}

impl Dax {
    pub(super) fn new(window: Arc<Window>) -> Self {
        let count = usize::try_from(window.length() / Window::CHUNK).unwrap_or(0);
        Self {
            window,
            chunks: vec![None; count],
        }
    }

    /// All files that are shown, in the order of the chunks.
    pub(super) fn all(&self) -> Vec<Shown> {
        let shown = self.chunks.iter().flatten();
        shown
            .filter(|shown| shown.node != NOBODY)
            .copied()
            .collect()
    }

    /// The chunks of a range of bytes of the window.
    ///
    /// # Errors
    /// `EINVAL` for one that isn't in it, is empty or no whole number of chunks.
    fn indices(&self, place: u64, length: u64) -> Result<Range<usize>, Errno> {
        let end = place.checked_add(length).ok_or(Errno::INVAL)?;
        let whole = place.is_multiple_of(Window::CHUNK) && length.is_multiple_of(Window::CHUNK);
        if !whole || length == 0 || end > self.window.length() {
            return Err(Errno::INVAL);
        }
        let index = |place| usize::try_from(place / Window::CHUNK).map_err(|_| Errno::INVAL);
        Ok(index(place)?..index(end)?)
    }

    /// Shows nothing in these chunks any more.
    fn clear(&mut self, indices: Range<usize>) -> io::Result<()> {
        let window = &self.window;
        for shown in self.chunks.get_mut(indices).unwrap_or_default() {
            if let Some(Shown { index, .. }) = *shown {
                window.clear(&bytes(index))?;
                *shown = None;
            }
        }
        Ok(())
    }

    /// Shows nothing at all.
    pub(super) fn clear_all(&mut self) {
        // A range of our own: the host has no reason to refuse, and the guest no way to look
        // before it shows something else there.
        let _ = self.clear(0..self.chunks.len());
    }

    /// The guest has forgotten a file.
    pub(super) fn forget(&mut self, node: u64) {
        for index in 0..self.chunks.len() {
            if matches!(self.chunks.get(index), Some(Some(shown)) if shown.node == node) {
                let _ = self.clear(index..index + 1);
            }
        }
    }

    /// A file was taken from the guest, which may still look at it, and has done no wrong.
    pub(super) fn blank(&mut self, node: u64) {
        for shown in &mut self.chunks {
            if let Some(Shown { index, .. }) = shown.filter(|shown| shown.node == node) {
                let _ = self.window.blank(&bytes(index));
                *shown = Some(Shown {
                    index,
                    node: NOBODY,
                    offset: 0,
                });
            }
        }
    }

    /// Shows `file`, which has `size` bytes, from `offset` on in some chunks.
    fn show(
        &mut self,
        indices: Range<usize>,
        node: u64,
        file: &File,
        offset: u64,
        size: u64,
    ) -> io::Result<()> {
        let place = bytes(indices.start).start;
        let length = bytes(indices.end).start - place;
        let left = size.checked_sub(offset).filter(|left| *left > 0);
        let left = left.ok_or(Errno::INVAL)?;
        self.clear(indices.clone())?;
        self.window.show(place, file, offset, length.min(left))?;
        let shown = |(index, offset)| Shown {
            index,
            node,
            offset,
        };
        let all = indices.clone().zip((offset..).step_by(CHUNK_STEP));
        for (chunk, new) in (self.chunks.get_mut(indices).unwrap_or_default().iter_mut()).zip(all) {
            // What begins beyond the file's end shows nothing.
            *chunk = Some(shown(new)).filter(|new| new.offset < size);
        }
        Ok(())
    }
}

const CHUNK_STEP: usize = Window::CHUNK as usize;

/// Where a chunk lies in the window.
fn bytes(index: usize) -> Range<u64> {
    let start = index as u64 * Window::CHUNK;
    start..start + Window::CHUNK
}

impl Tree {
    /// What the guest is told of a file beside its attributes.
    pub(super) fn flags_of(&self, export: &Export, attributes: &stat64) -> u32 {
        let is_shown = self.has_window()
            && export.immutable
            && FileType::from_raw_mode(attributes.st_mode) == FileType::RegularFile
            && attributes.st_size >= LEAST_BYTES;
        if is_shown { FUSE_ATTR_DAX } else { 0 }
    }

    /// `FUSE_SETUPMAPPING`.
    pub(super) fn set_up_mapping(&self, id: u64, wanted: Wanted) -> io::Result<()> {
        let mut state = self.lock();
        let indices = {
            let dax = state.dax.as_ref().ok_or(Errno::NOSYS)?;
            dax.indices(wanted.place, wanted.length)?
        };
        if wanted.flags != READ {
            return Err(Errno::ACCESS.into());
        }
        let ends = wanted.offset.checked_add(wanted.length);
        if !wanted.offset.is_multiple_of(Window::CHUNK) || ends.is_none() {
            return Err(Errno::INVAL.into());
        }
        if wanted.handle != NO_HANDLE {
            state.files.get(id, wanted.handle)?;
        }
        let (file, size) = self.unchanging(state.nodes.get(id)?)?;
        let dax = state.dax.as_mut().ok_or(Errno::NOSYS)?;
        dax.show(indices, id, &file, wanted.offset, size)
    }

    /// A file to be shown, and its size, which is its size for ever.
    fn unchanging(&self, node: &Node) -> io::Result<(File, u64)> {
        let status = status(&node.fd)?;
        if !self.export(node.export)?.immutable || node.kind != FileType::RegularFile {
            return Err(Errno::ACCESS.into());
        }
        Ok((self.reopen(node, OFlags::RDONLY)?, status.stx_size))
    }

    /// `FUSE_REMOVEMAPPING`, of all or none of `ranges`: places and lengths. To show nothing where
    /// nothing is shown is no error.
    pub(super) fn remove_mappings(&self, ranges: &[(u64, u64)]) -> io::Result<()> {
        let mut state = self.lock();
        let dax = state.dax.as_mut().ok_or(Errno::NOSYS)?;
        let indices = ranges
            .iter()
            .map(|&(place, length)| dax.indices(place, length))
            .collect::<Result<Vec<_>, _>>()?;
        indices.into_iter().try_for_each(|range| dax.clear(range))
    }

    /// How many ranges one request may take away.
    pub(super) fn most_ranges(&self) -> usize {
        self.lock().dax.as_ref().map_or(0, |dax| dax.chunks.len())
    }

    /// Shows again what was shown when the guest was saved.
    pub(super) fn map_again(&self, state: &mut State, saved: Shown) -> io::Result<()> {
        let (file, size) = self.unchanging(state.nodes.get(saved.node)?)?;
        let dax = state.dax.as_mut().ok_or(Errno::NOSYS)?;
        if saved.index >= dax.chunks.len() || !saved.offset.is_multiple_of(Window::CHUNK) {
            return Err(Errno::INVAL.into());
        }
        let indices = saved.index..saved.index + 1;
        dax.show(indices, saved.node, &file, saved.offset, size)
    }
}
