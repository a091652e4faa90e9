//! Reading tar: one header after the other, and the data between them.
//!
//! Owns: the tar formats that layers come in (POSIX ustar and pax, GNU long names and sparse
//! files, v7), under caps. Refuses: guessing; a header that is not exactly right ends the layer.
//! Fields of one header block are decoded by the `tar` crate; its entries are not used, because
//! they read extended headers into memory whole, whatever their size.
//!
//! Formats: pax(1) "pax Interchange Format"; GNU tar manual, "Basic Tar Format", "Storing Sparse
//! Files".

use std::io::Read;
use std::ops::Range;

use tar::{EntryType, Header};

use super::Limits;
use super::error::{Result, UnpackError, from_read};
use super::extended::Extended;
use super::sparse::{self, Segment};

pub(super) const BLOCK: u64 = 512;

/// Largest extended header, long name or sparse map, in bytes.
pub(super) const MAX_EXTENDED_BYTES: u64 = 1 << 20;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    HardLink,
    Symlink,
    CharDevice,
    BlockDevice,
    Directory,
    Fifo,
}

/// One entry, all its headers taken together.
#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) name: Vec<u8>,
    /// Target of a link.
    pub(super) link: Vec<u8>,
    pub(super) kind: Kind,
    /// Bytes of the file, holes included.
    pub(super) size: u64,
    /// Where the data goes, when it does not fill the file.
    pub(super) segments: Option<Vec<Segment>>,
    /// Permission bits, setuid, setgid and sticky among them.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub(super) mtime: (i64, u32),
    pub(super) device: (u32, u32),
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tar being read.
pub(super) struct Archive<'l, R> {
    source: R,
    limits: &'l Limits,
    /// Bytes read so far.
    offset: u64,
    /// Bytes of the present entry's data that have not been read.
    data_left: u64,
    /// Bytes that fill its last block.
    padding: u64,
}

/// What the headers before an entry's own have said about it.
#[derive(Default)]
struct Pending {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    extended: Option<Extended>,
}

impl<'l, R: Read> Archive<'l, R> {
    pub(super) fn new(source: R, limits: &'l Limits) -> Self {
        Self {
            source,
            limits,
            offset: 0,
            data_left: 0,
            padding: 0,
        }
    }

    pub(super) fn into_source(self) -> R {
        self.source
    }

