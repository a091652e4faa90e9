//! What the monitor gives up before it runs guest code.
//!
//! Everything it needs is open by then. It keeps the rights by which its file server acts for
//! the guest on files of any owner, and nothing else. To be called while the process has one
//! thread: namespaces and capabilities are a thread's, and later threads inherit them.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities};

use crate::sys;

/// A defence that could not be put up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct JailError {
    action: &'static str,
    source: io::Error,
}

/// What the file server needs (capabilities(7)): owners, modes and devices of any file, and the
/// guest's own user for the files that it makes.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// Gives up what isn't needed any more; returns the names of what is in force then.
pub(super) fn enter() -> Result<Vec<String>, JailError> {
    let failed = |action| move |source: io::Error| JailError { action, source };
    // The mount namespace was made for the root already.
    sys::unshare(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET)
        .map_err(failed("enter namespaces without a network"))?;
    let held = rustix::thread::capabilities(None)
        .map_err(|error| failed("read its capabilities")(error.into()))?;
    let kept = held.permitted & KEPT;
    set_capabilities(
        None,
        CapabilitySets {
            effective: kept,
            permitted: kept,
            inheritable: CapabilitySet::empty(),
        },
    )
    .map_err(|error| failed("drop its capabilities")(error.into()))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| failed("forbid itself new privileges")(error.into()))?;
    Ok([
        "namespace:mnt",
        "namespace:ipc",
        "namespace:uts",
        "namespace:net",
        "capabilities:chown,dac_override,dac_read_search,fowner,fsetid,mknod,setuid,setgid,setfcap",
        "no_new_privs",
    ]
    .map(str::to_owned)
    .to_vec())
}
