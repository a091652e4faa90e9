//! Content digests: `sha256:` and 64 lowercase hexadecimal digits, nothing else.
//!
//! Owns: parsing and computing digests. A [`Digest`] is always safe to use as a file name.
//! Refuses: other algorithms (no registry in use needs them; the OCI image spec only requires
//! sha256, see descriptor.md "Registered algorithms").

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A sha256 content digest.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest {
    hex: String,
}

/// Why a text is not a digest.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    /// The algorithm is missing or is not sha256.
    #[error("unsupported digest {0:?}: only sha256:<64 hexadecimal digits> is accepted")]
    Unsupported(String),
}

impl Digest {
    /// Digest of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::default();
        hasher.update(bytes);
        hasher.finish()
    }

    /// The 64 hexadecimal digits, without the algorithm.
    #[must_use]
    pub fn hex(&self) -> &str {
        &self.hex
    }

    /// The first 12 hexadecimal digits: what people see as an image's ID.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.hex[..12]
    }

    /// A digest from its bare hexadecimal digits.
    ///
    /// # Errors
    /// When `hex` is not 64 lowercase hexadecimal digits.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        let valid = hex.len() == 64 && hex.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        if !valid {
            return Err(DigestError::Unsupported(hex.chars().take(160).collect()));
        }
        Ok(Self {
            hex: hex.to_owned(),
        })
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || DigestError::Unsupported(text.chars().take(160).collect());
        let hex = text.strip_prefix("sha256:").ok_or_else(refused)?;
        Self::from_hex(hex).map_err(|_| refused())
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A digest being computed.
#[derive(Default, Clone)]
pub(crate) struct Hasher(Sha256);

impl Hasher {
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub(crate) fn finish(self) -> Digest {
        use fmt::Write as _;
        let mut hex = String::with_capacity(64);
        for byte in self.0.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(hex, "{byte:02x}");
        }
        Digest { hex }
    }
}

/// Reads through to another reader, hashing and counting every byte that passes.
pub(crate) struct HashingReader<R> {
    source: R,
    hasher: Hasher,
    bytes: u64,
}

impl<R: Read> HashingReader<R> {
    pub(crate) fn new(source: R) -> Self {
        Self {
            source,
            hasher: Hasher::default(),
            bytes: 0,
        }
    }

    /// Digest of all bytes read so far, and their count.
    pub(crate) fn finish(self) -> (Digest, u64) {
        (self.hasher.finish(), self.bytes)
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_value() {
        let digest = Digest::of(b"abc");
        assert_eq!(
            digest.to_string(),
            "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
        assert_eq!(digest.short(), "ba7816bf8f01");
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }

    #[test]
    fn refuses_all_but_sha256() {
        let hex = "a".repeat(64);
        for text in [
            "",
            "sha256:",
            "sha256:../../etc/passwd",
            &format!("sha512:{}", "a".repeat(128)),
            &format!("sha256:{}", hex.to_uppercase()),
            &format!("sha256:{hex}a"),
            &hex,
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text}");
        }
    }
}
