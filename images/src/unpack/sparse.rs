//! Sparse files in tar.
//!
//! Owns: the maps of GNU's old format and of pax formats 0.0, 0.1 and 1.0, checked so that no
//! segment overlaps another or leaves the file, and that they account for all data. Refuses:
//! files whose size with holes breaks the layer's cap.

use std::io::Read;

use tar::{EntryType, GnuExtSparseHeader, Header};

use super::error::{Result, UnpackError};
use super::extended::{Extended, number};
use super::tar::{Archive, BLOCK, MAX_EXTENDED_BYTES};

/// Most segments of one file.
const MAX_SEGMENTS: usize = 1 << 18;

/// A run of data at `offset` bytes into the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// A sparse file.
pub(super) struct Layout {
    /// Its real name, where the header's is made up.
    pub(super) name: Option<Vec<u8>>,
    /// Its size with holes, in bytes.
    pub(super) size: u64,
    pub(super) segments: Vec<Segment>,
}

/// Reads the map that belongs to a file's header, if it has one.
pub(super) fn layout<R: Read>(
    archive: &mut Archive<'_, R>,
    header: &Header,
    extended: &Extended,
) -> Result<Option<Layout>> {
    let malformed = malformed_at(archive.offset());
    let records = &extended.sparse;
    let (size, segments) = if header.entry_type() == EntryType::GNUSparse {
        old_gnu(archive, header)?
    } else if let Some(size) = records.size {
        let numbers = match records.major {
            Some(1) => map_in_data(archive)?,
            None | Some(0) => records.map.clone(),
            Some(_) => return Err(malformed("an unknown format of sparse files")),
        };
        if numbers.len() % 2 != 0 {
            return Err(malformed("its sparse map is malformed"));
        }
        let pairs = numbers.chunks_exact(2);
        (
            size,
            pairs
                .map(|p| Segment {
                    offset: p[0],
                    length: p[1],
                })
                .collect(),
        )
    } else {
        return Ok(None);
    };
    check(&segments, size, archive.data_left()).map_err(malformed)?;
    Ok(Some(Layout {
        name: records.name.clone(),
        size,
        segments,
    }))
}

fn malformed_at(offset: u64) -> impl Fn(&'static str) -> UnpackError {
    move |reason| UnpackError::Header { offset, reason }
}

fn check(segments: &[Segment], size: u64, data: u64) -> std::result::Result<(), &'static str> {
    let (mut end, mut total) = (0_u64, 0_u64);
    for segment in segments {
        if segment.offset < end {
            return Err("its sparse map overlaps");
        }
        end = segment
            .offset
            .checked_add(segment.length)
            .ok_or("its sparse map overflows")?;
        total = total
            .checked_add(segment.length)
            .ok_or("its sparse map overflows")?;
    }
    if end > size {
        return Err("its sparse map leaves the file");
    }
    if total != data {
        return Err("its sparse map does not fit its data");
    }
    Ok(())
}

/// Old GNU format: four segments in the header, 21 in each block that follows it.
fn old_gnu<R: Read>(archive: &mut Archive<'_, R>, header: &Header) -> Result<(u64, Vec<Segment>)> {
    let malformed = malformed_at(archive.offset());
    let gnu = header
        .as_gnu()
        .ok_or_else(|| malformed("a sparse file not in GNU format"))?;
    let size = gnu
        .real_size()
        .map_err(|_| malformed("its real size is not a number"))?;
    let mut segments = Vec::new();
    let mut more = gnu.is_extended();
    let mut take = |sparse: &[tar::GnuSparseHeader]| {
        for field in sparse.iter().filter(|field| !field.is_empty()) {
            let segment = field.offset().and_then(|offset| {
                Ok(Segment {
                    offset,
                    length: field.length()?,
                })
            });
            segments.push(segment.map_err(|_| malformed("its sparse map is malformed"))?);
        }
        match segments.len() {
            0..=MAX_SEGMENTS => Ok(()),
            count => Err(UnpackError::Limit(format!(
                "a sparse file of {count} segments"
            ))),
        }
    };
    take(&gnu.sparse)?;
    while more {
        let block = archive.read_block()?.ok_or(UnpackError::Truncated)?;
        let mut next = GnuExtSparseHeader::new();
        next.as_mut_bytes().copy_from_slice(&block);
        take(next.sparse())?;
        more = next.is_extended();
    }
    Ok((size, segments))
}

/// Pax format 1.0: the data begins with decimal lines, the count of segments first, filled up to
/// a block.
fn map_in_data<R: Read>(archive: &mut Archive<'_, R>) -> Result<Vec<u64>> {
    let malformed = malformed_at(archive.offset());
    let mut numbers = Vec::new();
    let mut wanted = None;
    let mut line = Vec::new();
    let mut consumed = 0;
    while wanted.is_none_or(|wanted| numbers.len() < wanted) {
        if consumed >= MAX_EXTENDED_BYTES * 8 {
            return Err(UnpackError::Limit(
                "a sparse map of too many bytes".to_owned(),
            ));
        }
        consumed += BLOCK;
        for byte in archive.read_data_block()? {
            if byte != b'\n' {
                line.push(byte);
                if line.len() > 20 {
                    return Err(malformed("its sparse map is malformed"));
                }
                continue;
            }
            let value = number(&line)?;
            line.clear();
            match wanted {
                None => {
                    let count = usize::try_from(value).unwrap_or(usize::MAX);
                    if count > MAX_SEGMENTS {
                        let text = format!("a sparse file of {count} segments");
                        return Err(UnpackError::Limit(text));
                    }
                    wanted = Some(count * 2);
                }
                Some(_) => numbers.push(value),
            }
            if wanted == Some(numbers.len()) {
                break; // the rest of the block is filling
            }
        }
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(offset: u64, length: u64) -> Segment {
        Segment { offset, length }
    }

    #[test]
    fn maps_are_checked() {
        assert!(check(&[], 100, 0).is_ok());
        assert!(check(&[segment(0, 10), segment(50, 10)], 100, 20).is_ok());
        assert!(check(&[segment(0, 10), segment(100, 0)], 100, 10).is_ok());
        for (segments, size, data) in [
            (vec![segment(0, 10), segment(5, 10)], 100, 20),
            (vec![segment(95, 10)], 100, 10),
            (vec![segment(0, 10)], 100, 11),
            (vec![segment(u64::MAX, 2)], u64::MAX, 2),
            (vec![segment(50, 1), segment(0, 1)], 100, 2),
        ] {
            assert!(check(&segments, size, data).is_err(), "{segments:?}");
        }
    }
}
