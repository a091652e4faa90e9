//! Images as tar archives, byte by byte, so that each can be wrong in its own way.

use hull_tests::process::Process;
use serde_json::json;
use tar::{EntryType, Header};

const BLOCK: usize = 512;

/// A tar that says what it is told to say.
#[derive(Debug, Default, Clone)]
pub(crate) struct Tar(Vec<u8>);

impl Tar {
    /// An entry of this kind (its byte in the header) with this name and link target.
    pub(crate) fn entry(self, kind: u8, name: &str, link: &str, data: &[u8]) -> Self {
        let mut tar = self.claim(kind, name, link, data.len() as u64);
        tar.0.extend_from_slice(data);
        let padded = tar.0.len().next_multiple_of(BLOCK);
        tar.0.resize(padded, 0);
        tar
    }

    pub(crate) fn file(self, name: &str, data: &str) -> Self {
        self.entry(b'0', name, "", data.as_bytes())
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(b'2', name, target, &[])
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(b'1', name, target, &[])
    }

    /// A header that claims `size` bytes of data.
    pub(crate) fn claim(mut self, kind: u8, name: &str, link: &str, size: u64) -> Self {
        let mut header = Header::new_gnu();
        let old = header.as_old_mut();
        // Not by `set_path`, which refuses what these tests are about.
        old.name[..name.len()].copy_from_slice(name.as_bytes());
        old.linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_entry_type(EntryType::new(kind));
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1);
        header.set_size(size);
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self
    }

    /// The whole tar, with its end marker.
    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

/// A docker-archive of one image `name` with one layer, that says of the layer what is true.
pub(crate) fn archive(name: &str, layer: &[u8]) -> Vec<u8> {
    archive_with(name, layer, &digest(layer))
}

/// A docker-archive whose configuration says `diff_id` of its layer's uncompressed tar.
pub(crate) fn archive_with(name: &str, layer: &[u8], diff_id: &str) -> Vec<u8> {
    let manifest = json!([{
        "Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"],
    }]);
    Tar::default()
        .file("config.json", &config(diff_id))
        .entry(b'0', "layer.tar", "", layer)
        .file("manifest.json", &manifest.to_string())
        .finish()
}

/// An image's configuration.
pub(crate) fn config(diff_id: &str) -> String {
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/x"]},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
    });
    config.to_string()
}

/// `sha256:` and the digits.
pub(crate) fn digest(bytes: &[u8]) -> String {
    let sum = Process::new(["sha256sum"]).stdin(bytes).output().ok();
    format!("sha256:{}", sum.split_whitespace().next().unwrap())
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let packed = Process::new(["gzip", "-nc"]).stdin(bytes).output();
    assert_eq!(packed.code, 0, "{}", packed.errors());
    packed.stdout
}
