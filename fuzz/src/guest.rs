//! A hostile driver whose every move is the input's.
//!
//! Owns: the moves, and keeping them within the scripted ring's room. Refuses: knowing any device.

use hull_vmm::testing::{Bench, GuestQueue, Part, RawDescriptor};
use hull_vmm::virtio::device::{Readiness, VirtioDevice};

/// Most moves of one input.
const MOVES: usize = 64;
/// Bytes of buffers that one queue's room holds beside its ring.
const ROOM_BYTES: usize = 512 << 10;
/// Largest buffer.
const BUFFER_BYTES: usize = 8 << 10;
/// Most parts of one chain.
const PARTS: usize = 6;

/// Takes an input apart; all of it read, it gives zeroes.
pub(crate) struct Input<'a>(pub(crate) &'a [u8]);

impl<'a> Input<'a> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        head
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let given = self.bytes(N);
        array[..given.len()].copy_from_slice(given);
        array
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    pub(crate) fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    pub(crate) fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    pub(crate) fn long(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// Parts of a chain, at least one, and how many bytes they take.
    fn parts(&mut self) -> (Vec<Part>, usize) {
        let mut parts = Vec::new();
        let mut bytes = 0;
        for _ in 0..1 + usize::from(self.byte()) % PARTS {
            let kind = self.short();
            let length = usize::from(kind >> 1) % BUFFER_BYTES;
            parts.push(match kind & 1 {
                0 => Part::Read(self.bytes(length).to_vec()),
                _ => Part::Write(length as u32),
            });
            bytes += length.next_multiple_of(16);
        }
        (parts, bytes)
    }

    fn descriptor(&mut self) -> RawDescriptor {
        RawDescriptor {
            address: match self.byte() {
                // Somewhere in RAM, or just past it, or anywhere.
                near if near < 200 => u64::from(near) << 16 | u64::from(self.short()),
                _ => self.long(),
            },
            length: self.word(),
            flags: self.short(),
            next: self.short(),
        }
    }
}

/// Plays `input` against a device. `allowed` sees each chain before it is added.
pub(crate) fn play<D: VirtioDevice>(
    bench: &mut Bench<D>,
    mut input: Input<'_>,
    allowed: impl Fn(&[Part]) -> bool,
) {
    let count = bench.guest.len();
    let mut room = vec![ROOM_BYTES; count];
    for _ in 0..MOVES {
        if input.is_empty() {
            break;
        }
        let choice = input.byte();
        let index = usize::from(choice >> 4) % count;
        let queue = &mut bench.guest[index];
        match choice & 15 {
            0..=7 => {
                let (parts, bytes) = input.parts();
                if bytes + 256 > room[index] || !allowed(&parts) {
                    continue;
                }
                room[index] -= bytes + 256;
                match choice & 1 {
                    0 => queue.add(&parts),
                    _ => queue.add_indirect(&parts),
                };
            }
            8 => table(queue, &mut input, &mut room[index]),
            9 => {
                let place = input.short() % queue.state().size;
                queue.write_descriptor(place, input.descriptor());
                queue.publish(place);
            }
            10 => queue.publish(input.short()),
            11 => queue.set_avail_index(input.short()),
            12 => {
                bench.device.reset();
                // The ring stays as it is: a driver may go on as if nothing had been.
            }
            13 => {
                let (offset, mut data) = (input.long(), [0; 8]);
                bench.device.read_config(offset, &mut data);
                bench.device.write_config(offset, &data);
            }
            14 => event(bench, &mut input),
            _ => {}
        }
        // Guests break rules: the device says so, and the next one must find it whole.
        let _ = bench.kick(index);
        drain(&mut bench.guest[index]);
    }
}

fn table(queue: &mut GuestQueue, input: &mut Input<'_>, room: &mut usize) {
    let entries = 1 + usize::from(input.byte()) % PARTS;
    if *room > 256 {
        *room -= 256;
        let table: Vec<_> = (0..entries).map(|_| input.descriptor()).collect();
        queue.add_indirect_table(&table);
    }
}

fn event<D: VirtioDevice>(bench: &mut Bench<D>, input: &mut Input<'_>) {
    let bits = input.byte();
    let readiness = Readiness {
        readable: bits & 1 != 0,
        writable: bits & 2 != 0,
        hangup: bits & 4 != 0,
    };
    let watched = bench.wakers.tokens();
    let token = match watched.get(usize::from(bits >> 3) % watched.len().max(1)) {
        Some(token) if bits & 128 == 0 => *token,
        _ => input.word(),
    };
    let _ = bench.device.on_event(token, readiness, &mut bench.queues);
}

/// A used entry names a chain of the ring and says no more than it could hold.
fn drain(queue: &mut GuestQueue) {
    for _ in 0..usize::from(queue.state().size) {
        match queue.pop_used() {
            None => break,
            Some(used) => assert!(used.head < queue.state().size),
        }
    }
}
