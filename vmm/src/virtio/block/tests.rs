//! The disk against scripted queues.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::memory::Window;
use crate::testing::{Bench, NEXT, Part, RawDescriptor, Used, WRITE, persist_roundtrip};

const DISK_BYTES: u64 = 1 << 20;

fn spec(read_only: bool) -> BlockSpec {
    BlockSpec {
        read_only,
        serial: "scratch".to_owned(),
        durable: true,
    }
}

fn disk(read_only: bool) -> Bench<Block> {
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK_BYTES + 100).unwrap();
    file.write_all_at(b"first sector", 0).unwrap();
    Bench::new(Block::new(file, &spec(read_only)).unwrap())
}

fn header(kind: u32, sector: u64) -> Part {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(&sector.to_le_bytes());
    Part::Read(bytes)
}

fn ask(bench: &mut Bench<Block>, kind: u32, sector: u64, data: &[Part]) -> Used {
    let mut parts = vec![header(kind, sector)];
    parts.extend_from_slice(data);
    parts.push(Part::Write(1));
    bench.round_trip(0, &parts)
}

fn status(used: &Used) -> u8 {
    *used.written.last().unwrap()
}

fn segment(sector: u64, count: u32, flags: u32) -> Part {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend_from_slice(&count.to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    Part::Read(bytes)
}

#[test]
fn what_is_written_is_read_back() {
    let mut bench = disk(false);
    let data: Vec<u8> = (0..2048u32).map(|n| n as u8).collect();
    let (one, two) = data.split_at(700);
    let parts = [Part::Read(one.to_vec()), Part::Read(two.to_vec())];
    assert_eq!(status(&ask(&mut bench, REQUEST_OUT, 3, &parts)), STATUS_OK);
    assert_eq!(status(&ask(&mut bench, REQUEST_FLUSH, 0, &[])), STATUS_OK);
    let used = ask(
        &mut bench,
        REQUEST_IN,
        3,
        &[Part::Write(1000), Part::Write(1048)],
    );
    assert_eq!(used.length, 2049);
    assert_eq!(used.written[..2048], data);
    let used = ask(&mut bench, REQUEST_IN, 0, &[Part::Write(512)]);
    assert_eq!(&used.written[..12], b"first sector");
}

/// A guest writes to the disk what a file shows that it has mapped: no copy of it is in RAM.
#[test]
fn a_file_of_the_window_is_written_to_the_disk() {
    let mut bench = disk(false);
    let window = Window::reserve(16 << 20, Window::CHUNK).unwrap();
    let file = tempfile::tempfile().unwrap();
    let data: Vec<u8> = (0..8192u32).map(|n| (n / 7) as u8).collect();
    file.write_all_at(&data, 0).unwrap();
    window.show(0, &file, 0, 8192).unwrap();
    let address = window.address() + 512;
    let queue = bench.queues.remove(0);
    bench.queues.push(queue.with_window(Some(Arc::new(window))));
    let write = |bench: &mut Bench<Block>, address| {
        let guest = &mut bench.guest[0];
        let (request, status) = (guest.allocate(16), guest.allocate(1));
        let bytes = [1, 3 << 32].map(u64::to_le_bytes).concat();
        let sector = 3_u64.to_le_bytes();
        bench
            .memory
            .write_slice(&bytes[..8], GuestAddress(request))
            .unwrap();
        bench
            .memory
            .write_slice(&sector, GuestAddress(request + 8))
            .unwrap();
        let chain = [
            (request, 16, NEXT),
            (address, 4096, NEXT),
            (status, 1, WRITE),
        ];
        for (index, (address, length, flags)) in (0..).zip(chain) {
            let next = index + 1;
            guest.write_descriptor(
                index,
                RawDescriptor {
                    address,
                    length,
                    flags,
                    next,
                },
            );
        }
        guest.publish(0);
        let served = bench.kick(0);
        served.map(|()| bench.memory.read_obj::<u8>(GuestAddress(status)).unwrap())
    };
    assert_eq!(write(&mut bench, address).unwrap(), STATUS_OK);
    let used = ask(&mut bench, REQUEST_IN, 3, &[Part::Write(4096)]);
    assert_eq!(used.written[..4096], data[512..4608]);
    // What is not there stops the device, and nothing else.
    assert!(write(&mut bench, address + 8192).is_err());
}

#[test]
fn nothing_beyond_the_end_is_touched() {
    let mut bench = disk(false);
    let last = DISK_BYTES / 512 - 1;
    assert_eq!(
        status(&ask(&mut bench, REQUEST_IN, last, &[Part::Write(512)])),
        STATUS_OK
    );
    for (sector, bytes) in [
        (last, 1024),
        (last + 1, 512),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 100),
    ] {
        let used = ask(&mut bench, REQUEST_IN, sector, &[Part::Write(bytes)]);
        assert_eq!(
            (status(&used), used.length),
            (STATUS_ERROR, 0),
            "{sector} {bytes}"
        );
        let parts = [Part::Read(vec![1; bytes as usize])];
        assert_eq!(
            status(&ask(&mut bench, REQUEST_OUT, sector, &parts)),
            STATUS_ERROR
        );
        let parts = [segment(sector, bytes.div_ceil(512) + 1, 0)];
        if sector >= last {
            assert_eq!(
                status(&ask(&mut bench, REQUEST_DISCARD, sector, &parts)),
                STATUS_ERROR
            );
        }
    }
    let length = bench.device.file.metadata().unwrap().len();
    assert_eq!(length, DISK_BYTES + 100);
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let mut bench = disk(true);
    assert_ne!(bench.device.features() & READ_ONLY, 0);
    let parts = [Part::Read(vec![1; 512])];
    assert_eq!(
        status(&ask(&mut bench, REQUEST_OUT, 0, &parts)),
        STATUS_ERROR
    );
    let parts = [segment(0, 1, 0)];
    assert_eq!(
        status(&ask(&mut bench, REQUEST_DISCARD, 0, &parts)),
        STATUS_ERROR
    );
    assert_eq!(
        status(&ask(&mut bench, REQUEST_WRITE_ZEROES, 0, &parts)),
        STATUS_ERROR
    );
    let used = ask(&mut bench, REQUEST_IN, 0, &[Part::Write(512)]);
    assert_eq!(&used.written[..12], b"first sector");
}

