//! Whose work the calling thread does for a moment.
//!
//! Owns the thread's effective user and group, and its capabilities, while a
//! guest's request creates a file (so that it belongs to the guest's user) or
//! writes to one (so that set-user-id bits are lost as they must be). Refuses
//! to go on when the thread can't become itself again: that would be a monitor
//! with the rights of a guest's user, so it aborts.
//!
//! Permissions are the guest kernel's to check (`default_permissions`): it
//! alone knows a process's additional groups. So the thread keeps its
//! capabilities as another user, and only owns what it makes as that user.

use std::io;

use rustix::fs::{Gid, Uid};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_res_gid,
    set_thread_res_uid,
};

/// The thread makes files as another user, until dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct AsUser(Option<(Uid, Gid, CapabilitySets)>);

impl AsUser {
    /// Makes files as `uid` and `gid`.
    ///
    /// # Errors
    /// `EINVAL` for the ids that mean none, `EPERM` when the process may not.
    pub(super) fn enter(uid: u32, gid: u32) -> io::Result<Self> {
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL.into());
        }
        let own = (rustix::process::geteuid(), rustix::process::getegid());
        let other = (Uid::from_raw(uid), Gid::from_raw(gid));
        if own == other {
            return Ok(Self(None));
        }
        let before = capabilities(None)?;
        // The group first: as another user the thread may no longer.
        let entered = Self(Some((own.0, own.1, before)));
        set_thread_res_gid(None::<Gid>, other.1, None::<Gid>)?;
        set_thread_res_uid(None::<Uid>, other.0, None::<Uid>)?;
        set_capabilities(None, before)?;
        Ok(entered)
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        if let Some((uid, gid, capabilities)) = self.0 {
            let back = set_thread_res_uid(None::<Uid>, uid, None::<Uid>)
                .and_then(|()| set_thread_res_gid(None::<Gid>, gid, None::<Gid>))
                .and_then(|()| set_capabilities(None, capabilities));
            if back.is_err() {
                std::process::abort();
            }
        }
    }
}

/// The thread writes as one that may not keep set-user-id bits, until dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct WithoutFsetid(Option<CapabilitySets>);

impl WithoutFsetid {
    /// Gives up `CAP_FSETID`, if `wanted`.
    pub(super) fn enter(wanted: bool) -> io::Result<Self> {
        if !wanted {
            return Ok(Self(None));
        }
        let before = capabilities(None)?;
        let effective = before.effective - CapabilitySet::FSETID;
        set_capabilities(
            None,
            CapabilitySets {
                effective,
                ..before
            },
        )?;
        Ok(Self(Some(before)))
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(before) = self.0
            && set_capabilities(None, before).is_err()
        {
            std::process::abort();
        }
    }
}
