//! What a snapshot holds of KVM: every vCPU, the interrupt chips, the clock.
//!
//! Orders matter (Linux `Documentation/virt/kvm/api.rst`; each rule here was a bug
//! somewhere): the run state is read first and the pending events last; CPUID is set
//! before all that it makes legal, the local APIC before the MSRs (a TSC deadline is
//! dropped while the timer isn't in that mode), the TSC before its deadline, the registers
//! before the pending events.
#![expect(
    unsafe_code,
    reason = "KVM_SET_XSAVE reads as much as the vCPU's features need"
)]

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, kvm_clock_data, kvm_cpuid_entry2,
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::vcpu::Vcpu;
use super::{KvmError, Vm, refused};

/// `IA32_TIME_STAMP_COUNTER`.
const MSR_TSC: u32 = 0x10;
/// `IA32_TSC_DEADLINE`.
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// `IA32_MCG_CTL`: listed, but not writable without the banks behind it.
const MSR_MCG_CTL: u32 = 0x17b;

/// One vCPU.
#[derive(Debug, Serialize, Deserialize)]
pub struct VcpuState {
    cpuid: Vec<kvm_cpuid_entry2>,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// The VM itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VmState {
    clock: kvm_clock_data,
    chips: Vec<kvm_irqchip>,
}

impl Vm {
    /// Which MSRs of a vCPU make up its state.
    ///
    /// # Errors
    /// When KVM won't list them.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(refused("list the MSRs"))?;
        let wanted = |index: &&u32| **index != MSR_MCG_CTL;
        Ok(list.as_slice().iter().filter(wanted).copied().collect())
    }

    /// Takes the VM's state; its vCPUs stand still.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn save(&self) -> Result<VmState, KvmError> {
        let mut chips = Vec::with_capacity(3);
        for chip_id in [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ] {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(refused("read an interrupt chip"))?;
            chips.push(chip);
        }
        let mut clock = self
            .fd
            .get_clock()
            .map_err(refused("read the guest's clock"))?;
        // The guest goes on from the moment of the snapshot.
        clock.flags = 0;
        Ok(VmState { clock, chips })
    }

    /// Applies a VM's state, after that of all its vCPUs.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn restore(&self, state: &VmState) -> Result<(), KvmError> {
        self.fd
            .set_clock(&state.clock)
            .map_err(refused("set the guest's clock"))?;
        for chip in &state.chips {
            self.fd
                .set_irqchip(chip)
                .map_err(refused("set an interrupt chip"))?;
        }
        Ok(())
    }
}

