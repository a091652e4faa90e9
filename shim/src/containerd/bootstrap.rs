//! `start`: a shim for a container, and the word of where it listens.
//!
//! Containerd up to 2.2 asks by flags and environment and reads an address, or JSON where it
//! knows of newer task services; from 2.3 on it sends a message on stdin and reads one.

use std::env;
use std::fs::{self, DirBuilder};
use std::io::{self, ErrorKind, IsTerminal, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, bail};
use containerd_shim_protos::TASK_API_VERSION;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use rustix::process::getppid;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::args::Flags;

/// Where containerd serves its shims.
pub(crate) const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";
/// The newest task service that containerd knows, where it says.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// Where shims' sockets are.
const SOCKETS: &str = "/run/containerd/s";
/// Where a bundle says where its shim listens: for containerd 1.6 when it comes back.
pub(crate) const ADDRESS_FILE: &str = "address";
/// The annotations by which containers have one shim, as containerd's own has them.
const GROUPS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];
/// Most that is read of stdin, in bytes; containerd's own limit.
const MAX_INPUT: u64 = 10 << 20;
/// How hard a shim may be to kill at least when memory is short, as containerd's own have it.
const MAX_SCORE: i32 = 1000;

/// How containerd asked, which is how it reads the answer.
#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    /// The address alone: version 2 of the task service.
    Plain,
    /// An object with version and address.
    Json,
    /// A message.
    Message,
}

/// What containerd wants of a shim.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    protocol: Protocol,
    flags: Vec<[String; 2]>,
    debug: bool,
    ttrpc_address: String,
    sockets: PathBuf,
    socket_name: String,
}

/// Starts a shim that listens, and says where.
pub(crate) fn start(flags: &Flags) -> anyhow::Result<()> {
    let group = group(Path::new(".")).unwrap_or_else(|| flags.id.clone());
    let wanted = wanted(flags, &group, &input()?, |name| env::var(name).ok())?;
    let path = wanted.sockets.join(&wanted.socket_name);
    let address = format!("unix://{}", path.display());
    if let Some(listener) = listen(&path)? {
        let spawned = spawn(&wanted, listener);
        if spawned.is_err() {
            // The error at hand is the one to tell.
            let _ = fs::remove_file(&path);
        }
        spawned?;
    }
    write_address(&address)?;
    io::stdout()
        .write_all(&answer(&wanted.protocol, &address)?)
        .context("cannot answer containerd")
}

fn input() -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        let mut limited = stdin.lock().take(MAX_INPUT);
        limited
            .read_to_end(&mut bytes)
            .context("cannot read stdin")?;
    }
    Ok(bytes)
}

fn wanted(
    flags: &Flags,
    group: &str,
    input: &[u8],
    variable: impl Fn(&str) -> Option<String>,
) -> anyhow::Result<Wanted> {
    let message = message(flags, input)?;
    let (protocol, params) = match message {
        Some(params) => (Protocol::Message, params),
        None => {
            let newest = variable(MAX_VERSION).and_then(|version| version.parse().ok());
            let protocol = match newest {
                Some(TASK_API_VERSION..) => Protocol::Json,
                _ => Protocol::Plain,
            };
            let params = BootstrapParams {
                containerd_ttrpc_address: variable(TTRPC_ADDRESS).unwrap_or_default(),
                containerd_grpc_address: flags.address.clone(),
                containerd_binary: flags.publish_binary.clone(),
                ..BootstrapParams::default()
            };
            (protocol, params)
        }
    };
    let socket_name = socket_name(&params.containerd_grpc_address, &flags.namespace, group);
    let sockets = params.socket_dir.as_deref().filter(|dir| !dir.is_empty());
    Ok(Wanted {
        protocol,
        flags: vec![
            ["-namespace".into(), flags.namespace.clone()],
            ["-id".into(), flags.id.clone()],
            ["-address".into(), params.containerd_grpc_address],
            ["-publish-binary".into(), params.containerd_binary],
        ],
        debug: flags.debug || params.log_level.value() < 0,
        ttrpc_address: params.containerd_ttrpc_address,
        sockets: sockets.unwrap_or(SOCKETS).into(),
        socket_name,
    })
}

