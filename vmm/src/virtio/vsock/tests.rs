//! A scripted guest against the socket device, over real rings and real sockets.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::connection::RECEIVE_BUFFER_BYTES;
use super::packet::{
    HEADER_BYTES, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use super::*;
use crate::testing::{FakeIrq, FakeWakers, GuestQueue, Part, guest_ram, persist_roundtrip};
use crate::virtio::device::{Persist, VirtioDevice, Wakers};

const CID: u64 = 3;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 40_000;
const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

struct Guest {
    device: Vsock,
    queues: Vec<Queue>,
    guest: Vec<GuestQueue>,
    accepted: Receiver<UnixStream>,
    wakers: Arc<FakeWakers>,
}

fn device() -> (Vsock, Receiver<UnixStream>) {
    let (sender, accepted) = channel();
    (
        Vsock::new(CID, BTreeMap::from([(PORT, sender)])).unwrap(),
        accepted,
    )
}

impl Guest {
    fn new() -> Self {
        let (device, accepted) = device();
        Self::with(device, accepted)
    }

    fn with(mut device: Vsock, accepted: Receiver<UnixStream>) -> Self {
        let memory = guest_ram(96 << 20);
        let irq = Arc::new(FakeIrq::default());
        let wakers = Arc::new(FakeWakers::default());
        let rooms = [
            (1 << 20, 40 << 20),
            (48 << 20, 40 << 20),
            (90 << 20, 1 << 20),
        ];
        let sizes = device.queue_sizes().to_vec();
        let guest: Vec<_> = sizes
            .iter()
            .zip(rooms)
            .map(|(size, (base, room))| GuestQueue::new(&memory, base, *size, room))
            .collect();
        let queues = guest
            .iter()
            .enumerate()
            .map(|(i, q)| q.device_side(i, &irq))
            .collect();
        let watching: Arc<dyn Wakers> = Arc::<FakeWakers>::clone(&wakers);
        device
            .activate(Activation {
                features: 0,
                memory: Arc::clone(&memory),
                wakers: watching,
            })
            .unwrap();
        Self {
            device,
            queues,
            guest,
            accepted,
            wakers,
        }
    }

    /// Gives `count` receive buffers of `size` bytes.
    fn give(&mut self, count: usize, size: u32) {
        for _ in 0..count {
            self.guest[RX].add(&[Part::Write(size)]);
        }
        self.kick(RX);
    }

    fn kick(&mut self, index: usize) {
        self.device.on_queue(index, &mut self.queues).unwrap();
    }

    fn put(&mut self, header: Header, data: &[u8]) {
        let mut bytes = header.encode().to_vec();
        bytes.extend_from_slice(data);
        self.guest[TX].add(&[Part::Read(bytes)]);
        self.kick(TX);
        assert!(
            self.guest[TX].pop_used().is_some(),
            "the device kept a packet"
        );
    }

    fn send(&mut self, op: Op, data: &[u8]) {
        self.put(packet(op, data.len()), data);
    }

    /// The next packet the device has sent.
    fn take(&mut self) -> Option<(Header, Vec<u8>)> {
        let used = self.guest[RX].pop_used()?;
        let header = Header::decode(used.written[..HEADER_BYTES].try_into().unwrap());
        assert_eq!(used.length as usize, HEADER_BYTES + header.len as usize);
        Some((
            header,
            used.written[HEADER_BYTES..used.length as usize].to_vec(),
        ))
    }

    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self
            .take()
            .unwrap_or_else(|| panic!("no packet where {op:?} was expected"));
        assert_eq!(Op::from_wire(header.op), Some(op), "{header:?}");
        (header, data)
    }

    /// Waits until a socket of the device has an event, and lets it look.
    fn event(&mut self) {
        let mut fds = [PollFd::new(self.device.mux.event_fd(), PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: 10,
            tv_nsec: 0,
        };
        assert_eq!(
            poll(&mut fds, Some(&timeout)).unwrap(),
            1,
            "no event within ten seconds"
        );
        self.device
            .on_event(0, Readiness::default(), &mut self.queues)
            .unwrap();
    }

    /// A connection from the guest, with its answer taken.
    fn connected(&mut self) -> UnixStream {
        self.send(Op::Request, &[]);
        let stream = self
            .accepted
            .try_recv()
            .expect("nothing arrived at the host");
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        self.expect(Op::Response);
        stream
    }
}

fn packet(op: Op, len: usize) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: GUEST_PORT,
        dst_port: PORT,
        len: u32::try_from(len).unwrap(),
        socket_type: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn read_exactly(stream: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut data = vec![0; count];
    stream.read_exact(&mut data).unwrap();
    data
}

#[test]
fn a_guest_connects_talks_and_closes() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.connected();
    guest.send(Op::Data, b"to the host");
    assert_eq!(read_exactly(&mut host, 11), b"to the host");
    host.write_all(b"to the guest").unwrap();
    guest.event();
    let (header, data) = guest.expect(Op::Data);
    assert_eq!(
        (data.as_slice(), header.fwd_cnt),
        (&b"to the guest"[..], 11)
    );
    guest.put(
        Header {
            flags: SHUTDOWN_BOTH,
            ..packet(Op::Shutdown, 0)
        },
        &[],
    );
    guest.expect(Op::Reset);
    assert_eq!(host.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.device.mux.len(), 0);
}

