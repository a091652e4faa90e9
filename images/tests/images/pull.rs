//! Pulls from a registry that does as it should.

use std::sync::Mutex;

use hull_images::{Digest, ImageStore, Progress, PullOptions, Reference, Removed, Silent, Step};
use serde_json::json;

use crate::server::Server;
use crate::source::{Content, OCI_INDEX, OCI_MANIFEST, Place, layer, noise};

#[test]
fn an_image_is_pulled_once() {
    let layers = [
        layer(&[("base", b"1")]),
        layer(&[("a/middle", b"2")]),
        layer(&[("top", b"3")]),
    ];
    let server = Content::simple(&layers).serve();
    let place = Place::new();
    let pulled = place.pull(&server, "a/b:1").unwrap();
    assert!(pulled.newer);
    let image = &pulled.image;
    assert_eq!(
        image
            .config
            .config()
            .as_ref()
            .unwrap()
            .cmd()
            .as_ref()
            .unwrap(),
        &["/bin/true"]
    );
    assert_eq!(
        image.references,
        [Reference::parse(&server.name("a/b:1")).unwrap()]
    );
    let directories = place.store.unpacked_layers(image, &Silent).unwrap();
    for (directory, (name, content)) in
        directories
            .iter()
            .zip([("base", "1"), ("a/middle", "2"), ("top", "3")])
    {
        assert_eq!(
            std::fs::read_to_string(directory.join(name)).unwrap(),
            content
        );
    }
    let blobs = server.count("/blobs/");
    assert_eq!(blobs, 4);
    let again = place.pull(&server, "a/b:1").unwrap();
    assert!(!again.newer);
    assert_eq!(server.count("/blobs/"), blobs, "nothing is fetched twice");
}

#[test]
fn an_image_is_found_by_its_names_and_ids() {
    let server = Content::simple(&[layer(&[("f", b"x")])]).serve();
    let place = Place::new();
    let pulled = place.pull(&server, "a/b:1").unwrap();
    let image = &pulled.image;
    let id = image.id.to_string();
    let found = |name: &str| place.store.resolve(name).unwrap().map(|image| image.id);
    for name in [
        &server.name("a/b:1"),
        &server.name(&format!("a/b@{}", pulled.digest)),
        &id,
        &id[7..],
        image.id.short(),
        &id[7..11],
    ] {
        assert_eq!(found(name).as_ref(), Some(&image.id), "{name}");
    }
    let (no_tag, other_tag) = (server.name("a/b"), server.name("a/b:2"));
    for name in ["a/b:1", &no_tag, &other_tag, "no such name!", "", "ffff"] {
        assert!(found(name).is_none(), "{name}");
    }
}

#[test]
fn pulls_by_digest() {
    let server = Content::simple(&[layer(&[("f", b"x")])]).serve();
    let place = Place::new();
    let digest = place.pull(&server, "a/b:1").unwrap().digest;
    let other = Place::new();
    let pulled = other.pull(&server, &format!("a/b@{digest}")).unwrap();
    assert_eq!(pulled.image.digest, digest);
    assert!(pulled.image.references.is_empty());
    assert_eq!(pulled.image.repo_digests.len(), 1);
    assert_eq!(other.store.list().unwrap().len(), 1);
}

