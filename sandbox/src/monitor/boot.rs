//! From a started machine to a running first process: the agent's word, its setup, the spawn.
//! Every wait has a deadline and ends when the guest does.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hull_proto::{
    ContainerStart, ControlError, Decoder, ExitStatus, Failure, Frame, FrameError, GENERATION,
    Hello, Identity, Interface, LineDecoder, MAX_FROM_GUEST, Moment, PROCESS_PORT, Reply, Request,
    Setup, Spawn, encode_line,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;

use crate::checkpoint::CarriedStreams;
use crate::control::Marks;
use crate::names;
use crate::plan::Plan;
use crate::sys;

use super::guest::Guest;
use super::peer::Peer;

/// What is in `/dev/shm`, in bytes, where an engine brings its own: as much as engines give.
const SHARED_MEMORY: u64 = 64 << 20;

/// A guest that didn't come up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BootError {
    /// The guest ended.
    #[error("the guest ended: {0}")]
    Ended(String),
    /// The guest took too long.
    #[error("the guest said nothing for {0} seconds")]
    Silent(u64),
    /// The agent hung up.
    #[error("the agent closed its {0} stream")]
    Closed(&'static str),
    /// The agent is of another make.
    #[error("the agent speaks generation {0}, this monitor speaks {GENERATION}")]
    Generation(u16),
    /// A stream failed.
    #[error("the stream to the agent failed")]
    Stream(#[from] io::Error),
    /// The agent broke the control stream's rules.
    #[error("the agent broke the control stream's rules")]
    Control(#[from] ControlError),
    /// The agent broke the process stream's rules.
    #[error("the agent broke the process stream's rules")]
    Frames(#[from] FrameError),
    /// The agent sent an answer that has no place there.
    #[error("the agent answered something else than what it was asked")]
    Unexpected,
    /// The guest isn't whole.
    #[error("the agent did not settle: {0}")]
    Settle(String),
    /// The agent could not take its setup.
    #[error("the agent refused its setup: {0}")]
    Setup(String),
    /// The container's first process could not start.
    #[error("{}", .0.message)]
    Spawn(Failure),
}

/// The agent's control stream, once it has said hello.
#[derive(Debug)]
pub(super) struct Agent {
    /// Its guest is a copy.
    copied: bool,
    socket: UnixStream,
    lines: LineDecoder,
    /// The guest kernel's release.
    pub(super) kernel: String,
    /// When the start passed its stages, as far as it has come.
    pub(super) marks: Marks,
}

/// What a guest is set up with, beside what each gets anew.
#[derive(Debug, Clone, Copy)]
pub(super) struct Furniture<'a> {
    pub(super) hostname: &'a str,
    pub(super) interfaces: &'a [Interface],
    /// The share over which its disk is to be laid.
    pub(super) layers: Option<&'a str>,
    /// Whether it is to have memory that several containers share.
    pub(super) shared_memory: bool,
}

/// The first process and its stream.
#[derive(Debug)]
pub(super) struct Started {
    pub(super) peer: Peer,
    pub(super) decoder: Decoder,
    pub(super) guest_pid: u32,
}

/// Waits until the agent dials in and says who it is.
///
/// Whoever watches the machine's end sends a closed stream, so that a guest that dies on its way
/// up is noticed at once.
pub(super) fn hello(
    guest: &dyn Guest,
    dials: &Receiver<UnixStream>,
    limit: Duration,
) -> Result<Agent, BootError> {
    let deadline = Instant::now() + limit;
    let socket = match dials.recv_timeout(limit) {
        Ok(socket) => socket,
        Err(RecvTimeoutError::Timeout) => return Err(silent(guest, limit)),
        Err(RecvTimeoutError::Disconnected) => return Err(closed(guest, "control")),
    };
    socket.set_nonblocking(true)?;
    let mut lines = LineDecoder::default();
    let hello: Hello = receive(guest, &socket, &mut lines, deadline, limit)?;
    let ready = sys::monotonic_ns();
    if hello.generation != GENERATION {
        return Err(BootError::Generation(hello.generation));
    }
    Ok(Agent {
        copied: false,
        socket,
        lines,
        kernel: hello.kernel,
        marks: Marks {
            agent: ready.saturating_sub(hello.awake_ns),
            ready,
            ..Marks::default()
        },
    })
}

/// Takes up the stream of an agent that said hello before its guest was saved.
pub(super) fn carried_on(dials: &Receiver<UnixStream>, kernel: String) -> Result<Agent, BootError> {
    // It was handed over as the machine was restored, or never will be.
    let socket = dials.try_recv().map_err(|_| BootError::Closed("control"))?;
    socket.set_nonblocking(true)?;
    Ok(Agent {
        copied: true,
        socket,
        lines: LineDecoder::default(),
        kernel,
        marks: Marks::default(),
    })
}

impl Agent {
    /// One whose guest has its identity already, by way of that guest's monitor.
    pub(super) fn shared(socket: UnixStream, kernel: String) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let now = sys::monotonic_ns();
        Ok(Self {
            copied: false,
            socket,
            lines: LineDecoder::default(),
            kernel,
            marks: Marks {
                built: now,
                agent: now,
                ready: now,
                ..Marks::default()
            },
        })
    }

    /// One that says nothing, for tests of what doesn't listen to it.
    #[cfg(test)]
    pub(super) fn mute(socket: UnixStream) -> Self {
        Self {
            copied: false,
            socket,
            lines: LineDecoder::default(),
            kernel: String::new(),
            marks: Marks::default(),
        }
    }

    /// Its stream, for who goes on to speak to it.
    pub(super) fn into_stream(self) -> (UnixStream, LineDecoder) {
        (self.socket, self.lines)
    }

    /// Gives the guest its identity.
    pub(super) fn setup(
        &mut self,
        guest: &dyn Guest,
        furniture: Furniture<'_>,
        limit: Duration,
    ) -> Result<(), BootError> {
        let request = Request::Setup(Setup {
            hostname: furniture.hostname.to_owned(),
            moment: moment(guest),
            entropy: names::random(),
            layers: furniture.layers.map(str::to_owned),
            interfaces: furniture.interfaces.to_vec(),
            shared_memory_bytes: furniture.shared_memory.then_some(SHARED_MEMORY),
        });
        self.tell(guest, &request, limit, BootError::Setup)?;
        if self.copied {
            // Nothing of it was there before: it wakes to this request.
            let now = sys::monotonic_ns();
            (self.marks.agent, self.marks.ready) = (now, now);
        }
        Ok(())
    }

    /// Gives a guest that goes on from another container's checkpoint its identity, the interfaces
    /// of its cards if it has any, and its limits if its engine says them anew; lets its processes
    /// go on, unless they are held.
    pub(super) fn go_on(
        &mut self,
        guest: &dyn Guest,
        plan: &Plan,
        cards: Option<&[Interface]>,
        limit: Duration,
    ) -> Result<(), BootError> {
        let mut requests = vec![Request::BecomeAnother(Identity {
            hostname: plan.hostname.clone(),
            moment: moment(guest),
            entropy: names::random(),
            files: plan.identity_files(),
        })];
        requests.extend(cards.map(|interfaces| Request::Network {
            interfaces: interfaces.to_vec(),
            resolver: false,
        }));
        let glance = plan.glance();
        if let Some(limits) = glance.resources().filter(|_| plan.bundle.is_some()) {
            requests.push(Request::Update {
                id: plan.guest_id().to_owned(),
                resources: serde_json::to_value(limits).map_err(ControlError::from)?,
            });
        }
        if !plan.held {
            requests.push(Request::GoOn);
        }
        for request in &requests {
            self.tell(guest, request, limit, BootError::Setup)?;
        }
        let now = sys::monotonic_ns();
        (self.marks.agent, self.marks.ready) = (now, now);
        Ok(())
    }

    /// Has the guest's cards be nobody's.
    pub(super) fn let_cards_go(
        &mut self,
        guest: &dyn Guest,
        limit: Duration,
    ) -> Result<(), BootError> {
        let request = Request::Network {
            interfaces: Vec::new(),
            resolver: false,
        };
        self.tell(guest, &request, limit, BootError::Settle)
    }

    /// Has the agent undo its guest's setup.
    pub(super) fn settle(&mut self, guest: &dyn Guest, limit: Duration) -> Result<(), BootError> {
        self.tell(guest, &Request::Settle, limit, BootError::Settle)
    }

    /// Has the agent do all that its guest's copies need not: mount the shares, and its guest's disk
    /// over those with the layers.
    pub(super) fn furnish(
        &mut self,
        guest: &dyn Guest,
        layers: Option<&str>,
        limit: Duration,
    ) -> Result<(), BootError> {
        let layers = layers.map(str::to_owned);
        let request = Request::Furnish { layers };
        self.tell(guest, &request, limit, BootError::Settle)
    }

    /// Has the agent do something; if it can't, what it says is `failed`.
    fn tell(
        &mut self,
        guest: &dyn Guest,
        request: &Request,
        limit: Duration,
        failed: fn(String) -> BootError,
    ) -> Result<(), BootError> {
        match self.ask(guest, request, limit)? {
            Reply::Ok => Ok(()),
            Reply::Error { message } => Err(failed(message)),
            _ => Err(BootError::Unexpected),
        }
    }

    fn ask(
        &mut self,
        guest: &dyn Guest,
        request: &Request,
        limit: Duration,
    ) -> Result<Reply, BootError> {
        let mut line = Vec::new();
        encode_line(request, &mut line)?;
        let deadline = Instant::now() + limit;
        // A line fits the socket's buffer, which is empty.
        io::Write::write_all(&mut &self.socket, &line)?;
        receive(guest, &self.socket, &mut self.lines, deadline, limit)
    }
}

/// What time it is, for the guest to hear.
fn moment(guest: &dyn Guest) -> Moment {
    let known = guest.moment();
    let (tsc, tsc_khz) = known.map_or((0, 0), |moment| (moment.tsc, moment.tsc_khz));
    let realtime = known.map_or_else(SystemTime::now, |moment| moment.realtime);
    let since = realtime.duration_since(UNIX_EPOCH);
    Moment {
        tsc,
        tsc_khz,
        realtime_ns: since.map_or(0, |since| {
            u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
        }),
    }
}

/// Takes up the stream of the first process of a guest that went on.
pub(super) fn process_carried_on(
    dials: &Receiver<UnixStream>,
    carried: &CarriedStreams,
) -> Result<Started, BootError> {
    let stream = dials.try_recv().map_err(|_| BootError::Closed("process"))?;
    let mut peer = Peer::new(stream)?;
    peer.send(&carried.to_agent);
    let mut decoder = Decoder::new(MAX_FROM_GUEST);
    decoder.feed(&carried.from_agent);
    Ok(Started {
        peer,
        decoder,
        guest_pid: carried.guest_pid,
    })
}

/// Runs the container's first process, or makes it if it is to be held.
pub(super) fn spawn(guest: &dyn Guest, plan: &Plan, limit: Duration) -> Result<Started, BootError> {
    let start = ContainerStart {
        id: plan.guest_id().to_owned(),
        spec: plan.spec.clone(),
        init: plan.init,
        hold: plan.held,
    };
    start_container(guest, start, limit)
}

/// Makes a container with its first process.
pub(super) fn start_container(
    guest: &dyn Guest,
    start: ContainerStart,
    limit: Duration,
) -> Result<Started, BootError> {
    let deadline = Instant::now() + limit;
    let mut peer = Peer::new(guest.connect(PROCESS_PORT)?)?;
    peer.send_frame(&Frame::Spawn(Spawn::Container(Box::new(start))));
    let mut decoder = Decoder::new(MAX_FROM_GUEST);
    loop {
        match next_frame(guest, &mut peer, &mut decoder, deadline, limit)? {
            Frame::Started { pid } | Frame::Prepared { pid } => {
                return Ok(Started {
                    peer,
                    decoder,
                    guest_pid: pid,
                });
            }
            Frame::Failed(failure) => return Err(BootError::Spawn(failure)),
            // What became of the process comes next.
            Frame::OomKilled { .. } => {}
            _ => return Err(BootError::Unexpected),
        }
    }
}

/// Waits for the process's end; what it writes is nobody's.
pub(super) fn finish(
    guest: &dyn Guest,
    mut started: Started,
    limit: Duration,
) -> Result<ExitStatus, BootError> {
    let deadline = Instant::now() + limit;
    let (peer, decoder) = (&mut started.peer, &mut started.decoder);
    loop {
        match next_frame(guest, peer, decoder, deadline, limit)? {
            Frame::Exited(status) => return Ok(status),
            Frame::Failed(failure) => return Err(BootError::Spawn(failure)),
            Frame::Stdout(_) | Frame::Stderr(_) | Frame::OomKilled { .. } => {}
            _ => return Err(BootError::Unexpected),
        }
    }
}

/// The next frame of a process stream on which the host has no more to say than what waits.
fn next_frame(
    guest: &dyn Guest,
    peer: &mut Peer,
    decoder: &mut Decoder,
    deadline: Instant,
    limit: Duration,
) -> Result<Frame, BootError> {
    let mut chunk = vec![0; 4096];
    loop {
        if let Some(frame) = decoder.take()? {
            return Ok(frame);
        }
        let writing = peer.pending() > 0;
        ready(guest, &*peer, writing, deadline, limit)?;
        peer.flush();
        match peer.receive(&mut chunk) {
            Some([]) => return Err(closed(guest, "process")),
            Some(bytes) => decoder.feed(bytes),
            None => {}
        }
    }
}

fn receive<T: DeserializeOwned>(
    guest: &dyn Guest,
    mut socket: &UnixStream,
    lines: &mut LineDecoder,
    deadline: Instant,
    limit: Duration,
) -> Result<T, BootError> {
    let mut chunk = [0; 4096];
    loop {
        if let Some(message) = lines.take()? {
            return Ok(message);
        }
        ready(guest, socket, false, deadline, limit)?;
        match io::Read::read(&mut socket, &mut chunk) {
            Ok(0) => return Err(closed(guest, "control")),
            Ok(count) => lines.feed(&chunk[..count]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits until `socket` can be read (or written, if asked), the guest ends, or time is up.
fn ready(
    guest: &dyn Guest,
    socket: impl AsFd,
    writing: bool,
    deadline: Instant,
    limit: Duration,
) -> Result<(), BootError> {
    let wanted = if writing {
        PollFlags::IN | PollFlags::OUT
    } else {
        PollFlags::IN
    };
    let ended = guest.ended();
    let mut fds = [
        PollFd::new(&socket, wanted),
        PollFd::new(&ended, PollFlags::IN),
    ];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(silent(guest, limit));
        }
        let timeout = Timespec::try_from(left).map_err(|_| BootError::Silent(limit.as_secs()))?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) if !fds[0].revents().is_empty() => return Ok(()),
            Ok(_) => return Err(closed(guest, "control")),
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
}

fn closed(guest: &dyn Guest, stream: &'static str) -> BootError {
    match guest.ending() {
        Some(why) => BootError::Ended(why),
        None => BootError::Closed(stream),
    }
}

fn silent(guest: &dyn Guest, limit: Duration) -> BootError {
    match guest.ending() {
        Some(why) => BootError::Ended(why),
        None => BootError::Silent(limit.as_secs()),
    }
}
