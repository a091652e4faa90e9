//! Why pulls fail, in words that Docker's users know.

use crate::digest::Digest;
use crate::store::StoreError;

/// Why a pull failed.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry cannot be reached.
    #[error("cannot reach registry {registry}: {reason}")]
    Unreachable {
        /// Host and port.
        registry: String,
        /// "no such host", "connection refused", …
        reason: String,
    },
    /// The registry wants credentials, or better ones.
    #[error("unauthorized: registry {registry} refuses access to {repository}: {reason}")]
    Unauthorized {
        /// Host and port.
        registry: String,
        /// Path of the repository.
        repository: String,
        /// What it says, and what to do.
        reason: String,
    },
    /// No such repository, tag or digest.
    #[error("manifest unknown: {reference} not found{reason}")]
    NotFound {
        /// The reference asked for.
        reference: String,
        /// What the registry says; in parentheses, or empty.
        reason: String,
    },
    /// The registry asks us to slow down, and did so on every attempt.
    #[error("registry {registry}: too many requests: {reason}")]
    TooManyRequests {
        /// Host and port.
        registry: String,
        /// What it says.
        reason: String,
    },
    /// The registry answered with an error, or with nonsense.
    #[error("registry {registry} failed: {reason}")]
    Registry {
        /// Host and port.
        registry: String,
        /// What it answered.
        reason: String,
    },
    /// The transfer broke off on every attempt; what arrived is kept for the next pull.
    #[error("transfer of {digest} from {registry} broke off after {received} bytes: {reason}")]
    BrokeOff {
        /// Host and port.
        registry: String,
        /// Which blob.
        digest: Digest,
        /// Bytes here.
        received: u64,
        /// Why.
        reason: String,
    },
    /// The manifest is not one of a container image that can be used here.
    #[error("cannot use {reference}: {reason}")]
    Manifest {
        /// The reference asked for.
        reference: String,
        /// Why.
        reason: String,
    },
    /// The credentials' file or helper failed.
    #[error("cannot get credentials for registry {registry}: {reason}")]
    Credentials {
        /// Host and port.
        registry: String,
        /// Why.
        reason: String,
    },
    /// What came is not what was declared, or cannot be stored or unpacked.
    #[error("cannot store {reference}")]
    Store {
        /// The reference asked for.
        reference: String,
        /// Why.
        #[source]
        source: StoreError,
    },
}
