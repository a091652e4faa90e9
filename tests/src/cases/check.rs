//! Runs cases and says all that didn't hold.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "a case that doesn't hold ends its test"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Instant;

use rustix::process::{Pid, Signal};

use super::{Act, Case, Expect, Only, Share, all};
use crate::adapters::Adapter;
use crate::process::{DEADLINE, Output, Process};

/// Runs every case of a subject that can hold on this engine.
///
/// # Panics
/// When some didn't hold, after all have run; the names and reasons are printed.
pub fn run_all(subject: &str, adapter: &dyn Adapter) {
    let chosen = std::env::var("HULL_CASE").unwrap_or_default();
    let (_, cases) = all()
        .into_iter()
        .find(|(name, _)| *name == subject)
        .expect("a subject of the table");
    let mut failed = Vec::new();
    for case in cases.iter().filter(|case| case.name.contains(&chosen)) {
        if let (Only::Hull(why), true) = (case.only, adapter.is_control()) {
            println!("{}: not on the control: {why}", case.name);
            continue;
        }
        println!("{}", case.name);
        if catch_unwind(AssertUnwindSafe(|| run(case, adapter))).is_err() {
            failed.push(case.name);
        }
    }
    assert!(failed.is_empty(), "cases that don't hold: {failed:?}");
}

fn run(case: &Case, adapter: &dyn Adapter) {
    let scratch = tempfile::Builder::new()
        .prefix("hull-case-")
        .tempdir()
        .expect("make a directory");
    for share in &case.setup.shares {
        prepare(share, scratch.path());
    }
    let output = drive(case, adapter.process(case, scratch.path()), scratch.path());
    judge(case, &output);
    if let Some(look) = case.after {
        look(scratch.path());
    }
}

/// Makes what is shared, open to all, so that no user of the container is in the way.
fn prepare(share: &Share, scratch: &Path) {
    let source = scratch.join(&share.source);
    let is_directory = share
        .files
        .iter()
        .all(|(path, _)| Path::new(path) != share.source);
    if source.starts_with(scratch) && is_directory {
        fs::create_dir_all(&source).expect("make a shared directory");
        open_to_all(&source, 0o777);
    }
    for (path, contents) in &share.files {
        let path = scratch.join(path);
        fs::write(&path, contents).expect("make a shared file");
        open_to_all(&path, 0o666);
    }
}

fn open_to_all(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("open a path to all");
}

fn drive(case: &Case, mut process: Process, scratch: &Path) -> Output {
    if let Some((rows, columns)) = case.tty {
        process = process.tty(rows, columns);
    }
    if let Some(bytes) = &case.stdin {
        process = process.stdin(bytes.clone());
    } else if case.is_interactive() {
        process = process.stdin_open();
    }
    let mut running = process.spawn();
    for step in &case.steps {
        running.await_stdout(step.when);
        match step.act {
            Act::Signal(signal) => {
                await_listener(running.pid(), signal);
                running.signal(signal);
            }
            Act::Write(text) => running.write(text),
            Act::Resize(rows, columns) => running.resize(rows, columns),
            Act::Host(change, then) => {
                change(scratch);
                running.write(then);
            }
        }
    }
    running.wait()
}

/// Waits until a process catches this signal, or keeps it for later. Some engines do so only some
/// time after their container's first words.
fn await_listener(pid: Pid, signal: Signal) {
    let deadline = Instant::now() + DEADLINE;
    let bit = 1_u64 << (signal.as_raw() - 1);
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let listens = || {
        let status = fs::read_to_string(&path).expect("read a process's status");
        let mask = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        };
        let masks = [mask("SigBlk:"), mask("SigCgt:")];
        masks.into_iter().flatten().any(|mask| mask & bit != 0)
    };
    while !listens() {
        assert!(Instant::now() < deadline, "nobody listens for {signal:?}");
        std::thread::yield_now();
    }
}

fn judge(case: &Case, output: &Output) {
    let mut wrong = Vec::new();
    if output.code != case.code {
        wrong.push(format!("exit code {} and not {}", output.code, case.code));
    }
    wrong.extend(differs("stdout", &case.stdout, &output.stdout));
    wrong.extend(differs("stderr", &case.stderr, &output.stderr));
    if !wrong.is_empty() {
        panic!(
            "{}: {}\nstdout: {}\nstderr: {}",
            case.name,
            wrong.join("; "),
            excerpt(&output.stdout),
            excerpt(&output.stderr)
        );
    }
}

fn differs(name: &str, expect: &Expect, bytes: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(bytes);
    match expect {
        Expect::Any => None,
        Expect::Is(expected) if expected == bytes => None,
        Expect::Is(expected) => Some(format!("{name} isn't {}", excerpt(expected))),
        Expect::Has(parts) => {
            let missing = parts.iter().find(|part| !text.contains(**part))?;
            Some(format!("{name} has no {missing:?}"))
        }
        Expect::Holds(sentence, holds) => {
            (!holds(&text)).then(|| format!("{name}: it isn't true that {sentence}"))
        }
    }
}

/// The beginning of an output, quoted.
fn excerpt(bytes: &[u8]) -> String {
    let shown = &bytes[..bytes.len().min(2000)];
    let rest = bytes.len() - shown.len();
    let text = String::from_utf8_lossy(shown);
    match rest {
        0 => format!("{text:?}"),
        _ => format!("{text:?} and {rest} bytes more"),
    }
}
