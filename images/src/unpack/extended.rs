//! Pax extended headers.
//!
//! Owns: taking the records apart and keeping those that say something about a file. Refuses:
//! records whose stated length is wrong, NUL in names, too many attributes.

use super::Limits;
use super::error::{Result, UnpackError};

/// What one extended header says. Unknown records are dropped, as pax(1) demands.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    pub(super) sparse: SparseRecords,
}

/// The `GNU.sparse.*` records.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct SparseRecords {
    pub(super) major: Option<u64>,
    pub(super) name: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    /// Offsets and lengths in turn (formats 0.0 and 0.1).
    pub(super) map: Vec<u64>,
}

const MALFORMED: &str = "an extended header is malformed";

fn malformed() -> UnpackError {
    UnpackError::Header {
        offset: 0,
        reason: MALFORMED,
    }
}

impl Extended {
    pub(super) fn parse(mut bytes: &[u8], limits: &Limits) -> Result<Self> {
        let mut extended = Self::default();
        let mut xattr_bytes = 0_usize;
        while !bytes.is_empty() {
            let (key, value, rest) = record(bytes).ok_or_else(malformed)?;
            bytes = rest;
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                xattr_bytes += name.len() + value.len();
                if xattr_bytes > limits.xattr_bytes {
                    let most = limits.xattr_bytes;
                    let text = format!("extended attributes of one entry, at most {most} bytes");
                    return Err(UnpackError::Limit(text));
                }
                extended.xattrs.push((name.to_vec(), value.to_vec()));
            } else {
                extended.take(key, value)?;
            }
        }
        Ok(extended)
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let text = || Ok::<_, UnpackError>(Some(value.to_vec()));
        match key {
            // An empty value takes an earlier one back.
            b"path" if value.is_empty() => self.path = None,
            b"linkpath" if value.is_empty() => self.link = None,
            b"path" => self.path = text()?,
            b"linkpath" => self.link = text()?,
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.major" => self.sparse.major = Some(number(value)?),
            b"GNU.sparse.name" => self.sparse.name = text()?,
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.size = Some(number(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => self.sparse.map.push(number(value)?),
            b"GNU.sparse.map" => {
                let numbers = value.split(|b| *b == b',').map(number);
                self.sparse.map = numbers.collect::<Result<_>>()?;
            }
            _ => {}
        }
        Ok(())
    }
}

/// Splits `LENGTH KEY=VALUE\n` off the front.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let space = bytes.iter().take(12).position(|b| *b == b' ')?;
    let length = usize::try_from(number(&bytes[..space]).ok()?).ok()?;
    let (whole, rest) = bytes.split_at_checked(length)?;
    let pair = whole.get(space + 1..)?.strip_suffix(b"\n")?;
    let equals = pair.iter().position(|b| *b == b'=').filter(|at| *at > 0)?;
    Some((&pair[..equals], &pair[equals + 1..], rest))
}

/// Decimal digits, nothing else.
pub(super) fn number(text: &[u8]) -> Result<u64> {
    let digits = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    let parse = || std::str::from_utf8(text).ok()?.parse().ok();
    digits.then(parse).flatten().ok_or_else(malformed)
}

/// `-12.345678901`: seconds and nanoseconds, rounded down.
fn time(text: &[u8]) -> Result<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = number(parts.next().unwrap_or_default())?;
    let seconds = i64::try_from(seconds).map_err(|_| malformed())?;
    let mut nanos = 0;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(malformed());
    }
    for at in 0..9 {
        nanos = nanos * 10 + u32::from(fraction.get(at).map_or(0, |digit| digit - b'0'));
    }
    Ok(match (negative, nanos) {
        (false, _) => (seconds, nanos),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanos),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(bytes: &[u8]) -> Result<Extended> {
        Extended::parse(bytes, &Limits::default())
    }

    #[test]
    fn records_are_understood() {
        let all = b"12 path=a/b\n15 linkpath=/c\n12 size=123\n21 mtime=1.500000000\n\
            26 SCHILY.xattr.user.x=\ny\n11 other=1\n";
        let extended = parse(all).unwrap();
        assert_eq!(extended.path.as_deref(), Some(&b"a/b"[..]));
        assert_eq!(extended.link.as_deref(), Some(&b"/c"[..]));
        assert_eq!(extended.size, Some(123));
        assert_eq!(extended.mtime, Some((1, 500_000_000)));
        assert_eq!(extended.xattrs, vec![(b"user.x".to_vec(), b"\ny".to_vec())]);
    }

    #[test]
    fn times() {
        assert_eq!(time(b"0").unwrap(), (0, 0));
        assert_eq!(time(b"-1.25").unwrap(), (-2, 750_000_000));
        assert_eq!(time(b"7.1234567899").unwrap(), (7, 123_456_789));
        assert!(
            time(b"1.-5").is_err() && time(b"").is_err() && time(b"9223372036854775808").is_err()
        );
    }

    #[test]
    fn wrong_lengths_are_refused() {
        for bytes in [
            &b"13 path=a/b\n"[..],
            b"11 path=a/b\n",
            b"99 path=a\n",
            b"0 \n",
            b"path=a\n",
            b"18446744073709551616 path=a\n",
            b"8 path=\n",
            b"5 =a\n",
            b"+9 path=\n",
        ] {
            let refused = parse(bytes).is_err();
            assert!(
                refused || bytes == b"8 path=\n",
                "{}",
                String::from_utf8_lossy(bytes)
            );
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
