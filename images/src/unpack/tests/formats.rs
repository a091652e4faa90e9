//! What the tools that people use write.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use super::{Fixture, Item, Layer, gzip};
use crate::digest::Digest;

#[test]
fn every_compression() {
    let tar = Layer::default().file("f", "x").finish();
    let twice = [gzip(&tar[..512]), gzip(&tar[512..])].concat();
    let frames = [
        b"\x50\x2a\x4d\x18\x04\0\0\0skip".to_vec(),
        zstd::encode_all(&tar[..512], 1).unwrap(),
        zstd::encode_all(&tar[512..], 1).unwrap(),
    ]
    .concat();
    for blob in [
        tar.clone(),
        gzip(&tar),
        twice,
        zstd::encode_all(&tar[..], 3).unwrap(),
        frames,
    ] {
        let fixture = Fixture::new();
        fixture.unpack_as(&blob, Some(&Digest::of(&tar))).unwrap();
        assert_eq!(fixture.read("f"), "x");
    }
}

#[test]
fn empty_layers() {
    Fixture::new().unpack(&Layer::default().finish()).unwrap();
    Fixture::new()
        .unpack(&gzip(&Layer::default().finish()))
        .unwrap();
    Fixture::new().unpack(b"").unwrap();
}

#[test]
fn long_names_in_both_ways() {
    let fixture = Fixture::new();
    let long = format!("{}/{}", "d".repeat(150), "f".repeat(200));
    let pax = format!("p{long}");
    fixture.accepted(
        Layer::default()
            .file(&long, "gnu")
            .hard_link("short", &long)
            .pax(&[("path", pax.as_bytes())])
            .file("ignored", "pax")
            .pax(&[("linkpath", pax.as_bytes())])
            .hard_link("short2", "ignored"),
    );
    assert_eq!(
        (fixture.read(&long), fixture.read("short")),
        ("gnu".into(), "gnu".into())
    );
    assert_eq!(
        (fixture.read(&pax), fixture.read("short2")),
        ("pax".into(), "pax".into())
    );
}

#[test]
fn old_headers_name_directories_by_a_slash() {
    let fixture = Fixture::new();
    fixture.accepted(Layer::default().add(Item {
        kind: 0,
        name: b"old/",
        ..Item::default()
    }));
    assert_eq!(fixture.kind("old"), "directory");
}

#[test]
fn global_headers_change_nothing() {
    let fixture = Fixture::new();
    let data = super::record("path", b"../outside/pwned");
    let global = Item {
        kind: b'g',
        name: b"pax_global_header",
        data: &data,
        ..Item::default()
    };
    fixture.accepted(Layer::default().add(global).file("f", "x"));
    assert_eq!(fixture.read("f"), "x");
}

fn tar_of(directory: &Path, options: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["--create", "--file=-", "--directory"])
        .arg(directory)
        .args(options)
        .arg(".")
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// A directory with a sparse file, links, a long name and odd times.
fn made_by_hand() -> tempfile::TempDir {
    use std::os::unix::fs::FileExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let sparse = std::fs::File::create(path("sparse")).unwrap();
    sparse.set_len(50 << 20).unwrap();
    for segment in 0..60_u64 {
        sparse
            .write_all_at(b"data", segment * (800 << 10) + 123)
            .unwrap();
    }
    std::fs::create_dir_all(path(&format!("{}/{}", "l".repeat(120), "n".repeat(120)))).unwrap();
    std::fs::write(path("file"), "content").unwrap();
    std::fs::hard_link(path("file"), path("hard")).unwrap();
    std::os::unix::fs::symlink("t".repeat(150), path("soft")).unwrap();
    directory
}

#[test]
fn what_gnu_tar_writes() {
    let source = made_by_hand();
    for options in [
        &["--format=gnu"][..],
        &["--format=gnu", "--sparse"],
        &["--format=posix"],
        &["--format=posix", "--sparse", "--sparse-version=0.0"],
        &["--format=posix", "--sparse", "--sparse-version=0.1"],
        &["--format=posix", "--sparse", "--sparse-version=1.0"],
    ] {
        let fixture = Fixture::new();
        fixture.unpack(&tar_of(source.path(), options)).unwrap();
        for name in ["sparse", "file", "hard"] {
            let (a, b) = (source.path().join(name), fixture.path(name));
            assert!(
                std::fs::read(&a).unwrap() == std::fs::read(&b).unwrap(),
                "{options:?} {name}"
            );
            let (a, b) = (a.metadata().unwrap(), b.metadata().unwrap());
            assert_eq!(
                (a.mode(), a.nlink(), a.mtime()),
                (b.mode(), b.nlink(), b.mtime()),
                "{name}"
            );
        }
        let soft = std::fs::read_link(fixture.path("soft")).unwrap();
        assert_eq!(
            soft,
            std::fs::read_link(source.path().join("soft")).unwrap()
        );
        assert!(
            fixture
                .path(&format!("{}/{}", "l".repeat(120), "n".repeat(120)))
                .is_dir()
        );
        let holes = options.contains(&"--sparse");
        let blocks = fixture.path("sparse").metadata().unwrap().blocks();
        assert!(
            !holes || blocks * 512 < 10 << 20,
            "{options:?}: {blocks} blocks"
        );
    }
}
