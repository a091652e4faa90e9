//! Operations on directories: opening them, and reading their names with or
//! without what the names stand for.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::MaybeUninit;

use fuse_backend_rs::api::filesystem::{DirEntry, Entry, OpenOptions};
use rustix::fs::{FileType, OFlags, RawDir, SeekFrom};
use rustix::io::Errno;

use super::files::OpenFile;
use super::nodes::{ROOT, root_attributes};
use super::tree::{State, Tree};

/// Bytes of names fetched from the host at once.
const BATCH_BYTES: usize = 16 * 1024;

/// Takes an entry; 0 when it has no room for it.
type Sink<'a> = &'a mut dyn FnMut(DirEntry<'_>, Entry) -> io::Result<usize>;

/// `FUSE_READDIR` and `FUSE_READDIRPLUS`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Listing {
    pub(super) handle: u64,
    pub(super) offset: u64,
    /// Tell what each name stands for, too.
    pub(super) plus: bool,
}

impl Tree {
    pub(super) fn open_directory(&self, id: u64) -> io::Result<(u64, OpenOptions)> {
        let mut state = self.lock();
        if state.no_opendir() {
            return Err(Errno::NOSYS.into());
        }
        if id == ROOT {
            return Ok((0, OpenOptions::empty()));
        }
        state.files.check_room()?;
        let node = state.nodes.get(id)?;
        let export = node.export;
        let directory = self.reopen(node, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok((
            state.files.insert(OpenFile::new(id, directory)),
            self.open_options(export, true)?,
        ))
    }

    pub(super) fn release_directory(&self, id: u64, handle: u64) -> io::Result<()> {
        if id == ROOT {
            Ok(())
        } else {
            self.release(id, handle)
        }
    }

    /// Hands out the entries of directory `id` from the listing's offset on.
    pub(super) fn list(&self, id: u64, listing: Listing, sink: Sink<'_>) -> io::Result<()> {
        let mut state = self.lock();
        if id == ROOT {
            return self.list_exports(&mut state, listing, sink);
        }
        let reopened;
        let directory = if state.no_opendir() {
            reopened = self.reopen(state.nodes.get(id)?, OFlags::RDONLY | OFlags::DIRECTORY)?;
            &reopened
        } else {
            reopened = state.files.get(id, listing.handle)?.file.try_clone()?;
            &reopened
        };
        i64::try_from(listing.offset).map_err(|_| Errno::INVAL)?;
        rustix::fs::seek(directory, SeekFrom::Start(listing.offset))?;
        self.list_names(&mut state, id, directory, listing.plus, sink)
    }

    fn list_names(
        &self,
        state: &mut State,
        id: u64,
        directory: &File,
        plus: bool,
        sink: Sink<'_>,
    ) -> io::Result<()> {
        let mut buffer = [const { MaybeUninit::uninit() }; BATCH_BYTES];
        let mut names = RawDir::new(directory, &mut buffer);
        let mut told = 0;
        while let Some(name) = names.next() {
            let name = name?;
            let entry = if plus {
                self.entry_or_nothing(state, id, name.file_name())
            } else {
                Entry::default()
            };
            let ino = if entry.inode == 0 {
                state.nodes.visible_ino_in(id, name.ino())
            } else {
                entry.attr.st_ino
            };
            let line = DirEntry {
                ino,
                offset: name.next_entry_cookie(),
                type_: directory_type(name.file_type()),
                name: name.file_name().to_bytes(),
            };
            let outcome = sink(line, entry);
            if !matches!(outcome, Ok(count) if count > 0) {
                self.forget_locked(state, entry.inode, 1);
                // What was told already counts: an error would take it back.
                return if told > 0 { Ok(()) } else { outcome.map(drop) };
            }
            told += 1;
        }
        Ok(())
    }

    /// What `name` stands for, or nothing: the guest will look when it needs to.
    fn entry_or_nothing(&self, state: &mut State, parent: u64, name: &CStr) -> Entry {
        match name.to_bytes() {
            b"." | b".." => Entry::default(),
            _ => self.find(state, parent, name).unwrap_or_default(),
        }
    }

    fn list_exports(&self, state: &mut State, listing: Listing, sink: Sink<'_>) -> io::Result<()> {
        let dots = [".", ".."].into_iter().map(|name| (name, None));
        let known = self.exports();
        let exports = known.iter().flatten().flat_map(|export| {
            let names = export.names.iter();
            names.map(move |name| (name.as_str(), Some(export)))
        });
        let skip = usize::try_from(listing.offset).unwrap_or(usize::MAX);
        let own = root_attributes(known.iter().flatten().count()).st_ino;
        for (place, (name, export)) in dots.chain(exports).enumerate().skip(skip) {
            let mut entry = Entry::default();
            let mut ino = own;
            if let Some(export) = export {
                let told = self.export_entry(state, export)?;
                ino = told.attr.st_ino;
                if listing.plus {
                    entry = told;
                }
            }
            let line = DirEntry {
                ino,
                offset: place as u64 + 1,
                type_: libc::DT_DIR.into(),
                name: name.as_bytes(),
            };
            if sink(line, entry)? == 0 {
                break;
            }
            if let Some(export) = export.filter(|_| listing.plus) {
                state.nodes.tell(export.root);
            }
        }
        Ok(())
    }
}

fn directory_type(kind: FileType) -> u32 {
    let kind = match kind {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    };
    kind.into()
}
