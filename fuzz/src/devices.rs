//! Rings and devices, against a driver that does as the input says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read, Write};
use std::ops::Range;
use std::os::unix::fs::symlink;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use hull_vmm::bus::Sink;
use hull_vmm::memory::Window;
use hull_vmm::outcome::Outcome;
use hull_vmm::spec::{BlockSpec, FsSpec, NetSpec};
use hull_vmm::testing::{Bench, FakeIrq, GuestQueue, Part, guest_ram};
use hull_vmm::virtio::block::Block;
use hull_vmm::virtio::console::Console;
use hull_vmm::virtio::fs::{CachePolicy, Fs, FsExport, FsLimits, FsRole};
use hull_vmm::virtio::mem::{Blocks, Mem, Region};
use hull_vmm::virtio::net::{Net, Tap};
use hull_vmm::virtio::transport::{Board, Slot};
use hull_vmm::virtio::vsock::Vsock;
use hull_vmm::virtio::worker::Poller;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use vm_memory::{Bytes as _, GuestAddress};

use crate::guest::{Input, play};

/// A ring that is nothing but the input's bytes: descriptors, available ring, indirect tables.
pub(crate) fn queue(data: &[u8]) {
    const BASE: u64 = 0x1000;
    let memory = guest_ram(1 << 20);
    let size = 1 << (data.first().unwrap_or(&0) % 6);
    let guest = GuestQueue::new(&memory, BASE, size, 0x8000);
    let most = data.len().min(0x4000);
    memory
        .write_slice(&data[..most], GuestAddress(BASE))
        .unwrap();
    let mut queue = guest.device_side(0, &Arc::new(FakeIrq::default()));
    for _ in 0..2 * size {
        let Ok(Some(chain)) = queue.pop() else { break };
        assert!(chain.head() < size);
        let length = chain.readable_len() as usize;
        let mut bytes = vec![0; length.min(1 << 16)];
        let _ = chain.read_at(0, &mut bytes);
        let _ = chain.read_at(length / 2, &mut bytes);
        let _ = chain.write_at(0, &bytes);
        let _ = chain.readable_spans(0, length);
        let _ = chain.writable_spans(0, chain.writable_len() as usize);
        let _ = queue.complete(&chain, 1);
    }
    let _ = queue.enable_kicks();
}

/// A disk behind its registers, in RAM that begins with the input's second half.
pub(crate) fn registers(data: &[u8]) {
    let (script, ram) = data.split_at(data.len() / 2);
    let memory = guest_ram(1 << 20);
    memory.write_slice(ram, GuestAddress(0)).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    let device = Block::new(file, &disk(false)).unwrap();
    let outcome = Arc::new(Outcome::new().unwrap());
    let board = Board {
        memory: memory.into(),
        window: None,
        lines: Arc::new(FakeIrq::default()),
        outcome,
    };
    let poller = Poller::new().unwrap();
    let slot = Slot::new(0, Box::new(device), &board, &poller).unwrap();
    let mut input = Input(script);
    while !input.is_empty() {
        let offset = u64::from(input.byte()) * 4 + u64::from(input.byte() == 0xff);
        match input.byte() {
            0..=15 => slot.read(offset, &mut [0; 4]),
            16..=31 => slot.read(offset, &mut [0; 8]),
            32..=63 => slot.on_kick(0),
            64..=79 => slot.on_events(),
            80..=95 => slot.write(offset, input.bytes(3)),
            _ => slot.write(offset, &input.word().to_le_bytes()),
        }
    }
    if let Ok(state) = slot.save() {
        let _ = slot.restore(state);
    }
}

fn disk(read_only: bool) -> BlockSpec {
    BlockSpec {
        read_only,
        serial: "scratch".to_owned(),
        durable: true,
    }
}

pub(crate) fn block(data: &[u8]) {
    let mut input = Input(data);
    let file = tempfile::tempfile().unwrap();
    file.set_len(64 << 10).unwrap();
    let device = Block::new(file, &disk(input.byte() & 1 != 0)).unwrap();
    play(&mut Bench::new(device), input, |_| true);
}

/// Memory of 64 blocks, of which some are asked for.
pub(crate) fn mem(data: &[u8]) {
    let region = Region {
        address: 4 << 30,
        length: 128 << 20,
        block_bytes: 2 << 20,
    };
    let plugged: Arc<Mutex<BTreeSet<usize>>> = Arc::default();
    let mut input = Input(data);
    let device = Mem::new(region, Box::new(Plugged(Arc::clone(&plugged)))).unwrap();
    let extent = device.extent();
    let most = extent.request(u64::from(input.byte()) << 20);
    play(&mut Bench::new(device), input, |_| true);
    let plugged = plugged.lock().unwrap().len() as u64 * region.block_bytes;
    assert_eq!(extent.plugged(), plugged);
    assert!(plugged <= most);
}

/// Blocks that come and go once each.
struct Plugged(Arc<Mutex<BTreeSet<usize>>>);

impl Blocks for Plugged {
    fn plug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let mut plugged = self.0.lock().unwrap();
        assert!(blocks.end <= 64);
        assert!(blocks.into_iter().all(|block| plugged.insert(block)));
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let mut plugged = self.0.lock().unwrap();
        assert!(blocks.into_iter().all(|block| plugged.remove(&block)));
        Ok(())
    }

    fn restore(&mut self, blocks: &[usize]) -> io::Result<()> {
        self.0.lock().unwrap().extend(blocks);
        Ok(())
    }
}