impl Vcpu {
    /// Takes the vCPU's state; it stands still, its last exit completed.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed.
    pub fn save(&self, msr_indices: &[u32]) -> Result<VcpuState, KvmError> {
        let fd = self.fd();
        // First: it settles a pending INIT or SIPI.
        let mp_state = fd
            .get_mp_state()
            .map_err(refused("read a vCPU's run state"))?;
        let regs = fd.get_regs().map_err(refused("read a vCPU's registers"))?;
        let sregs = fd
            .get_sregs()
            .map_err(refused("read a vCPU's system registers"))?;
        let xsave = fd
            .get_xsave()
            .map_err(refused("read a vCPU's extended state"))?;
        let xcrs = fd
            .get_xcrs()
            .map_err(refused("read a vCPU's extended control registers"))?;
        let debug_regs = fd
            .get_debug_regs()
            .map_err(refused("read a vCPU's debug registers"))?;
        let lapic = fd
            .get_lapic()
            .map_err(refused("read a vCPU's local APIC"))?;
        let cpuid = fd
            .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
            .map_err(refused("read a vCPU's CPUID"))?;
        let msrs = read_msrs(fd, msr_indices)?;
        // Last: reading the others may still change it.
        let events = fd
            .get_vcpu_events()
            .map_err(refused("read a vCPU's events"))?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().to_vec(),
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            events,
        })
    }

    /// Applies a state to a freshly created vCPU.
    ///
    /// # Errors
    /// [`KvmError`] naming the call that failed: a host with another processor refuses.
    pub fn restore(&self, state: &VcpuState) -> Result<(), KvmError> {
        let fd = self.fd();
        let cpuid = CpuId::from_entries(&state.cpuid).map_err(|_| KvmError::Cpuid)?;
        fd.set_cpuid2(&cpuid)
            .map_err(refused("set a vCPU's CPUID"))?;
        fd.set_mp_state(state.mp_state)
            .map_err(refused("set a vCPU's run state"))?;
        fd.set_regs(&state.regs)
            .map_err(refused("set a vCPU's registers"))?;
        fd.set_sregs(&state.sregs)
            .map_err(refused("set a vCPU's system registers"))?;
        // SAFETY: KVM reads 4096 bytes, the size of `kvm_xsave`, unless a feature beyond
        // AVX-512 was enabled by arch_prctl, which nobody here does.
        unsafe { fd.set_xsave(&state.xsave) }.map_err(refused("set a vCPU's extended state"))?;
        fd.set_xcrs(&state.xcrs)
            .map_err(refused("set a vCPU's extended control registers"))?;
        fd.set_debug_regs(&state.debug_regs)
            .map_err(refused("set a vCPU's debug registers"))?;
        fd.set_lapic(&state.lapic)
            .map_err(refused("set a vCPU's local APIC"))?;
        write_msrs(fd, &state.msrs)?;
        fd.set_vcpu_events(&state.events)
            .map_err(refused("set a vCPU's events"))?;
        // Tells the guest's watchdogs that time stood still; only a guest that has set its
        // clock up can be told.
        let _ = fd.kvmclock_ctrl();
        Ok(())
    }
}

fn msrs_of(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Cpuid)
}

/// Reads those of the MSRs that this vCPU has: KVM stops at the first that it hasn't.
fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(KVM_MAX_MSR_ENTRIES));
        let entries: Vec<kvm_msr_entry> = batch
            .iter()
            .map(|index| kvm_msr_entry {
                index: *index,
                ..Default::default()
            })
            .collect();
        let mut msrs = msrs_of(&entries)?;
        let count = fd
            .get_msrs(&mut msrs)
            .map_err(refused("read a vCPU's MSRs"))?;
        values.extend(msrs.as_slice().iter().take(count));
        // The one it stopped at is skipped.
        let done = if count < batch.len() {
            count + 1
        } else {
            count
        };
        rest = rest.get(done..).unwrap_or_default();
    }
    Ok(in_restore_order(values))
}

/// The TSC before all, its deadline behind all; a deadline that had passed is one that is
/// due, or the guest would wait for a tick that never comes.
fn in_restore_order(mut values: Vec<kvm_msr_entry>) -> Vec<kvm_msr_entry> {
    let tsc = values
        .iter()
        .find(|e| e.index == MSR_TSC)
        .map_or(0, |e| e.data);
    values.sort_by_key(|entry| match entry.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    for entry in &mut values {
        if entry.index == MSR_TSC_DEADLINE && entry.data == 0 {
            entry.data = tsc;
        }
    }
    values
}

fn write_msrs(fd: &VcpuFd, values: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for batch in values.chunks(KVM_MAX_MSR_ENTRIES) {
        let set = fd
            .set_msrs(&msrs_of(batch)?)
            .map_err(refused("set a vCPU's MSRs"))?;
        if let Some(entry) = batch.get(set) {
            return Err(KvmError::Msr(entry.index));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_deadline_comes_last_and_is_never_lost() {
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let given = vec![
            entry(MSR_TSC_DEADLINE, 0),
            entry(0x174, 7),
            entry(MSR_TSC, 99),
        ];
        let sorted = in_restore_order(given);
        let seen: Vec<_> = sorted.iter().map(|e| (e.index, e.data)).collect();
        assert_eq!(seen, [(MSR_TSC, 99), (0x174, 7), (MSR_TSC_DEADLINE, 99)]);
        let sorted = in_restore_order(vec![entry(MSR_TSC_DEADLINE, 5), entry(MSR_TSC, 99)]);
        assert_eq!(sorted[1].data, 5);
    }
}
