//! The file of a saved guest, a template's or a checkpoint's: its memory, and behind it what else
//! its machine was.
//!
//! ```text
//! 0            the memory, zero pages as holes; mapped as it lies
//!              a template's: what its guest's disk has, run by run
//! memory_bytes "hull-template CRC\n", with the CRC-32 of all that follows ("hull-checkpoint CRC\n")
//!              the header, one line of JSON; the machine's state, MessagePack
//! end - 8      memory_bytes, 64 bits, little-endian
//! ```
//!
//! Owns: writing it, and refusing one that isn't what was written. The head is checked at each
//! use. The memory is checked as a whole at its first use since the host booted; after that by its
//! modification time, which the header knows: a copy of it would cost more than it saves. The
//! access time is set by hand: it is the time of the last use.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use hull_vmm::memory::MemoryImage;
use rustix::fs::{Timespec, Timestamps, UTIME_NOW, futimens};
use rustix::time::{ClockId, clock_gettime};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::rootfs::next_run;

/// Digits of a CRC-32 and a newline, which follow the first word.
const CRC: usize = 9;
/// Memory comes in multiples of this.
pub(super) const UNIT: u64 = 2 << 20;
/// The most that may lie behind the memory.
const MOST_HEAD: u64 = 128 << 20;
const PAGE: usize = 4096;
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// A saved guest that can't be written or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FileError {
    /// The disk refused.
    #[error("cannot {what} it")]
    Disk {
        what: &'static str,
        source: io::Error,
    },
    /// It isn't what was written.
    #[error("{0}")]
    Wrong(&'static str),
    /// What it says of itself can't be understood.
    #[error("its header can't be read")]
    Header(#[from] serde_json::Error),
    /// The machine's state can't be understood.
    #[error("its state can't be read")]
    State(#[from] rmp_serde::decode::Error),
    /// The machine's state has no form in bytes: a bug.
    #[error("its state can't be written")]
    Encode(#[from] rmp_serde::encode::Error),
}

fn disk(what: &'static str) -> impl FnOnce(io::Error) -> FileError {
    move |source| FileError::Disk { what, source }
}

/// What is saved, as the file's first word says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A guest that belongs to nobody yet.
    Template,
    /// A container's.
    Checkpoint,
}

impl Kind {
    fn word(self) -> &'static str {
        match self {
            Self::Template => "hull-template ",
            Self::Checkpoint => "hull-checkpoint ",
        }
    }
}

/// What it says of itself; `key` is what a host must have in common with the one that saved it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header<K> {
    pub(crate) key: K,
    /// Bytes of the guest's memory, and of what lies with it.
    pub(crate) memory_bytes: u64,
    /// The guest kernel's release.
    pub(crate) kernel: String,
    /// When it was made, in seconds since the epoch: also the file's modification time.
    pub(crate) made_at: i64,
    memory_crc: u32,
}

/// The pages of a guest's memory.
pub(crate) trait Pages {
    /// Where there next may be anything but zeros, from `offset` on, in whole pages.
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>>;
    /// Reads whole pages of such a place.
    fn read_at(&self, pages: &mut [u8], offset: u64) -> io::Result<()>;
}

/// Those that a file begins with.
pub(crate) struct Stored<'a> {
    pub(crate) file: &'a File,
    pub(crate) length: u64,
}

impl Pages for Stored<'_> {
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        const WITHIN: u64 = PAGE as u64 - 1;
        let next = next_run(self.file, offset, self.length)?;
        // Memory is whole pages.
        Ok(next.map(|run| (run.start & !WITHIN, (run.end + WITHIN) & !WITHIN)))
    }

    fn read_at(&self, pages: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(pages, offset)
    }
}

/// Those, and behind them what is on a disk.
pub(super) struct WithDisk<'a> {
    pub(super) memory: Stored<'a>,
    pub(super) on_disk: &'a [u8],
}

