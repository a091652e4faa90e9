//! One entry of a layer made into a file.
//!
//! Owns: what each kind of entry becomes, whiteouts in overlayfs's form among them
//! (Documentation/filesystems/overlayfs.rst "whiteouts and opaque directories"), and which
//! extended attributes an image may set. Refuses: attributes by which overlayfs could be steered.

use std::ffi::OsStr;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{AtFlags, FileType, Mode, XattrFlags};
use rustix::io::Errno;

use super::Limits;
use super::error::{Result, UnpackError, quoted, refused};
use super::path::{Meaning, Name};
use super::tar::{Archive, Entry, Kind};
use super::tree::{Attributes, Tree, create_file, failed, is_directory, set_times};

/// Most memory for the names of directories that wait, in bytes: two million of usual length.
const MAX_WAITING_BYTES: usize = 256 << 20;

/// A layer being made.
pub(super) struct Maker<'l> {
    tree: Tree<'l>,
    limits: &'l Limits,
    entries: u64,
    /// Bytes of all files so far, holes included.
    file_bytes: u64,
    /// Directories whose final mode and time wait until nothing is made in them any more.
    directories: Vec<(Name, Attributes)>,
    /// Memory that these take.
    waiting_bytes: usize,
    buffer: Vec<u8>,
}

impl<'l> Maker<'l> {
    pub(super) fn new(tree: Tree<'l>, limits: &'l Limits) -> Result<Self> {
        let maker = Self {
            tree,
            limits,
            entries: 0,
            file_bytes: 0,
            directories: Vec::new(),
            waiting_bytes: 0,
            buffer: vec![0; 128 * 1024],
        };
        // Until an entry describes it, the root looks as it does in the layers below.
        if let Some(attributes) = maker.tree.attributes_below(b"") {
            let root = maker.tree.open_root()?;
            maker
                .tree
                .set_attributes(&root, &attributes, &Name::default())?;
            set_times(&root, attributes.mtime).map_err(failed("set times of", &Name::default()))?;
        }
        Ok(maker)
    }

