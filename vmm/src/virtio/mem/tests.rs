//! The device against a scripted guest: an honest one, and others.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::memory::{self, ChangingRam, now};
use crate::testing::{Bench, FakeIrq, GuestQueue, Part, RawDescriptor, WRITE, guest_ram};
use crate::testing::{NEXT, persist_roundtrip};
use vm_memory::{Bytes, GuestAddress};

const BLOCK: u64 = 2 << 20;
const REGION: Region = Region {
    address: 4 << 30,
    length: 64 * BLOCK,
    block_bytes: BLOCK,
};

/// Blocks that the tests can look at.
#[derive(Debug, Clone, Default)]
struct Seen(Arc<Mutex<(BTreeSet<usize>, bool)>>);

impl Seen {
    fn has(&self) -> BTreeSet<usize> {
        lock(&self.0).0.clone()
    }
}

impl Blocks for Seen {
    fn plug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let mut seen = lock(&self.0);
        if seen.1 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(blocks.into_iter().all(|block| seen.0.insert(block)));
        Ok(())
    }

    fn unplug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let mut seen = lock(&self.0);
        if seen.1 {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        assert!(blocks.into_iter().all(|block| seen.0.remove(&block)));
        Ok(())
    }

    fn restore(&mut self, blocks: &[usize]) -> io::Result<()> {
        let mut runs = blocks.iter().map(|&block| block..block + 1);
        runs.try_for_each(|run| self.plug(run))
    }
}

fn device() -> (Mem, Seen) {
    let seen = Seen::default();
    (Mem::new(REGION, Box::new(seen.clone())).unwrap(), seen)
}

fn request(kind: u16, address: u64, count: u16) -> Vec<u8> {
    let mut bytes = [kind.to_le_bytes(), [0; 2], [0; 2], [0; 2]].concat();
    bytes.extend(address.to_le_bytes());
    bytes.extend(count.to_le_bytes());
    bytes.resize(REQUEST_BYTES, 0);
    bytes
}

/// The type and the state of the device's answer.
fn ask(bench: &mut Bench<Mem>, kind: u16, address: u64, count: u16) -> (u8, u8) {
    let parts = [Part::Read(request(kind, address, count)), Part::Write(10)];
    let used = bench.round_trip(0, &parts);
    assert_eq!(used.length, RESPONSE_BYTES);
    (used.written[0], used.written[8])
}

fn at(block: u64) -> u64 {
    REGION.address + block * BLOCK
}

const ACK: (u8, u8) = (0, 0);
const NACK: (u8, u8) = (1, 0);
const BUSY: (u8, u8) = (2, 0);
const ERROR: (u8, u8) = (3, 0);

#[test]
fn it_has_what_was_asked_for_and_no_more() {
    let (device, seen) = device();
    let extent = device.extent();
    let mut bench = Bench::new(device);
    assert_eq!(ask(&mut bench, PLUG, at(0), 1), NACK);
    assert_eq!(extent.request(5 * BLOCK - 1), 5 * BLOCK);
    assert_eq!(ask(&mut bench, PLUG, at(2), 3), ACK);
    assert_eq!(ask(&mut bench, PLUG, at(0), 3), ERROR);
    assert_eq!(ask(&mut bench, PLUG, at(5), 3), NACK);
    assert_eq!(ask(&mut bench, PLUG, at(63), 1), ACK);
    assert_eq!(seen.has(), BTreeSet::from([2, 3, 4, 63]));
    assert_eq!(extent.plugged(), 4 * BLOCK);
    assert_eq!(ask(&mut bench, STATE, at(2), 3), (0, 0));
    assert_eq!(ask(&mut bench, STATE, at(5), 58), (0, 1));
    assert_eq!(ask(&mut bench, STATE, at(4), 2), (0, 2));
    // What was asked for shrinks: the guest may give up what it likes, and have nothing more.
    extent.request(BLOCK);
    assert_eq!(ask(&mut bench, UNPLUG, at(3), 1), ACK);
    assert_eq!(ask(&mut bench, UNPLUG, at(2), 2), ERROR);
    assert_eq!(ask(&mut bench, PLUG, at(3), 1), NACK);
    assert_eq!(seen.has(), BTreeSet::from([2, 4, 63]));
    // A reset changes nothing.
    bench.device.reset();
    assert_eq!(extent.plugged(), 3 * BLOCK);
    assert_eq!(ask(&mut bench, UNPLUG_ALL, 0, 0), ACK);
    assert_eq!((seen.has(), extent.plugged()), (BTreeSet::new(), 0));
}