#[test]
fn a_host_connects_talks_and_closes() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.device.connector().connect(22).unwrap();
    host.write_all(b"early").unwrap();
    guest.event();
    let (request, _) = guest.expect(Op::Request);
    assert_eq!(
        (request.dst_port, request.dst_cid, request.src_cid),
        (22, CID, HOST_CID)
    );
    guest.event();
    assert!(guest.take().is_none(), "data before the guest accepted");
    let reply = |op: Op, len: usize| Header {
        src_port: 22,
        dst_port: request.src_port,
        ..packet(op, len)
    };
    guest.put(reply(Op::Response, 0), &[]);
    assert_eq!(guest.expect(Op::Data).1, b"early");
    guest.put(reply(Op::Data, 2), b"ok");
    assert_eq!(read_exactly(&mut host, 2), b"ok");
    drop(host);
    guest.event();
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
    guest.put(reply(Op::Reset, 0), &[]);
    assert_eq!(guest.device.mux.len(), 0);
}

#[test]
fn a_refused_and_an_unanswered_connection_read_as_ended() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let connector = guest.device.connector();
    let (mut refused, mut silent) = (connector.connect(1).unwrap(), connector.connect(2).unwrap());
    guest.event();
    let (request, _) = guest.expect(Op::Request);
    guest.expect(Op::Request);
    guest.put(
        Header {
            src_port: 1,
            dst_port: request.src_port,
            ..packet(Op::Reset, 0)
        },
        &[],
    );
    assert_eq!(refused.read(&mut [0]).unwrap(), 0);
    // Until the timer's event comes, two seconds later.
    while guest.device.mux.len() > 0 {
        guest.event();
    }
    guest.expect(Op::Reset);
    assert_eq!(silent.read(&mut [0]).unwrap(), 0);
    assert_eq!(guest.device.mux.len(), 0);
}

