//! The caller's terminal: raw while a container has it, as it was before in every other case.
//!
//! Owns: the saved settings and their return, also when this process panics. Refuses: reading
//! and writing.

use std::os::fd::{AsFd, OwnedFd};
use std::panic;
use std::sync::{Mutex, OnceLock, PoisonError};

use rustix::io::Errno;
use rustix::termios::{self, OptionalActions, Termios};

/// The terminal that is raw at this moment. A panic aborts without running destructors, so its
/// hook must find the settings here.
static RAW: OnceLock<Mutex<Option<Saved>>> = OnceLock::new();

#[derive(Debug)]
struct Saved {
    terminal: OwnedFd,
    settings: Termios,
}

impl Saved {
    fn restore(self) {
        // A terminal that has gone needs no settings.
        let _ = termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.settings);
    }
}

/// A terminal in raw mode. Dropping it gives the terminal its settings back.
#[derive(Debug)]
#[must_use = "the terminal is raw only as long as this lives"]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Turns echo, line editing and signal keys off.
    pub(crate) fn enter(terminal: impl AsFd) -> Result<Self, Errno> {
        let settings = termios::tcgetattr(&terminal)?;
        let mut raw = settings.clone();
        raw.make_raw();
        let saved = Saved {
            terminal: rustix::io::fcntl_dupfd_cloexec(&terminal, 3)?,
            settings,
        };
        let slot = RAW.get_or_init(|| {
            restore_on_panic();
            Mutex::new(None)
        });
        *slot.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        let entered = Self(());
        termios::tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(entered)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    let saved = RAW
        .get()
        .and_then(|slot| slot.lock().unwrap_or_else(PoisonError::into_inner).take());
    if let Some(saved) = saved {
        saved.restore();
    }
}

fn restore_on_panic() {
    let earlier = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        restore();
        earlier(info);
    }));
}

/// The terminal's size as (rows, columns); `None` if it isn't one or has none.
pub(crate) fn size(terminal: impl AsFd) -> Option<(u16, u16)> {
    let size = termios::tcgetwinsize(terminal).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
