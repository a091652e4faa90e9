//! A machine's state apart from its memory: taken while it is paused, applied to one just built.
//!
//! Memory is not in here: with [`crate::spec::MemoryBacking::Shared`] it is in
//! [`Machine::memory_file`], which a copy maps with
//! [`crate::spec::MemoryBacking::Template`]. What came beside RAM lies behind it in the file.
//! The order is those blocks, vCPUs, the VM's chips and clock, then devices, which may raise an
//! interrupt at once.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::{BuildError, Host, Life, Machine};
use crate::device::serial::Serial;
use crate::kvm::KvmError;
use crate::kvm::state::{VcpuState, VmState};
use crate::memory::Observer;
use crate::spec::{Checked, VmSpec};
use crate::virtio::device::{Persist, RestoreError};
use crate::virtio::mem::Mem;
use crate::virtio::net::Net;
use crate::virtio::transport::SlotState;
use crate::virtio::vsock::{Vsock, VsockState};

/// The version of the state's layout: one that differs is refused.
const EPOCH: u32 = 4;

/// Everything of a machine but its memory.
#[derive(Debug, Serialize, Deserialize)]
pub struct MachineState {
    epoch: u32,
    vm: VmState,
    vcpus: Vec<VcpuState>,
    slots: Vec<SlotState>,
    serial: Option<Serial>,
}

/// Why a machine's state can't be taken.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The machine has ended, or never began.
    #[error("the machine isn't paused: there is nothing to save")]
    NotPaused,
    /// KVM.
    #[error("cannot read the virtual machine's state")]
    Kvm(#[from] KvmError),
    /// A device.
    #[error("cannot take a device's state")]
    Device(#[from] RestoreError),
}

impl MachineState {
    /// Whether the one stream that there is, and that it goes on with, is the guest's to this port
    /// of the host's.
    #[must_use]
    pub fn has_but_one_stream(&self, host_port: u32) -> bool {
        let mut vsocks = self.slots.iter().filter(|slot| slot.unit == Vsock::UNIT);
        vsocks.all(|slot| {
            let state = slot.device_state::<VsockState>();
            state.is_ok_and(|state| {
                let ports = state.streams.iter().map(|stream| stream.host_port);
                state.cut.is_empty() && ports.eq([host_port])
            })
        })
    }

    /// How many network cards it has.
    #[must_use]
    pub fn cards(&self) -> usize {
        let is_card = |slot: &&SlotState| slot.unit == Net::UNIT;
        self.slots.iter().filter(is_card).count()
    }

    /// The host's and the guest's ports of the streams that it goes on with.
    ///
    /// # Errors
    /// If the vsock device's state can't be read.
    pub fn streams(&self) -> Result<Vec<(u32, u32)>, RestoreError> {
        let mut all = Vec::new();
        for slot in self.slots.iter().filter(|slot| slot.unit == Vsock::UNIT) {
            let state: VsockState = slot.device_state()?;
            all.extend(state.streams.iter().map(|s| (s.host_port, s.guest_port)));
        }
        Ok(all)
    }
}

impl Machine {
    /// Takes the state of a machine that [`Machine::pause`] holds.
    ///
    /// # Errors
    /// [`SaveError`]; the machine can go on afterwards in any case.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let Life::Alive { vcpus, .. } = &self.life else {
            return Err(SaveError::NotPaused);
        };
        if !vcpus.stand_still() {
            return Err(SaveError::NotPaused);
        }
        let indices = self.vm.msr_indices()?;
        let mut states = Vec::new();
        vcpus.visit(|vcpu| -> Result<(), KvmError> {
            states.push(vcpu.save(&indices)?);
            Ok(())
        })?;
        let slots = self.bus.slots().iter().map(|slot| slot.save());
        Ok(MachineState {
            epoch: EPOCH,
            vm: self.vm.save()?,
            vcpus: states,
            slots: slots.collect::<Result<_, _>>()?,
            serial: self.bus.serial_state(),
        })
    }

    /// Builds the machine of `spec` and has it stand where `state` was taken.
    ///
    /// The spec is the saved machine's, but for the memory's backing.
    ///
    /// # Errors
    /// [`BuildError::Restore`] when the state is another machine's, else as
    /// [`Machine::build`].
    pub fn restore(
        spec: Checked<VmSpec>,
        mut host: Host,
        state: MachineState,
    ) -> Result<Self, BuildError> {
        let working_set = host.working_set.take();
        let mut machine = Self::assemble(&spec.into_spec(), host)?;
        match working_set {
            Some(set) => {
                set.make_ready(&machine.ram());
                machine.apply(state)?;
                machine.map(&set.touched);
            }
            None => {
                // A host that can't tell leaves every start as slow as this one.
                let memory = machine.ram();
                machine.observer = Observer::new(&memory).ok().map(|seeing| (seeing, memory));
                machine.apply(state)?;
            }
        }
        Ok(machine)
    }

    /// Has the guest find these pages mapped. What the host won't map now is when it is touched.
    fn map(&self, pages: &[Range<u64>]) {
        if let Life::Stopped(vcpus) = &self.life
            && let Some(vcpu) = vcpus.first()
        {
            let _ = pages.iter().try_for_each(|range| vcpu.pre_fault(range));
        }
    }

    fn apply(&self, state: MachineState) -> Result<(), BuildError> {
        let Life::Stopped(vcpus) = &self.life else {
            return Ok(());
        };
        self.check(&state, vcpus.len())?;
        let slots = self.bus.slots().iter().zip(state.slots);
        // What the others know of may lie in blocks.
        let (blocks, others): (Vec<_>, Vec<_>) =
            slots.partition(|(slot, _)| slot.unit() == Mem::UNIT);
        blocks
            .into_iter()
            .try_for_each(|(slot, state)| slot.restore(state))?;
        for (vcpu, state) in vcpus.iter().zip(&state.vcpus) {
            vcpu.restore(state)?;
        }
        self.vm.restore(&state.vm)?;
        others
            .into_iter()
            .try_for_each(|(slot, state)| slot.restore(state))?;
        if let Some(serial) = state.serial {
            self.bus.restore_serial(serial);
        }
        Ok(())
    }

    /// Matches what the state holds with what the machine has, by name.
    fn check(&self, state: &MachineState, vcpus: usize) -> Result<(), RestoreError> {
        let mismatch = |why: String| RestoreError::Mismatch {
            unit: "machine".to_owned(),
            why,
        };
        if state.epoch != EPOCH {
            return Err(mismatch(format!(
                "it has epoch {}, not {EPOCH}",
                state.epoch
            )));
        }
        if state.vcpus.len() != vcpus {
            return Err(mismatch(format!(
                "it had {} vCPUs, not {vcpus}",
                state.vcpus.len()
            )));
        }
        let have: Vec<&str> = self.bus.slots().iter().map(|slot| slot.unit()).collect();
        let saved: Vec<&str> = state.slots.iter().map(|slot| slot.unit.as_str()).collect();
        if have == saved {
            return Ok(());
        }
        if let Some(unit) = have.iter().find(|unit| !saved.contains(unit)) {
            return Err(RestoreError::Missing((*unit).to_owned()));
        }
        if let Some(unit) = saved.iter().find(|unit| !have.contains(unit)) {
            return Err(RestoreError::Unknown((*unit).to_owned()));
        }
        Err(mismatch(format!(
            "it had the devices {saved:?}, not {have:?}"
        )))
    }
}
