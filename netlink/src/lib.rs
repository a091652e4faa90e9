//! Network interfaces by the kernel's own words (netlink(7), rtnetlink(7)).
//!
//! Owns: messages and attributes as bytes, the socket that asks and waits for the answer, reading
//! a namespace's [`Interface`](hull_proto::Interface)s and making them again. Refuses: to know
//! what a guest is, and async. It is our own because PID 1 of every guest carries it: the crates
//! that speak rtnetlink bring an async runtime, or many times its size.
//!
//! ```text
//! host: read() ──► Vec<Interface> ── Setup ──► guest: apply()
//! ```

#![forbid(unsafe_code)]

mod apply;
mod link;
mod message;
mod read;
mod socket;
#[cfg(test)]
mod tests;
mod words;

use std::io;

pub use apply::apply;
pub use link::{Change, Link, change, links};
pub use message::{Answer, Attributes, Message};
pub use read::read;
pub use socket::{ACK, CREATE, EXCLUSIVE, Protocol, Socket};

/// A network that can't be read or made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The kernel refused.
    #[error("cannot {what}")]
    Kernel {
        /// What was tried, on what.
        what: String,
        /// What it says.
        #[source]
        source: io::Error,
    },
    /// Something that a guest can't have.
    #[error("{0}")]
    Refused(String),
}

/// Turns an error into ours; for `map_err`.
fn failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.into();
    move |source| NetworkError::Kernel { what, source }
}
