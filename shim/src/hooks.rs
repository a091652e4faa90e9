//! The hooks of a bundle (runtime spec, "POSIX-platform Hooks"): programs of the host's owner.
//!
//! All run on the host. `startContainer`, which would have to run in the guest, is refused.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, bail};
use oci_spec::runtime::{Hook, Spec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;

/// Refuses a bundle with hooks that can't be run.
pub fn check(spec: &Spec) -> anyhow::Result<()> {
    let hooks = spec.hooks().as_ref();
    let inside = hooks.and_then(|hooks| hooks.start_container().as_ref());
    if inside.is_some_and(|hooks| !hooks.is_empty()) {
        bail!(
            "startContainer hooks run inside of the container, where none of the host's programs are"
        );
    }
    Ok(())
}

/// Runs the hooks of a container that is made and not started.
pub fn on_create(spec: &Spec, state: &Value) -> anyhow::Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    run_all("prestart", hooks.prestart(), state)?;
    run_all("createRuntime", hooks.create_runtime(), state)?;
    run_all("createContainer", hooks.create_container(), state)
}

/// Runs the hooks of a container whose command runs.
pub fn on_start(spec: &Spec, state: &Value) -> anyhow::Result<()> {
    match spec.hooks() {
        Some(hooks) => run_all("poststart", hooks.poststart(), state),
        None => Ok(()),
    }
}

/// Runs the hooks of a container that is removed.
pub fn on_delete(spec: &Spec, state: &Value) -> anyhow::Result<()> {
    match spec.hooks() {
        Some(hooks) => run_all("poststop", hooks.poststop(), state),
        None => Ok(()),
    }
}

fn run_all(kind: &str, hooks: &Option<Vec<Hook>>, state: &Value) -> anyhow::Result<()> {
    for hook in hooks.iter().flatten() {
        run(hook, state)
            .with_context(|| format!("{kind} hook \"{}\" failed", hook.path().display()))?;
    }
    Ok(())
}

fn run(hook: &Hook, state: &Value) -> anyhow::Result<()> {
    let mut command = Command::new(hook.path());
    if let Some([name, arguments @ ..]) = hook.args().as_deref() {
        command.arg0(name).args(arguments);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = command.spawn().context("it can't be run")?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that doesn't read its state doesn't need it.
        let _ = stdin.write_all(state.to_string().as_bytes());
    }
    let limit = hook
        .timeout()
        .and_then(|seconds| u64::try_from(seconds).ok());
    if let Some(limit) = limit
        && let Some(pid) = i32::try_from(child.id()).ok().and_then(Pid::from_raw)
    {
        let process = pidfd_open(pid, PidfdFlags::empty())?;
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        let timeout = Timespec::try_from(Duration::from_secs(limit))?;
        if poll(&mut ended, Some(&timeout))? == 0 {
            child.kill()?;
            child.wait()?;
            bail!("it took more than {limit} s");
        }
    }
    let status = child.wait()?;
    match status.success() {
        true => Ok(()),
        false => bail!("it ended with {status}"),
    }
}
