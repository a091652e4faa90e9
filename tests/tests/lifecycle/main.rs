//! A container's life, command by command: made, listed, read, entered, stopped, removed.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

mod attach;
mod doctor;
mod exec;
mod foreign;
mod isolation;
mod jail;
mod layers;
mod scratch;
mod states;
mod stops;

use hull_tests::hull::Hull;
use serde_json::Value;

/// Starts a container in the background, waits until its log has `word`, and returns its id.
#[track_caller]
fn start(hull: &Hull, words: &[&str], word: &str) -> String {
    let run = ["run", "-d"].iter().chain(words);
    let id = hull.cmd(run).output().ok().trim().to_owned();
    hull.cmd(["logs", "-f", &id]).spawn().await_stdout(word);
    id
}

/// What `inspect` says of one container.
#[track_caller]
fn inspect(hull: &Hull, name: &str) -> Value {
    let said = hull.cmd(["inspect", name]).output().ok();
    let list: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(list.as_array().map(Vec::len), Some(1), "{said}");
    list[0].clone()
}