#[test]
fn ranges_become_zero_with_and_without_their_blocks() {
    let mut bench = disk(false);
    for (kind, flags) in [
        (REQUEST_WRITE_ZEROES, 0),
        (REQUEST_WRITE_ZEROES, 1),
        (REQUEST_DISCARD, 0),
    ] {
        let parts = [Part::Read(vec![7; 8192])];
        assert_eq!(status(&ask(&mut bench, REQUEST_OUT, 8, &parts)), STATUS_OK);
        let parts = [segment(8, 8, flags)];
        assert_eq!(status(&ask(&mut bench, kind, 0, &parts)), STATUS_OK);
        let used = ask(&mut bench, REQUEST_IN, 8, &[Part::Write(8192)]);
        assert_eq!(used.written[..4096], [0; 4096]);
        assert_eq!(used.written[4096..8192], [7; 4096]);
    }
    let parts = [segment(8, 8, 1)];
    assert_eq!(
        status(&ask(&mut bench, REQUEST_DISCARD, 0, &parts)),
        STATUS_UNSUPPORTED
    );
    bench.device.write_zeroes(0, 5000).unwrap();
    let used = ask(&mut bench, REQUEST_IN, 0, &[Part::Write(512)]);
    assert_eq!(used.written[..512], [0; 512]);
}

#[test]
fn its_name_is_told_and_odd_requests_are_refused() {
    let mut bench = disk(false);
    let used = ask(&mut bench, REQUEST_GET_ID, 0, &[Part::Write(20)]);
    assert_eq!(&used.written[..8], b"scratch\0");
    assert_eq!(status(&ask(&mut bench, 77, 0, &[])), STATUS_UNSUPPORTED);
    // No status byte, a short header: the device can't even answer.
    bench.guest[0].add(&[header(REQUEST_FLUSH, 0)]);
    assert!(matches!(bench.kick(0), Err(DeviceError::Guest(_))));
    bench.guest[0].add(&[Part::Read(vec![0; 8]), Part::Write(1)]);
    assert!(matches!(
        bench.kick(0),
        Err(DeviceError::Queue(QueueError::Short { .. }))
    ));
}

#[test]
fn its_configuration_is_the_disks() {
    let bench = disk(false);
    let mut config = [0xee; 64];
    bench.device.read_config(0, &mut config);
    assert_eq!(config[..8], (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    bench.device.read_config(u64::MAX, &mut config);
    assert_eq!(config, [0; 64]);
}

#[test]
fn a_disk_of_whole_blocks_says_so() {
    for (bytes, expected) in [(1 << 20, true), ((1 << 20) + 512, false)] {
        let file = tempfile::tempfile().unwrap();
        file.set_len(bytes).unwrap();
        let disk = Block::new(file, &spec(false)).unwrap();
        assert_eq!(disk.features() & BLK_SIZE != 0, expected);
        let mut size = [0; 4];
        disk.read_config(20, &mut size);
        assert_eq!(u32::from_le_bytes(size), 4096);
    }
}

#[test]
fn what_the_host_refuses_is_an_error_and_the_disk_goes_on() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; 4096]).unwrap();
    // The host lets nothing be written to it.
    let opened = File::open(file.path()).unwrap();
    let mut bench = Bench::new(Block::new(opened, &spec(false)).unwrap());
    let written = [Part::Read(vec![1; 512])];
    assert_eq!(
        status(&ask(&mut bench, REQUEST_OUT, 0, &written)),
        STATUS_ERROR
    );
    assert_eq!(
        status(&ask(&mut bench, REQUEST_DISCARD, 0, &[segment(0, 8, 0)])),
        STATUS_ERROR
    );
    let used = ask(&mut bench, REQUEST_IN, 0, &[Part::Write(512)]);
    assert_eq!((status(&used), used.written[0]), (STATUS_OK, 7));
}

#[test]
fn its_state_survives() {
    let mut from = disk(false);
    ask(&mut from, REQUEST_OUT, 0, &[Part::Read(vec![1; 512])]);
    persist_roundtrip(&from.device, &mut disk(false).device);
    let other = disk(true).device.restore(from.device.save().unwrap());
    assert!(matches!(other, Err(RestoreError::Mismatch { .. })));
}
