//! What a running container has used and may use, in its guest and on the host.
//!
//! Owns: asking the guest's agent, by the monitor, and the monitor's own cgroup. Refuses: to wait
//! for a guest without end; the monitor answers in the place of one that doesn't.

use hull_proto::{CgroupStats, ProcessInfo};
use oci_spec::runtime::LinuxResources;

use crate::cgroup;
use crate::container::Container;
use crate::control::{ControlError, InterfaceStats, Reply, Request};
use crate::engine::EngineError;
use crate::plan;

/// Most pages of processes that are asked for: what a hostile guest can make up.
const MAX_PAGES: usize = 256;

impl Container {
    /// What the container has used and may use in its guest.
    ///
    /// # Errors
    /// If it doesn't run, is paused, or its guest doesn't answer.
    pub fn stats(&self) -> Result<CgroupStats, EngineError> {
        match self.question("read the statistics of", Request::Stats)? {
            Reply::Stats(stats) => Ok(*stats),
            _ => Err(self.out_of_place("read the statistics of")),
        }
    }

    /// What has gone over the cards of its VM, by the interfaces that they are tied to: none of a
    /// pod's container but the sandbox's own.
    ///
    /// # Errors
    /// If it doesn't run.
    pub fn interfaces(&self) -> Result<Vec<InterfaceStats>, EngineError> {
        match self.question("read the statistics of", Request::Inspect)? {
            Reply::Inspect(report) => Ok(report.interfaces),
            _ => Err(self.out_of_place("read the statistics of")),
        }
    }

    /// What its monitor, guest memory included, has used on the host; none if the monitor is in
    /// no cgroup of its own.
    #[must_use]
    pub fn host_stats(&self) -> Option<CgroupStats> {
        cgroup::stats(&self.plan().host_cgroup()?)
    }

    /// Its processes in its guest, in the order of their ids. What they say of themselves is a
    /// stranger's text.
    ///
    /// # Errors
    /// As [`Self::stats`].
    pub fn processes(&self) -> Result<Vec<ProcessInfo>, EngineError> {
        let (mut processes, mut after) = (Vec::new(), 0);
        for _ in 0..MAX_PAGES {
            let request = Request::Processes { after };
            let page = match self.question("list the processes of", request)? {
                Reply::Processes(page) => page,
                _ => return Err(self.out_of_place("list the processes of")),
            };
            let last = page.processes.iter().map(|process| process.pid).max();
            processes.extend(page.processes);
            match last {
                Some(last) if page.more && last > after => after = last,
                _ => break,
            }
        }
        Ok(processes)
    }

    /// Changes its limits, in its guest and on the host, and has its next start keep them. One
    /// that came from a bundle starts only once, and is to be running.
    ///
    /// # Errors
    /// As [`Self::stats`]; and for what its VM can't do: more processors than it was started with,
    /// more memory than the host has or than the guest takes in time.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), EngineError> {
        let update = plan::update(resources, self.plan())?;
        let starts_again = self.plan().bundle.is_none();
        let claim = match self.change(&update) {
            Err(EngineError::NotRunning(_)) if starts_again => {
                // Nor does it begin to run without them, as long as this is held.
                let claim = self.store().claim(self.entry())?;
                Some(claim.ok_or_else(|| EngineError::NotRunning(self.id().to_owned()))?)
            }
            changed => changed.map(|()| None)?,
        };
        if starts_again {
            self.store().keep_limits(self.entry(), &update)?;
        }
        drop(claim);
        Ok(())
    }

    /// Changes the limits of one that runs.
    fn change(&self, update: &plan::Update) -> Result<(), EngineError> {
        let failed = |source| self.failed("update", source);
        let guest = serde_json::to_value(&update.guest).map_err(ControlError::from);
        let request = Request::Update {
            resources: guest.map_err(failed)?,
        };
        // The guest first: what it refuses isn't done in part.
        match self.question("update", request)? {
            Reply::Ok => {}
            _ => return Err(self.out_of_place("update")),
        }
        match self.plan().host_cgroup() {
            Some(cgroup) => Ok(cgroup::update(&cgroup, &update.host)?),
            None => Ok(()),
        }
    }

    /// Waits until more than `seen` of its processes have been killed because memory ran out in
    /// its guest; returns how many there were by then, or none if it ended first.
    ///
    /// # Errors
    /// If it doesn't run.
    pub fn await_oom(&self, seen: u32) -> Result<Option<u32>, EngineError> {
        let socket = self.connect()?;
        match self.ask("watch", &socket, Request::AwaitOom { seen }) {
            Ok(Reply::OomKilled { count }) => Ok(Some(count)),
            Ok(_) | Err(EngineError::NotRunning(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn question(&self, action: &'static str, request: Request) -> Result<Reply, EngineError> {
        let socket = self.connect()?;
        self.ask(action, &socket, request)
    }

    fn out_of_place(&self, action: &'static str) -> EngineError {
        let message = "the guest's agent answered something else".to_owned();
        self.failed(action, ControlError::Refused(message))
    }
}
