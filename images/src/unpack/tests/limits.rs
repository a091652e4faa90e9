//! Layers that would cost more than they may.

use std::os::unix::fs::MetadataExt as _;

use super::{Fixture, Item, Layer, gzip};

#[test]
fn huge_sparse_files_are_refused_and_modest_ones_are_holes() {
    let fixture = Fixture::new();
    let sparse = |size: &str| {
        let records: [(&str, &[u8]); 4] = [
            ("GNU.sparse.major", b"1"),
            ("GNU.sparse.minor", b"0"),
            ("GNU.sparse.name", b"hole"),
            ("GNU.sparse.realsize", size.as_bytes()),
        ];
        let mut data = b"1\n4096\n3\n".to_vec();
        data.resize(512, 0);
        data.extend_from_slice(b"abc");
        Layer::default().pax(&records).add(Item {
            data: &data,
            ..Item::default()
        })
    };
    for size in [
        "1099511627776",
        "9223372036854775807",
        "18446744073709551615",
    ] {
        let text = fixture.refused(sparse(size));
        assert!(text.contains("holes included"), "{text}");
    }
    fixture.accepted(sparse("1073741824"));
    let meta = fixture.path("hole").metadata().unwrap();
    assert_eq!(meta.len(), 1 << 30);
    assert!(meta.blocks() * 512 < 1 << 20, "{} blocks", meta.blocks());
    let text = fixture.refused(sparse("4098"));
    assert!(text.contains("leaves the file"), "{text}");
}

#[test]
fn many_sparse_files_count_together() {
    let mut fixture = Fixture::new();
    fixture.limits.layer_bytes = 1 << 20;
    let mut layer = Layer::default();
    for name in ["a", "b", "c"] {
        layer = layer
            .pax(&[("GNU.sparse.size", b"500000"), ("GNU.sparse.map", b"0,0")])
            .file(name, "");
    }
    assert!(fixture.refused(layer).contains("together"));
}

#[test]
fn sizes_that_lie() {
    let fixture = Fixture::new();
    let claims = |size| {
        Layer::default().add(Item {
            size: Some(size),
            data: b"x",
            ..Item::default()
        })
    };
    assert!(fixture.refused(claims(1 << 62)).contains("limit"));
    assert!(fixture.refused(claims(1 << 20)).contains("truncated"));
    let by_pax = Layer::default()
        .pax(&[("size", b"99999999999999999999")])
        .file("f", "");
    assert!(fixture.refused(by_pax).contains("malformed"));
    let by_pax = Layer::default()
        .pax(&[("size", b"18446744073709551615")])
        .file("f", "");
    assert!(fixture.refused(by_pax).contains("limit"));
}

#[test]
fn a_decompression_bomb_is_refused() {
    let mut fixture = Fixture::new();
    fixture.limits.ratio_free_bytes = 1 << 20;
    fixture.limits.ratio = 100;
    let zeroes = vec![0; 16 << 20];
    let tar = Layer::default()
        .add(Item {
            data: &zeroes,
            ..Item::default()
        })
        .finish();
    for blob in [gzip(&tar), zstd::encode_all(&tar[..], 1).unwrap()] {
        let error = fixture.unpack(&blob).unwrap_err().to_string();
        assert!(error.contains("decompression bomb"), "{error}");
        let made = std::fs::metadata(fixture.path("f")).map_or(0, |m| m.len());
        assert!(made <= 8 << 20, "{made} bytes were written first");
        std::fs::remove_file(fixture.path("f")).unwrap();
    }
    fixture.limits.ratio_free_bytes = 64 << 20;
    fixture.unpack(&gzip(&tar)).unwrap();
}

#[test]
fn a_bomb_behind_the_end_marker_is_refused_too() {
    let mut fixture = Fixture::new();
    fixture.limits.ratio_free_bytes = 1 << 20;
    fixture.limits.ratio = 100;
    let tar = Layer::default().file("f", "x").finish();
    let mut padded = tar;
    padded.resize(16 << 20, 0);
    assert!(
        fixture
            .unpack(&gzip(&padded))
            .unwrap_err()
            .to_string()
            .contains("bomb")
    );
    fixture.limits.layer_bytes = 2 << 20;
    fixture.limits.ratio_free_bytes = 1 << 40;
    let error = fixture.unpack(&gzip(&padded)).unwrap_err().to_string();
    assert!(
        error.contains("more than 2097152 bytes uncompressed"),
        "{error}"
    );
}

#[test]
fn entries_are_counted() {
    let mut fixture = Fixture::new();
    fixture.limits.entries = 1000;
    let layer = |count: usize| {
        (0..count).fold(Layer::default(), |layer, n| {
            layer.file(&format!("d{}/f{n}", n % 7), "")
        })
    };
    assert!(
        fixture
            .refused(layer(1001))
            .contains("more than 1000 entries")
    );
    fixture.accepted(layer(1000));
    // Ignored entries and duplicates cost time too.
    let same = (0..1001).fold(Layer::default(), |layer, _| layer.file(".wh..wh.aufs", ""));
    assert!(fixture.refused(same).contains("more than 1000 entries"));
}

#[test]
fn headers_before_headers_are_bounded() {
    let fixture = Fixture::new();
    for kind in [b'L', b'K', b'x'] {
        let item = Item {
            kind,
            size: Some(1 << 30),
            ..Item::default()
        };
        assert!(
            fixture
                .refused(Layer::default().add(item))
                .contains("extended header")
        );
    }
    let many: Vec<(String, Vec<u8>)> = (0..100)
        .map(|n| (format!("SCHILY.xattr.user.n{n}"), vec![b'x'; 1000]))
        .collect();
    let records: Vec<(&str, &[u8])> = many.iter().map(|(k, v)| (&k[..], &v[..])).collect();
    let text = fixture.refused(Layer::default().pax(&records).file("f", ""));
    assert!(text.contains("extended attributes"), "{text}");
}

#[test]
fn sparse_maps_are_bounded() {
    let fixture = Fixture::new();
    let records: [(&str, &[u8]); 2] = [("GNU.sparse.major", b"1"), ("GNU.sparse.realsize", b"9")];
    for (map, word) in [
        (&b"99999999999\n"[..], "segments"),
        (b"1\n123456789012345678901234567890\n", "malformed"),
        (b"1\n0\n", "truncated"),
        (b"x\n", "malformed"),
        (b"2\n0\n5\n3\n5\n", "overlaps"),
        (b"1\n0\n5\n", "does not fit its data"),
        (b"1\n18446744073709551615\n5\n", "overflows"),
    ] {
        let mut data = map.to_vec();
        data.resize(512, if word == "truncated" { b'0' } else { 0 });
        let layer = Layer::default().pax(&records).add(Item {
            data: &data,
            ..Item::default()
        });
        let text = fixture.refused(layer);
        assert!(
            text.contains(word) || text.contains("malformed"),
            "{word}: {text}"
        );
    }
}
