//! Archives and layouts.

use std::collections::BTreeMap;
use std::path::Path;

use hull_images::{Digest, Image, LoadError, Silent};
use serde_json::json;

use crate::message;
use crate::source::{Content, OCI_INDEX, Place, gzip, layer};

/// A tarball; links are given as `name -> target`.
fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        match name.split_once(" -> ") {
            Some((name, target)) => {
                header.set_entry_type(tar::EntryType::Symlink);
                header.set_size(0);
                builder.append_link(&mut header, name, target).unwrap();
            }
            None => {
                header.set_size(content.len() as u64);
                builder.append_data(&mut header, name, *content).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}

fn config(layers: &[&[u8]]) -> Vec<u8> {
    config_for("linux", "amd64", layers)
}

fn config_for(os: &str, architecture: &str, layers: &[&[u8]]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|l| Digest::of(l).to_string()).collect();
    serde_json::to_vec(&json!({"architecture": architecture, "os": os,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}}))
    .unwrap()
}

fn load(place: &Place, bytes: &[u8]) -> Result<Vec<Image>, LoadError> {
    place
        .store
        .load_reader(&mut &bytes[..], "test.tar", &Silent)
}

fn has(place: &Place, image: &Image, layer: usize, name: &str) -> bool {
    place.store.unpacked_layers(image, &Silent).unwrap()[layer]
        .join(name)
        .exists()
}

fn docker_archive() -> (Vec<u8>, String) {
    let (base, top) = (layer(&[("base", b"1")]), layer(&[("top", b"2")]));
    let config = config(&[&base, &top, &base]);
    let name = format!("{}.json", Digest::of(&config).hex());
    let list = json!([{"Config": name, "RepoTags": ["hull/test:1", "hull/test:2"],
        "Layers": ["one/layer.tar", "two/layer.tar", "three/layer.tar"]}]);
    let list = serde_json::to_vec(&list).unwrap();
    let bytes = archive(&[
        ("one/layer.tar", &base),
        ("one/VERSION", b"1.0"),
        ("two/layer.tar", &top),
        ("three/layer.tar -> ../one/layer.tar", b""),
        (&name, &config),
        ("manifest.json", &list),
    ]);
    (bytes, Digest::of(&config).to_string())
}

#[test]
fn docker_save_archives() {
    let (bytes, id) = docker_archive();
    for bytes in [
        bytes.clone(),
        gzip(&bytes),
        zstd::encode_all(&bytes[..], 1).unwrap(),
    ] {
        let place = Place::new();
        let images = load(&place, &bytes).unwrap();
        assert_eq!(images.len(), 1);
        assert_eq!(images[0].id.to_string(), id);
        let names: Vec<_> = images[0].references.iter().map(|r| r.familiar()).collect();
        assert_eq!(names, ["hull/test:1", "hull/test:2"]);
        assert!(has(&place, &images[0], 0, "base") && has(&place, &images[0], 1, "top"));
        assert!(place.store.resolve("hull/test:2").unwrap().is_some());
        assert_eq!(place.names("ingest"), Vec::<String>::new());
        // Again: the same image, nothing doubled.
        load(&place, &bytes).unwrap();
        assert_eq!(place.store.list().unwrap().len(), 1);
    }
    let place = Place::new();
    let path = place.directory.path().join("saved.tar");
    std::fs::write(&path, &bytes).unwrap();
    let path = path.to_str().unwrap();
    assert_eq!(place.store.load(path, &Silent).unwrap().len(), 1);
    assert_eq!(
        place
            .store
            .load(&format!("docker-archive:{path}"), &Silent)
            .unwrap()
            .len(),
        1
    );
    let error = place
        .store
        .load(&format!("oci-archive:{path}"), &Silent)
        .unwrap_err();
    assert!(
        message(&error).contains("no image archive"),
        "{}",
        message(&error)
    );
}

fn refused(bytes: &[u8], words: &str) {
    let place = Place::new();
    let text = message(&load(&place, bytes).unwrap_err());
    assert!(text.contains(words), "{words}: {text}");
    place.assert_empty();
    assert_eq!(place.names("ingest"), Vec::<String>::new(), "{words}");
}