    /// Makes what `entry` says, with its data from `archive`.
    pub(super) fn make<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<'_, R>,
    ) -> Result<()> {
        self.entries += 1;
        if self.entries > self.limits.entries {
            let text = format!("more than {} entries", self.limits.entries);
            return Err(UnpackError::Limit(text));
        }
        match Meaning::of(&entry.name, self.limits)? {
            Meaning::Ignored => Ok(()),
            Meaning::Whiteout(name) => self.whiteout(&name),
            Meaning::Opaque(name) => self.opaque(&name),
            Meaning::Entry(name) => {
                let attributes = Attributes {
                    mode: entry.mode,
                    uid: entry.uid,
                    gid: entry.gid,
                    mtime: entry.mtime,
                };
                match entry.kind {
                    Kind::Directory => self.directory(name, attributes, entry),
                    Kind::File => self.file(&name, &attributes, entry, archive),
                    Kind::HardLink => self.hard_link(&name, entry),
                    Kind::Symlink => self.symlink(&name, &attributes, entry),
                    Kind::CharDevice => {
                        self.node(&name, &attributes, entry, FileType::CharacterDevice)
                    }
                    Kind::BlockDevice => {
                        self.node(&name, &attributes, entry, FileType::BlockDevice)
                    }
                    Kind::Fifo => self.node(&name, &attributes, entry, FileType::Fifo),
                }
            }
        }
    }

    /// Gives directories their final modes and times.
    pub(super) fn finish(self) -> Result<()> {
        for (name, attributes) in &self.directories {
            if let Some(directory) = self.tree.reopen(name)? {
                let mode = Mode::from_bits_retain(attributes.mode);
                rustix::fs::fchmod(&directory, mode).map_err(failed("set the mode of", name))?;
                set_times(&directory, attributes.mtime).map_err(failed("set times of", name))?;
            }
        }
        Ok(())
    }

    fn directory(&mut self, name: Name, attributes: Attributes, entry: &Entry) -> Result<()> {
        let (directory, hides) = if name.is_root() {
            (self.tree.open_root()?, false)
        } else {
            let place = self.tree.place(&name)?;
            self.tree.make_directory(&place)?
        };
        let usable = Attributes {
            mode: attributes.mode | 0o700,
            ..attributes
        };
        self.tree.set_attributes(&directory, &usable, &name)?;
        self.set_xattrs(&directory, entry, &name)?;
        if hides {
            self.mark_opaque(&directory, &name)?;
        }
        self.waiting_bytes += name.as_bytes().len() + size_of::<(Name, Attributes)>();
        if self.waiting_bytes > MAX_WAITING_BYTES {
            let text = "names of directories of more than 256 MiB together".to_owned();
            return Err(UnpackError::Limit(text));
        }
        self.directories.push((name, attributes));
        Ok(())
    }

    fn file<R: Read>(
        &mut self,
        name: &Name,
        attributes: &Attributes,
        entry: &Entry,
        archive: &mut Archive<'_, R>,
    ) -> Result<()> {
        self.file_bytes = self.file_bytes.saturating_add(entry.size);
        if self.file_bytes > self.limits.layer_bytes {
            let most = self.limits.layer_bytes;
            let text = format!("files of more than {most} bytes together, holes included");
            return Err(UnpackError::Limit(text));
        }
        let place = self.tree.place(name)?;
        let mut file = self.tree.make(&place, create_file)?;
        let wrong = |source| UnpackError::Write {
            action: "write",
            name: quoted(name.as_bytes()),
            source,
        };
        match &entry.segments {
            None => loop {
                match archive.read_data(&mut self.buffer)? {
                    0 => break,
                    count => file.write_all(&self.buffer[..count]).map_err(wrong)?,
                }
            },
            Some(segments) => {
                file.set_len(entry.size).map_err(wrong)?;
                for segment in segments {
                    let (mut at, mut left) = (segment.offset, segment.length);
                    while left > 0 {
                        let most = self
                            .buffer
                            .len()
                            .min(usize::try_from(left).unwrap_or(usize::MAX));
                        let count = archive.read_data(&mut self.buffer[..most])?;
                        if count == 0 {
                            return Err(UnpackError::Truncated);
                        }
                        file.write_all_at(&self.buffer[..count], at)
                            .map_err(wrong)?;
                        at += count as u64;
                        left -= count as u64;
                    }
                }
            }
        }
        let file = OwnedFd::from(file);
        self.tree.set_attributes(&file, attributes, name)?;
        self.set_xattrs(&file, entry, name)?;
        set_times(&file, attributes.mtime).map_err(place.failed("set times of"))
    }

    fn hard_link(&mut self, name: &Name, entry: &Entry) -> Result<()> {
        let target = Name::parse(&entry.link, self.limits).map_err(|_| {
            refused(
                &entry.name,
                "its link target is not a name within the layer",
            )
        })?;
        let missing = || refused(&entry.name, "its link target is not in this layer");
        if target.is_root() || target == *name {
            return Err(refused(&entry.name, "it cannot link to this target"));
        }
        let parent = self
            .tree
            .look_up(target.parent(), name)?
            .ok_or_else(missing)?;
        let last = OsStr::from_bytes(target.last());
        let place = self.tree.place(name)?;
        match rustix::fs::statat(&parent, last, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) if is_directory(&stat) => {
                return Err(refused(&entry.name, "it is a hard link to a directory"));
            }
            Ok(stat) => {
                let same = |present: &rustix::fs::Stat| {
                    (present.st_ino, present.st_dev) == (stat.st_ino, stat.st_dev)
                };
                if self.tree.present(&place)?.as_ref().is_some_and(same) {
                    return Ok(()); // the same file already
                }
            }
            Err(Errno::NOENT) => return Err(missing()),
            Err(errno) => return Err(place.failed("examine the target of")(errno)),
        }
        self.tree.make(&place, |to, name| {
            rustix::fs::linkat(&parent, last, to, name, AtFlags::empty())
        })
    }

    fn symlink(&mut self, name: &Name, attributes: &Attributes, entry: &Entry) -> Result<()> {
        if entry.link.is_empty() || entry.link.len() >= 4096 || entry.link.contains(&0) {
            return Err(refused(
                &entry.name,
                "its link target is empty, too long or holds NUL",
            ));
        }
        let place = self.tree.place(name)?;
        let target = OsStr::from_bytes(&entry.link);
        self.tree.make(&place, |parent, last| {
            rustix::fs::symlinkat(target, parent, last)
        })?;
        self.tree.set_attributes_at(&place, attributes, false)
    }

    fn node(
        &mut self,
        name: &Name,
        attributes: &Attributes,
        entry: &Entry,
        kind: FileType,
    ) -> Result<()> {
        if kind != FileType::Fifo && !self.tree.privileged {
            return Ok(()); // only root can make devices; Docker leaves them out too
        }
        let place = self.tree.place(name)?;
        let device = match kind {
            FileType::Fifo => 0,
            _ => rustix::fs::makedev(entry.device.0, entry.device.1),
        };
        self.tree.make(&place, |parent, last| {
            rustix::fs::mknodat(parent, last, kind, Mode::from(0o600), device)
        })?;
        self.tree.set_attributes_at(&place, attributes, true)
    }

    /// Hides the lower layers' file. What this layer itself has by that name stays, whichever
    /// came first (image-spec layer.md: whiteouts apply to lower layers only).
    fn whiteout(&mut self, name: &Name) -> Result<()> {
        if self.tree.is_blocked(name.parent()) {
            // Some tools list what was in a directory that became a link or a file.
            return Ok(());
        }
        let place = self.tree.place(name)?;
        match self.tree.present(&place)? {
            None => rustix::fs::mknodat(
                &place.parent,
                place.last(),
                FileType::CharacterDevice,
                Mode::empty(),
                0,
            )
            .map_err(place.failed("make the whiteout of")),
            Some(stat) if is_directory(&stat) => self.opaque(name),
            Some(_) => Ok(()),
        }
    }

    fn opaque(&mut self, name: &Name) -> Result<()> {
        if self.tree.is_blocked(name.parent()) {
            return Ok(());
        }
        let directory = if name.is_root() {
            self.tree.open_root()?
        } else {
            let place = self.tree.place(name)?;
            match self.tree.present(&place)? {
                Some(stat) if is_directory(&stat) => self.tree.make_directory(&place)?.0,
                Some(_) => return Ok(()), // it hides all below it as it is
                None => {
                    let made = self.tree.make_directory(&place)?.0;
                    let below = self.tree.attributes_below(name.as_bytes());
                    let plain = Attributes {
                        mode: 0o755,
                        uid: 0,
                        gid: 0,
                        mtime: (0, 0),
                    };
                    self.tree
                        .set_attributes(&made, &below.unwrap_or(plain), name)?;
                    made
                }
            }
        };
        self.mark_opaque(&directory, name)
    }

    fn mark_opaque(&self, directory: &OwnedFd, name: &Name) -> Result<()> {
        // Without privilege overlayfs is mounted with `userxattr`, and reads the other name.
        let key = match self.tree.privileged {
            true => "trusted.overlay.opaque",
            false => "user.overlay.opaque",
        };
        rustix::fs::fsetxattr(directory, key, b"y", XattrFlags::empty())
            .map_err(failed("mark as opaque", name))
    }

    fn set_xattrs(&self, file: &OwnedFd, entry: &Entry, name: &Name) -> Result<()> {
        for (key, value) in &entry.xattrs {
            match may_set(key) {
                Permission::Set => {}
                Permission::LeaveOut => continue,
                Permission::Refuse(reason) => return Err(refused(&entry.name, reason)),
            }
            match rustix::fs::fsetxattr(file.as_fd(), &key[..], value, XattrFlags::empty()) {
                Ok(()) => {}
                // As Docker: user.* does not exist on every file system, and
                // security.capability takes privilege.
                Err(Errno::OPNOTSUPP) if key.starts_with(b"user.") => {}
                Err(Errno::PERM) if !self.tree.privileged => {}
                Err(errno) => return Err(failed("set an extended attribute of", name)(errno)),
            }
        }
        Ok(())
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Permission {
    Set,
    LeaveOut,
    Refuse(&'static str),
}

/// Which extended attributes an image may set on this host's files.
fn may_set(key: &[u8]) -> Permission {
    if key.contains(&0) || key.len() > 255 {
        return Permission::Refuse("the name of an extended attribute is malformed");
    }
    if key.starts_with(b"trusted.") || key.starts_with(b"user.overlay.") {
        return Permission::Refuse(
            "it sets an extended attribute that steers the host's overlayfs",
        );
    }
    if key == b"security.capability" || key.starts_with(b"user.") {
        return Permission::Set;
    }
    // Labels and access lists of the host the image was built on (security.selinux,
    // system.posix_acl_*): Docker's and containerd's archives never hold them.
    Permission::LeaveOut
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_an_image_may_set() {
        assert_eq!(may_set(b"security.capability"), Permission::Set);
        assert_eq!(may_set(b"user.mime_type"), Permission::Set);
        assert_eq!(may_set(b"security.selinux"), Permission::LeaveOut);
        assert_eq!(may_set(b"security.ima"), Permission::LeaveOut);
        assert_eq!(may_set(b"system.posix_acl_access"), Permission::LeaveOut);
        assert_eq!(may_set(b""), Permission::LeaveOut);
        for key in [
            &b"trusted.overlay.opaque"[..],
            b"trusted.x",
            b"user.overlay.redirect",
            b"user.a\0b",
        ] {
            assert!(matches!(may_set(key), Permission::Refuse(_)));
        }
    }
}
