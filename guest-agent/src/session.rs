//! One process stream: from its first frame to its last.
//!
//! Owns: the stream, its frames in both directions, and the process behind it as far as the host
//! can see it. Refuses: frames out of order and input past the window; such a stream is closed,
//! the process goes on.
//!
//! ```text
//! waiting ──Spawn──► being made ──line closed──► running ──reaped, output drained──► over
//!     └──bad frame──► over    └──Failed──► over      └──host closed the stream──► over
//! ```

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_proto::{Decoder, ExitStatus, Failure, Frame, MAX_DATA, MAX_FROM_HOST, Spawn};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};
use rustix::process::Pid;

use crate::cgroup::OomWatch;
use crate::connect;
use crate::container::Containers;
use crate::fault::Fault;
use crate::relay::{Output, Relay};
use crate::report::{self, Word};
use crate::spawn::Born;
use crate::sys;

/// Unsent bytes above which no more output is read from the process.
const OUT_LIMIT: usize = 2 * MAX_DATA;

/// How long an ended process's output may be held open by others, as containerd has it.
const DRAIN: Duration = Duration::from_secs(2);

/// What a session waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// The host sent something.
    Incoming,
    /// The host takes something.
    Outgoing,
    /// The process being made has a word.
    Line,
    /// The process takes input.
    Input,
    /// The process wrote.
    Output(Output),
    /// Its container's memory was short.
    Memory,
}

/// The process of a session.
#[derive(Debug)]
struct Life {
    id: String,
    pid: Pid,
    line: Option<OwnedFd>,
    held: bool,
    executing: bool,
    failure: Option<Failure>,
    exit: Option<ExitStatus>,
    drain_until: Option<Instant>,
    oom_kills_before: u64,
    /// For a container's first process.
    oom_watch: Option<OomWatch>,
}

/// One process stream.
#[derive(Debug)]
pub(crate) struct Session {
    stream: OwnedFd,
    decoder: Decoder,
    out: Vec<u8>,
    sent: usize,
    life: Option<Life>,
    relay: Relay,
    gone: bool,
    last_said: bool,
    shut: bool,
}

impl Session {
    /// A stream that was just accepted.
    pub(crate) fn new(stream: OwnedFd) -> Self {
        Self {
            stream,
            decoder: Decoder::new(MAX_FROM_HOST),
            out: Vec::new(),
            sent: 0,
            life: None,
            relay: Relay::default(),
            gone: false,
            last_said: false,
            shut: false,
        }
    }

    /// Whether nothing more comes of it.
    pub(crate) fn is_over(&self) -> bool {
        let making = self.life.as_ref().is_some_and(|life| life.line.is_some());
        self.gone && !making
    }

    /// Whether this process is the one behind the stream.
    pub(crate) fn is_of(&self, pid: Pid) -> bool {
        self.life.as_ref().is_some_and(|life| life.pid == pid)
    }

    /// What to wait for now. Nothing is waited for that there is no room to take.
    pub(crate) fn awaited(&self) -> Vec<(Event, &OwnedFd)> {
        let mut awaited = Vec::new();
        if !self.gone {
            awaited.push((Event::Incoming, &self.stream));
            if self.unsent() > 0 {
                awaited.push((Event::Outgoing, &self.stream));
            }
        }
        if let Some(watch) = self.life.as_ref().and_then(|life| life.oom_watch.as_ref()) {
            awaited.push((Event::Memory, watch.fd()));
        }
        if let Some(line) = self.life.as_ref().and_then(|life| life.line.as_ref()) {
            // Nothing of the process comes before the word that it runs.
            awaited.push((Event::Line, line));
            return awaited;
        }
        if let Some(input) = self.relay.waiting_input() {
            awaited.push((Event::Input, input));
        }
        if self.unsent() < OUT_LIMIT {
            for output in [Output::Stdout, Output::Stderr] {
                if let Some(fd) = self.relay.output(output) {
                    awaited.push((Event::Output(output), fd));
                }
            }
        }
        awaited
    }