#[test]
fn an_index_leads_to_this_platform() {
    let mut content = Content::default();
    let entries = content.platforms(&["arm64", "amd64"]);
    let attestation = json!({"mediaType": OCI_MANIFEST, "digest": entries[0]["digest"], "size": 1,
        "platform": {"os": "unknown", "architecture": "unknown"}});
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX,
        "manifests": [attestation, entries[0], entries[1]]});
    let top = content.document("1", OCI_INDEX, &index);
    let only_arm = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [entries[0]]});
    content.document("arm", OCI_INDEX, &only_arm);
    let server = content.serve();
    let place = Place::new();
    let pulled = place.pull(&server, "a/b:1").unwrap();
    assert_eq!(pulled.digest.to_string(), top);
    assert_ne!(pulled.image.digest, pulled.digest);
    let directories = place.store.unpacked_layers(&pulled.image, &Silent).unwrap();
    assert!(directories[0].join("amd64").exists());
    assert!(!place.pull(&server, "a/b:1").unwrap().newer);
    // Both digests mean it, as in Docker.
    for digest in [&pulled.digest, &pulled.image.digest] {
        let name = server.name(&format!("a/b@{digest}"));
        assert!(place.store.resolve(&name).unwrap().is_some());
    }
    let text = crate::message(&place.pull(&server, "a/b:arm").unwrap_err());
    assert!(
        text.contains("no image for linux/amd64") && text.contains("linux/arm64"),
        "{text}"
    );
}

#[test]
fn every_media_type() {
    let tar = layer(&[("f", b"x")]);
    for (kind, blob) in [
        ("application/vnd.oci.image.layer.v1.tar", tar.clone()),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip",
            crate::source::gzip(&tar),
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+zstd",
            zstd::encode_all(&tar[..], 1).unwrap(),
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            crate::source::gzip(&tar),
        ),
        ("application/vnd.docker.image.rootfs.diff.tar", tar.clone()),
        // Mislabelled, as some archives are; Docker reads it.
        ("application/vnd.oci.image.layer.v1.tar+gzip", tar.clone()),
    ] {
        let mut content = Content::default();
        let mut manifest = content.image("amd64", std::slice::from_ref(&tar));
        let size = blob.len();
        manifest["layers"] =
            json!([{"mediaType": kind, "digest": content.blob(blob), "size": size}]);
        let mut manifest_kind = OCI_MANIFEST;
        if kind.contains("docker") {
            manifest_kind = "application/vnd.docker.distribution.manifest.v2+json";
            manifest["mediaType"] = json!(manifest_kind);
            manifest["config"]["mediaType"] =
                json!("application/vnd.docker.container.image.v1+json");
        }
        content.document("1", manifest_kind, &manifest);
        let (server, place) = (content.serve(), Place::new());
        let pulled = place.pull(&server, "a/b:1").unwrap();
        let directories = place.store.unpacked_layers(&pulled.image, &Silent).unwrap();
        assert!(directories[0].join("f").exists(), "{kind}");
    }
}

#[test]
fn a_tag_that_moves() {
    let mut content = Content::simple(&[layer(&[("old", b"x")])]);
    let old = content.manifests["1"].clone();
    let manifest = content.image("amd64", &[layer(&[("new", b"y")])]);
    content.document("1", OCI_MANIFEST, &manifest);
    let moved = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = std::sync::Arc::clone(&moved);
    let server = Server::start(move |request| {
        let mut now = content.clone();
        if !seen.load(std::sync::atomic::Ordering::SeqCst) {
            now.manifests.insert("1".to_owned(), old.clone());
        }
        now.answer(request)
    });
    let place = Place::new();
    let first = place.pull(&server, "a/b:1").unwrap().image;
    moved.store(true, std::sync::atomic::Ordering::SeqCst);
    let second = place.pull(&server, "a/b:1").unwrap();
    assert!(second.newer && second.image.id != first.id);
    let images = place.store.list().unwrap();
    assert_eq!(images.len(), 2);
    assert!(
        images[1].references.is_empty() && images[1].id == first.id,
        "nameless, and last"
    );
    let used = |id: &Digest| (*id == first.id).then(|| "busy".to_owned());
    let (kept, _) = place.store.prune(&used).unwrap();
    assert!(kept.is_empty());
    let (removed, reclaimed) = place.store.prune(&|_| None).unwrap();
    assert_eq!(removed, [Removed::Deleted(first.id)]);
    assert_eq!(
        (reclaimed.layers, reclaimed.blobs, reclaimed.busy),
        (1, 3, false)
    );
    assert!(
        place
            .store
            .resolve(&server.name("a/b:1"))
            .unwrap()
            .is_some()
    );
}

