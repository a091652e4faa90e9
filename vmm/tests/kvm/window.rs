//! Guests that see files of their host in the window beside their memory, and guests that misuse it.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use hull_vmm::machine::Machine;
use hull_vmm::memory::Window;
use hull_vmm::outcome::VmExit;
use hull_vmm::spec::{DeviceSpec, FsSpec, MemoryBacking, MemorySpec, VmSpec};
use hull_vmm::virtio::fs::{CachePolicy, FsExport};

use super::{PATIENCE, Paper, RESET, built_kernel, have_kvm, host, kernel_of};

const WINDOW_BYTES: u64 = 32 << 20;
/// Static, and larger than a chunk of the window or nearly so.
pub(super) const BUSYBOX: &str = "/bin/busybox";

fn spec(window: u64) -> VmSpec {
    VmSpec {
        vcpus: 1,
        memory: MemorySpec {
            size_bytes: 128 << 20,
            backing: MemoryBacking::Anonymous,
        },
        kernel_cmdline: "console=hvc0 reboot=k panic=-1 quiet".to_owned(),
        devices: vec![
            DeviceSpec::Fs(FsSpec {
                tag: "hull".to_owned(),
                dax_window_bytes: window,
            }),
            DeviceSpec::Console,
        ],
        debug_serial: false,
    }
}

fn machine(kernel: File, initrd: Option<File>, exports: Vec<FsExport>) -> (Machine, Paper) {
    let paper = Paper::default();
    let mut host = host(Some(kernel), None, &paper);
    host.initrd = initrd;
    host.fs_exports = exports;
    let spec = spec(WINDOW_BYTES).validate().unwrap();
    let mut machine = Machine::build(spec, host).unwrap();
    machine.start().unwrap();
    (machine, paper)
}

/// How a guest ends that has the window's first 2 MiB at 1 GiB of its addresses and does `code`.
fn end_of(code: &[u8]) -> VmExit {
    const LARGE_PRESENT_WRITABLE: u64 = 0x83;
    let window = Window::reserve(128 << 20, WINDOW_BYTES).unwrap().address();
    // The boot's page tables begin at 0x9000; the page at 0xc000 is nobody's.
    let mut program = Vec::new();
    for (place, entry) in [
        (0xc000_u32, window | LARGE_PRESENT_WRITABLE),
        (0xa008, 0xc003),
    ] {
        // mov rax, entry; mov [place], rax
        program.extend([0x48, 0xb8]);
        program.extend(entry.to_le_bytes());
        program.extend([0x48, 0x89, 0x04, 0x25]);
        program.extend(place.to_le_bytes());
    }
    program.extend(code);
    program.extend(RESET);
    let (mut machine, _) = machine(kernel_of(&program), None, Vec::new());
    machine.wait_for(PATIENCE).expect("the guest doesn't end")
}

#[test]
fn a_guest_that_reaches_where_nothing_is_shown_ends_alone() {
    if !have_kvm() {
        return;
    }
    // mov al, [0x40000000]; jmp to 0x40000000; rep movsb from there.
    let read = [0x8a, 0x04, 0x25, 0, 0, 0, 0x40].to_vec();
    let run = [0xb8, 0, 0, 0, 0x40, 0xff, 0xe0].to_vec();
    let mut copy = vec![0xbe, 0, 0, 0, 0x40, 0xbf, 0, 0, 0x20, 0];
    copy.extend([0xb9, 0, 0x10, 0, 0, 0xfc, 0xf3, 0xa4]);
    let (mut other, _) = machine(kernel_of(&[0xf4, 0xeb, 0xfd]), None, Vec::new());
    for code in [read, run, copy] {
        let end = end_of(&code);
        let VmExit::InternalError {
            reason, registers, ..
        } = &end
        else {
            panic!("{end}");
        };
        assert!(reason.contains("memory with nothing behind it"), "{end}");
        assert!(registers.contains("rip"), "{end}");
    }
    assert_eq!(other.wait_for(std::time::Duration::ZERO), None);
    // Who writes there writes to nothing: mov [0x40000000], al, rep stosb.
    let mut fill = vec![0xbf, 0, 0, 0, 0x40, 0xb9, 0, 0x01, 0, 0, 0xfc, 0xf3, 0xaa];
    fill.extend([0x88, 0x04, 0x25, 0, 0, 0, 0x40]);
    assert_eq!(end_of(&fill), VmExit::Reset);
}

