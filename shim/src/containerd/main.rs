//! `containerd-shim-hull-v2`: Hull behind containerd's runtime v2 interface.
//!
//! ```text
//! containerd ── start ──► this program ──► itself, listening: the shim, one per container or pod
//!            ══ ttrpc: containerd.task.v2 and v3, sandbox.v1 ══► the shim ──► the engine
//!            ◄═ ttrpc: events ═══════════════════════════════════╡
//!            ── delete ─► this program, when the shim is gone
//! ```
//!
//! Owns: containerd's calls, events, streams and mounts. Refuses: VMs, which monitors hold; a
//! container outlives its shim until `delete`.

#![forbid(unsafe_code)]

mod args;
mod bootstrap;
mod cleanup;
mod events;
mod fault;
mod logging;
mod metrics;
mod pod;
mod process;
mod rootfs;
mod sandbox;
mod sandbox_service;
mod serve;
mod service;
mod stdio;
mod task;

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{Message, MessageField};
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use hull_sandbox::{Engine, Settings};

use crate::args::{Action, Flags};

/// What containerd's users call this runtime.
const RUNTIME: &str = "io.containerd.hull.v2";

fn main() -> ExitCode {
    let flags = match Flags::try_parse_from(args::as_go_has_them(std::env::args_os())) {
        Ok(flags) => flags,
        Err(error) => {
            // Nothing more can be done about a stream that doesn't work.
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match dispatch(&flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::error!("{error:#}");
            let _ = writeln!(stderr(), "containerd-shim-hull-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(flags: &Flags) -> anyhow::Result<()> {
    if flags.version {
        let version = env!("CARGO_PKG_VERSION");
        writeln!(stdout(), "containerd-shim-hull-v2:\n  Version:  {version}")?;
        return Ok(());
    }
    if flags.info {
        stdout().write_all(&info()?.write_to_bytes()?)?;
        return Ok(());
    }
    anyhow::ensure!(
        !flags.namespace.is_empty(),
        "shim namespace cannot be empty"
    );
    match flags.action {
        Some(Action::Start) => bootstrap::start(flags),
        Some(Action::Delete) => cleanup::delete(flags),
        None => serve::serve(flags),
    }
}

/// What containerd asks before there is any container (`-info`).
fn info() -> anyhow::Result<RuntimeInfo> {
    Ok(RuntimeInfo {
        name: RUNTIME.to_owned(),
        version: MessageField::some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..RuntimeVersion::default()
        }),
        features: MessageField::some(Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/features/Features"
                .to_owned(),
            value: serde_json::to_vec(&hull_shim::features::features())?,
            ..Any::default()
        }),
        ..RuntimeInfo::default()
    })
}

/// The engine whose containers are those of one of containerd's namespaces.
fn engine(namespace: &str) -> anyhow::Result<Engine> {
    let settings = Settings::load()?;
    let mut root: PathBuf = settings.run_dir.with_file_name("hull-containerd");
    root.push(namespace);
    Ok(Engine::at(settings, &root))
}
