//! Namespaces made by ip(8), joined; frames seen through the taps.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use super::*;

/// A namespace by name, gone when dropped.
struct Namespace(String);

impl Namespace {
    fn new(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("SKIP: making network namespaces takes root");
            return None;
        }
        let name = format!("hull-{name}-{}", std::process::id());
        ip(&format!("netns add {name}"));
        Some(Self(name))
    }

    fn path(&self) -> PathBuf {
        Path::new("/run/netns").join(&self.0)
    }

    /// Runs lines of ip(8) inside.
    fn ip(&self, lines: &str) {
        for line in lines.lines() {
            ip(&format!("-n {} {}", self.0, line.trim()));
        }
    }

    fn links(&self) -> String {
        let shown = Command::new("ip")
            .args(["-n", &self.0, "-br", "link"])
            .output();
        String::from_utf8(shown.unwrap().stdout).unwrap()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        ip(&format!("netns del {}", self.0));
    }
}

fn ip(line: &str) {
    let ran = Command::new("ip").args(line.split_whitespace()).status();
    assert!(ran.unwrap().success(), "ip {line}");
}

fn why(error: &JoinError) -> String {
    use std::error::Error as _;
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

/// A frame of a kind that nobody answers, with virtio's header.
fn frame(mark: u8) -> Vec<u8> {
    let mut frame = vec![0; 12];
    frame.extend_from_slice(&[0xff; 6]);
    frame.extend_from_slice(&[2, 0, 0, 0, 0, mark]);
    frame.extend_from_slice(&[0x88, 0xb5]);
    frame.resize(12 + 60, mark);
    frame
}

/// Reads frames until one has this mark.
fn awaited(tap: &OwnedFd, mark: u8) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let limit = Timespec {
        tv_sec: 10,
        tv_nsec: 0,
    };
    let mut bytes = vec![0; 70_000];
    loop {
        let mut ready = [PollFd::new(tap, PollFlags::IN)];
        assert_eq!(poll(&mut ready, Some(&limit)), Ok(1), "no frame {mark}");
        let count = rustix::io::read(tap, &mut bytes[..]).unwrap();
        if bytes[12..count] == frame(mark)[12..] {
            return;
        }
    }
}

/// Asks until `is_so`. A child that another test forks has what this one let go of until it
/// executes its program.
fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came to be");
        thread::yield_now();
    }
}

const TAKEN: &str = "it is joined by another virtual machine already";

/// Joins a namespace that nobody else has.
fn join_free(namespace: &Namespace) -> Joined {
    let mut joined = join(&namespace.path());
    until(|| {
        let is_taken = joined
            .as_ref()
            .is_err_and(|error| why(error).ends_with(TAKEN));
        if is_taken {
            joined = join(&namespace.path());
        }
        !is_taken
    });
    joined.unwrap()
}

#[test]
fn two_joined_namespaces_reach_each_other_and_leave_nothing() {
    let (Some(one), Some(other)) = (Namespace::new("a"), Namespace::new("b")) else {
        return;
    };
    one.ip(&format!(
        "link add eth0 mtu 1400 type veth peer name eth0 netns {}
        link set eth0 up
        address add 10.0.0.1/24 dev eth0",
        other.0
    ));
    other.ip("link set eth0 up");
    // That its carrier is there, the kernel says later than it answers ip(8).
    until(|| one.links().contains(" UP "));
    let before = one.links();
    for _ in 0..2 {
        let (left, right) = (join_free(&one), join_free(&other));
        assert_eq!((left.interfaces.len(), left.taps.len()), (1, 1));
        assert_eq!(left.interfaces[0].mtu, 1400);
        rustix::io::write(&left.taps[0], &frame(1)).unwrap();
        awaited(&right.taps[0], 1);
        rustix::io::write(&right.taps[0], &frame(2)).unwrap();
        awaited(&left.taps[0], 2);
        let taken = why(&join(&one.path()).unwrap_err());
        assert!(taken.ends_with(TAKEN), "{taken}");
        drop((left, right));
        until(|| one.links() == before);
    }
}

#[test]
fn a_namespace_without_interfaces_is_no_network() {
    let Some(namespace) = Namespace::new("empty") else {
        return;
    };
    let joined = join(&namespace.path()).unwrap();
    assert!(joined.interfaces.is_empty() && joined.taps.is_empty() && joined.owner.is_none());
}

#[test]
fn what_is_no_namespace_of_its_own_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let (file, fifo) = (directory.path().join("file"), directory.path().join("fifo"));
    fs::write(&file, "").unwrap();
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.unwrap().success());
    for path in [
        &file,
        &fifo,
        Path::new("/proc/self/ns/mnt"),
        directory.path(),
        Path::new("/dev/null"),
    ] {
        let refused = why(&join(path).unwrap_err());
        assert_eq!(refused, format!("{path:?} is not a network namespace"));
    }
    let missing = why(&join(&directory.path().join("no")).unwrap_err());
    assert!(
        missing.ends_with("No such file or directory (os error 2)"),
        "{missing}"
    );
    // The first process may be out of sight here.
    for own in &HOSTS_OWN[1..] {
        let refused = why(&join(Path::new(own)).unwrap_err());
        assert!(
            refused.contains("is the host's own network namespace"),
            "{refused}"
        );
    }
}
