//! Capabilities of a process: names of the spec to bits, and putting them into force.
//!
//! Owns: the order in which bounding, permitted, effective, inheritable and ambient sets change
//! around the change of user (capabilities(7)). Refuses: to add what the bounding set lacks.

use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::fault::{Fault, Tried};
use crate::spec::Capabilities;

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
    ///
    /// # Errors
    /// Refuses names that aren't a capability's.
    pub(crate) fn of(spec: &Capabilities) -> Result<Self, Fault> {
        let bounding = bits(&spec.bounding)?;
        let permitted = bits(&spec.permitted)?;
        let inheritable = bits(&spec.inheritable)? & bounding;
        Ok(Self {
            bounding,
            effective: bits(&spec.effective)? & permitted,
            permitted,
            inheritable,
            ambient: bits(&spec.ambient)? & permitted & inheritable,
        })
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

fn bits(names: &[String]) -> Result<u64, Fault> {
    names.iter().try_fold(0, |bits, name| {
        let short = name.strip_prefix("CAP_").unwrap_or(name);
        let number = NAMES.iter().position(|known| *known == short);
        let number = number.ok_or_else(|| Fault::refused(format!("no capability {name:?}")))?;
        Ok(bits | (1 << number))
    })
}

/// In the order of their numbers in linux/capability.h.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn no_capabilities_in_the_spec_means_none() {
        let none = Sets::of(&Capabilities::default()).unwrap();
        assert_eq!(none, Sets::default());
    }

    #[test]
    fn nothing_exceeds_the_set_it_comes_from() {
        let all = names(&["CAP_CHOWN", "CAP_KILL"]);
        let sets = Sets::of(&Capabilities {
            bounding: names(&["CAP_CHOWN"]),
            permitted: all.clone(),
            effective: all.clone(),
            inheritable: all.clone(),
            ambient: all,
        })
        .unwrap();
        assert_eq!(sets.bounding, 1);
        assert_eq!(sets.effective, 0b10_0001);
        assert_eq!(sets.inheritable, 1);
        assert_eq!(sets.ambient, 1);
    }

    #[test]
    fn the_numbers_are_the_kernels() {
        assert_eq!(bits(&names(&["CAP_SYS_ADMIN"])), Ok(1 << 21));
        assert_eq!(bits(&names(&["CAP_CHECKPOINT_RESTORE"])), Ok(1 << 40));
        assert!(bits(&names(&["CAP_FLY"])).is_err());
    }
}
