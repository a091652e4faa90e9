//! A card whose tap is one end of a socket pair that keeps frames apart.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::*;
use crate::testing::{Bench, Part, RawDescriptor, persist_roundtrip};
use crate::virtio::queue::QueueError;

const READY: Readiness = Readiness {
    readable: true,
    writable: false,
    hangup: false,
};
const SPEC: NetSpec = NetSpec {
    mac: [2, 0, 0, 0, 0, 7],
    mtu: 1400,
};

fn wire() -> (OwnedFd, OwnedFd) {
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (ours, theirs) = socketpair(kind.0, kind.1, SocketFlags::NONBLOCK, None).unwrap();
    for end in [&ours, &theirs] {
        rustix::net::sockopt::set_socket_send_buffer_size(end, 1 << 20).unwrap();
    }
    (ours, theirs)
}

fn card(tap: OwnedFd) -> Net {
    let set_offloads: SetOffloads = Box::new(|_, _| Ok(()));
    let tap = Tap {
        device: tap,
        set_offloads,
        traffic: Arc::default(),
        muted: false,
    };
    Net::new(SPEC, tap).unwrap()
}

fn bench() -> (Bench<Net>, OwnedFd) {
    let (tap, host) = wire();
    (Bench::new(card(tap)), host)
}

/// Bytes, frames and losses by now, to the guest and from it.
fn counts(bench: &Bench<Net>) -> ([u64; 3], [u64; 3]) {
    let Traffic { received, sent } = &*bench.device.tap.traffic;
    let of = |flow: &Flow| {
        let Count {
            bytes,
            frames,
            lost,
        } = flow.count();
        [bytes, frames, lost]
    };
    (of(received), of(sent))
}

fn frame(length: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..length).map(|at| (at * 7) as u8).collect();
    frame[..HEADER_BYTES].fill(0);
    frame
}

fn send(host: &OwnedFd, frame: &[u8]) {
    assert_eq!(rustix::io::write(host, frame).unwrap(), frame.len());
}

fn event(bench: &mut Bench<Net>) {
    let Bench { device, queues, .. } = bench;
    device.on_event(TAP, READY, queues).unwrap();
}

/// Takes `buffers` used buffers, in which one frame is.
fn received(bench: &mut Bench<Net>, buffers: u16) -> Vec<u8> {
    let mut frame = Vec::new();
    for _ in 0..buffers {
        let used = bench.guest[RECEIVE].pop_used().unwrap();
        frame.extend_from_slice(&used.written[..used.length as usize]);
    }
    assert_eq!(frame[NUM_BUFFERS], buffers.to_le_bytes());
    frame[NUM_BUFFERS].fill(0);
    frame
}

#[test]
fn a_frame_of_the_guest_reaches_the_tap_in_one_piece() {
    let (mut bench, host) = bench();
    for length in [HEADER_BYTES, 60, 1412, MAX_FRAME_BYTES] {
        let whole = frame(length);
        let (head, tail) = whole.split_at(length / 2);
        bench.guest[TRANSMIT].add_indirect(&[Part::Read(head.to_vec()), Part::Read(tail.to_vec())]);
        bench.kick(TRANSMIT).unwrap();
        let mut bytes = vec![0; 1 << 17];
        let count = rustix::io::read(&host, &mut bytes[..]).unwrap();
        assert!(bytes[..count] == whole, "{length}");
        assert_eq!(bench.guest[TRANSMIT].pop_used().unwrap().length, 0);
        assert_eq!(bench.irq.take(TRANSMIT), 1);
    }
    let bytes = [0, 48, 1400, MAX_FRAME_BYTES as u64 - 12];
    assert_eq!(counts(&bench), ([0; 3], [bytes.iter().sum(), 4, 0]));
}

#[test]
fn a_frame_for_the_guest_waits_for_buffers_and_stops_the_tap() {
    let (mut bench, host) = bench();
    assert!(bench.wakers.watched().is_empty());
    bench.guest[RECEIVE].add(&[Part::Write(200)]);
    bench.kick(RECEIVE).unwrap();
    assert_eq!(bench.wakers.tokens(), [TAP]);
    let (small, large) = (frame(100), frame(1000));
    send(&host, &small);
    send(&host, &large);
    event(&mut bench);
    assert_eq!(received(&mut bench, 1), small);
    // The large one is in the device, and the tap is left alone, however often it is ready.
    assert!(bench.wakers.watched().is_empty());
    for _ in 0..2 {
        bench.guest[RECEIVE].add(&[Part::Write(400)]);
        bench.kick(RECEIVE).unwrap();
        assert_eq!(bench.guest[RECEIVE].pop_used(), None);
        assert!(bench.wakers.watched().is_empty());
    }
    bench.irq.take(RECEIVE);
    bench.guest[RECEIVE].add(&[Part::Write(100), Part::Write(300)]);
    bench.kick(RECEIVE).unwrap();
    assert_eq!(received(&mut bench, 3), large);
    assert_eq!(bench.irq.take(RECEIVE), 1);
    assert_eq!(bench.wakers.tokens(), [TAP]);
}

