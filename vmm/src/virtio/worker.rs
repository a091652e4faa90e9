//! The one place that decides which thread serves which device.
//!
//! A worker is a thread with an epoll of its own. It waits for doorbells and
//! for what its devices watch, and calls the slots one after the other. A
//! device's own descriptors sit in an epoll nested in the worker's, made when
//! the first one is watched, so that a reset forgets them all at once.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, Timespec};

use super::device::{Interest, Readiness, Wakers};
use super::transport::Slot;
use crate::outcome::lock;

/// A worker's stack: its deepest path is a device's, and no device recurses.
const STACK_BYTES: usize = 256 << 10;
/// Events taken at once.
const BATCH: usize = 32;

/// What an entry of the worker's epoll stands for: packed into its 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    Control,
    Doorbell { slot: usize, queue: usize },
    Watched { slot: usize },
}

impl Source {
    fn pack(self) -> EventData {
        let (kind, slot, queue) = match self {
            Self::Control => (0, 0, 0),
            Self::Doorbell { slot, queue } => (1, slot, queue),
            Self::Watched { slot } => (2, slot, 0),
        };
        EventData::new_u64(kind << 48 | (slot as u64) << 16 | queue as u64)
    }

    fn unpack(data: EventData) -> Self {
        let bits = data.u64();
        let slot = (bits >> 16 & 0xffff_ffff) as usize;
        match bits >> 48 {
            1 => Self::Doorbell {
                slot,
                queue: (bits & 0xffff) as usize,
            },
            2 => Self::Watched { slot },
            _ => Self::Control,
        }
    }
}

/// A worker's epoll, and how its thread is told to pause or stop.
pub struct Poller {
    epoll: OwnedFd,
    control: OwnedFd,
    mode: Mutex<Mode>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Pause,
    Stop,
}

struct Mode {
    wish: Wish,
    paused: bool,
}

impl Poller {
    /// An epoll without a thread yet.
    ///
    /// # Errors
    /// When the host has no descriptors left.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let control = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &control, Source::Control.pack(), EventFlags::IN)?;
        Ok(Arc::new(Self {
            epoll,
            control,
            mode: Mutex::new(Mode {
                wish: Wish::Run,
                paused: false,
            }),
            changed: Condvar::new(),
        }))
    }

    fn wish(&self, wish: Wish) {
        lock(&self.mode).wish = wish;
        self.changed.notify_all();
        let _ = rustix::io::write(&self.control, &1u64.to_ne_bytes());
    }

    /// Waits while a pause is wished; false when the thread is to end.
    fn obey(&self) -> bool {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.control, &mut count);
        let mut mode = lock(&self.mode);
        while mode.wish == Wish::Pause {
            mode.paused = true;
            self.changed.notify_all();
            mode = self
                .changed
                .wait(mode)
                .unwrap_or_else(PoisonError::into_inner);
        }
        mode.paused = false;
        mode.wish == Wish::Run
    }
}