pub(crate) fn console(data: &[u8]) {
    let sink: Sink = Arc::new(Mutex::new(Box::new(io::sink())));
    let (typed, mut keyboard) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut input = Input(data);
    let keys = usize::from(input.byte());
    keyboard.write_all(input.bytes(keys)).unwrap();
    let device = Console::new(sink, Some(typed.into()));
    play(&mut Bench::new(device), input, |_| true);
}

/// A card whose tap has frames waiting, and whose guest answers at will.
pub(crate) fn net(data: &[u8]) {
    let kind = (AddressFamily::UNIX, SocketType::SEQPACKET);
    let (device, host) = socketpair(kind.0, kind.1, SocketFlags::NONBLOCK, None).unwrap();
    let mut input = Input(data);
    for _ in 0..input.byte() % 8 {
        let length = usize::from(input.short());
        let mut frame = input.bytes(length).to_vec();
        frame.resize(length, 0);
        let _ = rustix::io::write(&host, &frame);
    }
    let tap = Tap {
        device,
        set_offloads: Box::new(|_, _| Ok(())),
        traffic: Arc::default(),
        muted: input.byte() % 8 == 0,
    };
    let spec = NetSpec {
        mac: [2; 6],
        mtu: 1500,
    };
    play(&mut Bench::new(Net::new(spec, tap).unwrap()), input, |_| {
        true
    });
}

pub(crate) fn vsock(data: &[u8]) {
    const PORT: u32 = 1024;
    let (sender, accepted) = channel();
    let device = Vsock::new(3, BTreeMap::from([(PORT, sender)])).unwrap();
    let connector = device.connector();
    let mut input = Input(data);
    let asked = (0..input.byte() % 3).filter_map(|_| connector.connect(1025).ok());
    let asked: Vec<_> = asked.collect();
    let mut bench = Bench::new(device);
    let half = input.bytes(data.len() / 2);
    play(&mut bench, Input(half), |_| true);
    // The host's ends say something, too, and then go.
    let mut ends: Vec<_> = accepted.try_iter().chain(asked).collect();
    for end in &mut ends {
        end.set_nonblocking(true).unwrap();
        let _ = end.write(b"from the host");
        let _ = end.read(&mut [0; 64]);
    }
    ends.truncate(1);
    play(&mut bench, input, |_| true);
}

pub(crate) fn fs(data: &[u8]) {
    /// `FUSE_SYNCFS`: its effect is on the whole machine.
    const SYNCFS: [u8; 4] = 50u32.to_le_bytes();
    let mut input = Input(data);
    let host = tempfile::tempdir().unwrap();
    let (share, outside) = (host.path().join("share"), host.path().join("outside"));
    fs::create_dir_all(share.join("d/e")).unwrap();
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("secret"), "secret").unwrap();
    fs::write(share.join("a"), "some bytes").unwrap();
    symlink("../outside/secret", share.join("l")).unwrap();
    symlink(&outside, share.join("d/o")).unwrap();
    let choice = input.byte();
    let cache = match choice & 1 {
        0 => CachePolicy::Auto,
        _ => CachePolicy::Always,
    };
    let mut export = FsExport::open("root", &share, choice & 2 != 0, cache).unwrap();
    export.immutable = choice & 7 == 7;
    let window = Window::reserve(16 << 20, 4 * Window::CHUNK).unwrap();
    let window = (choice & 4 != 0).then(|| Arc::new(window));
    let spec = FsSpec {
        tag: "hull".to_owned(),
        dax_window_bytes: 4 * Window::CHUNK,
    };
    let limits = FsLimits {
        inodes: 64,
        handles: 32,
    };
    let mut bench = Bench::new(Fs::new(&spec, vec![export], FsRole::Own, limits, window).unwrap());
    init(&mut bench);
    play(&mut bench, input, |parts| {
        let request = parts.iter().flat_map(|part| match part {
            Part::Read(bytes) => &bytes[..],
            Part::Write(_) => &[],
        });
        let request: Vec<u8> = request.copied().take(8).collect();
        request.get(4..8).is_none_or(|opcode| opcode != SYNCFS)
    });
    drop(bench);
    // Whatever was asked: nothing outside the share was touched.
    assert_eq!(fs::read(outside.join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 1);
}

/// Mounts, so that an input need not find out how.
fn init(bench: &mut Bench<Fs>) {
    const INIT: u32 = 26;
    // `struct fuse_in_header`, `struct fuse_init_in` of version 7.38.
    let words = [
        104,
        INIT,
        1,
        0,
        1,
        0,
        0,
        0,
        0,
        0,
        7,
        38,
        0x2_0000,
        0x73ff_fffb,
    ];
    let mut request: Vec<u8> = words
        .iter()
        .flat_map(|word: &u32| word.to_le_bytes())
        .collect();
    request.resize(104, 0);
    let last = bench.guest.len() - 1;
    bench.guest[last].add(&[Part::Read(request), Part::Write(256)]);
    let _ = bench.kick(last);
    let _ = bench.guest[last].pop_used();
}
