//! What a running container is about: held before its command, running, or standing still.
//!
//! Owns: the changes between these, and the record of them on disk. Refuses those that make no
//! sense.
//!
//! ```text
//! held ── Release, Started ──► running ◄── Resume, Pause ──► paused
//!      └─ GoOn, of a checkpoint's ─┘
//! ```

use std::io;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use hull_proto::{ExitStatus, Failure, FailureKind, Frame, PROCESS_PORT};
use jiff::Timestamp;

use crate::control::{self, Reply, Report};
use crate::plan::Plan;
use crate::state::{Phase, Running};
use crate::store::{Entry, StoreError};

use super::super::chain;
use super::super::client::{Client, Role, Then};
use super::{AGENT_BACKLOG, Driver, End};

/// What is said of the running container on disk.
pub(in crate::monitor) struct Record {
    /// Where; nowhere in tests.
    pub(in crate::monitor) entry: Option<Entry>,
    /// What.
    pub(in crate::monitor) running: Running,
}

impl Record {
    /// Writes that the first process of `plan` runs.
    pub(in crate::monitor) fn begin(
        entry: &Entry,
        plan: &Plan,
        kernel: &str,
        guest_pid: u32,
    ) -> Result<Self, StoreError> {
        let running = Running {
            monitor_pid: std::process::id(),
            guest_pid,
            started_at: Timestamp::now(),
            phase: match plan.held {
                true => Phase::Held,
                false => Phase::Running,
            },
            kernel: kernel.to_owned(),
        };
        entry.write_running(&running)?;
        if !plan.auto_remove {
            entry.stay()?;
        }
        Ok(Self {
            entry: Some(entry.clone()),
            running,
        })
    }

    /// Writes what changed.
    pub(super) fn enter(&mut self, phase: Phase) -> Result<(), StoreError> {
        self.running.phase = phase;
        match &self.entry {
            Some(entry) => entry.write_running(&self.running),
            None => Ok(()),
        }
    }
}

impl Driver<'_> {
    /// Hands a stream to the agent over and steps out of the way.
    pub(super) fn exec(&mut self, client: &mut Client) {
        let stream = match self.guest.connect(PROCESS_PORT) {
            Ok(stream) => stream,
            Err(error) => return client.refuse(&format!("cannot reach the agent: {error}")),
        };
        let sent = control::line(&Reply::Ok)
            .map_err(io::Error::other)
            .and_then(|line| {
                control::send_with_fds(client.peer.socket(), &line, &[stream.as_fd()])
            });
        client.role = Role::Leaving;
        if sent.is_err() {
            client.peer.mark_gone();
        }
    }
    /// When the first process started.
    pub(in crate::monitor) fn started_at(&self) -> Timestamp {
        self.record.running.started_at
    }

    /// Whether processes of the container were killed for want of memory.
    pub(in crate::monitor) fn ran_out_of_memory(&self) -> bool {
        self.oom_kills > 0
    }

    /// The guest's kernel killed for want of memory: whoever waits for it is told.
    pub(super) fn oom_killed(&mut self, count: u32) {
        self.oom_kills = self.oom_kills.max(count);
        for client in &mut self.clients {
            client.tell_oom(self.oom_kills);
        }
    }

    /// What is known of it here.
    pub(super) fn report(&self, attached: usize) -> Report {
        Report {
            pid: std::process::id(),
            attached,
            jail: self.jail.clone(),
            marks: self.marks,
            fs_requests: self.guest.fs_requests(),
            interfaces: self.guest.traffic(),
        }
    }

    /// Asks it to end, and kills it later.
    pub(super) fn stop(&mut self, signal: Option<u8>, timeout_ms: Option<u64>) {
        let grace = timeout_ms.map_or(
            Duration::from_secs(u64::from(self.plan.stop_timeout_s)),
            Duration::from_millis,
        );
        self.signal(signal.unwrap_or(self.plan.stop_signal), false);
        // A grace past the clock's end is no deadline at all.
        if let Some(deadline) = Instant::now().checked_add(grace) {
            self.kill_at = Some(self.kill_at.map_or(deadline, |known| known.min(deadline)));
        }
    }

    pub(super) fn resize(&mut self, rows: u16, cols: u16) {
        if self.agent.pending() < AGENT_BACKLOG {
            self.agent.send_frame(&Frame::Resize { rows, cols });
        }
    }

    pub(super) fn phase(&self) -> Phase {
        self.record.running.phase
    }

    /// The command is to run, with the network that is there by now.
    pub(super) fn release(&mut self, client: &mut Client) {
        match self.guest.find_network() {
            None => {
                self.let_go();
                client.role = Role::Releasing;
            }
            Some(Ok(request)) => self.question_then(client, &request, Then::Go),
            Some(Err(error)) => {
                client.role = Role::Releasing;
                self.cannot_run(chain(&error).join(": "));
            }
        }
    }

    /// Ends the container before its command runs: its engine takes a start that failed for that.
    pub(super) fn cannot_run(&mut self, message: String) {
        let kind = FailureKind::Internal;
        self.unfit = Some(Failure { kind, message });
    }

    /// Has the agent let the command run, or the processes of a checkpoint go on.
    pub(super) fn let_go(&mut self) {
        if !std::mem::take(&mut self.still) {
            return self.agent.send_frame(&Frame::Go);
        }
        match self.questions.ask(&hull_proto::Request::GoOn) {
            Ok(number) => self.waking = Some(number),
            Err(why) => self.cannot_run(why.to_owned()),
        }
    }

    /// The agent has said whether the processes of a checkpoint go on.
    pub(super) fn woken(&mut self, reply: hull_proto::Reply) {
        self.waking = None;
        match reply {
            hull_proto::Reply::Error { message } => self.cannot_run(message),
            _ => self.released(),
        }
    }

    /// The first process has ended, which may be heard before that it went on.
    pub(super) fn exited(&mut self, status: ExitStatus) -> End {
        if self.waking.take().is_some() {
            self.released();
        }
        End::Process(status)
    }

    /// Has the guest go on, and in it what stands still.
    pub(super) fn wake(&mut self) {
        self.guest.resume();
        if std::mem::take(&mut self.still) {
            // An agent that can't be asked has ended, or will be found to have.
            let _ = self.questions.ask(&hull_proto::Request::GoOn);
        }
    }

    /// The command runs: whoever asked for it is told.
    pub(super) fn released(&mut self) {
        self.record.running.started_at = Timestamp::now();
        let written = self.record.enter(Phase::Running);
        for client in &mut self.clients {
            if matches!(client.role, Role::Releasing) {
                match &written {
                    Ok(()) => client.reply(&Reply::Ok),
                    Err(error) => client.refuse(&error.to_string()),
                }
            }
        }
    }

    pub(super) fn hold_still(&mut self, client: &mut Client, from: Phase, to: Phase) {
        if self.phase() != from {
            let state = match self.phase() {
                Phase::Held => "not started",
                Phase::Running => "not paused",
                Phase::Paused => "paused already",
            };
            return client.refuse(&format!("the container is {state}"));
        }
        if self.frozen || to == Phase::Paused && self.shares_guest() {
            self.frozen = true;
            let frozen = to == Phase::Paused;
            let id = self.plan.id.clone();
            let request = hull_proto::Request::Freeze { id, frozen };
            self.question_then(client, &request, Then::Enter(to));
            self.frozen = frozen;
            return;
        }
        match to {
            Phase::Paused => self.guest.pause(),
            _ => self.wake(),
        }
        match self.record.enter(to) {
            Ok(()) => client.reply(&Reply::Ok),
            Err(error) => client.refuse(&error.to_string()),
        }
    }
}
