//! The agent's process streams against real containers, on this machine's own kernel.

mod guest;

use guest::Guest;
use hull_proto::{ExitStatus, FailureKind, Frame};
use serde_json::json;

macro_rules! guest {
    () => {
        match Guest::start() {
            Some(guest) => guest,
            None => return,
        }
    };
}

#[test]
fn a_command_runs_and_its_code_comes_back() {
    let guest = guest!();
    assert_eq!(guest.run(guest.spec("echo hello")).text(), "hello\n");
    let outcome = guest.run(guest.spec("echo oops >&2; exit 42"));
    assert_eq!(outcome.end, Ok(ExitStatus::Exited(42)));
    assert_eq!(outcome.stderr, b"oops\n");
    assert!(outcome.stdout.is_empty());
}
