//! A guest whose memory follows its containers' limits: it grows before a limit is raised, and
//! shrinks after one is lowered or its container has gone.
//!
//! Owns: what each container of the guest may use, and who waits for the guest to have as much.
//! Refuses: to wait for it for ever. A container without a limit asks for nothing.
//!
//! ```text
//! Update, Join ─► begin ─► the guest has as much? ─ no ─► waits ─► it has, or doesn't in time
//!                             └─ yes ─► the agent ─► its answer settles it, and the guest's size
//! ```

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::time::Instant;

use hull_proto::{Request, encode_line};
use serde_json::Value;

use crate::control::Reply;
use crate::plan::{self, Plan};
use crate::state::Phase;

use super::super::client::{Client, Role, Then};
use super::Driver;
use super::saving::BUSY;

/// What a guest may take to have more memory, in times of what it may take to answer.
pub(in crate::monitor) const GROWTH_PATIENCE: u32 = 6;

/// What a container's processes may use, in bytes.
#[derive(Debug, Default, Clone, Copy)]
struct Limit {
    now: u64,
    /// What it is to be; until it is, the guest has room for either.
    next: Option<u64>,
}

/// What the containers of a guest may use, by their ids.
#[derive(Debug, Default)]
struct Limits {
    /// The one whose limit is that of all others in sum.
    whole: Option<String>,
    by_id: BTreeMap<String, Limit>,
}

impl Limits {
    /// Notes that a container is to have a limit; false if it is about to have another one.
    fn begin(&mut self, id: &str, bytes: u64) -> bool {
        let limit = self.by_id.entry(id.to_owned()).or_default();
        let free = limit.next.is_none();
        limit.next.get_or_insert(bytes);
        free
    }

    /// Notes that it has it now, or never will.
    fn settle(&mut self, id: &str, done: bool) {
        if let Some(limit) = self.by_id.get_mut(id)
            && let Some(next) = limit.next.take()
            && done
        {
            limit.now = next;
        }
    }

    fn is_pending(&self, id: &str) -> bool {
        self.by_id.get(id).is_some_and(|limit| limit.next.is_some())
    }

    /// What all of them need.
    fn sum(&self) -> u64 {
        let most = |limit: &Limit| limit.now.max(limit.next.unwrap_or(0));
        let is_whole = |id: &String| Some(id) == self.whole.as_ref();
        let parts = self.by_id.iter().filter(|(id, _)| !is_whole(id));
        let parts = parts.fold(0_u64, |sum, (_, limit)| sum.saturating_add(most(limit)));
        let whole = self.whole.as_ref().and_then(|id| self.by_id.get(id));
        parts.max(whole.map_or(0, most))
    }
}

/// Who waits for a guest to grow.
#[derive(Debug)]
struct Growing {
    id: String,
    wanted: u64,
    until: Instant,
    /// What the agent is asked then; a container that joins asks nothing.
    request: Option<Request>,
}

/// A guest's memory as its monitor sees it.
#[derive(Debug, Default)]
pub(super) struct Memory {
    limits: Limits,
    growing: Vec<Growing>,
    /// Questions to the agent that change a limit, and whose.
    asked: Vec<(u64, String)>,
}

impl Memory {
    /// Of the guest that a plan's container starts.
    pub(super) fn new(plan: &Plan) -> Self {
        let mut memory = Self::default();
        let id = plan.guest_id().to_owned();
        if let Some(limit) = plan::memory_limit(plan) {
            memory.limits.begin(&id, limit);
            memory.limits.settle(&id, true);
        }
        memory.limits.whole = plan::is_sandbox(&plan.labels).then_some(id);
        memory
    }

    /// When the next one has waited long enough.
    pub(super) fn until(&self) -> Option<Instant> {
        self.growing.iter().map(|growing| growing.until).min()
    }

    pub(super) fn is_pending(&self, id: &str) -> bool {
        self.limits.is_pending(id)
    }
}

