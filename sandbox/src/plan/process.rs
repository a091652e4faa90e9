//! The process: command, environment, user, limits.

use oci_spec::image::Config;
use oci_spec::runtime::{
    BoxBuilder, LinuxCapabilities, LinuxCapabilitiesBuilder, PosixRlimit, PosixRlimitBuilder,
    PosixRlimitType, Process, ProcessBuilder, User, UserBuilder,
};

use crate::request::{ExecRequest, RunRequest, Ulimit};

use super::shape::Plan;
use super::{PlanError, capability, clean};

/// What Docker sets when the image doesn't.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Descriptors a process may have, unless asked otherwise: what systemd gives its services.
const NOFILE: (u64, u64) = (1024, 524_288);

pub(super) fn plan(
    request: &RunRequest,
    config: &Config,
    hostname: &str,
) -> Result<Process, PlanError> {
    let user = request.user.as_ref().or(config.user().as_ref());
    let directory = request
        .working_dir
        .as_ref()
        .or(config.working_dir().as_ref().filter(|dir| !dir.is_empty()));
    let process = ProcessBuilder::default()
        .terminal(request.tty)
        .args(command(request, config)?)
        .env(environment(request, config, hostname)?)
        .cwd(working_dir(directory.map_or("/", String::as_str))?)
        .user(self::user(
            user.map_or("", String::as_str),
            &request.groups,
        )?)
        .capabilities(capabilities(capability::resolve(
            &request.cap_add,
            &request.cap_drop,
        )?)?)
        .rlimits(rlimits(&request.ulimits)?)
        .no_new_privileges(request.no_new_privileges)
        .build()?;
    sized(process, request.tty, request.terminal_size)
}

pub(super) fn exec(request: &ExecRequest, plan: &Plan) -> Result<Process, PlanError> {
    if request.command.is_empty() {
        return Err(PlanError::NoCommand);
    }
    let mut process = plan.read_process()?;
    let mut env = process.env().clone().unwrap_or_default();
    if request.tty && !env.iter().any(|variable| variable.starts_with("TERM=")) {
        env.push("TERM=xterm".to_owned());
    }
    apply(&mut env, &request.env)?;
    process
        .set_args(Some(request.command.clone()))
        .set_env(Some(env))
        .set_terminal(Some(request.tty))
        .set_console_size(None);
    if let Some(directory) = &request.working_dir {
        process.set_cwd(working_dir(directory)?.into());
    }
    if let Some(user) = &request.user {
        process.set_user(self::user(user, &[])?);
    }
    if request.privileged {
        process.set_capabilities(Some(capabilities(capability::all())?));
    }
    sized(process, request.tty, request.terminal_size)
}

fn sized(mut process: Process, tty: bool, size: Option<(u16, u16)>) -> Result<Process, PlanError> {
    if let (true, Some((rows, columns))) = (tty, size) {
        let size = BoxBuilder::default()
            .height(u64::from(rows))
            .width(u64::from(columns))
            .build()?;
        process.set_console_size(Some(size));
    }
    Ok(process)
}

/// An entrypoint of the request's drops the image's command with the image's entrypoint.
fn command(request: &RunRequest, config: &Config) -> Result<Vec<String>, PlanError> {
    let mut command = match &request.entrypoint {
        Some(entrypoint) => entrypoint.clone(),
        None => config.entrypoint().clone().unwrap_or_default(),
    };
    if !request.command.is_empty() {
        command.extend(request.command.iter().cloned());
    } else if request.entrypoint.is_none() {
        command.extend(config.cmd().iter().flatten().cloned());
    }
    match command.first() {
        Some(program) if !program.is_empty() => Ok(command),
        _ => Err(PlanError::NoCommand),
    }
}

/// Docker's order: what every container has, then the image's, then the request's.
fn environment(
    request: &RunRequest,
    config: &Config,
    hostname: &str,
) -> Result<Vec<String>, PlanError> {
    let mut env = vec![format!("PATH={PATH}"), format!("HOSTNAME={hostname}")];
    if request.tty {
        env.push("TERM=xterm".to_owned());
    }
    for variable in config.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        set(&mut env, name, Some(value))?;
    }
    apply(&mut env, &request.env)?;
    Ok(env)
}

fn apply(env: &mut Vec<String>, changes: &[(String, Option<String>)]) -> Result<(), PlanError> {
    changes
        .iter()
        .try_for_each(|(name, value)| set(env, name, value.as_deref()))
}