#[test]
fn broken_tarballs_say_what_is_wrong() {
    let (bytes, _) = docker_archive();
    refused(b"not a tarball at all", "truncated");
    refused(b"", "not a tarball");
    refused(&bytes[..bytes.len() / 2], "truncated");
    refused(&gzip(&bytes)[..300], "truncated");
    refused(&archive(&[("readme", b"x")]), "no image archive");
    refused(
        &archive(&[("manifest.json", b"{")]),
        "manifest.json is malformed",
    );
    refused(&archive(&[("manifest.json", b"[]")]), "no images");
}

#[test]
fn archives_whose_parts_do_not_fit_say_so() {
    let base = layer(&[("base", b"1")]);
    let good = config(&[&base]);
    let with = |layers: &[&str], rest: &[(&str, &[u8])]| {
        let list = json!([{"Config": "c.json", "RepoTags": null, "Layers": layers}]);
        let list = serde_json::to_vec(&list).unwrap();
        archive(&[&[("manifest.json", &list[..])], rest].concat())
    };
    let config = ("c.json", &good[..]);
    refused(&with(&[], &[]), "\"c.json\" is missing");
    refused(&with(&["l"], &[config]), "\"l\" is missing");
    refused(&with(&["../../etc/passwd"], &[config]), "missing");
    refused(&with(&["/etc/passwd"], &[config]), "missing");
    refused(
        &with(&["l"], &[config, ("l -> /etc/passwd", b"")]),
        "missing",
    );
    refused(
        &with(&["a"], &[config, ("a -> b", b""), ("b -> a", b"")]),
        "missing",
    );
    refused(
        &with(&["l", "l"], &[config, ("l", &base)]),
        "lists 2 layers",
    );
    refused(&with(&["l"], &[config, ("l", b"junk")]), "unpack");
    refused(
        &with(&["l"], &[("c.json", b"{}"), ("l", &base)]),
        "configuration",
    );
}

/// The files of an OCI layout with the image tagged `1`.
fn layout(content: &Content, annotations: &serde_json::Value) -> BTreeMap<String, Vec<u8>> {
    let (kind, bytes) = &content.manifests["1"];
    let mut files = BTreeMap::new();
    let index = json!({"schemaVersion": 2, "manifests": [{"mediaType": kind, "size": bytes.len(),
        "digest": Digest::of(bytes), "annotations": annotations}]});
    files.insert("index.json".to_owned(), serde_json::to_vec(&index).unwrap());
    files.insert(
        "oci-layout".to_owned(),
        br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
    );
    let documents = content.manifests.values().map(|(_, bytes)| bytes);
    for bytes in content.blobs.values().chain(documents) {
        files.insert(
            format!("blobs/sha256/{}", Digest::of(bytes).hex()),
            bytes.clone(),
        );
    }
    files
}

fn tarball(files: &BTreeMap<String, Vec<u8>>) -> Vec<u8> {
    archive(
        &files
            .iter()
            .map(|(name, bytes)| (&name[..], &bytes[..]))
            .collect::<Vec<_>>(),
    )
}

fn write(files: &BTreeMap<String, Vec<u8>>, directory: &Path) {
    for (name, bytes) in files {
        let path = directory.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }
}

#[test]
fn oci_layouts() {
    let content = Content::simple(&[layer(&[("f", b"x")])]);
    let digest = Digest::of(&content.manifests["1"].1);
    let named = json!({"org.opencontainers.image.ref.name": "docker.io/library/x:9"});
    let containerd = json!({"io.containerd.image.name": "ghcr.io/a/b:7",
        "org.opencontainers.image.ref.name": "7"});
    let tag = json!({"org.opencontainers.image.ref.name": "1"});
    let place = Place::new();
    for (annotations, name) in [
        (&named, "x:9"),
        (&containerd, "ghcr.io/a/b:7"),
        (&tag, "localhost/test:1"),
    ] {
        let images = load(&place, &tarball(&layout(&content, annotations))).unwrap();
        assert_eq!(images[0].digest, digest, "the manifest is kept as it is");
        assert!(
            images[0].references.iter().any(|r| r.familiar() == name),
            "{name}"
        );
        assert!(has(&place, &images[0], 0, "f"));
    }
    let place = Place::new();
    let images = load(&place, &tarball(&layout(&content, &json!({})))).unwrap();
    assert!(images[0].references.is_empty());

    let directory = place.directory.path().join("Bookworm.dir");
    write(&layout(&content, &tag), &directory);
    let path = directory.to_str().unwrap();
    for source in [
        path.to_owned(),
        format!("oci:{path}"),
        format!("oci:{path}:1"),
    ] {
        let place = Place::new();
        let images = place.store.load(&source, &Silent).unwrap();
        assert_eq!(
            images[0].references[0].to_string(),
            "localhost/bookworm:1",
            "{source}"
        );
        assert!(has(&place, &images[0], 0, "f"));
    }
    let text = message(
        &place
            .store
            .load(&format!("oci:{path}:2"), &Silent)
            .unwrap_err(),
    );
    assert!(text.contains("no image called \"2\""), "{text}");
    let text = message(&place.store.load("oci:/no/such/dir", &Silent).unwrap_err());
    assert!(text.contains("cannot read /no/such/dir"), "{text}");
}

