//! A pod's sandbox that containerd asks for by name (`sandboxer = "shim"`): a VM that nothing runs
//! in yet, held by a process of the agent's own in place of a pause container's.
//!
//! ```text
//! bundle/hull/root/                     the holder's root: empty
//! bundle/hull/etc/{hostname,hosts,resolv.conf}   what its containers find in theirs
//! ```

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use containerd_shim_protos::sandbox_api::CreateSandboxRequest;
use hull_sandbox::control::InterfaceStats;
use hull_sandbox::{BundleRequest, CgroupStats, Container};
use hull_shim::{bundle, lifecycle};
use oci_spec::runtime::Spec;

use crate::bootstrap;
use crate::fault::{Answer, Fault};
use crate::pod::{self, Config};
use crate::process::{Exit, Held, Phase, Process};
use crate::stdio::{self, Names};
use crate::task::{self, Surroundings};

/// What is the shim's own in a sandbox's bundle.
const OWN: &str = "hull";
/// The files that containerd makes for a pod's containers where there is a pause container.
const FILES: [&str; 3] = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
const SIGKILL: u8 = 9;

/// A sandbox.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    /// Its monitor.
    pub(crate) pid: u32,
    pub(crate) created_at: SystemTime,
    own: PathBuf,
    holder: Process,
    container: Container,
}

impl Sandbox {
    /// Makes one: its VM is up, and nothing is left of one that fails.
    pub(crate) fn create(
        around: &Surroundings,
        request: &CreateSandboxRequest,
    ) -> Answer<Arc<Self>> {
        let config = Config::read(request.options.as_ref())?;
        let own = Path::new(&request.bundle_path).join(OWN);
        let made = Self::make(around, request, config, own.clone());
        let sandbox = made.map_err(|error| {
            // The error at hand is the one to tell.
            let _ = fs::remove_dir_all(&own);
            Fault::of("cannot create the sandbox", &error)
        })?;
        let sandbox = Arc::new(sandbox);
        let watched = Arc::clone(&sandbox);
        let watching = task::spawn("sandbox", move || {
            let (code, _) = task::await_code(watched.pid, &watched.container);
            watched.holder.ended(Exit::now(code), || {});
        });
        if watching.is_err() {
            let _ = task::remove(&around.engine, &sandbox.id, &sandbox.own);
        }
        watching.map(|()| sandbox)
    }

    fn make(
        around: &Surroundings,
        request: &CreateSandboxRequest,
        mut config: Config,
        own: PathBuf,
    ) -> anyhow::Result<Self> {
        let bundle = PathBuf::from(&request.bundle_path);
        let given = match bundle.join(bundle::CONFIG).try_exists() {
            Ok(true) => bundle::config(&bundle)?,
            _ => Spec::default(),
        };
        if config.hostname.is_empty() && given.hostname().is_none() {
            let host = rustix::system::uname();
            config.hostname = host.nodename().to_string_lossy().into_owned();
        }
        let root = own.join("root");
        let spec = pod::holder(request, &config, &given, &root)?;
        write_files(&own, &spec, &config)
            .with_context(|| format!("cannot write into \"{}\"", own.display()))?;
        let wanted = BundleRequest {
            id: request.sandbox_id.clone(),
            bundle,
            spec,
            checkpoint: None,
            only_holds: true,
        };
        let mut pid = 0;
        let container = lifecycle::make(
            &around.engine,
            &wanted,
            |_| Ok(stdio::open(&Names::default(), &around.namespace, &wanted.id)?.stdio),
            |running| {
                pid = running.monitor_pid;
                let process = wanted.spec.process().as_ref();
                let score = process.and_then(|process| process.oom_score_adj());
                bootstrap::set_score(pid, score.unwrap_or(0));
                Ok(())
            },
            |error| log::warn!("{error:#}"),
        )?;
        Ok(Self {
            id: request.sandbox_id.clone(),
            pid,
            created_at: SystemTime::now(),
            own,
            holder: Process::new("", Names::default(), Held::default()),
            container,
        })
    }

