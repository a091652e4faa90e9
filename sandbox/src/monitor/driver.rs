//! The loop that owns a running container: the first process's stream, the clients, the guest's
//! end. The sole writer of state; never waits for the guest or for a client.
//!
//! ```text
//! agent ══ frames ══► log.json
//!                 ╚═► attached clients (a slow one holds the process up, a gone one doesn't)
//! attached client ══ stdin, resize, signal ══► agent
//! ```

mod leaving;
mod members;
mod memory;
mod phases;
mod questions;
mod saving;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use hull_proto::{Decoder, ExitStatus, Failure, Frame, STDIN_WINDOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::checkpoint::CarriedStreams;
use crate::control::{Envelope, GENERATION, Marks, Reply, Request};
use crate::logs::{LogStream, LogWriter};
use crate::plan::Plan;
use crate::state::Phase;

use super::boot::{Agent, Started};
use super::client::{Client, Role};
use super::guest::Guest;
use super::peer::Peer;
use super::stdin::Stdin;

use leaving::Leaving;
pub(super) use members::Member;
use members::Parting;
pub(super) use memory::GROWTH_PATIENCE;
use memory::Memory;
pub(super) use phases::Record;
use questions::Questions;
use saving::Saving;

/// Output that may wait for a client before the process is held up, in bytes.
const CLIENT_BACKLOG: usize = 256 * 1024;
/// Frames that may wait for the agent, stdin's window aside, in bytes.
const AGENT_BACKLOG: usize = STDIN_WINDOW + 64 * 1024;
/// Most clients at a time.
const MAX_CLIENTS: usize = 256;
const SIGKILL: u8 = 9;

/// How the container ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum End {
    /// Its first process did.
    Process(ExitStatus),
    /// Somebody ended the VM.
    Killed,
    /// The guest did, without a word of the process.
    Guest(String),
    /// Its command could not run when it was released.
    Refused(Failure),
}

/// A running container.
pub(super) struct Driver<'a> {
    plan: &'a Plan,
    guest: Box<dyn Guest>,
    /// Its end would be the agent's.
    questions: Questions,
    marks: Marks,
    agent: Peer,
    decoder: Decoder,
    log: LogWriter,
    stdin: Stdin,
    listener: UnixListener,
    clients: Vec<Client>,
    members: usize,
    parting: Vec<Parting>,
    memory: Memory,
    /// Paused, its processes stand still and not its guest, which is others', too.
    frozen: bool,
    /// Nobody saves it, and its processes stand still until its agent lets them go on.
    still: bool,
    /// The number of the question whose answer says that a held container's do.
    waking: Option<u64>,
    kill_at: Option<Instant>,
    stop_at: Option<Instant>,
    guest_pid: u32,
    /// Processes of the container that were killed for want of memory.
    oom_kills: u32,
    record: Record,
    /// Why the command that was to be released will never run.
    unfit: Option<Failure>,
    jail: Vec<String>,
    kill_grace: Duration,
    /// A checkpoint in the making.
    saving: Option<Saving>,
    leaving: Option<Leaving>,
    chunk: Vec<u8>,
}

/// What a driver is made of.
pub(super) struct Parts<'a> {
    pub(super) plan: &'a Plan,
    pub(super) guest: Box<dyn Guest>,
    pub(super) started: Started,
    /// What another monitor knew of the first process, if it goes on from a checkpoint.
    pub(super) carried: CarriedStreams,
    pub(super) agent: Agent,
    pub(super) log: LogWriter,
    pub(super) listener: UnixListener,
    /// The client that was attached before the start.
    pub(super) attached: Option<UnixStream>,
    pub(super) record: Record,
    pub(super) jail: Vec<String>,
    /// What a killed container may take before its VM is ended.
    pub(super) kill_grace: Duration,
    /// What the guest may take to answer a question.
    pub(super) patience: Duration,
}

