//! Layers that are refused, seen from the store: an error, and nothing left.

use hull_images::unpack::Limits;
use hull_images::{Auth, Digest, ImageStore, PullOptions, Reference};
use serde_json::json;

use crate::message;
use crate::source::{Content, OCI_MANIFEST, Place, gzip, layer};

#[test]
fn a_hostile_layer_leaves_nothing() {
    let mut header = tar::Header::new_gnu();
    let name = b"../../../pwned";
    header.as_old_mut().name[..name.len()].copy_from_slice(name);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_cksum();
    let mut evil = layer(&[("good", b"x")]);
    evil.truncate(1024);
    evil.extend_from_slice(header.as_bytes());
    evil.extend_from_slice(&[0; 1024]);
    let place = Place::new();
    let text = place.refused(&Content::simple(&[evil]).serve());
    assert!(text.contains("cannot unpack layer sha256:"), "{text}");
    assert!(text.contains("\"../../../pwned\" refused"), "{text}");
    assert!(!place.directory.path().join("pwned").exists());
}

#[test]
fn the_base_layer_stays_out_of_sight_until_the_image_is_whole() {
    // A good layer is content like any other: it may stay, and is swept with the garbage.
    let (good, bad) = (layer(&[("good", b"x")]), vec![b'?'; 1024]);
    let server = Content::simple(&[good, bad]).serve();
    let place = Place::new();
    assert!(place.pull(&server, "a/b:1").is_err());
    assert!(place.store.list().unwrap().is_empty());
    let reclaimed = place.store.collect_garbage().unwrap();
    assert_eq!(reclaimed.layers, 1);
    for part in ["layers", "unpack", "ingest", "blobs/sha256"] {
        assert_eq!(place.names(part), Vec::<String>::new(), "{part}");
    }
}

#[test]
fn a_wrong_diff_id_is_refused() {
    let mut content = Content::simple(&[layer(&[("f", b"x")])]);
    let mut manifest = content.manifest();
    let other = gzip(&layer(&[("f", b"y")]));
    let size = other.len();
    manifest["layers"][0]["digest"] = json!(content.blob(other));
    manifest["layers"][0]["size"] = json!(size);
    content.document("1", OCI_MANIFEST, &manifest);
    let text = Place::new().refused(&content.serve());
    assert!(text.contains("layer digest mismatch"), "{text}");
}

#[test]
fn limits_are_the_stores() {
    let directory = tempfile::tempdir().unwrap();
    let limits = Limits {
        entries: 2,
        ..Limits::default()
    };
    let store = ImageStore::open_with_limits(directory.path(), limits).unwrap();
    let server = Content::simple(&[layer(&[("a", b""), ("b", b""), ("c", b"")])]).serve();
    let options = PullOptions {
        auth: Auth::Anonymous,
        ..PullOptions::default()
    };
    let error = store
        .pull(&Reference::parse(&server.name("a/b:1")).unwrap(), &options)
        .unwrap_err();
    assert!(
        message(&error).contains("more than 2 entries"),
        "{}",
        message(&error)
    );
}

/// A file system of its own, of 4 MiB.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=4m", "tmpfs"])
            .arg(directory.path())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("SKIPPED: cannot mount a small file system here");
            return None;
        }
        Some(Self(directory))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg(self.0.path())
            .status();
    }
}

#[test]
fn a_full_disk_is_named_and_nothing_is_left() {
    let Some(disk) = SmallDisk::mount() else {
        return;
    };
    let store = ImageStore::open(disk.0.path().join("images")).unwrap();
    let options = PullOptions {
        auth: Auth::Anonymous,
        ..PullOptions::default()
    };
    // One that does not fit as it comes, one that does not fit unpacked.
    let noise = crate::source::noise(6 << 20, 9);
    let zeroes = vec![0; 6 << 20];
    for content in [noise, zeroes] {
        let server = Content::simple(&[layer(&[("f", &content)])]).serve();
        let reference = Reference::parse(&server.name("a/b:1")).unwrap();
        let text = message(&store.pull(&reference, &options).unwrap_err());
        assert!(text.contains("No space left on device"), "{text}");
        assert!(text.contains("hull image prune"), "{text}");
        assert!(store.list().unwrap().is_empty());
        for part in ["blobs/sha256", "ingest", "layers", "unpack"] {
            let entries = std::fs::read_dir(store.root().join(part)).unwrap();
            assert_eq!(entries.count(), 0, "{part}");
        }
    }
    let small = Content::simple(&[layer(&[("f", b"fits")])]).serve();
    let reference = Reference::parse(&small.name("a/b:1")).unwrap();
    store.pull(&reference, &options).unwrap();
    assert_eq!(Digest::of(b"").short().len(), 12);
}
