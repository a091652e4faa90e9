//! The agent's one loop.
//!
//! Owns: waiting for every descriptor at once, and handing each event to whoever owns it.
//! Refuses: threads, and work that blocks: a stream that the host doesn't read holds up only its
//! own process.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use hull_proto::MAX_DATA;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use crate::container::Containers;
use crate::control::{Control, Wish};
use crate::fault::{Fault, Tried};
use crate::log::say;
use crate::reaper;
use crate::session::{Event, Session};

/// Most streams that may be open at once.
const MAX_SESSIONS: usize = 4096;

/// Everything the agent serves.
#[derive(Debug)]
pub(crate) struct Server {
    signals: OwnedFd,
    listener: OwnedFd,
    control: Control,
    containers: Containers,
    sessions: BTreeMap<u64, Session>,
    next: u64,
    space: Vec<u8>,
}

/// Where an event came from.
#[derive(Debug, Clone, Copy)]
enum Token {
    Signals,
    Listener,
    Control,
    Session(u64, Event),
}

impl Server {
    /// Serves what is connected to `listener`, as `control` wishes.
    pub(crate) fn new(
        signals: OwnedFd,
        listener: OwnedFd,
        control: Control,
        containers: Containers,
    ) -> Self {
        Self {
            signals,
            listener,
            control,
            containers,
            sessions: BTreeMap::new(),
            next: 0,
            space: vec![0; MAX_DATA],
        }
    }

    /// Ends every container and waits until all are gone.
    pub(crate) fn end_all(&mut self) {
        self.containers.end_all();
        while let Some((pid, _)) = reaper::wait() {
            self.containers.ended(pid);
        }
        self.containers.sweep();
    }

    /// Runs until the host wants the guest to stop.
    ///
    /// # Errors
    /// If descriptors can't be waited for at all.
    pub(crate) fn run(&mut self) -> Result<(), Fault> {
        // A stream that is gone again before it is accepted must not hold the loop.
        rustix::io::ioctl_fionbio(&self.listener, true)
            .or_internal(|| "cannot listen without waiting")?;
        loop {
            let events = self.wait()?;
            for (token, flags) in events {
                if self.on_event(token, flags) == Wish::Stop {
                    return Ok(());
                }
            }
            let now = Instant::now();
            for session in self.sessions.values_mut() {
                session.advance(now);
            }
            self.sessions.retain(|_, session| !session.is_over());
            self.containers.sweep_at(now);
        }
    }

    fn wait(&self) -> Result<Vec<(Token, PollFlags)>, Fault> {
        let mut tokens = vec![Token::Signals, Token::Listener, Token::Control];
        let mut fds = vec![
            PollFd::new(&self.signals, PollFlags::IN),
            PollFd::new(&self.listener, PollFlags::IN),
            PollFd::new(self.control.stream(), PollFlags::IN),
        ];
        if self.sessions.len() >= MAX_SESSIONS {
            tokens.remove(1);
            fds.remove(1);
        }
        for (id, session) in &self.sessions {
            for (event, fd) in session.awaited() {
                let flags = match event {
                    Event::Outgoing | Event::Input => PollFlags::OUT,
                    Event::Incoming | Event::Line | Event::Output(_) => PollFlags::IN,
                    Event::Memory => PollFlags::PRI,
                };
                tokens.push(Token::Session(*id, event));
                fds.push(PollFd::from_borrowed_fd(fd.as_fd(), flags));
            }
        }
        let deadlines = self.sessions.values().filter_map(Session::deadline);
        let deadline = deadlines.chain(self.containers.deadline()).min();
        let timeout = deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()))
            .and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).or_internal(|| "cannot wait for events"),
        }
        let ready = tokens.into_iter().zip(fds.iter().map(PollFd::revents));
        Ok(ready.filter(|(_, flags)| !flags.is_empty()).collect())
    }

    fn on_event(&mut self, token: Token, _flags: PollFlags) -> Wish {
        match token {
            Token::Signals => self.reap(),
            Token::Listener => self.accept(),
            Token::Control => return self.control.serve(&mut self.containers, &mut self.space),
            Token::Session(id, event) => {
                if let Some(session) = self.sessions.get_mut(&id) {
                    session.on_event(event, &mut self.containers, &mut self.space);
                }
            }
        }
        Wish::GoOn
    }

    fn accept(&mut self) {
        match rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC) {
            Ok(stream) => {
                self.sessions.insert(self.next, Session::new(stream));
                self.next += 1;
            }
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => {}
            Err(errno) => say(format_args!("cannot accept a stream: {errno}")),
        }
    }

    fn reap(&mut self) {
        let _ = rustix::io::read(&self.signals, &mut self.space);
        let now = Instant::now();
        for (pid, status) in reaper::reap() {
            let mut sessions = self.sessions.values_mut();
            if let Some(session) = sessions.find(|session| session.is_of(pid)) {
                session.reaped(status, &self.containers, now);
            }
            self.containers.ended(pid);
        }
    }
}