#[derive(Debug, Clone, Copy)]
struct Ready {
    guest: bool,
    listener: bool,
    agent: PollFlags,
    answers: bool,
}

/// What a driver leaves.
pub(super) struct Finished {
    /// Those who are still to be told of the end.
    pub(super) clients: Vec<Client>,
    /// The control socket: open until the record is written, it has who calls meanwhile wait for
    /// this process's end.
    pub(super) listener: UnixListener,
    /// A machine that stands still. To free its memory takes a while, and nobody need wait for it.
    pub(super) guest: Box<dyn Guest>,
}

impl<'a> Driver<'a> {
    pub(super) fn new(parts: Parts<'a>) -> io::Result<Self> {
        parts.listener.set_nonblocking(true)?;
        let mut driver = Self {
            plan: parts.plan,
            guest: parts.guest,
            marks: parts.agent.marks,
            questions: Questions::new(parts.agent, parts.patience)?,
            agent: parts.started.peer,
            decoder: parts.started.decoder,
            log: parts.log,
            stdin: Stdin::carried(parts.carried.stdin_outstanding, parts.carried.stdin_ended),
            listener: parts.listener,
            clients: Vec::new(),
            members: 0,
            parting: Vec::new(),
            memory: Memory::new(parts.plan),
            frozen: false,
            still: parts.plan.held && parts.plan.guest_id.is_some(),
            waking: None,
            kill_at: None,
            stop_at: None,
            guest_pid: parts.started.guest_pid,
            oom_kills: parts.carried.oom_kills,
            record: parts.record,
            unfit: None,
            jail: parts.jail,
            kill_grace: parts.kill_grace,
            saving: None,
            leaving: None,
            chunk: vec![0; 64 * 1024],
        };
        driver.level_carried();
        if !driver.plan.interactive && !driver.plan.tty {
            driver.stdin.end(&mut driver.agent);
        }
        if let Some(socket) = parts.attached {
            let mut client = Client::new(socket)?;
            client.attach(driver.plan.interactive, true);
            client.peer.send_frame(&Frame::Started {
                pid: driver.guest_pid,
            });
            driver.clients.push(client);
        }
        Ok(driver)
    }

    /// Runs until the first process, or its guest, has ended.
    fn live(&mut self) -> io::Result<End> {
        loop {
            // Frames may have come with the one that said "started", or while a guest was saved.
            if let Some(end) = self.frames() {
                return Ok(end);
            }
            let ready = self.poll()?;
            if !ready.agent.is_empty() {
                self.agent.flush();
                if let Some(end) = self.hear(ready.agent) {
                    return Ok(end);
                }
            }
            if ready.guest {
                return Ok(self.last_words());
            }
            if let Some(end) = self.deadlines() {
                return Ok(end);
            }
            if ready.answers {
                self.answers();
            }
            self.grown();
            self.serve_clients();
            if let Some(failure) = self.unfit.take() {
                return Ok(End::Refused(failure));
            }
            if ready.listener {
                self.accept();
            }
        }
    }

    /// Ends the guest, and leaves what is to be done with what is left of it and its clients.
    pub(super) fn finish(mut self) -> Finished {
        // A full disk has lost lines already; this is no worse.
        let _ = self.log.finish();
        self.guest.stop();
        Finished {
            clients: self.clients,
            listener: self.listener,
            guest: self.guest,
        }
    }

