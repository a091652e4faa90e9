//! Layers: from tar bytes that strangers wrote to a directory that overlayfs can use.
//!
//! Owns: reading tar, the caps, and every file made from it, strictly beneath one directory.
//! Refuses: everything else of the host; it follows no link out of that directory and trusts no
//! length.

mod entry;
mod error;
mod extended;
mod path;
mod sparse;
mod stream;
mod tar;
mod tree;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

pub use error::UnpackError;

use crate::digest::Digest;

/// What a layer may cost. Each is checked while unpacking, not after.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the uncompressed tar, and of the files it makes (holes included).
    pub layer_bytes: u64,
    /// Entries of one layer.
    pub entries: u64,
    /// Uncompressed bytes for each compressed one, beyond `ratio_free_bytes`.
    pub ratio: u64,
    /// Uncompressed bytes that may come at any ratio.
    pub ratio_free_bytes: u64,
    /// Bytes of one path or link target, as `PATH_MAX`.
    pub path_bytes: usize,
    /// Components of one path.
    pub depth: usize,
    /// Bytes of the extended attributes of one entry together.
    pub xattr_bytes: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            layer_bytes: 64 << 30,
            entries: 2_000_000,
            ratio: 1000,
            ratio_free_bytes: 256 << 20,
            path_bytes: 4096,
            depth: 255,
            xattr_bytes: 64 << 10,
        }
    }
}

/// One layer to unpack.
pub(crate) struct Job<'a> {
    /// What the uncompressed tar must hash to, when that is known.
    pub(crate) diff_id: Option<&'a Digest>,
    /// Directories of the layers below, base first: a directory that this layer uses without
    /// describing it gets its attributes from there.
    pub(crate) below: &'a [PathBuf],
    pub(crate) limits: &'a Limits,
    /// Told the compressed bytes consumed so far, now and then.
    pub(crate) report: &'a dyn Fn(u64),
}

/// Unpacks the layer `blob` into the empty directory `target`, which is in overlayfs's form then.
/// On failure `target` holds part of the layer: the caller deletes it.
pub(crate) fn unpack(blob: File, target: &Path, job: &Job<'_>) -> Result<(), UnpackError> {
    let tree = tree::Tree::open(target, job.below, job.limits)?;
    let mut maker = entry::Maker::new(tree, job.limits)?;
    let mut archive = {
        let stream = stream::Stream::open(Box::new(blob), job.limits, job.report)?;
        tar::Archive::new(stream, job.limits)
    };
    while let Some(entry) = archive.next_entry()? {
        maker.make(&entry, &mut archive)?;
    }
    maker.finish()?;
    // What follows the end marker belongs to the digest, and to nothing else.
    let actual = archive.into_source().finish()?;
    match job.diff_id {
        Some(expected) if *expected != actual => Err(UnpackError::DiffId {
            expected: expected.clone(),
            actual,
        }),
        _ => Ok(()),
    }
}

/// What a file of an archive is to those who only want its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MemberKind {
    File,
    Symlink,
    HardLink,
    Other,
}

/// A file of an archive.
pub(crate) struct Member {
    pub(crate) name: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) kind: MemberKind,
}

/// The files of a tarball that is no layer, one after the other, under the same caps.
pub(crate) struct Entries<'a> {
    archive: tar::Archive<'a, stream::Stream<'a>>,
    limits: &'a Limits,
    seen: u64,
}

impl<'a> Entries<'a> {
    pub(crate) fn open(
        source: Box<dyn Read + 'a>,
        limits: &'a Limits,
        report: &'a dyn Fn(u64),
    ) -> Result<Self, UnpackError> {
        let stream = stream::Stream::open(source, limits, report)?;
        Ok(Self {
            archive: tar::Archive::new(stream, limits),
            limits,
            seen: 0,
        })
    }

    /// The next file. Sparse files, which no tool writes here, count as `Other`.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, UnpackError> {
        let Some(entry) = self.archive.next_entry()? else {
            return Ok(None);
        };
        self.seen += 1;
        if self.seen > self.limits.entries {
            let text = format!("more than {} files", self.limits.entries);
            return Err(UnpackError::Limit(text));
        }
        if entry.name.len().max(entry.link.len()) > self.limits.path_bytes {
            let text = format!("a name of more than {} bytes", self.limits.path_bytes);
            return Err(UnpackError::Limit(text));
        }
        let kind = match (entry.kind, entry.segments) {
            (tar::Kind::File, None) => MemberKind::File,
            (tar::Kind::Symlink, _) => MemberKind::Symlink,
            (tar::Kind::HardLink, _) => MemberKind::HardLink,
            _ => MemberKind::Other,
        };
        Ok(Some(Member {
            name: entry.name,
            link: entry.link,
            kind,
        }))
    }

    /// Reads some of the present file's data; 0 at its end.
    pub(crate) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize, UnpackError> {
        self.archive.read_data(buffer)
    }
}

/// Deletes a directory and all below it, following nothing.
pub(crate) fn remove_tree(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
