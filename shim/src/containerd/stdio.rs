//! A process's streams as containerd names them: fifos, files, programs that log.
//!
//! ```text
//! /a/fifo           read and written without waiting for whoever is at the other end
//! file:///a/log     appended to
//! binary:///a/prog?key=value   a program that reads stdout at 3, stderr at 4, and closes 5 to begin
//! ```

use std::fs::{self, File};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, bail};
use hull_sandbox::Stdio;
use percent_encoding::percent_decode_str;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, inotify};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What a program that logs may take to end by itself when its streams have.
const LAST_LINES: Duration = Duration::from_secs(10);
/// And when it was asked to.
const GOODBYE: Duration = Duration::from_secs(2);

/// The streams' names; one that is empty is no stream.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Names {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    /// Whether the process has a terminal, whose output is all stdout.
    pub(crate) terminal: bool,
}

/// Streams that are open.
#[derive(Debug)]
pub(crate) struct Open {
    /// What a process is given.
    pub(crate) stdio: Stdio,
    /// What keeps stdin from ending when a client goes.
    pub(crate) keeper: Option<Keeper>,
    /// Who reads the output, if it is a program of ours.
    pub(crate) logger: Option<Logger>,
}

/// Opens the streams of a process of container `id`.
pub(crate) fn open(names: &Names, namespace: &str, id: &str) -> anyhow::Result<Open> {
    let (stdin, keeper) = stdin(&names.stdin)?;
    let (stdout, stderr, logger) = outputs(names, namespace, id)?;
    Ok(Open {
        stdio: Stdio {
            stdin,
            stdout,
            stderr,
            // Of the host's; the guest's own is between it and these.
            terminal: false,
        },
        keeper,
        logger,
    })
}

fn outputs(
    names: &Names,
    namespace: &str,
    id: &str,
) -> anyhow::Result<(OwnedFd, OwnedFd, Option<Logger>)> {
    let stderr = match names.terminal {
        true => "",
        false => names.stderr.as_str(),
    };
    match names.stdout.split_once("://") {
        None => Ok((output(&names.stdout)?, output(stderr)?, None)),
        Some(("file", path)) => {
            let path = decoded(path)?;
            if let Some(directory) = Path::new(&path).parent() {
                fs::create_dir_all(directory)
                    .with_context(|| format!("cannot create \"{}\"", directory.display()))?;
            }
            let file = append(&path)?;
            Ok((file.try_clone()?, file, None))
        }
        Some(("binary", program)) => logger(program, namespace, id),
        Some((scheme, _)) => bail!("unknown STDIO scheme {scheme}"),
    }
}

fn null() -> io::Result<OwnedFd> {
    let null = File::options().read(true).write(true).open("/dev/null");
    null.map(OwnedFd::from)
}

fn open_at(path: &str, flags: OFlags) -> anyhow::Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
        .with_context(|| format!("cannot open \"{path}\""))
}

fn is_fifo(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo())
}

/// A writer of a process's stdin, which so doesn't end until containerd says so, or a client has
/// come and gone before the process could be started.
#[derive(Debug)]
pub(crate) struct Keeper {
    _writer: OwnedFd,
    closings: OwnedFd,
}

impl Keeper {
    fn of(path: &str) -> anyhow::Result<Self> {
        let failed = || format!("cannot watch \"{path}\"");
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let closings = inotify::init(flags).with_context(failed)?;
        inotify::add_watch(&closings, path, inotify::WatchFlags::CLOSE_WRITE)
            .with_context(failed)?;
        Ok(Self {
            // With both ends there, no open waits.
            _writer: open_at(path, OFlags::RDWR)?,
            closings,
        })
    }

    /// Whether a client has closed its end. Containerd's own asks for the end of stdin as soon as
    /// it knows of the task, and never again: one that is done before that is taken at its deed.
    pub(crate) fn client_has_gone(&self) -> bool {
        rustix::io::read(&self.closings, &mut [0_u8; 512]).is_ok_and(|count| count > 0)
    }
}

/// What a process reads.
fn stdin(path: &str) -> anyhow::Result<(OwnedFd, Option<Keeper>)> {
    if path.is_empty() {
        return Ok((null()?, None));
    }
    if !is_fifo(path) {
        return Ok((open_at(path, OFlags::RDONLY)?, None));
    }
    let keeper = Keeper::of(path)?;
    Ok((open_at(path, OFlags::RDONLY)?, Some(keeper)))
}

fn output(path: &str) -> anyhow::Result<OwnedFd> {
    if path.is_empty() {
        return Ok(null()?);
    }
    match is_fifo(path) {
        // With a reader of its own it neither waits for one nor breaks when one goes.
        true => open_at(path, OFlags::RDWR),
        false => append(path),
    }
}

fn append(path: &str) -> anyhow::Result<OwnedFd> {
    open_at(path, OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND)
}

fn decoded(text: &str) -> anyhow::Result<String> {
    let decoded = percent_decode_str(text).decode_utf8();
    Ok(decoded.context("an address is no UTF-8")?.into_owned())
}

/// A program that reads a process's output.
#[derive(Debug)]
pub(crate) struct Logger(Child);