#[test]
fn a_frame_that_never_fits_is_lost_and_the_next_one_comes_through() {
    let (tap, host) = wire();
    let mut bench = Bench::new(card(tap));
    for _ in 0..QUEUE_SIZE {
        bench.guest[RECEIVE].add(&[Part::Write(16)]);
    }
    bench.kick(RECEIVE).unwrap();
    send(&host, &frame(60_000));
    send(&host, &frame(32));
    event(&mut bench);
    assert_eq!(received(&mut bench, 2), frame(32));
    assert_eq!(bench.guest[RECEIVE].pop_used(), None);
    assert_eq!(counts(&bench), ([20, 1, 1], [0; 3]));
}

#[test]
fn without_mergeable_buffers_a_frame_is_in_one() {
    let (tap, host) = wire();
    let mut bench = Bench::new(card(tap));
    let activation = Activation {
        features: bench.device.features() & !MRG_RXBUF,
        ..bench.device.activation.clone().unwrap()
    };
    bench.device.reset();
    bench.device.activate(activation).unwrap();
    bench.guest[RECEIVE].add(&[Part::Write(64)]);
    bench.guest[RECEIVE].add(&[Part::Write(64)]);
    bench.kick(RECEIVE).unwrap();
    for length in [65, 64] {
        send(&host, &frame(length));
    }
    event(&mut bench);
    assert_eq!(received(&mut bench, 1), frame(64));
    assert_eq!(bench.guest[RECEIVE].pop_used(), None);
}

#[test]
fn a_tap_that_goes_away_leaves_a_card_that_is_quiet() {
    let (mut bench, host) = bench();
    bench.guest[RECEIVE].add(&[Part::Write(2000)]);
    bench.kick(RECEIVE).unwrap();
    // Ready, but empty: as after a late report.
    event(&mut bench);
    assert_eq!(bench.wakers.tokens(), [TAP]);
    drop(host);
    event(&mut bench);
    assert!(bench.wakers.watched().is_empty());
    bench.guest[RECEIVE].add(&[Part::Write(2000)]);
    bench.kick(RECEIVE).unwrap();
    assert!(bench.wakers.watched().is_empty());
    let used = bench.round_trip(TRANSMIT, &[Part::Read(frame(100))]);
    assert_eq!(used.length, 0);
    assert_eq!(counts(&bench), ([0; 3], [0, 0, 1]));
}

#[test]
fn a_hangup_without_an_error_to_read_ends_the_watch() {
    let (mut bench, _host) = bench();
    bench.guest[RECEIVE].add(&[Part::Write(2000)]);
    bench.kick(RECEIVE).unwrap();
    let hangup = Readiness {
        hangup: true,
        ..READY
    };
    let Bench { device, queues, .. } = &mut bench;
    device.on_event(TAP, hangup, queues).unwrap();
    assert!(bench.wakers.watched().is_empty());
}

#[test]
fn a_muted_card_is_heard_and_hears_when_it_is_taken_anew() {
    let (mut bench, host) = bench();
    bench.device.tap.muted = true;
    let sends = |bench: &mut Bench<Net>| {
        bench.guest[TRANSMIT].add(&[Part::Read(frame(60))]);
        bench.kick(TRANSMIT).unwrap();
        assert!(bench.guest[TRANSMIT].pop_used().is_some());
    };
    sends(&mut bench);
    bench.guest[RECEIVE].add(&[Part::Write(200)]);
    bench.kick(RECEIVE).unwrap();
    assert!(bench.wakers.watched().is_empty());
    assert_eq!(counts(&bench), ([0; 3], [0; 3]));
    assert!(rustix::io::read(&host, &mut [0; 100]).is_err());
    bench.device.reset();
    sends(&mut bench);
    assert!(rustix::io::read(&host, &mut [0; 100]).is_ok());
}

#[test]
fn the_tap_is_told_what_the_guest_takes() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let record = Arc::clone(&told);
    let tap = Tap {
        device: wire().0,
        set_offloads: Box::new(move |_, offloads| {
            record.lock().unwrap().push(offloads);
            Ok(())
        }),
        traffic: Arc::default(),
        muted: false,
    };
    let mut bench = Bench::new(Net::new(SPEC, tap).unwrap());
    bench.device.reset();
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
        ecn: true,
    };
    assert_eq!(*told.lock().unwrap(), [all, Offloads::default()]);
    // Segments without checksums, ECN without segments: what no tap takes isn't asked for.
    assert_eq!(
        Offloads::of(GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN),
        Offloads::default()
    );
    let checksum = Offloads {
        checksum: true,
        ..Offloads::default()
    };
    assert_eq!(Offloads::of(GUEST_CSUM | GUEST_ECN), checksum);
}

