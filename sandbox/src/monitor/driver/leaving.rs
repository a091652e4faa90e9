//! The end of a container whose disk is kept.
//!
//! Owns: that what it wrote is on its disk before anybody hears of its end. Refuses: to wait for a
//! guest that takes longer than an answer may; its disk's journal is what is left then.

use std::io;
use std::time::Instant;

use hull_proto::Request;

use super::{Driver, End};

/// What is awaited of the agent at the end.
#[derive(Debug)]
pub(super) struct Leaving {
    /// The question's number.
    number: u64,
    answered: bool,
}

impl Leaving {
    /// Whether this is the answer.
    pub(super) fn hears(&mut self, number: u64) -> bool {
        self.answered |= number == self.number;
        number == self.number
    }
}

impl Driver<'_> {
    /// Runs until the container has ended.
    pub(in crate::monitor) fn run(&mut self) -> io::Result<End> {
        let end = self.live()?;
        self.put_away(&end)?;
        Ok(end)
    }

    /// Has the agent put the disk away of a container whose first process has ended.
    fn put_away(&mut self, end: &End) -> io::Result<()> {
        let is_kept = self.plan.vm.scratch.is_some() && !self.plan.auto_remove;
        if !is_kept || !matches!(end, End::Process(_)) {
            return Ok(());
        }
        let Ok(number) = self.questions.ask(&Request::PutAway) else {
            return Ok(());
        };
        self.leaving = Some(Leaving {
            number,
            answered: false,
        });
        self.kill_at = None;
        self.stop_at = Some(Instant::now() + self.questions.patience);
        let answered = |driver: &Self| driver.leaving.as_ref().is_none_or(|own| own.answered);
        while !answered(self) && !self.questions.is_over() {
            let ready = self.poll()?;
            if ready.guest || self.deadlines().is_some() {
                break;
            }
            if ready.answers {
                self.answers();
            }
            self.serve_clients();
            if ready.listener {
                self.accept();
            }
        }
        Ok(())
    }
}
