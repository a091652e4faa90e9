//! The file system device (virtio 1.3 §5.11): host directories that a guest
//! mounts by their tag, in FUSE's words.
//!
//! ```text
//!  ring ─► Fs: caps, counts ─► fuse-backend-rs: parses ─► Tree: rights ─► host files
//! ```
//!
//! Owns the queues, the caps on a request's size and the counts. The parsing of
//! requests and the copying between files and guest memory are
//! `fuse-backend-rs`'s; its own passthrough file system isn't used: it takes
//! flags, `..` and sizes as a guest gives them, knows no read-only export,
//! remembers every inode it has seen, and finds its root by path.

mod attributes;
mod contents;
mod dax;
mod directories;
mod export;
mod files;
mod filesystem;
mod identity;
mod names;
mod nodes;
mod saved;
mod stats;
mod template;
mod tree;

#[cfg(test)]
mod tests;

use std::fmt;
use std::io;
use std::sync::Arc;

use fuse_backend_rs::abi::fuse_abi::{EntryOut, InitOut, OpenOut};
use fuse_backend_rs::api::server::Server;
use fuse_backend_rs::transport::{Reader, VirtioFsWriter, Writer};
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};
use vm_memory::ByteValued;

use self::dax::Wanted;
pub use self::export::{CachePolicy, FsExport, FsRole, KnownBy};
use self::names::Making;
pub use self::saved::{Mount, MountState};
pub use self::stats::FsStats;
pub use self::template::TemplateMount;
use self::tree::Tree;
use super::device::{
    Activation, DeviceError, Persist, RestoreError, SharedMemory, Unsaveable, VirtioDevice,
    read_config_bytes,
};
use super::queue::{Chain, Queue, QueueError};
use crate::memory::Window;
use crate::spec::{FsSpec, MAX_FS_TAG_BYTES};

/// The queue for urgent requests and the one for all others (virtio 1.3 §5.11.2).
const QUEUE_SIZES: [u16; 2] = [128, 512];

/// Bytes of a request, and of the room for its answer: 1 MiB of data and what
/// is around it. `FUSE_INIT` tells the guest of 1 MiB.
const MAX_MESSAGE_BYTES: usize = (1 << 20) + 4096;

/// Bytes of `struct fuse_in_header` and of `struct fuse_out_header`.
const IN_HEADER_BYTES: usize = 40;
const OUT_HEADER_BYTES: usize = 16;

/// `FUSE_GETATTR`, and `FUSE_INIT`, of whose answers the parser leaves out what DAX needs.
const GETATTR: u32 = 3;
const INIT: u32 = 26;

/// `FUSE_DESTROY`, whose answer the parser doesn't count.
const DESTROY: u32 = 38;

/// `FUSE_SETUPMAPPING` and `FUSE_REMOVEMAPPING`: the parser's own look at neither bounds nor rights.
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;

/// `FUSE_SYNCFS` and `FUSE_TMPFILE`, which the parser doesn't know.
const SYNCFS: u32 = 50;
const TMPFILE: u32 = 51;

/// Operations that are never answered: `FUSE_FORGET`, `FUSE_INTERRUPT`, `FUSE_BATCH_FORGET`.
const UNANSWERED: [u32; 3] = [2, 36, 42];

/// How much of its host a guest may hold on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsLimits {
    /// Inodes remembered; each takes a descriptor. `ENOMEM` beyond.
    pub inodes: usize,
    /// Files and directories open; each takes a descriptor. `ENFILE` beyond.
    pub handles: usize,
}

impl Default for FsLimits {
    fn default() -> Self {
        Self {
            inodes: 400_000,
            handles: 65_536,
        }
    }
}

/// Descriptors that the rest of the process is left with, at least.
const DESCRIPTORS_FOR_OTHERS: usize = 2048;

impl FsLimits {
    /// As far as `descriptors` go.
    fn within(self, descriptors: usize) -> Self {
        let left = descriptors.saturating_sub(DESCRIPTORS_FOR_OTHERS);
        let handles = self.handles.min(left / 4);
        Self {
            inodes: self.inodes.min(left - handles),
            handles,
        }
    }
}

