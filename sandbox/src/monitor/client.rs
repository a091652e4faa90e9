//! One connection to a monitor: its request, then what became of it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use hull_proto::{Decoder, ExitStatus, Failure, FailureKind, Frame, MAX_DATA};
use rustix::event::PollFlags;
use rustix::net::sockopt;

use crate::control::{self, ControlError, Envelope, MAX_DESCRIPTORS, MAX_LINE, Reply};
use crate::state::{ExitRecord, Phase};

use super::driver::Member;
use super::peer::Peer;

/// Kernel buffer of a client's socket: output that outlives its container waits there.
const SEND_BUFFER: usize = 1 << 20;

/// What a connection is for.
#[derive(Debug)]
pub(super) enum Role {
    /// Its request isn't whole yet.
    Asking(Vec<u8>),
    /// It hears and speaks frames.
    Attached {
        /// Its frames.
        decoder: Decoder,
        /// Whether it gives the process its stdin.
        stdin: bool,
        /// Whether stdin ends with it.
        once: bool,
    },
    /// It waits for the end.
    Waiting,
    /// It waits for the command to run.
    Releasing,
    /// It waits for the guest to have more memory.
    Growing,
    /// It waits for the agent's answer.
    Questioning {
        /// The question's number.
        number: u64,
        /// When it waits no longer.
        until: Instant,
        /// What follows a good answer.
        then: Then,
    },
    /// It has the container saved, and still, for as long as it is there.
    Saving,
    /// It waits for the container's memory to run out.
    AwaitingOom {
        /// The killings that it knows of.
        seen: u32,
    },
    /// It is the monitor of another container in this one's guest, and speaks to the agent.
    Member(Member),
    /// It has its answer.
    Leaving,
}

/// What follows an agent's good answer.
#[derive(Debug, Clone, Copy)]
pub(super) enum Then {
    /// It is passed on.
    Answer,
    /// The container is in another phase, and it is passed on.
    Enter(Phase),
    /// The held command runs.
    Go,
}

/// A connection.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) peer: Peer,
    pub(super) role: Role,
    /// What the last poll saw.
    pub(super) events: PollFlags,
    /// What came with its request.
    pub(super) descriptors: Vec<OwnedFd>,
}

impl Client {
    pub(super) fn new(socket: UnixStream) -> io::Result<Self> {
        // The default buffer does too, with more waking up.
        let _ = sockopt::set_socket_send_buffer_size(&socket, SEND_BUFFER);
        Ok(Self {
            peer: Peer::new(socket)?,
            role: Role::Asking(Vec::new()),
            events: PollFlags::empty(),
            descriptors: Vec::new(),
        })
    }

    pub(super) fn attach(&mut self, stdin: bool, once: bool) {
        let rest = match &mut self.role {
            Role::Asking(rest) => std::mem::take(rest),
            _ => Vec::new(),
        };
        let mut decoder = Decoder::new(MAX_DATA);
        decoder.feed(&rest);
        self.role = Role::Attached {
            decoder,
            stdin,
            once,
        };
    }

    /// Reads from it once, as [`Peer::receive`]. Only a request may bring descriptors.
    pub(super) fn receive<'a>(&mut self, chunk: &'a mut [u8]) -> Option<&'a [u8]> {
        match self.role {
            Role::Asking(_) => {
                let bytes = self.peer.receive_with_fds(chunk, &mut self.descriptors);
                self.descriptors.truncate(MAX_DESCRIPTORS);
                bytes
            }
            _ => self.peer.receive(chunk),
        }
    }

    pub(super) fn is_attached(&self) -> bool {
        matches!(self.role, Role::Attached { .. })
    }

    pub(super) fn has_stdin(&self) -> bool {
        matches!(self.role, Role::Attached { stdin: true, .. })
    }

    pub(super) fn gives_stdin_once(&self) -> bool {
        matches!(self.role, Role::Attached { once: true, .. })
    }

    /// Whether there is nothing more to do for it.
    pub(super) fn is_finished(&self) -> bool {
        let answered = matches!(self.role, Role::Leaving) && self.peer.pending() == 0;
        self.peer.is_gone() || answered
    }

    /// Takes bytes that came; a whole request comes out of them once.
    pub(super) fn take_request(&mut self, bytes: &[u8]) -> Result<Option<Envelope>, ControlError> {
        match &mut self.role {
            Role::Asking(line) => {
                line.extend_from_slice(bytes);
                let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
                    return match line.len() > MAX_LINE {
                        true => Err(ControlError::TooLong),
                        false => Ok(None),
                    };
                };
                let envelope = serde_json::from_slice(&line[..end])?;
                line.drain(..=end);
                Ok(Some(envelope))
            }
            Role::Attached { decoder, .. } => {
                decoder.feed(bytes);
                Ok(None)
            }
            Role::Member(member) => {
                member.lines.feed(bytes);
                Ok(None)
            }
            // Nothing was asked of them.
            Role::Waiting
            | Role::Releasing
            | Role::Saving
            | Role::Growing
            | Role::Questioning { .. }
            | Role::AwaitingOom { .. }
            | Role::Leaving => Ok(None),
        }
    }

    /// The next frame of an attached client. One that breaks the framing is gone.
    pub(super) fn frame(&mut self) -> Option<Frame> {
        let Role::Attached { decoder, .. } = &mut self.role else {
            return None;
        };
        if self.peer.is_gone() {
            return None;
        }
        match decoder.take() {
            Ok(frame) => frame,
            Err(_) => {
                self.peer.mark_gone();
                None
            }
        }
    }

    pub(super) fn answer(&mut self, reply: &Reply) {
        match control::line(reply) {
            Ok(line) => self.peer.send(&line),
            Err(_) => self.peer.mark_gone(),
        }
    }

    /// Answers for good.
    pub(super) fn reply(&mut self, reply: &Reply) {
        self.answer(reply);
        self.role = Role::Leaving;
    }

    pub(super) fn refuse(&mut self, why: &str) {
        self.reply(&Reply::Error {
            message: why.to_owned(),
        });
    }

    /// Says how many processes were killed for want of memory, if it waits for more than it has
    /// seen.
    pub(super) fn tell_oom(&mut self, count: u32) {
        if matches!(self.role, Role::AwaitingOom { seen } if count > seen) {
            self.reply(&Reply::OomKilled { count });
        }
    }

    /// Says that the container has ended.
    pub(super) fn tell_end(&mut self, record: &ExitRecord, status: Option<ExitStatus>) {
        match (&self.role, status) {
            (Role::Waiting | Role::AwaitingOom { .. }, _) => {
                self.reply(&Reply::Ended(record.clone()));
            }
            (Role::Attached { .. }, Some(status)) => {
                self.peer.send_frame(&Frame::Exited(status));
            }
            // The record may be gone already: this client is told in full.
            (Role::Attached { .. }, None) => {
                self.peer.send_frame(&Frame::Failed(Failure {
                    kind: FailureKind::Internal,
                    message: record.error.clone().unwrap_or_default(),
                }));
            }
            (Role::Releasing, _) => {
                let why = record.error.clone();
                self.refuse(&why.unwrap_or_else(|| "the container has ended".to_owned()));
            }
            (Role::Saving, _) => self.reply(&Reply::Ended(record.clone())),
            (Role::Asking(_) | Role::Growing | Role::Questioning { .. }, _) => {
                self.refuse("the container has ended")
            }
            (Role::Member(_) | Role::Leaving, _) => {}
        }
    }
}
