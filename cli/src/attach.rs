//! `hull attach`: a running container's first process comes to the foreground.

use hull_sandbox::Engine;

use crate::args::AttachArgs;
use crate::failure::{Coded, exit_code};
use crate::foreground::{self, Given};
use crate::relay::End;
use crate::signals::{PIPE, Signals};

/// Relays until the container ends or is left; returns its exit code.
pub(crate) fn attach(engine: &Engine, args: &AttachArgs) -> anyhow::Result<u8> {
    let container = engine.find(&args.name)?;
    let plan = container.plan();
    let given = Given {
        stdin: plan.interactive && !args.no_stdin,
        tty: plan.tty,
    };
    foreground::check_terminal(given)?;
    let mut signals = Signals::catch()?;
    let stream = container.attach(given.stdin)?;
    match foreground::relay_process(stream, given, &args.keys, &mut signals)? {
        End::Exited(status) => Ok(exit_code(status)),
        End::Failed(failure) => Err(Coded::hull(failure.message).into()),
        End::Lost => Ok(container.wait()?.code),
        End::Detached => Ok(0),
        End::Interrupted(signal) => Ok(128 + signal),
        End::OutputClosed => Ok(128 + PIPE),
    }
}
