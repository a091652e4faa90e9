//! A case in the flags of `hull run`.

#![expect(
    clippy::expect_used,
    reason = "what a fixture can't have ends its test"
)]

use std::fs;
use std::path::Path;

use super::Adapter;
use crate::cases::{Case, Setup};
use crate::hull::Hull;
use crate::process::Process;

/// Cases on a [`Hull`].
#[derive(Debug)]
pub struct HullAdapter<'a> {
    hull: &'a Hull,
}

impl<'a> HullAdapter<'a> {
    /// An adapter to this Hull, with its images loaded.
    #[must_use]
    pub fn new(hull: &'a Hull) -> Self {
        hull.image();
        Self { hull }
    }
}

impl Adapter for HullAdapter<'_> {
    fn is_control(&self) -> bool {
        false
    }

    fn process(&self, case: &Case, scratch: &Path) -> Process {
        let mut words: Vec<String> = vec!["run".into(), "--rm".into()];
        if case.is_interactive() {
            words.push("-i".into());
        }
        if case.tty.is_some() {
            words.push("-t".into());
        }
        let mut flag = |name: &str, value: &dyn ToString| {
            words.push(format!("--{name}"));
            words.push(value.to_string());
        };
        process(&case.setup, scratch, &mut flag);
        shares(&case.setup, scratch, &mut flag);
        limits(&case.setup, &mut flag);
        let switches = [
            (case.setup.read_only, "--read-only"),
            (case.setup.init, "--init"),
            (
                case.setup.no_new_privileges,
                "--security-opt=no-new-privileges",
            ),
        ];
        for (is_on, switch) in switches {
            if is_on {
                words.push(switch.to_owned());
            }
        }
        words.push(case.image.to_owned());
        words.extend(case.command.iter().cloned());
        self.hull.cmd(&words)
    }
}

type Flag<'a> = dyn FnMut(&str, &dyn ToString) + 'a;

fn process(setup: &Setup, scratch: &Path, flag: &mut Flag<'_>) {
    if let Some(text) = setup.env_file {
        let file = scratch.join("env-file");
        fs::write(&file, text).expect("write a file of variables");
        flag("env-file", &file.display());
    }
    for (name, value) in &setup.env {
        match value {
            Some(value) => flag("env", &format!("{name}={value}")),
            None => flag("env", name),
        }
    }
    if let Some(program) = setup.entrypoint {
        flag("entrypoint", &program);
    }
    if !setup.user.asked.is_empty() {
        flag("user", &setup.user.asked);
    }
    for group in &setup.groups {
        flag("group-add", group);
    }
    if let Some(directory) = setup.cwd {
        flag("workdir", &directory);
    }
    if let Some(name) = setup.hostname {
        flag("hostname", &name);
    }
}

fn shares(setup: &Setup, scratch: &Path, flag: &mut Flag<'_>) {
    for share in &setup.shares {
        let source = scratch.join(&share.source);
        let end = if share.read_only { ":ro" } else { "" };
        flag(
            "volume",
            &format!("{}:{}{end}", source.display(), share.target),
        );
    }
    for (target, options) in &setup.tmpfs {
        let separator = if options.is_empty() { "" } else { ":" };
        flag("tmpfs", &format!("{target}{separator}{options}"));
    }
}

fn limits(setup: &Setup, flag: &mut Flag<'_>) {
    for capability in &setup.cap_add {
        flag("cap-add", capability);
    }
    for capability in &setup.cap_drop {
        flag("cap-drop", capability);
    }
    for (name, soft, hard) in &setup.ulimits {
        flag("ulimit", &format!("{name}={soft}:{hard}"));
    }
    if let Some(limit) = setup.pids {
        flag("pids-limit", &limit);
    }
    if let Some(mebibytes) = setup.memory {
        flag("memory", &format!("{mebibytes}m"));
    }
    if let Some(count) = setup.cpus {
        flag("cpus", &count);
    }
    for (name, value) in &setup.sysctls {
        flag("sysctl", &format!("{name}={value}"));
    }
}
