//! What processor the guest sees: the host's, less what isn't virtualised, in our topology.
//!
//! Pure: a table in, a table out (Intel SDM vol. 2A "CPUID", AMD APM vol. 3
//! appendix E, Linux `Documentation/virt/kvm/x86/cpuid.rst`).

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// The leaf of the extended topology, and its successor.
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
/// Leaf 1 ECX: MONITOR/MWAIT, which would take the processor from the host.
const MONITOR: u32 = 1 << 3;
/// Leaf 1 ECX: debug store, VMX, SMX, performance capabilities, host debugging.
const ECX1_HIDDEN: u32 = MONITOR | 1 << 2 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 15 | 1 << 11;
/// Leaf 1 ECX: the local APIC's timer takes a TSC deadline. KVM has it, but doesn't list it.
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1 ECX: a hypervisor is present.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1 EDX: debug store.
const EDX1_HIDDEN: u32 = 1 << 21;
/// Leaf 1 EDX: the package has several logical processors.
const HYPER_THREADING: u32 = 1 << 28;
/// Leaf 0x8000_0001 ECX: SVM, performance counters (core, northbridge, last level), IBS, LWP.
const ECX_EXT1_HIDDEN: u32 = 1 << 2 | 1 << 10 | 1 << 15 | 1 << 23 | 1 << 24 | 1 << 28;

/// The table of vCPU `index` of `count`, made from what KVM supports.
///
/// One thread a core, all cores in one package, APIC id = index.
#[must_use]
pub fn for_vcpu(supported: &[kvm_cpuid_entry2], index: u8, count: u8) -> Vec<kvm_cpuid_entry2> {
    let mut table: Vec<_> = supported
        .iter()
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2))
        .map(|entry| {
            let mut entry = *entry;
            filter(&mut entry, index, count);
            entry
        })
        .collect();
    // KVM leaves the topology to us.
    table.extend(topology(u32::from(index), u32::from(count)));
    table
}

/// Adapts one leaf.
fn filter(entry: &mut kvm_cpuid_entry2, index: u8, count: u8) {
    let (id, cores) = (u32::from(index), u32::from(count));
    let shift = core_bits(cores);
    match entry.function {
        0 => entry.eax = entry.eax.max(TOPOLOGY),
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | cores << 16;
            entry.ecx = entry.ecx & !ECX1_HIDDEN | TSC_DEADLINE | HYPERVISOR;
            entry.edx &= !(EDX1_HIDDEN | HYPER_THREADING);
            if count > 1 {
                entry.edx |= HYPER_THREADING;
            }
        }
        // Intel's caches: the first levels belong to one core, the third to all.
        4 => {
            let level = entry.eax >> 5 & 7;
            let sharers = if level >= 3 { cores } else { 1 };
            if entry.eax & 0x1f != 0 {
                entry.eax = entry.eax & 0x3fff | (sharers - 1) << 14 | ((1 << shift) - 1) << 26;
            }
        }
        // MWAIT, performance monitoring, trace, SGX: not virtualised.
        5 | 0xa | 0x12 | 0x14 => zero(entry),
        // ARAT alone: the timer doesn't stop in any idle state.
        6 => {
            zero(entry);
            entry.eax = 1 << 2;
        }
        0x8000_0001 => entry.ecx &= !ECX_EXT1_HIDDEN,
        0x8000_0008 => entry.ecx = (cores - 1) | shift << 12,
        // SVM, IBS, encrypted memory, performance monitoring: not virtualised.
        0x8000_000a | 0x8000_001b | 0x8000_001f | 0x8000_0022 => zero(entry),
        // AMD's caches, as leaf 4.
        0x8000_001d => {
            let level = entry.eax >> 5 & 7;
            let sharers = if level >= 3 { cores } else { 1 };
            if entry.eax & 0x1f != 0 {
                entry.eax = entry.eax & 0x3fff | (sharers - 1) << 14;
            }
        }
        0x8000_001e => {
            entry.eax = id;
            entry.ebx = id;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// How many bits of an APIC id number the cores.
fn core_bits(cores: u32) -> u32 {
    u32::BITS - cores.saturating_sub(1).leading_zeros()
}

fn zero(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// The extended topology: level 0 one thread, level 1 all cores, then the end.
fn topology(id: u32, cores: u32) -> [kvm_cpuid_entry2; 3] {
    let levels = [
        (0, 1, 1 << 8),
        (core_bits(cores), cores, 1 | 2 << 8),
        (0, 0, 2),
    ];
    let mut index = 0;
    levels.map(|(eax, ebx, ecx)| {
        let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
        let entry = kvm_cpuid_entry2 {
            function: TOPOLOGY,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx: id,
            ..Default::default()
        };
        index += 1;
        entry
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = registers;
        kvm_cpuid_entry2 {
            function,
            index,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }

    fn one(entry: kvm_cpuid_entry2, index: u8, count: u8) -> kvm_cpuid_entry2 {
        for_vcpu(&[entry], index, count)[0]
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for index in [0u8, 5, 31] {
            let id = u32::from(index);
            assert_eq!(
                one(leaf(1, 0, [0, u32::MAX, 0, 0]), index, 32).ebx >> 24,
                id
            );
            assert!(topology(id, 32).iter().all(|level| level.edx == id));
            assert_eq!(one(leaf(0x8000_001e, 0, [0; 4]), index, 32).eax, id);
        }
    }

    #[test]
    fn the_package_has_as_many_cores_as_vcpus() {
        assert_eq!(one(leaf(1, 0, [0; 4]), 0, 6).ebx >> 16 & 0xff, 6);
        let given = [
            leaf(0, 0, [1; 4]),
            leaf(0xb, 5, [9; 4]),
            leaf(0x1f, 0, [9; 4]),
        ];
        let table = for_vcpu(&given, 0, 6);
        let levels: Vec<_> = table.iter().filter(|e| e.function == 0xb).collect();
        assert_eq!((levels.len(), table.len(), table[0].eax), (3, 4, 0xb));
        assert_eq!((levels[1].eax, levels[1].ebx, levels[1].ecx), (3, 6, 0x201));
        assert_eq!(one(leaf(0x8000_0008, 0, [0; 4]), 0, 6).ecx, 5 | 3 << 12);
        assert_eq!(one(leaf(0x8000_0008, 0, [0; 4]), 0, 1).ecx, 0);
    }

    #[test]
    fn what_isnt_virtualised_is_hidden() {
        let all = one(leaf(1, 0, [u32::MAX; 4]), 0, 1);
        assert_eq!(all.ecx & (MONITOR | 1 << 5), 0);
        assert_ne!(all.ecx & HYPERVISOR, 0);
        assert_eq!(all.edx & HYPER_THREADING, 0);
        assert_ne!(one(leaf(1, 0, [0; 4]), 0, 1).ecx & TSC_DEADLINE, 0);
        assert_eq!(one(leaf(0xa, 0, [u32::MAX; 4]), 0, 1), leaf(0xa, 0, [0; 4]));
        assert_eq!(
            one(leaf(0x8000_0001, 0, [u32::MAX; 4]), 0, 1).ecx & 1 << 2,
            0
        );
        // A leaf without a rule goes through untouched.
        let vendor = leaf(0x8000_0002, 0, [1, 2, 3, 4]);
        assert_eq!(one(vendor, 0, 1), vendor);
    }
}
