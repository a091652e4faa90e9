//! Layers made by hand, a place to unpack them, and a tree beside it that must never change.

mod formats;
mod hostile;
mod limits;
mod links;
mod names;
mod random;
mod whiteouts;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};

use super::{Job, Limits, UnpackError, unpack};
use crate::digest::Digest;

/// A tar under construction, without the checks of a well-meaning writer.
#[derive(Default, Clone)]
pub(super) struct Layer {
    bytes: Vec<u8>,
}

/// One header; change what matters and add it.
#[derive(Clone, Copy)]
pub(super) struct Item<'a> {
    pub(super) kind: u8,
    pub(super) name: &'a [u8],
    pub(super) link: &'a [u8],
    pub(super) data: &'a [u8],
    /// Size to state when it is not the data's.
    pub(super) size: Option<u64>,
    pub(super) mode: u32,
    pub(super) uid: u64,
    pub(super) gid: u64,
    pub(super) mtime: u64,
    pub(super) device: (u32, u32),
}

impl Default for Item<'_> {
    fn default() -> Self {
        Self {
            kind: b'0',
            name: b"f",
            link: b"",
            data: b"",
            size: None,
            mode: 0o644,
            uid: 0,
            gid: 0,
            mtime: 1_000_000_000,
            device: (0, 0),
        }
    }
}

impl Layer {
    pub(super) fn add(mut self, item: Item<'_>) -> Self {
        if item.name.len() > 100 {
            self = self.long(b'L', item.name);
        }
        if item.link.len() > 100 {
            self = self.long(b'K', item.link);
        }
        let mut header = tar::Header::new_gnu();
        let gnu = header.as_gnu_mut().unwrap();
        gnu.name[..item.name.len().min(100)]
            .copy_from_slice(&item.name[..item.name.len().min(100)]);
        gnu.linkname[..item.link.len().min(100)]
            .copy_from_slice(&item.link[..item.link.len().min(100)]);
        gnu.typeflag = [item.kind];
        header.set_size(item.size.unwrap_or(item.data.len() as u64));
        header.set_mode(item.mode);
        header.set_uid(item.uid);
        header.set_gid(item.gid);
        header.set_mtime(item.mtime);
        header.set_device_major(item.device.0).unwrap();
        header.set_device_minor(item.device.1).unwrap();
        header.set_cksum();
        self.raw(header.as_bytes()).raw(item.data).fill()
    }

    fn long(self, kind: u8, name: &[u8]) -> Self {
        let data = [name, b"\0"].concat();
        self.add(Item {
            kind,
            name: b"././@LongLink",
            data: &data,
            ..Item::default()
        })
    }

    pub(super) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    pub(super) fn fill(mut self) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(512), 0);
        self
    }

    pub(super) fn file(self, name: &str, data: &str) -> Self {
        self.add(Item {
            name: name.as_bytes(),
            data: data.as_bytes(),
            ..Item::default()
        })
    }

    pub(super) fn directory(self, name: &str) -> Self {
        self.add(Item {
            kind: b'5',
            name: name.as_bytes(),
            mode: 0o755,
            ..Item::default()
        })
    }

    pub(super) fn symlink(self, name: &str, target: &str) -> Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.add(Item {
            kind: b'2',
            name,
            link,
            ..Item::default()
        })
    }

    pub(super) fn hard_link(self, name: &str, target: &str) -> Self {
        let (name, link) = (name.as_bytes(), target.as_bytes());
        self.add(Item {
            kind: b'1',
            name,
            link,
            ..Item::default()
        })
    }

    /// A pax extended header with these records, for the entry that follows.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let data: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        self.add(Item {
            kind: b'x',
            name: b"pax",
            data: &data,
            ..Item::default()
        })
    }

    /// The tar with its end marker.
    pub(super) fn finish(self) -> Vec<u8> {
        self.raw(&[0; 1024]).bytes
    }
}

pub(super) fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let digits = |n: usize| n.to_string().len();
    let mut length = rest + digits(rest);
    length = rest + digits(length);
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

pub(super) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A place to unpack layers in, with a tree beside it.
pub(super) struct Fixture {
    directory: tempfile::TempDir,
    before: BTreeMap<PathBuf, String>,
    pub(super) limits: Limits,
    below: Vec<PathBuf>,
}

