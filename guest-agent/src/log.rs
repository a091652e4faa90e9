//! The agent's few lines on the guest's console.
//!
//! Owns: writing a line without ever failing. Refuses: anything a container could trigger at
//! will; those go to the host as a failure of that process.

use std::fmt::Display;
use std::io::Write;

/// Says one line on standard error; a console that is gone is no reason to stop.
pub(crate) fn say(message: impl Display) {
    let line = format!("hull-agent: {message}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
}
