//! Why layers are refused.

use std::io;

use crate::digest::Digest;

/// Why a layer was not unpacked. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The tar ends inside an entry or without its end marker.
    #[error("unexpected end of layer: it is truncated")]
    Truncated,
}
