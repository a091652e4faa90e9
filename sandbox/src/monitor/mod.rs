//! The monitor: the process that holds one VM, from the first inherited descriptor to the exit
//! record.
//!
//! Owns the order of things: open, put the root together, build, jail, run. Sole writer of
//! `state.json` and `exit.json`. Refuses to outlive its container.
//!
//! ```text
//! inherited ─► open ─► rootfs ─► build ─► boot ─► setup ─► spawn ─► running ─► exit.json ─► gone
//!                └────────┴────────┴───────┴───────┴────────┴─► failure on the readiness pipe
//! ```

mod base;
mod boot;
mod carrier;
mod client;
mod driver;
mod forward;
mod going_on;
mod guest;
mod jail;
mod journal;
mod member;
mod opening;
mod peer;
mod rehearsal;
mod stdin;
#[cfg(test)]
mod tests;
mod view;
mod vm;

use std::env;
use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::Receiver;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use hull_proto::ExitStatus;

use crate::cgroup::{self, Cgroup};
use crate::checkpoint::{self, CLEAR_UP, CarriedStreams};
use crate::control;
use crate::exit::{CODE_HULL_FAILED, FailureClass};
use crate::launch::{BUILD_TEMPLATE, Inherited, Readiness, StartFailure, Streams};
use crate::logs::LogWriter;
use crate::plan::{self, Plan};
use crate::rootfs::{self, SharedDirectory};
use crate::state::ExitRecord;
use crate::store::{Entry, Store, lock};
use crate::sys;

use base::Base;
use boot::{Agent, BootError, Furniture, Started};
use carrier::{Carried, Carrier, Waiting};
use driver::{Driver, End, Finished, Parts, Record};
use guest::Guest;
use member::Membership;
use opening::{OpenError, connect, enter_cgroup, open, open_console, open_kvm};
use view::{Scene, View};
use vm::{Opened, Source, Vm};

/// Descriptors that a monitor may have: the kernel's own limit for a process.
const DESCRIPTORS: u64 = 1 << 20;

/// What the last output of a container may take to be read by whoever gave the monitor its own
/// streams.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// A container that has ended by then shows all that a start needs, up to its end.
const SHORT: SignedDuration = SignedDuration::from_secs(2);

/// What a killed container may take before its VM is ended.
const KILL_GRACE: Duration = Duration::from_secs(3);

/// What a guest may take to answer a question.
const PATIENCE: Duration = Duration::from_secs(10);

/// The whole life of the monitor process. It ends with the container's code.
#[must_use]
pub fn main() -> ExitCode {
    let word = env::args_os().nth(1).unwrap_or_default();
    if word == BUILD_TEMPLATE {
        return build_template();
    }
    if word == CLEAR_UP {
        return clear_up();
    }
    match Inherited::take() {
        Ok(inherited) => Monitor::new(inherited).run(),
        Err(_) => {
            // Started by hand: there is nobody to tell but this.
            let _ = writeln!(io::stderr(), "hull-monitor is started by hull, not by hand");
            ExitCode::from(CODE_HULL_FAILED)
        }
    }
}

/// Removes a directory in the making when its maker has ended.
fn clear_up() -> ExitCode {
    if let Some(path) = env::args_os().nth(2) {
        checkpoint::clear_up(Path::new(&path));
    }
    ExitCode::SUCCESS
}

/// Makes the template of the VM that is described on stdin; says its name, or what went wrong.
fn build_template() -> ExitCode {
    let made = serde_json::from_reader(io::stdin())
        .map_err(|error| vec![format!("the VM's description can't be read: {error}")])
        .and_then(|vm| base::build(&vm).map_err(|error| chain(&error)));
    let (said, code) = match made {
        Ok(name) => (writeln!(io::stdout(), "{name}"), ExitCode::SUCCESS),
        Err(chain) => {
            let failed = ExitCode::from(CODE_HULL_FAILED);
            (writeln!(io::stderr(), "{}", chain.join(": ")), failed)
        }
    };
    // Whoever started this may not listen any more.
    let _ = said;
    code
}