#[test]
fn a_device_without_driver_refuses_hosts() {
    let (device, _accepted) = device();
    assert_eq!(
        device.connector().connect(1).unwrap_err().kind(),
        io::ErrorKind::NotConnected
    );
}

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
fn a_guest_without_credit_or_buffers_stops_the_socket() {
    let mut guest = Guest::new();
    guest.give(2, 4096);
    guest.put(
        Header {
            buf_alloc: 10,
            ..packet(Op::Request, 0)
        },
        &[],
    );
    let mut host = guest.accepted.try_recv().unwrap();
    guest.expect(Op::Response);
    host.write_all(b"0123456789abcdef").unwrap();
    guest.event();
    assert_eq!(guest.expect(Op::Data).1, b"0123456789");
    guest.give(2, 4096);
    assert!(guest.take().is_none());
    guest.put(
        Header {
            buf_alloc: 10,
            fwd_cnt: 4,
            ..packet(Op::CreditUpdate, 0)
        },
        &[],
    );
    assert_eq!(guest.expect(Op::Data).1, b"abcd");
    guest.put(
        Header {
            buf_alloc: 10,
            fwd_cnt: 14,
            ..packet(Op::CreditUpdate, 0)
        },
        &[],
    );
    assert_eq!(guest.expect(Op::Data).1, b"ef");
    // No buffers left: the host's write stops at the socket's size.
    host.set_nonblocking(true).unwrap();
    let accepted = std::iter::repeat_with(|| host.write(&[7; 65_536]))
        .take_while(Result::is_ok)
        .count();
    assert!(accepted < 16, "{accepted} writes of 64 KiB went nowhere");
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
fn credit_comes_back_as_the_host_reads() {
    let mut guest = Guest::new();
    guest.give(64, 4096);
    let mut host = guest.connected();
    let data: Vec<u8> = (0..2 << 20).map(|i: u32| (i % 251) as u8).collect();
    let (mut sent, mut fwd, mut got) = (0usize, 0usize, Vec::new());
    while got.len() < data.len() {
        let room = RECEIVE_BUFFER_BYTES as usize - (sent - fwd);
        let count = room.min(data.len() - sent).min(16 * 1024);
        if count > 0 {
            guest.send(Op::Data, &data[sent..sent + count]);
            sent += count;
        } else {
            let mut chunk = [0; 8192];
            let count = host.read(&mut chunk).unwrap();
            got.extend_from_slice(&chunk[..count]);
            if !fd_has_event(&guest) {
                continue;
            }
            guest.event();
        }
        while let Some((header, _)) = guest.take() {
            assert_eq!(header.op, Op::CreditUpdate as u16);
            fwd = header.fwd_cnt as usize;
            guest.give(1, 4096);
        }
    }
    assert_eq!(got, data);
}

fn fd_has_event(guest: &Guest) -> bool {
    let mut fds = [PollFd::new(guest.device.mux.event_fd(), PollFlags::IN)];
    poll(
        &mut fds,
        Some(&Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }),
    )
    .unwrap()
        == 1
}