    fn poll(&mut self) -> io::Result<Ready> {
        let held_up = self
            .clients
            .iter()
            .any(|client| client.is_attached() && client.peer.pending() > CLIENT_BACKLOG);
        let agent = match self.leaving {
            None => (
                self.agent.as_fd(),
                interest(!held_up, self.agent.pending() > 0),
            ),
            // It has said its last.
            Some(_) => (self.listener.as_fd(), PollFlags::empty()),
        };
        let guest = self.guest.ended();
        let mut fds = Vec::with_capacity(4 + self.clients.len());
        fds.push(PollFd::new(&guest, PollFlags::IN));
        fds.push(PollFd::new(&self.listener, PollFlags::IN));
        fds.push(PollFd::from_borrowed_fd(agent.0, agent.1));
        let control = self.questions.awaited();
        fds.extend(control.map(|(stream, wanted)| PollFd::from_borrowed_fd(stream, wanted)));
        let growth = self.growth();
        fds.extend(growth.map(|changed| PollFd::from_borrowed_fd(changed, PollFlags::IN)));
        let first_client = fds.len();
        for client in &self.clients {
            let wanted = interest(true, client.peer.pending() > 0);
            fds.push(PollFd::new(&client.peer, wanted));
        }
        let deadlines = [self.kill_at, self.stop_at, self.patience()];
        let deadline = deadlines.into_iter().flatten().min();
        let timeout = deadline
            .map(|deadline| deadline.saturating_duration_since(Instant::now()))
            .and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => fds.iter_mut().for_each(PollFd::clear_revents),
            Err(error) => return Err(error.into()),
        }
        let ready = Ready {
            guest: !fds[0].revents().is_empty(),
            listener: !fds[1].revents().is_empty(),
            agent: fds[2].revents(),
            answers: fds[3..first_client]
                .iter()
                .any(|fd| !fd.revents().is_empty()),
        };
        let events: Vec<PollFlags> = fds[first_client..].iter().map(PollFd::revents).collect();
        for (client, events) in self.clients.iter_mut().zip(events) {
            client.events = events;
        }
        Ok(ready)
    }

    /// Reads from the agent once.
    fn hear(&mut self, events: PollFlags) -> Option<End> {
        if !events.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
            return None;
        }
        let bytes = match self.agent.receive(&mut self.chunk) {
            None => return None,
            Some([]) => return Some(self.guest_is_gone("the agent closed the process's stream")),
            Some(bytes) => bytes,
        };
        self.decoder.feed(bytes);
        self.frames()
    }

    fn frames(&mut self) -> Option<End> {
        loop {
            let frame = match self.decoder.take() {
                Ok(Some(frame)) => frame,
                Ok(None) => return None,
                Err(error) => return Some(self.guest_is_gone(&error.to_string())),
            };
            match frame {
                Frame::Stdout(_) => self.output(LogStream::Stdout, &frame),
                Frame::Stderr(_) => self.output(LogStream::Stderr, &frame),
                Frame::StdinAck(count) => {
                    let count = self.stdin.acknowledged(count, &mut self.agent);
                    if count > 0
                        && let Some(client) = self.clients.iter_mut().find(|c| c.has_stdin())
                    {
                        client.peer.send_frame(&Frame::StdinAck(count));
                    }
                }
                Frame::OomKilled { count } => self.oom_killed(count),
                Frame::Exited(status) => return Some(self.exited(status)),
                Frame::Started { .. } if self.phase() == Phase::Held => self.released(),
                Frame::Failed(failure) if self.phase() == Phase::Held => {
                    return Some(End::Refused(failure));
                }
                _ => return Some(self.guest_is_gone("the agent sent a frame out of place")),
            }
        }
    }

    fn output(&mut self, stream: LogStream, frame: &Frame) {
        if let Frame::Stdout(data) | Frame::Stderr(data) = frame {
            // A full disk loses lines, not the container.
            let _ = self.log.take(stream, data);
        }
        let mut bytes = Vec::new();
        for client in self
            .clients
            .iter_mut()
            .filter(|client| client.is_attached())
        {
            if bytes.is_empty() && hull_proto::encode(frame, &mut bytes).is_err() {
                return;
            }
            client.peer.send(&bytes);
        }
    }

    /// The guest has ended: what it said before is still in the socket.
    fn last_words(&mut self) -> End {
        loop {
            let bytes = match self.agent.receive(&mut self.chunk) {
                None | Some([]) => break,
                Some(bytes) => bytes,
            };
            self.decoder.feed(bytes);
            if let Some(end) = self.frames() {
                return end;
            }
        }
        self.guest_is_gone("the guest ended")
    }

    fn guest_is_gone(&self, seen: &str) -> End {
        if self.stop_at.is_some() {
            return End::Killed;
        }
        End::Guest(self.guest.ending().unwrap_or_else(|| seen.to_owned()))
    }

    fn deadlines(&mut self) -> Option<End> {
        let now = Instant::now();
        if self.stop_at.is_some_and(|deadline| deadline <= now) {
            self.guest.stop();
            return Some(End::Killed);
        }
        if self.kill_at.is_some_and(|deadline| deadline <= now) {
            self.kill_at = None;
            self.signal(SIGKILL, true);
        }
        self.end_patience(now);
        None
    }

    fn signal(&mut self, signal: u8, all: bool) {
        if self.agent.pending() < AGENT_BACKLOG {
            self.agent.send_frame(&Frame::Signal { signal, all });
        }
        if signal == SIGKILL {
            // What stands still can't die.
            match &mut self.saving {
                Some(saving) => saving.spoil(),
                None => self.guest.resume(),
            }
            let deadline = Instant::now() + self.kill_grace;
            self.stop_at = Some(self.stop_at.map_or(deadline, |known| known.min(deadline)));
        }
    }

    fn accept(&mut self) {
        while let Ok((socket, _)) = self.listener.accept() {
            if self.clients.len() < MAX_CLIENTS
                && let Ok(client) = Client::new(socket)
            {
                self.clients.push(client);
            }
        }
    }

    fn serve_clients(&mut self) {
        let mut clients = std::mem::take(&mut self.clients);
        let mut orphaned = None;
        for index in 0..clients.len() {
            let stdin_taken = clients.iter().any(Client::has_stdin);
            let attached = clients.iter().filter(|client| client.is_attached()).count();
            let client = &mut clients[index];
            self.serve(client, stdin_taken, attached);
            if client.is_finished() {
                if client.has_stdin() {
                    orphaned = Some(client.gives_stdin_once());
                }
                self.part(client);
            }
        }
        clients.retain(|client| !client.is_finished());
        // Those that came while these were served.
        clients.append(&mut self.clients);
        self.clients = clients;
        self.end_saving();
        if let Some(once) = orphaned {
            self.stdin.abandon();
            if once && !self.plan.tty {
                self.stdin.end(&mut self.agent);
            }
        }
    }

    fn serve(&mut self, client: &mut Client, stdin_taken: bool, attached: usize) {
        if client.events.contains(PollFlags::OUT) {
            client.peer.flush();
        }
        let readable = PollFlags::IN | PollFlags::HUP | PollFlags::ERR;
        if !client.events.intersects(readable) {
            return;
        }
        let bytes = match client.receive(&mut self.chunk) {
            None => return,
            Some([]) => return client.peer.mark_gone(),
            Some(bytes) => bytes.to_vec(),
        };
        if matches!(client.role, Role::Saving) {
            return self.end_saved();
        }
        match client.take_request(&bytes) {
            Ok(Some(envelope)) => self.obey(client, envelope, stdin_taken, attached),
            Ok(None) => {}
            Err(error) => client.refuse(&error.to_string()),
        }
        self.client_frames(client);
        self.pass_on(client);
    }

    fn client_frames(&mut self, client: &mut Client) {
        while let Some(frame) = client.frame() {
            let fine = match frame {
                Frame::Stdin(data) if client.has_stdin() => {
                    self.stdin.take(data, &mut self.agent).is_ok()
                }
                Frame::Stdin(data) => {
                    // Nobody reads it: let the client go on.
                    let count = u32::try_from(data.len()).unwrap_or(u32::MAX);
                    client.peer.send_frame(&Frame::StdinAck(count));
                    true
                }
                Frame::StdinEof => {
                    if client.has_stdin() {
                        self.stdin.end(&mut self.agent);
                    }
                    true
                }
                Frame::Resize { rows, cols } => {
                    self.resize(rows, cols);
                    true
                }
                Frame::Signal { signal, all } => {
                    self.signal(signal, all);
                    true
                }
                _ => false,
            };
            if !fine {
                client.peer.mark_gone();
            }
        }
    }

    fn obey(
        &mut self,
        client: &mut Client,
        envelope: Envelope,
        stdin_taken: bool,
        attached: usize,
    ) {
        if envelope.generation != GENERATION {
            return client.refuse(&format!(
                "this monitor speaks generation {GENERATION}, not {}",
                envelope.generation
            ));
        }
        if self.saving.is_some() && saving::disturbs(&envelope.request) {
            return client.refuse(saving::BUSY);
        }
        let id = || self.plan.guest_id().to_owned();
        match envelope.request {
            Request::Ping => client.reply(&Reply::Ok),
            Request::Inspect => client.reply(&Reply::Inspect(self.report(attached))),
            Request::Wait => client.role = Role::Waiting,
            Request::Signal { signal, all } => {
                self.signal(signal, all);
                client.reply(&Reply::Ok);
            }
            Request::Resize { rows, cols } => {
                self.resize(rows, cols);
                client.reply(&Reply::Ok);
            }
            Request::Stop { signal, timeout_ms } => {
                self.stop(signal, timeout_ms);
                client.role = Role::Waiting;
            }
            Request::Attach { stdin } => {
                client.answer(&Reply::Ok);
                client.attach(stdin && self.plan.interactive && !stdin_taken, false);
                client.peer.send_frame(&Frame::Started {
                    pid: self.guest_pid,
                });
            }
            Request::Exec => self.exec(client),
            Request::Release if self.phase() != Phase::Held => {
                client.refuse("it is not held: its command was started before");
            }
            Request::Release => self.release(client),
            Request::Checkpoint { ground } => self.save(client, &ground),
            Request::Pause => self.hold_still(client, Phase::Running, Phase::Paused),
            Request::Resume => self.hold_still(client, Phase::Paused, Phase::Running),
            Request::Stats => self.question(client, &hull_proto::Request::Stats { id: id() }),
            Request::Processes { after } => {
                let id = id();
                self.question(client, &hull_proto::Request::Processes { id, after });
            }
            Request::Update { resources } => self.update(client, resources),
            Request::Join {
                id,
                shares,
                memory_bytes,
            } => self.join(client, id, shares, memory_bytes),
            Request::AwaitOom { seen } => {
                client.role = Role::AwaitingOom { seen };
                client.tell_oom(self.oom_kills);
            }
        }
    }
}

fn interest(reading: bool, writing: bool) -> PollFlags {
    let mut wanted = PollFlags::empty();
    wanted.set(PollFlags::IN, reading);
    wanted.set(PollFlags::OUT, writing);
    wanted
}

/// Writes out what clients are still to be told; one that doesn't read is waited for as long as
/// it lives, unless there is a limit, and nobody else is.
pub(super) fn flush(mut clients: Vec<Client>, limit: Option<Duration>) -> io::Result<()> {
    let until = limit.map(|limit| Instant::now() + limit);
    loop {
        clients.iter_mut().for_each(|client| client.peer.flush());
        clients.retain(|client| client.peer.pending() > 0 && !client.peer.is_gone());
        if clients.is_empty() {
            return Ok(());
        }
        let sockets: Vec<BorrowedFd<'_>> =
            clients.iter().map(|client| client.peer.as_fd()).collect();
        let mut fds: Vec<PollFd<'_>> = sockets
            .iter()
            .map(|socket| PollFd::new(socket, PollFlags::OUT))
            .collect();
        let left = until.map(|until| until.saturating_duration_since(Instant::now()));
        if left.is_some_and(|left| left.is_zero()) {
            return Ok(());
        }
        let timeout = left.and_then(|left| Timespec::try_from(left).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
