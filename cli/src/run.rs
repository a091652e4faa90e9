//! `hull run` and `hull start`: a container runs, in the foreground or not.

use std::fs::{self, File};
use std::io::{self, ErrorKind, PipeReader, Write, stdout};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use hull_sandbox::{CODE_HULL_FAILED, Container, Engine, EngineError, ProcessStream, Root};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::args::{DetachKeys, RunArgs, StartArgs};
use crate::checkpoint::create_from;
use crate::containers::each;
use crate::failure::{Coded, exit_code};
use crate::foreground::{self, Given};
use crate::images;
use crate::relay::End;
use crate::request::{environment, run_request};
use crate::signals::{PIPE, Signals};

/// Runs a container and returns its command's exit code.
pub(crate) fn run(engine: &Engine, args: &RunArgs) -> anyhow::Result<u8> {
    if !args.publish.is_empty() {
        bail!(
            "-p is refused: hull makes no networks, so a published port would never answer; \
             publish it where the namespace of --network ns:PATH is made"
        );
    }
    let id_file = args.cidfile.as_deref().map(IdFile::create).transpose()?;
    let (container, given) = match &args.from {
        None => {
            let given = Given {
                stdin: args.interactive && !args.detach,
                tty: args.tty,
            };
            foreground::check_terminal(given)?;
            (create(engine, args, given)?, given)
        }
        Some(checkpoint) => {
            let container = create_from(engine, args, checkpoint)?;
            let given = Given {
                stdin: container.plan().interactive && !args.detach,
                tty: container.plan().tty,
            };
            if let Err(error) = foreground::check_terminal(given) {
                // It was made to learn what it is.
                let _ = container.remove(true);
                return Err(error.into());
            }
            (container, given)
        }
    };
    if let Some(id_file) = id_file {
        id_file.keep(container.id())?;
    }
    if args.detach {
        start_detached(container)
    } else {
        run_foreground(engine, container, &args.keys, given, Unwanted::Removed)
    }
}

/// What becomes of a container when its start is interrupted.
#[derive(Debug, Clone, Copy)]
enum Unwanted {
    /// It was made for this start.
    Removed,
    /// It was there before.
    Stopped,
}

/// `hull start`: a container that has ended, or was never started, runs (again).
pub(crate) fn start_again(engine: &Engine, args: &StartArgs) -> anyhow::Result<u8> {
    if !args.attach && !args.interactive {
        return each(&args.containers.names, |name| {
            match engine.find(name)?.start(false) {
                // As wanted, then.
                Ok(_) | Err(EngineError::IsRunning(_)) => Ok(Some(name.to_owned())),
                Err(error) => Err(error.into()),
            }
        });
    }
    let [name] = args.containers.names.as_slice() else {
        bail!("you cannot start and attach multiple containers at once");
    };
    let container = engine.find(name)?;
    let given = Given {
        stdin: args.interactive && container.plan().interactive,
        tty: container.plan().tty,
    };
    foreground::check_terminal(given)?;
    run_foreground(engine, container, &args.keys, given, Unwanted::Stopped)
}

fn create(engine: &Engine, args: &RunArgs, given: Given) -> anyhow::Result<Container> {
    // What is wrong with the request is said before anything is fetched for it.
    let env = environment(&args.process)?;
    let store = images::store(engine)?;
    let (image, _hold) = images::for_run(engine, &store, args)?;
    let mut request = run_request(args, env, Root::Image(image));
    request.terminal_size = foreground::terminal_size(given);
    Ok(engine.create(&request)?)
}

fn start_detached(mut container: Container) -> anyhow::Result<u8> {
    container.start(false)?;
    tell_notice(&container);
    writeln!(stdout(), "{}", container.id())?;
    Ok(0)
}

fn run_foreground(
    engine: &Engine,
    mut container: Container,
    keys: &DetachKeys,
    given: Given,
    unwanted: Unwanted,
) -> anyhow::Result<u8> {
    let auto_remove = container.plan().auto_remove;
    let mut signals = Signals::catch().context("cannot catch signals")?;
    let stream = match start(engine, &mut container, &mut signals, unwanted)? {
        Started::Running(stream) => stream,
        Started::Interrupted(signal) => return Ok(128 + signal),
    };
    match foreground::relay_process(stream, given, keys, &mut signals)? {
        // Said last: by now its record is complete, or it is gone.
        End::Exited(status) => Ok(exit_code(status)),
        End::Failed(failure) => Err(Coded {
            code: hull_sandbox::FailureClass::from(failure.kind).run_code(),
            message: failure.message,
        }
        .into()),
        End::Lost => lost(container, auto_remove),
        End::Detached => Ok(0),
        End::Interrupted(signal) => Ok(128 + signal),
        End::OutputClosed => {
            if auto_remove {
                // Nobody can see it or find it again: it ends as its output has. One that ended
                // by itself is gone already.
                let _ = container.remove(true);
            }
            Ok(128 + PIPE)
        }
    }
}

