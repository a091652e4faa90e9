//! A container that is saved while it runs.
//!
//! Owns: having its processes stand still, then its guest, what is written of it, and that it goes
//! on whatever becomes of who asked. Refuses: what can't go on elsewhere. While the guest is
//! written nobody else is served: there is nothing that it could be asked.
//!
//! ```text
//! running ── StandStill ──► frozen ── pause, write ──► still ── the client hangs up ──► GoOn, running
//! paused ─── resume, StandStill ─┘                       │  └── it was paused ──► paused, GoOn at its end
//!                                                        └───── it sends a byte ──► ended
//! ```

use std::fs::File;
use std::time::Instant;

use hull_proto::{CONTROL_PORT, GENERATION, PROCESS_PORT, RESOLVER_PORT};
use serde_json::Value;

use crate::checkpoint::{About, Carried, CarriedStreams};
use crate::control::{Reply, Request};
use crate::plan::{self, PlannedRoot};
use crate::state::Phase;
use crate::template::Ground;
use crate::template::file::{self, FileError, Kind, Saved};

use super::super::chain;
use super::super::client::{Client, Role};
use super::super::guest::SnapshotError;
use super::Driver;

/// What others are told meanwhile.
pub(super) const BUSY: &str = "a checkpoint of the container is being made";

/// Whether a guest that is being saved can't be asked for it.
pub(super) fn disturbs(request: &Request) -> bool {
    matches!(
        request,
        Request::Pause | Request::Resume | Request::Exec | Request::Join { .. }
    )
}

/// A guest that can't be saved as it is.
#[derive(Debug, thiserror::Error)]
enum SavingError {
    #[error(transparent)]
    Guest(#[from] SnapshotError),
    #[error(
        "it has {0} exec sessions, or connections to its localhost from its network's: end them before"
    )]
    Sessions(usize),
    #[error("its engine's name server answers it")]
    Resolver,
    #[error("its first process is ending")]
    Ending,
    #[error("its agent is busy: try again")]
    Busy,
    #[error("its guest can't be written")]
    File(#[from] FileError),
}

/// A checkpoint in the making.
#[derive(Debug)]
pub(super) struct Saving {
    file: File,
    ground: Ground,
    /// Until the processes stand still: the question's number, and how long they may take.
    freezing: Option<(u64, Instant)>,
    /// The guest must go on before all is saved.
    spoiled: bool,
}

impl Saving {
    pub(super) fn awaits(&self, number: u64) -> bool {
        self.freezing.is_some_and(|(own, _)| own == number)
    }

    pub(super) fn until(&self) -> Option<Instant> {
        self.freezing.map(|(_, until)| until)
    }

    pub(super) fn spoil(&mut self) {
        self.spoiled = true;
    }
}

