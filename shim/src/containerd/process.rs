//! One process as containerd knows it: from created to stopped, each step announced in order.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use hull_sandbox::StreamSender;

use crate::fault::{Answer, Fault};
use crate::stdio::{Keeper, Logger, Names};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// Its code, or 128 + the signal.
    pub(crate) code: u32,
    /// When that was seen.
    pub(crate) at: SystemTime,
}

impl Exit {
    /// As of now.
    pub(crate) fn now(code: u32) -> Self {
        Self {
            code,
            at: SystemTime::now(),
        }
    }

    /// The time in containerd's form.
    pub(crate) fn timestamp(self) -> MessageField<Timestamp> {
        MessageField::some(self.at.into())
    }
}

/// What a process is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// It is made and not started.
    Created,
    /// Somebody is starting it.
    Starting,
    /// It runs.
    Running,
    /// Its guest stands still.
    Paused,
    /// It has ended.
    Stopped(Exit),
}

impl Phase {
    /// In containerd's words.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Created | Self::Starting => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }

    /// Why `action` can't be done now, in the words of containerd's own shims.
    pub(crate) fn forbids(self, action: &str) -> Fault {
        let word = self.word();
        Fault::Failed(match (action, self) {
            ("pause" | "resume", Self::Created | Self::Starting) => {
                format!("cannot {action} task in created state")
            }
            ("pause" | "update", _) | ("resume", Self::Stopped(_)) => {
                format!("cannot {action} a {word} container")
            }
            _ => format!("cannot {action} a {word} process"),
        })
    }
}

/// What this shim holds for a process while it lives.
#[derive(Debug, Default)]
pub(crate) struct Held {
    /// Keeps stdin from ending.
    pub(crate) keeper: Option<Keeper>,
    /// Reads its output.
    pub(crate) logger: Option<Logger>,
    /// Talks to it, if it isn't the first process.
    pub(crate) sender: Option<StreamSender>,
}

/// A process.
#[derive(Debug)]
pub(crate) struct Process {
    /// Its name; empty for a container's first process.
    pub(crate) exec_id: String,
    /// Its streams' names.
    pub(crate) names: Names,
    phase: Mutex<Phase>,
    changed: Condvar,
    held: Mutex<Held>,
}

impl Process {
    /// One that is made.
    pub(crate) fn new(exec_id: &str, names: Names, held: Held) -> Self {
        Self {
            exec_id: exec_id.to_owned(),
            names,
            phase: Mutex::new(Phase::Created),
            changed: Condvar::new(),
            held: Mutex::new(held),
        }
    }

    /// What it is about.
    pub(crate) fn phase(&self) -> Phase {
        *self.lock()
    }

    /// What is held for it.
    pub(crate) fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the right to start it.
    pub(crate) fn begin(&self) -> Answer<()> {
        let mut phase = self.lock();
        match *phase {
            Phase::Created => *phase = Phase::Starting,
            other => return Err(other.forbids("start")),
        }
        Ok(())
    }

    /// It runs; `announce` comes before the announcement of its end.
    pub(crate) fn started(&self, announce: impl FnOnce()) {
        self.set(Phase::Running, announce);
    }

    /// It could not be started: it goes on as it was, or is over at once.
    pub(crate) fn not_started(&self, exit: Option<Exit>) {
        self.set(exit.map_or(Phase::Created, Phase::Stopped), || {});
    }

    /// Goes from one phase to another, if it is still in the one.
    pub(crate) fn pass(
        &self,
        from: Phase,
        to: Phase,
        action: &str,
        announce: impl FnOnce(),
    ) -> Answer<()> {
        let mut phase = self.lock();
        if *phase != from {
            return Err(phase.forbids(action));
        }
        *phase = to;
        announce();
        Ok(())
    }

    /// It has ended; waits for whoever is starting it, who has something to announce before.
    pub(crate) fn ended(&self, exit: Exit, announce: impl FnOnce()) {
        let mut phase = self.lock();
        while *phase == Phase::Starting {
            phase = self.wait(phase);
        }
        if !matches!(*phase, Phase::Stopped(_)) {
            *phase = Phase::Stopped(exit);
            announce();
        }
        drop(phase);
        self.changed.notify_all();
    }

    /// Announces what happens to it, unless its end was announced before.
    pub(crate) fn unless_ended(&self, announce: impl FnOnce()) {
        let phase = self.lock();
        if !matches!(*phase, Phase::Stopped(_)) {
            announce();
        }
    }

    /// Waits for its end.
    pub(crate) fn until_ended(&self) -> Exit {
        let mut phase = self.lock();
        loop {
            if let Phase::Stopped(exit) = *phase {
                return exit;
            }
            phase = self.wait(phase);
        }
    }

    fn set(&self, to: Phase, announce: impl FnOnce()) {
        let mut phase = self.lock();
        *phase = to;
        announce();
        drop(phase);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, phase: MutexGuard<'a, Phase>) -> MutexGuard<'a, Phase> {
        self.changed
            .wait(phase)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::thread;

    use super::*;

    #[test]
    fn an_end_is_announced_after_the_start() {
        let process = Arc::new(Process::new("", Names::default(), Held::default()));
        process.begin().unwrap();
        assert!(process.begin().is_err());
        let (say, heard) = mpsc::channel();
        let (ending, said) = (Arc::clone(&process), say.clone());
        let ended = thread::spawn(move || {
            ending.ended(Exit::now(7), || said.send("exit").unwrap());
        });
        // Whichever of the two comes first.
        thread::yield_now();
        process.started(|| say.send("start").unwrap());
        ended.join().unwrap();
        assert_eq!(process.until_ended().code, 7);
        assert_eq!(heard.try_iter().collect::<Vec<_>>(), ["start", "exit"]);
        let refused = process.pass(Phase::Running, Phase::Paused, "pause", || {});
        let words = refused.unwrap_err().to_string();
        assert_eq!(words, "cannot pause a stopped container");
    }
}
