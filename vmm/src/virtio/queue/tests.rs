//! Rings as a driver should make them, and as a hostile one may.

use proptest::prelude::*;
use vm_memory::Bytes;

use super::*;
use crate::testing::{FakeIrq, GuestQueue, INDIRECT, NEXT, Part, RawDescriptor, WRITE, guest_ram};

const RAM_BYTES: u64 = 4 << 20;

fn pair(size: u16) -> (GuestQueue, Queue, Arc<FakeIrq>) {
    let memory = guest_ram(RAM_BYTES as usize);
    let guest = GuestQueue::new(&memory, 0x1000, size, 2 << 20);
    let irq = Arc::new(FakeIrq::default());
    let queue = guest.device_side(0, &irq);
    (guest, queue, irq)
}

fn descriptor(address: u64, length: u32, flags: u16, next: u16) -> RawDescriptor {
    RawDescriptor {
        address,
        length,
        flags,
        next,
    }
}

/// What the device says of one chain of these descriptors, from 0 on.
fn pop(descriptors: &[RawDescriptor]) -> Result<Option<Chain>, QueueError> {
    let (mut guest, mut queue, _) = pair(8);
    for (index, descriptor) in (0..).zip(descriptors) {
        guest.write_descriptor(index, *descriptor);
    }
    guest.publish(0);
    queue.pop()
}

#[test]
fn buffers_are_read_and_written_across_their_borders() {
    let (mut guest, mut queue, irq) = pair(8);
    assert!(queue.pop().unwrap().is_none());
    for indirect in [false, true] {
        let parts = [
            Part::Read(b"hello".to_vec()),
            Part::Read(b" world".to_vec()),
            Part::Write(3),
            Part::Write(5),
        ];
        let head = if indirect {
            guest.add_indirect(&parts)
        } else {
            guest.add(&parts)
        };
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!((chain.readable_len(), chain.writable_len()), (11, 8));
        assert_eq!(&chain.read_array::<7>(2).unwrap(), b"llo wor");
        assert!(matches!(
            chain.read_array::<12>(0),
            Err(QueueError::Short { have: 11, .. })
        ));
        assert!(matches!(
            chain.read_array::<1>(usize::MAX),
            Err(QueueError::Short { .. })
        ));
        chain.write_at(2, b"abc").unwrap();
        assert!(chain.write_at(6, b"abc").is_err());
        let mut copy = Vec::new();
        chain.copy_to(6, 5, &mut copy).unwrap().unwrap();
        assert_eq!(copy, b"world");
        queue.complete(&chain, u32::MAX).unwrap();
        let used = guest.pop_used().unwrap();
        assert_eq!((used.head, used.length), (head, 8));
        assert_eq!(&used.written, b"\xaa\xaaabc\xaa\xaa\xaa");
        assert_eq!(irq.take(0), 1);
    }
}

/// A window whose first chunk shows a file of `bytes`.
fn window_of(bytes: &[u8]) -> Arc<Window> {
    let window = Window::reserve(RAM_BYTES, 2 * Window::CHUNK).unwrap();
    let file = tempfile::tempfile().unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    window.show(0, &file, 0, bytes.len() as u64).unwrap();
    Arc::new(window)
}

#[test]
fn what_the_window_shows_is_read_and_never_written() {
    let window = window_of(b"some file");
    let (there, end) = (window.address(), window.address() + window.length());
    let pop = |descriptors: &[RawDescriptor]| {
        let (mut guest, queue, _) = pair(8);
        guest.write_descriptor(0, descriptor(0x20_0000, 4, NEXT, 1));
        for (index, descriptor) in (1..).zip(descriptors) {
            guest.write_descriptor(index, *descriptor);
        }
        guest.publish(0);
        queue.with_window(Some(Arc::clone(&window))).pop()
    };
    let chain = pop(&[descriptor(there + 5, 4, 0, 0)]).unwrap().unwrap();
    let mut bytes = [7; 8];
    chain.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"\0\0\0\0file");
    assert!(chain.reaches_window());
    let mut copied = Vec::new();
    chain.copy_to(4, 4, &mut copied).unwrap().unwrap();
    assert_eq!(copied, b"file");
    // A buffer to be written, one that ends beyond the window, one before it.
    for refused in [
        descriptor(there, 4, WRITE, 0),
        descriptor(end - 2, 4, 0, 0),
        descriptor(there - 2, 4, 0, 0),
        descriptor(u64::MAX - 2, 2, 0, 0),
    ] {
        assert!(matches!(pop(&[refused]), Err(QueueError::Buffer { .. })));
    }
    // Where nothing is shown there is nothing to be read.
    let empty = pop(&[descriptor(end - 4, 4, 0, 0)]).unwrap().unwrap();
    assert!(matches!(
        empty.read_at(0, &mut bytes),
        Err(QueueError::Window(_))
    ));
    // Without a window it is as any other address outside RAM.
    let alone = [descriptor(there, 4, 0, 0)];
    assert!(matches!(self::pop(&alone), Err(QueueError::Buffer { .. })));
}