    /// Reads some of the present entry's data; 0 at its end.
    pub(super) fn read_data(&mut self, buffer: &mut [u8]) -> Result<usize> {
        let wanted = usize::try_from(self.data_left)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        if wanted == 0 {
            return Ok(0);
        }
        let count = loop {
            match self.source.read(&mut buffer[..wanted]) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => break other.map_err(from_read)?,
            }
        };
        if count == 0 {
            return Err(UnpackError::Truncated);
        }
        self.data_left -= count as u64;
        self.offset += count as u64;
        Ok(count)
    }

    /// The next entry, skipping what was not read of the present one; `None` at the end marker.
    pub(super) fn next_entry(&mut self) -> Result<Option<Entry>> {
        let mut pending = Pending::default();
        loop {
            self.skip_data()?;
            let start = self.offset;
            let Some(block) = self.read_header()? else {
                return match pending.is_empty() {
                    true => Ok(None),
                    false => Err(UnpackError::Truncated),
                };
            };
            let header = Header::from_byte_slice(&block);
            let malformed = |reason| UnpackError::Header {
                offset: start,
                reason,
            };
            check_sum(header).map_err(malformed)?;
            let kind = header.entry_type();
            let size = number(&block[SIZE])
                .and_then(|size| u64::try_from(size).ok())
                .ok_or_else(|| malformed("its size is not a number"))?;
            match kind {
                EntryType::GNULongName => pending.name = Some(self.read_long_name(size)?),
                EntryType::GNULongLink => pending.link = Some(self.read_long_name(size)?),
                EntryType::XHeader => {
                    let bytes = self.read_small(size)?;
                    pending.extended = Some(Extended::parse(&bytes, self.limits)?);
                }
                // Defaults for all that follows; Docker and containerd don't heed them either.
                EntryType::XGlobalHeader => self.set_data(size, start)?,
                _ => return self.assemble(header, size, pending, start).map(Some),
            }
        }
    }

    fn assemble(
        &mut self,
        header: &Header,
        header_size: u64,
        pending: Pending,
        start: u64,
    ) -> Result<Entry> {
        let malformed = |reason| UnpackError::Header {
            offset: start,
            reason,
        };
        let mut extended = pending.extended.unwrap_or_default();
        let mut name = extended
            .path
            .take()
            .or(pending.name)
            .unwrap_or_else(|| header.path_bytes().into_owned());
        let link = extended
            .link
            .take()
            .or(pending.link)
            .or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let kind = kind_of(header.entry_type(), &name)
            .ok_or_else(|| malformed("unsupported kind of entry"))?;
        // Only files have data; others' sizes mean nothing (POSIX) or hide data from a reader.
        let stored = match kind {
            Kind::File => extended.size.unwrap_or(header_size),
            _ => 0,
        };
        self.set_data(stored, start)?;
        let layout = match kind {
            Kind::File => sparse::layout(self, header, &extended)?,
            _ => None,
        };
        let (size, segments) = match layout {
            Some(layout) => {
                name = layout.name.unwrap_or(name);
                (layout.size, Some(layout.segments))
            }
            None => (stored, None),
        };
        let fields = Fields::read(header, &extended, kind).map_err(malformed)?;
        Ok(Entry {
            name,
            link: link.unwrap_or_default(),
            kind,
            size,
            segments,
            mode: fields.mode,
            uid: fields.uid,
            gid: fields.gid,
            mtime: fields.mtime,
            device: fields.device,
            xattrs: extended.xattrs,
        })
    }

    /// The next block that is not part of the end marker.
    fn read_header(&mut self) -> Result<Option<[u8; BLOCK as usize]>> {
        let start = self.offset;
        let Some(block) = self.read_block()? else {
            return Ok(None);
        };
        if block.iter().any(|b| *b != 0) {
            return Ok(Some(block));
        }
        match self.read_block()? {
            Some(second) if second.iter().any(|b| *b != 0) => Err(UnpackError::Header {
                offset: start,
                reason: "a block of zeroes stands alone",
            }),
            _ => Ok(None),
        }
    }

    /// One block, or `None` when the stream ends before it. Some tools leave the end marker out;
    /// whether anything is missing is for the diff id to say.
    pub(super) fn read_block(&mut self) -> Result<Option<[u8; BLOCK as usize]>> {
        let mut block = [0; BLOCK as usize];
        let mut filled = 0;
        while filled < block.len() {
            match self.source.read(&mut block[filled..]) {
                Ok(0) if filled == 0 => return Ok(None),
                Ok(0) => return Err(UnpackError::Truncated),
                Ok(count) => filled += count,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(from_read(error)),
            }
        }
        self.offset += BLOCK;
        Ok(Some(block))
    }

    /// One block of the present entry's data.
    pub(super) fn read_data_block(&mut self) -> Result<[u8; BLOCK as usize]> {
        let mut block = [0; BLOCK as usize];
        let mut filled = 0;
        while filled < block.len() {
            match self.read_data(&mut block[filled..])? {
                0 => return Err(UnpackError::Truncated),
                count => filled += count,
            }
        }
        Ok(block)
    }

    /// Bytes of the present entry's data that are still to come.
    pub(super) fn data_left(&self) -> u64 {
        self.data_left
    }

    /// Bytes of the tar read so far.
    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    fn set_data(&mut self, size: u64, start: u64) -> Result<()> {
        if size > self.limits.layer_bytes {
            let most = self.limits.layer_bytes;
            let text = format!("an entry of {size} bytes at byte {start}, at most {most}");
            return Err(UnpackError::Limit(text));
        }
        self.data_left = size;
        self.padding = (BLOCK - size % BLOCK) % BLOCK;
        Ok(())
    }

    fn skip_data(&mut self) -> Result<()> {
        self.data_left += std::mem::take(&mut self.padding);
        let mut buffer = [0; 16 * 1024];
        while self.read_data(&mut buffer)? > 0 {}
        Ok(())
    }

    fn read_small(&mut self, size: u64) -> Result<Vec<u8>> {
        if size > MAX_EXTENDED_BYTES {
            let text = format!("an extended header of {size} bytes, at most {MAX_EXTENDED_BYTES}");
            return Err(UnpackError::Limit(text));
        }
        self.set_data(size, self.offset)?;
        let mut bytes = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            match self.read_data(&mut buffer)? {
                0 => return Ok(bytes),
                count => bytes.extend_from_slice(&buffer[..count]),
            }
        }
    }

    fn read_long_name(&mut self, size: u64) -> Result<Vec<u8>> {
        let mut name = self.read_small(size)?;
        if let Some(end) = name.iter().position(|b| *b == 0) {
            name.truncate(end);
        }
        Ok(name)
    }
}

impl Pending {
    fn is_empty(&self) -> bool {
        self.name.is_none() && self.link.is_none() && self.extended.is_none()
    }
}

/// The numbers of one entry.
struct Fields {
    mode: u32,
    uid: u32,
    gid: u32,
    mtime: (i64, u32),
    device: (u32, u32),
}