#[test]
fn its_sizes_are_in_its_configuration() {
    let (device, _) = device();
    device.extent().request(7 * BLOCK);
    let word = |device: &Mem, offset| {
        let mut bytes = [0; 8];
        device.read_config(offset, &mut bytes);
        u64::from_le_bytes(bytes)
    };
    let words = [0, 8, 16, 24, 32, 40, 48, 56].map(|offset| word(&device, offset));
    let all = REGION.length;
    assert_eq!(words, [BLOCK, 0, 4 << 30, all, all, 0, 7 * BLOCK, 0]);
    assert_eq!(device.extent().request(u64::MAX), REGION.length);
    let mut half = [0; 4];
    device.read_config(20, &mut half);
    assert_eq!(half, [1, 0, 0, 0]);
}

#[test]
fn what_no_driver_asks_for_is_refused() {
    let (device, seen) = device();
    device.extent().request(u64::MAX);
    let mut bench = Bench::new(device);
    for kind in [PLUG, UNPLUG, STATE] {
        for (address, count) in [
            (at(0), 0),
            (at(0), 65),
            (at(64), 1),
            (at(63), 2),
            (at(0) - BLOCK, 1),
            (at(0) + 4096, 1),
            (0, 1),
            (u64::MAX - BLOCK + 1, 1),
            (u64::MAX, u16::MAX),
        ] {
            assert_eq!(
                ask(&mut bench, kind, address, count),
                ERROR,
                "{kind} {address:#x} {count}"
            );
        }
    }
    assert_eq!(ask(&mut bench, UNPLUG, at(0), 1), ERROR);
    assert_eq!(ask(&mut bench, 4, at(0), 1), ERROR);
    assert_eq!(seen.has(), BTreeSet::new());
    for parts in [
        vec![Part::Read(vec![0; 23]), Part::Write(10)],
        vec![Part::Read(request(PLUG, at(0), 1)), Part::Write(9)],
        vec![Part::Write(64)],
    ] {
        let (device, seen) = self::device();
        device.extent().request(u64::MAX);
        let mut bench = Bench::new(device);
        bench.guest[0].add(&parts);
        assert!(matches!(bench.kick(0), Err(DeviceError::Queue(_))));
        assert_eq!(seen.has(), BTreeSet::new());
    }
}

#[test]
fn a_host_that_lacks_memory_says_so() {
    let (device, seen) = device();
    let extent = device.extent();
    extent.request(4 * BLOCK);
    let mut bench = Bench::new(device);
    assert_eq!(ask(&mut bench, PLUG, at(0), 1), ACK);
    lock(&seen.0).1 = true;
    assert_eq!(ask(&mut bench, PLUG, at(1), 1), BUSY);
    assert_eq!(extent.refusal().as_deref(), Some("out of memory"));
    assert_eq!(extent.plugged(), BLOCK);
    // Then nobody knows what the guest can reach.
    let unplug = [Part::Read(request(UNPLUG, at(0), 1)), Part::Write(10)];
    bench.guest[0].add(&unplug);
    assert!(matches!(bench.kick(0), Err(DeviceError::Host { .. })));
    extent.request(4 * BLOCK);
    assert_eq!(extent.refusal(), None);
}

#[test]
fn its_state_survives_with_what_is_plugged() {
    let (from, _) = device();
    let (mut to, _) = device();
    persist_roundtrip(&from, &mut to);
    let other = Region {
        address: 6 << 30,
        ..REGION
    };
    let mut other = Mem::new(other, Box::new(Seen::default())).unwrap();
    assert!(other.restore(from.save().unwrap()).is_err());

    from.extent().request(6 * BLOCK);
    let mut bench = Bench::new(from);
    for (block, count) in [(0, 2), (4, 1), (63, 1)] {
        assert_eq!(ask(&mut bench, PLUG, at(block), count), ACK);
    }
    persist_roundtrip(&bench.device, &mut to);
    let extent = to.extent();
    assert_eq!(extent.plugged(), 4 * BLOCK);
    let mut bench = Bench::new(to);
    assert_eq!(ask(&mut bench, STATE, at(63), 1), (0, 0));
    assert_eq!(ask(&mut bench, PLUG, at(4), 1), ERROR);
    assert_eq!(ask(&mut bench, PLUG, at(5), 2), ACK);
    assert_eq!(ask(&mut bench, PLUG, at(7), 1), NACK);
}

/// A state in which runs of blocks are plugged, each from the first number to before the second.
fn with_plugged(runs: &[[usize; 2]]) -> MemState {
    MemState {
        region: REGION,
        plugged: runs.iter().map(|[begin, end]| *begin..*end).collect(),
        requested: BLOCK,
    }
}

