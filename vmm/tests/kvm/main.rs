//! The machine on real KVM, with guests of a few instructions: how each of them ends, and
//! that none of them can keep the machine from standing still.
//!
//! A /dev/kvm without vmx or svm in the processor emulates guests instruction by
//! instruction: the tests are skipped there, and say so. `HULL_REQUIRE_KVM=1` makes a skip
//! a failure.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "test code: a failure is the test's"
)]

mod memory;
mod window;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use hull_vmm::machine::{BuildError, Host, Machine};
use hull_vmm::memory::WorkingSet;
use hull_vmm::outcome::VmExit;
use hull_vmm::spec::{Checked, DeviceSpec, MemoryBacking, MemorySpec, VmSpec, VsockSpec};
use hull_vmm::virtio::fs::{FsLimits, FsRole};

/// Longer than anything takes in here, on however slow a machine.
const PATIENCE: Duration = Duration::from_secs(60);
/// How fast a machine has to stop.
const PROMPT: Duration = Duration::from_secs(1);
const LOAD_ADDRESS: u64 = 0x100_0000;

fn have_kvm() -> bool {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap();
    let real = cpuinfo
        .lines()
        .find(|line| line.starts_with("flags"))
        .is_some_and(|line| line.split(' ').any(|flag| flag == "vmx" || flag == "svm"));
    let have = real
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok();
    if !have {
        let required = std::env::var_os("HULL_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(
            !required,
            "HULL_REQUIRE_KVM is set, but there is no real KVM here"
        );
        eprintln!("SKIPPED: no real KVM here");
    }
    have
}

/// What the guest printed, to be waited for.
#[derive(Clone, Default)]
struct Paper(Arc<(Mutex<Vec<u8>>, Condvar)>);

impl Write for Paper {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.0.lock().unwrap().extend_from_slice(bytes);
        self.0.1.notify_all();
        Ok(bytes.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Paper {
    fn text(&self) -> Vec<u8> {
        self.0.0.lock().unwrap().clone()
    }

    fn wait_for_more_than(&self, count: usize) {
        let printed = self.0.0.lock().unwrap();
        let (printed, timeout) = self
            .0
            .1
            .wait_timeout_while(printed, PATIENCE, |printed| printed.len() <= count)
            .unwrap();
        assert!(!timeout.timed_out(), "only {} bytes printed", printed.len());
    }
}

/// A kernel that is `code`, entered at its first byte in 64-bit mode.
fn kernel_of(code: &[u8]) -> File {
    let mut image = vec![0u8; 0x1000];
    image[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1]);
    image[16..20].copy_from_slice(&[2, 0, 62, 0]);
    image[24..32].copy_from_slice(&LOAD_ADDRESS.to_le_bytes());
    image[32..40].copy_from_slice(&64u64.to_le_bytes());
    image[54..58].copy_from_slice(&[56, 0, 1, 0]);
    image[64..68].copy_from_slice(&1u32.to_le_bytes());
    image[72..80].copy_from_slice(&0x1000u64.to_le_bytes());
    image[88..96].copy_from_slice(&LOAD_ADDRESS.to_le_bytes());
    for size in [96, 104] {
        image[size..size + 8].copy_from_slice(&(code.len() as u64).to_le_bytes());
    }
    image.extend_from_slice(code);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&image).unwrap();
    file
}

fn spec(vcpus: u8, size_bytes: u64, backing: MemoryBacking) -> Checked<VmSpec> {
    let spec = VmSpec {
        vcpus,
        memory: MemorySpec {
            size_bytes,
            backing,
        },
        kernel_cmdline: "console=hvc0 reboot=k panic=-1".to_owned(),
        devices: vec![
            DeviceSpec::Vsock(VsockSpec { guest_cid: 3 }),
            DeviceSpec::Console,
            DeviceSpec::Rng,
        ],
        debug_serial: true,
    };
    spec.validate().unwrap()
}

fn host(kernel: Option<File>, memory: Option<File>, paper: &Paper) -> Host {
    Host {
        kvm: File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .unwrap()
            .into(),
        kernel,
        initrd: None,
        memory,
        working_set: None,
        console: Box::new(paper.clone()),
        console_input: None,
        blocks: Vec::new(),
        taps: Vec::new(),
        vsock_ports: BTreeMap::new(),
        fs_exports: Vec::new(),
        fs_role: FsRole::Own,
        fs_limits: FsLimits::default(),
    }
}

fn machine_with(kernel: File, vcpus: u8, size_bytes: u64) -> (Machine, Paper) {
    let paper = Paper::default();
    let spec = spec(vcpus, size_bytes, MemoryBacking::Anonymous);
    (
        Machine::build(spec, host(Some(kernel), None, &paper)).unwrap(),
        paper,
    )
}

