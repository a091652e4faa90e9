//! A tarball of images, read once from front to back.
//!
//! Owns: staging its files under made-up names, hashed on the way, and resolving its names among
//! themselves. Refuses: writing anywhere by a name from the archive. Archives come in any order
//! (`docker save` writes the list of images last), so all is staged before any of it is used.

use std::collections::BTreeMap;
use std::io::{Read, Write as _};

use tempfile::TempPath;

use super::bundle::{Brought, Bundle, check, compression_of};
use super::{LoadError, Result};
use crate::digest::{Digest, Hasher};
use crate::manifest::{self, Compression};
use crate::store::{ImageStore, StoreError};
use crate::unpack::{Entries, Limits, Member, MemberKind, UnpackError};

/// Most files of one archive.
const MAX_FILES: u64 = 100_000;
/// How many links may lead from one name to the next (old `docker save` shares layers so).
const MAX_LINKS: usize = 16;

struct Staged {
    path: TempPath,
    digest: Digest,
    size: u64,
    compression: Compression,
}

enum File {
    Staged(Staged),
    /// The name that it stands for.
    Link(String),
}

/// A tarball whose files are staged in the store's ingest directory, and gone when it is dropped.
pub(super) struct Archive<'s> {
    store: &'s ImageStore,
    what: String,
    files: BTreeMap<String, File>,
}

impl<'s> Archive<'s> {
    pub(super) fn read(
        store: &'s ImageStore,
        source: Box<dyn Read + '_>,
        what: &str,
    ) -> Result<Self> {
        let layer = store.limits();
        // Several layers of the largest size; what does not fit the disk ends with that error.
        let limits = Limits {
            layer_bytes: layer.layer_bytes.saturating_mul(16),
            entries: MAX_FILES,
            ..layer.clone()
        };
        let wrong = |source: UnpackError| LoadError::Tar {
            what: what.to_owned(),
            source,
        };
        let _hold = store.hold().map_err(|source| LoadError::Store {
            what: what.to_owned(),
            source,
        })?;
        let mut archive = Self {
            store,
            what: what.to_owned(),
            files: BTreeMap::new(),
        };
        let silent = |_| {};
        let mut entries = Entries::open(source, &limits, &silent).map_err(wrong)?;
        while let Some(member) = entries.next().map_err(wrong)? {
            let Member { name, link, kind } = member;
            let name = clean(&name, "");
            let file = match kind {
                MemberKind::File => File::Staged(archive.stage(&mut entries)?),
                // A symbolic link is relative to its own directory, a hard link to the root.
                MemberKind::Symlink => {
                    let directory = name.rsplit_once('/').map_or("", |(directory, _)| directory);
                    File::Link(clean(&link, directory))
                }
                MemberKind::HardLink => File::Link(clean(&link, "")),
                MemberKind::Other => continue,
            };
            archive.files.insert(name, file);
        }
        if archive.files.is_empty() {
            return Err(archive.broken("it is not a tarball, or an empty one".to_owned()));
        }
        Ok(archive)
    }

    fn stage(&self, entries: &mut Entries<'_>) -> Result<Staged> {
        let directory = self.store.root().join("ingest");
        let failed = |source| {
            let (action, path) = ("write a file of the archive in", directory.clone());
            self.stored(StoreError::Io {
                action,
                path,
                source,
            })
        };
        let mut file = tempfile::Builder::new()
            .prefix("stage-")
            .tempfile_in(&directory)
            .map_err(failed)?;
        let mut hasher = Hasher::default();
        let mut size = 0;
        let mut start = Vec::new();
        let mut buffer = vec![0; 256 * 1024];
        loop {
            let count = entries
                .read_data(&mut buffer)
                .map_err(|source| LoadError::Tar {
                    what: self.what.clone(),
                    source,
                })?;
            if count == 0 {
                break;
            }
            let chunk = &buffer[..count];
            start.extend(chunk.iter().take(4_usize.saturating_sub(start.len())));
            hasher.update(chunk);
            file.write_all(chunk).map_err(failed)?;
            size += count as u64;
        }
        let compression = compression_of(&start);
        Ok(Staged {
            path: file.into_temp_path(),
            digest: hasher.finish(),
            size,
            compression,
        })
    }

    /// The name of the file that `name` stands for.
    fn resolve(&self, name: &str) -> Option<String> {
        let mut name = clean(name.as_bytes(), "");
        for _ in 0..MAX_LINKS {
            match self.files.get(&name)? {
                File::Staged(_) => return Some(name),
                File::Link(target) => name = target.clone(),
            }
        }
        None
    }

    fn staged(&self, name: &str) -> Option<&Staged> {
        match self.files.get(&self.resolve(name)?)? {
            File::Staged(staged) => Some(staged),
            File::Link(_) => None,
        }
    }
}

impl Bundle for Archive<'_> {
    fn what(&self) -> String {
        self.what.clone()
    }

    fn read_small(&mut self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(staged) = self.staged(name) else {
            return Ok(None);
        };
        if staged.size > manifest::MAX_BYTES {
            let reason = format!("{name:?} is larger than {} bytes", manifest::MAX_BYTES);
            return Err(self.broken(reason));
        }
        let read = std::fs::read(&staged.path);
        read.map(Some).map_err(|source| LoadError::Read {
            path: staged.path.to_path_buf(),
            source,
        })
    }

    fn bring(&mut self, name: &str, expected: Option<(&Digest, u64)>) -> Result<Brought> {
        let staged = self
            .staged(name)
            .ok_or_else(|| self.broken(format!("{name:?} is missing")))?;
        check(expected, &staged.digest, staged.size).map_err(|error| self.stored(error))?;
        let Staged {
            path,
            digest,
            size,
            compression,
        } = staged;
        self.store
            .adopt(path, digest)
            .map_err(|error| self.stored(error))?;
        Ok(Brought {
            digest: digest.clone(),
            size: *size,
            compression: *compression,
        })
    }
}

/// A name within the archive, from the directory `base`: no leading slash, no `.`, and `..` taken
/// by the letter. It is a key only.
fn clean(name: &[u8], base: &str) -> String {
    let text = String::from_utf8_lossy(name);
    let absolute = text.starts_with('/');
    let mut parts: Vec<&str> = match absolute {
        true => Vec::new(),
        false => base.split('/').filter(|part| !part.is_empty()).collect(),
    };
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_keys() {
        assert_eq!(clean(b"./a/b", ""), "a/b");
        assert_eq!(clean(b"/a/b/", "x"), "a/b");
        assert_eq!(clean(b"../other/layer.tar", "id"), "other/layer.tar");
        assert_eq!(clean(b"../../../etc/passwd", "id"), "etc/passwd");
        assert_eq!(clean(b"", ""), "");
    }
}