#[derive(Default)]
struct Steps(Mutex<Vec<(String, Step)>>);

impl Progress for Steps {
    fn step(&self, layer: &Digest, step: Step) {
        self.0.lock().unwrap().push((layer.to_string(), step));
    }
}

#[test]
fn progress_tells_the_story_of_each_layer() {
    let content = Content::simple(&[layer(&[("f", &noise(3 << 20, 5))])]);
    let digest = content.layer_digests().remove(0);
    let size = content.blobs[&digest].len() as u64;
    let (server, place, steps) = (content.serve(), Place::new(), Steps::default());
    let options = PullOptions {
        progress: &steps,
        ..PullOptions::default()
    };
    place.pull_with(&server, "a/b:1", &options).unwrap();
    let steps = steps.0.into_inner().unwrap();
    let of_layer: Vec<&Step> = steps
        .iter()
        .filter(|(name, _)| *name == digest)
        .map(|(_, step)| step)
        .collect();
    assert_eq!(of_layer[0], &Step::Waiting { total_bytes: size });
    assert_eq!(of_layer[of_layer.len() - 1], &Step::Ready);
    assert!(of_layer.contains(&&Step::Downloading {
        done_bytes: size,
        total_bytes: size
    }));
    assert!(
        of_layer
            .iter()
            .filter(|s| matches!(s, Step::Downloading { .. }))
            .count()
            > 5
    );
    assert!(of_layer.iter().any(|s| matches!(s, Step::Unpacking { .. })));
}

#[test]
fn several_pulls_at_once_fetch_each_blob_once() {
    let layers: Vec<_> = (0..6)
        .map(|n| layer(&[(&format!("f{n}"), &noise(200_000, n))]))
        .collect();
    let server = Content::simple(&layers).serve();
    let place = Place::new();
    std::thread::scope(|scope| {
        for _ in 0..6 {
            scope.spawn(|| {
                // Its own handle, as another process would have.
                let store = ImageStore::open(place.store.root()).unwrap();
                let reference = Reference::parse(&server.name("a/b:1")).unwrap();
                let options = PullOptions {
                    auth: hull_images::Auth::Anonymous,
                    ..PullOptions::default()
                };
                let pulled = store.pull(&reference, &options).unwrap();
                assert_eq!(
                    store.unpacked_layers(&pulled.image, &Silent).unwrap().len(),
                    6
                );
            });
        }
    });
    assert_eq!(server.count("/blobs/"), 7);
    assert_eq!(place.store.list().unwrap().len(), 1);
    assert_eq!(place.names("ingest"), Vec::<String>::new());
    assert_eq!(place.names("unpack"), Vec::<String>::new());
    assert_eq!(place.names("layers").len(), 6);
}

#[test]
fn blobs_may_be_elsewhere_and_credentials_stay_here() {
    let content = Content::simple(&[layer(&[("f", b"x")])]);
    let blobs = content.clone();
    let storage = Server::start(move |request| blobs.answer(request));
    let target = storage.address;
    let server = Server::start(move |request| {
        if request.path.contains("/blobs/") {
            crate::server::Reply::new(307, "").with(
                "Location",
                format!("http://localhost:{}{}", target.port(), request.path),
            )
        } else {
            content.answer(request)
        }
    });
    let auth = hull_images::Auth::Basic {
        user: "u".to_owned(),
        password: "p".to_owned(),
    };
    let options = PullOptions {
        auth,
        ..PullOptions::default()
    };
    Place::new().pull_with(&server, "a/b:1", &options).unwrap();
    assert!(
        server
            .requests()
            .iter()
            .any(|r| r.header("authorization").is_some())
    );
    assert_eq!(storage.count("/blobs/"), 2);
    assert!(
        storage
            .requests()
            .iter()
            .all(|r| r.header("authorization").is_none())
    );
}
