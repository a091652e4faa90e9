//! Capabilities of a process: names of the spec to bits, and putting them into force.
//!
//! Owns: the order in which bounding, permitted, effective, inheritable and ambient sets change
//! around the change of user (capabilities(7)). Refuses: to add what the bounding set lacks.

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::fault::{Fault, Tried};

/// The sets of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Sets {
    bounding: u64,
    effective: u64,
    permitted: u64,
    inheritable: u64,
    ambient: u64,
}

impl Sets {
    /// The sets that the spec names; without any, none, as the runtimes have it.
    pub(crate) fn of(spec: Option<&LinuxCapabilities>) -> Self {
        let Some(spec) = spec else {
            return Self::default();
        };
        let bounding = bits(spec.bounding().as_ref());
        let permitted = bits(spec.permitted().as_ref());
        let inheritable = bits(spec.inheritable().as_ref()) & bounding;
        Self {
            bounding,
            effective: bits(spec.effective().as_ref()) & permitted,
            permitted,
            inheritable,
            ambient: bits(spec.ambient().as_ref()) & permitted & inheritable,
        }
    }

    /// Cuts the bounding set. Comes before the change of user.
    ///
    /// # Errors
    /// None that a privileged process can have.
    pub(crate) fn bound(&self) -> Result<(), Fault> {
        for number in 0..64 {
            let bit = 1u64 << number;
            if self.bounding & bit != 0 {
                continue;
            }
            match rustix::thread::remove_capability_from_bounding_set(one(bit)) {
                Ok(()) => {}
                // Past the last capability that this kernel knows.
                Err(Errno::INVAL) => break,
                Err(errno) => {
                    return Err(errno).or_refuse(|| format!("cannot drop capability {number}"));
                }
            }
        }
        Ok(())
    }

    /// Puts the other sets into force. Comes after the change of user, with capabilities kept.
    ///
    /// # Errors
    /// If the process doesn't have what it is to get.
    pub(crate) fn apply(&self) -> Result<(), Fault> {
        let known = |bits| CapabilitySet::from_bits_retain(bits);
        let sets = CapabilitySets {
            effective: known(self.effective),
            permitted: known(self.permitted),
            inheritable: known(self.inheritable),
        };
        rustix::thread::set_capabilities(None, sets).or_refuse(|| "cannot set capabilities")?;
        rustix::thread::clear_ambient_capability_set()
            .or_refuse(|| "cannot clear ambient capabilities")?;
        for number in 0..64 {
            let bit = 1u64 << number;
            if self.ambient & bit != 0 {
                rustix::thread::configure_capability_in_ambient_set(one(bit), true)
                    .or_refuse(|| format!("cannot raise ambient capability {number}"))?;
            }
        }
        Ok(())
    }
}

fn one(bit: u64) -> CapabilitySet {
    CapabilitySet::from_bits_retain(bit)
}

fn bits(names: Option<&Capabilities>) -> u64 {
    names
        .into_iter()
        .flatten()
        .fold(0, |bits, &name| bits | (1 << number(name)))
}

/// The number of a capability, as linux/capability.h has it.
fn number(name: Capability) -> u32 {
    match name {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxCapabilitiesBuilder;

    use super::*;

    #[test]
    fn no_capabilities_in_the_spec_means_none() {
        assert_eq!(Sets::of(None), Sets::default());
    }

    #[test]
    fn nothing_exceeds_the_set_it_comes_from() {
        let all: Capabilities = [Capability::Chown, Capability::Kill].into();
        let chown: Capabilities = [Capability::Chown].into();
        let spec = LinuxCapabilitiesBuilder::default()
            .bounding(chown.clone())
            .permitted(all.clone())
            .effective(all.clone())
            .inheritable(all.clone())
            .ambient(all)
            .build()
            .unwrap();
        let sets = Sets::of(Some(&spec));
        assert_eq!(sets.bounding, 1);
        assert_eq!(sets.effective, 0b10_0001);
        assert_eq!(sets.inheritable, 1);
        assert_eq!(sets.ambient, 1);
    }
}
