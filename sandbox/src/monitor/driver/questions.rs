//! What clients want of the agent itself: passed on over its control stream, which answers in
//! order.
//!
//! Owns: that stream once the container runs, and whose turn it is. Refuses: to wait for the
//! guest; a client whose answer doesn't come in time is told so, and the answer is dropped when
//! it comes.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use hull_proto::{CgroupStats, LineDecoder, encode_line};
use rustix::event::PollFlags;

use crate::control::{self, Reply};
use crate::state::Phase;

use super::super::boot::Agent;
use super::super::client::{Client, Role, Then};
use super::super::peer::Peer;
use super::memory::GROWTH_PATIENCE;
use super::saving::{BUSY, Saving};
use super::{Driver, interest};

/// Most questions that wait for answers.
const MAX_QUESTIONS: usize = 64;

/// The agent's control stream and the questions on it.
#[derive(Debug)]
pub(super) struct Questions {
    peer: Peer,
    lines: LineDecoder,
    /// The numbers of those that have no answer yet.
    asked: VecDeque<u64>,
    next: u64,
    /// How long the guest may take to answer.
    pub(super) patience: Duration,
}

impl Questions {
    pub(super) fn new(agent: Agent, patience: Duration) -> io::Result<Self> {
        let (socket, lines) = agent.into_stream();
        Ok(Self {
            peer: Peer::new(socket)?,
            lines,
            asked: VecDeque::new(),
            next: 0,
            patience,
        })
    }

    /// What to poll for what, while the agent listens.
    pub(super) fn awaited(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let wanted = interest(true, self.peer.pending() > 0);
        (!self.peer.is_gone()).then(|| (self.peer.as_fd(), wanted))
    }

    /// Whether nothing is on its way in it.
    pub(super) fn is_quiet(&self) -> bool {
        self.asked.is_empty() && self.peer.pending() == 0 && self.lines.pending().is_empty()
    }

    /// Whether nothing can be asked any more.
    pub(super) fn is_over(&self) -> bool {
        self.peer.is_gone()
    }

    pub(super) fn ask(&mut self, request: &hull_proto::Request) -> Result<u64, &'static str> {
        if self.peer.is_gone() {
            return Err("the guest's agent answers no more questions");
        }
        let mut line = Vec::new();
        if encode_line(request, &mut line).is_err() {
            return Err("the request is too long");
        }
        self.peer.send(&line);
        self.next += 1;
        self.asked.push_back(self.next);
        Ok(self.next)
    }

    /// Reads answers, each with its question's number. An agent that breaks the rules, or is
    /// gone, is asked nothing more.
    fn hear(&mut self, chunk: &mut [u8]) -> Vec<(u64, hull_proto::Reply)> {
        let mut answers = Vec::new();
        self.peer.flush();
        match self.peer.receive(chunk) {
            None => return answers,
            Some([]) => self.peer.mark_gone(),
            Some(bytes) => self.lines.feed(bytes),
        }
        while !self.peer.is_gone() {
            match (self.lines.take(), self.asked.front()) {
                (Ok(None), _) => break,
                (Ok(Some(reply)), Some(&number)) => {
                    self.asked.pop_front();
                    answers.push((number, reply));
                }
                (Ok(Some(_)), None) | (Err(_), _) => self.peer.mark_gone(),
            }
        }
        answers
    }
}

