//! Streams that break, and entries that mean harm by what they are.

use std::os::unix::fs::MetadataExt as _;

use super::{Fixture, Item, Layer, gzip, message, privileged};
use crate::digest::Digest;

fn sample() -> Vec<u8> {
    Layer::default()
        .directory("d")
        .file("d/f", &"content ".repeat(500))
        .symlink("l", "d")
        .finish()
}

#[test]
fn truncated_layers_are_errors() {
    let tar = sample();
    let diff_id = Digest::of(&tar);
    for blob in [
        tar.clone(),
        gzip(&tar),
        zstd::encode_all(&tar[..], 1).unwrap(),
    ] {
        for cut in (0..blob.len()).step_by(blob.len() / 23 + 1) {
            let fixture = Fixture::new();
            assert!(
                fixture.unpack_as(&blob[..cut], Some(&diff_id)).is_err(),
                "{cut}"
            );
        }
        Fixture::new().unpack_as(&blob, Some(&diff_id)).unwrap();
    }
    let error = Fixture::new().unpack(&gzip(&tar)[..100]).unwrap_err();
    assert!(error.to_string().contains("truncated"), "{error}");
    let error = Fixture::new().unpack(&tar[..2000]).unwrap_err();
    assert!(error.to_string().contains("truncated"), "{error}");
}

#[test]
fn corrupt_layers_are_errors() {
    let tar = sample();
    let diff_id = Digest::of(&tar);
    for blob in [gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap()] {
        for at in 0..blob.len() {
            let mut bad = blob.clone();
            bad[at] ^= 0x55;
            // Some header bytes (time, name flags) mean nothing: then the content is right.
            let fixture = Fixture::new();
            if fixture.unpack_as(&bad, Some(&diff_id)).is_ok() {
                assert_eq!(fixture.read("d/f").len(), 4000, "byte {at}");
            }
        }
    }
    let mut bad = gzip(&tar);
    let middle = bad.len() / 2;
    bad[middle] ^= 0xff;
    let text = message(&Fixture::new().unpack_as(&bad, Some(&diff_id)).unwrap_err());
    assert!(
        text.contains("corrupt") || text.contains("truncated"),
        "{text}"
    );
}

#[test]
fn a_wrong_diff_id_says_both() {
    let (tar, wrong) = (sample(), Digest::of(b"something else"));
    let text = Fixture::new()
        .unpack_as(&tar, Some(&wrong))
        .unwrap_err()
        .to_string();
    assert!(text.contains(&wrong.to_string()), "{text}");
    assert!(text.contains(&Digest::of(&tar).to_string()), "{text}");
}

#[test]
fn garbage_behind_the_end() {
    let tar = sample();
    let mut longer = tar.clone();
    longer.extend_from_slice(&[b'x'; 700]);
    let fixture = Fixture::new();
    assert!(
        fixture.unpack_as(&longer, Some(&Digest::of(&tar))).is_err(),
        "it is in the digest"
    );
    // Part of the digest, and otherwise ignored, as by Docker: no entry hides in there.
    let hidden = [tar.clone(), Layer::default().file("hidden", "x").finish()].concat();
    fixture
        .unpack_as(&hidden, Some(&Digest::of(&hidden)))
        .unwrap();
    assert_eq!(fixture.kind("hidden"), "nothing");
    let mut trailing = gzip(&tar);
    trailing.extend_from_slice(b"not gzip");
    assert!(Fixture::new().unpack(&trailing).is_err());
}

#[test]
fn other_compressions_are_named() {
    let xz = b"\xfd7zXZ\0rest of it";
    assert!(
        Fixture::new()
            .unpack(xz)
            .unwrap_err()
            .to_string()
            .contains("xz")
    );
    let bzip2 = b"BZh91AY&SY";
    assert!(
        Fixture::new()
            .unpack(bzip2)
            .unwrap_err()
            .to_string()
            .contains("bzip2")
    );
    assert!(Fixture::new().unpack(b"<html>not found</html>").is_err());
}

