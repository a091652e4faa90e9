//! OCI image layouts, as tarballs or directories (image-spec image-layout.md).
//!
//! Owns: `index.json` and what it leads to. Refuses: other platforms' images, unless nothing else
//! is there, which is an error that says so.

use serde::Deserialize;

use super::bundle::Bundle;
use super::docker::describe;
use super::{Found, Result};
use crate::digest::Digest;
use crate::manifest::{self, Document, Manifest, Pointer};
use crate::reference::Reference;
use crate::registry::Platform;
use crate::store::ImageStore;

const REF_NAME: &str = "org.opencontainers.image.ref.name";
const CONTAINERD_NAME: &str = "io.containerd.image.name";

#[derive(Deserialize)]
struct Index {
    manifests: Vec<Pointer>,
}

/// The images of `bundle`; only those called `tag`, if one is given.
pub(super) fn images(
    store: &ImageStore,
    bundle: &mut dyn Bundle,
    tag: Option<&str>,
) -> Result<Vec<Found>> {
    let index = bundle.read_small("index.json")?.ok_or_else(|| {
        bundle.broken("it holds neither manifest.json nor index.json: no image archive".to_owned())
    })?;
    let index: Index = serde_json::from_slice(&index)
        .map_err(|error| bundle.broken(format!("its index.json is malformed: {error}")))?;
    let mut found = Vec::new();
    let mut skipped = None;
    for pointer in &index.manifests {
        let name = pointer.annotations.get(REF_NAME);
        if tag.is_some() && name.map(String::as_str) != tag {
            continue;
        }
        match one(store, bundle, pointer)? {
            Ok(image) => found.push(image),
            Err(reason) => skipped = Some(reason),
        }
    }
    match (found.is_empty(), skipped, tag) {
        (false, ..) => Ok(found),
        (true, Some(reason), _) => Err(bundle.broken(reason)),
        (true, None, Some(tag)) => Err(bundle.broken(format!("it has no image called {tag:?}"))),
        (true, None, None) => Err(bundle.broken("it lists no images".to_owned())),
    }
}

/// One image, or why it is not for us.
fn one(
    store: &ImageStore,
    bundle: &mut dyn Bundle,
    top: &Pointer,
) -> Result<std::result::Result<Found, String>> {
    let platform = Platform::default();
    if let Some(given) = &top.platform
        && (given.os != platform.os || given.architecture != platform.architecture)
    {
        return Ok(Err(format!(
            "its image is for {}/{}",
            given.os, given.architecture
        )));
    }
    let (digest, bytes) = document(bundle, top)?;
    let (digest, bytes) = match Document::parse(&bytes) {
        Err(error) => return Err(bundle.broken(error.to_string())),
        Ok(Document::Image(_)) => (digest, bytes),
        Ok(Document::Index(entries)) => {
            match manifest::choose(&entries, &platform.os, &platform.architecture, None) {
                Ok(chosen) => document(bundle, chosen)?,
                Err(error) => return Ok(Err(error.to_string())),
            }
        }
    };
    let manifest = Manifest::parse(&bytes).map_err(|error| bundle.broken(error.to_string()))?;
    let blob = &manifest.config;
    let (_, config) = document(bundle, &Pointer::new("", blob.digest.clone(), blob.size))?;
    for blob in &manifest.layers {
        bundle.bring(&blob_name(&blob.digest), Some((&blob.digest, blob.size)))?;
    }
    for bytes in [&config, &bytes] {
        store
            .put_blob(bytes)
            .map_err(|error| bundle.stored(error))?;
    }
    let tags = name_of(bundle, top).into_iter().collect();
    describe(bundle, digest, &bytes, &config, tags).map(Ok)
}

/// A manifest, index or configuration, verified.
fn document(bundle: &mut dyn Bundle, pointer: &Pointer) -> Result<(Digest, Vec<u8>)> {
    let name = blob_name(&pointer.digest);
    let bytes = bundle
        .read_small(&name)?
        .ok_or_else(|| bundle.broken(format!("{name} is missing")))?;
    let actual = Digest::of(&bytes);
    super::bundle::check(
        Some((&pointer.digest, pointer.size)),
        &actual,
        bytes.len() as u64,
    )
    .map_err(|error| bundle.stored(error))?;
    Ok((actual, bytes))
}

fn blob_name(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// What the image is to be called. Many tools write a mere tag where the specification allows
/// any text: such an image is named after the file it is in.
fn name_of(bundle: &dyn Bundle, pointer: &Pointer) -> Option<Reference> {
    let note = |key: &str| pointer.annotations.get(key).map(String::as_str);
    let text = note(CONTAINERD_NAME).or_else(|| note(REF_NAME))?;
    if text.contains(['/', ':']) {
        return Reference::parse(text)
            .ok()
            .filter(|name| name.digest().is_none());
    }
    let what = bundle.what();
    let path = ["docker-archive:", "oci-archive:", "oci:"]
        .iter()
        .find_map(|prefix| what.strip_prefix(prefix))
        .unwrap_or(&what);
    let file = path.trim_end_matches('/').rsplit('/').next()?;
    let stem = file.split(['.', ':']).next()?.to_lowercase();
    Reference::parse(&format!("localhost/{stem}:{text}")).ok()
}