    /// Lets containers come.
    pub(crate) fn start(&self) -> Answer<()> {
        self.holder.begin()?;
        let released = lifecycle::release(&self.container, |error| log::warn!("{error:#}"));
        if let Err(error) = released {
            self.holder.not_started(None);
            return Err(Fault::of("cannot start the sandbox", &error));
        }
        self.holder.started(|| {});
        Ok(())
    }

    /// How it ended, if it has.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match self.holder.phase() {
            Phase::Stopped(exit) => Some(exit),
            _ => None,
        }
    }

    /// Whether it runs.
    pub(crate) fn is_ready(&self) -> bool {
        self.holder.phase() == Phase::Running
    }

    /// Waits for its end.
    pub(crate) fn until_ended(&self) -> Exit {
        self.holder.until_ended()
    }

    /// Ends it and all in it, by force after a time.
    pub(crate) fn stop(&self, timeout: Option<Duration>) -> Answer<()> {
        // One that wasn't started hears nothing yet.
        let signal = (!self.is_ready()).then_some(SIGKILL);
        self.container
            .stop(signal, timeout)
            .map_err(|error| Fault::of("cannot stop the sandbox", &error.into()))?;
        self.until_ended();
        Ok(())
    }

    /// Removes it, running or not.
    pub(crate) fn remove(&self, around: &Surroundings) -> Answer<()> {
        let failed = |error: anyhow::Error| Fault::of("cannot remove the sandbox", &error);
        task::remove(&around.engine, &self.id, &self.own).map_err(failed)?;
        self.until_ended();
        match fs::remove_dir_all(&self.own) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(failed(error.into())),
            _ => Ok(()),
        }
    }

    /// What its holder has used in the guest: an answer of the agent's.
    pub(crate) fn stats(&self) -> Answer<CgroupStats> {
        let read = self.container.stats();
        read.map_err(|error| Fault::of_engine("cannot reach the sandbox's guest", error))
    }

    /// What has gone over its VM's cards.
    pub(crate) fn interfaces(&self) -> Answer<Vec<InterfaceStats>> {
        let read = self.container.interfaces();
        read.map_err(|error| Fault::of_engine("cannot reach the sandbox's monitor", error))
    }

    /// Bytes of memory that its guest was started with.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.container.plan().vm.memory_bytes
    }

    /// All that is known of it, for a person.
    pub(crate) fn describe(&self) -> Answer<String> {
        let known = self.container.inspect();
        let known = known.map_err(|error| Fault::of("cannot describe the sandbox", &error.into()));
        Ok(known?.to_string())
    }

    /// Has a container be one of its.
    pub(crate) fn take_in(&self, spec: &mut Spec) -> anyhow::Result<()> {
        let source = |target: &str| self.own.join(target.trim_start_matches('/'));
        let files = FILES.map(|target| (target, source(target)));
        pod::join(spec, &self.id, &files)
    }
}

/// As containerd writes them for a pause container.
fn write_files(own: &Path, spec: &Spec, config: &Config) -> std::io::Result<()> {
    let mut builder = DirBuilder::new();
    builder.recursive(true).mode(0o755);
    builder.create(own.join("root"))?;
    builder.create(own.join("etc"))?;
    let name = spec.hostname().clone().unwrap_or_default();
    let hosts = fs::read("/etc/hosts").unwrap_or_default();
    let resolver = match config.resolver() {
        Some(lines) => lines.into_bytes(),
        None => fs::read("/etc/resolv.conf").unwrap_or_default(),
    };
    let contents = [format!("{name}\n").into_bytes(), hosts, resolver];
    for (target, content) in FILES.into_iter().zip(contents) {
        fs::write(own.join(target.trim_start_matches('/')), content)?;
    }
    Ok(())
}
