//! Manifests and indexes, OCI's and Docker's (schema 2), reduced to what a pull needs.
//!
//! Owns: parsing them under caps, media types, choosing a platform. Refuses: I/O, schema 1,
//! foreign layers (Windows base layers fetched from elsewhere), artifacts that are not images.

use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Largest manifest, index or configuration accepted, in bytes (distribution-spec: "clients and
/// registries SHOULD limit manifests to 4 megabytes").
pub(crate) const MAX_BYTES: u64 = 4 * 1024 * 1024;

/// Most layers an image may have. Docker's own limit is 127.
pub(crate) const MAX_LAYERS: usize = 500;

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub(crate) const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
pub(crate) const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
pub(crate) const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub(crate) const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";

/// Why a manifest is not usable.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub(crate) enum ManifestError {
    #[error("manifest is not valid JSON: {0}")]
    Json(String),
    #[error("unsupported manifest type {0:?}")]
    Type(String),
    #[error("unsupported manifest schema version {0}")]
    Schema(u64),
    #[error("not a container image: its configuration has type {0:?}")]
    NotAnImage(String),
    #[error("unsupported layer type {0:?}")]
    Layer(String),
    #[error("foreign layer {0}: layers kept outside the registry are not fetched")]
    Foreign(Digest),
    #[error("too many layers: {0}, at most {MAX_LAYERS} are accepted")]
    TooManyLayers(usize),
    #[error("no image for {wanted} in the index; it offers {offered}")]
    NoPlatform { wanted: String, offered: String },
}

/// How a layer's tar is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

/// A pointer to content: what it is, its digest, its size in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Pointer {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) urls: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<PointerPlatform>,
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

/// The platform an index says an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PointerPlatform {
    pub(crate) architecture: String,
    pub(crate) os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
}

impl Pointer {
    pub(crate) fn new(media_type: &str, digest: Digest, size: u64) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            platform: None,
            annotations: std::collections::BTreeMap::new(),
        }
    }
}

/// The one image of a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) media_type: String,
    pub(crate) config: BlobPointer,
    /// Base first.
    pub(crate) layers: Vec<BlobPointer>,
}

/// A configuration or a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BlobPointer {
    pub(crate) digest: Digest,
    pub(crate) size: u64,
}

/// Either kind of document a tag may point to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Image(Manifest),
    Index(Vec<Pointer>),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDocument {
    schema_version: u64,
    media_type: Option<String>,
    config: Option<Pointer>,
    layers: Option<Vec<Pointer>>,
    manifests: Option<Vec<Pointer>>,
}

impl Document {
    /// Parses a manifest or an index. Its own `mediaType` counts; without one, its fields do.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let raw: RawDocument =
            serde_json::from_slice(bytes).map_err(|e| ManifestError::Json(e.to_string()))?;
        if raw.schema_version != 2 {
            return Err(ManifestError::Schema(raw.schema_version));
        }
        let is_index = match raw.media_type.as_deref() {
            Some(OCI_MANIFEST | DOCKER_MANIFEST) => false,
            Some(OCI_INDEX | DOCKER_LIST) => true,
            Some(other) => return Err(ManifestError::Type(other.to_owned())),
            None => raw.manifests.is_some(),
        };
        match (is_index, raw.manifests, raw.config, raw.layers) {
            // image-spec "manifest.md": a document with both lists is an attempt to be two things.
            (true, Some(manifests), None, None) => Ok(Self::Index(manifests)),
            (false, None, Some(config), Some(layers)) => {
                let fallback = if config.media_type == DOCKER_CONFIG {
                    DOCKER_MANIFEST
                } else {
                    OCI_MANIFEST
                };
                let media_type = raw.media_type.unwrap_or_else(|| fallback.to_owned());
                Manifest::from_pointers(media_type, config, layers).map(Self::Image)
            }
            _ => Err(ManifestError::Json(
                "its fields do not fit its type".to_owned(),
            )),
        }
    }
}

impl Manifest {
    /// Parses an image manifest; an index is refused.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        match Document::parse(bytes)? {
            Document::Image(manifest) => Ok(manifest),
            Document::Index(_) => Err(ManifestError::Type(OCI_INDEX.to_owned())),
        }
    }

    fn from_pointers(
        media_type: String,
        config: Pointer,
        layers: Vec<Pointer>,
    ) -> Result<Self, ManifestError> {
        if !matches!(config.media_type.as_str(), OCI_CONFIG | DOCKER_CONFIG) {
            return Err(ManifestError::NotAnImage(config.media_type));
        }
        if layers.len() > MAX_LAYERS {
            return Err(ManifestError::TooManyLayers(layers.len()));
        }
        let layers = layers.into_iter().map(layer).collect::<Result<_, _>>()?;
        let config = BlobPointer {
            digest: config.digest,
            size: config.size,
        };
        Ok(Self {
            media_type,
            config,
            layers,
        })
    }
}

fn layer(pointer: Pointer) -> Result<BlobPointer, ManifestError> {
    let kind = pointer.media_type.as_str();
    if kind.contains(".nondistributable.") || kind.contains(".foreign.") || !pointer.urls.is_empty()
    {
        return Err(ManifestError::Foreign(pointer.digest));
    }
    let suffix = kind
        .strip_prefix(OCI_LAYER)
        .or_else(|| kind.strip_prefix(DOCKER_LAYER));
    match suffix {
        // Which of them it really is, its first bytes say: archives mislabel layers, and Docker
        // and containerd read them all the same.
        Some("" | "+gzip" | ".gzip" | "+zstd" | ".zstd") => Ok(BlobPointer {
            digest: pointer.digest,
            size: pointer.size,
        }),
        _ => Err(ManifestError::Layer(pointer.media_type)),
    }
}

/// The first entry of an index that fits `os/architecture`. `variant` decides only when asked
/// for: the baseline of an architecture has none.
pub(crate) fn choose<'a>(
    entries: &'a [Pointer],
    os: &str,
    architecture: &str,
    variant: Option<&str>,
) -> Result<&'a Pointer, ManifestError> {
    let fits = |platform: &PointerPlatform| {
        let given = platform.variant.as_deref().filter(|v| !v.is_empty());
        let fits_variant = match variant {
            Some(wanted) => given == Some(wanted),
            // amd64/v2 and above need more than every amd64 host has.
            None => given.is_none() || given == Some("v1") || architecture != "amd64",
        };
        platform.os == os && platform.architecture == architecture && fits_variant
    };
    let readable = |pointer: &&Pointer| {
        matches!(
            pointer.media_type.as_str(),
            OCI_MANIFEST | DOCKER_MANIFEST | ""
        )
    };
    entries
        .iter()
        .filter(readable)
        .find(|e| e.platform.as_ref().is_some_and(fits))
        .or_else(|| match entries {
            // One image that does not say what it is for: skopeo and umoci write these.
            [only] if only.platform.is_none() => Some(only).filter(readable),
            _ => None,
        })
        .ok_or_else(|| ManifestError::NoPlatform {
            wanted: format!("{os}/{architecture}"),
            offered: offered(entries),
        })
}

fn offered(entries: &[Pointer]) -> String {
    let names: Vec<String> = entries
        .iter()
        .take(16)
        .filter_map(|e| e.platform.as_ref())
        .map(|p| {
            format!("{}/{}", p.os, p.architecture)
                .chars()
                .take(40)
                .collect()
        })
        .collect();
    if names.is_empty() {
        "none".to_owned()
    } else {
        names.join(", ")
    }
}
