//! The minimal init of `--init`: process 1 of a container, in front of its command. Without a
//! command it is the whole container: what holds a sandbox for others.
//!
//! Owns: forwarding every signal to the command, reaping orphans, ending as the command did, or
//! when it is told to. Refuses: files, memory and everything else.

use rustix::io::Errno;
use rustix::process::{Pid, WaitOptions};

use crate::fault::{Fault, Tried};
use crate::sys::{self, Forked};

/// Splits in two: returns in the new process, which becomes the command; the old one stays as
/// its init and never returns.
///
/// # Errors
/// If no process can be made.
pub(crate) fn split(terminal: bool) -> Result<(), Fault> {
    match sys::fork(0, None).or_refuse(|| "cannot make the process under init")? {
        Forked::Child => {
            if terminal {
                // A group of its own in the foreground: a terminal's signals then don't reach it
                // twice. SIGTTOU is still blocked, so a background group may do this.
                let own = rustix::process::getpid();
                let _ = rustix::process::setpgid(None, None);
                let _ = rustix::termios::tcsetpgrp(rustix::stdio::stdin(), own);
            }
            Ok(())
        }
        Forked::Parent(child, pidfd) => {
            std::mem::forget(pidfd);
            let _ = sys::close_all_but(&[]);
            run(child)
        }
    }
}

/// Is the init of no command: reaps what is left to it until it is told to end. Never returns.
pub(crate) fn wait_to_end() -> ! {
    let _ = sys::close_all_but(&[]);
    loop {
        match sys::wait_signal() {
            Ok(libc::SIGCHLD) => {
                reap(None);
            }
            Ok(libc::SIGTERM | libc::SIGINT) => sys::leave(0),
            Ok(_) | Err(_) => {}
        }
    }
}

fn run(child: Pid) -> ! {
    loop {
        match sys::wait_signal() {
            Ok(libc::SIGCHLD) => {
                if let Some(code) = reap(Some(child)) {
                    sys::leave(code);
                }
            }
            Ok(signal) => {
                let _ = sys::kill(child.as_raw_nonzero().get(), signal);
            }
            Err(_) => {}
        }
    }
}

/// Reaps all that ended; the command's code if it was among them.
fn reap(child: Option<Pid>) -> Option<i32> {
    let mut code = None;
    loop {
        match rustix::process::wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if Some(pid) == child => {
                let signal = || {
                    status
                        .terminating_signal()
                        .map_or(255, |signal| 128 + signal)
                };
                code = Some(status.exit_status().unwrap_or_else(signal));
            }
            Ok(Some(_)) | Err(Errno::INTR) => {}
            Ok(None) | Err(_) => return code,
        }
    }
}
