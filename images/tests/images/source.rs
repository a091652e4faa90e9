//! Images made in memory, and a registry that has them.

use std::collections::BTreeMap;
use std::io::Write as _;

use hull_images::{Digest, ImageStore, PullError, PullOptions, Pulled, Reference};
use serde_json::{Value, json};

use crate::server::{Reply, Request, Server};

pub(crate) const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub(crate) const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// A tar of one directory per name, each with a file called `f` of that content.
pub(crate) fn layer(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        header.set_mtime(1);
        builder.append_data(&mut header, name, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Bytes that don't compress.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    (0..length)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

/// Blobs and manifests by digest, manifests by tag.
#[derive(Default, Clone)]
pub(crate) struct Content {
    pub(crate) blobs: BTreeMap<String, Vec<u8>>,
    pub(crate) manifests: BTreeMap<String, (String, Vec<u8>)>,
}

impl Content {
    pub(crate) fn blob(&mut self, bytes: Vec<u8>) -> String {
        let digest = Digest::of(&bytes).to_string();
        self.blobs.insert(digest.clone(), bytes);
        digest
    }

    /// Adds a document under its digest and `tag`; returns the digest.
    pub(crate) fn document(&mut self, tag: &str, kind: &str, value: &Value) -> String {
        let bytes = serde_json::to_vec(value).unwrap();
        let digest = Digest::of(&bytes).to_string();
        self.manifests
            .insert(digest.clone(), (kind.to_owned(), bytes.clone()));
        self.manifests
            .insert(tag.to_owned(), (kind.to_owned(), bytes));
        digest
    }

    /// Adds an image of these uncompressed layers; returns its manifest, not yet a document.
    pub(crate) fn image(&mut self, architecture: &str, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
        let config = json!({
            "architecture": architecture, "os": "linux",
            "config": {"Cmd": ["/bin/true"], "Env": ["A=1"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = serde_json::to_vec(&config).unwrap();
        let config_size = config.len();
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| {
                let blob = gzip(layer);
                let size = blob.len();
                json!({
                    "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                    "digest": self.blob(blob), "size": size,
                })
            })
            .collect();
        json!({
            "schemaVersion": 2, "mediaType": OCI_MANIFEST,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": self.blob(config), "size": config_size,
            },
            "layers": layers,
        })
    }

    /// Adds an image of one layer with one file for each architecture, both of that name; returns
    /// their entries in an index.
    pub(crate) fn platforms(&mut self, architectures: &[&str]) -> Vec<Value> {
        let mut entries = Vec::new();
        for architecture in architectures {
            let manifest = self.image(architecture, &[layer(&[(architecture, b"x")])]);
            let digest = self.document("ignored", OCI_MANIFEST, &manifest);
            let size = self.manifests[&digest].1.len();
            entries.push(
                json!({"mediaType": OCI_MANIFEST, "digest": digest, "size": size,
                "platform": {"os": "linux", "architecture": architecture}}),
            );
        }
        entries
    }

    /// A registry with one image, tagged `1`.
    pub(crate) fn simple(layers: &[Vec<u8>]) -> Self {
        let mut content = Self::default();
        let manifest = content.image("amd64", layers);
        content.document("1", OCI_MANIFEST, &manifest);
        content
    }

    /// The manifest tagged `1`.
    pub(crate) fn manifest(&self) -> Value {
        serde_json::from_slice(&self.manifests["1"].1).unwrap()
    }

    /// Digests of the layers of the image tagged `1`.
    pub(crate) fn layer_digests(&self) -> Vec<String> {
        let manifest = self.manifest();
        let layers = manifest["layers"].as_array().unwrap();
        layers
            .iter()
            .map(|l| l["digest"].as_str().unwrap().to_owned())
            .collect()
    }

    /// What a well-behaved registry answers.
    pub(crate) fn answer(&self, request: &Request) -> Reply {
        let missing = Reply::new(
            404,
            br#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"manifest unknown"}]}"#,
        );
        let name = request.path.rsplit('/').next().unwrap_or_default();
        if request.path == "/v2/" {
            Reply::new(200, "{}")
        } else if request.path.contains("/manifests/") {
            match self.manifests.get(name) {
                Some((kind, bytes)) => Reply::new(200, bytes.clone()).with("Content-Type", &**kind),
                None => missing,
            }
        } else {
            let Some(bytes) = self.blobs.get(name) else {
                return missing;
            };
            match request.header("range").and_then(range) {
                Some(start) if start < bytes.len() => Reply::new(206, &bytes[start..]).with(
                    "Content-Range",
                    format!("bytes {start}-{}/{}", bytes.len() - 1, bytes.len()),
                ),
                Some(_) => Reply::new(416, ""),
                None => Reply::new(200, bytes.clone()),
            }
        }
    }

    pub(crate) fn serve(self) -> Server {
        Server::start(move |request| self.answer(request))
    }
}

pub(crate) fn range(text: &str) -> Option<usize> {
    text.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
}

/// A store in a directory of its own.
pub(crate) struct Place {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: ImageStore,
}

impl Place {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = ImageStore::open(directory.path().join("images")).unwrap();
        Self { directory, store }
    }

    pub(crate) fn pull(&self, server: &Server, name: &str) -> Result<Pulled, PullError> {
        self.pull_with(server, name, &PullOptions::default())
    }

    pub(crate) fn pull_with(
        &self,
        server: &Server,
        name: &str,
        options: &PullOptions<'_>,
    ) -> Result<Pulled, PullError> {
        let options = PullOptions {
            auth: match options.auth {
                // The files of whoever runs the tests are no part of them.
                hull_images::Auth::FromFiles => hull_images::Auth::Anonymous,
                _ => options.auth.clone(),
            },
            ..options.clone()
        };
        self.store
            .pull(&Reference::parse(&server.name(name)).unwrap(), &options)
    }

    /// The message of a pull that must fail.
    pub(crate) fn refused(&self, server: &Server) -> String {
        let error = self.pull(server, "a/b:1").expect_err("the pull must fail");
        self.assert_empty();
        crate::message(&error)
    }

    /// Nothing of a failed pull is to be seen.
    pub(crate) fn assert_empty(&self) {
        assert!(self.store.list().unwrap().is_empty());
        assert_eq!(self.names("layers"), Vec::<String>::new());
        assert_eq!(self.names("unpack"), Vec::<String>::new());
    }

    pub(crate) fn names(&self, part: &str) -> Vec<String> {
        let entries = std::fs::read_dir(self.store.root().join(part)).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }
}
