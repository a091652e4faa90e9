//! `hull exec`: one more process in a container that runs.
//!
//! A process lives as long as its stream. A detached one's is held by a process of ours that
//! does nothing else ([`hold`]), in a session of its own.

use std::env;
use std::io::{Read, stdin};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};

use anyhow::Context;
use hull_proto::Frame;
use hull_sandbox::{Container, Engine, FailureClass, ProcessStream};

use crate::args::ExecArgs;
use crate::failure::{Coded, exit_code};
use crate::foreground::{self, Given};
use crate::relay::End;
use crate::request::exec_request;
use crate::signals::{KILL, PIPE, Signals};

/// Runs the process and returns its exit code.
pub(crate) fn exec(engine: &Engine, args: &ExecArgs) -> anyhow::Result<u8> {
    let given = Given {
        stdin: args.interactive && !args.detach,
        tty: args.tty,
    };
    foreground::check_terminal(given)?;
    let Some(name) = args.name_and_command.first() else {
        return Err(Coded::hull("a container is required").into());
    };
    let container = engine.find(name)?;
    let mut request = exec_request(args)?;
    request.terminal_size = foreground::terminal_size(given);
    let stream = container.exec(&request)?;
    if args.detach {
        return detach(stream);
    }
    let mut signals = Signals::catch().context("cannot catch signals")?;
    match foreground::relay_process(stream, given, &args.keys, &mut signals)? {
        End::Exited(status) => Ok(exit_code(status)),
        End::Failed(failure) => {
            Err(Coded::exec(FailureClass::from(failure.kind), failure.message).into())
        }
        End::Lost => lost(&container),
        End::Detached => Ok(0),
        End::Interrupted(signal) => Ok(128 + signal),
        End::OutputClosed => Ok(128 + PIPE),
    }
}

/// The stream ended before the command did, as its container does then: all of a container's
/// processes are killed with its first.
fn lost(container: &Container) -> anyhow::Result<u8> {
    let killed = Ok(128 + KILL);
    match container.wait() {
        Ok(record) => match record.error {
            None => killed,
            Some(why) => {
                let message = format!("container {} was lost: {why}", container.name());
                Err(Coded::hull(message).into())
            }
        },
        // Its record went with it.
        Err(_) if container.plan().auto_remove => killed,
        Err(error) => Err(error.into()),
    }
}

/// Leaves a process running that has started.
fn detach(mut stream: ProcessStream) -> anyhow::Result<u8> {
    stream.send(&Frame::StdinEof)?;
    match stream.receive()? {
        Some(Frame::Started { .. }) => {}
        Some(Frame::Failed(failure)) => {
            return Err(Coded::exec(FailureClass::from(failure.kind), failure.message).into());
        }
        _ => return Err(Coded::hull("the container went away before the command began").into()),
    }
    let (socket, _) = stream.into_parts();
    let this = env::current_exe().context("cannot tell where the running executable lies")?;
    Command::new(this)
        .arg(HOLD)
        .current_dir("/")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("cannot leave the command in the background")?;
    Ok(0)
}

/// The word by which this program is asked to [`hold`].
pub(crate) const HOLD: &str = "hold-stream";

/// Holds the process stream that is our stdin until it ends. What the process writes is nobody's.
pub(crate) fn hold() -> anyhow::Result<u8> {
    // It fails only for a leader of a session, who needs no other.
    let _ = rustix::process::setsid();
    let mut chunk = vec![0; 64 * 1024];
    let mut stream = stdin().lock();
    while stream
        .read(&mut chunk)
        .context("the process stream failed")?
        > 0
    {}
    Ok(0)
}