#[test]
fn chains_handed_back_together_raise_one_interrupt_if_it_was_asked_for_among_them() {
    for (event, raised) in [(7, 0), (8, 0), (9, 1), (10, 1), (11, 1), (12, 0)] {
        let memory = guest_ram(RAM_BYTES as usize);
        let mut guest = GuestQueue::new(&memory, 0x1000, 4, 2 << 20);
        guest.use_event_idx();
        let irq = Arc::new(FakeIrq::default());
        let mut queue = guest.device_side(0, &irq);
        // Three times three, then the three that count, round the ring's end.
        for round in 0..4 {
            if round == 3 {
                guest.set_used_event(event);
                irq.take(0);
            }
            let heads: Vec<_> = (0..3).map(|_| guest.add(&[Part::Write(8)])).collect();
            let chains: Vec<_> = (1..4)
                .map(|written| (queue.pop().unwrap().unwrap(), written))
                .collect();
            assert_eq!(guest.pop_used(), None);
            queue.complete_together(&chains).unwrap();
            for (head, written) in heads.into_iter().zip(1..) {
                let used = guest.pop_used().unwrap();
                assert_eq!((used.head, used.length), (head, written));
            }
        }
        assert_eq!(irq.take(0), raised, "{event}");
    }
    let (mut guest, mut queue, irq) = pair(8);
    guest.add(&[Part::Write(8)]);
    guest.set_avail_flags(1);
    let chain = queue.pop().unwrap().unwrap();
    queue.complete_together(&[(chain, 100)]).unwrap();
    assert_eq!(guest.pop_used().unwrap().length, 8);
    assert_eq!(irq.take(0), 0);
}

#[test]
fn broken_chains_are_refused() {
    let ok = descriptor(0x30_0000, 16, 0, 0);
    let next = |to| descriptor(0x30_0000, 16, NEXT, to);
    assert!(pop(&[ok]).unwrap().is_some());
    // A loop, a next one out of the table.
    assert!(matches!(pop(&[next(0)]), Err(QueueError::Malformed(0))));
    assert!(matches!(
        pop(&[next(1), next(0)]),
        Err(QueueError::Malformed(0))
    ));
    assert!(matches!(pop(&[next(8)]), Err(QueueError::Malformed(0))));
    // Buffers outside RAM, wrapping, empty.
    for (address, length) in [
        (RAM_BYTES, 1),
        (RAM_BYTES - 1, 2),
        (u64::MAX, 2),
        (0, u32::MAX),
    ] {
        let outside = descriptor(address, length, 0, 0);
        assert!(
            matches!(pop(&[outside]), Err(QueueError::Buffer { .. })),
            "{address:#x}"
        );
    }
    assert!(matches!(
        pop(&[descriptor(0x1000, 0, 0, 0)]),
        Err(QueueError::Empty(0))
    ));
    // Readable behind writable.
    let writable = descriptor(0x30_0000, 16, WRITE | NEXT, 1);
    assert!(matches!(pop(&[writable, ok]), Err(QueueError::Order(0))));
}

