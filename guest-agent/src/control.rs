//! The control stream: the host's few requests to the guest as a whole.
//!
//! Owns: the hello, and doing and answering each request. Refuses: nothing quietly; a request
//! that fails is answered with a sentence.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hull_proto::{
    GENERATION, Hello, LineDecoder, Reply, Request, SHARED_MEMORY_DIR, SHARES_DIR, SHARES_TAG,
    Setup, encode_line,
};
use rustix::fs::Timespec;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, WaitOptions};
use serde::Deserialize;

use crate::container::Containers;
use crate::fault::{Fault, Tried};
use crate::identity;
use crate::log::say;
use crate::mounts::{self, Options};
use crate::network;
use crate::resolver;
use crate::scratch;
use crate::spec::Resources;
use crate::sys;

/// How long the end of every process is waited for at a shutdown.
const LAST_GRACE: Duration = Duration::from_secs(1);

/// What the host wants of the agent itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wish {
    /// To go on.
    GoOn,
    /// To stop the guest.
    Stop,
}

/// The control stream.
#[derive(Debug)]
pub(crate) struct Control {
    stream: OwnedFd,
    lines: LineDecoder,
    owns_guest: bool,
    /// Why the guest isn't whole, said in answer to its setup.
    flaw: Option<Fault>,
    /// Whether the shares are mounted.
    has_shares: bool,
    /// The share over which the scratch disk is laid.
    layers: Option<String>,
    /// Whether one was, for an earlier setup.
    had_layers: bool,
}

impl Control {
    /// Says hello on a stream that was just connected, for an agent that began at `awake`.
    /// `owns_guest` is false where the agent isn't PID 1: it then changes nothing outside of
    /// containers.
    ///
    /// # Errors
    /// If the stream is closed already.
    pub(crate) fn open(stream: OwnedFd, owns_guest: bool, awake: Instant) -> Result<Self, Fault> {
        let hello = Hello {
            generation: GENERATION,
            kernel: rustix::system::uname().release().to_string_lossy().into(),
            awake_ns: u64::try_from(awake.elapsed().as_nanos()).unwrap_or(u64::MAX),
        };
        let control = Self {
            stream,
            lines: LineDecoder::default(),
            owns_guest,
            flaw: None,
            has_shares: false,
            layers: None,
            had_layers: false,
        };
        control.send(&hello)?;
        Ok(control)
    }

    /// Notes what of the guest could not be made ready.
    pub(crate) fn set_flaw(&mut self, flaw: Fault) {
        self.flaw = Some(flaw);
    }

    /// What to poll.
    pub(crate) fn stream(&self) -> &OwnedFd {
        &self.stream
    }

    /// Does what the host asks now. The end of the stream is the wish to stop.
    pub(crate) fn serve(&mut self, containers: &mut Containers, space: &mut [u8]) -> Wish {
        match rustix::net::recv(&self.stream, &mut *space, RecvFlags::DONTWAIT) {
            Ok((0, _)) => return Wish::Stop,
            Ok((count, _)) => self.lines.feed(space.get(..count).unwrap_or_default()),
            Err(Errno::AGAIN | Errno::INTR) => return Wish::GoOn,
            Err(_) => return Wish::Stop,
        }
        loop {
            match self.lines.take::<Request>() {
                Ok(None) => return Wish::GoOn,
                Ok(Some(request)) => {
                    if self.answer(&request, containers) == Wish::Stop {
                        return Wish::Stop;
                    }
                }
                Err(error) => {
                    say(format_args!("the control stream is broken: {error}"));
                    return Wish::Stop;
                }
            }
        }
    }

    fn answer(&mut self, request: &Request, containers: &mut Containers) -> Wish {
        let done = match request {
            Request::Setup(setup) => self.set_up(setup, containers).map(|()| Reply::Ok),
            Request::Network {
                interfaces,
                resolver,
            } if self.owns_guest => network::make_of_spares(interfaces)
                .and_then(|()| match resolver {
                    true => resolver::start(),
                    false => Ok(()),
                })
                .map(|()| Reply::Ok),
            Request::Network { .. } => Ok(Reply::Ok),
            Request::Settle => self.settle(containers).map(|()| Reply::Ok),
            Request::Furnish { layers } => self
                .make_ready(layers.as_deref(), containers)
                .map(|()| Reply::Ok),
            Request::Ping => Ok(Reply::Ok),
            Request::Stats { id } => containers.stats(id).map(|stats| Reply::Stats(stats.into())),
            Request::Processes { id, after } => {
                containers.processes(id, *after).map(Reply::Processes)
            }
            Request::Update { id, resources } => Resources::deserialize(resources)
                .map_err(|error| Fault::refused(format!("the limits can't be read: {error}")))
                .and_then(|resources| containers.update(id, resources))
                .map(|()| Reply::Ok),
            Request::Freeze { id, frozen } => containers.freeze(id, *frozen).map(|()| Reply::Ok),
            Request::Remove { id } => {
                containers.kill(id);
                Ok(Reply::Ok)
            }
            Request::StandStill => containers.stand_still().map(|()| Reply::Ok),
            Request::BecomeAnother(identity) => {
                identity::become_another(identity, containers).map(|()| Reply::Ok)
            }
            Request::GoOn => containers.go_on().map(|()| Reply::Ok),
            Request::PutAway => scratch::put_away().map(|()| Reply::Ok),
            Request::Shutdown => {
                self.end_processes();
                Ok(Reply::Ok)
            }
        };
        let reply = done.unwrap_or_else(|fault| Reply::Error {
            message: fault.to_string(),
        });
        match self.send(&reply) {
            Ok(()) if matches!(request, Request::Shutdown) => Wish::Stop,
            Ok(()) => Wish::GoOn,
            Err(_) => Wish::Stop,
        }
    }

