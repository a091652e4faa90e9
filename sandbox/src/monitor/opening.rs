//! What a monitor opens before it gives up the right to.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::{Mode, OFlags};

use crate::cgroup::Cgroup;
use crate::console::BootLog;
use crate::network::{self, Joined};
use crate::plan::{Plan, PlannedRoot, PlannedVm};
use crate::rootfs;
use crate::scratch::{Kept, ScratchError};
use crate::store::Entry;
use crate::sys;

use super::view::View;
use super::vm::Opened;
use super::{Failed, stage};

/// Something that the VM needs and that can't be opened.
#[derive(Debug, thiserror::Error)]
pub(super) enum OpenError {
    #[error(
        "this host's {path} emulates guest kernels: its processor has neither vmx nor svm, and a boot would take hours (see hull doctor; allow_emulated_kvm in the settings goes on regardless)"
    )]
    Emulated { path: PathBuf },
    #[error("cannot open {what} \"{path}\"")]
    Path {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

impl OpenError {
    pub(super) fn log(entry: &Entry) -> impl FnOnce(io::Error) -> Self {
        let path = entry.log_path();
        move |source| Self::Path {
            what: "log",
            path,
            source,
        }
    }
}

/// Opens all that a VM is made of, its network aside; `mounted` is what its guest expects on a disk
/// that is made now.
pub(super) fn open(
    entry: &Entry,
    plan: &Plan,
    network: Joined,
    mounted: Option<Kept<'_>>,
) -> Result<Opened, Failed> {
    Ok(Opened {
        kvm: open_kvm(&plan.vm).map_err(stage("open"))?,
        network,
        console: open_console(entry).map_err(stage("open"))?,
        scratch: open_scratch(entry, plan, mounted).map_err(stage("rootfs"))?,
        shares: rootfs::assemble(entry, plan).map_err(stage("rootfs"))?,
    })
}

fn open_scratch(
    entry: &Entry,
    plan: &Plan,
    mounted: Option<Kept<'_>>,
) -> Result<Option<File>, ScratchError> {
    match (&plan.vm.scratch, &plan.root) {
        (Some(scratch), _) => scratch.open(entry.directory(), mounted).map(Some),
        (None, PlannedRoot::Directory(_)) => Ok(None),
        (None, PlannedRoot::Layers(_)) => {
            Err(ScratchError::Earlier(entry.directory().join("upper")))
        }
    }
}

/// Joins the plan's network, which decides what devices the guest has.
pub(super) fn connect(plan: &Plan, view: Option<&View>) -> Result<Joined, Failed> {
    if !plan.vm.allow_emulated_kvm && !sys::has_virtualization() {
        let path = plan.vm.kvm.clone();
        return Err(stage("open")(OpenError::Emulated { path }));
    }
    match (&plan.network, view) {
        (Some(path), _) => network::join(path).map_err(stage("network")),
        (None, Some(view)) if plan.makes_network => {
            let made = view.make_network().map_err(stage("network"))?;
            made.map_err(stage("network"))
        }
        _ => Ok(Joined::default()),
    }
}

/// To be entered when all is open: an engine's may forbid every device.
pub(super) fn enter_cgroup(plan: &Plan) -> Result<Option<Cgroup>, Failed> {
    let planned = plan.host_cgroup();
    let entered = planned.map(|planned| Cgroup::enter(&planned)).transpose();
    Ok(entered.map_err(stage("open"))?.flatten())
}

pub(super) fn open_kvm(vm: &PlannedVm) -> Result<OwnedFd, OpenError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(&vm.kvm, flags, Mode::empty()).map_err(|error| OpenError::Path {
        what: "the hypervisor's device",
        path: vm.kvm.clone(),
        source: error.into(),
    })
}

pub(super) fn open_console(entry: &Entry) -> Result<BootLog, OpenError> {
    let path = entry.boot_log_path();
    BootLog::open(path.clone()).map_err(|source| OpenError::Path {
        what: "boot log",
        path,
        source,
    })
}