impl Pages for WithDisk<'_> {
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let begin = self.memory.length;
        if offset < begin
            && let Some(next) = self.memory.next_data(offset)?
        {
            return Ok(Some(next));
        }
        let end = begin + (self.on_disk.len() as u64).next_multiple_of(PAGE as u64);
        let next = offset.max(begin);
        Ok((next < end).then_some((next, end)))
    }

    fn read_at(&self, pages: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(begin) = offset.checked_sub(self.memory.length) else {
            return self.memory.read_at(pages, offset);
        };
        let begin = usize::try_from(begin).unwrap_or(usize::MAX);
        let bytes = self.on_disk.get(begin..).unwrap_or_default();
        let count = bytes.len().min(pages.len());
        pages.fill(0);
        let (there, here) = (bytes.get(..count), pages.get_mut(..count));
        if let (Some(there), Some(here)) = (there, here) {
            here.copy_from_slice(there);
        }
        Ok(())
    }
}

impl Pages for MemoryImage {
    fn next_data(&self, offset: u64) -> io::Result<Option<(u64, u64)>> {
        let filled = self.filled();
        let next = filled.partition_point(|range| range.end <= offset);
        let next = filled.get(next);
        Ok(next.map(|range| (range.start.max(offset), range.end)))
    }

    fn read_at(&self, pages: &mut [u8], offset: u64) -> io::Result<()> {
        MemoryImage::read_at(self, pages, offset)
    }
}

/// What is to be written.
pub(crate) struct Saved<'a, K, S> {
    pub(crate) kind: Kind,
    pub(crate) key: &'a K,
    /// The guest kernel's release.
    pub(crate) kernel: &'a str,
    pub(crate) memory_bytes: u64,
    pub(crate) state: &'a S,
}

/// Writes a saved guest to an empty file.
pub(crate) fn write<K: Serialize, S: Serialize>(
    file: &File,
    saved: &Saved<'_, K, S>,
    memory: &impl Pages,
) -> Result<(), FileError> {
    file.set_len(saved.memory_bytes).map_err(disk("size"))?;
    let memory_crc = each_run(memory, |offset, pages| file.write_all_at(pages, offset))
        .map_err(disk("write"))?;
    let header = Header {
        key: saved.key,
        memory_bytes: saved.memory_bytes,
        kernel: saved.kernel.to_owned(),
        made_at: clock_gettime(ClockId::Realtime).tv_sec,
        memory_crc,
    };
    let mut text = serde_json::to_vec(&header)?;
    text.push(b'\n');
    rmp_serde::encode::write(&mut text, saved.state)?;
    text.extend_from_slice(&saved.memory_bytes.to_le_bytes());
    let crc = crc32fast::hash(&text);
    let mut head = format!("{}{crc:08x}\n", saved.kind.word()).into_bytes();
    head.append(&mut text);
    if head.len() as u64 > MOST_HEAD {
        return Err(FileError::Wrong("its state is too large"));
    }
    file.write_all_at(&head, saved.memory_bytes)
        .map_err(disk("write"))?;
    let times = Timestamps {
        last_access: time(0, UTIME_NOW),
        last_modification: time(header.made_at, 0),
    };
    futimens(file, &times).map_err(|error| disk("date")(error.into()))?;
    file.sync_all().map_err(disk("write"))
}

fn time(seconds: i64, nanoseconds: i64) -> Timespec {
    Timespec {
        tv_sec: seconds,
        tv_nsec: nanoseconds,
    }
}

/// A saved guest's state as it was written, with what stands before it.
pub(crate) struct State {
    head: Vec<u8>,
    from: usize,
}

impl State {
    /// Understands it.
    pub(crate) fn read<S: DeserializeOwned>(&self) -> Result<S, FileError> {
        let bytes = self.head.get(self.from..).unwrap_or_default();
        Ok(rmp_serde::from_slice(bytes)?)
    }
}

