//! From flags to the engine's request.
//!
//! Owns: which of several flags wins, and files named by flags. Refuses: defaults of images and
//! of the host.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use hull_sandbox::{ExecRequest, Root, RunRequest};

use crate::args::{ExecArgs, ProcessArgs, RunArgs};
use crate::parse::{self, Mount, Variable};

/// The request that `args` make of a container with this root and these variables.
pub(crate) fn run_request(args: &RunArgs, env: Vec<Variable>, root: Root) -> RunRequest {
    let mut request = RunRequest::new(root);
    request.name.clone_from(&args.name);
    request.command = args.image_and_command.iter().skip(1).cloned().collect();
    request.entrypoint = args
        .entrypoint
        .as_ref()
        .map(|program| match program.as_str() {
            "" => Vec::new(),
            _ => vec![program.clone()],
        });
    request.env = env;
    request.working_dir.clone_from(&args.process.workdir);
    request.network.clone_from(&args.network.0);
    request.user.clone_from(&args.process.user);
    request.groups.clone_from(&args.limits.group_add);
    request.hostname.clone_from(&args.hostname);
    request.tty = args.tty;
    request.interactive = args.interactive;
    request.volumes.clone_from(&args.volume);
    request.tmpfs.clone_from(&args.tmpfs);
    for mount in &args.mount {
        match mount {
            Mount::Volume(volume) => request.volumes.push(volume.clone()),
            Mount::Tmpfs(tmpfs) => request.tmpfs.push(tmpfs.clone()),
        }
    }
    request.read_only = args.read_only;
    request.cpus = args.cpus;
    // Docker's 0 is "no limit", which a machine cannot have: its default is meant.
    request.memory_bytes = args.memory.filter(|&bytes| bytes > 0);
    request.scratch_bytes = args.storage_opt.last().copied();
    request.pids_limit = args.limits.pids_limit;
    request.cap_add.clone_from(&args.limits.cap_add);
    request.cap_drop.clone_from(&args.limits.cap_drop);
    request.ulimits.clone_from(&args.limits.ulimit);
    request.sysctls = args.limits.sysctl.iter().cloned().collect();
    request.init = args.init;
    request.no_new_privileges = args.limits.security_opt.last() == Some(&true);
    request.stop_signal.clone_from(&args.stop_signal);
    request.stop_timeout_s = args.stop_timeout;
    request.auto_remove = args.rm;
    request.labels = args.label.iter().cloned().collect();
    request.no_template = args.no_template;
    request.debug = args.debug;
    request
}

/// The request that `args` make of a container that runs.
pub(crate) fn exec_request(args: &ExecArgs) -> anyhow::Result<ExecRequest> {
    Ok(ExecRequest {
        command: args.name_and_command.iter().skip(1).cloned().collect(),
        env: environment(&args.process)?,
        working_dir: args.process.workdir.clone(),
        user: args.process.user.clone(),
        tty: args.tty,
        privileged: args.privileged,
        ..ExecRequest::default()
    })
}

/// The variables that files and flags set: files first, so that flags win.
pub(crate) fn environment(args: &ProcessArgs) -> anyhow::Result<Vec<Variable>> {
    let mut variables = Vec::new();
    for path in &args.env_file {
        variables.append(&mut read_env_file(path)?);
    }
    variables.extend(args.env.iter().cloned());
    Ok(variables)
}

fn read_env_file(path: &PathBuf) -> anyhow::Result<Vec<Variable>> {
    let bytes =
        fs::read(path).with_context(|| format!("cannot read env file {}", path.display()))?;
    let Ok(text) = String::from_utf8(bytes) else {
        bail!("env file {} is not UTF-8", path.display());
    };
    parse::env_file(&text, |name| std::env::var(name).ok())
        .with_context(|| format!("invalid env file {}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use clap::Parser;

    use super::*;
    use crate::args::{Command, Hull};

    fn request(words: &str) -> RunRequest {
        let words = ["hull", "run"].into_iter().chain(words.split_whitespace());
        let Command::Run(args) = Hull::try_parse_from(words).unwrap().command else {
            panic!()
        };
        run_request(
            &args,
            environment(&args.process).unwrap(),
            Root::Directory("/r".into()),
        )
    }

    #[test]
    fn flags_reach_their_fields() {
        let request = request(
            "-it --rm --name n -e A=1 -w /srv -u 1:2 --group-add g --hostname h -v /a:/b:ro \
             --mount type=tmpfs,dst=/t --tmpfs /u --read-only --cpus 1.5 -m 512m --pids-limit -1 \
             --cap-add ALL --cap-drop NET_RAW --ulimit nofile=1:2 --sysctl a.b=c --init \
             --security-opt no-new-privileges --stop-signal INT --stop-timeout 3 -l k=v --debug \
             image cmd --rm -x",
        );
        assert_eq!(request.command, ["cmd", "--rm", "-x"]);
        assert_eq!(request.env, [("A".to_owned(), Some("1".to_owned()))]);
        assert_eq!(request.memory_bytes, Some(512 << 20));
        assert_eq!(request.cpus, Some(1.5));
        assert_eq!(request.tmpfs.len(), 2);
        assert_eq!(request.volumes.len(), 1);
        assert!(request.volumes[0].read_only);
        assert_eq!(request.pids_limit, Some(-1));
        assert_eq!(request.stop_timeout_s, Some(3));
        assert_eq!(request.labels["k"], "v");
        assert_eq!(request.sysctls["a.b"], "c");
        assert!(request.tty && request.interactive && request.auto_remove && request.read_only);
        assert!(request.init && request.no_new_privileges && request.debug);
        assert_eq!(request.entrypoint, None);
    }

    #[test]
    fn an_empty_entrypoint_clears_and_another_replaces() {
        let words = ["hull", "run", "--entrypoint", "", "i"];
        let Command::Run(args) = Hull::try_parse_from(words).unwrap().command else {
            panic!()
        };
        let cleared = run_request(&args, Vec::new(), Root::Directory("/".into()));
        assert_eq!(cleared.entrypoint, Some(Vec::new()));
        assert_eq!(
            request("--entrypoint sh i").entrypoint,
            Some(vec!["sh".to_owned()])
        );
        assert_eq!(request("-m 0 i").memory_bytes, None);
    }

    #[test]
    fn variables_of_files_come_before_those_of_flags() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        writeln!(file, "A=file\nB=file").unwrap();
        let path = file.path().display();
        let names: Vec<_> = request(&format!("-e A=flag --env-file {path} i")).env;
        let expected = [("A", "file"), ("B", "file"), ("A", "flag")];
        let expected = expected.map(|(name, value)| (name.to_owned(), Some(value.to_owned())));
        assert_eq!(names, expected);
    }
}
