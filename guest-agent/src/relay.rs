//! The bytes between a process's standard streams and its stream to the host.
//!
//! Owns: the agent's ends of the pipes or of the terminal, input that was not yet written, and
//! how much output is still owed after the process ended. Refuses: more input than
//! [`STDIN_WINDOW`], and reading output that there is no room for.

use std::collections::VecDeque;
use std::os::fd::{AsFd, OwnedFd};

use hull_proto::STDIN_WINDOW;
use rustix::io::Errno;

use crate::tty;

/// Which output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Output {
    /// stdout, or the terminal.
    Stdout,
    /// stderr.
    Stderr,
}

/// An output that is open, and how many bytes of it still count once a limit was set.
#[derive(Debug)]
struct Source {
    fd: OwnedFd,
    owed: Option<u64>,
}

/// The agent's ends of one process's streams.
#[derive(Debug, Default)]
pub(crate) struct Relay {
    input: Option<OwnedFd>,
    input_closed: bool,
    pending: VecDeque<u8>,
    ends: bool,
    stdout: Option<Source>,
    stderr: Option<Source>,
    terminal: bool,
    size: Option<(u16, u16)>,
}

/// More input than the window.
#[derive(Debug)]
pub(crate) struct WindowExceeded;

impl Relay {
    /// Takes the pipes of a process without a terminal.
    ///
    /// # Errors
    /// None that pipes can have.
    pub(crate) fn adopt_pipes(
        &mut self,
        [stdin, stdout, stderr]: [OwnedFd; 3],
    ) -> Result<(), Errno> {
        for end in [&stdin, &stdout, &stderr] {
            rustix::io::ioctl_fionbio(end, true)?;
        }
        let source = |fd| Some(Source { fd, owed: None });
        self.input = Some(stdin);
        self.stdout = source(stdout);
        self.stderr = source(stderr);
        Ok(())
    }

    /// Takes the agent's end of a process's terminal.
    ///
    /// # Errors
    /// EMFILE.
    pub(crate) fn adopt_terminal(&mut self, master: OwnedFd) -> Result<(), Errno> {
        rustix::io::ioctl_fionbio(&master, true)?;
        if let Some((rows, cols)) = self.size {
            tty::resize(master.as_fd(), rows, cols);
        }
        self.input = Some(rustix::io::fcntl_dupfd_cloexec(&master, 3)?);
        self.stdout = Some(Source {
            fd: master,
            owed: None,
        });
        self.terminal = true;
        Ok(())
    }

    /// Takes input. Returns how many bytes can be acknowledged at once, because nobody reads them.
    ///
    /// # Errors
    /// If it is more than the window allows.
    pub(crate) fn feed(&mut self, data: &[u8]) -> Result<usize, WindowExceeded> {
        if self.input_closed {
            return Ok(data.len());
        }
        if self.pending.len() + data.len() > STDIN_WINDOW {
            return Err(WindowExceeded);
        }
        self.pending.extend(data);
        Ok(0)
    }

    /// Notes that input has ended. A terminal has no end of input.
    pub(crate) fn end_input(&mut self) {
        self.ends = true;
        self.close_spent_input();
    }

    /// The input to wait for, if anything waits to be written.
    pub(crate) fn waiting_input(&self) -> Option<&OwnedFd> {
        self.input.as_ref().filter(|_| !self.pending.is_empty())
    }

    /// Writes what the process takes. Returns how many bytes are done with.
    pub(crate) fn write_input(&mut self) -> usize {
        let mut done = 0;
        while let Some(input) = self.waiting_input() {
            let (chunk, _) = self.pending.as_slices();
            match rustix::io::write(input, chunk) {
                Ok(count) if count > 0 => {
                    self.pending.drain(..count);
                    done += count;
                }
                Err(Errno::INTR) => {}
                Ok(_) | Err(Errno::AGAIN) => break,
                Err(_) => done += self.close_input(),
            }
        }
        self.close_spent_input();
        done
    }

    /// Gives input up. Returns how many bytes are dropped with it.
    fn close_input(&mut self) -> usize {
        self.input = None;
        self.input_closed = true;
        let dropped = self.pending.len();
        self.pending = VecDeque::new();
        dropped
    }

    /// Gives input up because the process has ended. Returns how many bytes are dropped with it.
    pub(crate) fn drop_input(&mut self) -> usize {
        self.close_input()
    }

    fn close_spent_input(&mut self) {
        if self.ends && !self.terminal && self.input.is_some() && self.pending.is_empty() {
            self.close_input();
        }
    }

    /// An output that is still open.
    pub(crate) fn output(&self, output: Output) -> Option<&OwnedFd> {
        match output {
            Output::Stdout => self.stdout.as_ref(),
            Output::Stderr => self.stderr.as_ref(),
        }
        .map(|source| &source.fd)
    }

