//! `docker save` archives.
//!
//! Owns: `manifest.json`, the list of images in them, old style and new. Refuses: the older
//! `repositories` file, which Docker itself stopped needing in version 1.10.

use serde::{Deserialize, Serialize};

use super::bundle::Bundle;
use super::{Found, Result};
use crate::digest::Digest;
use crate::manifest::{self, Compression, Manifest, Pointer};
use crate::reference::Reference;
use crate::registry::Platform;
use crate::store::{Entry, Image, ImageStore};

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Vec<String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Written {
    schema_version: u32,
    media_type: &'static str,
    config: Pointer,
    layers: Vec<Pointer>,
}

pub(super) fn images(
    store: &ImageStore,
    bundle: &mut dyn Bundle,
    list: &[u8],
) -> Result<Vec<Found>> {
    let listed: Vec<Listed> = serde_json::from_slice(list)
        .map_err(|error| bundle.broken(format!("its manifest.json is malformed: {error}")))?;
    if listed.is_empty() {
        return Err(bundle.broken("it lists no images".to_owned()));
    }
    listed
        .iter()
        .map(|image| one(store, bundle, image))
        .collect()
}

fn one(store: &ImageStore, bundle: &mut dyn Bundle, listed: &Listed) -> Result<Found> {
    if listed.layers.len() > manifest::MAX_LAYERS {
        return Err(bundle.broken(format!("an image of {} layers", listed.layers.len())));
    }
    let tags = listed
        .repo_tags
        .iter()
        .flatten()
        .map(|tag| Reference::parse(tag));
    let tags = tags
        .collect::<std::result::Result<Vec<_>, _>>()
        .map_err(|error| bundle.broken(error.to_string()))?;
    let config = bundle
        .read_small(&listed.config)?
        .ok_or_else(|| bundle.broken(format!("{:?} is missing", listed.config)))?;
    let config_digest = store
        .put_blob(&config)
        .map_err(|error| bundle.stored(error))?;
    let mut layers = Vec::new();
    for name in &listed.layers {
        let layer = bundle.bring(name, None)?;
        let media_type = match layer.compression {
            Compression::None => manifest::OCI_LAYER.to_owned(),
            Compression::Gzip => format!("{}+gzip", manifest::OCI_LAYER),
            Compression::Zstd => format!("{}+zstd", manifest::OCI_LAYER),
        };
        layers.push(Pointer::new(&media_type, layer.digest, layer.size));
    }
    let written = Written {
        schema_version: 2,
        media_type: manifest::OCI_MANIFEST,
        config: Pointer::new(manifest::OCI_CONFIG, config_digest, config.len() as u64),
        layers,
    };
    let bytes = serde_json::to_vec(&written).map_err(|e| bundle.broken(e.to_string()))?;
    let digest = store
        .put_blob(&bytes)
        .map_err(|error| bundle.stored(error))?;
    let found = describe(bundle, digest, &bytes, &config, tags)?;
    // As Docker: another processor's image is kept (it may be for another host), another
    // operating system's can be of no use.
    let (os, ours) = (found.image.config.os().to_string(), Platform::default().os);
    match os.is_empty() || os == ours {
        true => Ok(found),
        false => Err(bundle.broken(format!("its image is for {os}, not for {ours}"))),
    }
}

/// An image whose blobs are all in the store.
pub(super) fn describe(
    bundle: &dyn Bundle,
    digest: Digest,
    manifest_bytes: &[u8],
    config: &[u8],
    tags: Vec<Reference>,
) -> Result<Found> {
    let manifest =
        Manifest::parse(manifest_bytes).map_err(|error| bundle.broken(error.to_string()))?;
    let size = manifest_bytes.len() as u64;
    let image = Image::from_parts(digest.clone(), size, &manifest, config)
        .map_err(|error| bundle.broken(error.to_string()))?;
    let media_type = manifest.media_type;
    let image_id = image.id.clone();
    let entry = Entry {
        digest,
        size,
        media_type,
        image_id,
        tag: None,
        pinned: None,
    };
    Ok(Found { entry, image, tags })
}