impl Driver<'_> {
    /// Passes a client's question on.
    pub(super) fn question(&mut self, client: &mut Client, request: &hull_proto::Request) {
        self.question_then(client, request, Then::Answer);
    }

    /// As [`Self::question`]; when the answer is good, `then` follows.
    pub(super) fn question_then(
        &mut self,
        client: &mut Client,
        request: &hull_proto::Request,
        then: Then,
    ) {
        if self.phase() == Phase::Paused && !self.frozen {
            return client.refuse("the container is paused: its guest can't answer");
        }
        if self.questions.asked.len() >= MAX_QUESTIONS {
            return client.refuse("too many questions wait for the guest's answers");
        }
        if self.saving.is_some() {
            return client.refuse(BUSY);
        }
        match self.questions.ask(request) {
            Ok(number) => {
                let mut until = Instant::now() + self.questions.patience;
                if self.plan.sandbox.is_some()
                    && matches!(request, hull_proto::Request::Update { .. })
                {
                    // The sandbox's monitor may have the guest grow first.
                    until += self.questions.patience * GROWTH_PATIENCE;
                }
                client.role = Role::Questioning {
                    number,
                    until,
                    then,
                };
            }
            Err(why) => client.refuse(why),
        }
    }

    /// Hands the agent's answers to whoever asked.
    pub(super) fn answers(&mut self) {
        for (number, reply) in self.questions.hear(&mut self.chunk) {
            if self
                .saving
                .as_ref()
                .is_some_and(|saving| saving.awaits(number))
            {
                self.stands_still(reply);
                continue;
            }
            if self.waking == Some(number) {
                self.woken(reply);
                continue;
            }
            self.limit_answered(number, &reply);
            let leaving = self.leaving.as_mut();
            if leaving.is_some_and(|leaving| leaving.hears(number))
                || self.answer_member(number, &reply)
            {
                continue;
            }
            let asked = self
                .clients
                .iter_mut()
                .find_map(|client| match client.role {
                    Role::Questioning {
                        number: own, then, ..
                    } if own == number => Some((client, then)),
                    _ => None,
                });
            let Some((client, then)) = asked else {
                continue;
            };
            let mut reply = fitting(translated(reply));
            match (&reply, then) {
                (Reply::Ok, Then::Go) => {
                    client.role = Role::Releasing;
                    self.let_go();
                    continue;
                }
                (Reply::Error { message }, Then::Go) => {
                    client.role = Role::Releasing;
                    self.cannot_run(message.clone());
                    continue;
                }
                (Reply::Ok, Then::Enter(phase)) => {
                    if let Err(error) = self.record.enter(phase) {
                        let message = error.to_string();
                        reply = Reply::Error { message };
                    }
                }
                _ => {}
            }
            client.reply(&reply);
        }
        self.pass_on_more();
        if self.questions.peer.is_gone() {
            let why = "the guest's agent closed its control stream";
            self.refuse_questions(|_| true, why);
            self.refuse_saving(why);
        }
    }

    /// When the next question's patience ends.
    pub(super) fn patience(&self) -> Option<Instant> {
        let until = |client: &Client| match client.role {
            Role::Questioning { until, .. } => Some(until),
            _ => None,
        };
        let saving = self.saving.as_ref().and_then(Saving::until);
        self.clients
            .iter()
            .filter_map(until)
            .chain(saving)
            .chain(self.memory.until())
            .min()
    }

    /// Gives up on questions that the guest takes too long to answer.
    pub(super) fn end_patience(&mut self, now: Instant) {
        let seconds = self.questions.patience.as_secs();
        let why = format!("the guest did not answer within {seconds} seconds");
        self.refuse_questions(|until| until <= now, &why);
        if self
            .saving
            .as_ref()
            .and_then(Saving::until)
            .is_some_and(|until| until <= now)
        {
            self.refuse_saving(&why);
        }
    }

    fn refuse_questions(&mut self, which: impl Fn(Instant) -> bool, why: &str) {
        for client in &mut self.clients {
            if matches!(client.role, Role::Questioning { until, .. } if which(until)) {
                client.refuse(why);
            }
        }
    }
}

/// A reply that a client can be told: what a guest leaves out is written, and may be a lot.
fn fitting(reply: Reply) -> Reply {
    match control::line(&reply) {
        Ok(_) => reply,
        Err(error) => Reply::Error {
            message: format!("the guest's answer can't be passed on: {error}"),
        },
    }
}

/// The agent's answer as the monitor's, no larger than it has to be.
fn translated(reply: hull_proto::Reply) -> Reply {
    match reply {
        hull_proto::Reply::Ok => Reply::Ok,
        hull_proto::Reply::Stats(mut stats) => {
            stats.io.truncate(CgroupStats::MAX_DEVICES);
            Reply::Stats(stats)
        }
        hull_proto::Reply::Processes(page) => Reply::Processes(page),
        hull_proto::Reply::Error { message } => Reply::Error { message },
    }
}