/// An archive of `files` for a guest's first root, as the kernel unpacks it (cpio, "newc").
pub(super) fn initrd(files: &[(&str, u32, &[u8])]) -> File {
    let mut archive = Vec::new();
    let end: [(&str, u32, &[u8]); 1] = [("TRAILER!!!", 0, &[])];
    for (number, (name, mode, content)) in (1_usize..).zip(files.iter().chain(&end)) {
        let (mode, length, name_length) = (*mode as usize, content.len(), name.len() + 1);
        let fields = [number, mode, 0, 0, 1, 0, length, 0, 0, 0, 0, name_length, 0];
        let fields = fields.map(|field| format!("{field:08x}")).concat();
        archive.extend(format!("070701{fields}{name}\0").bytes());
        archive.resize(archive.len().next_multiple_of(4), 0);
        archive.extend(*content);
        archive.resize(archive.len().next_multiple_of(4), 0);
    }
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, &archive).unwrap();
    file
}

/// A guest that runs `script` in a shell, the shares mounted at `/s`.
fn shell(kernel: File, script: &str, exports: Vec<FsExport>) -> (Machine, Paper) {
    let init = format!("#!/bin/busybox sh\nbusybox mount -t virtiofs hull /s\n{script}\n");
    let busybox = fs::read(BUSYBOX).unwrap();
    let root = initrd(&[
        ("bin", 0o40_755, b""),
        ("dev", 0o40_755, b""),
        ("s", 0o40_755, b""),
        ("bin/busybox", 0o100_755, &busybox),
        ("init", 0o100_755, init.as_bytes()),
    ]);
    machine(kernel, Some(root), exports)
}

fn unchanging(directory: &Path) -> FsExport {
    let mut export = FsExport::open("root", directory, true, CachePolicy::Always).unwrap();
    export.immutable = true;
    export
}

/// A program is run from the window, and a file is read that is larger than it, also below an
/// overlay: by the host's pages and no copies.
#[test]
fn a_guest_runs_and_reads_its_hosts_own_pages() {
    let Some(kernel) = built_kernel() else { return };
    let host = tempfile::tempdir().unwrap();
    fs::copy(BUSYBOX, host.path().join("busybox")).unwrap();
    let large: Vec<u8> = (0..(WINDOW_BYTES + (9 << 20)) / 8)
        .flat_map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
        .chain(*b"tail")
        .collect();
    fs::write(host.path().join("large"), &large).unwrap();
    fs::write(host.path().join("small"), "7up").unwrap();
    let sum = Command::new("md5sum")
        .arg(host.path().join("large"))
        .output()
        .unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    let sum = sum.split(' ').next().unwrap();
    let script = "cd /s/root; ./busybox md5sum large; busybox mount -t tmpfs t /dev; \
        busybox mkdir /dev/u /dev/w /dev/o; busybox mount -t overlay o -o \
        lowerdir=/s/root,upperdir=/dev/u,workdir=/dev/w /dev/o; cd /dev/o; \
        ./busybox md5sum large; ./busybox tail -c 4 large; ./busybox echo over; \
        ./busybox sed -i s/7/8/ small; ./busybox cat small /s/root/small; busybox reboot -f";
    let (mut machine, paper) = shell(kernel, script, vec![unchanging(host.path())]);
    let end = machine.wait_for(3 * PATIENCE);
    let said = String::from_utf8_lossy(&paper.text()).into_owned();
    assert_eq!(end, Some(VmExit::Reset), "{said}");
    assert_eq!(said.matches(sum).count(), 2, "{said}");
    assert!(said.contains("tailover"), "{said}");
    assert!(said.contains("8up7up"), "{said}");
    let stats = machine.fs_stats().unwrap().by_operation();
    let count = |name| {
        stats
            .iter()
            .find(|(known, _)| *known == name)
            .map_or(0, |(_, n)| *n)
    };
    // The small one, by each of its two readers.
    assert!(count("read") <= 2, "{stats:?}");
    // Twice the file's chunks and the program's; the first had to go to make room.
    assert!(
        count("setupmapping") > 40 && count("removemapping") > 4,
        "{stats:?}"
    );
}

/// The host breaks its promise: the guest that looks ends, this process does not.
#[test]
fn a_file_that_is_cut_ends_the_guest_that_sees_it() {
    let Some(kernel) = built_kernel() else { return };
    let host = tempfile::tempdir().unwrap();
    let large = host.path().join("large");
    fs::write(&large, vec![7; 4 << 20]).unwrap();
    let script = "cd /s/root; busybox head -c 5000 large >/dev/null; busybox echo seen; \
        while busybox true; do busybox cat large >/dev/null; done";
    let (mut machine, paper) = shell(kernel, script, vec![unchanging(host.path())]);
    while !String::from_utf8_lossy(&paper.text()).contains("seen") {
        paper.wait_for_more_than(paper.text().len());
    }
    File::options()
        .write(true)
        .open(&large)
        .unwrap()
        .set_len(0)
        .unwrap();
    let end = machine.wait_for(PATIENCE).expect("the guest doesn't end");
    let is_told = |reason: &str| reason.contains("memory with nothing behind it");
    assert!(
        matches!(&end, VmExit::InternalError { reason, .. } if is_told(reason)),
        "{end}"
    );
}
