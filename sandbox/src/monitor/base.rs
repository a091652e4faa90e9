//! What a VM begins from: a copy of a template, or its kernel's first instruction.
//!
//! The first start of a shape makes the shape's template and is then its first copy: what that
//! costs beyond a boot is a save and a restore. Starts that come meanwhile boot. Owns the choice,
//! and what happens to a template that doesn't work: it is removed, the start boots, and says so.
//! Refuses to fail a start: without a template there is always the kernel.

use std::error::Error;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hull_proto::CONTROL_PORT;
use hull_vmm::machine::{MachineState, SaveError};
use hull_vmm::memory::WorkingSet;

use crate::console::BootLog;
use crate::network::{Cards, Joined};
use crate::plan::{Plan, PlannedScratch, PlannedVm, ROOT_NAME};
use crate::scratch::{self, Content, Kept, ScratchError};
use crate::store::Entry;
use crate::sys;
use crate::template::{self, Key, KeyError, Maker, Start, Template, TemplateError, Templates};

use super::boot::{self, BootError};
use super::guest::Guest;
use super::rehearsal::{self, RehearsalError};
use super::vm::{Opened, Source, Vm, VmError};
use super::{OpenError, chain, open_console, open_kvm};

/// How long a guest may be busy after its agent has settled, before it is saved as it stands.
const REST: Duration = Duration::from_millis(50);