#[test]
fn half_closes_pass_both_ways() {
    let mut guest = Guest::new();
    guest.give(16, 4096);
    let mut host = guest.connected();
    guest.send(Op::Data, b"last words");
    guest.put(
        Header {
            flags: SHUTDOWN_SEND,
            ..packet(Op::Shutdown, 0)
        },
        &[],
    );
    let mut all = Vec::new();
    host.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"last words");
    host.write_all(b"answer").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.event();
    assert_eq!(guest.expect(Op::Data).1, b"answer");
    // Nobody sends any more: the connection is over both ways.
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_host_that_sends_no_more_still_reads() {
    let mut guest = Guest::new();
    guest.give(16, 4096);
    let mut host = guest.connected();
    host.write_all(b"question").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    guest.event();
    assert_eq!(guest.expect(Op::Data).1, b"question");
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    guest.send(Op::Data, b"answer");
    assert_eq!(read_exactly(&mut host, 6), b"answer");
    drop(host);
    guest.event();
    assert_eq!(guest.expect(Op::Shutdown).0.flags, SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_reads_no_more_breaks_the_hosts_pipe() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.connected();
    guest.put(
        Header {
            flags: SHUTDOWN_RECEIVE,
            ..packet(Op::Shutdown, 0)
        },
        &[],
    );
    assert_eq!(
        host.write(b"x").unwrap_err().kind(),
        io::ErrorKind::BrokenPipe
    );
    guest.send(Op::Data, b"still");
    assert_eq!(read_exactly(&mut host, 5), b"still");
}

#[test]
fn what_a_closing_guest_sent_still_arrives() {
    let mut guest = Guest::new();
    guest.give(64, 4096);
    let mut host = guest.connected();
    let chunk = vec![9u8; 16 * 1024];
    let mut sent = 0;
    // Until the socket is full and the rest is in the device's buffer.
    while guest.device.mux.len() == 1 && sent < 256 * 1024 + 48 * 1024 {
        guest.send(Op::Data, &chunk);
        sent += chunk.len();
    }
    guest.put(
        Header {
            flags: SHUTDOWN_BOTH,
            ..packet(Op::Shutdown, 0)
        },
        &[],
    );
    while let Some((header, _)) = guest.take() {
        assert!([Op::CreditUpdate as u16, Op::Reset as u16].contains(&header.op));
    }
    // The port is free again at once.
    let _second = guest.connected();
    let reader = std::thread::spawn(move || {
        let mut all = Vec::new();
        host.read_to_end(&mut all).unwrap();
        all.len()
    });
    while guest.device.mux.len() > 1 {
        guest.event();
    }
    assert_eq!(reader.join().unwrap(), sent);
}

#[test]
fn many_small_writes_arrive_in_order_in_any_layout() {
    let mut guest = Guest::new();
    guest.give(100, 64);
    let mut host = guest.connected();
    let mut expected = Vec::new();
    for i in 0..200u32 {
        let data = i.to_le_bytes();
        expected.extend_from_slice(&data);
        let header = packet(Op::Data, 4).encode();
        let parts = [
            Part::Read(header[..7].to_vec()),
            Part::Read(header[7..].to_vec()),
            Part::Read(data[..1].to_vec()),
            Part::Read(data[1..].to_vec()),
        ];
        if i % 2 == 0 {
            guest.guest[TX].add(&parts)
        } else {
            guest.guest[TX].add_indirect(&parts)
        };
        guest.kick(TX);
        guest.guest[TX].pop_used().unwrap();
    }
    assert_eq!(read_exactly(&mut host, 800), expected);
    host.write_all(&expected).unwrap();
    guest.event();
    let mut got = Vec::new();
    while let Some((_, data)) = guest.take() {
        assert!(data.len() <= 20);
        got.extend_from_slice(&data);
    }
    assert_eq!(got, expected);
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

#[test]
fn state_survives_and_cut_connections_are_told() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let (mut restored, accepted) = device();
    persist_roundtrip(&guest.device, &mut restored);
    assert_eq!(restored.transport_reset, TransportReset::None);
    let _host = guest.connected();
    persist_roundtrip(&guest.device, &mut restored);
    let mut guest = Guest::with(restored, accepted);
    guest.give(8, 4096);
    guest.guest[EVENT].add(&[Part::Write(4)]);
    guest.guest[TX].add(&[Part::Read(packet(Op::Request, 0).encode().to_vec())]);
    guest.kick(TX);
    assert!(
        guest.guest[TX].pop_used().is_none(),
        "a connection before the guest knows"
    );
    guest.kick(EVENT);
    let event = guest.guest[EVENT].pop_used().unwrap();
    assert_eq!((event.length, event.written), (4, vec![0; 4]));
    guest.guest[EVENT].add(&[Part::Write(4)]);
    guest.kick(EVENT);
    guest.expect(Op::Response);
    let (mut other, _accepted) = channel_device(4);
    assert!(other.restore(guest.device.save()).is_err());
}

fn channel_device(cid: u64) -> (Vsock, Receiver<UnixStream>) {
    let (sender, accepted) = channel();
    (
        Vsock::new(cid, BTreeMap::from([(PORT, sender)])).unwrap(),
        accepted,
    )
}

#[test]
fn a_reset_device_ends_its_streams_and_starts_again() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.connected();
    let mut asked = guest.device.connector().connect(5).unwrap();
    guest.device.reset();
    assert_eq!(
        (host.read(&mut [0]).unwrap(), asked.read(&mut [0]).unwrap()),
        (0, 0)
    );
    assert_eq!(guest.wakers.tokens(), [0]);
    let Guest {
        device, accepted, ..
    } = guest;
    let mut guest = Guest::with(device, accepted);
    guest.give(8, 4096);
    let _host = guest.connected();
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
