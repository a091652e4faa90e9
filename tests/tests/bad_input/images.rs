//! Archives and layers that are damaged or mean harm.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use hull_tests::hull::Hull;

use super::archive::{Tar, archive, archive_with, config, digest, gzip};
use super::{refused, still_usable};

/// What a store holds that isn't an image's: half-made things.
fn half_made(hull: &Hull) -> Vec<String> {
    let images = hull.state_dir().join("images");
    ["ingest", "unpack"]
        .iter()
        .flat_map(|part| names(&images.join(part)))
        .collect()
}

fn names(directory: &Path) -> BTreeSet<String> {
    fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect()
}

/// Loads an archive that is wrong: refused in these words, and the images are those from before.
#[track_caller]
fn load_refused(hull: &Hull, case: &str, archive: Vec<u8>, words: &[&str]) {
    let images = hull.state_dir().join("images");
    let content = || ["blobs/sha256", "layers"].map(|part| names(&images.join(part)));
    let before = (list(hull), content());
    let loaded = hull.cmd(["load", "-q"]).stdin(archive).output();
    assert_eq!(loaded.text(), "", "{case}");
    refused(&loaded, 1, &[&["cannot"], words].concat());
    assert_eq!((list(hull), content()), before, "{case}");
    assert_eq!(half_made(hull), Vec::<String>::new(), "{case}");
}

fn list(hull: &Hull) -> String {
    hull.cmd(["images", "-a", "--no-trunc"]).output().ok()
}

fn good_layer() -> Vec<u8> {
    Tar::default().file("f", &"content ".repeat(999)).finish()
}

#[test]
fn broken_archives() {
    let Some(hull) = Hull::new() else { return };
    hull.image();
    let layer = good_layer();
    let good = archive("broken:1", &layer);
    let cut_layer = &layer[..layer.len() / 2];
    let packed = gzip(&layer);
    let mut damaged = packed.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 8].fill(0x55);
    let only_config = Tar::default().file("config.json", "{}").finish();
    let no_json = Tar::default().file("manifest.json", "{ not json").finish();
    let no_layer = Tar::default()
        .file("config.json", &config(&digest(b"")))
        .file(
            "manifest.json",
            r#"[{"Config":"config.json","RepoTags":["broken:1"],"Layers":["gone.tar"]}]"#,
        )
        .finish();
    let cases: Vec<(&str, Vec<u8>, &[&str])> = vec![
        ("nothing", Vec::new(), &["load"]),
        ("no archive", b"hello ".repeat(999), &["load"]),
        ("half", good[..good.len() / 2].to_vec(), &["truncated"]),
        ("half, packed", gzip(&good)[..200].to_vec(), &["truncated"]),
        (
            "half a layer",
            archive("broken:1", cut_layer),
            &["cannot unpack layer sha256:", "truncated"],
        ),
        (
            "a damaged layer",
            archive_with("broken:1", &damaged, &digest(&layer)),
            &["cannot unpack layer sha256:"],
        ),
        (
            "another layer",
            archive_with("broken:1", &layer, &digest(b"other")),
            &["layer digest mismatch"],
        ),
        ("no manifest", only_config, &["index.json"]),
        ("no JSON", no_json, &["manifest.json is malformed"]),
        ("no layer", no_layer, &["\"gone.tar\" is missing"]),
        (
            "a bad name",
            archive("Not A Name", &layer),
            &["invalid reference format"],
        ),
    ];
    for (case, bytes, words) in cases {
        load_refused(&hull, case, bytes, words);
    }
    // The same image, whole: nothing of the attempts stands in its way.
    let loaded = hull.cmd(["load"]).stdin(good).output();
    assert_eq!(loaded.ok(), "Loaded image: broken:1\n");
    still_usable(&hull);
}

