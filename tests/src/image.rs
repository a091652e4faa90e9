//! The image that test cases run: static busybox, a few users, a few files.
//!
//! Owns: its layers, its configurations, its docker-archive. Refuses: to be found by anybody else's
//! tool; those images are made by those tools, in their own suite.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "what a fixture can't have ends its test"
)]

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

use crate::process::Process;

/// Debian's, from the package busybox-static.
const BUSYBOX: &str = "/usr/bin/busybox";

/// The name of the plain image.
pub const PLAIN: &str = "busybox:test";
/// The name of the image whose configuration says everything that one can.
pub const CONFIGURED: &str = "configured:test";

/// `PATH` as both images have it.
pub const PATH: &str = "/usr/sbin:/usr/bin:/sbin:/bin";

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\n\
    alice:x:1000:1000:Alice:/home/alice:/bin/sh\n\
    bob:x:1001:50:Bob:/home/bob:/bin/sh\n\
    nobody:x:65534:65534:nobody:/nonexistent:/bin/false\n";
const GROUP: &str = "root:x:0:\n\
    tty:x:5:\n\
    audio:x:29:alice\n\
    staff:x:50:\n\
    games:x:60:bob,alice\n\
    alice:x:1000:\n\
    nogroup:x:65534:\n";

/// Directories beside those of the applets: path, mode, owner.
const DIRECTORIES: [(&str, u32, u64); 11] = [
    ("bin", 0o755, 0),
    ("dev", 0o755, 0),
    ("etc", 0o755, 0),
    ("proc", 0o555, 0),
    ("sys", 0o555, 0),
    ("root", 0o700, 0),
    ("srv", 0o755, 0),
    ("tmp", 0o1777, 0),
    ("home", 0o755, 0),
    ("home/alice", 0o750, 1000),
    ("data", 0o755, 1000),
];

/// Files beside busybox: path, mode, owner, contents.
const FILES: [(&str, u32, u64, &str); 7] = [
    ("etc/passwd", 0o644, 0, PASSWD),
    ("etc/group", 0o644, 0, GROUP),
    ("etc/motd", 0o644, 0, "a busybox for tests\n"),
    ("srv/plain", 0o644, 0, "not a program\n"),
    ("srv/script", 0o755, 0, "#!/bin/sh\necho script \"$@\"\n"),
    ("srv/lost", 0o755, 0, "#!/no/such/interpreter\n"),
    ("data/seed", 0o640, 1000, "from the image\n"),
];

/// The images' layers, each a tar, the lowest first.
#[derive(Debug)]
pub struct Image {
    layers: Vec<Vec<u8>>,
}