#[test]
fn two_manifests_of_one_image_are_one_image() {
    let (bytes, id) = docker_archive();
    let place = Place::new();
    load(&place, &bytes).unwrap();
    // The same configuration and tars, compressed: another manifest.
    let (base, top) = (layer(&[("base", b"1")]), layer(&[("top", b"2")]));
    let config = config(&[&base, &top, &base]);
    let list = json!([{"Config": "c", "RepoTags": ["hull/other:1"], "Layers": ["b", "t", "b"]}]);
    let list = serde_json::to_vec(&list).unwrap();
    let (base, top) = (gzip(&base), gzip(&top));
    let files: [(&str, &[u8]); 4] = [
        ("c", &config),
        ("manifest.json", &list),
        ("b", &base),
        ("t", &top),
    ];
    load(&place, &archive(&files)).unwrap();
    let images = place.store.list().unwrap();
    assert_eq!((images.len(), images[0].id.to_string()), (1, id.clone()));
    let names: Vec<_> = images[0].references.iter().map(|r| r.familiar()).collect();
    assert_eq!(names, ["hull/other:1", "hull/test:1", "hull/test:2"]);
    let free = |_: &Digest| None;
    for (name, left) in [("hull/test:1", 2), ("hull/other:1", 1)] {
        assert_eq!(place.store.remove(name, false, &free).unwrap().len(), 1);
        place.store.collect_garbage().unwrap();
        let image = place.store.resolve(&id).unwrap().unwrap();
        assert_eq!(image.references.len(), left);
        assert!(has(&place, &image, 0, "base"));
    }
    assert_eq!(
        place
            .store
            .remove("hull/test:2", false, &free)
            .unwrap()
            .len(),
        2
    );
    place.assert_empty();
    assert_eq!(place.names("blobs/sha256"), Vec::<String>::new());
}

/// A docker-archive of one layer.
fn saved(name: &str, config: &[u8], layer: &[u8]) -> Vec<u8> {
    let list = json!([{"Config": "c", "RepoTags": [name], "Layers": ["l"]}]);
    let list = serde_json::to_vec(&list).unwrap();
    archive(&[("c", config), ("l", layer), ("manifest.json", &list)])
}

#[test]
fn another_system_is_refused_and_another_processor_is_not() {
    let (place, layer) = (Place::new(), layer(&[("f", b"x")]));
    let windows = saved("a:1", &config_for("windows", "amd64", &[&layer]), &layer);
    let text = message(&load(&place, &windows).unwrap_err());
    assert!(text.contains("for windows, not for linux"), "{text}");
    place.assert_empty();
    let arm = saved("a:1", &config_for("linux", "arm64", &[&layer]), &layer);
    let images = load(&place, &arm).unwrap();
    assert_eq!(images[0].config.architecture().to_string(), "arm64");
}