    /// Reads some of an output into `space`. `None` if there is nothing now, or no more at all.
    pub(crate) fn read_output(&mut self, output: Output, space: &mut [u8]) -> Option<usize> {
        let place = match output {
            Output::Stdout => &mut self.stdout,
            Output::Stderr => &mut self.stderr,
        };
        let source = place.as_mut()?;
        let room = source.owed.map_or(space.len(), |owed| {
            space.len().min(usize::try_from(owed).unwrap_or(usize::MAX))
        });
        let read = loop {
            match rustix::io::read(&source.fd, space.get_mut(..room)?) {
                Err(Errno::INTR) => {}
                other => break other,
            }
        };
        match read {
            Err(Errno::AGAIN) => {
                if source.owed.is_some() {
                    *place = None;
                }
                None
            }
            // A terminal whose other end is closed everywhere says EIO.
            Ok(0) | Err(_) => {
                *place = None;
                None
            }
            Ok(count) => {
                if let Some(owed) = &mut source.owed {
                    *owed = owed.saturating_sub(count as u64);
                    if *owed == 0 {
                        *place = None;
                    }
                }
                Some(count)
            }
        }
    }

    /// From now on only what waits in the outputs counts: somebody else holds them open.
    pub(crate) fn limit_outputs(&mut self) {
        for place in [&mut self.stdout, &mut self.stderr] {
            if let Some(source) = place {
                let waiting = rustix::io::ioctl_fionread(&source.fd).unwrap_or(0);
                let owed = source.owed.unwrap_or(waiting).min(waiting);
                source.owed = Some(owed);
                if owed == 0 {
                    *place = None;
                }
            }
        }
    }

    /// Whether every output has ended.
    pub(crate) fn outputs_ended(&self) -> bool {
        self.stdout.is_none() && self.stderr.is_none()
    }

    /// Sets the terminal's size, now or once there is one.
    pub(crate) fn resize(&mut self, rows: u16, cols: u16) {
        self.size = Some((rows, cols));
        if self.terminal
            && let Some(master) = &self.input
        {
            tty::resize(master.as_fd(), rows, cols);
        }
    }

    /// Closes everything: pipes break, a terminal hangs up.
    pub(crate) fn hang_up(&mut self) {
        self.close_input();
        self.stdout = None;
        self.stderr = None;
    }
}

#[cfg(test)]
mod tests {
    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    struct Far {
        stdin: Option<OwnedFd>,
        stdout: OwnedFd,
    }

    fn pair() -> (Relay, Far) {
        let pipe = || pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (stdin, stdout, stderr) = (pipe(), pipe(), pipe());
        let mut relay = Relay::default();
        relay.adopt_pipes([stdin.1, stdout.0, stderr.0]).unwrap();
        let far = Far {
            stdin: Some(stdin.0),
            stdout: stdout.1,
        };
        (relay, far)
    }

    #[test]
    fn input_past_the_window_is_refused() {
        let (mut relay, _far) = pair();
        assert_eq!(relay.feed(&vec![0; STDIN_WINDOW]).unwrap(), 0);
        assert!(relay.feed(&[0]).is_err());
        let written = relay.write_input();
        assert!(written > 0 && written < STDIN_WINDOW);
        assert_eq!(relay.feed(&vec![0; written]).unwrap(), 0);
    }

    #[test]
    fn input_that_nobody_reads_is_dropped_and_done_with() {
        let (mut relay, mut far) = pair();
        relay.feed(b"abc").unwrap();
        far.stdin = None;
        // The test's own thread would get SIGPIPE, which the test harness ignores.
        assert_eq!(relay.write_input(), 3);
        assert_eq!(relay.feed(b"de").unwrap(), 2);
    }

    #[test]
    fn the_end_of_input_waits_for_what_was_fed() {
        let (mut relay, far) = pair();
        relay.feed(b"abc").unwrap();
        relay.end_input();
        assert_eq!(relay.write_input(), 3);
        let mut bytes = [0; 8];
        let stdin = far.stdin.unwrap();
        assert_eq!(rustix::io::read(&stdin, &mut bytes).unwrap(), 3);
        assert_eq!(rustix::io::read(&stdin, &mut bytes).unwrap(), 0);
    }

    #[test]
    fn a_limit_lets_what_waits_through_and_no_more() {
        let (mut relay, far) = pair();
        rustix::io::write(&far.stdout, b"first").unwrap();
        relay.limit_outputs();
        rustix::io::write(&far.stdout, b"late").unwrap();
        let mut space = [0; 64];
        assert_eq!(relay.read_output(Output::Stdout, &mut space), Some(5));
        assert_eq!(relay.read_output(Output::Stdout, &mut space), None);
        assert!(relay.outputs_ended());
    }
}