#[test]
fn malformed_headers_are_errors() {
    let good = sample();
    let mut bad = good.clone();
    bad[0] ^= 1;
    assert!(
        Fixture::new()
            .unpack(&bad)
            .unwrap_err()
            .to_string()
            .contains("checksum")
    );
    let unknown = Layer::default().add(Item {
        kind: b'Z',
        ..Item::default()
    });
    assert!(Fixture::new().refused(unknown).contains("unsupported kind"));
    let lone = Layer::default().file("a", "").raw(&[0; 512]).file("b", "");
    assert!(Fixture::new().refused(lone).contains("alone"));
    let dangling = Layer::default().pax(&[("path", b"x")]);
    assert!(Fixture::new().refused(dangling).contains("truncated"));
    let owner = Layer::default().add(Item {
        uid: u32::MAX.into(),
        ..Item::default()
    });
    assert!(Fixture::new().refused(owner).contains("range"));
    let owner = Layer::default()
        .pax(&[("gid", b"4294967296")])
        .file("f", "");
    assert!(Fixture::new().refused(owner).contains("range"));
}

#[test]
fn directories_with_data_hide_nothing() {
    // Some readers skip a directory's "data", some read it as headers: a size here is ignored.
    let inner = Layer::default().file("inner", "x").bytes;
    let directory = Item {
        kind: b'5',
        name: b"d",
        size: Some(inner.len() as u64),
        ..Item::default()
    };
    let fixture = Fixture::new();
    fixture.accepted(Layer::default().add(directory).raw(&inner));
    assert_eq!(fixture.kind("inner"), "file");
}

#[test]
fn devices_are_made_and_never_opened() {
    if !privileged() {
        return;
    }
    let fixture = Fixture::new();
    let node = |kind, name, device| Item {
        kind,
        name,
        device,
        mode: 0o666,
        ..Item::default()
    };
    fixture.accepted(
        Layer::default()
            .add(node(b'3', b"full", (1, 7)))
            .add(node(b'4', b"disk", (8, 0)))
            .add(node(b'6', b"pipe", (0, 0)))
            // Writing to these would fail, destroy a disk or block for ever.
            .add(node(b'3', b"full2", (1, 7)))
            .file("full2", "a file")
            .add(node(b'6', b"pipe2", (0, 0)))
            .file("pipe2", "a file"),
    );
    let rdev = |name: &str| {
        std::fs::symlink_metadata(fixture.path(name))
            .unwrap()
            .rdev()
    };
    assert_eq!(
        (fixture.kind("full"), rdev("full")),
        ("character device", 0x107)
    );
    assert_eq!(
        (fixture.kind("disk"), rdev("disk")),
        ("block device", 0x800)
    );
    assert_eq!(fixture.kind("pipe"), "fifo");
    assert_eq!(
        (fixture.read("full2"), fixture.read("pipe2")),
        ("a file".into(), "a file".into())
    );
    for name in ["full/x", "disk/x", "pipe/x"] {
        let layer = || {
            Layer::default()
                .add(node(b'3', b"full", (1, 7)))
                .add(node(b'4', b"disk", (8, 0)))
                .add(node(b'6', b"pipe", (0, 0)))
        };
        let text = fixture.refused(layer().file(name, "x"));
        assert!(text.contains("not a directory"), "{text}");
    }
}

