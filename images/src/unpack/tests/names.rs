//! Names that aim outside the layer.

use super::{Fixture, Item, Layer};

#[test]
fn dot_dot_is_refused_wherever_it_stands() {
    for name in [
        "../outside/pwned",
        "a/../../outside/pwned",
        "..",
        "a/..",
        "./../x",
        "/../x",
    ] {
        let fixture = Fixture::new();
        assert!(
            fixture
                .refused(Layer::default().file(name, "x"))
                .contains("\"..\""),
            "{name}"
        );
        assert!(
            fixture
                .refused(Layer::default().directory(name))
                .contains("\"..\""),
            "{name}"
        );
        assert!(
            fixture
                .refused(Layer::default().symlink(name, "x"))
                .contains("\"..\""),
            "{name}"
        );
    }
}

#[test]
fn dot_dot_in_extended_names_is_refused() {
    let fixture = Fixture::new();
    let by_pax = Layer::default()
        .pax(&[("path", b"../outside/pwned")])
        .file("innocent", "x");
    assert!(fixture.refused(by_pax).contains("\"..\""));
    let long = format!("{}/../../outside/pwned", "a".repeat(120));
    assert!(
        fixture
            .refused(Layer::default().file(&long, "x"))
            .contains("\"..\"")
    );
    let sparse = Layer::default()
        .pax(&[
            ("GNU.sparse.realsize", b"0"),
            ("GNU.sparse.name", b"../outside/pwned"),
        ])
        .file("innocent", "");
    assert!(fixture.refused(sparse).contains("\"..\""));
}

#[test]
fn absolute_names_are_relative_to_the_layer() {
    let fixture = Fixture::new();
    let name = format!("{}/secret", fixture.outside());
    fixture.accepted(
        Layer::default()
            .file(&name, "mine")
            .file("/etc/passwd", "root"),
    );
    assert_eq!(fixture.read(&name[1..]), "mine");
    assert_eq!(fixture.read("etc/passwd"), "root");
}

#[test]
fn names_of_the_root_are_directories_only() {
    let fixture = Fixture::new();
    for name in ["/", ".", "./", "//"] {
        assert!(
            fixture
                .refused(Layer::default().symlink(name, "/"))
                .contains("root"),
            "{name}"
        );
        assert!(
            fixture
                .refused(Layer::default().hard_link(name, "a"))
                .contains("refused"),
            "{name}"
        );
    }
    fixture.accepted(Layer::default().add(Item {
        kind: b'5',
        name: b"./",
        mode: 0o711,
        ..Item::default()
    }));
    let mode = std::os::unix::fs::MetadataExt::mode(&fixture.root().metadata().unwrap());
    assert_eq!(mode & 0o7777, 0o711);
}

#[test]
fn empty_and_binary_names() {
    let fixture = Fixture::new();
    assert!(
        fixture
            .refused(Layer::default().file("", "x"))
            .contains("empty")
    );
    let nul = Layer::default().pax(&[("path", b"a\0b")]).file("x", "");
    assert!(fixture.refused(nul).contains("NUL"));
    fixture.accepted(Layer::default().add(Item {
        name: b"\xff\xfe\n",
        ..Item::default()
    }));
}

#[test]
fn too_long_and_too_deep() {
    let mut fixture = Fixture::new();
    assert!(
        fixture
            .refused(Layer::default().file(&"a".repeat(256), ""))
            .contains("255")
    );
    assert!(
        fixture
            .refused(Layer::default().file(&"a/".repeat(256), ""))
            .contains("deep")
    );
    let long = format!("{}x", "abcdefghijklmno/".repeat(256));
    assert!(
        fixture
            .refused(Layer::default().file(&long, ""))
            .contains("at most 4096")
    );
    fixture.limits.depth = 10;
    // Each link makes the next nine components deeper than they look.
    let mut layer = Layer::default().directory("a/b/c/d/e/f/g");
    layer = layer
        .symlink("s", "a/b/c/d/e/f/g")
        .directory("s/h/i/j/k/l/m");
    assert!(
        fixture
            .refused(layer.symlink("t", "s/h/i/j"))
            .contains("deep")
    );
}
