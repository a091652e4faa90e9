//! What hostile guests do.

use super::*;

#[test]
fn unknown_ports_and_strangers_are_refused() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    guest.put(
        Header {
            dst_port: 9,
            ..packet(Op::Request, 0)
        },
        &[],
    );
    let (reset, _) = guest.expect(Op::Reset);
    assert_eq!((reset.src_port, reset.dst_port), (9, GUEST_PORT));
    guest.put(
        Header {
            socket_type: 2,
            ..packet(Op::Request, 0)
        },
        &[],
    );
    assert_eq!(guest.expect(Op::Reset).0.socket_type, 2);
    guest.send(Op::Data, b"to nobody");
    guest.expect(Op::Reset);
    guest.send(Op::Reset, &[]);
    guest.put(
        Header {
            src_cid: 4,
            ..packet(Op::Request, 0)
        },
        &[],
    );
    guest.put(
        Header {
            dst_cid: 7,
            ..packet(Op::Request, 0)
        },
        &[],
    );
    assert!(guest.take().is_none());
    assert!(guest.accepted.try_recv().is_err());
}

#[test]
fn a_guest_beyond_its_credit_is_cut_off() {
    let mut guest = Guest::new();
    guest.give(64, 4096);
    let mut host = guest.connected();
    let chunk = vec![1u8; 32 * 1024];
    let mut sent = 0u32;
    // The host reads nothing: its socket fills, then the device's buffer.
    let reset = loop {
        guest.send(Op::Data, &chunk);
        match guest.take() {
            Some((header, _)) if header.op == Op::Reset as u16 => break true,
            Some((header, _)) => assert_eq!(header.op, Op::CreditUpdate as u16),
            None => {}
        }
        sent += 32 * 1024;
        if sent > 16 << 20 {
            break false;
        }
    };
    assert!(reset, "16 MiB without a reader");
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert!(all.len() <= sent as usize);
}

#[test]
fn acknowledging_what_was_never_sent_is_cut_off() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.connected();
    guest.put(
        Header {
            fwd_cnt: 1,
            ..packet(Op::CreditUpdate, 0)
        },
        &[],
    );
    guest.expect(Op::Reset);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_flood_of_connections_ends_at_the_cap() {
    let mut guest = Guest::new();
    let mut streams = Vec::new();
    for i in 0..MAX_CONNECTIONS as u32 + 100 {
        guest.put(
            Header {
                src_port: 50_000 + i,
                ..packet(Op::Request, 0)
            },
            &[],
        );
        streams.extend(guest.accepted.try_recv());
    }
    assert_eq!(
        (streams.len(), guest.device.mux.len()),
        (MAX_CONNECTIONS, MAX_CONNECTIONS)
    );
    // All refusals first, then all answers, as buffers come.
    let mut counts = BTreeMap::new();
    for _ in 0..12 {
        guest.give(100, 64);
        while let Some((header, _)) = guest.take() {
            *counts.entry(header.op).or_insert(0) += 1;
        }
    }
    assert_eq!(
        counts,
        BTreeMap::from([
            (Op::Response as u16, MAX_CONNECTIONS),
            (Op::Reset as u16, 100)
        ])
    );
}

#[test]
fn a_guest_that_takes_no_refusals_has_to_wait() {
    let mut guest = Guest::new();
    for i in 0..1000u32 {
        let header = Header {
            src_port: i,
            dst_port: 9,
            ..packet(Op::Request, 0)
        };
        guest.guest[TX].add(&[Part::Read(header.encode().to_vec())]);
        guest.kick(TX);
        if guest.guest[TX].pop_used().is_none() {
            break;
        }
        assert!(i < 300, "the device queued {i} refusals");
    }
    guest.give(128, 64);
    guest.give(128, 64);
    assert!(
        guest.guest[TX].pop_used().is_some(),
        "the waiting packet was taken"
    );
}

fn any_header() -> impl Strategy<Value = Header> {
    let cid = || prop_oneof![4 => Just(CID), 1 => Just(HOST_CID), 1 => any::<u64>()];
    let port = || prop_oneof![3 => Just(PORT), 3 => Just(GUEST_PORT), 1 => any::<u32>()];
    let len = prop_oneof![4 => Just(0u32), 4 => 0..512u32, 1 => any::<u32>()];
    let counts = (
        prop_oneof![Just(0u32), Just(65_536), any::<u32>()],
        prop_oneof![4 => Just(0u32), 1 => any::<u32>()],
    );
    (
        cid(),
        prop_oneof![8 => Just(HOST_CID), 1 => any::<u64>()],
        port(),
        port(),
        len,
        prop_oneof![8 => Just(1u16), 1 => any::<u16>()],
        0..10u16,
        0..5u32,
        counts,
    )
        .prop_map(
            |(
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                socket_type,
                op,
                flags,
                (buf_alloc, fwd_cnt),
            )| Header {
                src_cid,
                dst_cid,
                src_port,
                dst_port,
                len,
                socket_type,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_sequence_of_packets_breaks_the_device(packets in prop::collection::vec((any_header(), 0..600usize), 1..80)) {
        let mut guest = Guest::new();
        guest.give(100, 128);
        for (header, bytes) in packets {
            let mut wire = header.encode().to_vec();
            wire.resize(bytes.max(1), 0x55);
            guest.guest[TX].add(&[Part::Read(wire)]);
            guest.kick(TX);
            if let Ok(mut host) = guest.accepted.try_recv() {
                host.write_all(b"hello").unwrap();
            }
            if fd_has_event(&guest) {
                guest.event();
            }
            while guest.take().is_some() {}
            prop_assert!(guest.device.mux.len() <= MAX_CONNECTIONS);
        }
    }
}