    fn set_up(&mut self, setup: &Setup, containers: &mut Containers) -> Result<(), Fault> {
        if let Some(flaw) = self.flaw.take() {
            return Err(flaw);
        }
        if !self.owns_guest {
            return Ok(());
        }
        identity::be(&setup.hostname, setup.moment, &setup.entropy)?;
        network::make(&setup.interfaces)?;
        let mut is_new = self.furnish(setup.layers.as_deref())?;
        if let Some(size) = setup.shared_memory_bytes {
            mount_shared_memory(size)?;
            is_new = true;
        }
        if is_new {
            containers.discard_spare();
        }
        Ok(())
    }

    /// Mounts what the guest wasn't saved with: the shares, and the scratch disk over those with
    /// the layers. Says whether there was anything.
    fn furnish(&mut self, layers: Option<&str>) -> Result<bool, Fault> {
        let had_shares = self.has_shares;
        if !had_shares {
            mount_shares()?;
            self.has_shares = true;
        }
        match (layers, self.layers.as_deref()) {
            (Some(layers), None) => {
                scratch::open()?;
                scratch::lay_over(layers)?;
                self.layers = Some(layers.to_owned());
                Ok(true)
            }
            (wanted, laid) if wanted == laid => Ok(!had_shares),
            _ => Err(Fault::refused("the scratch disk is laid over other layers")),
        }
    }

    /// Does all that no copy of this guest is to do again.
    fn make_ready(
        &mut self,
        layers: Option<&str>,
        containers: &mut Containers,
    ) -> Result<(), Fault> {
        if !self.owns_guest {
            return containers.prepare(true);
        }
        self.furnish(layers)?;
        // The kernel says that they are mounted before it has heard how from the host.
        fs::metadata(SHARES_DIR).or_internal(|| "cannot look at the shares")?;
        if layers.is_some() {
            scratch::write_out()?;
        }
        hold_program();
        containers.prepare(layers.is_some() || !self.had_layers)?;
        report_free_memory()
    }

    /// Leaves nothing of a setup behind but what the kernel and this process keep for the next.
    fn settle(&mut self, containers: &mut Containers) -> Result<(), Fault> {
        if let Some(flaw) = &self.flaw {
            return Err(flaw.clone());
        }
        containers.sweep();
        if !containers.is_empty() {
            return Err(Fault::refused("a container is still there"));
        }
        if self.owns_guest {
            scratch::unmount()?;
            self.had_layers = self.layers.take().is_some();
            match rustix::mount::unmount(SHARES_DIR, UnmountFlags::empty()) {
                // There was no setup.
                Ok(()) | Err(Errno::NOENT | Errno::INVAL) => {}
                Err(errno) => return Err(errno).or_internal(|| "cannot unmount the shares"),
            }
            self.has_shares = false;
        }
        Ok(())
    }

    /// Ends every process and makes what they wrote durable.
    fn end_processes(&self) {
        if self.owns_guest {
            let _ = sys::kill(-1, libc::SIGKILL);
            wait_for_all();
        }
        rustix::fs::sync();
    }

    fn send<T: serde::Serialize>(&self, message: &T) -> Result<(), Fault> {
        let mut line = Vec::new();
        encode_line(message, &mut line).map_err(|error| Fault::internal(error.to_string()))?;
        let mut rest = line.as_slice();
        while !rest.is_empty() {
            match rustix::net::send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = rest.get(count..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno).or_internal(|| "cannot write to the host"),
            }
        }
        Ok(())
    }
}

/// Has the host take back all that is free, so that no copy of this guest does it again.
fn report_free_memory() -> Result<(), Fault> {
    let finish = "/sys/module/page_reporting/parameters/finish";
    fs::write(finish, "1").or_internal(|| format!("cannot write to {finish}"))
}

/// Has what copies read of this program, and never write, lie together: it is one piece then for
/// their host, too, which maps it at once.
fn hold_program() {
    let held = fs::File::open("/proc/self/exe")
        .and_then(|program| sys::hold_in_one_piece(program.as_fd()));
    if let Err(error) = held {
        say(format_args!("the agent's program stays in pieces: {error}"));
    }
}

fn mount_shares() -> Result<(), Fault> {
    mounts::place("virtiofs", SHARES_TAG, &Options::default(), SHARES_DIR)
}

fn mount_shared_memory(size: u64) -> Result<(), Fault> {
    let size = format!("size={size}");
    let options = Options::parse(&["nosuid", "noexec", "nodev", "mode=1777", size.as_str()]);
    mounts::place("tmpfs", "shm", &options, SHARED_MEMORY_DIR)
}

/// Reaps until there is no process left but this one, for a limited time: one may hang in the
/// kernel.
fn wait_for_all() {
    let until = Instant::now() + LAST_GRACE;
    while let Some(left) = until.checked_duration_since(Instant::now()) {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Err(Errno::CHILD) => return,
            Ok(None) => wait_for_one(left),
            Ok(Some(_)) | Err(_) => {}
        }
    }
}

fn wait_for_one(left: Duration) {
    use rustix::event::{PollFd, PollFlags, poll};
    use rustix::process::{PidfdFlags, pidfd_open};
    // Some child; which one doesn't matter. Without one, the next round says so.
    let children = fs::read_to_string("/proc/self/task/1/children").unwrap_or_default();
    let child = children.split_whitespace().find_map(|pid| pid.parse().ok());
    let Some(pidfd) = child
        .and_then(Pid::from_raw)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok())
    else {
        return;
    };
    let timeout = Timespec::try_from(left).ok();
    let _ = poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], timeout.as_ref());
}
