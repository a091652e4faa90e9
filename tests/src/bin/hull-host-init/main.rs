//! PID 1 of the emulated KVM host, and its keeper on the outer side.
//!
//! Owns: the machine from the kernel's hand-over on. Refuses: to decide anything about QEMU or
//! about callers, which `hull_tests::host` does.
//!
//! ```text
//! outer   supervise ── starts ──► qemu         ends both when idle
//! inner   PID 1: boot, then reap ── starts ──► serve: one thread set per command
//! ```

mod boot;
mod kept;
mod network;
mod serve;
mod session;
mod supervise;
mod sys;

use std::process::ExitCode;

use anyhow::{Result, bail};

fn main() -> ExitCode {
    let outcome = if rustix::process::getpid().as_raw_nonzero().get() == 1 {
        boot::run()
    } else {
        role()
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("hull-host-init: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn role() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.split_first() {
        Some((role, [])) if role == "serve" => serve::run(),
        Some((role, rest)) if role == "supervise" => supervise::run(rest),
        _ => bail!("this is PID 1 of the emulated KVM host; use `cargo xtask host`"),
    }
}