/// Raises the limit of descriptors to what the process may have; how many that are.
fn raise_descriptors() -> io::Result<usize> {
    let limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        let current = limit.maximum;
        setrlimit(Resource::Nofile, Rlimit { current, ..limit })?;
    }
    let most = limit.maximum.map(usize::try_from);
    Ok(most.and_then(Result::ok).unwrap_or(usize::MAX))
}

/// What a snapshot keeps of the device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FsState {
    /// The tag it is mounted by.
    pub tag: String,
    /// What a guest that has it mounted knows of it.
    pub mounted: Option<Mount>,
}

/// The file system device.
pub struct Fs {
    tag: String,
    window: Option<Arc<Window>>,
    tree: Arc<Tree>,
    server: Server<Arc<Tree>>,
    stats: Arc<FsStats>,
}

impl fmt::Debug for Fs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fs")
            .field("tag", &self.tag)
            .field("exports", &self.tree.exports())
            .field("stats", &self.stats)
            .finish_non_exhaustive()
    }
}

/// The directories that a device shows, to be added to and taken from while the guest runs.
#[derive(Debug, Clone)]
pub struct Shares(Arc<Tree>);

impl Shares {
    /// Shows more directories: all of them, or none.
    ///
    /// # Errors
    /// As [`Fs::new`]; `EBUSY` if all that was shown when the guest mounted it is
    /// [`CachePolicy::Always`]: such a guest doesn't ask again.
    pub fn add(&self, exports: Vec<FsExport>) -> io::Result<()> {
        self.0.add(exports)
    }

    /// Shows those with these names no longer, and closes all that the guest knows of them.
    pub fn remove(&self, names: &[String]) {
        self.0.hide(names);
    }
}

impl Fs {
    /// A device that shows `exports`, large files of those that never change in `window`.
    ///
    /// To be built by the process that will serve it, while it sees `/proc`:
    /// files are opened through its own table of descriptors. Clears the
    /// process's umask, so that files get the mode that the guest asks for.
    ///
    /// Raises its limit of descriptors as far as it may: each inode takes one.
    ///
    /// # Errors
    /// Names that can't be or are there twice, directories that aren't, no `/proc`.
    pub fn new(
        spec: &FsSpec,
        exports: Vec<FsExport>,
        role: FsRole,
        limits: FsLimits,
        window: Option<Arc<Window>>,
    ) -> io::Result<Self> {
        rustix::process::umask(rustix::fs::Mode::empty());
        let limits = limits.within(raise_descriptors()?);
        let tree = Arc::new(Tree::new(exports, role, limits, window.clone())?);
        Ok(Self {
            tag: spec.tag.clone(),
            window,
            server: Server::new(Arc::clone(&tree)),
            tree,
            stats: Arc::default(),
        })
    }

    /// What changes the directories that are shown, from any thread.
    #[must_use]
    pub fn shares(&self) -> Shares {
        Shares(Arc::clone(&self.tree))
    }

    /// The counts of requests, readable at any time.
    #[must_use]
    pub fn stats(&self) -> Arc<FsStats> {
        Arc::clone(&self.stats)
    }