#[test]
fn chains_that_are_no_frames_stop_the_device() {
    let refused = |queue: usize, parts: &[Part]| {
        let (mut bench, host) = bench();
        bench.guest[queue].add_indirect(parts);
        if queue == RECEIVE {
            send(&host, &frame(100));
        }
        let kicked = bench.kick(queue);
        let Bench { device, queues, .. } = &mut bench;
        kicked.and_then(|()| device.on_event(TAP, READY, queues))
    };
    let read = |length| Part::Read(vec![0; length]);
    for (queue, parts) in [
        (TRANSMIT, vec![read(HEADER_BYTES - 1)]),
        (TRANSMIT, vec![read(MAX_FRAME_BYTES), read(1)]),
        (TRANSMIT, vec![read(100), Part::Write(1)]),
        (TRANSMIT, vec![Part::Write(100)]),
        (RECEIVE, vec![read(100)]),
        (RECEIVE, vec![read(12), Part::Write(2000)]),
        (RECEIVE, vec![Part::Write(HEADER_BYTES as u32 - 1)]),
    ] {
        let result = refused(queue, &parts);
        assert!(matches!(result, Err(DeviceError::Guest(_))), "{parts:?}");
    }
    let (mut bench, _host) = bench();
    let lost = RawDescriptor {
        address: u64::MAX,
        length: 100,
        flags: 0,
        next: 0,
    };
    bench.guest[TRANSMIT].add_indirect_table(&[lost]);
    assert!(matches!(
        bench.kick(TRANSMIT),
        Err(DeviceError::Queue(QueueError::Buffer { .. }))
    ));
}

#[test]
fn its_configuration_is_its_address_and_mtu() {
    let (bench, _host) = bench();
    let mut config = [0xee; 16];
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..6], SPEC.mac);
    assert_eq!(config[6..8], [1, 0]);
    assert_eq!(config[10..12], SPEC.mtu.to_le_bytes());
    assert_eq!(config[12..], [0; 4]);
}

#[test]
fn its_state_survives() {
    let (from, mut to) = (card(wire().0), card(wire().0));
    persist_roundtrip(&from, &mut to);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Buffers of any shape, frames of any length: each comes whole or not at all, in order.
    #[test]
    fn frames_come_whole_and_in_order(
        buffers in prop::collection::vec(12..3000u32, 1..120),
        lengths in prop::collection::vec(12..9000usize, 1..12),
    ) {
        let (mut bench, host) = bench();
        for length in &lengths {
            send(&host, &frame(*length));
        }
        for length in buffers {
            bench.guest[RECEIVE].add(&[Part::Write(length)]);
            bench.kick(RECEIVE).unwrap();
            if !bench.wakers.watched().is_empty() {
                event(&mut bench);
            }
        }
        let mut lengths = lengths.into_iter();
        while let Some(used) = bench.guest[RECEIVE].pop_used() {
            let mut got = used.written[..used.length as usize].to_vec();
            let buffers = u16::from_le_bytes([got[10], got[11]]);
            for _ in 1..buffers {
                let used = bench.guest[RECEIVE].pop_used().unwrap();
                got.extend_from_slice(&used.written[..used.length as usize]);
            }
            got[NUM_BUFFERS].fill(0);
            prop_assert_eq!(got, frame(lengths.next().unwrap()));
        }
    }

    /// Descriptors of any kind in either queue: no panic, and nothing read beyond a frame.
    #[test]
    fn hostile_chains_do_no_harm(
        chains in prop::collection::vec(
            (any::<bool>(), prop::collection::vec((any::<u64>(), any::<u32>(), any::<u16>(), any::<u16>()), 1..5)),
            1..20,
        ),
    ) {
        let (mut bench, host) = bench();
        for (receives, table) in chains {
            let queue = if receives { RECEIVE } else { TRANSMIT };
            let table: Vec<_> = table
                .into_iter()
                .map(|(address, length, flags, next)| RawDescriptor {
                    // Half of them in RAM, half of the lengths a frame's.
                    address: if address & 1 == 0 { address & 0xff_ffff } else { address },
                    length: if length & 1 == 0 { length & 0x7fff } else { length },
                    flags: flags & 7,
                    next: next % 6,
                })
                .collect();
            bench.guest[queue].add_indirect_table(&table);
            send(&host, &frame(64));
            let kicked = bench.kick(queue);
            let Bench { device, queues, .. } = &mut bench;
            let _ = kicked.and_then(|()| device.on_event(TAP, READY, queues));
            let mut bytes = vec![0; 1 << 17];
            while let Ok(count) = rustix::io::read(&host, &mut bytes[..]) {
                prop_assert!((HEADER_BYTES..=MAX_FRAME_BYTES).contains(&count));
            }
        }
    }
}
