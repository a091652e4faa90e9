//! `hull install` and `hull uninstall`: makes Hull known to the container engines of this host.
//!
//! Owns: finding the engines, writing their files so that nothing else in them changes, and
//! saying what was done and what is to be restarted. Refuses: to touch a file that it can't
//! understand, or an entry that it wouldn't have written.

mod containerd;
mod docker;
mod file;
mod podman;
#[cfg(test)]
mod tests;

use std::env;
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::args::{EnginesArgs, InstallArgs};

use file::Change;

/// The name by which engines know the runtime.
const NAME: &str = "hull";

/// The runtime's type, which containerd makes the shim's file name of.
const RUNTIME_TYPE: &str = "io.containerd.hull.v2";

/// Where a service's programs are looked for.
const SERVICE_PATH: [&str; 6] = [
    "/usr/local/sbin",
    "/usr/local/bin",
    "/usr/sbin",
    "/usr/bin",
    "/sbin",
    "/bin",
];

/// Beside a container's memory limit, a pod is charged for 48 MiB that the guest's kernel and agent
/// get, 5 MiB of the monitor's and the shim's own.
const RUNTIME_CLASS: &str = "\
apiVersion: node.k8s.io/v1
kind: RuntimeClass
metadata:
  name: hull
handler: hull
overhead:
  podFixed:
    cpu: 10m
    memory: 64Mi
";

/// What is done about each engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// The runtime is to be known.
    Known,
    /// It is to be forgotten.
    Forgotten,
}

/// Where things are.
#[derive(Debug)]
struct Host {
    /// What all paths of engines begin with.
    root: PathBuf,
    /// Hull's programs' directory, as engines will see it.
    programs: PathBuf,
    /// Whether containerd's shim is there.
    has_shim: bool,
}

impl Host {
    /// An absolute path on this host.
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// Whether a program is installed.
    fn has_program(&self, name: &str) -> bool {
        let there = |directory: &str| self.at(directory).join(name).exists();
        SERVICE_PATH.into_iter().any(there)
    }

    fn program(&self, name: &str) -> String {
        self.programs.join(name).display().to_string()
    }

    fn shim(&self) -> String {
        self.program("containerd-shim-hull-v2")
    }
}

/// An engine's part: what is to become of its file, or why nothing is.
type Planned = anyhow::Result<Option<Change>>;

/// An engine, and what it takes to have it notice.
struct Engine {
    name: &'static str,
    plan: fn(&Host, Wish) -> Planned,
    notice: &'static str,
}

const ENGINES: [Engine; 3] = [
    Engine {
        name: "containerd",
        plan: containerd::plan,
        notice: "systemctl restart containerd",
    },
    Engine {
        name: "Docker",
        plan: docker::plan,
        notice: "systemctl reload docker",
    },
    Engine {
        name: "podman and buildah",
        plan: podman::plan,
        notice: "",
    },
];

/// Registers Hull with every engine that there is; 1 if one of them failed.
pub(crate) fn install(args: &InstallArgs) -> anyhow::Result<u8> {
    if args.runtime_class {
        stdout().write_all(RUNTIME_CLASS.as_bytes())?;
        return Ok(0);
    }
    register(&args.engines, Wish::Known)
}

/// Takes Hull out of every engine's configuration.
pub(crate) fn uninstall(args: &EnginesArgs) -> anyhow::Result<u8> {
    register(args, Wish::Forgotten)
}

fn register(args: &EnginesArgs, wish: Wish) -> anyhow::Result<u8> {
    let own = env::current_exe().context("cannot tell where the running executable lies")?;
    let programs = own.parent().unwrap_or(Path::new("/")).to_path_buf();
    let host = Host {
        has_shim: programs.join("containerd-shim-hull-v2").exists(),
        root: args.root.clone(),
        programs,
    };
    let (report, failed) = carry_out(&host, wish, args.dry_run);
    stdout().write_all(report.as_bytes())?;
    Ok(u8::from(failed))
}

/// Does it; returns what there is to say, and whether anything failed.
fn carry_out(host: &Host, wish: Wish, dry_run: bool) -> (String, bool) {
    let (mut report, mut failed) = (String::new(), false);
    for engine in &ENGINES {
        let done = (engine.plan)(host, wish).and_then(|change| {
            let Some(change) = change else {
                return Ok("not found".to_owned());
            };
            if !change.is_one() {
                return Ok(format!("\"{}\" is as it should be", change.path.display()));
            }
            if !dry_run {
                change.write()?;
            }
            let verb = if dry_run { "would write" } else { "wrote" };
            let notice = match engine.notice {
                "" => "nothing to restart".to_owned(),
                command => format!("then: {command}"),
            };
            Ok(format!("{verb} \"{}\"; {notice}", change.path.display()))
        });
        let words = done.unwrap_or_else(|error| {
            failed = true;
            format!("nothing done: {error:#}")
        });
        report.push_str(&format!("{}: {words}\n", engine.name));
    }
    if wish == Wish::Known {
        report.push_str("Kubernetes: hull install --runtime-class | kubectl apply -f -\n");
    }
    (report, failed)
}
