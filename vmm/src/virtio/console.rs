//! The console (virtio 1.3 §5.3), a single port: the guest's log goes to a sink.
//!
//! Input is for debugging alone: a pipe or terminal whose bytes go to the guest.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};

use super::device::{
    Activation, DeviceError, Interest, Persist, Readiness, RestoreError, Unsaveable, VirtioDevice,
};
use super::queue::Queue;
use crate::bus::Sink;
use crate::outcome::lock;

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const INPUT: u32 = 0;
/// The most taken from the input at once.
const MAX_INPUT: usize = 512;

/// The device.
pub struct Console {
    sink: Sink,
    input: Option<OwnedFd>,
    activation: Option<Activation>,
    /// Whether the input is being watched: not while the guest has no buffers for it.
    watching: bool,
}

/// Nothing: what was printed is printed, and pending input is the host's.
#[derive(Debug, Serialize, Deserialize)]
pub struct ConsoleState {}

impl Console {
    /// A console that prints to `sink` and reads from `input`.
    #[must_use]
    pub fn new(sink: Sink, input: Option<OwnedFd>) -> Self {
        Self {
            sink,
            input,
            activation: None,
            watching: false,
        }
    }

    fn transmit(&self, queue: &mut Queue) -> Result<(), DeviceError> {
        let mut sink = lock(&self.sink);
        while let Some(chain) = queue.pop()? {
            // A sink that fails loses the log: no reason to stop the guest.
            let _ = chain.copy_to(0, chain.readable_len() as usize, sink.as_mut())?;
            queue.complete(&chain, 0)?;
        }
        drop(sink.flush());
        Ok(())
    }

    fn receive(&mut self, queue: &mut Queue) -> Result<(), DeviceError> {
        let Some(input) = &self.input else {
            return Ok(());
        };
        let Some(chain) = queue.pop()? else {
            return self.watch(false);
        };
        let mut bytes = [0u8; MAX_INPUT];
        let room = bytes.len().min(chain.writable_len() as usize);
        let part = bytes.get_mut(..room).unwrap_or_default();
        match rustix::io::read(input, &mut *part) {
            Ok(0) => {
                // The end of the input: it is never ready again.
                queue.unpop(chain);
                self.unwatch();
                self.input = None;
                Ok(())
            }
            Ok(count) => {
                chain.write_at(0, part.get(..count).unwrap_or_default())?;
                queue.complete(&chain, u32::try_from(count).unwrap_or(0))?;
                Ok(())
            }
            Err(_) => {
                queue.unpop(chain);
                Ok(())
            }
        }
    }

    /// Whether a read of the input won't block.
    fn is_ready(&self) -> bool {
        let Some(input) = &self.input else {
            return false;
        };
        let mut fds = [PollFd::new(input, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&Timespec::default())), Ok(1..))
    }

    fn watch(&mut self, wanted: bool) -> Result<(), DeviceError> {
        let (Some(input), Some(activation)) = (&self.input, &self.activation) else {
            return Ok(());
        };
        if wanted == self.watching {
            return Ok(());
        }
        let result = if wanted {
            activation
                .wakers
                .watch(input.as_fd(), Interest::Read, INPUT)
        } else {
            activation.wakers.unwatch(input.as_fd())
        };
        // A regular file can't be watched, and /dev/null neither: no input then.
        match result {
            Ok(()) => self.watching = wanted,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => self.input = None,
            Err(source) => {
                return Err(DeviceError::Host {
                    what: "watch the console's input",
                    source,
                });
            }
        }
        Ok(())
    }

    fn unwatch(&mut self) {
        drop(self.watch(false));
    }
}

impl Persist for Console {
    const UNIT: &'static str = "console";
    type State = ConsoleState;

    fn save(&self) -> Result<ConsoleState, Unsaveable> {
        Ok(ConsoleState {})
    }

    fn restore(&mut self, _state: ConsoleState) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl VirtioDevice for Console {
    const ID: u32 = 3;

    fn queue_sizes(&self) -> &[u16] {
        &[16, 64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        self.activation = Some(activation);
        self.watching = false;
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        match (index, queues.get_mut(index)) {
            (TRANSMIT, Some(queue)) => self.transmit(queue),
            // New buffers: whether there is input to put in them, the watch will tell.
            (RECEIVE, Some(_)) => self.watch(true),
            _ => Ok(()),
        }
    }

    fn on_event(
        &mut self,
        _token: u32,
        _readiness: Readiness,
        queues: &mut [Queue],
    ) -> Result<(), DeviceError> {
        // A late report may be of what was read since, and the input may be one that blocks.
        match queues.get_mut(RECEIVE) {
            Some(queue) if self.is_ready() => self.receive(queue),
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.unwatch();
        self.activation = None;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::testing::{Bench, Part, persist_roundtrip};

    #[derive(Clone, Default)]
    struct Paper(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Paper {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn console(input: Option<OwnedFd>) -> (Console, Paper) {
        let paper = Paper::default();
        let sink: Sink = Arc::new(Mutex::new(Box::new(paper.clone())));
        (Console::new(sink, input), paper)
    }

    #[test]
    fn output_of_several_buffers_is_printed_in_order() {
        let (device, paper) = console(None);
        let mut bench = Bench::new(device);
        let long = vec![b'x'; 10_000];
        bench.guest[TRANSMIT].add(&[
            Part::Read(b"hello ".to_vec()),
            Part::Read(b"world".to_vec()),
        ]);
        bench.guest[TRANSMIT].add_indirect(&[Part::Read(long.clone())]);
        bench.kick(TRANSMIT).unwrap();
        let printed = paper.0.lock().unwrap().clone();
        assert_eq!(printed, [b"hello world".as_slice(), &long].concat());
        assert_eq!(bench.irq.take(TRANSMIT), 2);
    }

    #[test]
    fn input_waits_for_buffers_and_ends() {
        let (read, write) = rustix::pipe::pipe().unwrap();
        let (device, _) = console(Some(read));
        let mut bench = Bench::new(device);
        assert!(bench.wakers.watched().is_empty());
        bench.guest[RECEIVE].add(&[Part::Write(8)]);
        bench.kick(RECEIVE).unwrap();
        assert_eq!(bench.wakers.tokens(), [INPUT]);
        rustix::io::write(&write, b"0123456789").unwrap();
        let ready = Readiness {
            readable: true,
            ..Readiness::default()
        };
        bench
            .device
            .on_event(INPUT, ready, &mut bench.queues)
            .unwrap();
        let used = bench.guest[RECEIVE].pop_used().unwrap();
        assert_eq!(
            (used.length, used.written.as_slice()),
            (8, b"01234567".as_slice())
        );
        // No buffer left: no watch, until the guest adds one.
        bench
            .device
            .on_event(INPUT, ready, &mut bench.queues)
            .unwrap();
        assert!(bench.wakers.watched().is_empty());
        bench.guest[RECEIVE].add(&[Part::Write(8)]);
        bench.kick(RECEIVE).unwrap();
        bench
            .device
            .on_event(INPUT, ready, &mut bench.queues)
            .unwrap();
        assert_eq!(bench.guest[RECEIVE].pop_used().unwrap().length, 2);
        drop(write);
        bench.guest[RECEIVE].add(&[Part::Write(8)]);
        bench
            .device
            .on_event(INPUT, ready, &mut bench.queues)
            .unwrap();
        assert!(bench.wakers.watched().is_empty());
    }

    #[test]
    fn its_state_survives() {
        persist_roundtrip(&console(None).0, &mut console(None).0);
    }
}