#[test]
fn hostile_layers() {
    let Some(hull) = Hull::new() else { return };
    hull.image();
    let canary = hull.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    let out = canary.to_str().unwrap();
    let climb = format!("{}{}", "../".repeat(8), &out[1..]);
    let new = Tar::default;
    let cases: Vec<(&str, Tar, &[&str])> = vec![
        (
            "climbing",
            new().file(&climb, "dead"),
            &["refused", "\"..\""],
        ),
        (
            "a hard link to the host's file",
            new().hard_link("mine", out).file("mine", "dead"),
            &["refused", "link target is not in this layer"],
        ),
        (
            "a climbing hard link",
            new().hard_link("mine", &climb),
            &["refused"],
        ),
        (
            "a whiteout of the directory above",
            new().file("d/.wh...", ""),
            &["refused"],
        ),
        (
            "a climbing whiteout",
            new().file(&format!("{}.wh.canary", "../".repeat(5)), ""),
            &["refused"],
        ),
        (
            "a name below a file",
            new().file("f", "").file("f/g", ""),
            &["refused"],
        ),
        ("no kind", new().entry(b'Z', "z", "", &[]), &["kind"]),
        (
            "a file larger than any",
            new().claim(b'0', "huge", "", 1 << 50),
            &["exceeds a limit"],
        ),
    ];
    for (case, layer, words) in cases {
        let words = [&["cannot unpack layer sha256:"], words].concat();
        load_refused(&hull, case, archive("evil:1", &layer.finish()), &words);
        assert_eq!(fs::read_to_string(&canary).unwrap(), "alive", "{case}");
    }
    still_usable(&hull);
    hull.cmd(["rmi", "busybox:test", "configured:test"])
        .output()
        .ok();
    for part in ["blobs/sha256", "layers", "ingest", "unpack"] {
        let left = names(&hull.state_dir().join("images").join(part));
        assert_eq!(left, BTreeSet::new(), "{part}");
    }
}

#[test]
fn names_that_lead_out_stay_inside() {
    let Some(hull) = Hull::new() else { return };
    let canary = hull.path().join("canary");
    fs::write(&canary, "alive").unwrap();
    let (out, above) = (canary.to_str().unwrap(), hull.path().to_str().unwrap());
    let layer = Tar::default()
        .file(out, "an absolute name is one in the layer")
        .symlink("up", above)
        .file("up/canary", "dead")
        .symlink("climb", &format!("{}{}", "../".repeat(8), &above[1..]))
        .file("climb/canary", "dead")
        .file("climb/.wh.canary", "");
    let bytes = archive("inside:1", &layer.finish());
    // Whether it is accepted is the unpacker's own test; the host's file is this one's.
    let loaded = hull.cmd(["load", "-q"]).stdin(bytes).output();
    assert!([0, 1].contains(&loaded.code), "{:?}", loaded.all());
    assert_eq!(fs::read_to_string(&canary).unwrap(), "alive");
    assert_eq!(half_made(&hull), Vec::<String>::new());
}

#[test]
fn a_layout_that_lies() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let layout = hull.path().join("layout");
    let layer = good_layer();
    let diff_id = digest(&layer);
    write_layout(&layout, &layer, &config(&diff_id));
    let blob = layout.join("blobs/sha256").join(&diff_id[7..]);
    let mut bytes = fs::read(&blob).unwrap();
    bytes[600] ^= 1;
    fs::write(&blob, &bytes).unwrap();
    let source = format!("oci:{}", layout.display());
    let ran = hull.cmd(["run", "--rm", &source]).output();
    refused(&ran, 125, &["digest mismatch", &diff_id]);
    bytes.truncate(700);
    fs::write(&blob, &bytes).unwrap();
    let ran = hull.cmd(["run", "--rm", &source]).output();
    refused(&ran, 125, &["mismatch"]);
    fs::remove_file(&blob).unwrap();
    let ran = hull.cmd(["run", "--rm", &source]).output();
    refused(&ran, 125, &["is missing"]);
    assert_eq!(half_made(&hull), Vec::<String>::new());
    let listed = hull.cmd(["ps", "-aq"]).output();
    assert_eq!(listed.all(), (0, String::new(), String::new()));
    assert!(list(&hull).contains(image.split(':').next().unwrap()));
}

/// An OCI layout of one image of one layer.
fn write_layout(directory: &Path, layer: &[u8], config: &str) {
    let blobs = directory.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |bytes: &[u8], kind: &str| {
        let digest = digest(bytes);
        fs::write(blobs.join(&digest[7..]), bytes).unwrap();
        let media_type = format!("application/vnd.oci.image.{kind}");
        serde_json::json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    };
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": put(config.as_bytes(), "config.v1+json"),
        "layers": [put(layer, "layer.v1.tar")],
    });
    let manifest = put(manifest.to_string().as_bytes(), "manifest.v1+json");
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(directory.join("index.json"), index.to_string()).unwrap();
    let version = r#"{"imageLayoutVersion":"1.0.0"}"#;
    fs::write(directory.join("oci-layout"), version).unwrap();
}
