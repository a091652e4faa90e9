//! Guests whose memory grows and shrinks, and one that uses memory that nobody gave it.

use std::fs;
use std::time::Instant;

use hull_vmm::machine::Machine;
use hull_vmm::memory::place_of_blocks;
use hull_vmm::outcome::VmExit;
use hull_vmm::spec::{DeviceSpec, MemSpec, MemoryBacking, MemorySpec, VmSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::window::{BUSYBOX, initrd};
use super::{PATIENCE, Paper, RESET, built_kernel, have_kvm, host, kernel_of};

const RAM_BYTES: u64 = 128 << 20;
const REGION_BYTES: u64 = 1 << 30;

fn machine(kernel: fs::File, initrd: Option<fs::File>) -> (Machine, Paper) {
    let paper = Paper::default();
    let mut host = host(Some(kernel), None, &paper);
    host.initrd = initrd;
    let spec = VmSpec {
        vcpus: 1,
        memory: MemorySpec {
            size_bytes: RAM_BYTES,
            backing: MemoryBacking::Anonymous,
        },
        kernel_cmdline: "console=hvc0 reboot=k panic=-1 quiet \
            memory_hotplug.online_policy=auto-movable"
            .to_owned(),
        devices: vec![
            DeviceSpec::Console,
            DeviceSpec::Mem(MemSpec {
                region_bytes: REGION_BYTES,
            }),
        ],
        debug_serial: false,
    };
    let mut machine = Machine::build(spec.validate().unwrap(), host).unwrap();
    machine.start().unwrap();
    (machine, paper)
}

fn await_plugged(machine: &Machine, paper: &Paper, bytes: u64) {
    let extent = machine.extent().unwrap();
    let until = Instant::now() + PATIENCE;
    while extent.plugged() != bytes {
        let left = until.saturating_duration_since(Instant::now());
        assert!(
            !left.is_zero(),
            "{} of {bytes} bytes; {:?} {}",
            extent.plugged(),
            extent.refusal(),
            String::from_utf8_lossy(&paper.text())
        );
        let changed = extent.changed();
        let mut fds = [PollFd::new(&changed, PollFlags::IN)];
        let _ready = poll(&mut fds, Timespec::try_from(left).ok().as_ref()).unwrap();
        extent.hear();
    }
}

fn await_word(paper: &Paper, word: &str) {
    while !String::from_utf8_lossy(&paper.text()).contains(word) {
        paper.wait_for_more_than(paper.text().len());
    }
}

#[test]
fn a_guest_takes_what_it_is_given_and_gives_it_back() {
    let Some(kernel) = built_kernel() else { return };
    let init = "#!/bin/busybox sh\n\
        busybox mount -t proc p /proc; busybox mount -t devtmpfs d /dev\n\
        total() { busybox grep MemTotal /proc/meminfo | busybox tr -dc 0-9; }\n\
        until [ $(total) -gt 300000 ]; do busybox sleep 0.1; done\n\
        busybox dd if=/dev/zero of=/dev/null bs=200M count=1 && echo filled\n\
        until [ $(total) -lt 140000 ]; do busybox sleep 0.1; done\n\
        busybox reboot -f\n";
    let busybox = fs::read(BUSYBOX).unwrap();
    let root = initrd(&[
        ("bin", 0o40_755, b""),
        ("dev", 0o40_755, b""),
        ("proc", 0o40_755, b""),
        ("bin/busybox", 0o100_755, &busybox),
        ("init", 0o100_755, init.as_bytes()),
    ]);
    let (mut machine, paper) = machine(kernel, Some(root));
    machine.request_memory(256 << 20);
    await_plugged(&machine, &paper, 256 << 20);
    await_word(&paper, "filled");
    machine.pause();
    let image = machine.memory_image().unwrap();
    let filled: u64 = image.filled().iter().map(|r| r.end - r.start).sum();
    assert!(filled > 200 << 20, "{filled}");
    drop(image);
    machine.resume();
    machine.request_memory(0);
    await_plugged(&machine, &paper, 0);
    assert_eq!(machine.memory_image().unwrap().length(), RAM_BYTES);
    let end = machine.wait_for(PATIENCE);
    let said = String::from_utf8_lossy(&paper.text()).into_owned();
    assert_eq!(end, Some(VmExit::Reset), "{said}");
}

#[test]
fn memory_that_is_not_plugged_holds_nothing() {
    if !have_kvm() {
        return;
    }
    const LARGE_PRESENT_WRITABLE: u64 = 0x83;
    const LARGE: u64 = 2 << 20;
    const PAGES: u32 = 16 * 512;
    let place = place_of_blocks(RAM_BYTES, 0);
    let mut program = Vec::new();
    // The boot's page tables begin at 0x9000; the page at 0xc000 is nobody's. It maps 32 MiB of
    // what could be plugged, at 1 GiB of the guest's addresses.
    let entries = (0..16).map(|n| (0xc000 + 8 * n, place + u64::from(n) * LARGE));
    let entries = entries.map(|(at, page)| (at, page | LARGE_PRESENT_WRITABLE));
    for (at, entry) in entries.chain([(0xa008_u32, 0xc003)]) {
        // mov rax, entry; mov [at], rax
        program.extend([0x48, 0xb8]);
        program.extend(entry.to_le_bytes());
        program.extend([0x48, 0x89, 0x04, 0x25]);
        program.extend(at.to_le_bytes());
    }
    // mov edi, 0x40000000; mov ecx, PAGES; again: mov [rdi], al; add edi, 0x1000; loop again
    program.extend([0xbf, 0, 0, 0, 0x40, 0xb9]);
    program.extend(PAGES.to_le_bytes());
    program.extend([0x88, 0x07, 0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xf6]);
    // mov byte [0x40000000], 7; cmp byte [0x40000000], 7; jne over; ud2; over:
    program.extend([0xc6, 0x04, 0x25, 0, 0, 0, 0x40, 7]);
    program.extend([0x80, 0x3c, 0x25, 0, 0, 0, 0x40, 7, 0x75, 2, 0x0f, 0x0b]);
    program.extend(RESET);
    let (mut machine, _) = machine(kernel_of(&program), None);
    let end = machine.wait_for(PATIENCE).expect("the guest doesn't end");
    assert_eq!(end, VmExit::Reset);
    assert_eq!(machine.memory_image().unwrap().length(), RAM_BYTES);
}
