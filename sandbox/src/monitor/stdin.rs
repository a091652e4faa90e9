//! The way of stdin from whichever client is attached to the agent, never more than a window of
//! it unacknowledged.
//!
//! A client may leave while bytes of its are on their way: their acknowledgements come later and
//! must not reach the next client.

use std::collections::VecDeque;

use hull_proto::{Frame, STDIN_WINDOW};

use super::peer::Peer;

/// Bytes of stdin between a client and the agent.
#[derive(Debug, Default)]
pub(super) struct Stdin {
    /// Frames that wait for room in the window: stdin and its end.
    waiting: VecDeque<Frame>,
    waiting_bytes: usize,
    /// Sent to the agent and not acknowledged.
    outstanding: usize,
    /// Of those, what a client that is gone had sent.
    orphaned: usize,
    ended: bool,
}

/// A client that sent more than a window unasked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overrun;

impl Stdin {
    /// Goes on with what another monitor had sent to the agent.
    pub(super) fn carried(outstanding: usize, ended: bool) -> Self {
        let outstanding = outstanding.min(STDIN_WINDOW);
        Self {
            outstanding,
            orphaned: outstanding,
            ended,
            ..Self::default()
        }
    }

    /// Bytes that the agent has not acknowledged, and whether it knows that no more come.
    pub(super) fn state(&self) -> (usize, bool) {
        (self.outstanding, self.ended && self.waiting.is_empty())
    }

    /// Takes bytes from the client.
    pub(super) fn take(&mut self, data: Vec<u8>, agent: &mut Peer) -> Result<(), Overrun> {
        let unacknowledged = self.outstanding - self.orphaned + self.waiting_bytes;
        if unacknowledged + data.len() > STDIN_WINDOW {
            return Err(Overrun);
        }
        if !self.ended {
            self.waiting_bytes += data.len();
            self.waiting.push_back(Frame::Stdin(data));
            self.pump(agent);
        }
        Ok(())
    }

    /// Takes stdin's end, once.
    pub(super) fn end(&mut self, agent: &mut Peer) {
        if !self.ended {
            self.ended = true;
            self.waiting.push_back(Frame::StdinEof);
            self.pump(agent);
        }
    }

    /// Takes the agent's acknowledgement; returns how much of it is the client's to know.
    pub(super) fn acknowledged(&mut self, count: u32, agent: &mut Peer) -> u32 {
        let count = (count as usize).min(self.outstanding);
        self.outstanding -= count;
        let orphaned = count.min(self.orphaned);
        self.orphaned -= orphaned;
        self.pump(agent);
        // No more than a window, so it fits.
        u32::try_from(count - orphaned).unwrap_or(u32::MAX)
    }

    /// The client is gone: what it sent and was not passed on is dropped.
    pub(super) fn abandon(&mut self) {
        self.waiting
            .retain(|frame| matches!(frame, Frame::StdinEof));
        self.waiting_bytes = 0;
        self.orphaned = self.outstanding;
    }

    fn pump(&mut self, agent: &mut Peer) {
        while let Some(frame) = self.waiting.front() {
            let length = match frame {
                Frame::Stdin(data) => data.len(),
                _ => 0,
            };
            if self.outstanding + length > STDIN_WINDOW {
                break;
            }
            agent.send_frame(frame);
            self.outstanding += length;
            self.waiting_bytes -= length;
            self.waiting.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use hull_proto::MAX_DATA;
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_client_that_leaves_leaves_no_acknowledgements_to_the_next() {
        let (near, _far) = UnixStream::pair().unwrap();
        let mut agent = Peer::new(near).unwrap();
        let mut stdin = Stdin::default();
        for _ in 0..4 {
            stdin.take(vec![0; MAX_DATA], &mut agent).unwrap();
        }
        assert_eq!(stdin.take(vec![0], &mut agent), Err(Overrun));
        stdin.abandon();
        stdin.take(vec![0; 10], &mut agent).unwrap();
        assert_eq!(stdin.acknowledged(65536, &mut agent), 0);
        assert_eq!(stdin.acknowledged(3 * 65536, &mut agent), 0);
        assert_eq!(stdin.acknowledged(10, &mut agent), 10);
        assert_eq!(stdin.acknowledged(10, &mut agent), 0);
    }

    proptest! {
        #[test]
        fn never_more_than_a_window_is_unacknowledged(
            steps in proptest::collection::vec((0u8..4, 0usize..MAX_DATA), 0..200),
        ) {
            let (near, _far) = UnixStream::pair().unwrap();
            let mut agent = Peer::new(near).unwrap();
            let mut stdin = Stdin::default();
            for (step, size) in steps {
                match step {
                    0 | 1 => drop(stdin.take(vec![0; size], &mut agent)),
                    2 => drop(stdin.acknowledged(u32::try_from(size).unwrap(), &mut agent)),
                    _ => stdin.abandon(),
                }
                prop_assert!(stdin.outstanding <= STDIN_WINDOW);
                prop_assert!(stdin.waiting_bytes <= STDIN_WINDOW);
                prop_assert!(stdin.orphaned <= stdin.outstanding);
            }
        }
    }
}
