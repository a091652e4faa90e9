//! Signals that arrive at this process, as bytes of a socket that can be polled.
//!
//! Owns: which signals are caught while a command runs in the foreground. Refuses: to act on them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;

use signal_hook::consts::signal::{
    SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH,
};
use signal_hook::iterator::backend::SignalDelivery;
use signal_hook::iterator::exfiltrator::SignalOnly;

/// Caught from creation to the end of the process. What arrives before anybody asks is kept.
#[derive(Debug)]
pub(crate) struct Signals {
    delivery: SignalDelivery<UnixStream, SignalOnly>,
    kept: Vec<u8>,
}

/// The signal by which the kernel tells of a new window size.
pub(crate) const WINDOW_CHANGED: u8 = 28;

/// What is sent when the output's reader has gone: SIGPIPE, as a local command would get it.
pub(crate) const PIPE: u8 = 13;

/// How a container's other processes end when its first one has: SIGKILL.
pub(crate) const KILL: u8 = 9;

impl Signals {
    /// Catches what a person or a supervisor sends to a foreground command. SIGTSTP keeps its
    /// meaning (this process stops), so a shell's job control works.
    pub(crate) fn catch() -> io::Result<Self> {
        let forwarded = [
            SIGHUP, SIGINT, SIGQUIT, SIGALRM, SIGTERM, SIGCONT, SIGUSR1, SIGUSR2, SIGWINCH,
        ];
        let (read, write) = UnixStream::pair()?;
        Ok(Self {
            delivery: SignalDelivery::with_pipe(read, write, SignalOnly, forwarded)?,
            kept: Vec::new(),
        })
    }

    /// The signals that arrived since the last call, each once.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        let pending = self.delivery.pending();
        let mut signals = std::mem::take(&mut self.kept);
        signals.extend(pending.filter_map(|number| u8::try_from(number).ok()));
        signals
    }

    /// Gives a signal back for the next [`Self::take`], which nothing wakes anybody for.
    pub(crate) fn keep(&mut self, signal: u8) {
        self.kept.push(signal);
    }

    /// Whether this signal asks a command to end.
    pub(crate) fn ends(signal: u8) -> bool {
        [SIGHUP, SIGINT, SIGQUIT, SIGTERM].contains(&i32::from(signal))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.delivery.get_read().as_fd()
    }
}