impl Fields {
    fn read(
        header: &Header,
        extended: &Extended,
        kind: Kind,
    ) -> std::result::Result<Self, &'static str> {
        let bytes = header.as_bytes();
        let field = |range: Range<usize>| number(&bytes[range]).ok_or("a field is not a number");
        let id = |range, extended: Option<u64>| {
            let value =
                extended.map_or_else(|| field(range).map(i128::from), |id| Ok(id.into()))?;
            match u32::try_from(value) {
                // The last one means "leave as it is" to chown(2).
                Ok(id) if id != u32::MAX => Ok(id),
                _ => Err("an owner's ID is out of range"),
            }
        };
        let device = |range| {
            u32::try_from(field(range)?).map_err(|_| "the number of a device is out of range")
        };
        let mode = field(MODE)? & 0o7777;
        Ok(Self {
            mode: u32::try_from(mode).map_err(|_| "its mode is out of range")?,
            uid: id(UID, extended.uid)?,
            gid: id(GID, extended.gid)?,
            mtime: match extended.mtime {
                Some(time) => time,
                None => (field(MTIME)?, 0),
            },
            device: match kind {
                Kind::CharDevice | Kind::BlockDevice => {
                    (device(DEVICE_MAJOR)?, device(DEVICE_MINOR)?)
                }
                _ => (0, 0),
            },
        })
    }
}

/// Where the numbers of a header are (pax(1) "ustar Header Block").
const MODE: Range<usize> = 100..108;
const UID: Range<usize> = 108..116;
const GID: Range<usize> = 116..124;
const SIZE: Range<usize> = 124..136;
const MTIME: Range<usize> = 136..148;
const DEVICE_MAJOR: Range<usize> = 329..337;
const DEVICE_MINOR: Range<usize> = 337..345;

/// A number of a header: octal digits between spaces and NULs, nothing at all for zero, or GNU's
/// big-endian binary with the first bit set. (The `tar` crate refuses empty fields, which tools
/// do write, and reads negative numbers as positive ones.)
fn number(field: &[u8]) -> Option<i64> {
    match field {
        [first @ 0x80..=0xff, rest @ ..] => {
            let negative = first & 0x40 != 0;
            let top = i128::from(first & 0x3f) - if negative { 0x40 } else { 0 };
            // Twelve bytes at most fit 128 bits.
            let value = rest
                .iter()
                .fold(top, |value, byte| (value << 8) | i128::from(*byte));
            i64::try_from(value).ok()
        }
        _ => {
            let blank = |b: &u8| matches!(b, b' ' | 0);
            let start = field.iter().position(|b| !blank(b)).unwrap_or(field.len());
            let text = &field[start..];
            let text = &text[..text.iter().position(blank).unwrap_or(text.len())];
            text.iter().try_fold(0_i64, |value, digit| match digit {
                b'0'..=b'7' => Some(value * 8 + i64::from(digit - b'0')),
                _ => None,
            })
        }
    }
}

fn kind_of(kind: EntryType, name: &[u8]) -> Option<Kind> {
    Some(match kind {
        // v7 tar had no directories, only names that end in a slash.
        EntryType::Regular | EntryType::Continuous if name.ends_with(b"/") => Kind::Directory,
        EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => Kind::File,
        EntryType::Link => Kind::HardLink,
        EntryType::Symlink => Kind::Symlink,
        EntryType::Char => Kind::CharDevice,
        EntryType::Block => Kind::BlockDevice,
        EntryType::Directory => Kind::Directory,
        EntryType::Fifo => Kind::Fifo,
        _ => return None,
    })
}

/// The checksum over the block with its own field as spaces; some old tools summed signed bytes.
fn check_sum(header: &Header) -> std::result::Result<(), &'static str> {
    let bytes = header.as_bytes();
    let stated = header.cksum().map_err(|_| "its checksum is not a number")?;
    let counted = |(at, byte): (usize, &u8)| {
        if (148..156).contains(&at) {
            b' '
        } else {
            *byte
        }
    };
    let unsigned: u32 = bytes.iter().enumerate().map(counted).map(u32::from).sum();
    let signed: i32 = bytes
        .iter()
        .enumerate()
        .map(counted)
        .map(|b| i32::from(b.cast_signed()))
        .sum();
    if stated == unsigned || i64::from(stated) == i64::from(signed) {
        Ok(())
    } else {
        Err("its checksum is wrong")
    }
}

#[cfg(test)]
mod tests {
    use super::number;

    #[test]
    fn numbers_of_headers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"  644 \0\0", Some(0o644)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"77777777777\0", Some(0o77_777_777_777)),
            (b"777777777777", Some(0o777_777_777_777)),
            (b"\x80\0\0\0\0\0\x01\x02", Some(258)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (
                b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff",
                Some(i64::MAX),
            ),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"0000648\0", None),
            (b"-000644\0", None),
            (b"0x00644\0", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }
}
