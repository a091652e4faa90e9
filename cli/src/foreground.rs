//! A process in the foreground: this process's terminal, streams and signals are its own.
//!
//! Owns: raw mode around the relay, and which descriptors it gets. Refuses: what an end means.

use std::io::{IsTerminal, stderr, stdin, stdout};
use std::os::fd::AsFd;

use anyhow::Context;
use hull_sandbox::ProcessStream;

use crate::args::DetachKeys;
use crate::failure::Coded;
use crate::relay::{End, Ends, Stdin, relay};
use crate::signals::Signals;
use crate::terminal::{self, RawTerminal};

/// What the process is given of ours.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Given {
    /// Our stdin.
    pub(crate) stdin: bool,
    /// It has a terminal, so ours becomes raw and its size follows ours.
    pub(crate) tty: bool,
}

/// Refuses `-it` without a terminal, which would hang or garble.
pub(crate) fn check_terminal(given: Given) -> Result<(), Coded> {
    if given.stdin && given.tty && !stdin().is_terminal() {
        return Err(Coded::hull(
            "the input device is not a TTY: leave out -t, or run from a terminal",
        ));
    }
    Ok(())
}

/// The size that the process's terminal begins with: ours.
pub(crate) fn terminal_size(given: Given) -> Option<(u16, u16)> {
    let size = || terminal::size(stdout()).or_else(|| terminal::size(stdin()));
    given.tty.then(size).flatten()
}

/// Relays until the process ends or is left.
pub(crate) fn relay_process(
    stream: ProcessStream,
    given: Given,
    keys: &DetachKeys,
    signals: &mut Signals,
) -> anyhow::Result<End> {
    let (stdin, stdout, stderr) = (stdin(), stdout(), stderr());
    let raw = (given.stdin && given.tty && stdin.is_terminal())
        .then(|| RawTerminal::enter(&stdin))
        .transpose()
        .context("cannot put the terminal in raw mode")?;
    let (socket, decoder) = stream.into_parts();
    let ends = Ends {
        stdin: if given.stdin {
            Stdin::From(stdin.as_fd())
        } else {
            Stdin::AtEnd
        },
        stdout: stdout.as_fd(),
        stderr: stderr.as_fd(),
        terminal: match given.tty {
            true if stdout.is_terminal() => Some(stdout.as_fd()),
            true if stdin.is_terminal() => Some(stdin.as_fd()),
            _ => None,
        },
        signals,
        sig_proxy: keys.sig_proxy,
        detach_keys: if given.tty {
            keys.keys.0.clone()
        } else {
            Vec::new()
        },
    };
    let end = relay(&socket, decoder, ends);
    drop(raw);
    Ok(end?)
}
