//! Debian's `docker-registry`, filled by skopeo: programs that are not ours.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use hull_images::{Auth, Digest, PullOptions, Reference, Silent};

use crate::source::{Content, Place, layer, noise};

struct Registry {
    process: Child,
    address: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    /// Starts one on a port of the kernel's choice, which its log tells.
    fn start(directory: &Path) -> Self {
        let config = directory.join("registry.yml");
        let storage = directory.join("storage");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
                 http:\n  addr: 127.0.0.1:0\n",
                storage.display()
            ),
        )
        .unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(process.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert!(
                log.read_line(&mut line).unwrap() > 0,
                "docker-registry ended early"
            );
            if let Some((_, rest)) = line.split_once("listening on ") {
                break rest.split(['"', ' ', '\n']).next().unwrap().to_owned();
            }
        };
        // It blocks when nobody reads its log.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
        Self { process, address }
    }
}

fn installed(program: &str) -> bool {
    let found = Command::new(program)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if found.is_err() {
        eprintln!("SKIPPED: {program} is not installed (apt-get install {program})");
    }
    found.is_ok()
}

/// Writes the image tagged `1` as an OCI layout.
fn write_layout(content: &Content, layout: &Path) {
    std::fs::create_dir_all(layout.join("blobs/sha256")).unwrap();
    let (kind, manifest) = &content.manifests["1"];
    for bytes in content.blobs.values().chain([manifest]) {
        std::fs::write(
            layout.join("blobs/sha256").join(Digest::of(bytes).hex()),
            bytes,
        )
        .unwrap();
    }
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [{"mediaType": kind,
        "digest": Digest::of(manifest), "size": manifest.len(),
        "annotations": {"org.opencontainers.image.ref.name": "1"}}]});
    std::fs::write(layout.join("index.json"), index.to_string()).unwrap();
    std::fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )
    .unwrap();
}

fn push(layout: &Path, format: &str, name: &str) {
    let pushed = Command::new("skopeo")
        .args([
            "copy",
            "--quiet",
            "--insecure-policy",
            "--dest-tls-verify=false",
            "--format",
        ])
        .arg(format)
        .arg(format!("oci:{}:1", layout.display()))
        .arg(format!("docker://{name}"))
        .output()
        .unwrap();
    assert!(
        pushed.status.success(),
        "{}",
        String::from_utf8_lossy(&pushed.stderr)
    );
}

#[test]
fn what_skopeo_pushes_is_pulled() {
    use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
    if !installed("docker-registry") || !installed("skopeo") {
        return;
    }
    let place = Place::new();
    let layout = place.directory.path().join("layout");
    write_layout(
        &Content::simple(&[
            layer(&[
                ("etc/os-release", b"ID=test\n"),
                ("noise", &noise(1 << 20, 1)),
            ]),
            layer(&[("etc/.wh.os-release", b""), ("etc/hostname", b"x\n")]),
        ]),
        &layout,
    );
    let registry = Registry::start(place.directory.path());
    let options = PullOptions {
        auth: Auth::Anonymous,
        ..PullOptions::default()
    };
    let pull = |name: &str| place.store.pull(&Reference::parse(name).unwrap(), &options);
    for format in ["oci", "v2s2"] {
        let name = format!("{}/hull/test:{format}", registry.address);
        push(&layout, format, &name);
        let pulled =
            pull(&name).unwrap_or_else(|error| panic!("{format}: {}", crate::message(&error)));
        let layers = place.store.unpacked_layers(&pulled.image, &Silent).unwrap();
        assert_eq!(
            std::fs::read(layers[0].join("etc/os-release")).unwrap(),
            b"ID=test\n"
        );
        assert_eq!(
            std::fs::read(layers[0].join("noise")).unwrap(),
            noise(1 << 20, 1)
        );
        assert_eq!(
            std::fs::read(layers[1].join("etc/hostname")).unwrap(),
            b"x\n"
        );
        let whiteout = std::fs::symlink_metadata(layers[1].join("etc/os-release")).unwrap();
        assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
    }
    let error = pull(&format!("{}/hull/test:none", registry.address)).unwrap_err();
    let text = crate::message(&error);
    assert!(text.starts_with("manifest unknown: "), "{text}");
}
