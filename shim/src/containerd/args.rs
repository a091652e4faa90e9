//! The command line as containerd gives it. Plain data.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Containerd's shim for Hull, started by containerd.
#[derive(Debug, Clone, Parser)]
#[command(name = "containerd-shim-hull-v2", disable_version_flag = true)]
pub(crate) struct Flags {
    /// Containerd's namespace of the container.
    #[arg(long, default_value = "")]
    pub(crate) namespace: String,
    /// The container's id.
    #[arg(long, default_value = "")]
    pub(crate) id: String,
    /// Containerd's main socket.
    #[arg(long, default_value = "")]
    pub(crate) address: String,
    /// A program that publishes events, for want of a socket.
    #[arg(long, default_value = "")]
    pub(crate) publish_binary: String,
    /// The bundle, unless it is the working directory.
    #[arg(long)]
    pub(crate) bundle: Option<PathBuf>,
    /// Logs more.
    #[arg(long)]
    pub(crate) debug: bool,
    /// Prints the version.
    #[arg(short = 'v', long)]
    pub(crate) version: bool,
    /// Describes this runtime to containerd.
    #[arg(long)]
    pub(crate) info: bool,
    /// What is to be done; without it, serves on the socket that stdin is.
    #[arg(value_enum)]
    pub(crate) action: Option<Action>,
}

/// What containerd has a shim's program do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Action {
    /// Starts a shim and says where it listens.
    Start,
    /// Clears up after a shim that is gone.
    Delete,
}

/// Go's flags have one dash or two, whatever their length.
pub(crate) fn as_go_has_them(args: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let doubled = |argument: OsString| match argument.as_bytes() {
        [b'-', first, _, ..] if *first != b'-' => {
            let mut long = OsString::from("-");
            long.push(&argument);
            long
        }
        _ => argument,
    };
    args.map(doubled).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Flags {
        let program = std::iter::once("shim").chain(words.iter().copied());
        Flags::try_parse_from(as_go_has_them(program.map(OsString::from))).unwrap()
    }

    #[test]
    fn flags_are_taken_as_containerd_gives_them() {
        let words = [
            "-namespace",
            "k8s.io",
            "-address",
            "/run/c.sock",
            "-publish-binary",
            "/usr/bin/containerd",
            "-id=x-1",
            "-bundle",
            "/b",
            "-debug",
            "delete",
        ];
        let flags = parsed(&words);
        assert_eq!(
            (flags.namespace.as_str(), flags.id.as_str()),
            ("k8s.io", "x-1")
        );
        assert_eq!(flags.publish_binary, "/usr/bin/containerd");
        assert_eq!(flags.bundle, Some("/b".into()));
        assert!(flags.debug && flags.action == Some(Action::Delete));
        assert!(parsed(&["-v"]).version && parsed(&["--info"]).info);
        assert_eq!(parsed(&["-id", "a"]).action, None);
    }
}