#[test]
fn modes_owners_and_times_are_kept() {
    let fixture = Fixture::new();
    let item = Item {
        mode: 0o6755,
        uid: 12,
        gid: 34,
        mtime: 1_234_567_890,
        ..Item::default()
    };
    fixture.accepted(
        Layer::default()
            .add(Item {
                name: b"setuid",
                data: b"x",
                ..item
            })
            .add(Item {
                name: b"sticky",
                kind: b'5',
                mode: 0o1777,
                ..item
            })
            .add(Item {
                name: b"link",
                kind: b'2',
                link: b"x",
                ..item
            })
            .add(Item {
                name: b"closed",
                kind: b'5',
                mode: 0,
                ..item
            })
            .file("closed/f", "")
            .pax(&[("mtime", b"1234567890.123456789"), ("uid", b"70000")])
            .file("precise", ""),
    );
    let meta = |name: &str| std::fs::symlink_metadata(fixture.path(name)).unwrap();
    assert_eq!(meta("setuid").mode() & 0o7777, 0o6755);
    assert_eq!(meta("sticky").mode() & 0o7777, 0o1777);
    assert_eq!(meta("closed").mode() & 0o7777, 0);
    for name in ["setuid", "sticky", "link", "closed"] {
        assert_eq!(meta(name).mtime(), 1_234_567_890, "{name}");
        if privileged() {
            assert_eq!((meta(name).uid(), meta(name).gid()), (12, 34), "{name}");
        }
    }
    assert_eq!(meta("precise").mtime_nsec(), 123_456_789);
    assert!(!privileged() || meta("precise").uid() == 70000);
    rustix::fs::chmod(fixture.path("closed"), rustix::fs::Mode::RWXU).unwrap();
}

#[test]
fn duplicate_entries_the_last_counts() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .file("a", "first")
            .file("a", "2nd")
            .file("b", "file")
            .directory("b")
            .file("b/in", "x")
            .directory("c/deep/er")
            .file("c/deep/er/f", "x")
            .file("c", "file")
            .directory("d")
            .file("d/kept", "kept")
            .add(Item {
                kind: b'5',
                name: b"d",
                mode: 0o700,
                ..Item::default()
            }),
    );
    assert_eq!(fixture.read("a"), "2nd");
    assert_eq!(fixture.read("b/in"), "x");
    assert_eq!(fixture.read("c"), "file");
    assert_eq!(fixture.read("d/kept"), "kept");
    assert_eq!(fixture.path("d").metadata().unwrap().mode() & 0o7777, 0o700);
}

#[test]
fn a_file_cannot_be_a_parent() {
    let fixture = Fixture::new();
    let text = fixture.refused(Layer::default().file("a", "x").file("a/b", "x"));
    assert!(text.contains("not a directory"), "{text}");
}

#[test]
fn replaced_directories_are_not_written_to() {
    // The directory used last is remembered: it must be forgotten when it goes.
    let fixture = Fixture::new();
    let out = fixture.outside();
    let layer = Layer::default()
        .directory("d")
        .file("d/one", "1")
        .symlink("d", &out)
        .file("d/secret", "pwned");
    let _ = fixture.unpack(&layer.finish());
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .file("d/e/one", "1")
            .symlink("d", "other")
            .directory("other/e")
            .file("d/e/two", "2"),
    );
    assert_eq!(fixture.read("other/e/two"), "2");
}

#[test]
fn extended_attributes() {
    let capability = b"\x01\0\0\x02\0\x04\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let layer = |key: &str, value: &[u8]| {
        Layer::default()
            .pax(&[(&format!("SCHILY.xattr.{key}"), value)])
            .file("f", "x")
    };
    for key in [
        "trusted.overlay.opaque",
        "trusted.overlay.redirect",
        "trusted.overlay.metacopy",
        "trusted.any",
        "user.overlay.opaque",
        "user.overlay.redirect",
    ] {
        let text = Fixture::new().refused(layer(key, b"y"));
        assert!(text.contains("overlayfs"), "{key}: {text}");
    }
    let get = |fixture: &Fixture, key: &str| {
        let mut value = vec![0; 100];
        let length = rustix::fs::lgetxattr(fixture.path("f"), key, &mut value[..]).ok()?;
        value.truncate(length);
        Some(value)
    };
    for key in [
        "security.selinux",
        "system.posix_acl_access",
        "security.evm",
        "bad",
    ] {
        let fixture = Fixture::new();
        fixture.accepted(layer(key, b"y"));
        assert_eq!(get(&fixture, key), None, "{key}");
    }
    if privileged() {
        let fixture = Fixture::new();
        fixture.accepted(layer("security.capability", capability));
        assert_eq!(
            get(&fixture, "security.capability").as_deref(),
            Some(&capability[..])
        );
        let text = Fixture::new().refused(layer("security.capability", b"nonsense"));
        assert!(text.contains("extended attribute"), "{text}");
    }
}