/// Reads and checks a saved guest's head; the state is left as it was written.
pub(crate) fn read_head<K: DeserializeOwned>(
    file: &File,
    kind: Kind,
) -> Result<(Header<K>, State), FileError> {
    const CUT: FileError = FileError::Wrong("it was cut");
    let length = file.metadata().map_err(disk("look at"))?.len();
    let mut last = [0; 8];
    let end = length.checked_sub(8).ok_or(CUT)?;
    file.read_exact_at(&mut last, end).map_err(disk("read"))?;
    let memory_bytes = u64::from_le_bytes(last);
    let first_line = kind.word().len() + CRC;
    let head_bytes = length
        .checked_sub(memory_bytes)
        .filter(|length| *length <= MOST_HEAD)
        .filter(|_| memory_bytes > 0 && memory_bytes.is_multiple_of(UNIT))
        .and_then(|length| usize::try_from(length).ok())
        .filter(|length| *length > first_line)
        .ok_or(CUT)?;
    let mut head = vec![0; head_bytes];
    file.read_exact_at(&mut head, memory_bytes)
        .map_err(disk("read"))?;
    let (first, text) = head.split_at_checked(first_line).ok_or(CUT)?;
    let crc = first
        .strip_prefix(kind.word().as_bytes())
        .and_then(|rest| str::from_utf8(rest).ok())
        .and_then(|rest| u32::from_str_radix(rest.trim_end(), 16).ok())
        .ok_or(match kind {
            Kind::Template => FileError::Wrong("it doesn't begin as a template does"),
            Kind::Checkpoint => FileError::Wrong("it doesn't begin as a checkpoint does"),
        })?;
    if crc32fast::hash(text) != crc {
        return Err(FileError::Wrong("its state was changed since it was made"));
    }
    let end = text.iter().position(|&byte| byte == b'\n').ok_or(CUT)?;
    let header: Header<K> = serde_json::from_slice(text.get(..end).unwrap_or_default())?;
    if header.memory_bytes != memory_bytes {
        return Err(FileError::Wrong("its memory was cut"));
    }
    let from = first_line + end + 1;
    head.truncate(head.len().saturating_sub(last.len()));
    Ok((header, State { head, from }))
}

/// Checks the memory, if nobody has since this host booted or since it was written to, and notes
/// this use. Says whether it had to.
pub(crate) fn check_memory<K>(file: &File, header: &Header<K>) -> Result<bool, FileError> {
    let metadata = file.metadata().map_err(disk("look at"))?;
    let is_as_made = (metadata.mtime(), metadata.mtime_nsec()) == (header.made_at, 0);
    let is_new = metadata.atime() < booted_at() || !is_as_made;
    if is_new {
        let length = header.memory_bytes;
        let crc = each_run(&Stored { file, length }, |_, _| Ok(())).map_err(disk("read"))?;
        if crc != header.memory_crc {
            return Err(FileError::Wrong("its memory was changed since it was made"));
        }
    }
    let times = Timestamps {
        last_access: time(0, UTIME_NOW),
        last_modification: time(header.made_at, 0),
    };
    // On a disk that refuses, the memory is checked again and the template seems unused.
    let _ = futimens(file, &times);
    Ok(is_new)
}

/// When this host booted, in seconds since the epoch, by its clock of today.
fn booted_at() -> i64 {
    let since = clock_gettime(ClockId::Boottime).tv_sec;
    clock_gettime(ClockId::Realtime).tv_sec - since
}

/// Shows the runs of pages that aren't zero, in order, and returns the CRC-32 of these pages, each
/// behind its place.
fn each_run(
    memory: &impl Pages,
    mut show: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0;
    while let Some((data, end)) = memory.next_data(offset)? {
        let count = usize::try_from(end - data).map_or(CHUNK, |left| left.min(CHUNK));
        let part = chunk.get_mut(..count).unwrap_or_default();
        memory.read_at(part, data)?;
        let pages: Vec<&[u8]> = part.chunks(PAGE).collect();
        let mut at = data;
        for run in pages.chunk_by(|one, other| is_zero(one) == is_zero(other)) {
            let begin = at;
            for page in run {
                if !is_zero(page) {
                    crc.update(&at.to_le_bytes());
                    crc.update(page);
                }
                at += page.len() as u64;
            }
            let place = |at: u64| usize::try_from(at - data).unwrap_or(usize::MAX);
            if let Some(bytes) = part.get(place(begin)..place(at))
                && !is_zero(run.first().unwrap_or(&bytes))
            {
                show(begin, bytes)?;
            }
        }
        offset = data + count as u64;
    }
    Ok(crc.finalize())
}

fn is_zero(page: &[u8]) -> bool {
    const ZERO: [u8; PAGE] = [0; PAGE];
    ZERO.get(..page.len()) == Some(page)
}
