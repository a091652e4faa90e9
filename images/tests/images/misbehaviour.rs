//! Registries that break off, lie, or answer nonsense.

use std::sync::atomic::{AtomicUsize, Ordering};

use hull_images::{Digest, PullError, PullOptions, Reference};
use serde_json::{Value, json};

use crate::message;
use crate::server::{Reply, Server};
use crate::source::{Content, OCI_MANIFEST, Place, layer, noise, range};

fn big() -> (Content, String) {
    let content = Content::simple(&[layer(&[("f", &noise(2 << 20, 3))])]);
    let digest = content.layer_digests().remove(0);
    (content, digest)
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let (content, digest) = big();
    let wanted = digest.clone();
    let server = Server::start(move |request| {
        let mut reply = content.answer(request);
        if request.path.ends_with(&wanted) {
            reply.cut = (reply.body.len() > 700_000).then_some(600_000);
        }
        reply
    });
    Place::new().pull(&server, "a/b:1").unwrap();
    let asked: Vec<usize> = server
        .requests()
        .iter()
        .filter(|r| r.path.ends_with(&digest))
        .map(|r| r.header("range").and_then(range).unwrap_or(0))
        .collect();
    assert_eq!(asked, [0, 600_000, 1_200_000, 1_800_000]);
}

#[test]
fn what_a_failed_pull_got_serves_the_next() {
    let (content, digest) = big();
    let broken = AtomicUsize::new(0);
    let wanted = digest.clone();
    let server = Server::start(move |request| {
        let mut reply = content.answer(request);
        if request.path.ends_with(&wanted) && broken.fetch_add(1, Ordering::SeqCst) < 2 {
            reply.cut = Some(100_000);
        }
        reply
    });
    let place = Place::new();
    let options = PullOptions {
        attempts: 2,
        ..PullOptions::default()
    };
    let error = place.pull_with(&server, "a/b:1", &options).unwrap_err();
    let PullError::BrokeOff { received, .. } = &error else {
        panic!("{error}")
    };
    assert_eq!(*received, 200_000);
    place.assert_empty();
    assert_eq!(place.names("ingest"), [&digest[7..]]);
    place.pull(&server, "a/b:1").unwrap();
    let last = server
        .requests()
        .into_iter()
        .rfind(|r| r.path.ends_with(&digest))
        .unwrap();
    assert_eq!(last.header("range"), Some("bytes=200000-"));
    assert_eq!(place.names("ingest"), Vec::<String>::new());
}

#[test]
fn a_registry_that_cannot_resume_begins_anew() {
    // By ignoring the range, by sending another one, and by refusing it.
    for way in 0..3 {
        let (content, digest) = big();
        let tries = AtomicUsize::new(0);
        let wanted = digest.clone();
        let server = Server::start(move |request| {
            let mut plain = request.clone();
            if !request.path.ends_with(&wanted) {
                return content.answer(request);
            }
            let first = tries.fetch_add(1, Ordering::SeqCst) == 0;
            if request.header("range").is_some() && way == 1 {
                return Reply::new(206, "nonsense").with("Content-Range", "bytes 0-7/8");
            }
            if request.header("range").is_some() && way == 2 {
                return Reply::new(416, "");
            }
            plain.headers.clear();
            let mut reply = content.answer(&plain);
            reply.cut = first.then_some(500_000);
            reply
        });
        Place::new()
            .pull(&server, "a/b:1")
            .unwrap_or_else(|e| panic!("{way}: {}", message(&e)));
    }
}

#[test]
fn a_wrong_partial_download_does_not_stop_a_pull_for_ever() {
    let (content, digest) = big();
    let server = content.serve();
    let place = Place::new();
    std::fs::write(
        place.store.root().join("ingest").join(&digest[7..]),
        "not its beginning",
    )
    .unwrap();
    let text = place.refused(&server);
    assert!(text.contains("digest mismatch"), "{text}");
    place.pull(&server, "a/b:1").unwrap();
}

