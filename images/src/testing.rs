//! What strangers' bytes reach in here, opened for fuzz targets.
//!
//! Owns: nothing; it calls the parsers as a pull and a load do. Refuses: being built into a
//! product (feature `testing`).

use std::fs::File;
use std::path::Path;

use crate::digest::Digest;
use crate::manifest::{self, Document};
use crate::store::Image;
use crate::unpack::{Job, Limits, UnpackError, unpack};

/// Reads `bytes` as a manifest or an index and chooses from it, and as an image's configuration.
pub fn read_document(bytes: &[u8]) {
    match Document::parse(bytes) {
        Ok(Document::Image(manifest)) => {
            // Both halves at once: a manifest whose other fields are a configuration's.
            let _ = Image::from_parts(Digest::of(bytes), 0, &manifest, bytes);
        }
        Ok(Document::Index(entries)) => {
            let _ = manifest::choose(&entries, "linux", "amd64", None);
            let _ = manifest::choose(&entries, "linux", "arm64", Some("v8"));
        }
        Err(_) => drop(serde_json::from_slice::<crate::ImageConfiguration>(bytes)),
    }
}

/// Unpacks `layer` into the empty directory `target`, under limits that keep it small.
///
/// # Errors
/// What unpacking says.
pub fn unpack_layer(layer: File, target: &Path) -> Result<(), UnpackError> {
    let limits = Limits {
        layer_bytes: 1 << 20,
        entries: 100,
        ratio_free_bytes: 1 << 20,
        ..Limits::default()
    };
    let job = Job {
        diff_id: None,
        below: &[],
        limits: &limits,
        report: &|_| {},
    };
    unpack(layer, target, &job)
}
