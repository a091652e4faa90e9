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

mod boot;
mod carrier;
mod client;
mod driver;
mod guest;
mod jail;
mod peer;
mod stdin;
#[cfg(test)]
mod tests;
mod vm;

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use jiff::Timestamp;
use rustix::fs::{FlockOperation, Mode, OFlags, flock};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use hull_proto::ExitStatus;

use crate::cgroup::Cgroup;
use crate::console::BootLog;
use crate::exit::{CODE_HULL_FAILED, FailureClass};
use crate::launch::{Inherited, Readiness, StartFailure, Streams};
use crate::logs::LogWriter;
use crate::plan::Plan;
use crate::rootfs;
use crate::state::{ExitRecord, Phase, Running};
use crate::store::{Entry, Store, lock};
use crate::sys;

use boot::BootError;
use carrier::{Carrier, Waiting};
use driver::{Driver, End, Parts, Record};
use guest::Guest;
use vm::{Opened, Vm};

/// Descriptors that a monitor may have: the kernel's own limit for a process.
const DESCRIPTORS: u64 = 1 << 20;

/// What the last output of a container may take to be read by whoever gave the monitor its own
/// streams.
const LAST_OUTPUT: Duration = Duration::from_secs(10);

/// What a killed container may take before its VM is ended.
const KILL_GRACE: Duration = Duration::from_secs(3);

/// The whole life of the monitor process. It ends with the container's code.
#[must_use]
pub fn main() -> ExitCode {
    match Inherited::take() {
        Ok(inherited) => Monitor::new(inherited).run(),
        Err(_) => {
            // Started by hand: there is nobody to tell but this.
            let _ = writeln!(io::stderr(), "hull-monitor is started by hull, not by hand");
            ExitCode::from(CODE_HULL_FAILED)
        }
    }
}

