//! A terminal on the host for a terminal in the guest: its one end goes to the engine over the
//! console socket, the other is the container's stdin, stdout and stderr. Without an engine, the
//! one that this program was started on.

use std::io::{self, IsTerminal};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, bail};
use hull_sandbox::Stdio;
use hull_sandbox::control::send_with_fds;
use rustix::fs::{Mode, OFlags};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// The streams of a process: a new terminal's if it has one, else this program's own.
pub(crate) fn streams(terminal: bool, socket: Option<&Path>) -> anyhow::Result<Stdio> {
    match (terminal, socket) {
        (true, Some(socket)) => {
            Stdio::terminal(make(socket)?).context("cannot duplicate the terminal")
        }
        (true, None) => {
            bail!("cannot allocate tty if hull-oci will detach without setting console socket")
        }
        (false, Some(_)) => {
            bail!("cannot use console socket if hull-oci will not detach or allocate tty")
        }
        (false, None) => Stdio::own(false).context("cannot use the standard streams"),
    }
}

/// Makes a terminal, sends its one end and returns the other.
fn make(socket: &Path) -> anyhow::Result<OwnedFd> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = openpt(flags).context("cannot make a terminal")?;
    grantpt(&master).context("cannot make a terminal")?;
    unlockpt(&master).context("cannot make a terminal")?;
    let name = ptsname(&master, Vec::new()).context("cannot name the terminal")?;
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty())
        .context("cannot open the terminal")?;
    // The guest's own terminal does what terminals do.
    let mut modes = tcgetattr(&slave).context("cannot read the terminal's modes")?;
    modes.make_raw();
    tcsetattr(&slave, OptionalActions::Now, &modes).context("cannot set the terminal's modes")?;
    UnixStream::connect(socket)
        .and_then(|engine| send_with_fds(&engine, name.as_bytes(), &[master.as_fd()]))
        .with_context(|| format!("cannot send the terminal to \"{}\"", socket.display()))?;
    Ok(slave)
}

/// Our terminal, if we have one, in raw mode until dropped.
pub(crate) struct Raw(Option<Termios>);

impl Raw {
    /// Puts it in raw mode: what is typed is for the guest's own terminal.
    pub(crate) fn enter() -> anyhow::Result<Self> {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Ok(Self(None));
        }
        let before = tcgetattr(stdin.as_fd()).context("cannot read the terminal's modes")?;
        let mut modes = before.clone();
        modes.make_raw();
        tcsetattr(stdin.as_fd(), OptionalActions::Drain, &modes)
            .context("cannot put the terminal in raw mode")?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // A terminal that is gone needs no modes.
            let _ = tcsetattr(io::stdin(), OptionalActions::Drain, before);
        }
    }
}
