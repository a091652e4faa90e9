//! A template's file: the guest's memory, and behind it what else the machine was.
//!
//! ```text
//! 0            the memory, zero pages as holes; mapped as it lies
//! memory_bytes "hull-template CRC\n", with the CRC-32 of all that follows
//!              the header, one line of JSON; the machine's state, MessagePack to the file's end
//! ```
//!
//! Owns: writing it, and refusing one that isn't what was written. The head is checked at each
//! use. The memory is checked as a whole at its first use since the host booted; after that by its
//! modification time, which the header knows: a copy of it would cost more than it saves. The
//! access time is set by hand: it is the time of the last use.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

use hull_vmm::machine::MachineState;
use rustix::fs::{SeekFrom, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, futimens};
use rustix::io::Errno;
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::key::Key;

const MAGIC: &str = "hull-template ";
/// The magic word, eight digits and a newline.
const FIRST_LINE: usize = MAGIC.len() + 9;
/// Memory comes in multiples of this, and what lies behind it is less.
const UNIT: u64 = 2 << 20;
const PAGE: usize = 4096;
/// Bytes that are read at once.
const CHUNK: usize = 1 << 20;

/// A template that can't be written or used.
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

/// What a template says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Header {
    pub(crate) key: Key,
    /// The guest kernel's release.
    pub(crate) kernel: String,
    /// When it was made, in seconds since the epoch: also the file's modification time.
    pub(crate) made_at: i64,
    memory_crc: u32,
}

/// Writes a template to an empty file: memory from another file of the key's size, and the state.
pub(super) fn write(
    file: &File,
    key: &Key,
    kernel: &str,
    memory: &File,
    state: &MachineState,
) -> Result<(), FileError> {
    file.set_len(key.memory_bytes).map_err(disk("size"))?;
    let memory_crc = each_run(memory, key.memory_bytes, |offset, pages| {
        file.write_all_at(pages, offset)
    })
    .map_err(disk("write"))?;
    let header = Header {
        key: key.clone(),
        kernel: kernel.to_owned(),
        made_at: clock_gettime(ClockId::Realtime).tv_sec,
        memory_crc,
    };
    let mut text = serde_json::to_vec(&header)?;
    text.push(b'\n');
    rmp_serde::encode::write(&mut text, state)?;
    let mut head = format!("{MAGIC}{:08x}\n", crc32fast::hash(&text)).into_bytes();
    head.append(&mut text);
    file.write_all_at(&head, key.memory_bytes)
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

/// Reads and checks a template's head; the state is left as its bytes.
pub(super) fn read_head(file: &File) -> Result<(Header, Vec<u8>), FileError> {
    let metadata = file.metadata().map_err(disk("look at"))?;
    let memory_bytes = metadata.len() & !(UNIT - 1);
    let length = usize::try_from(metadata.len() - memory_bytes)
        .ok()
        .filter(|length| *length > FIRST_LINE)
        .ok_or(FileError::Wrong("it was cut"))?;
    let mut head = vec![0; length];
    file.read_exact_at(&mut head, memory_bytes)
        .map_err(disk("read"))?;
    let text = head.split_off(FIRST_LINE);
    let crc = head
        .strip_prefix(MAGIC.as_bytes())
        .and_then(|rest| str::from_utf8(rest).ok())
        .and_then(|rest| u32::from_str_radix(rest.trim_end(), 16).ok())
        .ok_or(FileError::Wrong("it doesn't begin as a template does"))?;
    if crc32fast::hash(&text) != crc {
        return Err(FileError::Wrong("its state was changed since it was made"));
    }
    let end = text.iter().position(|&byte| byte == b'\n');
    let (header, state) = text.split_at(end.unwrap_or(text.len()));
    let header: Header = serde_json::from_slice(header)?;
    if header.key.memory_bytes != memory_bytes {
        return Err(FileError::Wrong("its memory was cut"));
    }
    if (metadata.mtime(), metadata.mtime_nsec()) != (header.made_at, 0) {
        return Err(FileError::Wrong("it was changed since it was made"));
    }
    Ok((header, state.get(1..).unwrap_or_default().to_vec()))
}

/// Understands a state's bytes.
pub(super) fn state(bytes: &[u8]) -> Result<MachineState, FileError> {
    Ok(rmp_serde::from_slice(bytes)?)
}

/// Checks the memory, if nobody has since this host booted, and notes this use.
pub(super) fn check_memory(file: &File, header: &Header) -> Result<(), FileError> {
    let metadata = file.metadata().map_err(disk("look at"))?;
    if metadata.atime() < booted_at() {
        let crc = each_run(file, header.key.memory_bytes, |_, _| Ok(())).map_err(disk("read"))?;
        if crc != header.memory_crc {
            return Err(FileError::Wrong("its memory was changed since it was made"));
        }
    }
    let times = Timestamps {
        last_access: time(0, UTIME_NOW),
        last_modification: time(0, UTIME_OMIT),
    };
    // On a disk that refuses, the memory is checked again and the template seems unused.
    let _ = futimens(file, &times);
    Ok(())
}

/// When this host booted, in seconds since the epoch, by its clock of today.
fn booted_at() -> i64 {
    let since = clock_gettime(ClockId::Boottime).tv_sec;
    clock_gettime(ClockId::Realtime).tv_sec - since
}

/// Shows the runs of pages that aren't zero, in order, and returns the CRC-32 of these pages, each
/// behind its place.
fn each_run(
    file: &File,
    length: u64,
    mut show: impl FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    let mut chunk = vec![0; CHUNK];
    let mut offset = 0;
    while let Some((data, end)) = next_data(file, offset, length)? {
        let count = usize::try_from(end - data).map_or(CHUNK, |left| left.min(CHUNK));
        let part = chunk.get_mut(..count).unwrap_or_default();
        file.read_exact_at(part, data)?;
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

/// Where the file next holds data, from `offset` on, in whole pages.
fn next_data(file: &File, offset: u64, length: u64) -> io::Result<Option<(u64, u64)>> {
    const WITHIN: u64 = PAGE as u64 - 1;
    if offset >= length {
        return Ok(None);
    }
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(data) if data < length => {
            let end = rustix::fs::seek(file, SeekFrom::Hole(data))?;
            let end = ((end + WITHIN) & !WITHIN).min(length);
            Ok(Some((data & !WITHIN, end)))
        }
        Ok(_) | Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