#[test]
fn a_failed_load_frees_what_it_brought_and_no_more() {
    let (place, good, bad) = (
        Place::new(),
        layer(&[("f", b"1")]),
        layer(&[("f", b"2"), ("g", b"")]),
    );
    // Somebody's interrupted download, and a complete part of it.
    for (part, content) in [("ingest", "half"), ("blobs/sha256", "whole")] {
        let name = Digest::of(content.as_bytes());
        let path = place.store.root().join(part).join(name.hex());
        std::fs::write(path, content).unwrap();
    }
    load(&place, &saved("good:1", &config(&[&good]), &good)).unwrap();
    let names = |place: &Place| {
        let mut names = ["blobs/sha256", "ingest", "layers"].map(|part| place.names(part));
        names.iter_mut().for_each(|part| part.sort());
        names
    };
    let before = names(&place);
    // Its second layer is not what its configuration says.
    let list = json!([{"Config": "c", "RepoTags": ["bad:1"], "Layers": ["l", "m"]}]);
    let list = serde_json::to_vec(&list).unwrap();
    let config = config(&[&bad, b"something else"]);
    let files: [(&str, &[u8]); 4] = [
        ("c", &config),
        ("l", &bad),
        ("m", &good),
        ("manifest.json", &list),
    ];
    let text = message(&load(&place, &archive(&files)).unwrap_err());
    assert!(text.contains("digest mismatch"), "{text}");
    assert_eq!(names(&place), before);
    // While somebody uses the store it may be theirs: it stays until the next sweep.
    let hold = place.store.hold().unwrap();
    load(&place, &archive(&files)).unwrap_err();
    assert!(names(&place)[0].len() > before[0].len());
    drop(hold);
    load(&place, &archive(&files)).unwrap_err();
    place.store.collect_garbage().unwrap();
    assert_eq!(place.names("ingest"), Vec::<String>::new());
    assert_eq!(place.names("blobs/sha256").len(), 3);
}

#[test]
fn layouts_are_verified() {
    let content = Content::simple(&[layer(&[("f", b"x")])]);
    let good = layout(
        &content,
        &json!({"org.opencontainers.image.ref.name": "x:1"}),
    );
    for name in good.keys().filter(|name| name.starts_with("blobs/")) {
        for (change, words) in [(0, "digest mismatch"), (1, "missing")] {
            let mut files = good.clone();
            match change {
                0 => files.get_mut(name).unwrap().push(b' '),
                _ => drop(files.remove(name)),
            }
            let place = Place::new();
            let text = message(&load(&place, &tarball(&files)).unwrap_err());
            assert!(text.contains(words), "{text}");
            place.assert_empty();
            let directory = place.directory.path().join("layout");
            write(&files, &directory);
            let error = place
                .store
                .load(directory.to_str().unwrap(), &Silent)
                .unwrap_err();
            assert!(message(&error).contains(words), "{}", message(&error));
            place.assert_empty();
        }
    }
    // A pipe in a layout must not hang us.
    let place = Place::new();
    let directory = place.directory.path().join("layout");
    write(&good, &directory);
    std::fs::remove_file(directory.join("index.json")).unwrap();
    rustix::fs::mkfifoat(
        rustix::fs::CWD,
        directory.join("index.json"),
        rustix::fs::Mode::RWXU,
    )
    .unwrap();
    let error = place
        .store
        .load(directory.to_str().unwrap(), &Silent)
        .unwrap_err();
    assert!(
        message(&error).contains("not a file"),
        "{}",
        message(&error)
    );
}

#[test]
fn layouts_of_several_platforms() {
    let mut content = Content::default();
    let entries = content.platforms(&["arm64", "amd64"]);
    let index = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries});
    content.document("1", OCI_INDEX, &index);
    let place = Place::new();
    let images = load(&place, &tarball(&layout(&content, &json!({})))).unwrap();
    assert!(has(&place, &images[0], 0, "amd64"));
    // Listed side by side in index.json, as skopeo --all does not but buildkit may.
    let mut files = layout(&content, &json!({}));
    files.insert("index.json".to_owned(), serde_json::to_vec(&index).unwrap());
    assert_eq!(load(&Place::new(), &tarball(&files)).unwrap().len(), 1);
    let only_arm = json!({"schemaVersion": 2, "manifests": [entries[0]]});
    files.insert(
        "index.json".to_owned(),
        serde_json::to_vec(&only_arm).unwrap(),
    );
    let text = message(&load(&Place::new(), &tarball(&files)).unwrap_err());
    assert!(text.contains("linux/arm64"), "{text}");
}