impl Driver<'_> {
    /// A client wants the container saved.
    pub(super) fn save(&mut self, client: &mut Client, ground: &Value) {
        if let Some(why) = self.unsaveable() {
            return client.refuse(&format!("it can't be saved: {why}"));
        }
        let (Some(file), Ok(ground)) = (client.descriptors.pop(), Ground::read(ground)) else {
            return client.refuse("no file came along to save it to");
        };
        // Only its agent can have its processes stand still.
        self.guest.resume();
        match self.questions.ask(&hull_proto::Request::StandStill) {
            Ok(number) => {
                let until = Instant::now() + self.questions.patience;
                self.saving = Some(Saving {
                    file: file.into(),
                    ground,
                    freezing: Some((number, until)),
                    spoiled: false,
                });
                client.role = Role::Saving;
            }
            // That agent has ended, and so will its guest.
            Err(why) => client.refuse(why),
        }
    }

    /// Why the container can't be saved as it is.
    fn unsaveable(&self) -> Option<&'static str> {
        let is_foreign = matches!(self.plan.root, PlannedRoot::Directory(_));
        if self.phase() == Phase::Held {
            Some("its command was not started")
        } else if self.saving.is_some() {
            Some(BUSY)
        } else if self.shares_guest() || plan::is_sandbox(&self.plan.labels) {
            Some("it is a pod's, and shares its guest with others")
        } else if is_foreign && self.plan.bundle.is_none() {
            Some("its root directory is used in place")
        } else {
            None
        }
    }

    /// The processes stand still, or don't.
    pub(super) fn stands_still(&mut self, reply: hull_proto::Reply) {
        if let hull_proto::Reply::Error { message } = reply {
            return self.refuse_saving(&format!("its processes don't stand still: {message}"));
        }
        let Some(saving) = self.saving.as_mut() else {
            return;
        };
        saving.freezing = None;
        self.guest.pause();
        match self.write() {
            Ok(()) => {
                let mut clients = self.clients.iter_mut();
                // One that is gone is noticed when clients are served.
                if let Some(client) = clients.find(|client| matches!(client.role, Role::Saving)) {
                    client.answer(&Reply::Ok);
                }
            }
            Err(error) => {
                let why = chain(&error).join(": ");
                self.refuse_saving(&format!("it can't be saved: {why}"));
            }
        }
    }

    /// Writes the guest, which stands still.
    fn write(&mut self) -> Result<(), SavingError> {
        if !self.questions.is_quiet() {
            return Err(SavingError::Busy);
        }
        // What the guest sent and the device's socket holds is nowhere else.
        while let Some(bytes) = self.agent.receive(&mut self.chunk) {
            if bytes.is_empty() {
                return Err(SavingError::Ending);
            }
            self.decoder.feed(bytes);
        }
        let Some(saving) = &self.saving else {
            return Err(SavingError::Busy);
        };
        let (machine, memory) = self.guest.snapshot()?;
        let streams = machine.streams().unwrap_or_default();
        let process_port = match streams.as_slice() {
            [(CONTROL_PORT, _), (port, PROCESS_PORT)] => *port,
            all if all.iter().any(|(port, _)| *port == RESOLVER_PORT) => {
                return Err(SavingError::Resolver);
            }
            [_, _, sessions @ ..] if !sessions.is_empty() => {
                return Err(SavingError::Sessions(sessions.len()));
            }
            _ => return Err(SavingError::Ending),
        };
        let (stdin_outstanding, stdin_ended) = self.stdin.state();
        let state = Carried {
            machine,
            process_port,
            streams: CarriedStreams {
                guest_pid: self.guest_pid,
                oom_kills: self.oom_kills,
                stdin_outstanding,
                stdin_ended,
                to_agent: self.agent.unsent().to_vec(),
                from_agent: self.decoder.rest().to_vec(),
            },
        };
        let saved = Saved {
            kind: Kind::Checkpoint,
            key: &About {
                ground: saving.ground.clone(),
                agent: GENERATION,
                plan: self.plan.clone(),
            },
            kernel: &self.record.running.kernel,
            memory_bytes: memory.length(),
            state: &state,
        };
        Ok(file::write(&saving.file, &saved, &memory)?)
    }

    /// Tells who asked, who leaves then; the guest goes on when clients are served.
    pub(super) fn refuse_saving(&mut self, why: &str) {
        for client in &mut self.clients {
            if matches!(client.role, Role::Saving) {
                client.refuse(why);
            }
        }
    }

    /// Who had it saved wants nothing more of it.
    pub(super) fn end_saved(&mut self) {
        let is_saved = |saving: &Saving| saving.freezing.is_none() && !saving.spoiled;
        if self.saving.as_ref().is_some_and(is_saved) {
            self.stop_at = Some(Instant::now());
        }
    }

    /// Has the guest go on, or be paused as it was, once nobody needs it to stand still.
    pub(super) fn end_saving(&mut self) {
        let spoiled = self.saving.as_ref().is_some_and(|saving| saving.spoiled);
        if spoiled {
            self.refuse_saving("the container was killed meanwhile");
        }
        let is_needed = |client: &Client| matches!(client.role, Role::Saving);
        if self.clients.iter().any(is_needed) || self.saving.take().is_none() {
            return;
        }
        self.still = true;
        match self.phase() == Phase::Paused && !spoiled {
            true => self.guest.pause(),
            false => self.wake(),
        }
    }
}
