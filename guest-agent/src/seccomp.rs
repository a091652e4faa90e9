//! System call filters.
use oci_spec::runtime::LinuxSeccomp;

use crate::fault::{Fault, Tried};
use crate::sys;

/// A compiled filter.
#[derive(Clone)]
pub(crate) struct Filter {
    program: Vec<libc::sock_filter>,
    flags: u64,
}

impl Filter {
    pub(crate) fn of(_spec: &LinuxSeccomp) -> Result<Self, Fault> {
        Err(Fault::refused("seccomp is not supported"))
    }
    pub(crate) fn install(&self) -> Result<(), Fault> {
        sys::install_filter(&self.program, self.flags)
            .or_refuse(|| "cannot install the seccomp filter")
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Filter({} instructions)", self.program.len())
    }
}
