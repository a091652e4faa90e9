//! `exec`: another process in a container, carried by this process or, detached, by one of its
//! own whose end is the process's.
//!
//! ```text
//! exec --detach ── spawns itself, --report-to /proc/PID/fd/N ──► carrier
//!               ◄── "started" or why not ─────────────────── carrier
//!               ── pid file, exit                                carrier: streams, exit code
//! ```

use std::env;
use std::fs;
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{self, Child};

use anyhow::{Context, bail};
use hull_proto::{ExitStatus, Frame};
use hull_sandbox::{
    Changes, Container, Engine, FailureClass, Phase, ProcessStream, Status, Stdio, carry,
};
use oci_spec::runtime::{LinuxCapabilities, Process, UserBuilder};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::args::ExecArgs;
use crate::console::Raw;
use crate::{console, create, manage};

/// What a carrier says of a process that runs.
const STARTED: &str = "started";

/// Longest word of a carrier's, in bytes: what a pipe takes whole (pipe(7)).
const MAX_WORD: usize = 4096;

/// Runs the process; unless detached, returns its code.
pub(crate) fn exec(engine: &Engine, args: &ExecArgs) -> anyhow::Result<u8> {
    if args.preserve_fds > 0 {
        bail!("--preserve-fds is refused: descriptors can't be handed to a virtual machine");
    }
    let container = manage::find(engine, &args.id)?;
    match container.status()? {
        Status::Running(running) if running.phase == Phase::Running => {}
        Status::Running(running) if running.phase == Phase::Paused => {
            bail!("cannot exec in a paused container");
        }
        Status::Running(_) => bail!("cannot exec in a container that is not started"),
        _ => bail!("cannot exec in a stopped container"),
    }
    if args.detach && args.report_to.is_none() {
        return detach(args);
    }
    let begun = begin(&container, args);
    if let Some(path) = &args.report_to {
        let word = match &begun {
            Ok(_) => STARTED.to_owned(),
            Err(error) => format!("{error:#}"),
        };
        // In one write, which the pipe takes whole.
        fs::write(path, &word.as_bytes()[..word.len().min(MAX_WORD)])
            .context("cannot report how the start went")?;
    }
    attend(begun?)
}

/// Starts a carrier and waits for its word.
fn detach(args: &ExecArgs) -> anyhow::Result<u8> {
    let (heard, said) = io::pipe().context("cannot make a pipe")?;
    let this = env::current_exe().context("cannot tell where the running executable lies")?;
    let report = format!("/proc/{}/fd/{}", process::id(), said.as_raw_fd());
    let mut words: Vec<_> = env::args_os().skip(1).collect();
    let place = words.iter().position(|word| word == "exec");
    let place = place.context("exec is not among the arguments")?;
    words.splice(
        place..=place,
        ["exec".into(), "--report-to".into(), report.into()],
    );
    let mut carrier = process::Command::new(this)
        .args(words)
        .spawn()
        .context("cannot start a process that carries the streams")?;
    if let Some(path) = &args.pid_file {
        create::write_pid(path, carrier.id())?;
    }
    match hear(heard, &carrier)?.trim_end() {
        STARTED => Ok(0),
        "" => bail!(
            "the process that carries the streams ended with {}",
            carrier.wait()?
        ),
        why => bail!(why.to_owned()),
    }
}

/// The carrier's word, or nothing if it dies first.
fn hear(mut heard: PipeReader, carrier: &Child) -> anyhow::Result<String> {
    let pid = i32::try_from(carrier.id()).ok().and_then(Pid::from_raw);
    let ended = pidfd_open(pid.context("the carrier has no id")?, PidfdFlags::empty())?;
    let mut fds = [
        PollFd::new(&heard, PollFlags::IN),
        PollFd::new(&ended, PollFlags::IN),
    ];
    while let Err(Errno::INTR) = poll(&mut fds, None) {}
    let mut word = vec![0; MAX_WORD];
    let count = match fds[0].revents().is_empty() {
        true => 0,
        false => heard.read(&mut word)?,
    };
    Ok(String::from_utf8_lossy(&word[..count]).into_owned())
}

