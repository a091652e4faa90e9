//! The layer as a stream of tar bytes: decompressed, counted, capped, hashed.
//!
//! Owns: telling compressions apart, and the caps on bytes and on compression ratio. Refuses:
//! knowing what the bytes mean.

use std::cell::Cell;
use std::io::{self, BufRead, BufReader, Read};
use std::rc::Rc;

use flate2::bufread::MultiGzDecoder;

use super::Limits;
use super::error::{Result, UnpackError, from_read};
use crate::digest::{Digest, HashingReader};

const BUFFER_BYTES: usize = 128 * 1024;

/// How often the caller hears of progress, in compressed bytes.
const REPORT_BYTES: u64 = 1 << 20;

type Source<'a> = BufReader<Counted<'a>>;

/// Decompressed bytes of a layer.
pub(super) struct Stream<'a> {
    reader: BufReader<HashingReader<Capped<'a>>>,
}

impl<'a> Stream<'a> {
    /// Finds out how `blob` is compressed, and begins.
    pub(super) fn open(
        blob: Box<dyn Read + 'a>,
        limits: &'a Limits,
        report: &'a dyn Fn(u64),
    ) -> Result<Self> {
        let consumed = Rc::new(Cell::new(0));
        let counted = Counted {
            blob,
            consumed: Rc::clone(&consumed),
            reported: 0,
            report,
        };
        let mut source = BufReader::with_capacity(BUFFER_BYTES, counted);
        let decoder = match sniff(source.fill_buf().map_err(from_read)?)? {
            Kind::Plain => Decoder::Plain(source),
            Kind::Gzip => Decoder::Gzip(Box::new(MultiGzDecoder::new(source))),
            Kind::Zstd => {
                Decoder::Zstd(zstd::Decoder::with_buffer(source).map_err(UnpackError::Corrupt)?)
            }
        };
        let capped = Capped {
            decoder,
            consumed,
            produced: 0,
            limits,
        };
        let reader = BufReader::with_capacity(BUFFER_BYTES, HashingReader::new(capped));
        Ok(Self { reader })
    }

    /// Reads to the end, and gives the digest of all that came.
    pub(super) fn finish(mut self) -> Result<Digest> {
        loop {
            let count = self.reader.fill_buf().map_err(from_read)?.len();
            if count == 0 {
                return Ok(self.reader.into_inner().finish().0);
            }
            self.reader.consume(count);
        }
    }
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.reader.read(buffer)
    }
}

enum Kind {
    Plain,
    Gzip,
    Zstd,
}

fn sniff(start: &[u8]) -> Result<Kind> {
    Ok(match start {
        [0x1f, 0x8b, ..] => Kind::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Kind::Zstd,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => return Err(UnpackError::Compression("xz")),
        [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, ..] => {
            return Err(UnpackError::Compression("bzip2"));
        }
        _ => Kind::Plain,
    })
}

enum Decoder<'a> {
    Plain(Source<'a>),
    Gzip(Box<MultiGzDecoder<Source<'a>>>),
    Zstd(zstd::Decoder<'static, Source<'a>>),
}

impl Read for Decoder<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(source) => source.read(buffer),
            Self::Gzip(decoder) => decoder.read(buffer),
            Self::Zstd(decoder) => decoder.read(buffer),
        }
    }
}

/// The blob, counting what has been read of it.
struct Counted<'a> {
    blob: Box<dyn Read + 'a>,
    consumed: Rc<Cell<u64>>,
    reported: u64,
    report: &'a dyn Fn(u64),
}

impl Read for Counted<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.blob.read(buffer)?;
        let consumed = self.consumed.get() + count as u64;
        self.consumed.set(consumed);
        if consumed - self.reported >= REPORT_BYTES || (count == 0 && consumed > self.reported) {
            self.reported = consumed;
            (self.report)(consumed);
        }
        Ok(count)
    }
}

/// Ends the stream with an error when it grows past the caps.
struct Capped<'a> {
    decoder: Decoder<'a>,
    consumed: Rc<Cell<u64>>,
    produced: u64,
    limits: &'a Limits,
}

impl Read for Capped<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.decoder.read(buffer)?;
        self.produced = self.produced.saturating_add(count as u64);
        let Limits {
            layer_bytes,
            ratio,
            ratio_free_bytes,
            ..
        } = *self.limits;
        if self.produced > layer_bytes {
            let text = format!("more than {layer_bytes} bytes uncompressed");
            return Err(io::Error::other(UnpackError::Limit(text)));
        }
        let fair = self
            .consumed
            .get()
            .saturating_mul(ratio)
            .max(ratio_free_bytes);
        if self.produced > fair {
            let text = format!(
                "{} bytes from {} compressed ones, more than {ratio} to 1: a decompression bomb",
                self.produced,
                self.consumed.get()
            );
            return Err(io::Error::other(UnpackError::Limit(text)));
        }
        Ok(count)
    }
}