    fn serve(&self, queue: &mut Queue) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop()? {
            let written = self.answer(&chain)?;
            queue.complete(&chain, u32::try_from(written).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    /// Carries out one request; the bytes of its answer.
    fn answer(&self, chain: &Chain) -> Result<usize, QueueError> {
        let Some(request) = Request::of(chain)? else {
            return Ok(0);
        };
        self.stats.count(request.opcode);
        if chain.readable_len() as usize > MAX_MESSAGE_BYTES
            || chain.writable_len() as usize > MAX_MESSAGE_BYTES
        {
            return request.fail(chain, Errno::TOOBIG);
        }
        match request.opcode {
            DESTROY => {
                self.tree.unmount();
                request.answer(chain, Ok(Vec::new()))
            }
            GETATTR => {
                let told = self.tree.attributes_told(request.node);
                request.answer(chain, told.map(|told| told.as_slice().to_vec()))
            }
            SETUPMAPPING | REMOVEMAPPING if self.window.is_none() => {
                request.fail(chain, Errno::NOSYS)
            }
            SETUPMAPPING => request.answer(chain, self.set_up_mapping(request, chain)),
            REMOVEMAPPING => request.answer(chain, self.remove_mappings(chain)),
            SYNCFS => request.answer(chain, self.tree.sync_all().map(|()| Vec::new())),
            TMPFILE => request.answer(chain, self.make_temporary(request, chain)),
            _ if !request.is_parsed() => request.fail(chain, Errno::NOSYS),
            _ => match self.parse(chain) {
                Some(written) if request.opcode == INIT => self.align(chain, written),
                Some(written) => Ok(written),
                None => request.fail(chain, Errno::INVAL),
            },
        }
    }

    /// Has the answer to a `FUSE_INIT` say what mappings are to be multiples of.
    fn align(&self, chain: &Chain, written: usize) -> Result<usize, QueueError> {
        const MAP_ALIGNMENT: usize =
            OUT_HEADER_BYTES + std::mem::offset_of!(InitOut, map_alignment);
        if self.window.is_some() && written > MAP_ALIGNMENT + 1 {
            chain.write_at(MAP_ALIGNMENT, &dax::ALIGNMENT.to_le_bytes())?;
        }
        Ok(written)
    }

    /// `FUSE_SETUPMAPPING`: `struct fuse_setupmapping_in`, answered by a header alone.
    fn set_up_mapping(&self, request: Request, chain: &Chain) -> io::Result<Vec<u8>> {
        let wanted = chain.read_array(IN_HEADER_BYTES);
        let wanted = Wanted::of(&wanted.map_err(|_| Errno::INVAL)?);
        self.tree.set_up_mapping(request.node, wanted)?;
        Ok(Vec::new())
    }

    /// `FUSE_REMOVEMAPPING`: `struct fuse_removemapping_in` and as many of
    /// `struct fuse_removemapping_one` as it says, answered by a header alone.
    fn remove_mappings(&self, chain: &Chain) -> io::Result<Vec<u8>> {
        const RANGES: usize = IN_HEADER_BYTES + 4;
        let count = chain
            .read_array(IN_HEADER_BYTES)
            .map_err(|_| Errno::INVAL)?;
        let count = usize::try_from(u32::from_le_bytes(count)).map_err(|_| Errno::INVAL)?;
        let fits = chain.readable_len() as usize == RANGES + count.saturating_mul(16);
        if !fits || count > self.tree.most_ranges() {
            return Err(Errno::INVAL.into());
        }
        let mut ranges = Vec::with_capacity(count);
        for index in 0..count {
            let at = |at| {
                chain
                    .read_array(RANGES + 16 * index + at)
                    .map(u64::from_le_bytes)
            };
            match (at(0), at(8)) {
                (Ok(place), Ok(length)) => ranges.push((place, length)),
                _ => return Err(Errno::INVAL.into()),
            }
        }
        self.tree.remove_mappings(&ranges)?;
        Ok(Vec::new())
    }

    /// `FUSE_TMPFILE`: `struct fuse_create_in`, answered as `FUSE_CREATE` is.
    fn make_temporary(&self, request: Request, chain: &Chain) -> io::Result<Vec<u8>> {
        let word = |at| {
            let bytes = chain.read_array(IN_HEADER_BYTES + at);
            bytes.map(u32::from_le_bytes).map_err(|_| Errno::INVAL)
        };
        let making = Making {
            mode: word(4)?,
            umask: word(8)?,
        };
        let made = self
            .tree
            .make_temporary(request.user, request.node, word(0)?, making)?;
        let (entry, handle, options) = made;
        let opened = OpenOut {
            fh: handle.unwrap_or(0),
            open_flags: options.bits(),
            ..OpenOut::default()
        };
        Ok([EntryOut::from(entry).as_slice(), opened.as_slice()].concat())
    }

    /// Hands the request to the parser; `None` when it made nothing of it.
    fn parse(&self, chain: &Chain) -> Option<usize> {
        let memory = chain.memory().as_ref();
        let reader = Reader::from_descriptor_chain(memory, chain.descriptors()).ok()?;
        let writer = VirtioFsWriter::new(memory, chain.descriptors()).ok()?;
        // The descriptors were read again from the guest: what was checked may be gone.
        if reader.available_bytes() > MAX_MESSAGE_BYTES
            || writer.available_bytes() > MAX_MESSAGE_BYTES
        {
            return None;
        }
        self.server
            .handle_message(reader, Writer::VirtioFs(writer), None, None)
            .ok()
    }
}

/// The header of a request (`struct fuse_in_header` of Linux), as far as it is looked at here.
#[derive(Debug, Clone, Copy)]
struct Request {
    opcode: u32,
    unique: [u8; 8],
    node: u64,
    user: (u32, u32),
}

impl Request {
    fn of(chain: &Chain) -> Result<Option<Self>, QueueError> {
        if (chain.readable_len() as usize) < IN_HEADER_BYTES {
            return Ok(None);
        }
        Ok(Some(Self {
            opcode: u32::from_le_bytes(chain.read_array(4)?),
            unique: chain.read_array(8)?,
            node: u64::from_le_bytes(chain.read_array(16)?),
            user: (
                u32::from_le_bytes(chain.read_array(24)?),
                u32::from_le_bytes(chain.read_array(28)?),
            ),
        }))
    }

    /// The parser knows the operation. Its table has gaps, which it mustn't be asked for.
    fn is_parsed(self) -> bool {
        matches!(self.opcode, 1..=6 | 8..=18 | 20..=46)
    }

    fn fail(self, chain: &Chain, errno: Errno) -> Result<usize, QueueError> {
        self.answer(chain, Err(errno.into()))
    }

    /// Answers with `outcome`, if the guest has room for it and waits for one.
    fn answer(self, chain: &Chain, outcome: io::Result<Vec<u8>>) -> Result<usize, QueueError> {
        let (errno, body) = match outcome {
            Ok(body) => (0, body),
            Err(error) => (error.raw_os_error().unwrap_or(libc::EIO), Vec::new()),
        };
        let length = OUT_HEADER_BYTES + body.len();
        if (chain.writable_len() as usize) < length || UNANSWERED.contains(&self.opcode) {
            return Ok(0);
        }
        let mut header = [0; OUT_HEADER_BYTES];
        header[..4].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_le_bytes());
        header[4..8].copy_from_slice(&(-errno).to_le_bytes());
        header[8..].copy_from_slice(&self.unique);
        chain.write_at(0, &header)?;
        chain.write_at(OUT_HEADER_BYTES, &body)?;
        Ok(length)
    }
}

impl Persist for Fs {
    const UNIT: &'static str = "fs";
    type State = FsState;

