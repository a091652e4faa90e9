//! The virtual machine's shape: processors, memory, kernel and its command line.

use hull_vmm::spec::{MAX_MEMORY_BYTES, MEM_UNIT_BYTES};

use crate::request::{Root, RunRequest};
use crate::scratch;
use crate::settings::Settings;
use crate::template;

use super::shape::{PlannedScratch, PlannedVm};
use super::{HostFacts, PlanError};

/// What the guest kernel, its agent and a small program need, in bytes.
pub const MIN_MEMORY_BYTES: u64 = 64 << 20;

/// The smallest disk that is of use: a journal and some files, in bytes.
pub(super) const MIN_SCRATCH_BYTES: u64 = 64 << 20;

/// The largest disk, in bytes: more than a file can have on most hosts.
pub(super) const MAX_SCRATCH_BYTES: u64 = 8 << 40;

/// Disks come in multiples of this, in bytes.
const SCRATCH_UNIT: u64 = 1 << 20;

/// Guest memory comes in pages of this size, in bytes.
pub(super) const MEMORY_UNIT: u64 = 2 << 20;

/// The smallest and the largest window.
const LEAST_WINDOW_BYTES: u64 = 64 << 20;
const MOST_WINDOW_BYTES: u64 = 1 << 30;

/// What one VM can have, whatever the host has (`hull_vmm::spec::MAX_VCPUS`).
const MOST_VCPUS: u32 = 32;

/// Memory of a guest for each chain of its tables of names and of inodes, in bytes.
const MEMORY_PER_NAME: u64 = 64 << 10;
const MEMORY_PER_INODE: u64 = 128 << 10;

/// What every word is for is written in `kernel-config/README.md`. No user data is in here.
const CMDLINE: &str = "console=hvc0 quiet reboot=k rcupdate.rcu_expedited=1 noreplace-smp \
    initcall_blacklist=slab_late_init dummy.numdummies=0 tsc=reliable \
    sysctl.vm.compaction_proactiveness=0 swiotlb=noforce \
    memory_hotplug.online_policy=auto-movable";
const CMDLINE_DEBUG: &str = "console=hvc0 console=ttyS0 earlyprintk=ttyS0,115200 loglevel=8 \
    reboot=k rcupdate.rcu_expedited=1 dummy.numdummies=0 tsc=reliable \
    sysctl.vm.compaction_proactiveness=0 swiotlb=noforce \
    memory_hotplug.online_policy=auto-movable";

/// Decides everything about the VM alone.
pub(crate) fn plan(
    request: &RunRequest,
    settings: &Settings,
    facts: &HostFacts,
) -> Result<PlannedVm, PlanError> {
    let (vcpus, cpu_quota) = processors(request.cpus.unwrap_or(settings.defaults.cpus), facts)?;
    let assets = &settings.assets;
    let memory_bytes = request.memory_bytes;
    let memory_bytes = memory(
        memory_bytes.unwrap_or(settings.defaults.memory_bytes),
        facts,
    )?;
    Ok(PlannedVm {
        vcpus,
        cpu_quota,
        memory_bytes,
        window_bytes: match request.root {
            Root::Image(_) => window(memory_bytes),
            // Whoever made it may change it.
            Root::Directory(_) => 0,
        },
        growth_bytes: growth(memory_bytes, facts),
        kernel: if request.debug {
            assets.kernel_debug.clone()
        } else {
            assets.kernel.clone()
        },
        initrd: assets.initrd.clone(),
        cmdline: cmdline(request.debug, memory_bytes),
        debug: request.debug,
        kvm: settings.kvm.clone(),
        scratch: match request.root {
            Root::Image(_) => Some(scratch(request, settings)?),
            Root::Directory(_) => None,
        },
        // Who debugs wants to see the boot.
        templates: (settings.templates && !request.no_template && !request.debug)
            .then(|| settings.state_dir.join(template::DIRECTORY)),
        allow_emulated_kvm: settings.allow_emulated_kvm,
        boot_timeout_s: settings.defaults.boot_timeout_s,
    })
}

/// The kernel's command line. Names and inodes are looked up in tables that a copy of a template
/// writes to all over, so these are an eighth of what the kernel takes for so much memory.
fn cmdline(debug: bool, memory_bytes: u64) -> String {
    let words = if debug { CMDLINE_DEBUG } else { CMDLINE };
    let (names, inodes) = (
        memory_bytes / MEMORY_PER_NAME,
        memory_bytes / MEMORY_PER_INODE,
    );
    format!("{words} dhash_entries={names} ihash_entries={inodes}")
}