#[test]
fn a_lying_blob_is_refused_with_both_digests() {
    let (mut content, digest) = big();
    let blob = content.blobs.get_mut(&digest).unwrap();
    blob[1000] ^= 1;
    let actual = Digest::of(blob).to_string();
    let place = Place::new();
    let text = place.refused(&content.serve());
    assert!(text.contains("digest mismatch"), "{text}");
    assert!(text.contains(&digest) && text.contains(&actual), "{text}");
    assert_eq!(
        place.names("ingest"),
        Vec::<String>::new(),
        "what is wrong is not kept"
    );
}

#[test]
fn a_lying_configuration_is_refused() {
    let (mut content, _) = big();
    let digest = content.manifest()["config"]["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    let blob = content.blobs.get_mut(&digest).unwrap();
    *blob = String::from_utf8(blob.clone())
        .unwrap()
        .replace("/bin/true", "/bin/evil")
        .into();
    let text = Place::new().refused(&content.serve());
    assert!(text.contains("digest mismatch"), "{text}");
}

#[test]
fn sizes_that_lie_are_refused() {
    for change in [-1_i64, 1, 1 << 40] {
        for unsized_body in [false, true] {
            let (mut content, digest) = big();
            let mut manifest = content.manifest();
            let size = manifest["layers"][0]["size"].as_i64().unwrap();
            manifest["layers"][0]["size"] = json!(size + change);
            content.document("1", OCI_MANIFEST, &manifest);
            let server = Server::start(move |request| {
                let mut reply = content.answer(request);
                reply.unsized_body = unsized_body && request.path.ends_with(&digest);
                reply
            });
            let text = Place::new().refused(&server);
            assert!(
                text.contains("size mismatch") || (change > 0 && text.contains("closed early")),
                "{change} {unsized_body}: {text}"
            );
        }
    }
}

#[test]
fn an_endless_blob_is_cut_off() {
    let (content, digest) = big();
    let server = Server::start(move |request| {
        let mut reply = content.answer(request);
        reply.endless = request.path.ends_with(&digest);
        reply
    });
    let text = Place::new().refused(&server);
    assert!(text.contains("size mismatch"), "{text}");
}

#[test]
fn manifests_are_bounded_and_verified() {
    let (content, _) = big();
    let endless = content.clone();
    let server = Server::start(move |request| {
        let mut reply = endless.answer(request);
        reply.endless = request.path.contains("/manifests/");
        reply
    });
    assert!(
        Place::new()
            .refused(&server)
            .contains("larger than 4194304 bytes")
    );

    let digest = Digest::of(&content.manifests["1"].1);
    let server = Server::start(move |request| {
        if request.path.contains("/manifests/sha256:") {
            Reply::new(200, br#"{"schemaVersion":2}"#)
        } else {
            content.answer(request)
        }
    });
    let error = Place::new()
        .pull(&server, &format!("a/b@{digest}"))
        .unwrap_err();
    let text = message(&error);
    assert!(
        text.contains("digest mismatch") && text.contains(&digest.to_string()),
        "{text}"
    );
}

fn with_manifest(change: impl Fn(&mut Value)) -> String {
    let mut content = Content::simple(&[layer(&[("f", b"x")])]);
    let mut manifest = content.manifest();
    change(&mut manifest);
    content.document("1", OCI_MANIFEST, &manifest);
    Place::new().refused(&content.serve())
}

#[test]
fn manifests_that_cannot_be_used_say_why() {
    let layer_type = |kind: &str| {
        let kind = kind.to_owned();
        with_manifest(move |m| m["layers"][0]["mediaType"] = json!(kind))
    };
    let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    assert!(layer_type(foreign).contains("foreign layer"));
    let foreign = "application/vnd.oci.image.layer.nondistributable.v1.tar";
    assert!(layer_type(foreign).contains("foreign layer"));
    assert!(layer_type("application/vnd.wasm").contains("unsupported layer type"));
    let with_urls = |m: &mut Value| m["layers"][0]["urls"] = json!(["http://127.0.0.1:1/"]);
    assert!(with_manifest(with_urls).contains("foreign layer"));
    let artifact = |m: &mut Value| m["config"]["mediaType"] = json!("application/vnd.helm+json");
    assert!(with_manifest(artifact).contains("not a container image"));
    assert!(with_manifest(|m| m["schemaVersion"] = json!(1)).contains("schema version 1"));
    assert!(with_manifest(|m| m["layers"] = json!([])).contains("lists 0 layers"));
    let many = |m: &mut Value| m["layers"] = json!(vec![m["layers"][0].clone(); 501]);
    assert!(with_manifest(many).contains("too many layers"));
    let both = |m: &mut Value| m["manifests"] = json!([]);
    assert!(with_manifest(both).contains("do not fit"));
    let bad = |m: &mut Value| m["layers"][0]["digest"] = json!("sha256:../../../etc/passwd");
    assert!(with_manifest(bad).contains("digest"));
    let large = |m: &mut Value| m["config"]["size"] = json!(1_u64 << 40);
    assert!(with_manifest(large).contains("configuration is larger"));
    let negative = |m: &mut Value| m["layers"][0]["size"] = json!(-1);
    assert!(with_manifest(negative).contains("not valid JSON"));

    let mut content = Content::default();
    let manifest = content.image("arm64", &[layer(&[("f", b"x")])]);
    content.document("1", OCI_MANIFEST, &manifest);
    let text = Place::new().refused(&content.serve());
    assert!(text.contains("linux/arm64, not for linux/amd64"), "{text}");
}

#[test]
fn transient_failures_are_tried_again() {
    for status in [500, 503, 429] {
        let (content, _) = big();
        let count = AtomicUsize::new(0);
        let server = Server::start(move |request| match count.fetch_add(1, Ordering::SeqCst) {
            1 | 4 => Reply::new(status, "busy"), // the manifest once, a blob once
            _ => content.answer(request),
        });
        Place::new()
            .pull(&server, "a/b:1")
            .unwrap_or_else(|e| panic!("{status}: {}", message(&e)));
    }
    let server = Server::start(|request| match request.path.as_str() {
        "/v2/" => Reply::new(200, ""),
        _ => Reply::new(
            429,
            br#"{"errors":[{"code":"TOOMANYREQUESTS","message":"pull rate limit"}]}"#,
        ),
    });
    let options = PullOptions {
        attempts: 2,
        ..PullOptions::default()
    };
    let text = message(
        &Place::new()
            .pull_with(&server, "a/b:1", &options)
            .unwrap_err(),
    );
    assert!(
        text.contains("too many requests: pull rate limit"),
        "{text}"
    );
    assert_eq!(server.count("/manifests/"), 2);
}

#[test]
fn unknown_images_and_registries() {
    let (content, digest) = big();
    let mut holey = content.clone();
    let server = content.serve();
    let text = message(&Place::new().pull(&server, "a/b:2").unwrap_err());
    assert!(
        text.starts_with("manifest unknown: ") && text.contains("a/b:2 not found"),
        "{text}"
    );
    assert_eq!(server.count("/manifests/"), 1, "not tried again");
    holey.blobs.remove(&digest);
    let text = Place::new().refused(&holey.serve());
    assert!(
        text.contains(&digest) && text.contains("which its manifest lists"),
        "{text}"
    );

    let port = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let pull = |name: &str| {
        let options = PullOptions {
            auth: hull_images::Auth::Anonymous,
            ..PullOptions::default()
        };
        message(
            &Place::new()
                .store
                .pull(&Reference::parse(name).unwrap(), &options)
                .unwrap_err(),
        )
    };
    let text = pull(&format!("localhost:{port}/a:1"));
    assert_eq!(
        text,
        format!("cannot reach registry localhost:{port}: connection refused")
    );
    let text = pull("no-such-host.invalid/a:1");
    assert!(
        text.contains("registry no-such-host.invalid: no such host"),
        "{text}"
    );
}

#[test]
fn answers_that_are_no_registry() {
    for body in [
        "<html>hello</html>",
        "",
        "[]",
        "null",
        "{\"schemaVersion\":2}",
    ] {
        let server = Server::start(move |_| Reply::new(200, body));
        let text = Place::new().refused(&server);
        assert!(text.contains("cannot use "), "{body}: {text}");
    }
    let server = Server::start(|_| Reply::new(301, "").with("Location", "/v2/loop"));
    let options = PullOptions {
        attempts: 1,
        ..PullOptions::default()
    };
    assert!(Place::new().pull_with(&server, "a/b:1", &options).is_err());
}