/// The stream ended without the command's end: the machine did, or its monitor.
fn lost(container: Container, auto_remove: bool) -> anyhow::Result<u8> {
    let name = container.name().to_owned();
    let record = container.wait();
    if auto_remove {
        // A monitor that was killed could not do it; one that did left nothing to do.
        let _ = container.remove(true);
    }
    let (code, why) = match record {
        Ok(record) => match record.error {
            Some(why) => (record.code, why),
            // It ended well; only the stream broke.
            None => return Ok(record.code),
        },
        Err(_) if auto_remove => (
            CODE_HULL_FAILED,
            "the virtual machine ended before its command".to_owned(),
        ),
        Err(error) => return Err(error.into()),
    };
    let message = format!("container {name} was lost: {why}");
    Err(Coded { code, message }.into())
}

#[derive(Debug)]
enum Started {
    Running(ProcessStream),
    Interrupted(u8),
}

/// Starts the container; a signal that asks us to end ends it too.
fn start(
    engine: &Engine,
    container: &mut Container,
    signals: &mut Signals,
    unwanted: Unwanted,
) -> anyhow::Result<Started> {
    let id = container.id().to_owned();
    let (done_seen, done) = io::pipe().context("cannot make a pipe")?;
    let (result, interrupted) = std::thread::scope(|scope| {
        let take_away = || take_away(engine, &id, unwanted);
        let watching = scope.spawn(move || watch(take_away, signals, &done_seen));
        let result = container.start(true);
        drop(done);
        (result, watching.join().unwrap_or(None))
    });
    match (result, interrupted) {
        (_, Some(signal)) => {
            take_away(engine, &id, unwanted);
            Ok(Started::Interrupted(signal))
        }
        (Ok(Some(stream)), None) => {
            tell_notice(container);
            Ok(Started::Running(stream))
        }
        (Ok(None), None) => Err(EngineError::NotRunning(id).into()),
        (Err(error), None) => Err(error.into()),
    }
}

/// What the start had to do without.
fn tell_notice(container: &Container) {
    if let Some(notice) = container.notice() {
        // Nothing more can be done about a stderr that doesn't work.
        let _ = writeln!(io::stderr(), "hull: {notice}");
    }
}

/// Waits until the start is done. A signal that asks us to end takes the container away, which
/// ends the start; other signals are kept.
fn watch(take_away: impl Fn(), signals: &mut Signals, done: &PipeReader) -> Option<u8> {
    let mut interrupted = None;
    loop {
        let mut fds = vec![PollFd::new(done, PollFlags::IN)];
        if interrupted.is_none() {
            fds.push(PollFd::new(&*signals, PollFlags::IN));
        }
        let again = interrupted.map(|_| TRY_AGAIN);
        match poll(&mut fds, again.as_ref()) {
            Err(Errno::INTR) => continue,
            Err(_) => return interrupted,
            Ok(_) if !fds[0].revents().is_empty() => return interrupted,
            Ok(_) => {}
        }
        if interrupted.is_some() {
            take_away();
            continue;
        }
        for signal in signals.take() {
            match Signals::ends(signal) {
                true => interrupted = Some(signal),
                false => signals.keep(signal),
            }
        }
    }
}

/// How long a monitor that can't be reached yet is given: its socket is among its first acts.
const TRY_AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};

/// Ends a container whose start is not wanted any more. Until its monitor can be reached this
/// fails; it is tried again, last when the start is done.
fn take_away(engine: &Engine, id: &str, unwanted: Unwanted) {
    let _ = engine.find(id).and_then(|container| match unwanted {
        Unwanted::Removed => container.remove(true),
        Unwanted::Stopped => container.stop(None, Some(Duration::ZERO)),
    });
}

/// `--cidfile`: made before the container so that two runs can't have the same.
#[derive(Debug)]
struct IdFile<'a> {
    path: &'a Path,
    file: File,
    kept: bool,
}

impl<'a> IdFile<'a> {
    fn create(path: &'a Path) -> anyhow::Result<Self> {
        let file = File::create_new(path).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => anyhow!(
                "container ID file found, make sure the other container isn't running or delete {}",
                path.display()
            ),
            _ => anyhow::Error::from(error).context(format!(
                "cannot create container ID file {}",
                path.display()
            )),
        })?;
        Ok(Self {
            path,
            file,
            kept: false,
        })
    }

    fn keep(mut self, id: &str) -> anyhow::Result<()> {
        self.file
            .write_all(id.as_bytes())
            .with_context(|| format!("cannot write container ID file {}", self.path.display()))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for IdFile<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // There is no container; an empty file would stand in the next run's way.
            let _ = fs::remove_file(self.path);
        }
    }
}