struct Monitor {
    entry: Entry,
    store: Store,
    lock: File,
    readiness: File,
    streams: Streams,
    began: u64,
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
            readiness: inherited.readiness,
            streams: inherited.streams,
            began: sys::monotonic_ns(),
        }
    }

    fn run(mut self) -> ExitCode {
        // Files that the guest makes have the modes that the guest gives them.
        rustix::process::umask(Mode::empty());
        // Unsigned, it can't be removed by force; that is no reason not to run.
        let _ = lock::sign(&self.lock);
        raise_descriptor_limit();
        let plan = match self.entry.plan() {
            Ok(plan) => plan,
            Err(error) => return self.give_up(None, stage("open")(error)),
        };
        let streams = std::mem::take(&mut self.streams);
        match self.start(&plan, streams) {
            Ok((driver, carrier, cgroup)) => self.attend(&plan, driver, carrier, cgroup),
            Err(failed) => self.give_up(Some(&plan), failed),
        }
    }

    /// Every stage up to a running first process.
    fn start<'a>(
        &self,
        plan: &'a Plan,
        streams: Streams,
    ) -> Result<(Driver<'a>, Option<Carrier>, Option<Cgroup>), Failed> {
        let (attached, carrier) = Carrier::of(streams).map_err(stage("open"))?;
        let cgroup = match plan.vm.cpu_quota {
            Some(cpus) => Some(Cgroup::enter(&plan.id, cpus).map_err(stage("open"))?),
            None => None,
        };
        self.entry.forget_run().map_err(stage("open"))?;
        let listener = self.listen().map_err(stage("open"))?;
        let log = LogWriter::open(self.entry.log_path(), plan.log_limit_bytes)
            .map_err(OpenError::log(&self.entry))
            .map_err(stage("open"))?;
        let opened = open(&self.entry, plan)?;
        let limit = Duration::from_secs(u64::from(plan.vm.boot_timeout_s));
        let (mut vm, dials) = Vm::build(&plan.vm, opened).map_err(stage("build"))?;
        let jail = jail::enter().map_err(stage("jail"))?;
        let built = sys::monotonic_ns();
        let watch = vm.start().map_err(stage("build"))?;
        let failed =
            |stage: &'static str, vm: &Vm, error: &BootError| boot_failed(stage, vm, error);
        let mut agent = boot::hello(&vm, &dials, limit).map_err(|e| failed("boot", &vm, &e))?;
        drop(watch);
        agent
            .setup(&vm, plan, limit)
            .map_err(|e| failed("setup", &vm, &e))?;
        let started = boot::spawn(&vm, plan, limit).map_err(|e| failed("spawn", &vm, &e))?;
        agent.marks.monitor = self.began;
        agent.marks.built = built;
        agent.marks.started = sys::monotonic_ns();
        let running = Running {
            monitor_pid: std::process::id(),
            guest_pid: started.guest_pid,
            started_at: Timestamp::now(),
            phase: if plan.held {
                Phase::Held
            } else {
                Phase::Running
            },
            kernel: agent.kernel.clone(),
        };
        self.entry.write_running(&running).map_err(stage("spawn"))?;
        let driver = Driver::new(Parts {
            plan,
            guest: Box::new(vm),
            started,
            agent,
            log,
            listener,
            attached,
            record: Record {
                entry: Some(self.entry.clone()),
                running,
            },
            jail,
            kill_grace: KILL_GRACE,
        })
        .map_err(stage("spawn"))?;
        let carrier = carrier.map(Waiting::start).transpose();
        Ok((driver, carrier.map_err(stage("spawn"))?, cgroup))
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
        // By descriptor, as a socket's address holds but 107 bytes.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.entry.run, flags, Mode::empty())
            .map_err(|error| failed(error.into()))?;
        let short = Path::new(&sys::descriptor_path(&directory)).join("control.sock");
        UnixListener::bind(short).map_err(failed)
    }

    fn attend(
        mut self,
        plan: &Plan,
        mut driver: Driver<'_>,
        carrier: Option<Carrier>,
        cgroup: Option<Cgroup>,
    ) -> ExitCode {
        self.say(&Readiness::Started);
        let end = match driver.run() {
            Ok(end) => end,
            Err(error) => End::Guest(format!("the monitor failed: {error}")),
        };
        let started_at = driver.started_at();
        let mut clients = driver.finish();
        let (record, status) = record(end, Some(started_at));
        self.close(plan, &record, cgroup);
        for client in &mut clients {
            client.tell_end(&record, status);
        }
        // What can't be told any more is in the record.
        let _ = driver::flush(clients, carrier.as_ref().map(|_| LAST_OUTPUT));
        if let Some(carrier) = carrier {
            carrier.finish(LAST_OUTPUT);
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
        if let Ok(mut line) = serde_json::to_vec(readiness) {
            line.push(b'\n');
            let _ = self.readiness.write_all(&line);
        }
        // The pipe's end is what tells the face that all was said.
        if let Ok(null) = File::open("/dev/null") {
            self.readiness = null;
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

/// Something that the VM needs and that can't be opened.
#[derive(Debug, thiserror::Error)]
enum OpenError {
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
    fn log(entry: &Entry) -> impl FnOnce(io::Error) -> Self {
        let path = entry.log_path();
        move |source| Self::Path {
            what: "log",
            path,
            source,
        }
    }
}

fn open(entry: &Entry, plan: &Plan) -> Result<Opened, Failed> {
    let file = |what: &'static str, path: &Path| {
        File::open(path).map_err(|source| OpenError::Path {
            what,
            path: path.to_owned(),
            source,
        })
    };
    if !plan.vm.allow_emulated_kvm && !sys::has_virtualization() {
        let path = plan.vm.kvm.clone();
        return Err(stage("open")(OpenError::Emulated { path }));
    }
    let kvm = rustix::fs::open(&plan.vm.kvm, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| OpenError::Path {
            what: "the hypervisor's device",
            path: plan.vm.kvm.clone(),
            source: error.into(),
        })
        .map_err(stage("open"))?;
    let kernel = file("guest kernel", &plan.vm.kernel).map_err(stage("open"))?;
    let initrd = file("guest's first root", &plan.vm.initrd).map_err(stage("open"))?;
    let console = BootLog::open(entry.boot_log_path())
        .map_err(|source| OpenError::Path {
            what: "boot log",
            path: entry.boot_log_path(),
            source,
        })
        .map_err(stage("open"))?;
    let shares = rootfs::assemble(entry, plan).map_err(stage("rootfs"))?;
    Ok(Opened {
        kvm,
        kernel,
        initrd,
        shares,
        console,
    })
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
