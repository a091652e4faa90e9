//! Names, removal, garbage, and what killed processes leave.

use std::os::unix::fs::PermissionsExt as _;

use hull_images::{Digest, ImageStore, Removed, Silent, StoreError};

use crate::message;
use crate::source::{Content, OCI_MANIFEST, Place, layer};

fn two_tags() -> Content {
    let mut content = Content::simple(&[layer(&[("base", b"x")]), layer(&[("top", b"y")])]);
    let manifest = content.manifest();
    content.document("2", OCI_MANIFEST, &manifest);
    content
}

#[test]
fn removing_names_and_images() {
    let (server, place) = (two_tags().serve(), Place::new());
    let id = place.pull(&server, "a/b:1").unwrap().image.id;
    let image = place.pull(&server, "a/b:2").unwrap().image;
    assert_eq!(image.references.len(), 2);
    let free = |_: &Digest| None;
    let error = place.store.remove(id.short(), false, &free).unwrap_err();
    assert!(message(&error).contains("several names"), "{error}");
    let removed = place
        .store
        .remove(&server.name("a/b:1"), false, &free)
        .unwrap();
    assert!(matches!(&removed[..], [Removed::Untagged(name)] if name.tag() == Some("1")));
    assert_eq!(place.store.list().unwrap().len(), 1);

    let used = |asked: &Digest| (*asked == id).then(|| "web".to_owned());
    let error = place
        .store
        .remove(&server.name("a/b:2"), false, &used)
        .unwrap_err();
    assert!(message(&error).contains("used by container web"), "{error}");
    let removed = place
        .store
        .remove(&server.name("a/b:2"), false, &free)
        .unwrap();
    assert!(matches!(&removed[..], [Removed::Untagged(_), Removed::Deleted(gone)] if *gone == id));
    for part in ["layers", "blobs/sha256", "ingest", "unpack"] {
        assert_eq!(place.names(part), Vec::<String>::new(), "{part}");
    }
    let error = place
        .store
        .remove(&server.name("a/b:2"), false, &free)
        .unwrap_err();
    assert!(matches!(error, StoreError::NoSuchImage { .. }), "{error}");
}

#[test]
fn an_image_in_use_only_loses_its_names() {
    let (server, place) = (two_tags().serve(), Place::new());
    let image = place.pull(&server, "a/b:1").unwrap().image;
    let used = |_: &Digest| Some("web".to_owned());
    let removed = place.store.remove(image.id.short(), true, &used).unwrap();
    assert!(matches!(&removed[..], [Removed::Untagged(_)]));
    let left = place.store.list().unwrap();
    assert!(left.len() == 1 && left[0].references.is_empty());
    for layer in place.store.unpacked_layers(&image, &Silent).unwrap() {
        assert!(layer.is_dir());
    }
    // By its ID, when nobody uses it any more.
    place
        .store
        .remove(&image.id.to_string(), false, &|_| None)
        .unwrap();
    place.assert_empty();
}

#[test]
fn shared_layers_outlive_one_of_their_images() {
    let base = layer(&[("base", b"x")]);
    let mut content = Content::simple(&[base.clone(), layer(&[("one", b"1")])]);
    let other = content.image("amd64", &[base, layer(&[("two", b"2")])]);
    content.document("2", OCI_MANIFEST, &other);
    let (server, place) = (content.serve(), Place::new());
    place.pull(&server, "a/b:1").unwrap();
    let kept = place.pull(&server, "a/b:2").unwrap().image;
    assert_eq!(place.names("layers").len(), 3);
    place
        .store
        .remove(&server.name("a/b:1"), false, &|_| None)
        .unwrap();
    assert_eq!(place.names("layers").len(), 2);
    let layers = place.store.unpacked_layers(&kept, &Silent).unwrap();
    assert!(layers[0].join("base").exists() && layers[1].join("two").exists());
}

#[test]
fn a_hold_keeps_garbage() {
    let (server, place) = (two_tags().serve(), Place::new());
    let image = place.pull(&server, "a/b:1").unwrap().image;
    let other = ImageStore::open(place.store.root()).unwrap();
    let hold = other.hold().unwrap();
    place
        .store
        .remove(&image.id.to_string(), false, &|_| None)
        .unwrap();
    assert!(place.store.list().unwrap().is_empty());
    assert_eq!(
        place.names("layers").len(),
        2,
        "somebody may be about to use them"
    );
    assert!(place.store.collect_garbage().unwrap().busy);
    drop(hold);
    let reclaimed = place.store.collect_garbage().unwrap();
    assert_eq!((reclaimed.busy, reclaimed.layers), (false, 2));
    place.assert_empty();
}

#[test]
fn unpacked_layers_come_back_when_they_are_lost() {
    let (server, place) = (two_tags().serve(), Place::new());
    let image = place.pull(&server, "a/b:1").unwrap().image;
    std::fs::remove_dir_all(place.store.root().join("layers")).unwrap();
    let store = ImageStore::open(place.store.root()).unwrap();
    let layers = store.unpacked_layers(&image, &Silent).unwrap();
    assert!(layers.iter().all(|layer| layer.is_dir()));
}

#[test]
fn leftovers_of_killed_processes_are_swept_and_downloads_kept() {
    let place = Place::new();
    let root = place.store.root().to_owned();
    let half = root.join("unpack").join(format!("{}.1.0", "a".repeat(64)));
    std::fs::create_dir_all(half.join("etc/deep")).unwrap();
    std::fs::write(half.join("etc/passwd"), "x").unwrap();
    std::fs::write(root.join("ingest/write-abc"), "x").unwrap();
    std::fs::write(root.join("ingest/stage-abc"), "x").unwrap();
    std::fs::write(root.join("ingest").join("b".repeat(64)), "partial").unwrap();
    let hold = place.store.hold().unwrap();
    ImageStore::open(&root).unwrap();
    assert_eq!(place.names("unpack").len(), 1, "somebody is at work");
    drop(hold);
    ImageStore::open(&root).unwrap();
    assert_eq!(place.names("unpack"), Vec::<String>::new());
    assert_eq!(place.names("ingest"), ["b".repeat(64)]);
}

#[test]
fn the_store_is_closed_to_others_and_an_oci_layout() {
    let (server, place) = (two_tags().serve(), Place::new());
    place.pull(&server, "a/b:1").unwrap();
    let mode = |path: &str| {
        place
            .store
            .root()
            .join(path)
            .metadata()
            .unwrap()
            .permissions()
            .mode()
            & 0o777
    };
    assert_eq!((mode(""), mode("layers")), (0o700, 0o700));
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(place.store.root().join(name)).unwrap()).unwrap()
    };
    assert_eq!(read("oci-layout")["imageLayoutVersion"], "1.0.0");
    let name =
        read("index.json")["manifests"][0]["annotations"]["org.opencontainers.image.ref.name"]
            .clone();
    assert_eq!(name, server.name("a/b:1"));
}

#[test]
fn damage_is_named() {
    let (server, place) = (two_tags().serve(), Place::new());
    let image = place.pull(&server, "a/b:1").unwrap().image;
    let config = place.store.root().join("blobs/sha256").join(image.id.hex());
    std::fs::write(&config, "{}").unwrap();
    let text = message(&place.store.list().unwrap_err());
    assert!(
        text.contains("damaged") && text.contains(image.id.hex()),
        "{text}"
    );
    std::fs::write(place.store.root().join("index.json"), "{").unwrap();
    let text = message(&place.store.resolve("x").unwrap_err());
    assert!(text.contains("index.json"), "{text}");
}
