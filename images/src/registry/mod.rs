//! Pulling images by the OCI distribution specification.
//!
//! Owns: choosing what to fetch, how many at once, when to try again, and checking that what came
//! is what was declared. Refuses: deciding what a downloaded layer may contain (`unpack` does) and
//! writing to the disk but through the store.

mod error;

use crate::Reference;
use crate::digest::Digest;
use crate::progress::{Progress, Silent};
use crate::store::{Image, ImageStore};

pub use error::PullError;

/// How to pull.
#[derive(Clone)]
pub struct PullOptions<'a> {
    /// Who asks.
    pub auth: Auth,
    /// Registries (`host` or `host:port`) to speak plain HTTP with, besides loopback ones.
    pub plain_http: Vec<String>,
    /// Which image of a multi-platform one.
    pub platform: Platform,
    /// Layers fetched at once.
    pub concurrency: usize,
    /// Attempts for each request that fails in a way that may pass.
    pub attempts: u32,
    /// Told what happens.
    pub progress: &'a dyn Progress,
}

impl Default for PullOptions<'_> {
    fn default() -> Self {
        Self {
            auth: Auth::FromFiles,
            plain_http: Vec::new(),
            platform: Platform::default(),
            concurrency: 3,
            attempts: 5,
            progress: &Silent,
        }
    }
}

/// Credentials for a registry.
#[derive(Clone, PartialEq, Eq)]
pub enum Auth {
    /// Those of `docker login` or `podman login`, if any: `$DOCKER_CONFIG/config.json` or
    /// `~/.docker/config.json` with its credential helpers, then `$REGISTRY_AUTH_FILE` or
    /// `$XDG_RUNTIME_DIR/containers/auth.json`. Anonymous otherwise.
    FromFiles,
    /// None.
    Anonymous,
    /// A name and a password (or an access token as password).
    Basic {
        /// User name.
        user: String,
        /// Password.
        password: String,
    },
    /// A registry token, sent as it is.
    Bearer(String),
}

/// The platform an image must be for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Operating system, as Go names it.
    pub os: String,
    /// Architecture, as Go names it.
    pub architecture: String,
    /// Variant; `None` takes the baseline.
    pub variant: Option<String>,
}

impl Default for Platform {
    fn default() -> Self {
        Self {
            os: "linux".to_owned(),
            architecture: "amd64".to_owned(),
            variant: None,
        }
    }
}

/// What a pull came to.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// The image, complete and unpacked.
    pub image: Image,
    /// What the registry says the reference is (of a multi-platform image, the index).
    pub digest: Digest,
    /// False when the reference already meant this image here ("image is up to date").
    pub newer: bool,
}

impl ImageStore {
    /// Fetches `reference` and unpacks its layers. What is here already is not fetched again;
    /// what an earlier attempt left is resumed.
    ///
    /// # Errors
    /// [`PullError`] says which registry, repository or layer, and why. The store is as before,
    /// but for partial downloads that the next pull resumes.
    pub fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions<'_>,
    ) -> Result<Pulled, PullError> {
        let _ = (reference, options);
        Err(PullError::NotFound {
            reference: reference.familiar(),
            reason: String::new(),
        })
    }
}