fn set(env: &mut Vec<String>, name: &str, value: Option<&str>) -> Result<(), PlanError> {
    if name.is_empty() || name.contains(['=', '\0']) || value.is_some_and(|v| v.contains('\0')) {
        return Err(PlanError::Variable(name.to_owned()));
    }
    let place = env
        .iter()
        .position(|old| old.split_once('=').is_some_and(|(known, _)| known == name));
    match (place, value.map(|value| format!("{name}={value}"))) {
        (Some(place), Some(variable)) => env[place] = variable,
        (Some(place), None) => {
            env.remove(place);
        }
        (None, Some(variable)) => env.push(variable),
        (None, None) => {}
    }
    Ok(())
}

fn working_dir(path: &str) -> Result<String, PlanError> {
    clean(path).ok_or_else(|| PlanError::WorkingDir(path.to_owned()))
}

/// Names are looked up by the agent in the container's own `/etc/passwd` and `/etc/group`: the
/// OCI user's `username` carries what was asked for. Numbers are also put in their places.
fn user(asked: &str, groups: &[String]) -> Result<User, PlanError> {
    let (name, group) = asked.split_once(':').unwrap_or((asked, ""));
    let groups = groups
        .iter()
        .map(|group| group.parse().map_err(|_| PlanError::Group(group.clone())))
        .collect::<Result<Vec<u32>, _>>()?;
    let mut user = UserBuilder::default()
        .uid(name.parse::<u32>().unwrap_or(0))
        .gid(group.parse::<u32>().unwrap_or(0));
    if !asked.is_empty() {
        user = user.username(asked);
    }
    if !groups.is_empty() {
        user = user.additional_gids(groups);
    }
    Ok(user.build()?)
}

fn capabilities(set: oci_spec::runtime::Capabilities) -> Result<LinuxCapabilities, PlanError> {
    let none = oci_spec::runtime::Capabilities::new;
    Ok(LinuxCapabilitiesBuilder::default()
        .bounding(set.clone())
        .effective(set.clone())
        .permitted(set)
        .inheritable(none())
        .ambient(none())
        .build()?)
}

fn rlimits(asked: &[Ulimit]) -> Result<Vec<PosixRlimit>, PlanError> {
    let mut limits = Vec::new();
    let named_nofile = asked.iter().any(|limit| limit.name == "nofile");
    if !named_nofile {
        limits.push(rlimit(PosixRlimitType::RlimitNofile, NOFILE.0, NOFILE.1)?);
    }
    for limit in asked {
        let wrong = |why| PlanError::Ulimit {
            name: limit.name.clone(),
            why,
        };
        let kind = rlimit_kind(&limit.name).ok_or_else(|| wrong("no such limit"))?;
        if limit.soft > limit.hard {
            return Err(wrong("the soft limit is above the hard limit"));
        }
        limits.retain(|known| known.typ() != kind);
        limits.push(rlimit(kind, limit.soft, limit.hard)?);
    }
    Ok(limits)
}

fn rlimit(kind: PosixRlimitType, soft: u64, hard: u64) -> Result<PosixRlimit, PlanError> {
    Ok(PosixRlimitBuilder::default()
        .typ(kind)
        .soft(soft)
        .hard(hard)
        .build()?)
}

/// getrlimit(2).
fn rlimit_kind(name: &str) -> Option<PosixRlimitType> {
    Some(match name {
        "as" => PosixRlimitType::RlimitAs,
        "core" => PosixRlimitType::RlimitCore,
        "cpu" => PosixRlimitType::RlimitCpu,
        "data" => PosixRlimitType::RlimitData,
        "fsize" => PosixRlimitType::RlimitFsize,
        "locks" => PosixRlimitType::RlimitLocks,
        "memlock" => PosixRlimitType::RlimitMemlock,
        "msgqueue" => PosixRlimitType::RlimitMsgqueue,
        "nice" => PosixRlimitType::RlimitNice,
        "nofile" => PosixRlimitType::RlimitNofile,
        "nproc" => PosixRlimitType::RlimitNproc,
        "rss" => PosixRlimitType::RlimitRss,
        "rtprio" => PosixRlimitType::RlimitRtprio,
        "rttime" => PosixRlimitType::RlimitRttime,
        "sigpending" => PosixRlimitType::RlimitSigpending,
        "stack" => PosixRlimitType::RlimitStack,
        _ => return None,
    })
}