impl Fixture {
    pub(super) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        std::fs::create_dir_all(outside.join("directory")).unwrap();
        std::fs::create_dir(directory.path().join("layer")).unwrap();
        std::fs::write(outside.join("secret"), "secret").unwrap();
        std::fs::write(outside.join("directory/file"), "file").unwrap();
        symlink("secret", outside.join("link")).unwrap();
        let before = describe(&outside);
        Self {
            directory,
            before,
            limits: Limits::default(),
            below: Vec::new(),
        }
    }

    pub(super) fn outside(&self) -> String {
        self.directory
            .path()
            .join("outside")
            .to_str()
            .unwrap()
            .to_owned()
    }

    pub(super) fn root(&self) -> PathBuf {
        self.directory.path().join("layer")
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    pub(super) fn read(&self, name: &str) -> String {
        assert!(self.kind(name) == "file", "{name} is no file");
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    pub(super) fn kind(&self, name: &str) -> &'static str {
        use std::os::unix::fs::FileTypeExt as _;
        let Ok(metadata) = std::fs::symlink_metadata(self.path(name)) else {
            return "nothing";
        };
        match metadata.file_type() {
            kind if kind.is_dir() => "directory",
            kind if kind.is_file() => "file",
            kind if kind.is_symlink() => "link",
            kind if kind.is_char_device() && metadata.rdev() == 0 => "whiteout",
            kind if kind.is_char_device() => "character device",
            kind if kind.is_block_device() => "block device",
            kind if kind.is_fifo() => "fifo",
            _ => "something",
        }
    }

    pub(super) fn is_opaque(&self, name: &str) -> bool {
        let mut value = [0; 8];
        rustix::fs::lgetxattr(self.path(name), opaque_name(), &mut value) == Ok(1)
            && value[0] == b'y'
    }

    /// Makes what has been unpacked the layer below the next one.
    pub(super) fn next_layer(&mut self) {
        let below = self
            .directory
            .path()
            .join(format!("below{}", self.below.len()));
        std::fs::rename(self.root(), &below).unwrap();
        std::fs::create_dir(self.root()).unwrap();
        self.below.push(below);
    }

    /// Unpacks `blob` and checks that nothing beside the layer's directory changed.
    pub(super) fn unpack(&self, blob: &[u8]) -> Result<(), UnpackError> {
        self.unpack_as(blob, None)
    }

    pub(super) fn unpack_as(
        &self,
        blob: &[u8],
        diff_id: Option<&Digest>,
    ) -> Result<(), UnpackError> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(blob).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        let job = Job {
            diff_id,
            below: &self.below,
            limits: &self.limits,
            report: &|_| {},
        };
        let result = unpack(file, &self.root(), &job);
        self.check_outside();
        result
    }

    pub(super) fn refused(&self, layer: Layer) -> String {
        let error = self
            .unpack(&layer.finish())
            .expect_err("the layer must be refused");
        message(&error)
    }

    pub(super) fn accepted(&self, layer: Layer) {
        if let Err(error) = self.unpack(&layer.finish()) {
            panic!("{}", message(&error));
        }
    }

    pub(super) fn check_outside(&self) {
        assert_eq!(
            describe(&self.directory.path().join("outside")),
            self.before
        );
        let mut beside: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with("below"))
            .collect();
        beside.sort();
        assert_eq!(beside, ["layer", "outside"]);
    }
}

fn opaque_name() -> &'static str {
    match rustix::process::geteuid().is_root() {
        true => "trusted.overlay.opaque",
        false => "user.overlay.opaque",
    }
}

/// True when the tests run as root; says so when they do not, as less is checked then.
pub(super) fn privileged() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED in part: owners, devices and trusted attributes need root");
    }
    root
}

/// An error and its causes.
pub(super) fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Everything about every file of a tree, but access times.
fn describe(root: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    let mut waiting = vec![root.to_owned()];
    while let Some(path) = waiting.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let content = if meta.is_dir() {
            waiting.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            Vec::new()
        } else if meta.is_symlink() {
            std::fs::read_link(&path)
                .unwrap()
                .into_os_string()
                .as_bytes()
                .to_vec()
        } else {
            std::fs::read(&path).unwrap()
        };
        let mut attributes = [0; 1024];
        let length = rustix::fs::llistxattr(&path, &mut attributes[..]).unwrap_or(0);
        let text = format!(
            "{:o} {} {} {} {} {}.{} {:?} {:?}",
            meta.mode(),
            meta.ino(),
            meta.nlink(),
            meta.uid(),
            meta.gid(),
            meta.mtime(),
            meta.mtime_nsec(),
            OsStr::from_bytes(&content),
            OsStr::from_bytes(&attributes[..length]),
        );
        all.insert(path, text);
    }
    all
}
