//! A container's first process that is there before its container.
//!
//! Owns: that process, from a guest that is about to be saved to the container that takes it, and
//! what is known of a next container before it comes: that it will ask for what the first one did.
//! Refuses: a container that asks for other namespaces; such a one gets a process of its own.
//!
//! What a first process costs, namespaces, memory and file systems of its own, is in the saved
//! guest then, and no copy does it again. Its namespaces are held open, so that they don't go with
//! the last process in them, but when there is nothing better to do.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use hull_proto::ContainerStart;
use rustix::process::Pid;
use serde::{Deserialize, Serialize};

use crate::cgroup::{Cgroup, OomWatch};
use crate::fault::{Fault, Tried};
use crate::namespaces::{self, Namespaces};
use crate::report::{self, Word};
use crate::spawn::{self, Born};
use crate::stage::Scenery;

/// What it may take to be ready.
const PATIENCE: Duration = Duration::from_secs(5);

/// What containers ask for, as far as it can be made before the next one is known.
#[derive(Debug)]
pub(crate) struct Habit {
    pub(crate) namespaces: Namespaces,
    pub(crate) scenery: Scenery,
}

/// What such a process is told beside its container's spec.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Orders<'a> {
    /// The guest's host name by now.
    pub(crate) hostname: Cow<'a, str>,
    /// As in [`ContainerStart`].
    pub(crate) init: bool,
    pub(crate) hold: bool,
}

/// A process that waits for its container.
#[derive(Debug)]
pub(crate) struct Spare {
    born: Born,
    pidfd: OwnedFd,
    cgroup: Cgroup,
    namespaces: Namespaces,
    held: Vec<OwnedFd>,
}

/// What a container takes over from it.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) born: Born,
    pub(crate) pidfd: OwnedFd,
    pub(crate) cgroup: Cgroup,
    /// Its namespaces.
    pub(crate) held: Vec<OwnedFd>,
}

impl Spare {
    /// Makes one in `cgroup`, for a container such as there was before, and waits until it is ready.
    ///
    /// # Errors
    /// If there can be none; the group is given back.
    pub(crate) fn make(habit: &Habit, cgroup: Cgroup) -> Result<Self, (Fault, Cgroup)> {
        let made = spawn::spare(habit, &cgroup).and_then(|made| {
            let (born, _) = &made;
            match report::hear_within(PATIENCE, &born.line) {
                Ok(Word::Waiting) => Ok(made),
                Ok(Word::Failed(failure)) => Err(Fault::internal(failure.message)),
                Ok(_) => Err(Fault::internal("a process made in advance has ended")),
                Err(errno) => Err(errno).or_internal(|| "a process made in advance isn't ready"),
            }
        });
        match made {
            Ok((born @ Born { pid, .. }, pidfd)) => Ok(Self {
                born: Born {
                    oom_watch: OomWatch::of(&cgroup),
                    ..born
                },
                pidfd,
                cgroup,
                namespaces: habit.namespaces.clone(),
                held: namespaces::all_of(pid),
            }),
            Err(fault) => Err((fault, cgroup)),
        }
    }

    /// Whether it can be the first process of a container with these namespaces.
    pub(crate) fn fits(&self, namespaces: &Namespaces) -> bool {
        self.namespaces == *namespaces
    }

    /// Its id.
    pub(crate) fn pid(&self) -> Pid {
        self.born.pid
    }

    /// Its cgroup.
    pub(crate) fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Tells it what it is.
    ///
    /// # Errors
    /// If it has died.
    pub(crate) fn order(&self, start: &ContainerStart) -> Result<(), Fault> {
        let what = || "the process that was made in advance takes no orders";
        let guest = rustix::system::uname();
        let orders = Orders {
            hostname: guest.nodename().to_string_lossy(),
            init: start.init,
            hold: start.hold,
        };
        let orders = serde_json::to_vec(&orders).or_internal(what)?;
        let texts = [orders.as_slice(), start.spec.text().as_bytes()];
        report::order(self.born.line.as_fd(), texts).or_internal(what)
    }

    /// Its parts, once it is a container's.
    pub(crate) fn into_parts(self) -> Parts {
        Parts {
            born: self.born,
            pidfd: self.pidfd,
            cgroup: self.cgroup,
            held: self.held,
        }
    }
}
