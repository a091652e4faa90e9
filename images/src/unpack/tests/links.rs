//! Links that aim outside the layer, and entries that go through them.

use std::os::unix::fs::MetadataExt as _;

use super::{Fixture, Item, Layer};

/// Link targets that lead to the tree beside the layer, by different ways.
fn ways_out(fixture: &Fixture) -> Vec<String> {
    let outside = fixture.outside();
    vec![
        outside.clone(),
        format!("{outside}/"),
        "../outside".to_owned(),
        "../../../../../../../../..".to_owned() + &outside,
        format!("/proc/self/root{outside}"),
        format!("/proc/self/cwd/../../../../../../..{outside}"),
        "./x/../../outside".to_owned(),
    ]
}

#[test]
fn nothing_goes_out_through_a_link() {
    for index in 0..ways_out(&Fixture::new()).len() {
        for entry in 0..6 {
            let fixture = Fixture::new();
            let way = ways_out(&fixture).swap_remove(index);
            let link = Layer::default().directory("x").symlink("evil", &way);
            let layer = match entry {
                0 => link.file("evil/secret", "pwned"),
                1 => link.add(Item {
                    kind: b'5',
                    name: b"evil/directory",
                    mode: 0o777,
                    ..Item::default()
                }),
                2 => link.symlink("evil/link", "pwned"),
                3 => link.file("evil/.wh.secret", ""),
                4 => link.file("evil/directory/.wh..wh..opq", ""),
                _ => link.hard_link("mine", "evil/secret"),
            };
            let _ = fixture.unpack(&layer.finish()); // checks the tree, whatever it returns
            assert_eq!(fixture.kind("mine"), "nothing", "{way}");
        }
    }
}

#[test]
fn links_are_kept_as_they_are() {
    let fixture = Fixture::new();
    let target = fixture.outside();
    fixture.accepted(
        Layer::default()
            .symlink("a", &target)
            .symlink("b/c", "../../../etc"),
    );
    assert_eq!(
        std::fs::read_link(fixture.path("a")).unwrap().to_str(),
        Some(&target[..])
    );
    assert_eq!(
        std::fs::read_link(fixture.path("b/c")).unwrap().to_str(),
        Some("../../../etc")
    );
}

#[test]
fn entries_below_a_link_of_the_same_layer_go_where_it_leads() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .directory("usr/bin")
            .symlink("bin", "usr/bin")
            .file("bin/tool", "relative")
            .symlink("sbin", "/usr/bin")
            .file("sbin/other", "absolute")
            .symlink("up", "../../usr")
            .file("up/third", "above the root is the root"),
    );
    assert_eq!(fixture.read("usr/bin/tool"), "relative");
    assert_eq!(fixture.read("usr/bin/other"), "absolute");
    assert_eq!(fixture.read("usr/third"), "above the root is the root");
    assert_eq!(fixture.kind("bin"), "link");
}

#[test]
fn a_name_that_is_a_link_is_replaced_not_followed() {
    let fixture = Fixture::new();
    let secret = format!("{}/secret", fixture.outside());
    let out = fixture.outside();
    fixture.accepted(
        Layer::default()
            .symlink("f", &secret)
            .file("f", "mine")
            .symlink("d", &out)
            .add(Item {
                kind: b'5',
                name: b"d",
                mode: 0o777,
                uid: 7,
                ..Item::default()
            })
            .symlink("l", &out)
            .symlink("l", "elsewhere"),
    );
    assert_eq!(fixture.read("f"), "mine");
    assert_eq!(fixture.kind("d"), "directory");
    assert_eq!(
        std::fs::read_link(fixture.path("l")).unwrap().to_str(),
        Some("elsewhere")
    );
}

#[test]
fn hard_links_stay_inside() {
    let fixture = Fixture::new();
    let secret = format!("{}/secret", fixture.outside());
    for target in ["../outside/secret", "a/../../outside/secret", ".."] {
        let text = fixture.refused(Layer::default().hard_link("mine", target));
        assert!(
            text.contains("not a name within the layer"),
            "{target}: {text}"
        );
    }
    for target in [&secret[..], "nothing", "a/b/c"] {
        let text = fixture.refused(Layer::default().hard_link("mine", target));
        assert!(text.contains("not in this layer"), "{target}: {text}");
    }
    for target in ["/", ".", "mine"] {
        assert!(
            fixture
                .refused(Layer::default().hard_link("mine", target))
                .contains("refused")
        );
    }
    let text = fixture.refused(Layer::default().directory("d").hard_link("mine", "d"));
    assert!(text.contains("directory"), "{text}");
}

#[test]
fn hard_links_work() {
    let fixture = Fixture::new();
    let secret = format!("{}/secret", fixture.outside());
    fixture.accepted(
        Layer::default()
            .file("a", "shared")
            .hard_link("b", "a")
            .hard_link("c/d", "./b")
            .hard_link("e", "/a")
            .hard_link("e", "a")
            .symlink("s", &secret)
            .hard_link("t", "s"),
    );
    let inode = |name: &str| std::fs::symlink_metadata(fixture.path(name)).unwrap().ino();
    assert!(
        [inode("b"), inode("c/d"), inode("e")]
            .iter()
            .all(|i| *i == inode("a"))
    );
    assert_eq!(
        (fixture.kind("t"), inode("t")),
        ("link", inode("s")),
        "not followed"
    );
}

#[test]
fn overwriting_one_of_two_hard_links_leaves_the_other() {
    let fixture = Fixture::new();
    fixture.accepted(
        Layer::default()
            .file("a", "old")
            .hard_link("b", "a")
            .file("a", "new"),
    );
    assert_eq!(
        (fixture.read("a"), fixture.read("b")),
        ("new".to_owned(), "old".to_owned())
    );
}

#[test]
fn a_link_loop_is_an_error() {
    let fixture = Fixture::new();
    let text = fixture.refused(
        Layer::default()
            .symlink("a", "b")
            .symlink("b", "a")
            .file("a/f", "x"),
    );
    assert!(text.contains("\"a/f\""), "{text}");
}

#[test]
fn link_targets_are_bounded() {
    let fixture = Fixture::new();
    for target in ["", &"x".repeat(4096)] {
        assert!(
            fixture
                .refused(Layer::default().symlink("a", target))
                .contains("target")
        );
    }
    fixture.accepted(Layer::default().symlink("a", &"x".repeat(4095)));
}