struct Monitor {
    entry: Entry,
    store: Store,
    lock: File,
    /// Its end is what tells the face that all was said.
    readiness: Option<File>,
    streams: Streams,
    /// What the container goes on from, if it doesn't begin.
    checkpoint: Option<File>,
    began: u64,
    /// What whoever started the container should hear.
    notice: Option<String>,
    base: Base,
}

/// Where a first process runs.
struct Place {
    guest: Box<dyn Guest>,
    started: Started,
    agent: Agent,
    jail: Vec<String>,
    cgroup: Option<Cgroup>,
    /// What its engine is to see of it.
    scene: Option<Scene>,
    /// What another monitor knew of it, if it goes on from a checkpoint.
    carried: CarriedStreams,
}

/// A start that stopped at a stage.
struct Failed {
    stage: &'static str,
    class: FailureClass,
    chain: Vec<String>,
}

fn stage<E: Error>(stage: &'static str) -> impl FnOnce(E) -> Failed {
    move |error| Failed {
        stage,
        class: FailureClass::Hull,
        chain: chain(&error),
    }
}

fn chain(error: &dyn Error) -> Vec<String> {
    let mut chain = vec![error.to_string()];
    let mut source = error.source();
    while let Some(error) = source {
        chain.push(error.to_string());
        source = error.source();
    }
    chain
}

impl Monitor {
    fn new(inherited: Inherited) -> Self {
        Self {
            store: inherited.entry.store(),
            entry: inherited.entry,
            lock: inherited.lock,
            readiness: Some(inherited.readiness),
            streams: inherited.streams,
            checkpoint: inherited.checkpoint,
            began: sys::monotonic_ns(),
            notice: None,
            base: Base::default(),
        }
    }

    fn run(mut self) -> ExitCode {
        // Files that the guest makes have the modes that the guest gives them.
        rustix::process::umask(Mode::empty());
        // Unsigned, it can't be removed by force; that is no reason not to run.
        let _ = lock::sign(&self.lock);
        raise_descriptor_limit();
        let plan = match self.checkpoint {
            Some(_) => self.entry.saved_plan(),
            None => self.entry.plan(),
        };
        let plan = match plan {
            Ok(plan) => plan,
            Err(error) => return self.give_up(None, stage("open")(error)),
        };
        // While there is one thread.
        let carried = match Carrier::of(std::mem::take(&mut self.streams)) {
            Ok(carried) => carried,
            Err(error) => return self.give_up(Some(&plan), stage("open")(error)),
        };
        match plan.bundle {
            // Its engine goes by its process.
            Some(_) => view::beside(|view| self.hold(&plan, carried, Some(view))),
            None => self.hold(&plan, carried, None),
        }
    }

    fn hold(mut self, plan: &Plan, carried: Carried, view: Option<View>) -> ExitCode {
        match self.start(plan, carried, view) {
            Ok((driver, carrier, cgroup)) => self.attend(plan, driver, carrier, cgroup),
            Err(failed) => self.give_up(Some(plan), failed),
        }
    }