impl Driver<'_> {
    /// Changes the container's own limits.
    pub(super) fn update(&mut self, client: &mut Client, resources: Value) {
        let id = self.plan.guest_id().to_owned();
        let limit = plan::memory_limit_of(&resources);
        let request = Request::Update { id, resources };
        let is_member = self.plan.sandbox.is_some();
        let (Some(limit), false) = (limit, is_member) else {
            return self.question(client, &request);
        };
        if self.phase() == Phase::Paused && !self.frozen {
            return client.refuse("the container is paused: its guest can't answer");
        }
        if self.saving.is_some() {
            return client.refuse(BUSY);
        }
        let id = self.plan.guest_id().to_owned();
        if self.memory.is_pending(&id) {
            return client.refuse("another update of its memory is under way");
        }
        if self.grows_for(&id, limit, Some(&request)) {
            client.role = Role::Growing;
            return;
        }
        self.question(client, &request);
        match client.role {
            Role::Questioning { number, .. } => self.memory.asked.push((number, id)),
            _ => self.settle(&id, false),
        }
    }

    /// Passes on what a member asks of the agent about its limits; when the guest has room for
    /// them. Returns the question's number if it was asked already.
    pub(super) fn update_member(
        &mut self,
        id: &str,
        request: &Request,
    ) -> Result<Option<u64>, &'static str> {
        let limit = match request {
            Request::Update { resources, .. } => plan::memory_limit_of(resources),
            _ => None,
        };
        if let Some(limit) = limit
            && self.grows_for(id, limit, Some(request))
        {
            return Ok(None);
        }
        let number = self.questions.ask(request)?;
        if limit.is_some() {
            self.memory.asked.push((number, id.to_owned()));
        }
        Ok(Some(number))
    }

    /// Makes room for a container that joins; false if there is already.
    pub(super) fn makes_room(&mut self, id: &str, limit: Option<u64>) -> bool {
        let Some(limit) = limit else { return false };
        let grows = self.grows_for(id, limit, None);
        if !grows {
            self.memory.limits.settle(id, true);
        }
        grows
    }

    /// A container is gone, or never came.
    pub(super) fn free_room(&mut self, id: &str) {
        self.memory.growing.retain(|growing| growing.id != id);
        self.memory.asked.retain(|(_, of)| of != id);
        if self.memory.limits.by_id.remove(id).is_some() {
            self.level();
        }
    }

    /// Whether the guest has to grow first for a container to have a limit.
    fn grows_for(&mut self, id: &str, limit: u64, request: Option<&Request>) -> bool {
        self.memory.limits.begin(id, limit);
        let wanted = self.level();
        let grows = wanted > self.guest.plugged();
        if grows {
            self.memory.growing.push(Growing {
                id: id.to_owned(),
                wanted,
                until: Instant::now() + self.questions.patience * GROWTH_PATIENCE,
                request: request.cloned(),
            });
        }
        grows
    }

    /// Has the guest be as large as its containers need.
    fn level(&self) -> u64 {
        let wanted = plan::growth(&self.plan.vm, self.memory.limits.sum());
        self.guest.plug(wanted);
        wanted
    }

    /// Has a guest that had grown when it was saved be as large as its container needs it here.
    pub(super) fn level_carried(&self) {
        if self.guest.plugged() > 0 {
            self.level();
        }
    }

    fn settle(&mut self, id: &str, done: bool) {
        self.memory.limits.settle(id, done);
        self.level();
    }

    /// What to poll while somebody waits for the guest to grow.
    pub(super) fn growth(&self) -> Option<BorrowedFd<'_>> {
        match self.memory.growing.is_empty() {
            true => None,
            false => self.guest.plugs(),
        }
    }

    /// Draws the consequences of the agent's answer to a question that changed a limit.
    pub(super) fn limit_answered(&mut self, number: u64, reply: &hull_proto::Reply) {
        let asked = &mut self.memory.asked;
        if let Some(index) = asked.iter().position(|(known, _)| *known == number) {
            let (_, id) = asked.swap_remove(index);
            self.settle(&id, matches!(reply, hull_proto::Reply::Ok));
        }
    }

    /// Goes on with those for whom the guest has grown, and gives up on those who have waited
    /// long enough.
    pub(super) fn grown(&mut self) {
        if self.memory.growing.is_empty() {
            return;
        }
        let (plugged, now) = (self.guest.plugged(), Instant::now());
        let growing = std::mem::take(&mut self.memory.growing);
        let (over, waiting) = growing
            .into_iter()
            .partition(|one: &Growing| plugged >= one.wanted || one.until <= now);
        self.memory.growing = waiting;
        let mut clients = std::mem::take(&mut self.clients);
        for growing in over {
            let why = (plugged < growing.wanted).then(|| self.too_small(&growing, plugged));
            let mut waits = clients.iter_mut().filter(|client| match &client.role {
                Role::Growing => growing.id == self.plan.guest_id(),
                Role::Member(member) => member.id() == growing.id,
                _ => false,
            });
            match waits.next() {
                Some(client) => self.go_on(client, growing, why),
                None => self.settle(&growing.id, false),
            }
        }
        clients.append(&mut self.clients);
        self.clients = clients;
    }

    fn too_small(&self, growing: &Growing, plugged: u64) -> String {
        let mut why = format!(
            "the guest took {} of {} MiB more memory within {} seconds",
            plugged >> 20,
            growing.wanted >> 20,
            (self.questions.patience * GROWTH_PATIENCE).as_secs()
        );
        if let Some(refusal) = self.guest.plug_refusal() {
            why = format!("{why}: {refusal}");
        }
        why
    }

    fn go_on(&mut self, client: &mut Client, growing: Growing, why: Option<String>) {
        let id = &growing.id;
        match (growing.request, why) {
            (None, None) => {
                self.memory.limits.settle(id, true);
                client.answer(&Reply::Ok);
            }
            (None, Some(why)) => {
                self.unjoin(client);
                client.refuse(&why);
            }
            (Some(_), Some(why)) => {
                self.settle(id, false);
                refuse(client, why);
            }
            (Some(request), None) => match (self.questions.ask(&request), &mut client.role) {
                (Ok(number), role) => {
                    self.memory.asked.push((number, id.clone()));
                    match role {
                        Role::Member(member) => member.awaits(number),
                        role => {
                            *role = Role::Questioning {
                                number,
                                until: Instant::now() + self.questions.patience,
                                then: Then::Answer,
                            };
                        }
                    }
                }
                (Err(why), _) => {
                    self.settle(id, false);
                    refuse(client, why.to_owned());
                }
            },
        }
    }
}

