//! A first process that was saved, in a guest that goes on; held if it is a bundle's.
//!
//! Owns: the order of it, which is that of a start from a template without a setup and a spawn:
//! open, put the root together, build, jail, run, become another.

use std::fs::File;
use std::os::fd::AsFd;
use std::time::Duration;

use hull_vmm::memory::WorkingSet;

use crate::checkpoint::{self, LoadError};
use crate::plan::Plan;
use crate::store::Entry;
use crate::sys;
use crate::template::Template;

use super::boot::{self, BootError};
use super::view::View;
use super::vm::{Source, Vm};
use super::{Failed, Place, boot_failed, connect, enter_cgroup, jail, open, scene, stage};

/// Goes on from the checkpoint in `file`.
pub(super) fn go_on(
    entry: &Entry,
    plan: &Plan,
    file: File,
    view: Option<&View>,
) -> Result<Place, Failed> {
    let opened = open(entry, plan, connect(plan, view)?, None)?;
    let scene = scene(entry, plan, &opened.shares)?;
    let cgroup = enter_cgroup(plan)?;
    let (saved, kernel) =
        checkpoint::load(&file, opened.kvm.as_fd()).map_err(stage("checkpoint"))?;
    let (had, has) = (
        saved.machine.cards(),
        usize::from(opened.network.cards().count),
    );
    if had != has {
        return Err(stage("checkpoint")(LoadError::Cards { had, has }));
    }
    let template = Template {
        file,
        state: saved.machine,
        // Its disk is there.
        scratch: None,
        kernel: kernel.clone(),
        // Nothing is to be learnt from one start.
        working_set: Some(WorkingSet::default()),
    };
    let source = Source::GoOn(template.into(), saved.process_port);
    let (mut vm, dials) = Vm::build(&plan.vm, opened, source).map_err(stage("build"))?;
    let jail = jail::enter().map_err(stage("jail"))?;
    let built = sys::monotonic_ns();
    let watch = vm.start().map_err(stage("build"))?;
    let limit = Duration::from_secs(u64::from(plan.vm.boot_timeout_s));
    let take_up = || {
        let mut agent = boot::carried_on(&dials, kernel)?;
        let started = boot::process_carried_on(&dials, &saved.streams)?;
        agent.go_on(&vm, plan, (has > 0).then(|| vm.interfaces()), limit)?;
        Ok((agent, started))
    };
    let (mut agent, started) =
        take_up().map_err(|error: BootError| boot_failed("setup", &vm, &error))?;
    drop(watch);
    vm.forward();
    vm.await_network(view);
    agent.marks.built = built;
    Ok(Place {
        guest: Box::new(vm),
        started,
        agent,
        jail,
        cgroup,
        scene,
        carried: saved.streams,
    })
}