/// Whose shim serves the container of a bundle, if not its own. What is wrong with a bundle is
/// said when its container is made.
fn group(bundle: &Path) -> Option<String> {
    let spec = hull_shim::bundle::config(bundle).ok()?;
    let annotations = spec.annotations().as_ref()?;
    let group = GROUPS.iter().find_map(|name| annotations.get(*name));
    group.filter(|group| !group.is_empty()).cloned()
}

/// Where a shim of its own listens that was started by flags.
pub(crate) fn socket(flags: &Flags) -> PathBuf {
    let name = socket_name(&flags.address, &flags.namespace, &flags.id);
    Path::new(SOCKETS).join(name)
}

/// Containerd's own rule.
fn socket_name(address: &str, namespace: &str, group: &str) -> String {
    let about = Path::new(address).join(namespace).join(group);
    let digest = Sha256::digest(about.as_os_str().as_encoded_bytes());
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The message on stdin, if it is one: before 2.3 there was nothing, or the runtime's options,
/// whose two fields read as the first two of the message.
fn message(flags: &Flags, input: &[u8]) -> anyhow::Result<Option<BootstrapParams>> {
    let Ok(params) = BootstrapParams::parse_from_bytes(input) else {
        return Ok(None);
    };
    let (id, namespace) = (params.instance_id.as_str(), params.namespace.as_str());
    if !input.is_empty() && (id, namespace) == (flags.id.as_str(), flags.namespace.as_str()) {
        return Ok(Some(params));
    }
    if params.containerd_ttrpc_address.is_empty() {
        return Ok(None);
    }
    bail!(
        "asked by flags for {}/{}, and on stdin for {namespace}/{id}",
        flags.namespace,
        flags.id
    )
}

fn answer(protocol: &Protocol, address: &str) -> anyhow::Result<Vec<u8>> {
    Ok(match protocol {
        Protocol::Plain => address.as_bytes().to_vec(),
        Protocol::Json => {
            let answer =
                json!({"version": TASK_API_VERSION, "address": address, "protocol": "ttrpc"});
            serde_json::to_vec(&answer)?
        }
        Protocol::Message => BootstrapResult {
            version: TASK_API_VERSION,
            address: address.to_owned(),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        }
        .write_to_bytes()?,
    })
}

/// A socket to listen on; none if somebody does so already.
fn listen(path: &Path) -> anyhow::Result<Option<UnixListener>> {
    let failed = || format!("cannot listen on \"{}\"", path.display());
    if let Some(directory) = path.parent() {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o711);
        builder.create(directory).with_context(failed)?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse => {}
        bound => return Ok(Some(bound.with_context(failed)?)),
    }
    if UnixStream::connect(path).is_ok() {
        return Ok(None);
    }
    // A shim's that was killed.
    fs::remove_file(path).with_context(failed)?;
    Ok(Some(UnixListener::bind(path).with_context(failed)?))
}

fn spawn(wanted: &Wanted, listener: UnixListener) -> anyhow::Result<()> {
    let this = env::current_exe().context("cannot tell where the running executable lies")?;
    let mut command = Command::new(this);
    command
        .args(wanted.flags.iter().flatten())
        .args(wanted.debug.then_some("-debug"))
        .env(TTRPC_ADDRESS, &wanted.ttrpc_address)
        // Many threads, each with little to do, need no memory of their own to take from.
        .env("MALLOC_ARENA_MAX", "1")
        .stdin(OwnedFd::from(listener))
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let shim = hull_sandbox::spawn_in_session(&mut command, &[]).context("cannot start a shim")?;
    adjust_score(shim.id());
    Ok(())
}

/// A shim is a little likelier to be killed than containerd, and not at all likely.
fn adjust_score(shim: u32) {
    let parent = getppid().and_then(|pid| u32::try_from(pid.as_raw_nonzero().get()).ok());
    let score = parent
        .and_then(|pid| fs::read_to_string(score_file(pid)).ok())
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        set_score(shim, (score + 1).min(MAX_SCORE));
    }
}

/// Says how likely a process is to be killed when the host's memory is short. Without the right
/// to say so, it is as likely as who started it.
pub(crate) fn set_score(pid: u32, score: i32) {
    let _ = fs::write(score_file(pid), score.to_string());
}