fn logger(
    program: &str,
    namespace: &str,
    id: &str,
) -> anyhow::Result<(OwnedFd, OwnedFd, Option<Logger>)> {
    let (path, query) = program.split_once('?').unwrap_or((program, ""));
    let path = decoded(path)?;
    let (stdout, out) = io::pipe()?;
    let (stderr, err) = io::pipe()?;
    let (ready, begun) = io::pipe()?;
    let mut command = Command::new(&path);
    command
        .args(arguments(query)?)
        .env_clear()
        .env("CONTAINER_ID", id)
        .env("CONTAINER_NAMESPACE", namespace)
        .stdin(null()?)
        .stdout(null()?)
        .stderr(null()?);
    let handed_on = [stdout.as_fd(), stderr.as_fd(), begun.as_fd()];
    let child = hull_sandbox::spawn_in_session(&mut command, &handed_on)
        .with_context(|| format!("cannot run \"{path}\", which is to log"))?;
    drop((stdout, stderr, begun));
    await_beginning(ready).with_context(|| format!("\"{path}\" doesn't begin to log"))?;
    Ok((out.into(), err.into(), Some(Logger(child))))
}

/// Its word, or that it closes the pipe.
fn await_beginning(mut ready: PipeReader) -> io::Result<()> {
    ready.read(&mut [0]).map(drop)
}

/// Each key, and its value if it has one.
fn arguments(query: &str) -> anyhow::Result<Vec<String>> {
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let pair = pair.replace('+', " ");
        let (key, value) = pair.split_once('=').unwrap_or((&pair, ""));
        arguments.push(decoded(key)?);
        arguments.push(decoded(value)?);
    }
    Ok(arguments)
}

impl Logger {
    /// Has it end: it has seen the end of what it reads.
    pub(crate) fn finish(mut self) {
        for (limit, signal) in [(LAST_LINES, Signal::TERM), (GOODBYE, Signal::KILL)] {
            if !self.ends_within(limit) {
                self.signal(signal);
            }
        }
        // Killed at last, if it did not end before.
        let _ = self.0.wait();
    }

    fn pidfd(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).ok()?)?;
        pidfd_open(pid, PidfdFlags::empty()).ok()
    }

    fn ends_within(&self, limit: Duration) -> bool {
        let (Some(process), Ok(limit)) = (self.pidfd(), Timespec::try_from(limit)) else {
            return true;
        };
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut ended, Some(&limit)).is_ok_and(|count| count > 0)
    }

    fn signal(&self, signal: Signal) {
        if let Some(process) = self.pidfd() {
            // One that has just ended needs none.
            let _ = pidfd_send_signal(&process, signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(stdin: &str, stdout: &str) -> Names {
        Names {
            stdin: stdin.to_owned(),
            stdout: stdout.to_owned(),
            ..Names::default()
        }
    }

    #[test]
    fn fifos_wait_for_nobody_and_stdin_ends_when_it_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = |name: &str| {
            let path = directory.path().join(name);
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
            path.to_string_lossy().into_owned()
        };
        let (stdin, stdout) = (fifo("stdin"), fifo("stdout"));
        let open = open(&names(&stdin, &stdout), "ns", "c").unwrap();
        File::from(open.stdio.stdout).write_all(b"kept").unwrap();
        let mut client = File::options().write(true).open(&stdin).unwrap();
        client.write_all(b"in").unwrap();
        let keeper = open.keeper.unwrap();
        assert!(!keeper.client_has_gone());
        drop(client);
        assert!(keeper.client_has_gone());
        let mut reader = File::from(open.stdio.stdin);
        let mut said = [0; 8];
        assert_eq!(reader.read(&mut said).unwrap(), 2);
        drop(keeper);
        assert_eq!(reader.read(&mut said).unwrap(), 0);
    }

    #[test]
    fn a_file_takes_both_outputs_and_keeps_what_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/a log");
        let address = format!("file://{}/new/a%20log", directory.path().display());
        for _ in 0..2 {
            let open = open(&names("", &address), "ns", "c").unwrap();
            File::from(open.stdio.stdout).write_all(b"out ").unwrap();
            File::from(open.stdio.stderr).write_all(b"err ").unwrap();
        }
        assert_eq!(fs::read_to_string(path).unwrap(), "out err out err ");
        assert!(open(&names("", "carrier-pigeon://x"), "ns", "c").is_err());
    }

    #[test]
    fn a_program_reads_what_is_written() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        let words = "cat <&3; cat <&4; echo $CONTAINER_NAMESPACE/$CONTAINER_ID $0";
        let script = format!("exec 5>&- >{}; {words}", log.display());
        let encoded: String = script.bytes().map(|byte| format!("%{byte:02x}")).collect();
        let query = format!("-c={encoded}&name=a+value");
        let address = format!("binary:///bin/sh?{query}");
        let open = open(&names("", &address), "ns", "c1").unwrap();
        File::from(open.stdio.stdout).write_all(b"out\n").unwrap();
        File::from(open.stdio.stderr).write_all(b"err\n").unwrap();
        open.logger.unwrap().finish();
        let text = fs::read_to_string(log).unwrap();
        assert_eq!(text, "out\nerr\nns/c1 name\n");
    }
}
