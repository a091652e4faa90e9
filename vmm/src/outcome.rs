//! How a machine ended: the first cause wins, whoever finds it, and everybody can wait for it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::EventfdFlags;

/// Why a machine no longer runs.
///
/// A kernel that panicked isn't among them: it shows as [`VmExit::Reset`] (with
/// `panic=-1` or a timeout on its command line), and the console holds its last words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VmExit {
    /// The guest shut down, through the power port.
    Shutdown,
    /// The guest reset the machine, through the keyboard controller.
    Reset,
    /// A vCPU gave up on three nested faults.
    TripleFault,
    /// [`crate::machine::Machine::stop`] was called.
    Stopped,
    /// KVM couldn't go on with a vCPU.
    InternalError {
        /// Which vCPU.
        vcpu: u8,
        /// What KVM says, with the suberror.
        reason: String,
        /// The vCPU's registers, for a person.
        registers: String,
    },
    /// The host lacks something that a device can't live without.
    DeviceFailed {
        /// The device's unit.
        device: String,
        /// The chain of causes.
        cause: String,
    },
}

impl fmt::Display for VmExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => write!(f, "guest shut down"),
            Self::Reset => write!(f, "guest reset the machine"),
            Self::TripleFault => write!(f, "guest crashed on a triple fault"),
            Self::Stopped => write!(f, "stopped"),
            Self::InternalError {
                vcpu,
                reason,
                registers,
            } => {
                write!(f, "vCPU {vcpu} failed: {reason}\n{registers}")
            }
            Self::DeviceFailed { device, cause } => write!(f, "device {device} failed: {cause}"),
        }
    }
}

/// The place where the cause is put.
pub struct Outcome {
    first: Mutex<Option<VmExit>>,
    told: Condvar,
    /// Readable from the moment there is one.
    ready: OwnedFd,
}

impl Outcome {
    /// An open outcome.
    ///
    /// # Errors
    /// When the host has no eventfd left.
    pub fn new() -> io::Result<Self> {
        let ready = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self {
            first: Mutex::new(None),
            told: Condvar::new(),
            ready,
        })
    }

    /// Puts a cause; only the first stays.
    pub fn report(&self, exit: VmExit) {
        let mut first = lock(&self.first);
        if first.is_none() {
            *first = Some(exit);
            self.told.notify_all();
            // A write of 1 to an eventfd at 0 can't fail.
            let _ = rustix::io::write(&self.ready, &1u64.to_ne_bytes());
        }
    }

    /// The cause, if there is one.
    #[must_use]
    pub fn get(&self) -> Option<VmExit> {
        lock(&self.first).clone()
    }

    /// Waits for the cause.
    #[must_use]
    pub fn wait(&self) -> VmExit {
        let mut first = lock(&self.first);
        loop {
            if let Some(exit) = first.as_ref() {
                return exit.clone();
            }
            first = self
                .told
                .wait(first)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the cause, but no longer than `limit`.
    #[must_use]
    pub fn wait_for(&self, limit: Duration) -> Option<VmExit> {
        let deadline = Instant::now() + limit;
        let mut first = lock(&self.first);
        while first.is_none() {
            let left = deadline.checked_duration_since(Instant::now())?;
            (first, _) = self
                .told
                .wait_timeout(first, left)
                .unwrap_or_else(PoisonError::into_inner);
        }
        first.clone()
    }

    /// A descriptor that is readable from the moment there is a cause, to be polled.
    #[must_use]
    pub fn ready(&self) -> BorrowedFd<'_> {
        self.ready.as_fd()
    }
}

/// Locks, whatever became of the thread that held it before: a panic aborts the monitor in
/// release builds, so that poison is a matter of tests alone.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn the_first_cause_wins_and_wakes() {
        let outcome = Arc::new(Outcome::new().unwrap());
        assert_eq!(outcome.wait_for(Duration::ZERO), None);
        let waiting = Arc::clone(&outcome);
        let waiter = std::thread::spawn(move || waiting.wait());
        outcome.report(VmExit::Reset);
        outcome.report(VmExit::Stopped);
        assert_eq!(waiter.join().unwrap(), VmExit::Reset);
        let mut count = [0; 8];
        assert_eq!(rustix::io::read(outcome.ready(), &mut count), Ok(8));
    }
}
