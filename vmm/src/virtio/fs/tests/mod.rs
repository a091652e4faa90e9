//! A scripted guest that speaks raw FUSE to the device, over a real ring, about
//! real directories.

mod attacks;
mod dax;
mod operations;
mod saved;
mod template;

use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;

use super::*;
use crate::testing::{FakeIrq, FakeWakers, GuestQueue, Part, guest_ram};
use crate::virtio::device::{VirtioDevice, Wakers};

pub(super) const ROOT: u64 = 1;
pub(super) const LOOKUP: u32 = 1;
pub(super) const GETATTR: u32 = 3;
pub(super) const SETATTR: u32 = 4;
pub(super) const READLINK: u32 = 5;
pub(super) const SYMLINK: u32 = 6;
pub(super) const MKNOD: u32 = 8;
pub(super) const MKDIR: u32 = 9;
pub(super) const UNLINK: u32 = 10;
pub(super) const RMDIR: u32 = 11;
pub(super) const LINK: u32 = 13;
pub(super) const OPEN: u32 = 14;
pub(super) const READ: u32 = 15;
pub(super) const WRITE: u32 = 16;
pub(super) const STATFS: u32 = 17;
pub(super) const RELEASE: u32 = 18;
pub(super) const FSYNC: u32 = 20;
pub(super) const SETXATTR: u32 = 21;
pub(super) const GETXATTR: u32 = 22;
pub(super) const LISTXATTR: u32 = 23;
pub(super) const REMOVEXATTR: u32 = 24;
pub(super) const INIT: u32 = 26;
pub(super) const OPENDIR: u32 = 27;
pub(super) const READDIR: u32 = 28;
pub(super) const CREATE: u32 = 35;
pub(super) const DESTROY: u32 = 38;
pub(super) const FALLOCATE: u32 = 43;
pub(super) const READDIRPLUS: u32 = 44;
pub(super) const RENAME2: u32 = 45;
pub(super) const LSEEK: u32 = 46;

/// What Linux 6.12 offers at `FUSE_INIT`, but for what needs an extended answer.
const CAPABLE: u32 = 0x73ff_fffb;

/// The same, of the second half of its flags: it would have files shown that the host chooses.
const HAS_INODE_DAX: u32 = 1 << 1;

pub(super) type Answer = Result<Vec<u8>, i32>;

