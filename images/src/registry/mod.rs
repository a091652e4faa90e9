//! Pulling images by the OCI distribution specification.
//!
//! Owns: choosing what to fetch, how many at once, when to try again, and checking that what came
//! is what was declared. Refuses: deciding what a downloaded layer may contain (`unpack` does) and
//! writing to the disk but through the store.

mod client;
mod credentials;
mod error;
mod fetch;
mod layers;
mod tokens;

use std::sync::atomic::AtomicBool;

use self::client::Client;
use self::fetch::Fetcher;
use crate::Reference;
use crate::digest::Digest;
use crate::manifest::{self, Document, Manifest};
use crate::progress::{Progress, Silent};
use crate::store::{Entry, Image, ImageStore};

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
    /// An identity token (OAuth2 refresh token), which the token server takes.
    Identity(String),
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
    /// but for partial downloads that the next pull resumes. When the disk is full, these go too,
    /// with all else that no image needs.
    pub fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions<'_>,
    ) -> Result<Pulled, PullError> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("hull-registry")
            .enable_all()
            .build()
            .map_err(|error| PullError::Registry {
                registry: reference.registry_address().to_owned(),
                reason: format!("cannot start a client: {error}"),
            })?;
        let auth = credentials::find(&options.auth, reference)?;
        let client = Client::new(reference, auth, options)?;
        let fetcher = Fetcher {
            client: &client,
            store: self,
            runtime: &runtime,
            options,
            reference: reference.familiar(),
            stopped: AtomicBool::new(false),
        };
        match fetcher.pull(reference) {
            Err(PullError::Store { reference, source }) if source.is_full() => {
                // Why it failed is what to tell; what cannot be freed now is swept later.
                let _ = self.collect_garbage();
                let source = self.explained(source);
                Err(PullError::Store { reference, source })
            }
            pulled => pulled,
        }
    }
}

impl Fetcher<'_> {
    fn pull(&self, reference: &Reference) -> Result<Pulled, PullError> {
        let stored = |source| self.stored(source);
        let _hold = self.store.hold().map_err(stored)?;
        let before = self.store.resolve(&reference.to_string()).map_err(stored)?;
        self.attempt(|| self.client.authenticate())?;
        let (bytes, top_digest) = self.top(reference)?;
        let (bytes, manifest) = self.image_manifest(bytes)?;
        let digest = self.store.put_blob(&bytes).map_err(stored)?;
        let image = self.contents(&digest, bytes.len() as u64, &manifest)?;
        let entry = Entry {
            digest: digest.clone(),
            size: bytes.len() as u64,
            media_type: manifest.media_type,
            image_id: image.id.clone(),
            tag: reference.digest().is_none().then(|| reference.clone()),
            pinned: Some(reference.with_digest(&top_digest)),
        };
        self.store.record(entry).map_err(stored)?;
        let image = self
            .store
            .resolve(&digest_name(reference, &top_digest))
            .map_err(stored)?;
        let image = image.ok_or_else(|| self.unusable("it vanished from the store".to_owned()))?;
        let newer = before.is_none_or(|before| before.digest != digest);
        Ok(Pulled {
            image,
            digest: top_digest,
            newer,
        })
    }

    /// The document that the reference names, and its digest.
    fn top(&self, reference: &Reference) -> Result<(Vec<u8>, Digest), PullError> {
        match reference.digest() {
            Some(digest) => Ok((self.document(digest)?, digest.clone())),
            None => {
                let tag = reference.tag().unwrap_or("latest");
                let bytes = self.attempt(|| self.client.manifest(tag))?;
                let digest = Digest::of(&bytes);
                Ok((bytes, digest))
            }
        }
    }

    /// A manifest or index by its digest, verified.
    fn document(&self, digest: &Digest) -> Result<Vec<u8>, PullError> {
        let name = digest.to_string();
        let bytes = self.attempt(|| self.client.manifest(&name))?;
        match Digest::of(&bytes) {
            actual if actual == *digest => Ok(bytes),
            actual => Err(self.stored(crate::store::StoreError::DigestMismatch {
                expected: digest.clone(),
                actual,
            })),
        }
    }

    /// The image's own manifest, chosen from `bytes` if that is an index.
    fn image_manifest(&self, bytes: Vec<u8>) -> Result<(Vec<u8>, Manifest), PullError> {
        let unusable = |error: manifest::ManifestError| self.unusable(error.to_string());
        let entries = match Document::parse(&bytes).map_err(unusable)? {
            Document::Image(manifest) => return Ok((bytes, manifest)),
            Document::Index(entries) => entries,
        };
        let Platform {
            os,
            architecture,
            variant,
        } = &self.options.platform;
        let chosen =
            manifest::choose(&entries, os, architecture, variant.as_deref()).map_err(unusable)?;
        let bytes = self.document(&chosen.digest)?;
        if bytes.len() as u64 != chosen.size {
            return Err(self.stored(crate::store::StoreError::SizeMismatch {
                digest: chosen.digest.clone(),
                declared: chosen.size,
                actual: bytes.len() as u64,
            }));
        }
        let manifest = Manifest::parse(&bytes).map_err(unusable)?;
        Ok((bytes, manifest))
    }

    /// Configuration and layers: fetched, verified, unpacked.
    fn contents(
        &self,
        digest: &Digest,
        manifest_bytes: u64,
        manifest: &Manifest,
    ) -> Result<Image, PullError> {
        let config = &manifest.config;
        if config.size > manifest::MAX_BYTES {
            let most = manifest::MAX_BYTES;
            return Err(self.unusable(format!("its configuration is larger than {most} bytes")));
        }
        self.blob(&config.digest, config.size)?;
        let stored = |source| self.stored(source);
        let bytes = self
            .store
            .read_blob(&config.digest, manifest::MAX_BYTES)
            .map_err(stored)?;
        let image =
            Image::from_parts(digest.clone(), manifest_bytes, manifest, &bytes).map_err(stored)?;
        self.check_platform(&image)?;
        self.layers(&image.layers)?;
        Ok(image)
    }

    fn check_platform(&self, image: &Image) -> Result<(), PullError> {
        let wanted = &self.options.platform;
        let (os, architecture) = (
            image.config.os().to_string(),
            image.config.architecture().to_string(),
        );
        if os == wanted.os && architecture == wanted.architecture {
            return Ok(());
        }
        let wanted = format!("{}/{}", wanted.os, wanted.architecture);
        Err(self.unusable(format!(
            "the image is for {os}/{architecture}, not for {wanted}"
        )))
    }

    fn unusable(&self, reason: String) -> PullError {
        PullError::Manifest {
            reference: self.reference.clone(),
            reason,
        }
    }
}

fn digest_name(reference: &Reference, digest: &Digest) -> String {
    reference.with_digest(digest).to_string()
}