    /// Every stage up to a running first process.
    fn start<'a>(
        &mut self,
        plan: &'a Plan,
        (attached, carrier): Carried,
        view: Option<View>,
    ) -> Result<(Driver<'a>, Option<Carrier>, Option<Cgroup>), Failed> {
        self.entry.forget_run().map_err(stage("open"))?;
        journal::begin(&self.entry.journal_path());
        let listener = self.listen().map_err(stage("open"))?;
        let log = LogWriter::open(self.entry.log_path(), plan.log_limit_bytes)
            .map_err(OpenError::log(&self.entry))
            .map_err(stage("open"))?;
        let Place {
            guest,
            started,
            mut agent,
            jail,
            cgroup,
            scene,
            carried,
        } = match (&plan.sandbox, self.checkpoint.take()) {
            (Some(sandbox), _) => self.join(plan, sandbox)?,
            (None, Some(file)) => going_on::go_on(&self.entry, plan, file, view.as_ref())?,
            (None, None) => self.bring_up(plan, view.as_ref())?,
        };
        if let (Some(view), Some(scene)) = (view, scene) {
            view.show(scene).map_err(stage("view"))?;
        }
        agent.marks.monitor = self.began;
        agent.marks.started = sys::monotonic_ns();
        let record = Record::begin(&self.entry, plan, &agent.kernel, started.guest_pid)
            .map_err(stage("spawn"))?;
        let driver = Driver::new(Parts {
            plan,
            guest,
            started,
            carried,
            agent,
            log,
            listener,
            attached,
            record,
            jail,
            kill_grace: KILL_GRACE,
            patience: PATIENCE,
        })
        .map_err(stage("spawn"))?;
        let carrier = carrier.map(Waiting::start).transpose();
        Ok((driver, carrier.map_err(stage("spawn"))?, cgroup))
    }

    /// A first process in a VM of its own.
    fn bring_up(&mut self, plan: &Plan, view: Option<&View>) -> Result<Place, Failed> {
        let network = connect(plan, view)?;
        // A guest that is to be copied belongs to nobody, and to no container's share.
        let mut base = Base::find(&self.entry, plan, network.cards());
        let opened = open(&self.entry, plan, network, base.scratch())?;
        let scene = scene(&self.entry, plan, &opened.shares)?;
        let cgroup = enter_cgroup(plan)?;
        let (mut vm, agent, jail) = self.awaken(plan, opened, &mut base)?;
        let started = spawn(&vm, plan)?;
        if let Some(set) = vm.observed() {
            base.learn(&set);
        }
        vm.forward();
        vm.await_network(view);
        self.notice = base.notice.take();
        self.base = base;
        Ok(Place {
            guest: Box::new(vm),
            started,
            agent,
            jail,
            cgroup,
            scene,
            carried: CarriedStreams::default(),
        })
    }

    /// A first process in the VM of a pod's sandbox.
    fn join(&self, plan: &Plan, sandbox: &str) -> Result<Place, Failed> {
        let shares = rootfs::assemble(&self.entry, plan).map_err(stage("rootfs"))?;
        let scene = scene(&self.entry, plan, &shares)?;
        let cgroup = enter_cgroup(plan)?;
        let joined = Membership::join(
            &self.store,
            sandbox,
            &plan.id,
            &shares,
            plan::memory_limit(plan),
        );
        let (member, agent) = joined.map_err(stage("join"))?;
        let jail = jail::enter().map_err(stage("jail"))?;
        let started = spawn(&member, plan)?;
        Ok(Place {
            guest: Box::new(member),
            started,
            agent,
            jail,
            cgroup,
            scene,
            carried: CarriedStreams::default(),
        })
    }

    /// From what was opened to an agent that has its identity.
    fn awaken(
        &mut self,
        plan: &Plan,
        opened: Opened,
        base: &mut Base,
    ) -> Result<(Vm, Agent, Vec<String>), Failed> {
        let limit = Duration::from_secs(u64::from(plan.vm.boot_timeout_s));
        let (mut vm, dials, copied) = self.build(plan, opened, base)?;
        let jail = jail::enter().map_err(stage("jail"))?;
        let built = sys::monotonic_ns();
        let watch = vm.start().map_err(stage("build"))?;
        let from_template = copied.is_some();
        let mut failed = |stage: &'static str, vm: &Vm, error: &BootError| {
            if from_template {
                base.give_up(error);
            }
            boot_failed(stage, vm, error)
        };
        let mut agent = match copied {
            Some(kernel) => boot::carried_on(&dials, kernel),
            None => boot::hello(&vm, &dials, limit),
        }
        .map_err(|error| failed("boot", &vm, &error))?;
        drop(watch);
        let furniture = Furniture {
            hostname: &plan.hostname,
            interfaces: vm.interfaces(),
            layers: plan.layers(),
            shared_memory: plan.has_shared_memory(),
        };
        agent
            .setup(&vm, furniture, limit)
            .map_err(|error| failed("setup", &vm, &error))?;
        agent.marks.built = built;
        Ok((vm, agent, jail))
    }

    /// Builds the VM from its base; from its kernel if that doesn't work. Returns the guest
    /// kernel's release, too, if the guest is a copy.
    fn build(
        &self,
        plan: &Plan,
        mut opened: Opened,
        base: &mut Base,
    ) -> Result<(Vm, Receiver<UnixStream>, Option<String>), Failed> {
        if let Some(template) = base.template.take() {
            let kernel = template.kernel.clone();
            let spare = Opened {
                kvm: opened.kvm.try_clone().map_err(stage("open"))?,
                shares: rootfs::again(&opened.shares).map_err(stage("rootfs"))?,
                console: open_console(&self.entry).map_err(stage("open"))?,
                network: opened.network.again().map_err(stage("network"))?,
                scratch: opened
                    .scratch
                    .as_ref()
                    .map(File::try_clone)
                    .transpose()
                    .map_err(stage("open"))?,
            };
            match Vm::build(&plan.vm, opened, Source::Copy(template.into())) {
                Ok((vm, dials)) => return Ok((vm, dials, Some(kernel))),
                Err(error) => base.give_up(&error),
            }
            opened = spare;
        }
        let source = Source::boot(&plan.vm, false).map_err(stage("open"))?;
        let (vm, dials) = Vm::build(&plan.vm, opened, source).map_err(stage("build"))?;
        Ok((vm, dials, None))
    }

    fn listen(&self) -> Result<UnixListener, OpenError> {
        let path = self.entry.socket_path();
        let failed = |source| OpenError::Path {
            what: "control socket",
            path: path.clone(),
            source,
        };
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.entry.run, flags, Mode::empty())
            .map_err(|error| failed(error.into()))?;
        UnixListener::bind(control::address(&directory)).map_err(failed)
    }

    fn attend(
        mut self,
        plan: &Plan,
        mut driver: Driver<'_>,
        carrier: Option<Carrier>,
        cgroup: Option<Cgroup>,
    ) -> ExitCode {
        let notice = self.notice.take();
        self.say(&Readiness::Started { notice });
        let end = match driver.run() {
            Ok(end) => end,
            Err(error) => End::Guest(format!("the monitor failed: {error}")),
        };
        let started_at = driver.started_at();
        let oom = driver.ran_out_of_memory();
        let Finished {
            mut clients,
            listener,
            guest: still,
        } = driver.finish();
        let (mut record, status) = record(end, Some(started_at));
        record.oom |= oom;
        self.close(plan, &record, cgroup);
        drop(listener);
        for client in &mut clients {
            client.tell_end(&record, status);
        }
        // What can't be told any more is in the record.
        let _ = driver::flush(clients, carrier.as_ref().map(|_| LAST_OUTPUT));
        if let Some(carrier) = carrier {
            carrier.finish(LAST_OUTPUT);
        }
        // One that was short needed at its end what others need, too.
        let short = started_at.duration_until(Timestamp::now()) < SHORT;
        if let Some(set) = still.observed().filter(|_| short) {
            self.base.learn(&set);
        }
        // Whoever adopted this process takes its end for the container's.
        ExitCode::from(record.code)
    }

    /// Leaves the container as one that has ended, or nothing of it.
    fn close(&self, plan: &Plan, record: &ExitRecord, cgroup: Option<Cgroup>) {
        drop(cgroup);
        // Nobody is left to tell, and readers see a monitor that died: as good as it gets.
        let _ = self.entry.write_exit(record, !plan.auto_remove);
        let _ = fs::remove_file(self.entry.socket_path());
        if plan.auto_remove {
            // A joined thread may be in it for a moment more, and nobody asks for it again.
            if let Some(cgroup) = plan.host_cgroup() {
                cgroup::remove(&cgroup, false);
            }
            // What is left is cleared by the next sweep.
            let _ = self.store.remove(&self.entry, &self.lock);
        }
        let _ = flock(&self.lock, FlockOperation::Unlock);
    }

    fn give_up(mut self, plan: Option<&Plan>, failed: Failed) -> ExitCode {
        let failure = StartFailure {
            stage: failed.stage.to_owned(),
            class: failed.class,
            chain: failed.chain,
        };
        if let Some(plan) = plan {
            let record = ExitRecord {
                code: failure.class.run_code(),
                signal: None,
                oom: false,
                started_at: None,
                finished_at: Timestamp::now(),
                error: Some(failure.to_string()),
            };
            self.close(plan, &record, None);
        }
        self.say(&Readiness::Failed(failure));
        ExitCode::from(CODE_HULL_FAILED)
    }

    /// The face may be gone: the container doesn't need it.
    fn say(&mut self, readiness: &Readiness) {
        if let (Ok(mut line), Some(mut pipe)) =
            (serde_json::to_vec(readiness), self.readiness.take())
        {
            line.push(b'\n');
            let _ = pipe.write_all(&line);
        }
    }
}

