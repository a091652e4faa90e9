//! The other containers of a pod, in the sandbox's guest: each has a monitor of its own, which
//! holds all of it but the VM, and a connection here that lasts as long as it does.
//!
//! Owns: what the guest is shown for them, and their questions to the agent. Refuses those of one
//! about another. A connection that ends, however it does, ends its container; the socket is
//! closed when nothing of it is left in the guest.

use std::collections::VecDeque;
use std::os::unix::net::UnixStream;

use hull_proto::{LineDecoder, Request, encode_line};
use hull_vmm::virtio::fs::KnownBy;

use crate::control::{JoiningShare, Reply};
use crate::rootfs::SharedDirectory;

use super::super::client::{Client, Role};
use super::Driver;

/// A container that joined.
#[derive(Debug)]
pub(in crate::monitor) struct Member {
    id: String,
    names: Vec<String>,
    /// What it asks of the agent.
    pub(in crate::monitor) lines: LineDecoder,
    /// The numbers of its questions that have no answer yet.
    asked: VecDeque<u64>,
}

impl Member {
    pub(super) fn id(&self) -> &str {
        &self.id
    }

    /// The agent's answer to this question is for it.
    pub(super) fn awaits(&mut self, number: u64) {
        self.asked.push_back(number);
    }
}

/// One that left, until the agent has ended what it left.
#[derive(Debug)]
pub(super) struct Parting {
    number: u64,
    id: String,
    names: Vec<String>,
    /// Open for as long as its monitor is to wait.
    _socket: Option<UnixStream>,
}

impl Driver<'_> {
    /// Shows the guest what a container brings, and has it have as much memory as that may use.
    pub(super) fn join(
        &mut self,
        client: &mut Client,
        id: String,
        shares: Vec<JoiningShare>,
        limit: Option<u64>,
    ) {
        if self.plan.sandbox.is_some() {
            return client.refuse("its virtual machine is another container's");
        }
        let descriptors = std::mem::take(&mut client.descriptors);
        if descriptors.len() != shares.len() {
            return client.refuse("the directories didn't come along");
        }
        let names: Vec<String> = shares.iter().map(|share| share.name.clone()).collect();
        let shown = shares.into_iter().zip(descriptors);
        let shown = shown.map(|(share, directory)| SharedDirectory {
            name: share.name,
            directory,
            read_only: share.read_only,
            exclusive: false,
            // No pod is saved.
            known_by: KnownBy::Path,
        });
        if let Err(error) = self.guest.show(shown.collect()) {
            return client.refuse(&format!(
                "cannot show its directories to the guest: {error}"
            ));
        }
        self.members += 1;
        if !self.makes_room(&id, limit) {
            client.answer(&Reply::Ok);
        }
        client.role = Role::Member(Member {
            id,
            names,
            lines: LineDecoder::default(),
            asked: VecDeque::new(),
        });
    }

    /// Takes back what a container brought that can't stay.
    pub(super) fn unjoin(&mut self, client: &mut Client) {
        if let Role::Member(member) = std::mem::replace(&mut client.role, Role::Leaving) {
            self.members -= 1;
            self.guest.hide(&member.names);
            self.free_room(&member.id);
        }
    }

    /// Whether the guest is others', too.
    pub(super) fn shares_guest(&self) -> bool {
        self.plan.sandbox.is_some() || self.members > 0
    }

    /// Passes on what a member asks of the agent.
    pub(super) fn pass_on(&mut self, client: &mut Client) {
        let Role::Member(member) = &mut client.role else {
            return;
        };
        // Answers come in the order of the questions: what follows one that must wait waits, too.
        while !self.memory.is_pending(&member.id) {
            match member.lines.take::<Request>() {
                Ok(None) => return,
                Ok(Some(request)) if subject(&request) == Some(&member.id) => {
                    match self.update_member(&member.id, &request) {
                        Ok(number) => member.asked.extend(number),
                        Err(_) => return client.peer.mark_gone(),
                    }
                }
                Ok(Some(_)) | Err(_) => return client.peer.mark_gone(),
            }
        }
    }

    /// As [`Self::pass_on`], for those that had to wait.
    pub(super) fn pass_on_more(&mut self) {
        let mut clients = std::mem::take(&mut self.clients);
        for client in &mut clients {
            self.pass_on(client);
        }
        self.clients = clients;
    }

    /// The agent's answer to a member's question; `false` if it is none.
    pub(super) fn answer_member(&mut self, number: u64, reply: &hull_proto::Reply) -> bool {
        if let Some(index) = self.parting.iter().position(|known| known.number == number) {
            let parted = self.parting.swap_remove(index);
            self.guest.hide(&parted.names);
            self.free_room(&parted.id);
            return true;
        }
        for client in &mut self.clients {
            if let Role::Member(member) = &mut client.role
                && member.asked.front() == Some(&number)
            {
                member.asked.pop_front();
                let mut line = Vec::new();
                match encode_line(reply, &mut line) {
                    Ok(()) => client.peer.send(&line),
                    Err(_) => client.peer.mark_gone(),
                }
                return true;
            }
        }
        false
    }

    /// Ends the container of a member whose connection has ended.
    pub(super) fn part(&mut self, client: &mut Client) {
        let Role::Member(member) = std::mem::replace(&mut client.role, Role::Leaving) else {
            return;
        };
        self.members -= 1;
        // Without an agent there is no process either.
        let id = member.id.clone();
        match self.questions.ask(&Request::Remove { id }) {
            Ok(number) => self.parting.push(Parting {
                number,
                id: member.id,
                names: member.names,
                _socket: client.peer.socket().try_clone().ok(),
            }),
            Err(_) => {
                self.guest.hide(&member.names);
                self.free_room(&member.id);
            }
        }
    }
}

/// Whom a request is about, of those that a member may make.
fn subject(request: &Request) -> Option<&String> {
    match request {
        Request::Stats { id }
        | Request::Processes { id, .. }
        | Request::Update { id, .. }
        | Request::Freeze { id, .. } => Some(id),
        Request::Setup(_)
        | Request::Settle
        | Request::Furnish { .. }
        | Request::StandStill
        | Request::Network { .. }
        | Request::BecomeAnother(_)
        | Request::GoOn
        | Request::PutAway
        | Request::Shutdown
        | Request::Ping
        | Request::Remove { .. } => None,
    }
}