    fn save(&self) -> Result<FsState, Unsaveable> {
        Ok(FsState {
            tag: self.tag.clone(),
            mounted: self.tree.saved()?,
        })
    }

    fn restore(&mut self, state: FsState) -> Result<(), RestoreError> {
        let went_on = match state.mounted {
            _ if state.tag != self.tag => Err(format!(
                "it was saved with tag {:?}, the device has {:?}",
                state.tag, self.tag
            )),
            None => Ok(()),
            Some(mounted) => self.tree.take_up(&mounted),
        };
        went_on.map_err(|why| RestoreError::Mismatch {
            unit: Self::UNIT.to_owned(),
            why,
        })
    }
}

impl VirtioDevice for Fs {
    const ID: u32 = 26;

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        // virtio 1.3 §5.11.4: the tag, padded with zeros, and the number of request queues.
        let mut config = [0; MAX_FS_TAG_BYTES + 4];
        for (to, from) in config
            .iter_mut()
            .zip(self.tag.bytes().take(MAX_FS_TAG_BYTES))
        {
            *to = from;
        }
        config[MAX_FS_TAG_BYTES] = 1;
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        if let Some(queue) = queues.get_mut(index) {
            self.serve(queue)?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.tree.unmount();
    }

    fn shared_memory(&self, id: u8) -> Option<SharedMemory> {
        // virtio 1.3 §5.11.5: region 0 is the DAX window.
        let window = self.window.as_ref().filter(|_| id == 0)?;
        Some(SharedMemory {
            base: window.address(),
            length_bytes: window.length(),
        })
    }
}