/// A descriptor stands behind every file that the guest knows. With fewer, the guest's caches are
/// smaller: not worth failing for.
fn raise_descriptor_limit() {
    let limit = |most| Rlimit {
        current: Some(most),
        maximum: Some(most),
    };
    if setrlimit(Resource::Nofile, limit(DESCRIPTORS)).is_err()
        && let Some(most) = getrlimit(Resource::Nofile).maximum
    {
        let _ = setrlimit(Resource::Nofile, limit(most));
    }
}

/// What a bundle's engine is to see of its container.
fn scene(entry: &Entry, plan: &Plan, shares: &[SharedDirectory]) -> Result<Option<Scene>, Failed> {
    let take = |_| Scene::take(entry, plan, shares).map_err(stage("view"));
    plan.bundle.as_ref().map(take).transpose()
}

fn spawn(guest: &dyn Guest, plan: &Plan) -> Result<Started, Failed> {
    let limit = Duration::from_secs(u64::from(plan.vm.boot_timeout_s));
    boot::spawn(guest, plan, limit).map_err(|error| boot_failed("spawn", guest, &error))
}

fn boot_failed(stage: &'static str, guest: &dyn Guest, error: &BootError) -> Failed {
    let class = match error {
        BootError::Spawn(failure) => failure.kind.into(),
        _ => FailureClass::Hull,
    };
    let mut chain = chain(error);
    let shown = matches!(
        error,
        BootError::Spawn(_) | BootError::Setup(_) | BootError::Ended(_)
    );
    let lines = guest.console();
    if !shown && !lines.is_empty() {
        chain.push(format!("its console's last lines:\n{}", lines.join("\n")));
    }
    Failed {
        stage,
        class,
        chain,
    }
}

fn record(end: End, started_at: Option<Timestamp>) -> (ExitRecord, Option<ExitStatus>) {
    let status = match &end {
        End::Process(status) => Some(*status),
        End::Killed => Some(ExitStatus::Signaled {
            signal: 9,
            oom: false,
        }),
        End::Guest(_) | End::Refused(_) => None,
    };
    let (signal, oom) = match status {
        Some(ExitStatus::Signaled { signal, oom }) => (Some(signal), oom),
        _ => (None, false),
    };
    let record = ExitRecord {
        code: match (&end, status) {
            (End::Refused(failure), _) => FailureClass::from(failure.kind).run_code(),
            (_, Some(status)) => u8::try_from(status.code()).unwrap_or(u8::MAX),
            (_, None) => CODE_HULL_FAILED,
        },
        signal,
        oom,
        started_at,
        finished_at: Timestamp::now(),
        error: match end {
            End::Guest(why) => Some(why),
            End::Refused(failure) => Some(failure.message),
            _ => None,
        },
    };
    (record, status)
}