impl Image {
    /// Makes it from this machine's busybox.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn new() -> Self {
        let busybox = fs::read(BUSYBOX)
            .unwrap_or_else(|error| panic!("{BUSYBOX} (Debian: busybox-static): {error}"));
        let mut layer = Builder::new(Vec::new());
        for (path, mode, owner) in DIRECTORIES {
            entry(&mut layer, path, EntryType::Directory, (mode, owner), &[]);
        }
        entry(
            &mut layer,
            "bin/busybox",
            EntryType::Regular,
            (0o755, 0),
            &busybox,
        );
        let list = Process::new([BUSYBOX, "--list"]).output().ok();
        for applet in list.lines().filter(|applet| *applet != "busybox") {
            let mut header = header(EntryType::Symlink, (0o777, 0), 0);
            layer
                .append_link(&mut header, format!("bin/{applet}"), "busybox")
                .expect("write to memory");
        }
        for (path, mode, owner, contents) in FILES {
            let bytes = contents.as_bytes();
            entry(&mut layer, path, EntryType::Regular, (mode, owner), bytes);
        }
        Self {
            layers: vec![layer.into_inner().expect("write to memory")],
        }
    }

    /// With one more layer, of these files: paths and contents. A path whose last part begins with
    /// `.wh.` takes away what is below (OCI image specification, "Whiteouts").
    ///
    /// # Panics
    /// Never: it is written to memory.
    #[must_use]
    pub fn with_layer(mut self, files: &[(&str, &str)]) -> Self {
        let mut layer = Builder::new(Vec::new());
        for (path, contents) in files {
            let access = (0o644, 0);
            entry(
                &mut layer,
                path,
                EntryType::Regular,
                access,
                contents.as_bytes(),
            );
        }
        self.layers
            .push(layer.into_inner().expect("write to memory"));
        self
    }

    /// With busybox once more, under a path that chooses the applet, with file capabilities
    /// (capabilities(7), as `struct vfs_cap_data` has them).
    ///
    /// # Panics
    /// When there is no busybox.
    #[must_use]
    pub fn with_capable(mut self, path: &str, capabilities: &[u8]) -> Self {
        let busybox = fs::read(BUSYBOX).expect("read busybox");
        // Behind what is there, but for the two empty blocks that end it.
        let last = self.layers.pop().expect("an image has a layer");
        let mut layer = Builder::new(last);
        let end = layer.get_ref().len() - 1024;
        layer.get_mut().truncate(end);
        layer
            .append_pax_extensions([("SCHILY.xattr.security.capability", capabilities)])
            .expect("write to memory");
        entry(&mut layer, path, EntryType::Regular, (0o755, 0), &busybox);
        self.layers
            .push(layer.into_inner().expect("write to memory"));
        self
    }

    /// Writes both images as one docker-archive.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn save(&self, archive: &Path) {
        self.save_as(archive, [(PLAIN, plain()), (CONFIGURED, configured())]);
    }

    /// Writes its layers as a docker-archive of images with these names and configurations.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn save_as<const N: usize>(&self, archive: &Path, images: [(&str, Value); N]) {
        let mut tar = Builder::new(Vec::new());
        let mut manifest = Vec::new();
        let (mut diff_ids, mut names) = (Vec::new(), Vec::new());
        for layer in &self.layers {
            let file = archive.with_extension("layer");
            fs::write(&file, layer).expect("write the layer");
            let sum = sha256(&file);
            fs::remove_file(&file).expect("remove the layer");
            let name = format!("{sum}.tar");
            entry(&mut tar, &name, EntryType::Regular, (0o644, 0), layer);
            diff_ids.push(format!("sha256:{sum}"));
            names.push(name);
        }
        for (name, config) in images {
            let file = format!("{}.json", name.replace(':', "-"));
            let config = json!({
                "architecture": "amd64",
                "os": "linux",
                "created": "2026-01-01T00:00:00Z",
                "config": config,
                "rootfs": { "type": "layers", "diff_ids": diff_ids },
                "history": [{ "created": "2026-01-01T00:00:00Z", "created_by": "tests" }],
            });
            let text = config.to_string();
            entry(
                &mut tar,
                &file,
                EntryType::Regular,
                (0o644, 0),
                text.as_bytes(),
            );
            manifest.push(json!({
                "Config": file, "RepoTags": [name], "Layers": names,
            }));
        }
        let manifest = Value::from(manifest).to_string();
        entry(
            &mut tar,
            "manifest.json",
            EntryType::Regular,
            (0o644, 0),
            manifest.as_bytes(),
        );
        let bytes = tar.into_inner().expect("write to memory");
        fs::write(archive, bytes).expect("write the archive");
    }

    /// Unpacks the lowest layer, for tools that take a directory.
    ///
    /// # Panics
    /// When the disk refuses.
    pub fn unpack(&self, directory: &Path) {
        fs::create_dir_all(directory).expect("make a root's directory");
        let layer = self.layers.first().expect("an image has a layer");
        let mut archive = tar::Archive::new(layer.as_slice());
        archive.set_preserve_ownerships(true);
        archive.set_preserve_permissions(true);
        archive.unpack(directory).expect("unpack the layer");
    }
}

impl Default for Image {
    fn default() -> Self {
        Self::new()
    }
}

/// The plain image's configuration.
#[must_use]
pub fn plain() -> Value {
    json!({
        "Env": [format!("PATH={PATH}"), "FROM_IMAGE=yes"],
        "Cmd": ["sh", "-c", "echo no command was given"],
    })
}

fn configured() -> Value {
    json!({
        "Env": [format!("PATH={PATH}"), "FROM_IMAGE=configured"],
        "Entrypoint": ["/bin/echo", "entrypoint"],
        "Cmd": ["command of", "the image"],
        "User": "alice:games",
        "WorkingDir": "/home/alice",
        "Volumes": { "/data": {} },
        "StopSignal": "SIGUSR1",
        "ExposedPorts": { "80/tcp": {} },
        "Labels": { "made.by": "tests" },
    })
}

fn entry(to: &mut Builder<Vec<u8>>, path: &str, kind: EntryType, access: (u32, u64), bytes: &[u8]) {
    let mut header = header(kind, access, bytes.len());
    to.append_data(&mut header, path, bytes)
        .expect("write to memory");
}

fn header(kind: EntryType, (mode, owner): (u32, u64), size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(owner);
    header.set_gid(owner);
    header.set_mtime(1_700_000_000);
    header.set_size(size as u64);
    header
}

fn sha256(file: &Path) -> String {
    let said = Process::new(["sha256sum".as_ref(), file.as_os_str()])
        .output()
        .ok();
    let sum = said.split_whitespace().next();
    sum.expect("sha256sum prints a sum").to_owned()
}