/// Starts a machine whose memory is in a file, waits until it has printed, pauses it and
/// takes its state; then the machine is gone.
fn saved(kernel: File, vcpus: u8) -> (Vec<u8>, File, Vec<u8>) {
    let paper = Paper::default();
    let spec = spec(vcpus, 128 << 20, MemoryBacking::Shared);
    let mut machine = Machine::build(spec, host(Some(kernel), None, &paper)).unwrap();
    assert!(
        machine.save().is_err(),
        "a machine that never ran has a state"
    );
    machine.start().unwrap();
    paper.wait_for_more_than(10);
    assert!(machine.save().is_err(), "a running machine has a state");
    machine.pause();
    let state = rmp_serde::to_vec(&machine.save().unwrap()).unwrap();
    let memory = machine.memory_file().unwrap().try_clone().unwrap();
    (state, memory, paper.text())
}

fn copy_of(
    state: &[u8],
    memory: &File,
    vcpus: u8,
    working_set: Option<WorkingSet>,
) -> (Machine, Paper) {
    let paper = Paper::default();
    let spec = spec(vcpus, 128 << 20, MemoryBacking::Template);
    let mut host = host(None, Some(memory.try_clone().unwrap()), &paper);
    host.working_set = working_set;
    let state = rmp_serde::from_slice(state).unwrap();
    let mut machine = Machine::restore(spec, host, state).unwrap();
    machine.start().unwrap();
    (machine, paper)
}

fn started(code: &[u8]) -> (Machine, Paper) {
    let (mut machine, paper) = machine_with(kernel_of(code), 1, 64 << 20);
    machine.start().unwrap();
    (machine, paper)
}

fn end_of(code: &[u8]) -> (VmExit, Vec<u8>) {
    let (mut machine, paper) = started(code);
    let exit = machine.wait_for(PATIENCE).expect("the guest doesn't end");
    (exit, paper.text())
}