/// A template that isn't there for a start.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BaseError {
    /// It can't be kept.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// Its key can't be made.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// What its guest needs can't be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Its guest can't have a disk.
    #[error(transparent)]
    Scratch(#[from] ScratchError),
    /// Its guest can't be built.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Its guest didn't come up.
    #[error("a guest to copy didn't come up")]
    Boot(#[from] BootError),
    /// Its guest could not start a container.
    #[error("a guest to copy can't run a container")]
    Rehearsal(#[from] RehearsalError),
    /// A stream of its guest's stays open.
    #[error("a guest to copy doesn't come to rest")]
    Restless,
    /// Its guest can't be saved.
    #[error("a guest to copy can't be saved")]
    Save(#[from] SaveError),
}

/// What a start begins from.
#[derive(Debug, Default)]
pub(super) struct Base {
    /// The template to copy.
    pub(super) template: Option<Template>,
    /// Why there is none, if there should be one.
    pub(super) notice: Option<String>,
    tried: Option<(Templates, Key)>,
    /// What was learnt of this start.
    learnt: WorkingSet,
}

impl Base {
    /// Finds the template for this VM, or makes it.
    pub(super) fn find(entry: &Entry, plan: &Plan, cards: Cards) -> Self {
        let vm = &plan.vm;
        let Some(templates) = template::of(vm).filter(|_| sys::has_virtualization()) else {
            return Self::default();
        };
        let mut base = Self::default();
        let start = Start {
            cards,
            is_first: !scratch::is_in(entry.directory()),
            ours_alone: plan.is_guests_alone(),
        };
        match base.attempt(templates, || open_console(entry), vm, start) {
            Ok(template) => base.template = template,
            // The boot will tell it better.
            Err(BaseError::Open(_) | BaseError::Key(_)) => {}
            Err(error) => base.note(&error),
        }
        base
    }

    fn attempt(
        &mut self,
        templates: Templates,
        console: impl FnOnce() -> Result<BootLog, OpenError>,
        vm: &PlannedVm,
        start: Start,
    ) -> Result<Option<Template>, BaseError> {
        let key = Key::of(vm, start, open_kvm(vm)?.as_fd())?;
        let (templates, key) = self.tried.insert((templates, key));
        if templates.given_up(key) {
            return Ok(None);
        }
        if let Some(template) = templates.find(key)? {
            return Ok(Some(template));
        }
        let Some(maker) = templates.maker()? else {
            return Ok(None);
        };
        // It may have been made between the two looks.
        if let Some(template) = templates.find(key)? {
            return Ok(Some(template));
        }
        if let Err(error) = make(&maker, key, console()?, vm) {
            templates.give_up(key, &error.to_string());
            return Err(error);
        }
        Ok(templates.find(key)?)
    }

    /// What the disk of a guest from here must begin with, if that isn't nothing.
    pub(super) fn scratch(&self) -> Option<Kept<'_>> {
        self.template.as_ref()?.scratch()
    }

    /// Has later starts profit from what a copy needed, beside what was learnt of it before.
    pub(super) fn learn(&mut self, set: &WorkingSet) {
        if let Some((templates, key)) = &self.tried {
            // What is gathered isn't seen any more.
            self.learnt.join(set);
            // The next start is watched in this one's place.
            let _ = templates.learn(key, self.learnt.clone());
        }
    }

    /// The template didn't work: nobody is to try it again.
    pub(super) fn give_up(&mut self, error: &dyn Error) {
        if let Some((templates, key)) = &self.tried {
            templates.give_up(key, &error.to_string());
        }
        self.note(error);
    }

    fn note(&mut self, error: &dyn Error) {
        let why = chain(error).join(": ");
        self.notice = Some(format!("started without a template: {why}"));
    }
}

/// Makes the template of this VM anew, for `hull template build`.
pub(super) fn build(vm: &PlannedVm) -> Result<String, BaseError> {
    let Some(templates) = template::of(vm) else {
        return Err(TemplateError::Make("this VM takes none".to_owned()).into());
    };
    let start = Start {
        cards: Cards::default(),
        is_first: true,
        ours_alone: true,
    };
    let key = Key::of(vm, start, open_kvm(vm)?.as_fd())?;
    let maker = templates
        .maker()?
        .ok_or_else(|| TemplateError::Make("another process is making one".to_owned()))?;
    make(&maker, &key, BootLog::unkept(), vm)?;
    Ok(key.name())
}

/// Boots a guest, has it rehearse, and saves it with its agent idle and new shares mounted, of which
/// it knows the names; its disk is empty again by then, and laid over them if copies begin with an
/// empty one.
fn make(maker: &Maker<'_>, key: &Key, console: BootLog, vm: &PlannedVm) -> Result<(), BaseError> {
    let opened = stage(console, key, vm)?;
    let disk = opened.scratch.as_ref().map(File::try_clone);
    let disk = disk.transpose().map_err(RehearsalError::from)?;
    let disk = disk.filter(|_| key.has_scratch_open);
    let limit = Duration::from_secs(u64::from(vm.boot_timeout_s));
    let (mut guest, dials) = Vm::build(vm, opened, Source::boot(vm, true)?)?;
    let watch = guest.start()?;
    let mut agent = boot::hello(&guest, &dials, limit)?;
    drop(watch);
    rehearsal::run(&guest, &mut agent, vm, limit)?;
    if key.cards_wait {
        agent.let_cards_go(&guest, limit)?;
    }
    agent.settle(&guest, limit)?;
    if let (Some(disk), Some(planned)) = (&disk, &vm.scratch) {
        planned.clear(disk)?;
    }
    agent.furnish(&guest, disk.as_ref().map(|_| ROOT_NAME), limit)?;
    let (machine, memory) = at_rest(&guest, Instant::now() + limit)?;
    let scratch = disk.as_ref().map(Content::of).transpose();
    let (scratch, bytes) = scratch.map_err(RehearsalError::from)?.unzip();
    let guest = template::SavedGuest {
        machine: &machine,
        scratch,
    };
    let bytes = bytes.unwrap_or_default();
    maker.publish(key, &agent.kernel, &memory, &bytes, &guest)?;
    Ok(())
}

/// What a guest has that belongs to nobody.
fn stage(console: BootLog, key: &Key, vm: &PlannedVm) -> Result<Opened, BaseError> {
    Ok(Opened {
        kvm: open_kvm(vm)?,
        shares: rehearsal::shares(key.ours_alone)?,
        console,
        network: Joined::spare(key.cards).map_err(RehearsalError::from)?,
        scratch: vm
            .scratch
            .as_ref()
            .map(PlannedScratch::stand_in)
            .transpose()?,
    })
}

/// Saves the guest once no stream but its agent's is open.
fn at_rest(guest: &Vm, deadline: Instant) -> Result<(MachineState, Arc<File>), BaseError> {
    loop {
        guest.rest(REST);
        let (state, memory) = guest.save()?;
        if state.has_but_one_stream(CONTROL_PORT) {
            return Ok((state, memory));
        }
        if Instant::now() > deadline {
            return Err(BaseError::Restless);
        }
        guest.resume();
    }
}
