//! What well-behaved guests and hosts do.

use super::*;

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
fn state_survives_and_cut_connections_are_told() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let (mut restored, accepted) = device();
    persist_roundtrip(&guest.device, &mut restored);
    let host = guest.connected();
    host.shutdown(Shutdown::Write).unwrap();
    guest.event();
    persist_roundtrip(&guest.device, &mut restored);
    assert!(accepted.try_recv().is_err(), "half a stream was carried on");
    let mut guest = Guest::with(restored, accepted);
    guest.give(8, 4096);
    guest.guest[TX].add(&[Part::Read(packet(Op::CreditUpdate, 0).encode().to_vec())]);
    guest.kick(TX);
    guest.expect(Op::Reset);
    guest.expect(Op::Reset);
    guest.send(Op::Request, &[]);
    guest.expect(Op::Response);
    let (mut other, _accepted) = channel_device(4);
    assert!(other.restore(guest.device.save().unwrap()).is_err());
}

#[test]
fn a_busy_stream_loses_nothing() {
    let mut guest = Guest::new();
    guest.give(1, 4096);
    let mut host = guest.connected();
    // More than the socket holds, which stays in the device.
    let sent: Vec<u8> = (0..RECEIVE_BUFFER_BYTES).map(|n| (n % 251) as u8).collect();
    for part in sent.chunks(4096) {
        guest.send(Op::Data, part);
    }
    // The guest gives no buffers: a part is in the device, the rest in the socket.
    host.write_all(&[7; 100]).unwrap();
    guest.event();
    host.write_all(&[8; 50_000]).unwrap();
    // Whoever saves the device has emptied its own end.
    host.set_nonblocking(true).unwrap();
    let mut got = Vec::new();
    let _would_block = host.read_to_end(&mut got).unwrap_err();
    let (mut restored, accepted) = device();
    persist_roundtrip(&guest.device, &mut restored);
    let mut host = accepted.try_recv().expect("the stream was not carried on");
    let mut guest = Guest::with(restored, accepted);
    guest.event();
    let rest = read_exactly(&mut host, sent.len() - got.len());
    got.extend(rest);
    assert!(got == sent, "bytes to the host were lost");
    let mut arrived = Vec::new();
    while arrived.len() < 50_100 {
        guest.give(1, 65536);
        // The credit that was owed comes among them.
        arrived.extend(guest.take().map_or(Vec::new(), |(_, data)| data));
    }
    assert!(arrived[..100].iter().all(|byte| *byte == 7));
    assert!(arrived[100..].iter().all(|byte| *byte == 8));
    // One that lies about what it holds is refused.
    let mut state = guest.device.save().unwrap();
    state.streams[0].guest_port += 1;
    let text = serde_json::to_string(&state).unwrap();
    let lying = text.replace("\"to_host\":[", "\"to_host\":[1,2,3");
    let (mut other, _accepted) = device();
    let lying = serde_json::from_str(&lying).unwrap();
    assert!(other.restore(lying).is_err());
}

#[test]
fn a_quiet_stream_is_carried_on_with_its_credit() {
    let mut guest = Guest::new();
    guest.give(8, 4096);
    let mut host = guest.connected();
    guest.send(Op::Data, b"before");
    assert_eq!(read_exactly(&mut host, 6), b"before");
    host.write_all(b"question").unwrap();
    guest.event();
    assert_eq!(guest.expect(Op::Data).1, b"question");
    let (mut restored, accepted) = device();
    persist_roundtrip(&guest.device, &mut restored);
    let mut host = accepted.try_recv().expect("the stream was not carried on");
    let mut guest = Guest::with(restored, accepted);
    guest.give(8, 4096);
    host.write_all(b"again").unwrap();
    guest.event();
    let (header, data) = guest.expect(Op::Data);
    assert_eq!((header.fwd_cnt, data.as_slice()), (6, b"again".as_slice()));
    let answer = Header {
        fwd_cnt: 13,
        ..packet(Op::Data, 5)
    };
    guest.put(answer, b"after");
    assert_eq!(read_exactly(&mut host, 5), b"after");
    // More than it was ever sent: the count goes on where it stood.
    let lie = Header {
        fwd_cnt: 14,
        ..packet(Op::CreditUpdate, 0)
    };
    guest.put(lie, &[]);
    guest.expect(Op::Reset);
    // A device that nobody listens to can't go on.
    let saved = guest.device.save().unwrap();
    let mut talker = Guest::new();
    talker.give(8, 4096);
    let _host = talker.connected();
    let (mut deaf, listener) = device();
    drop(listener);
    assert!(saved.streams.is_empty());
    assert!(deaf.restore(talker.device.save().unwrap()).is_err());
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