/// `mov al, 0xfe; out 0x64, al; hlt; jmp -3`
const RESET: [u8; 7] = [0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// `mov dx, 0x3f8`
const TO_SERIAL: [u8; 4] = [0x66, 0xba, 0xf8, 0x03];

#[test]
fn ends_are_told_apart() {
    if !have_kvm() {
        return;
    }
    assert_eq!(end_of(&RESET).0, VmExit::Reset);
    // mov dx, 0x600; mov al, 0x34; out dx, al; hlt; jmp -3
    let shutdown = [0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4, 0xeb, 0xfd];
    assert_eq!(end_of(&shutdown).0, VmExit::Shutdown);
    // sub rsp, 16; mov qword [rsp], 0; mov qword [rsp+8], 0; lidt [rsp]; ud2
    let mut triple = vec![0x48, 0x83, 0xec, 0x10, 0x48, 0xc7, 0x04, 0x24, 0, 0, 0, 0];
    triple.extend([
        0x48, 0xc7, 0x44, 0x24, 0x08, 0, 0, 0, 0, 0x0f, 0x01, 0x1c, 0x24, 0x0f, 0x0b,
    ]);
    assert_eq!(end_of(&triple).0, VmExit::TripleFault);
}

#[test]
fn ports_and_memory_without_a_device_are_answered() {
    if !have_kvm() {
        return;
    }
    // mov rsi, text; mov dx, 0x3f8; mov ecx, 5; cld; rep outsb: one exit, five accesses.
    let text_at = LOAD_ADDRESS + 0x80;
    let mut code = vec![0x48, 0xbe];
    code.extend(text_at.to_le_bytes());
    code.extend(TO_SERIAL);
    code.extend([0xb9, 5, 0, 0, 0, 0xfc, 0xf3, 0x6e]);
    // in al, 0x64; add al, 'A'; out dx, al: the controller has nothing to say.
    code.extend([0xe4, 0x64, 0x04, b'A', 0xee]);
    // mov eax, [0x20000000]; not eax; add al, 'B'; out dx, al: nobody there, all ones.
    code.extend([
        0x8b, 0x04, 0x25, 0, 0, 0, 0x20, 0xf7, 0xd0, 0x04, b'B', 0xee,
    ]);
    code.extend(RESET);
    code.resize(0x80, 0);
    code.extend(b"hello");
    assert_eq!(end_of(&code), (VmExit::Reset, b"helloAB".to_vec()));
}

#[test]
fn no_guest_holds_the_machine_back() {
    if !have_kvm() {
        return;
    }
    let guests: [(&str, &[u8]); 4] = [
        ("spins", &[0xeb, 0xfe]),
        ("sleeps without interrupts", &[0xfa, 0xf4, 0xeb, 0xfd]),
        ("reads a port for ever", &[0xe4, 0x80, 0xeb, 0xfc]),
        (
            "reads a device that isn't there",
            &[0x8b, 0x04, 0x25, 0, 0, 0, 0x20, 0xeb, 0xf7],
        ),
    ];
    for (what, code) in guests {
        let (mut machine, _) = started(code);
        assert_eq!(machine.wait_for(Duration::from_millis(50)), None, "{what}");
        for _ in 0..3 {
            machine.pause();
            machine.resume();
        }
        let begin = Instant::now();
        machine.stop();
        assert!(begin.elapsed() < PROMPT, "{what}: {:?}", begin.elapsed());
        assert_eq!(machine.wait(), VmExit::Stopped);
    }
}

#[test]
fn a_paused_guest_does_nothing_and_goes_on() {
    if !have_kvm() {
        return;
    }
    // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp -3
    let mut code = TO_SERIAL.to_vec();
    code.extend([0xb0, b'x', 0xee, 0xeb, 0xfd]);
    let (machine, paper) = started(&code);
    for _ in 0..5 {
        paper.wait_for_more_than(paper.text().len());
        machine.pause();
        let before = paper.text().len();
        assert_eq!(machine.outcome().wait_for(Duration::from_millis(20)), None);
        assert_eq!(paper.text().len(), before);
        machine.resume();
        paper.wait_for_more_than(before);
    }
}

#[test]
fn machines_come_and_go_without_a_trace() {
    if !have_kvm() {
        return;
    }
    let count = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    drop(started(&RESET));
    // Tests run side by side: only growth that keeps going is a leak.
    let before = count();
    for _ in 0..20 {
        drop(machine_with(kernel_of(&RESET), 4, 64 << 20));
        drop(started(&[0xeb, 0xfe]));
    }
    assert!(
        count() < before + 100,
        "{before} descriptors before, {} after",
        count()
    );
}

#[test]
fn copies_go_on_where_the_saved_machine_stood() {
    if !have_kvm() {
        return;
    }
    // mov dx, 0x3f8; xor al, al; out dx, al; inc al; jmp -5: counts in a register.
    let mut code = TO_SERIAL.to_vec();
    code.extend([0x30, 0xc0, 0xee, 0xfe, 0xc0, 0xeb, 0xfb]);
    let (state, memory, printed) = saved(kernel_of(&code), 1);
    for _ in 0..2 {
        let (_machine, paper) = copy_of(&state, &memory, 1, None);
        paper.wait_for_more_than(10);
        let all = [printed.clone(), paper.text()].concat();
        assert!(
            all.windows(2)
                .all(|pair| pair[1] == pair[0].wrapping_add(1))
        );
    }
    // Another machine's state is refused.
    let host = host(None, Some(memory), &Paper::default());
    let spec = spec(2, 128 << 20, MemoryBacking::Template);
    let refused = Machine::restore(spec, host, rmp_serde::from_slice(&state).unwrap());
    assert!(matches!(refused, Err(BuildError::Restore(_))));
}

/// A whole kernel, where one is built: it comes up on any number of vCPUs and any memory,
/// finds its devices, and says why it can't go on without a root.
#[test]
fn a_kernel_comes_up() {
    let Some(kernel) = built_kernel() else { return };
    for (vcpus, size_bytes) in [(1, 64 << 20), (3, 6 << 30)] {
        let (mut machine, paper) = machine_with(kernel.try_clone().unwrap(), vcpus, size_bytes);
        machine.start().unwrap();
        wait_for_missing_root(&mut machine, &paper);
    }
}

/// A kernel saved in the middle of its start comes up in every copy: timers, interrupts and
/// rings go on. What the first one touched is seen, the second finds it ready, and a set that is
/// no copy's is passed over.
#[test]
fn a_saved_kernel_comes_up_in_copies() {
    let Some(kernel) = built_kernel() else { return };
    for vcpus in [1, 2] {
        let (state, memory, _) = saved(kernel.try_clone().unwrap(), vcpus);
        let (mut machine, paper) = copy_of(&state, &memory, vcpus, None);
        wait_for_missing_root(&mut machine, &paper);
        let set = machine.observed().unwrap();
        let pages = |ranges: &[Range<u64>]| ranges.iter().map(|r| r.end - r.start).sum::<u64>();
        let (written, touched) = (pages(&set.written), pages(&set.touched));
        assert!(
            0 < written && written < touched && touched < 128 << 20,
            "{set:?}"
        );
        let beyond = 127 << 20..129 << 20;
        let wrong = WorkingSet {
            written: vec![beyond.clone(), 5..4096, 4096..4096],
            touched: vec![beyond],
        };
        for set in [set, wrong] {
            let (mut machine, paper) = copy_of(&state, &memory, vcpus, Some(set));
            wait_for_missing_root(&mut machine, &paper);
            assert_eq!(machine.observed(), None);
        }
    }
}

fn built_kernel() -> Option<File> {
    let path = std::env::var("HULL_KERNEL").unwrap_or_else(|_| {
        concat!(env!("CARGO_MANIFEST_DIR"), "/../target/kernel/vmlinux").into()
    });
    if !have_kvm() {
        return None;
    }
    let kernel = File::open(&path).ok();
    if kernel.is_none() {
        eprintln!("SKIPPED: no kernel at {path}");
    }
    kernel
}

fn wait_for_missing_root(machine: &mut Machine, paper: &Paper) {
    let exit = machine.wait_for(PATIENCE * 3);
    let text = String::from_utf8_lossy(&paper.text()).into_owned();
    assert_eq!(exit, Some(VmExit::Reset), "{text}");
    assert!(text.contains("Unable to mount root fs"), "{text}");
}