/// The disk that a container of an image has.
pub(crate) fn scratch(
    request: &RunRequest,
    settings: &Settings,
) -> Result<PlannedScratch, PlanError> {
    let asked = request.scratch_bytes;
    let asked = asked.unwrap_or(settings.defaults.scratch_bytes);
    if !(MIN_SCRATCH_BYTES..=MAX_SCRATCH_BYTES).contains(&asked) {
        return Err(PlanError::Scratch { asked });
    }
    Ok(PlannedScratch {
        bytes: asked.next_multiple_of(SCRATCH_UNIT),
        pristine: settings.state_dir.join(scratch::DIRECTORY),
        fleeting: request.auto_remove,
    })
}

/// Whole processors for the guest to see, and the share of them when a fraction was asked for.
fn processors(asked: f64, facts: &HostFacts) -> Result<(u8, Option<f64>), PlanError> {
    let most = facts.cpus.clamp(1, MOST_VCPUS);
    if !(0.01..=f64::from(most)).contains(&asked) {
        return Err(PlanError::Cpus { asked, most });
    }
    let vcpus = (1..=32u8)
        .find(|&count| f64::from(count) >= asked)
        .unwrap_or(32);
    Ok((vcpus, (asked < f64::from(vcpus)).then_some(asked)))
}

fn memory(asked: u64, facts: &HostFacts) -> Result<u64, PlanError> {
    if !(MIN_MEMORY_BYTES..=facts.memory_bytes).contains(&asked) {
        return Err(PlanError::Memory {
            asked_mib: asked >> 20,
            least_mib: MIN_MEMORY_BYTES >> 20,
            most_mib: facts.memory_bytes >> 20,
        });
    }
    Ok(asked.next_multiple_of(MEMORY_UNIT))
}

/// A half of the memory, within bounds: a guest has 1/64 of the window in its memory, to describe
/// it.
fn window(memory_bytes: u64) -> u64 {
    (memory_bytes / 2)
        .next_multiple_of(MEMORY_UNIT)
        .clamp(LEAST_WINDOW_BYTES, MOST_WINDOW_BYTES)
}

/// What is left of the host's, in whole units in which a guest adds memory: what the host itself
/// needs isn't ours to know.
fn growth(memory_bytes: u64, facts: &HostFacts) -> u64 {
    let left = facts.memory_bytes.saturating_sub(memory_bytes);
    left.min(MAX_MEMORY_BYTES) / MEM_UNIT_BYTES * MEM_UNIT_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> HostFacts {
        HostFacts {
            cpus: 2,
            memory_bytes: 4 << 30,
            ..HostFacts::default()
        }
    }

    #[test]
    fn fractions_are_rounded_up_and_kept_as_a_quota() {
        for (asked, expected) in [
            (1.0, (1, None)),
            (2.0, (2, None)),
            (1.5, (2, Some(1.5))),
            (0.25, (1, Some(0.25))),
        ] {
            assert_eq!(processors(asked, &facts()).unwrap(), expected);
        }
        for asked in [0.0, -1.0, 2.5, f64::NAN, f64::INFINITY] {
            assert!(processors(asked, &facts()).is_err(), "{asked}");
        }
    }

    #[test]
    fn a_window_follows_from_memory() {
        let mib = |memory: u64| window(memory << 20) >> 20;
        assert_eq!(
            [64, 200, 202, 512, 8192].map(mib),
            [64, 100, 102, 256, 1024]
        );
    }

    #[test]
    fn it_can_grow_to_what_the_host_has() {
        let mib = |memory: u64| growth(memory << 20, &facts()) >> 20;
        assert_eq!([64, 512, 4000, 4096, 8192].map(mib), [3968, 3584, 0, 0, 0]);
    }

    #[test]
    fn memory_is_bounded_by_need_and_host() {
        assert_eq!(memory(64 << 20, &facts()).unwrap(), 64 << 20);
        assert_eq!(memory((64 << 20) + 1, &facts()).unwrap(), 66 << 20);
        assert!(memory(1 << 20, &facts()).is_err());
        assert!(memory(5 << 30, &facts()).is_err());
    }
}
