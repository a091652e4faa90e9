//! What people and strangers get wrong: each a clear error with the right exit code, nothing
//! lost, nothing left.
//!
//! Owns: what fails because of what was asked or given. Refuses: what fails because somebody was
//! killed; that is the suite `kill`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "test code: a failure is the test's"
)]

mod archive;
mod disk;
mod guests;
mod host;
mod images;
mod pulls;
#[allow(dead_code, reason = "the suite kill uses the rest")]
mod registry;
mod requests;

use hull_tests::hull::Hull;
use hull_tests::process::Output;

/// Asserts that Hull itself refused: by this exit code, and by an error that says these words.
#[track_caller]
fn refused(output: &Output, code: i32, words: &[&str]) {
    let errors = output.errors();
    assert_eq!(output.code, code, "{:?}", output.all());
    let says_who = errors.lines().any(|line| line.starts_with("hull: "));
    assert!(says_who && !errors.contains("panicked at"), "{errors}");
    for word in words {
        assert!(errors.contains(word), "no {word:?} in: {errors}");
    }
}

/// Asserts that no container stayed, and that the image from before still runs.
#[track_caller]
fn still_usable(hull: &Hull) {
    let listed = hull.cmd(["ps", "-aq"]).output();
    assert_eq!(listed.all(), (0, String::new(), String::new()));
    let image = hull.image();
    let words = ["run", "--rm", &image, "echo", "still here"];
    let done = hull.cmd(words).output();
    assert_eq!(done.all(), (0, "still here\n".into(), String::new()));
}