fn score_file(pid: u32) -> String {
    format!("/proc/{pid}/oom_score_adj")
}

/// Written whole or not at all: containerd reads it when it comes back.
fn write_address(address: &str) -> anyhow::Result<()> {
    let fresh = format!(".{ADDRESS_FILE}");
    fs::write(&fresh, address)
        .and_then(|()| fs::rename(&fresh, ADDRESS_FILE))
        .context("cannot write the shim's address into the bundle")
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    fn flags() -> Flags {
        let words = ["shim", "--id", "c1", "--namespace", "ns", "--address", "/a"];
        Flags::try_parse_from(words).unwrap()
    }

    fn protocol(input: &[u8], newest: Option<&str>) -> Wanted {
        let variable = |name: &str| match name {
            MAX_VERSION => newest.map(str::to_owned),
            TTRPC_ADDRESS => Some("/a.ttrpc".to_owned()),
            _ => None,
        };
        wanted(&flags(), "c1", input, variable).unwrap()
    }

    #[test]
    fn flags_are_answered_in_the_newest_words_that_containerd_knows() {
        let options = Any {
            type_url: "containerd.runc.v1.Options".to_owned(),
            value: b"\x0a\x01x".to_vec(),
            ..Any::default()
        };
        let options = options.write_to_bytes().unwrap();
        for (input, newest, expected) in [
            (&[][..], None, Protocol::Plain),
            (&[], Some("2"), Protocol::Plain),
            (&[], Some("3"), Protocol::Json),
            (&options, None, Protocol::Plain),
            (&options, Some("4"), Protocol::Json),
        ] {
            assert_eq!(protocol(input, newest).protocol, expected);
        }
        let plain = protocol(&[], None);
        assert_eq!(plain.ttrpc_address, "/a.ttrpc");
        assert_eq!(plain.sockets, Path::new(SOCKETS));
        // printf /a/ns/c1 | sha256sum: as containerd's own shims name theirs.
        let name = "9bd6d36519dc36ec6a8389f9780517bf29fba57282f4bc6569cd666ff75b7fe7";
        assert_eq!(plain.socket_name, name);
        assert_eq!(answer(&Protocol::Plain, "unix:///x").unwrap(), b"unix:///x");
    }

    #[test]
    fn a_message_is_answered_by_a_message() {
        let params = BootstrapParams {
            instance_id: "c1".to_owned(),
            namespace: "ns".to_owned(),
            containerd_ttrpc_address: "/b.ttrpc".to_owned(),
            containerd_grpc_address: "/a".to_owned(),
            socket_dir: Some("/s".to_owned()),
            ..BootstrapParams::default()
        };
        let wanted = protocol(&params.write_to_bytes().unwrap(), None);
        assert_eq!(wanted.protocol, Protocol::Message);
        assert_eq!(wanted.ttrpc_address, "/b.ttrpc");
        assert_eq!(wanted.sockets, Path::new("/s"));
        assert_eq!(wanted.socket_name, protocol(&[], None).socket_name);
        let answer = answer(&wanted.protocol, "unix:///x").unwrap();
        let result = BootstrapResult::parse_from_bytes(&answer).unwrap();
        assert_eq!((result.version, result.address.as_str()), (3, "unix:///x"));
        let other = BootstrapParams {
            instance_id: "c2".to_owned(),
            ..params
        };
        assert!(message(&flags(), &other.write_to_bytes().unwrap()).is_err());
    }

    #[test]
    fn a_pods_containers_have_one_shim() {
        let bundle = tempfile::tempdir().unwrap();
        assert_eq!(group(bundle.path()), None);
        let config = json!({
            "ociVersion": "1.0.2",
            "annotations": {"io.kubernetes.cri.sandbox-id": "s1"},
        });
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        assert_eq!(group(bundle.path()).as_deref(), Some("s1"));
    }

    #[test]
    fn a_socket_of_a_shim_that_was_killed_is_taken_over() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s/socket");
        let first = listen(&path).unwrap().unwrap();
        assert!(listen(&path).unwrap().is_none());
        drop(first);
        assert!(listen(&path).unwrap().is_some());
    }
}