#[test]
fn a_state_with_blocks_that_cant_be_is_refused() {
    let runs: [&[_]; 4] = [&[[63, 65]], &[[3, 4], [3, 5]], &[[5, 6], [1, 2]], &[[7, 7]]];
    for runs in runs {
        let (mut device, seen) = device();
        assert!(device.restore(with_plugged(runs)).is_err());
        assert_eq!(
            (seen.has(), device.extent().plugged()),
            (BTreeSet::new(), 0)
        );
    }
    let (mut device, seen) = device();
    lock(&seen.0).1 = true;
    let error = device
        .restore(with_plugged(&[[0, 1]]))
        .unwrap_err()
        .to_string();
    assert!(error.contains("out of memory"), "{error}");
}

/// Blocks of memory that is there, but for KVM.
struct Real(ChangingRam);

impl Blocks for Real {
    fn plug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let new = blocks.map(|index| memory::new_block(REGION.block(index)).unwrap());
        memory::add(&self.0, &new.collect::<Vec<_>>())
    }

    fn unplug(&mut self, blocks: Range<usize>) -> io::Result<()> {
        let addresses = blocks.map(|index| REGION.block(index).start);
        memory::take(&self.0, addresses, BLOCK).map(drop)
    }

    fn restore(&mut self, _: &[usize]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

#[test]
fn other_devices_reach_what_is_plugged_alone() {
    let base = guest_ram(16 << 20);
    let ram = ChangingRam::from(Arc::clone(&base));
    let device = Mem::new(REGION, Box::new(Real(ram.clone()))).unwrap();
    device.extent().request(u64::MAX);
    let mut bench = Bench::new(device);
    let mut guest = GuestQueue::new(&base, 1 << 20, 16, 1 << 20);
    let irq: Arc<FakeIrq> = Arc::default();
    let mut queue = Queue::new(&guest.state(), 0, ram.clone(), irq).unwrap();
    // A buffer from the end of one block to the start of the next, written and read.
    let span = |flags, next| RawDescriptor {
        address: at(1) - 8,
        length: 16,
        flags,
        next,
    };
    let publish = |guest: &mut GuestQueue| {
        guest.write_descriptor(0, span(NEXT, 1));
        guest.write_descriptor(1, span(WRITE, 0));
        guest.publish(0);
    };
    publish(&mut guest);
    assert!(matches!(queue.pop(), Err(QueueError::Buffer { .. })));
    assert_eq!(ask(&mut bench, PLUG, at(0), 1), ACK);
    publish(&mut guest);
    assert!(matches!(queue.pop(), Err(QueueError::Buffer { .. })));
    assert_eq!(ask(&mut bench, PLUG, at(1), 1), ACK);
    publish(&mut guest);
    let chain = queue.pop().unwrap().unwrap();
    let lengths = |buffers: &[crate::virtio::queue::Buffer]| -> Vec<u32> {
        buffers.iter().map(|buffer| buffer.length).collect()
    };
    assert_eq!(lengths(chain.readable()), [8, 8]);
    assert_eq!(lengths(chain.writable()), [8, 8]);
    chain.write_at(0, b"across a border!").unwrap();
    assert_eq!(&chain.read_array(0).unwrap(), b"across a border!");
    // A device that still works on a block writes to nothing that anybody sees.
    assert_eq!(ask(&mut bench, UNPLUG_ALL, 0, 0), ACK);
    chain.write_at(0, b"to nobody at all").unwrap();
    assert_eq!(ask(&mut bench, PLUG, at(0), 2), ACK);
    let seen: [u8; 16] = now(&ram).read_obj(GuestAddress(at(1) - 8)).unwrap();
    assert_eq!(seen, [0; 16]);
}

proptest! {
    /// Whatever a guest asks for: what it has is what a list of plugs and unplugs says, never
    /// more than was asked for when it was plugged.
    #[test]
    fn any_requests(
        steps in prop::collection::vec(
            (0..6_u16, prop_oneof![0..70_u64, any::<u64>()], 0..70_u16, 0..80_u64), 1..60),
    ) {
        let (device, seen) = device();
        let extent = device.extent();
        let mut bench = Bench::new(device);
        let mut model: BTreeSet<usize> = BTreeSet::new();
        for (kind, place, count, wanted) in steps {
            if kind == 5 {
                extent.request(wanted * BLOCK);
                continue;
            }
            let address = match place < 70 {
                true => at(place),
                false => place,
            };
            let (answer, _) = ask(&mut bench, kind, address, count);
            let named = REGION.named(address, count).unwrap_or(0..0);
            let before = model.len();
            match kind {
                _ if answer != 0 => {}
                PLUG => model.extend(named.clone()),
                UNPLUG => model.retain(|block| !named.contains(block)),
                UNPLUG_ALL => model.clear(),
                _ => {}
            }
            prop_assert_eq!(seen.has(), model.clone());
            prop_assert_eq!(extent.plugged(), model.len() as u64 * BLOCK);
            if model.len() > before {
                prop_assert!(extent.plugged() <= lock(&extent.sizes).requested);
            }
        }
    }
}