pub(super) fn words(values: &[u32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub(super) fn longs(values: &[u64]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

pub(super) fn name(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

pub(super) fn long_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

pub(super) fn word_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// `struct fuse_attr` within an entry (at 40) or an attribute answer (at 16).
pub(super) struct Attributes<'a>(pub(super) &'a [u8]);

impl Attributes<'_> {
    pub(super) fn size(&self) -> u64 {
        long_at(self.0, 8)
    }
    pub(super) fn mode(&self) -> u32 {
        word_at(self.0, 60)
    }
    pub(super) fn nlink(&self) -> u32 {
        word_at(self.0, 64)
    }
    pub(super) fn owner(&self) -> (u32, u32) {
        (word_at(self.0, 68), word_at(self.0, 72))
    }
}

pub(super) struct Guest {
    pub(super) device: Fs,
    queues: Vec<Queue>,
    guest: Vec<GuestQueue>,
    unique: u64,
    pub(super) user: (u32, u32),
}

impl Guest {
    pub(super) fn unmounted(exports: Vec<FsExport>, limits: FsLimits) -> Self {
        Self::with_window(exports, limits, None)
    }

    pub(super) fn with_window(
        exports: Vec<FsExport>,
        limits: FsLimits,
        window: Option<Arc<Window>>,
    ) -> Self {
        Self::in_role(exports, FsRole::Own, limits, window)
    }

    pub(super) fn in_role(
        exports: Vec<FsExport>,
        role: FsRole,
        limits: FsLimits,
        window: Option<Arc<Window>>,
    ) -> Self {
        let spec = FsSpec {
            tag: "hull".to_owned(),
            dax_window_bytes: 0,
        };
        let mut device = Fs::new(&spec, exports, role, limits, window).unwrap();
        let memory = guest_ram(80 << 20);
        let irq = Arc::new(FakeIrq::default());
        let rooms = [(1 << 20, 4 << 20), (8 << 20, 70 << 20)];
        let guest: Vec<_> = QUEUE_SIZES
            .iter()
            .zip(rooms)
            .map(|(size, (base, room))| GuestQueue::new(&memory, base, *size, room))
            .collect();
        let queues = guest
            .iter()
            .enumerate()
            .map(|(i, q)| q.device_side(i, &irq))
            .collect();
        let wakers: Arc<dyn Wakers> = Arc::new(FakeWakers::default());
        device
            .activate(Activation {
                features: 0,
                wakers,
            })
            .unwrap();
        Self {
            device,
            queues,
            guest,
            unique: 0,
            user: (0, 0),
        }
    }

    pub(super) fn new(exports: Vec<FsExport>) -> Self {
        let mut guest = Self::unmounted(exports, FsLimits::default());
        guest.mount();
        guest
    }

    pub(super) fn mount(&mut self) -> Vec<u8> {
        let mut init = words(&[7, 41, 65_536, CAPABLE, HAS_INODE_DAX]);
        init.resize(64, 0);
        self.call(INIT, 0, &init, 64).unwrap()
    }

    /// Sends bytes as they are; what the device says it wrote, and the room.
    pub(super) fn raw(&mut self, queue: usize, request: &[u8], room: u32) -> (u32, Vec<u8>) {
        let mut parts = vec![Part::Read(request.to_vec())];
        if room > 0 {
            parts.push(Part::Write(room));
        }
        self.guest[queue].add(&parts);
        self.device.on_queue(queue, &mut self.queues).unwrap();
        let used = self.guest[queue].pop_used().expect("a request was kept");
        (used.length, used.written)
    }

    pub(super) fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 1;
        let mut request = words(&[40 + u32::try_from(body.len()).unwrap(), opcode]);
        request.extend(longs(&[self.unique, node]));
        request.extend(words(&[self.user.0, self.user.1, 1, 0]));
        request.extend_from_slice(body);
        request
    }

    pub(super) fn call(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) -> Answer {
        let request = self.request(opcode, node, body);
        let (length, answer) = self.raw(1, &request, room + 16);
        assert!(length >= 16, "no answer to operation {opcode}");
        assert_eq!(
            (word_at(&answer, 0), long_at(&answer, 8)),
            (length, self.unique)
        );
        match word_at(&answer, 4).cast_signed() {
            0 => Ok(answer[16..length as usize].to_vec()),
            errno => Err(-errno),
        }
    }

    pub(super) fn lookup(&mut self, parent: u64, path: &str) -> Result<u64, i32> {
        path.split('/').try_fold(parent, |parent, part| {
            match long_at(&self.call(LOOKUP, parent, &name(part), 128)?, 0) {
                0 => Err(libc::ENOENT),
                node => Ok(node),
            }
        })
    }

    pub(super) fn create(
        &mut self,
        parent: u64,
        file: &str,
        flags: i32,
        mode: u32,
    ) -> Result<(u64, u64), i32> {
        let body = [words(&[flags.cast_unsigned(), mode, 0, 0]), name(file)].concat();
        let answer = self.call(CREATE, parent, &body, 144)?;
        Ok((long_at(&answer, 0), long_at(&answer, 128)))
    }

    pub(super) fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        Ok(long_at(
            &self.call(OPEN, node, &words(&[flags.cast_unsigned(), 0]), 16)?,
            0,
        ))
    }

    pub(super) fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Answer {
        let body = [
            longs(&[handle, offset]),
            words(&[size, 0]),
            longs(&[0]),
            words(&[0, 0]),
        ]
        .concat();
        self.call(READ, node, &body, size)
    }

    pub(super) fn write(
        &mut self,
        node: u64,
        handle: u64,
        offset: u64,
        flags: (u32, i32),
        data: &[u8],
    ) -> Result<u32, i32> {
        let size = u32::try_from(data.len()).unwrap();
        let body = [
            longs(&[handle, offset]),
            words(&[size, flags.0]),
            longs(&[0]),
            words(&[flags.1.cast_unsigned(), 0]),
            data.to_vec(),
        ]
        .concat();
        Ok(word_at(&self.call(WRITE, node, &body, 8)?, 0))
    }

    /// Sets attributes: (bits, size, mode, uid, gid).
    pub(super) fn set_attributes(
        &mut self,
        node: u64,
        valid: u32,
        size: u64,
        mode: u32,
        owner: (u32, u32),
    ) -> Answer {
        let body = [
            words(&[valid, 0]),
            longs(&[0, size, 0, 0, 0, 0]),
            words(&[0, 0, 0, mode, 0, owner.0, owner.1, 0]),
        ]
        .concat();
        self.call(SETATTR, node, &body, 104)
    }

    pub(super) fn attributes(&mut self, node: u64) -> Answer {
        Ok(self.call(GETATTR, node, &longs(&[0, 0]), 104)?[16..].to_vec())
    }

    /// Names of a directory, with the node that `READDIRPLUS` gave for each.
    pub(super) fn list(&mut self, node: u64, handle: u64, plus: bool) -> Vec<(String, u64)> {
        let (mut offset, mut all) = (0, Vec::new());
        loop {
            let body = [
                longs(&[handle, offset]),
                words(&[4096, 0]),
                longs(&[0]),
                words(&[0, 0]),
            ]
            .concat();
            let answer = self
                .call(if plus { READDIRPLUS } else { READDIR }, node, &body, 4096)
                .unwrap();
            if answer.is_empty() {
                return all;
            }
            let mut rest = answer.as_slice();
            while !rest.is_empty() {
                let node = if plus { long_at(rest, 0) } else { 0 };
                let line = &rest[if plus { 128 } else { 0 }..];
                offset = long_at(line, 8);
                let length = word_at(line, 16) as usize;
                all.push((
                    String::from_utf8(line[24..24 + length].to_vec()).unwrap(),
                    node,
                ));
                rest = &line[(24 + length).next_multiple_of(8)..];
            }
        }
    }
}

/// A directory with `inside`, exported as `root`, beside files it mustn't reach.
pub(super) struct Host {
    pub(super) dir: TempDir,
}

impl Host {
    pub(super) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        std::fs::create_dir(dir.path().join("inside")).unwrap();
        std::fs::create_dir(dir.path().join("outside")).unwrap();
        std::fs::write(dir.path().join("outside/secret"), "secret").unwrap();
        Self { dir }
    }

    pub(super) fn path(&self, below: &str) -> PathBuf {
        self.dir.path().join("inside").join(below)
    }

    pub(super) fn export(&self, read_only: bool, cache: CachePolicy) -> FsExport {
        FsExport::open("root", &self.dir.path().join("inside"), read_only, cache).unwrap()
    }

    /// A guest that has mounted it, and the export's node.
    pub(super) fn guest(&self, read_only: bool, cache: CachePolicy) -> (Guest, u64) {
        let mut guest = Guest::new(vec![self.export(read_only, cache)]);
        let root = guest.lookup(ROOT, "root").unwrap();
        (guest, root)
    }
}