/// The thread that serves some slots.
pub struct Worker {
    poller: Arc<Poller>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread named `name` that serves those of `slots` that are `poller`'s; they
    /// are known by their place in the list.
    ///
    /// # Errors
    /// When the host refuses a thread, or an epoll entry.
    pub fn start(
        name: &str,
        poller: Arc<Poller>,
        slots: Vec<(usize, Arc<Slot>)>,
    ) -> io::Result<Self> {
        for (index, slot) in &slots {
            for (queue, doorbell) in slot.doorbells().iter().enumerate() {
                let source = Source::Doorbell {
                    slot: *index,
                    queue,
                };
                epoll::add(&poller.epoll, doorbell, source.pack(), EventFlags::IN)?;
            }
        }
        let own = Arc::clone(&poller);
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || serve(&own, &slots))?;
        Ok(Self {
            poller,
            thread: Some(thread),
        })
    }

    /// Waits until the thread stands still between two calls.
    pub fn pause(&self) {
        self.poller.wish(Wish::Pause);
        let mut mode = lock(&self.poller.mode);
        while !mode.paused {
            mode = self
                .poller
                .changed
                .wait(mode)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets it go on.
    pub fn resume(&self) {
        self.poller.wish(Wish::Run);
    }

    /// Ends the thread and waits for it.
    pub fn stop(&mut self) {
        self.poller.wish(Wish::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn serve(poller: &Poller, slots: &[(usize, Arc<Slot>)]) {
    let find = |index: usize| {
        slots
            .iter()
            .find(|(i, _)| *i == index)
            .map(|(_, slot)| slot)
    };
    let mut events = Vec::with_capacity(BATCH);
    loop {
        events.clear();
        match epoll::wait(&poller.epoll, spare_capacity(&mut events), None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // The descriptor is ours and valid: nothing else can come.
            Err(_) => return,
        }
        for event in &events {
            match Source::unpack(event.data) {
                Source::Control => {
                    if !poller.obey() {
                        return;
                    }
                }
                Source::Doorbell { slot, queue } => {
                    if let Some(slot) = find(slot) {
                        slot.on_kick(queue);
                    }
                }
                Source::Watched { slot } => {
                    if let Some(slot) = find(slot) {
                        slot.on_events();
                    }
                }
            }
        }
    }
}

/// What one activation of a device watches.
pub struct DeviceWakers {
    poller: Arc<Poller>,
    slot: usize,
    nested: Mutex<Option<OwnedFd>>,
}

impl DeviceWakers {
    /// Nothing yet.
    pub(super) fn new(poller: Arc<Poller>, slot: usize) -> Self {
        Self {
            poller,
            slot,
            nested: Mutex::new(None),
        }
    }

    /// Forgets all that is watched.
    pub(super) fn close(&self) {
        if let Some(nested) = lock(&self.nested).take() {
            // Without this the worker would see it until the last copy is closed.
            let _ = epoll::delete(&self.poller.epoll, &nested);
        }
    }

    /// What is ready now, at most one batch.
    pub(super) fn ready(&self) -> Vec<(u32, Readiness)> {
        let nested = lock(&self.nested);
        let Some(nested) = nested.as_ref() else {
            return Vec::new();
        };
        let mut events: Vec<epoll::Event> = Vec::with_capacity(BATCH);
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let _ = epoll::wait(nested, spare_capacity(&mut events), Some(&now));
        events
            .iter()
            .map(|event| {
                let data = event.data;
                let flags = event.flags;
                let any = |wanted| flags.intersects(wanted);
                let failed = any(EventFlags::HUP | EventFlags::ERR);
                let readiness = Readiness {
                    readable: failed || any(EventFlags::IN | EventFlags::RDHUP),
                    writable: failed || any(EventFlags::OUT),
                    hangup: failed,
                };
                (data.u64() as u32, readiness)
            })
            .collect()
    }
}

fn flags(interest: Interest) -> EventFlags {
    let read = EventFlags::IN | EventFlags::RDHUP;
    match interest {
        Interest::None => EventFlags::empty(),
        Interest::Read => read,
        Interest::Write => EventFlags::OUT,
        Interest::ReadWrite => read | EventFlags::OUT,
    }
}

impl Wakers for DeviceWakers {
    fn watch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()> {
        let mut nested = lock(&self.nested);
        let nested = match &mut *nested {
            Some(nested) => nested,
            none => {
                let made = epoll::create(CreateFlags::CLOEXEC)?;
                let source = Source::Watched { slot: self.slot };
                epoll::add(
                    &self.poller.epoll,
                    made.as_fd(),
                    source.pack(),
                    EventFlags::IN,
                )?;
                none.insert(made)
            }
        };
        epoll::add(
            nested,
            fd,
            EventData::new_u64(token.into()),
            flags(interest),
        )?;
        Ok(())
    }

    fn rewatch(&self, fd: BorrowedFd<'_>, interest: Interest, token: u32) -> io::Result<()> {
        match lock(&self.nested).as_ref() {
            Some(nested) => {
                epoll::modify(
                    nested,
                    fd,
                    EventData::new_u64(token.into()),
                    flags(interest),
                )?;
                Ok(())
            }
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn unwatch(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        match lock(&self.nested).as_ref() {
            Some(nested) => Ok(epoll::delete(nested, fd)?),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }
}
