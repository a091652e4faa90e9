//! A scripted guest against the socket device, over real rings and real sockets.

mod hostile;
mod life;

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

fn channel_device(cid: u64) -> (Vsock, Receiver<UnixStream>) {
    let (sender, accepted) = channel();
    (
        Vsock::new(cid, BTreeMap::from([(PORT, sender)])).unwrap(),
        accepted,
    )
}