/// A process that runs, and who carries it.
struct Begun {
    stream: ProcessStream,
    stdio: Stdio,
    changes: Option<Changes>,
    raw: Option<Raw>,
}

fn begin(container: &Container, args: &ExecArgs) -> anyhow::Result<Begun> {
    let process = oci_process(container, args)?;
    let terminal = process.terminal().unwrap_or(false);
    if args.report_to.is_some() {
        // It fails only for a leader of a session, who needs no other.
        let _ = rustix::process::setsid();
    }
    let foreground = terminal && args.console_socket.is_none() && args.report_to.is_none();
    let stdio = match foreground {
        true => Stdio::own(true).context("cannot use the standard streams")?,
        false => console::streams(terminal, args.console_socket.as_deref())?,
    };
    let changes = terminal.then(|| Changes::of(stdio.stdin.as_fd()));
    let changes = changes.transpose().context("cannot watch the terminal")?;
    let raw = foreground.then(Raw::enter).transpose()?;
    let mut stream = container.exec_oci(&process)?;
    match stream.receive()? {
        Some(Frame::Started { .. }) => Ok(Begun {
            stream,
            stdio,
            changes,
            raw,
        }),
        Some(Frame::Failed(failure)) => bail!("exec failed: {}", failure.message),
        _ => bail!("the container ended before the process began"),
    }
}

fn attend(begun: Begun) -> anyhow::Result<u8> {
    let end = carry(begun.stream, begun.stdio, begun.changes);
    drop(begun.raw);
    match end? {
        Some(Frame::Exited(status)) => Ok(code(status)),
        Some(Frame::Failed(failure)) => Ok(FailureClass::from(failure.kind).exec_code()),
        // It was killed with its container.
        _ => Ok(128 + 9),
    }
}

fn code(status: ExitStatus) -> u8 {
    u8::try_from(status.code()).unwrap_or(u8::MAX)
}

fn oci_process(container: &Container, args: &ExecArgs) -> anyhow::Result<Process> {
    if let Some(path) = &args.process {
        let text = fs::read(path).with_context(|| format!("cannot read \"{}\"", path.display()))?;
        return serde_json::from_slice(&text)
            .with_context(|| format!("\"{}\" describes no process", path.display()));
    }
    if args.command.is_empty() {
        bail!("process args cannot be empty");
    }
    let mut process = container.plan().read_process()?;
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(args.env.iter().cloned());
    process
        .set_args(Some(args.command.clone()))
        .set_env(Some(env))
        .set_terminal(Some(args.tty))
        .set_console_size(None);
    if let Some(directory) = &args.cwd {
        process.set_cwd(directory.clone());
    }
    if args.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    if let Some(user) = &args.user {
        process.set_user(self::user(user, &args.additional_gids)?);
    }
    if !args.cap.is_empty() {
        let capabilities = process.capabilities().clone().unwrap_or_default();
        process.set_capabilities(Some(with(&capabilities, &args.cap)?));
    }
    Ok(process)
}

fn user(asked: &str, groups: &[u32]) -> anyhow::Result<oci_spec::runtime::User> {
    let (uid, gid) = asked.split_once(':').unwrap_or((asked, "0"));
    let number = |text: &str| {
        text.parse::<u32>()
            .with_context(|| format!("user {asked:?} is no UID[:GID]"))
    };
    Ok(UserBuilder::default()
        .uid(number(uid)?)
        .gid(number(gid)?)
        .additional_gids(groups.to_vec())
        .build()?)
}

fn with(known: &LinuxCapabilities, added: &[String]) -> anyhow::Result<LinuxCapabilities> {
    let mut value = serde_json::to_value(known)?;
    for set in ["bounding", "effective", "permitted"] {
        let mut names: Vec<String> = serde_json::from_value(value[set].take()).unwrap_or_default();
        names.extend(added.iter().cloned());
        value[set] = serde_json::to_value(names)?;
    }
    serde_json::from_value(value).context("no such capability")
}