    /// When to call [`Self::advance`] even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.life.as_ref().and_then(|life| life.drain_until)
    }

    /// Takes an event.
    pub(crate) fn on_event(&mut self, event: Event, containers: &mut Containers, space: &mut [u8]) {
        match event {
            Event::Incoming => self.receive(containers, space),
            Event::Outgoing => self.flush(),
            Event::Line => self.hear(containers, space),
            Event::Memory => self.tell_of_oom(),
            Event::Input => {
                let done = self.relay.write_input();
                self.acknowledge(done);
            }
            Event::Output(output) => {
                let data = self.relay.read_output(output, space);
                if let Some(data) = data.and_then(|count| space.get(..count)) {
                    self.say(&match output {
                        Output::Stdout => Frame::Stdout(data.to_vec()),
                        Output::Stderr => Frame::Stderr(data.to_vec()),
                    });
                }
            }
        }
    }

    fn receive(&mut self, containers: &mut Containers, space: &mut [u8]) {
        let count = match rustix::net::recv(&self.stream, &mut *space, RecvFlags::DONTWAIT) {
            Ok((count, _)) => count,
            Err(Errno::AGAIN | Errno::INTR) => return,
            Err(_) => 0,
        };
        if count == 0 {
            self.hang_up();
            return;
        }
        if self.last_said {
            return;
        }
        self.decoder.feed(space.get(..count).unwrap_or_default());
        loop {
            match self.decoder.take() {
                Ok(None) => return,
                Ok(Some(frame)) => {
                    if !self.act(frame, containers) {
                        return self.refuse(Fault::internal("the host sent a frame out of order"));
                    }
                }
                Err(error) => {
                    return self.refuse(Fault::internal(format!("the host sent a {error}")));
                }
            }
        }
    }

    /// Does what a frame asks. `false` if it has no place here.
    fn act(&mut self, frame: Frame, containers: &mut Containers) -> bool {
        match (frame, &mut self.life) {
            (Frame::Spawn(spawn), None) if !self.last_said => self.spawn(&spawn, containers),
            (Frame::Stdin(data), Some(_)) => match self.relay.feed(&data) {
                Ok(done) => self.acknowledge(done),
                Err(_) => return false,
            },
            (Frame::StdinEof, Some(_)) => self.relay.end_input(),
            (Frame::Go, Some(life)) => match &life.line {
                // One that has died meanwhile shows when it is reaped.
                Some(line) if life.held => drop(report::go(line.as_fd())),
                _ => return false,
            },
            (Frame::Resize { rows, cols }, Some(_)) => self.relay.resize(rows, cols),
            (Frame::Signal { signal, all }, Some(life)) => {
                let signal = i32::from(signal);
                if all {
                    containers.signal_all(&life.id, signal);
                } else if life.exit.is_none() {
                    let _ = sys::kill(life.pid.as_raw_nonzero().get(), signal);
                }
            }
            // The process failed to start or has ended meanwhile: what was on its way is void.
            _ if self.last_said => {}
            _ => return false,
        }
        true
    }

    fn spawn(&mut self, spawn: &Spawn, containers: &mut Containers) {
        let (id, born) = match spawn {
            Spawn::Container(start) => (start.id.as_str(), containers.start(start)),
            Spawn::Exec(start) => (start.id.as_str(), containers.exec(start)),
            Spawn::Connect { port } => ("", connect::to(*port)),
        };
        let adopted = born.and_then(|born| self.adopt(id, born, containers));
        if let Err(fault) = adopted {
            self.say_last(&Frame::Failed(fault.into_failure()));
        }
    }

    fn adopt(&mut self, id: &str, born: Born, containers: &Containers) -> Result<(), Fault> {
        let oom_kills_before = match &born.oom_watch {
            Some(watch) => watch.seen(),
            None => containers.oom_kills(id),
        };
        if let Some(pipes) = born.pipes {
            self.relay
                .adopt_pipes(pipes)
                .map_err(|_| Fault::internal("cannot adopt the pipes"))?;
        }
        self.life = Some(Life {
            id: id.to_owned(),
            pid: born.pid,
            line: Some(born.line),
            held: false,
            executing: false,
            failure: None,
            exit: None,
            drain_until: None,
            oom_kills_before,
            oom_watch: born.oom_watch,
        });
        Ok(())
    }

    fn hear(&mut self, containers: &mut Containers, space: &mut [u8]) {
        let Some(life) = &mut self.life else { return };
        let Some(line) = &life.line else { return };
        match report::hear(line, space) {
            Ok(Word::Terminal(master)) => {
                if !self.gone && self.relay.adopt_terminal(master).is_err() {
                    self.refuse(Fault::internal("cannot adopt the terminal"));
                }
            }
            Ok(Word::Waiting) => {
                life.held = true;
                let pid = life.pid.as_raw_nonzero().get().unsigned_abs();
                self.say(&Frame::Prepared { pid });
            }
            Ok(Word::Executing) => life.executing = true,
            Ok(Word::Failed(failure)) => life.failure = Some(failure),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(Word::Closed) | Err(_) => {
                life.line = None;
                if life.executing && life.failure.is_none() {
                    containers.runs(life.pid);
                    let pid = life.pid.as_raw_nonzero().get().unsigned_abs();
                    self.say(&Frame::Started { pid });
                }
            }
        }
    }

    fn tell_of_oom(&mut self) {
        let watch = self.life.as_mut().and_then(|life| life.oom_watch.as_mut());
        if let Some(count) = watch.and_then(OomWatch::news) {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.say(&Frame::OomKilled { count });
        }
    }

    /// Notes that the process has ended, while its container can still be asked about it.
    pub(crate) fn reaped(&mut self, status: ExitStatus, containers: &Containers, now: Instant) {
        self.tell_of_oom();
        let Some(life) = &mut self.life else { return };
        life.oom_watch = None;
        life.exit = Some(match status {
            ExitStatus::Signaled { signal, .. } => ExitStatus::Signaled {
                signal,
                oom: i32::from(signal) == libc::SIGKILL
                    && containers.oom_kills(&life.id) > life.oom_kills_before,
            },
            other => other,
        });
        life.drain_until = Some(now + DRAIN);
        let dropped = self.relay.drop_input();
        self.acknowledge(dropped);
    }

    /// Says the last frame once the process has ended and its output is through.
    pub(crate) fn advance(&mut self, now: Instant) {
        if let Some(life) = &mut self.life
            && let (Some(status), None) = (life.exit, &life.line)
            && !self.last_said
        {
            if life.drain_until.is_some_and(|until| until <= now) {
                life.drain_until = None;
                self.relay.limit_outputs();
            }
            let failure = life.failure.take();
            if let Some(failure) = failure {
                self.say_last(&Frame::Failed(failure));
            } else if !life.executing && !life.held {
                let fault = Fault::internal(format!(
                    "the process ended while it was made ({})",
                    ending(status)
                ));
                self.say_last(&Frame::Failed(fault.into_failure()));
            } else if self.relay.outputs_ended() {
                self.say_last(&Frame::Exited(status));
            }
        }
        self.flush();
    }

    fn refuse(&mut self, fault: Fault) {
        if self.life.is_none() {
            self.say_last(&Frame::Failed(fault.into_failure()));
        } else {
            let _ = rustix::net::shutdown(&self.stream, Shutdown::Both);
            self.hang_up();
        }
    }

    fn hang_up(&mut self) {
        self.gone = true;
        self.out = Vec::new();
        self.sent = 0;
        self.relay.hang_up();
        // Nobody is left to let it go: it sees its line close and leaves.
        if let Some(life) = &mut self.life
            && life.held
            && !life.executing
        {
            life.line = None;
        }
    }

    fn acknowledge(&mut self, count: usize) {
        if count > 0 && !self.gone {
            let count = u32::try_from(count).unwrap_or(u32::MAX);
            self.say(&Frame::StdinAck(count));
        }
    }

    fn say_last(&mut self, frame: &Frame) {
        self.say(frame);
        self.last_said = true;
        self.relay.hang_up();
        if let Some(life) = &mut self.life {
            life.drain_until = None;
        }
    }

    fn say(&mut self, frame: &Frame) {
        // Only a spawn can fail to be written, and the agent says none.
        if !self.gone && !self.last_said && hull_proto::encode(frame, &mut self.out).is_ok() {
            self.flush();
        }
    }

    fn unsent(&self) -> usize {
        self.out.len().saturating_sub(self.sent)
    }

    /// Sends what the host takes now.
    fn flush(&mut self) {
        while !self.gone && self.unsent() > 0 {
            let rest = self.out.get(self.sent..).unwrap_or_default();
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::net::send(&self.stream, rest, flags) {
                Ok(count) => self.sent += count,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.hang_up(),
            }
        }
        if self.unsent() == 0 {
            self.out.clear();
            self.sent = 0;
            if self.last_said && !self.shut {
                // The rest is the host's to close: it may still be sending.
                self.shut = true;
                let _ = rustix::net::shutdown(&self.stream, Shutdown::Write);
            }
        } else if self.sent > OUT_LIMIT {
            self.out.drain(..self.sent);
            self.sent = 0;
        }
    }
}

fn ending(status: ExitStatus) -> String {
    match status {
        ExitStatus::Exited(code) => format!("exit code {code}"),
        ExitStatus::Signaled { signal, oom: false } => format!("signal {signal}"),
        ExitStatus::Signaled { signal, oom: true } => {
            format!("signal {signal}: the container's memory limit is too small")
        }
    }
}
