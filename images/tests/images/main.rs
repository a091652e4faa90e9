//! The crate as its callers see it: a store, a registry that can misbehave, archives.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a step that fails is a test that fails"
)]

mod auth;
mod killed;
mod layers;
mod load;
mod misbehaviour;
mod pull;
mod real_registry;
mod server;
mod source;
mod store;

use std::error::Error;

/// An error and its causes, as people see them.
fn message(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
