//! Images that can't be had, and registries that lie.

use hull_tests::hull::Hull;

use super::archive::Tar;
use super::registry::{Answer, Content, Registry};
use super::{refused, still_usable};

fn content() -> Content {
    Content::new(&Tar::default().file("f", "content").finish())
}

#[test]
fn images_that_cannot_be_had() {
    let Some(hull) = Hull::new() else { return };
    hull.image();
    let content = content();
    let registry = Registry::serve(move |path| content.honest(path));
    let unknown_tag = registry.name("a/b:2");
    let unknown_digest = registry.name(&format!("a/b@sha256:{}", "0".repeat(64)));
    let cases: [(&[&str], &[&str]); 8] = [
        (
            &["--pull", "never", "nosuch:1"],
            &["No such image: nosuch:1"],
        ),
        (&["-q", &unknown_tag], &["not found", "a/b:2"]),
        (&["-q", &unknown_digest], &["not found", "sha256:0000"]),
        (
            &["-q", "127.0.0.1:1/nosuch"],
            &["cannot reach registry 127.0.0.1:1"],
        ),
        (&["UPPER/Case"], &["invalid reference format"]),
        (&["white space"], &["invalid reference format"]),
        (&["name@sha256:12"], &["invalid reference format"]),
        (&["oci:/no/such/layout"], &["/no/such/layout"]),
    ];
    for (words, expected) in cases {
        let ran = hull.cmd([&["run", "--rm"], words].concat()).output();
        refused(&ran, 125, expected);
        assert_eq!(ran.text(), "");
    }
    let pulled = hull.cmd(["pull", "-q", &unknown_tag]).output();
    refused(&pulled, 1, &["not found"]);
    still_usable(&hull);
}

#[test]
fn registries_that_lie() {
    let Some(hull) = Hull::new() else { return };
    let content = content();
    let honest = content.clone();
    let tampered = Registry::serve(move |path| match content.honest(path) {
        Answer::Whole(mut bytes) if path.ends_with(&content.layer) => {
            bytes[600] ^= 1;
            Answer::Whole(bytes)
        }
        answer => answer,
    });
    let name = tampered.name("a/b:1");
    let pulled = hull.cmd(["pull", "-q", &name]).output();
    refused(&pulled, 1, &["digest mismatch", &honest.layer]);
    let ran = hull.cmd(["run", "--rm", "-q", &name]).output();
    refused(&ran, 125, &["digest mismatch"]);
    assert_eq!(hull.cmd(["images", "-aq"]).output().ok(), "");
    // A manifest that isn't the one that was asked for by digest.
    let digest = honest.layer.clone();
    let other = Registry::serve(move |path| match path.contains("/manifests/") {
        true => honest.honest("/v2/a/b/manifests/1"),
        false => honest.honest(path),
    });
    let pulled = hull.cmd(["pull", "-q", &other.name(&format!("a/b@{digest}"))]);
    refused(&pulled.output(), 1, &["digest mismatch", &digest]);
    assert_eq!(hull.cmd(["images", "-aq"]).output().ok(), "");
    still_usable(&hull);
}