#[test]
fn broken_indirect_tables_are_refused() {
    let (mut guest, mut queue, _) = pair(8);
    let ok = descriptor(0x30_0000, 16, 0, 0);
    // Nested, ragged, empty, outside RAM.
    guest.add_indirect_table(&[descriptor(0x1000, 16, INDIRECT, 0)]);
    assert!(matches!(queue.pop(), Err(QueueError::Malformed(_))));
    for (address, length) in [
        (0x1000, 17),
        (0x1000, 0),
        (RAM_BYTES, 16),
        (u64::MAX - 3, 16),
    ] {
        guest.write_descriptor(7, descriptor(address, length, INDIRECT, 0));
        guest.publish(7);
        assert!(
            matches!(queue.pop(), Err(QueueError::Malformed(7))),
            "{address:#x} {length}"
        );
    }
    // One that loops within itself, one that is longer than anybody needs.
    guest.add_indirect_table(&[descriptor(0x30_0000, 16, NEXT, 0)]);
    assert!(matches!(queue.pop(), Err(QueueError::Malformed(_))));
    let mut long: Vec<_> = (1..=1100)
        .map(|next| descriptor(0x30_0000, 16, NEXT, next))
        .collect();
    long.push(ok);
    guest.add_indirect_table(&long);
    assert!(matches!(queue.pop(), Err(QueueError::TooLong(_))));
}

#[test]
fn broken_rings_are_refused() {
    let (mut guest, mut queue, _) = pair(8);
    guest.publish(8);
    assert!(matches!(queue.pop(), Err(QueueError::Malformed(8))));
    guest.publish(u16::MAX);
    assert!(queue.pop().is_err());
    // More available than the ring holds.
    guest.set_avail_index(100);
    assert!(matches!(queue.pop(), Err(QueueError::Ring(_))));
    // Rings that aren't in RAM, or never set, or misaligned.
    let memory = guest_ram(RAM_BYTES as usize);
    for (desc_table, avail_ring, used_ring) in [
        (0, 0x2000, 0x3000),
        (0x1000, 0x2000, RAM_BYTES),
        (0x1000, RAM_BYTES - 20, 0x3000),
        (RAM_BYTES - 64, 0x2000, 0x3000),
        (0x1001, 0x2000, 0x3000),
        (u64::MAX - 15, 0x2000, 0x3000),
    ] {
        let state = QueueState {
            desc_table,
            avail_ring,
            used_ring,
            ..guest.state()
        };
        let irq: Arc<dyn Interrupt> = Arc::new(FakeIrq::default());
        assert!(
            Queue::new(&state, 0, Arc::clone(&memory), irq).is_err(),
            "{state:?}"
        );
    }
}

#[test]
fn interrupts_come_when_the_ring_asks() {
    let (mut guest, mut queue, irq) = pair(8);
    guest.set_avail_flags(1);
    let chain = |guest: &mut GuestQueue, queue: &mut Queue| {
        guest.add(&[Part::Write(1)]);
        let chain = queue.pop().unwrap().unwrap();
        queue.complete(&chain, 0).unwrap();
        guest.pop_used().unwrap();
    };
    chain(&mut guest, &mut queue);
    assert_eq!(irq.take(0), 0);
    guest.set_avail_flags(0);
    chain(&mut guest, &mut queue);
    assert_eq!(irq.take(0), 1);
    // With event indices: only at the entry asked for.
    let (mut guest, _, _) = pair(8);
    guest.use_event_idx();
    let mut queue = guest.device_side(0, &irq);
    guest.set_used_event(2);
    let raised: Vec<usize> = (0..5)
        .map(|_| {
            chain(&mut guest, &mut queue);
            irq.take(0)
        })
        .collect();
    assert_eq!(raised, [0, 0, 1, 0, 0]);
}

#[test]
fn a_queue_goes_on_where_another_stood() {
    let (mut guest, mut queue, irq) = pair(4);
    for round in 0..10u8 {
        guest.add(&[Part::Read(vec![round])]);
        let chain = queue.pop().unwrap().unwrap();
        assert_eq!(chain.read_array(0).unwrap(), [round]);
        queue.complete(&chain, 0).unwrap();
        assert!(guest.pop_used().is_some());
        let text = serde_json::to_string(&queue.state()).unwrap();
        let state: QueueState = serde_json::from_str(&text).unwrap();
        let irq: Arc<dyn Interrupt> = Arc::<FakeIrq>::clone(&irq);
        queue = Queue::new(&state, 0, queue.memory(), irq).unwrap();
    }
    assert_eq!(queue.position(), 10);
    let unused = queue.pop().unwrap();
    assert!(unused.is_none());
    guest.add(&[Part::Read(vec![1])]);
    let chain = queue.pop().unwrap().unwrap();
    queue.unpop(chain);
    assert!(queue.pop().unwrap().is_some());
}

