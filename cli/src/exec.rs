//! `hull exec`: one more process in a container that runs.

use hull_sandbox::{Engine, FailureClass};

use crate::args::ExecArgs;
use crate::failure::Coded;
use crate::foreground::{self, Given};
use crate::relay::End;
use crate::request::exec_request;
use crate::signals::{PIPE, Signals};

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
    let mut signals = Signals::catch()?;
    let stream = container.exec(&request)?;
    match foreground::relay_process(stream, given, &args.keys, &mut signals)? {
        End::Exited(status) => Ok(u8::try_from(status.code()).unwrap_or(u8::MAX)),
        End::Failed(failure) => {
            Err(Coded::exec(FailureClass::from(failure.kind), failure.message).into())
        }
        End::Lost => Err(Coded::hull(format!(
            "container {name} went away before the command ended"
        ))
        .into()),
        End::Detached => Ok(0),
        End::Interrupted(signal) => Ok(128 + signal),
        End::OutputClosed => Ok(128 + PIPE),
    }
}
