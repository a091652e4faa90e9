//! A cgroup and a virtual machine that do nothing and stay as long as the machine.
//!
//! A kernel patches its own code when the first of a kind comes to life and when the last is gone:
//! cgroups, groups with a quota of processor time, virtual machines, interrupt controllers that
//! are still switched off. Processors that QEMU emulates in parallel have been seen to run code
//! that was half patched, and to panic, where such firsts and lasts came and went with each test.
//! With these kept, there are none after the boot, during which nothing else runs.
//!
//! Owns: both. Refuses: to fail a boot for them.

use std::fs;

use anyhow::{Context, Result};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

const CGROUP: &str = "/sys/fs/cgroup/kept";

/// A machine that never runs.
#[derive(Debug)]
pub(crate) struct Kept {
    _machine: VmFd,
    _processor: VcpuFd,
}

/// Makes a cgroup with a quota, which nothing is ever in.
pub(crate) fn cgroup() -> Result<()> {
    fs::create_dir(CGROUP).with_context(|| format!("make {CGROUP}"))?;
    fs::write(format!("{CGROUP}/cpu.max"), "100000 100000").context("set a quota")
}

/// Makes a virtual machine whose processor never begins.
pub(crate) fn machine() -> Result<Kept> {
    let machine = Kvm::new().context("open /dev/kvm")?.create_vm()?;
    machine
        .create_irq_chip()
        .context("make interrupt controllers")?;
    let processor = machine.create_vcpu(0).context("make a processor")?;
    Ok(Kept {
        _machine: machine,
        _processor: processor,
    })
}