#[test]
fn what_a_guest_rewrites_changes_no_bounds() {
    let (mut guest, mut queue, _) = pair(8);
    guest.add(&[Part::Read(b"first".to_vec()), Part::Write(4)]);
    let chain = queue.pop().unwrap().unwrap();
    guest.write_descriptor(0, descriptor(u64::MAX, u32::MAX, WRITE, 0));
    guest.write_descriptor(1, descriptor(0, u32::MAX, WRITE, 0));
    assert_eq!(&chain.read_array::<5>(0).unwrap(), b"first");
    chain.write_at(0, b"okay").unwrap();
    assert!(chain.write_at(4, b"!").is_err());
}

/// Descriptors that are near what a driver makes, so that all paths are walked.
fn any_descriptor() -> impl Strategy<Value = RawDescriptor> {
    let address = prop_oneof![0..RAM_BYTES, RAM_BYTES - 64..RAM_BYTES + 64, any::<u64>()];
    let length = prop_oneof![0..64u32, 0..0x2000u32, any::<u32>()];
    (address, length, 0..8u16, 0..10u16)
        .prop_map(|(address, length, flags, next)| descriptor(address, length, flags, next))
}

proptest! {
    #[test]
    fn no_ring_makes_a_device_leave_guest_memory(
        table in prop::collection::vec(any_descriptor(), 8),
        indirect in prop::collection::vec(any_descriptor(), 1..20),
        heads in prop::collection::vec(0..10u16, 1..8),
        jump in prop::option::of(any::<u16>()),
    ) {
        let (mut guest, mut queue, _) = pair(8);
        let memory = queue.memory();
        for (index, descriptor) in (0..).zip(&table) {
            guest.write_descriptor(index, *descriptor);
        }
        guest.add_indirect_table(&indirect);
        for head in heads {
            guest.publish(head);
        }
        if let Some(index) = jump {
            guest.set_avail_index(index);
        }
        // A device stops at the first error; here it goes on, to see more.
        for _ in 0..20 {
            let Ok(popped) = queue.pop() else { continue };
            let Some(chain) = popped else { break };
            prop_assert!(chain.readable().len() + chain.writable().len() <= MAX_CHAIN_DESCRIPTORS);
            let all = chain.readable().iter().chain(chain.writable());
            for buffer in all {
                prop_assert!(buffer.length > 0);
                prop_assert!(memory.check_range(buffer.address, buffer.length as usize));
            }
            let sum = |buffers: &[Buffer]| buffers.iter().map(|b| u64::from(b.length)).sum::<u64>();
            prop_assert_eq!(sum(chain.readable()), u64::from(chain.readable_len()));
            prop_assert_eq!(sum(chain.writable()), u64::from(chain.writable_len()));
            let _ = chain.copy_to(0, chain.readable_len().min(9000) as usize, &mut std::io::sink());
            let _ = chain.write_at(0, &vec![1; chain.writable_len().min(64) as usize]);
            queue.complete(&chain, chain.writable_len()).unwrap();
        }
    }

    #[test]
    fn spans_are_the_bytes_asked_for(
        lengths in prop::collection::vec(1..50u32, 1..6),
        offset in 0..300usize,
        length in 0..300usize,
    ) {
        let (mut guest, mut queue, _) = pair(8);
        let bytes: Vec<u8> = (0..lengths.iter().sum::<u32>()).map(|n| n as u8).collect();
        let mut rest = bytes.as_slice();
        let parts: Vec<Part> = lengths.iter().map(|length| {
            let (part, left) = rest.split_at(*length as usize);
            rest = left;
            Part::Read(part.to_vec())
        }).collect();
        guest.add(&parts);
        let chain = queue.pop().unwrap().unwrap();
        let mut data = vec![0; length];
        match bytes.get(offset..offset + length) {
            Some(wanted) => {
                chain.read_at(offset, &mut data).unwrap();
                prop_assert_eq!(data, wanted);
                for (address, count) in chain.readable_spans(offset, length).unwrap() {
                    let mut piece = vec![0; count];
                    queue.memory().read_slice(&mut piece, address).unwrap();
                    prop_assert!(bytes.windows(count).any(|window| window == piece));
                }
            }
            None => prop_assert!(chain.read_at(offset, &mut data).is_err()),
        }
    }
}
