//! Layers that no one thought of.

use proptest::prelude::*;

use super::{Fixture, Item, Layer};
use crate::unpack::Limits;

fn small() -> Limits {
    Limits {
        layer_bytes: 1 << 20,
        entries: 100,
        ratio_free_bytes: 1 << 20,
        ..Limits::default()
    }
}

/// Names that meet each other: few components, links' targets among them.
fn name() -> impl Strategy<Value = Vec<u8>> {
    let component = proptest::sample::select(vec![
        "a",
        "a",
        "a",
        "b",
        "b",
        "b",
        "c",
        "..",
        ".",
        "",
        ".wh.a",
        ".wh.b",
        ".wh..wh..opq",
        ".wh...",
        "outside",
        "secret",
    ]);
    proptest::collection::vec(component, 1..5).prop_map(|parts| parts.join("/").into_bytes())
}

fn entry() -> impl Strategy<Value = (u8, Vec<u8>, Vec<u8>, u32)> {
    let kind = prop_oneof![
        3 => Just(b'0'), 3 => Just(b'5'), 4 => Just(b'2'), 2 => Just(b'1'), 1 => Just(b'6'),
        1 => Just(b'3'),
    ];
    let target = prop_oneof![
        3 => name(),
        1 => Just(b"/".to_vec()),
        1 => Just(b"..".to_vec()),
        1 => Just(b"../../outside".to_vec()),
        1 => Just(b"OUTSIDE".to_vec()),
    ];
    (kind, name(), target, 0..0o10000_u32)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    /// Any sequence of entries leaves the tree beside the layer alone (`unpack` checks that).
    #[test]
    fn entries_stay_inside(entries in proptest::collection::vec(entry(), 1..25)) {
        let mut fixture = Fixture::new();
        fixture.limits = small();
        let outside = fixture.outside();
        let mut layer = Layer::default();
        for (kind, name, target, mode) in &entries {
            let link: &[u8] = if target == b"OUTSIDE" { outside.as_bytes() } else { target };
            let link = if matches!(kind, b'1' | b'2') { link } else { b"" };
            layer = layer.add(Item { kind: *kind, name, link, mode: *mode, ..Item::default() });
        }
        let _ = fixture.unpack(&layer.clone().finish());
        // One bad entry ends a layer: try them one layer at a time as well, over each other.
        for (kind, name, target, mode) in &entries {
            let link: &[u8] = if target == b"OUTSIDE" { outside.as_bytes() } else { target };
            let item = Item { kind: *kind, name, link, mode: *mode, ..Item::default() };
            let _ = fixture.unpack(&Layer::default().add(item).finish());
        }
    }

    #[test]
    fn bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..3000)) {
        let mut fixture = Fixture::new();
        fixture.limits = small();
        let _ = fixture.unpack(&bytes);
    }

    /// Headers whose fields are noise but whose checksum is right.
    #[test]
    fn fields_never_panic(
        changes in proptest::collection::vec((0..512_usize, any::<u8>()), 1..12),
        kind in prop_oneof![
            Just(b'0'), Just(b'x'), Just(b'L'), Just(b'S'), Just(b'1'), Just(b'5'), any::<u8>()
        ],
        data in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        let mut fixture = Fixture::new();
        fixture.limits = small();
        let layer = Layer::default().add(Item { kind, data: &data, ..Item::default() });
        let mut bytes = layer.file("next", "x").finish();
        for (at, value) in changes {
            bytes[at] = value;
        }
        let mut header = tar::Header::from_byte_slice(&bytes[..512]).clone();
        header.set_cksum();
        bytes[..512].copy_from_slice(header.as_bytes());
        let _ = fixture.unpack(&bytes);
    }
}
