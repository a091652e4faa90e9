//! What the monitor gives up before it runs guest code.
//!
//! Everything it needs is open by then. It keeps the rights by which its file server acts for
//! the guest on files of any owner, and nothing else. To be called while the process has one
//! thread: namespaces and capabilities are a thread's, and later threads inherit them.

use std::io;

use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags, set_capabilities};

use crate::sys;

/// A defence that could not be put up.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}")]
pub(crate) struct JailError {
    action: &'static str,
    source: io::Error,
}

/// What the file server needs (capabilities(7)), and what for:
///
/// - `CHOWN`, `FOWNER`: the guest changes owners, modes and times of files of any owner;
/// - `DAC_OVERRIDE`: the guest's kernel has checked permissions, this one need not;
/// - `FSETID`: set-group-id bits stay where the guest puts them;
/// - `MKNOD`: device nodes as inodes, which nothing here opens;
/// - `SETUID`, `SETGID`: what the guest's user makes is that user's;
/// - `SETFCAP`: file capabilities, as image layers have them.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP);

/// The highest number that a capability can have.
const LAST_CAPABILITY: u32 = 63;

/// Gives up what isn't needed any more; returns the names of what is in force then.
pub(super) fn enter() -> Result<Vec<String>, JailError> {
    let failed = |action| move |source: io::Error| JailError { action, source };
    sys::unshare(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWNET)
        .map_err(failed("enter namespaces without a network"))?;
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    // A core file would hold the guest's memory.
    setrlimit(Resource::Core, none)
        .map_err(|error| failed("forbid itself core files")(error.into()))?;
    keep_only(KEPT)?;
    Ok([
        "namespace:ipc",
        "namespace:uts",
        "namespace:net",
        "capabilities:chown,dac_override,fowner,fsetid,mknod,setuid,setgid,setfcap",
        "capabilities:bounding:none",
        "no_new_privs",
        "rlimit:core",
    ]
    .map(str::to_owned)
    .to_vec())
}

/// Leaves this thread with these rights of those that it has, and no way to others.
pub(super) fn keep_only(rights: CapabilitySet) -> Result<(), JailError> {
    let failed = |action| move |source: io::Error| JailError { action, source };
    empty_bounding_set().map_err(|error| failed("empty its bounding set")(error.into()))?;
    drop_all_but(rights).map_err(|error| failed("drop its capabilities")(error.into()))?;
    rustix::thread::set_no_new_privs(true)
        .map_err(|error| failed("forbid itself new privileges")(error.into()))?;
    Ok(())
}

/// Leaves this thread with these rights of those that it has.
pub(super) fn drop_all_but(rights: CapabilitySet) -> rustix::io::Result<()> {
    let kept = rustix::thread::capabilities(None)?.permitted & rights;
    let sets = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, sets)
}

/// Nothing is ever executed; if it were, it would have no rights.
fn empty_bounding_set() -> rustix::io::Result<()> {
    for number in 0..=LAST_CAPABILITY {
        let one = CapabilitySet::from_bits_retain(1 << number);
        match rustix::thread::remove_capability_from_bounding_set(one) {
            // The kernel doesn't know this one, nor any after it.
            Err(rustix::io::Errno::INVAL) => break,
            result => result?,
        }
    }
    Ok(())
}
