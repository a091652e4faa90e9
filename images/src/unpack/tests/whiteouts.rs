//! Whiteouts: in overlayfs's form where they should be, nowhere else.

use super::{Fixture, Item, Layer};

#[test]
fn whiteouts_become_device_nodes_and_attributes() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .directory("a")
            .file("a/.wh.gone", "")
            .file(".wh.top", "")
            .file("implied/.wh.x", "")
            .directory("o")
            .file("o/.wh..wh..opq", "")
            .file("p/.wh..wh..opq", ""),
    );
    assert_eq!(fixture.kind("a/gone"), "whiteout");
    assert_eq!(fixture.kind("top"), "whiteout");
    assert_eq!(fixture.kind("implied/x"), "whiteout");
    assert!(fixture.is_opaque("o") && fixture.is_opaque("p") && !fixture.is_opaque("a"));
    assert_eq!(fixture.kind("o/.wh..wh..opq"), "nothing");
    assert_eq!(fixture.kind("a/.wh.gone"), "nothing");
}

#[test]
fn whiteouts_aimed_elsewhere_are_refused() {
    for name in [
        "../.wh.outside",
        "a/../../outside/.wh.secret",
        ".wh...",
        ".wh..",
        ".wh.",
        "a/.wh...",
        "a/.wh..",
        "a/.wh.",
        ".wh.a/b",
        "a/.wh.b/.wh.c",
    ] {
        let fixture = Fixture::new();
        assert!(
            fixture
                .refused(Layer::default().file(name, ""))
                .contains("refused"),
            "{name}"
        );
        // By any kind of entry: only the name counts.
        let text = fixture.refused(Layer::default().directory(name));
        assert!(text.contains("refused"), "{name}");
    }
    let fixture = Fixture::new();
    let embedded = Layer::default()
        .pax(&[("path", b".wh.a\0/../../outside")])
        .file("x", "");
    assert!(fixture.refused(embedded).contains("NUL"));
}

#[test]
fn the_same_layer_keeps_what_it_has() {
    // image-spec layer.md: whiteouts apply to lower layers only, whatever the order.
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .file("before", "kept")
            .file(".wh.before", "")
            .file(".wh.after", "")
            .file("after", "kept")
            .directory("d1")
            .file("d1/f", "kept")
            .file(".wh.d1", "")
            .file(".wh.d2", "")
            .directory("d2")
            .file("d2/f", "kept"),
    );
    for name in ["before", "after", "d1/f", "d2/f"] {
        assert_eq!(fixture.read(name), "kept", "{name}");
    }
    // The lower layers' d1 and d2 are gone all the same.
    assert!(fixture.is_opaque("d1") && fixture.is_opaque("d2"));
}

#[test]
fn whiteouts_below_a_directory_that_became_something_else() {
    // umoci lists every file of a directory that was replaced by a link or a file.
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .symlink("var/log", "/tmp")
            .file("var/log/.wh.apt", "")
            .file("var/log/.wh..wh..opq", "")
            .file("var/log/sub/.wh.x", "")
            .file("etc", "a file")
            .file("etc/.wh.passwd", "")
            .symlink("loop", "loop")
            .file("loop/.wh.x", "")
            .directory("real")
            .symlink("there", "real")
            .file("there/.wh.x", ""),
    );
    assert_eq!(fixture.kind("var/log"), "link");
    assert_eq!(fixture.kind("tmp"), "nothing");
    assert_eq!(fixture.read("etc"), "a file");
    assert_eq!(fixture.kind("real/x"), "whiteout", "as containerd has it");
}

#[test]
fn aufs_bookkeeping_is_ignored() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .directory(".wh..wh.plnk")
            .file(".wh..wh.plnk/12.34", "x")
            .file(".wh..wh.aufs", "")
            .file("real", ""),
    );
    let names: Vec<_> = std::fs::read_dir(fixture.root())
        .unwrap()
        .map(Result::unwrap)
        .collect();
    assert_eq!(names.len(), 1);
}

#[test]
fn an_opaque_file_stays_a_file() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .file("f", "x")
            .file("f/.wh..wh..opq", "")
            .file(".wh.w", "")
            .file("w/.wh..wh..opq", ""),
    );
    assert_eq!(
        (fixture.read("f"), fixture.kind("w")),
        ("x".to_owned(), "whiteout")
    );
}

#[test]
fn implied_directories_look_as_below() {
    use std::os::unix::fs::MetadataExt as _;
    let mut fixture = Fixture::new();
    let tmp = |mode| Item {
        kind: b'5',
        name: b"tmp",
        mode,
        uid: 3,
        gid: 4,
        ..Item::default()
    };
    let root = Item {
        kind: b'5',
        name: b"./",
        mode: 0o711,
        ..Item::default()
    };
    fixture.accepted(Layer::default().add(root).add(tmp(0o1777)).file("link", ""));
    fixture.next_layer();
    fixture.accepted(Layer::default().file("tmp/a/f", "x").file("link/x", ""));
    let look = |name: &str| {
        let meta = fixture.path(name).metadata().unwrap();
        (
            meta.mode() & 0o7777,
            if super::privileged() { meta.uid() } else { 3 },
        )
    };
    assert_eq!(look("tmp"), (0o1777, 3));
    assert_eq!(look("tmp/a").0, 0o755);
    assert_eq!(
        look("link").0,
        0o755,
        "a file below says nothing about a directory"
    );
    assert_eq!(look(".").0, 0o711);
}

#[test]
fn a_lower_link_is_not_followed_for_attributes() {
    let mut fixture = Fixture::new();
    let out = fixture.outside();
    fixture.accepted(Layer::default().symlink("d", &out));
    fixture.next_layer();
    fixture.accepted(Layer::default().file("d/secret", "mine"));
    assert_eq!(fixture.read("d/secret"), "mine");
}
