//! The guest of a pod's later container: the sandbox's, reached through the sandbox's monitor.
//!
//! ```text
//! this monitor ── Join, directories ──► the sandbox's   the lease: its end ends the container;
//!              ◄═ requests, replies ═►   ...             meanwhile the agent's control stream
//!              ── Wait ───────────────►                  readable when the guest has ended
//!              ── Exec ───────────────► ◄── fd           one per process stream
//! ```

use std::cell::OnceCell;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use hull_proto::PROCESS_PORT;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};

use crate::control::{self, ControlError, JoiningShare, Reply, Request};
use crate::rootfs::SharedDirectory;
use crate::store::{Store, StoreError};

use super::boot::Agent;
use super::driver::GROWTH_PATIENCE;
use super::guest::Guest;

/// What the sandbox's monitor, which never waits, may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// A sandbox that can't be joined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    /// It isn't known, or can't be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// It has no guest at this moment.
    #[error("the pod's sandbox {0} is not running")]
    NotRunning(String),
    /// Its monitor can't be reached.
    #[error("cannot reach the monitor of the pod's sandbox {id}")]
    Reach {
        /// The sandbox.
        id: String,
        /// Why not.
        source: io::Error,
    },
    /// Its monitor said no.
    #[error("the pod's sandbox {id} takes no container")]
    Refused {
        /// The sandbox.
        id: String,
        /// Why not.
        source: ControlError,
    },
}

/// A place in a sandbox.
pub(super) struct Membership {
    /// Where the sandbox's control socket is.
    directory: OwnedFd,
    lease: UnixStream,
    end: UnixStream,
    ending: OnceCell<String>,
}

impl Membership {
    /// Joins, with the directories that the guest is to see. Returns the agent, too.
    pub(super) fn join(
        store: &Store,
        sandbox: &str,
        id: &str,
        shares: &[SharedDirectory],
        memory_bytes: Option<u64>,
    ) -> Result<(Self, Agent), JoinError> {
        let entry = store.get(sandbox)?;
        let not_running = || JoinError::NotRunning(sandbox.to_owned());
        let running = entry.running()?.ok_or_else(not_running)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(&entry.run, flags, Mode::empty()).map_err(|_| not_running())?;
        let reached = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => not_running(),
            _ => JoinError::Reach {
                id: sandbox.to_owned(),
                source,
            },
        };
        let refused = |source| JoinError::Refused {
            id: sandbox.to_owned(),
            source,
        };
        let lease = connect(&directory).map_err(reached)?;
        let request = Request::Join {
            id: id.to_owned(),
            shares: shares.iter().map(JoiningShare::from).collect(),
            memory_bytes,
        };
        let line = control::request_line(request).map_err(refused)?;
        let descriptors: Vec<BorrowedFd<'_>> =
            shares.iter().map(|share| share.directory.as_fd()).collect();
        control::send_with_fds(&lease, &line, &descriptors).map_err(reached)?;
        // The guest may have to grow first.
        let patience = Some(PATIENCE * (GROWTH_PATIENCE + 1));
        lease.set_read_timeout(patience).map_err(reached)?;
        control::answer(&lease).map_err(refused)?;
        lease.set_read_timeout(Some(PATIENCE)).map_err(reached)?;
        let end = connect(&directory).map_err(reached)?;
        control::ask(&end, Request::Wait).map_err(refused)?;
        let agent = lease
            .try_clone()
            .and_then(|stream| Agent::shared(stream, running.kernel));
        let member = Self {
            directory,
            lease,
            end,
            ending: OnceCell::new(),
        };
        Ok((member, agent.map_err(reached)?))
    }
}

impl From<&SharedDirectory> for JoiningShare {
    fn from(share: &SharedDirectory) -> Self {
        Self {
            name: share.name.clone(),
            read_only: share.read_only,
        }
    }
}

impl Guest for Membership {
    fn connect(&self, port: u32) -> io::Result<UnixStream> {
        if port != PROCESS_PORT {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let socket = connect(&self.directory)?;
        let stream = control::ask(&socket, Request::Exec)
            .and_then(|()| control::answer_with_fd(&socket))
            .map_err(io::Error::other)?;
        Ok(UnixStream::from(stream))
    }

    fn ended(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    fn ending(&self) -> Option<String> {
        if let Some(known) = self.ending.get() {
            return Some(known.clone());
        }
        let now = Timespec::default();
        let mut fds = [PollFd::new(&self.end, PollFlags::IN)];
        if poll(&mut fds, Some(&now)).is_ok_and(|ready| ready == 0) {
            return None;
        }
        // What came is one whole line, or the end.
        let why = match control::answer(&self.end) {
            Ok(Reply::Ended(record)) => record.error,
            _ => Some("its monitor died".to_owned()),
        };
        let text = match why {
            Some(why) => format!("the pod's sandbox ended: {why}"),
            None => "the pod's sandbox ended".to_owned(),
        };
        Some(self.ending.get_or_init(|| text).clone())
    }

    fn console(&self) -> Vec<String> {
        Vec::new()
    }

    /// Leaves the sandbox; returns when nothing of the container is left there.
    fn stop(&mut self) {
        if self.lease.shutdown(Shutdown::Write).is_err() {
            return;
        }
        let until = Instant::now() + PATIENCE;
        let mut chunk = [0; 4096];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or_default();
            let mut fds = [
                PollFd::new(&self.lease, PollFlags::IN),
                PollFd::new(&self.end, PollFlags::IN),
            ];
            match poll(&mut fds, Some(&timeout)) {
                Ok(0) => return,
                Ok(_) if fds[0].revents().is_empty() => return,
                Ok(_) => {}
                Err(_) => continue,
            }
            // Late answers are nobody's any more.
            match io::Read::read(&mut self.lease, &mut chunk) {
                Ok(0) => return,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return,
            }
        }
    }
}

fn connect(directory: &OwnedFd) -> io::Result<UnixStream> {
    let socket = UnixStream::connect(control::address(directory))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}
