//! Why layers are refused.

use std::io;

use crate::digest::Digest;

/// Why a layer was not unpacked. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The stream ends inside an entry, or inside its compression.
    #[error("unexpected end of layer: it is truncated")]
    Truncated,
    /// The compressed stream is damaged.
    #[error("layer is corrupt")]
    Corrupt(#[source] io::Error),
    /// The compression is one that images do not use.
    #[error("unsupported layer compression: {0}")]
    Compression(&'static str),
    /// A tar header breaks the format.
    #[error("malformed tar header at byte {offset}: {reason}")]
    Header {
        /// Where it begins in the uncompressed tar.
        offset: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// An entry asks for something that no layer may have.
    #[error("entry {name} refused: {reason}")]
    Refused {
        /// The entry's name, quoted.
        name: String,
        /// The rule it breaks.
        reason: &'static str,
    },
    /// The layer costs more than it may.
    #[error("layer exceeds a limit: {0}")]
    Limit(String),
    /// The uncompressed tar is not the one that the image's configuration names.
    #[error("layer digest mismatch: diff id is {expected}, content is {actual}")]
    DiffId {
        /// What the configuration says.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The blob cannot be read.
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    /// A file cannot be made; "No space left on device" among others.
    #[error("cannot {action} entry {name}")]
    Write {
        /// What was tried.
        action: &'static str,
        /// The entry's name, quoted.
        name: String,
        /// Why it failed.
        source: io::Error,
    },
}

pub(super) type Result<T> = std::result::Result<T, UnpackError>;

/// A name from an archive, quoted and bounded for a message.
pub(super) fn quoted(name: &[u8]) -> String {
    let text: String = String::from_utf8_lossy(name).chars().take(200).collect();
    format!("{text:?}")
}

pub(super) fn refused(name: &[u8], reason: &'static str) -> UnpackError {
    UnpackError::Refused {
        name: quoted(name),
        reason,
    }
}

/// Finds out what a failed read of the decompressed stream means.
pub(super) fn from_read(error: io::Error) -> UnpackError {
    match error.downcast::<UnpackError>() {
        Ok(limit) => limit,
        Err(error) => match error.kind() {
            io::ErrorKind::UnexpectedEof => UnpackError::Truncated,
            _ if error.raw_os_error().is_some_and(|code| code > 0) => UnpackError::Read(error),
            _ => UnpackError::Corrupt(error),
        },
    }
}
