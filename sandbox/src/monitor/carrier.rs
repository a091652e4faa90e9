//! The monitor as the carrier of its container's streams, when it was given its creator's own.
//!
//! The carrier is one more client of the driver, on a thread: whatever holds it up holds up the
//! process and never the driver.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use crate::carry::{Changes, Stdio, carry};
use crate::launch::Streams;
use crate::stream::ProcessStream;

/// A carrier whose thread is still to be started: after the jail, which is each thread's.
pub(super) struct Waiting {
    stream: ProcessStream,
    stdio: Stdio,
    changes: Option<Changes>,
}

/// The first client's stream, and the carrier that is that client.
pub(super) type Carried = (Option<UnixStream>, Option<Waiting>);

/// A carrier at work.
pub(super) struct Carrier {
    done: Receiver<()>,
}

impl Carrier {
    /// The first client's stream, and a carrier if that is who the client is. To be called while
    /// the process has one thread.
    pub(super) fn of(streams: Streams) -> io::Result<Carried> {
        let stdio = match streams {
            Streams::None => return Ok((None, None)),
            Streams::Attached(stream) => return Ok((Some(stream), None)),
            Streams::Own(stdio) => stdio,
        };
        let (near, far) = UnixStream::pair()?;
        let changes = match stdio.terminal {
            true => Some(Changes::of(stdio.stdin.as_fd())?),
            false => None,
        };
        let waiting = Waiting {
            stream: ProcessStream::new(far)?,
            stdio,
            changes,
        };
        Ok((Some(near), Some(waiting)))
    }

    /// Waits until the last output is written, for at most this long.
    pub(super) fn finish(self, limit: Duration) {
        // Either way, the process is about to end.
        let _ = self.done.recv_timeout(limit);
    }
}

impl Waiting {
    pub(super) fn start(self) -> io::Result<Carrier> {
        let (finished, done) = mpsc::channel();
        thread::Builder::new()
            .name("stdio".to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                // How it ended is the driver's to know.
                let _ = carry(self.stream, self.stdio, self.changes);
                let _ = finished.send(());
            })?;
        Ok(Carrier { done })
    }
}
