//! PID 1 of Hull's guests.
//!
//! Owns: starting as the first process of a guest, and running OCI processes for the monitor over
//! vsock. Refuses: to know which virtual machine it is in, threads, and an async runtime.
//!
//! ```text
//! hull-agent                                      as PID 1, from the root of the boot
//! hull-agent --listen-fd N --control-fd N         elsewhere, for tests: inherited sockets
//! ```
#![cfg_attr(not(test), no_main)]
#![cfg_attr(test, allow(dead_code, reason = "the entry is not part of unit tests"))]

mod boot;
mod caps;
mod cgroup;
mod command;
mod connect;
mod container;
mod control;
mod fault;
mod identity;
mod init;
mod log;
mod mounts;
mod namespaces;
mod network;
mod process;
mod processes;
mod reaper;
mod relay;
mod report;
mod resolve;
mod resolver;
mod rootfs;
mod scratch;
mod seccomp;
mod serve;
mod session;
mod spare;
mod spawn;
mod spec;
mod stage;
mod sys;
mod syscalls;
mod tty;
mod user;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Instant;

use hull_proto::{CONTROL_PORT, PROCESS_PORT};
use rustix::mount::MountPropagationFlags;
use rustix::process::DumpableBehavior;
use rustix::system::RebootCommand;
use rustix::thread::UnshareFlags;

use crate::container::Containers;
use crate::control::Control;
use crate::fault::{Fault, Tried};
use crate::log::say;
use crate::serve::Server;

/// Runs the agent. As PID 1 it never returns: its end would be the kernel's panic.
fn start() -> i32 {
    let result = if rustix::process::getpid().is_init() {
        let result = run_guest();
        if let Err(fault) = &result {
            say(fault);
        }
        stop_guest();
        result
    } else {
        run_elsewhere()
    };
    match result {
        Ok(()) => 0,
        Err(fault) => {
            say(fault);
            1
        }
    }
}

fn run_guest() -> Result<(), Fault> {
    let awake = Instant::now();
    let mute = boot::fill_standard_streams();
    let signals = sys::child_signals().or_internal(|| "cannot watch for signals")?;
    let listener = sys::vsock_listen(PROCESS_PORT)
        .or_internal(|| format!("cannot listen on vsock port {PROCESS_PORT}"))?;
    let stream = sys::vsock_dial_host(CONTROL_PORT)
        .or_internal(|| format!("cannot dial the host's vsock port {CONTROL_PORT}"))?;
    let mut control = Control::open(stream, true, awake)?;
    if let Err(flaw) = boot::furnish(mute) {
        say(&flaw);
        control.set_flaw(flaw);
    }
    hide_memory();
    let containers = Containers::new(Some(PathBuf::from(boot::CGROUPS)));
    Server::new(signals, listener, control, containers).run()
}

/// Keeps processes that are about to join a container from being looked into by those in it.
fn hide_memory() {
    let _ = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Makes everything durable and resets the machine, which the monitor sees.
fn stop_guest() {
    rustix::fs::sync();
    let _ = rustix::system::reboot(RebootCommand::Restart);
    // There is no other way out, and none from here.
    loop {
        let _ = sys::wait_signal();
    }
}

fn run_elsewhere() -> Result<(), Fault> {
    let awake = Instant::now();
    let (listener, stream) = inherited_sockets()?;
    let signals = sys::child_signals().or_internal(|| "cannot watch for signals")?;
    sys::unshare(UnshareFlags::NEWNS).or_refuse(|| "cannot make a mount namespace")?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change(c"/", private).or_refuse(|| "cannot make mounts private")?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
        .or_internal(|| "cannot adopt orphans")?;
    let control = Control::open(stream, false, awake)?;
    hide_memory();
    let containers = Containers::new(boot::find_cgroups().map(PathBuf::from));
    let mut server = Server::new(signals, listener, control, containers);
    let result = server.run();
    server.end_all();
    result
}

fn inherited_sockets() -> Result<(OwnedFd, OwnedFd), Fault> {
    let usage = || Fault::refused("usage: hull-agent --listen-fd N --control-fd N");
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let socket = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        sys::inherited(arguments.get(at + 1)?.parse().ok()?).ok()
    };
    let listener = socket("--listen-fd").ok_or_else(usage)?;
    let stream = socket("--control-fd").ok_or_else(usage)?;
    Ok((listener, stream))
}