/// Tells whoever asked for a limit that it can't be had.
fn refuse(client: &mut Client, why: String) {
    if !matches!(client.role, Role::Member(_)) {
        return client.refuse(&why);
    }
    let mut line = Vec::new();
    match encode_line(&hull_proto::Reply::Error { message: why }, &mut line) {
        Ok(()) => client.peer.send(&line),
        Err(_) => client.peer.mark_gone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_add_up_to_what_the_guest_needs() {
        let mut limits = Limits::default();
        assert_eq!(limits.sum(), 0);
        assert!(limits.begin("a", 100));
        assert!(!limits.begin("a", 500));
        assert!(limits.is_pending("a"));
        assert_eq!(limits.sum(), 100);
        limits.settle("a", true);
        limits.begin("b", 50);
        assert_eq!(limits.sum(), 150);
        // What is lowered counts until it is done, what is raised from the start.
        limits.begin("a", 10);
        assert_eq!(limits.sum(), 150);
        limits.settle("a", true);
        assert_eq!(limits.sum(), 60);
        limits.settle("b", false);
        assert_eq!(limits.sum(), 10);
        limits.begin("a", u64::MAX);
        limits.begin("b", 1);
        assert_eq!(limits.sum(), u64::MAX);
    }

    #[test]
    fn a_pods_own_limit_is_that_of_all() {
        let mut limits = Limits {
            whole: Some("pause".to_owned()),
            ..Limits::default()
        };
        for (id, bytes, sum) in [("pause", 100, 100), ("a", 60, 100), ("b", 70, 130)] {
            limits.begin(id, bytes);
            limits.settle(id, true);
            assert_eq!(limits.sum(), sum);
        }
    }
}
