//! The emulated KVM host: a place where KVM is real, whatever this machine is.
//!
//! Owns: finding out whether this machine's own KVM runs guests, and else a warm QEMU machine
//! whose root is this machine's, read-only under a layer of memory. Refuses: to install anything
//! but packages, and to keep anything outside of `target/host`.
//!
//! ```text
//! Host::acquire ─► packages ─► kernel ─► image ─► machine (started or found warm)
//! Host::command ─► one TCP stream: wire ─► hull-host-init ─► process
//! ```
//!
//! What a command sees in the emulated machine:
//! - this machine's files as they were when the machine first looked, writes kept in memory;
//! - the *live* directories (the workspace, the cargo target directory) as they are now, and
//!   writes reach this machine;
//! - `/tmp`, `/run`, `/var/lib/{hull,containerd,containers,docker}` empty and in memory, fit to
//!   hold overlays; cgroup v2, `/dev/{kvm,net/tun,vhost-vsock,fuse,shm,pts}`, `lo` alone.

mod attach;
mod command;
mod image;
mod initramfs;
mod kernel;
mod machine;
pub mod packages;
mod qemu;
pub mod releases;
mod report;
pub mod wire;

use std::env;
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

pub use command::{Command, Running};
pub use report::Report;

use machine::{Lease, Plan};
use wire::{Message, Open};

/// Memory of the emulated machine if unsaid, MiB. Unused memory costs nothing outside.
const MEMORY: u32 = 6144;

/// How often an emulated machine that says nothing is asked whether it is still there.
///
/// That is more than a question. QEMU 7.2 loses an interrupt now and then: to enter and to leave
/// a nested guest, a processor's thread changes its `interrupt_request` without the lock under which
/// others do (`target/i386/tcg/sysemu/svm_helper.c`). Was it the timer's, the machine stands until
/// the next interrupt, whatever for: a packet's will do.
#[derive(Debug, Clone, Copy)]
struct Pulse {
    beat: Duration,
    /// Without a word for so long, it is taken for hung. Under load it answers within seconds.
    answer: Duration,
}

/// Which host is wanted.
#[derive(Debug, Clone)]
pub struct Options {
    /// A machine that nothing has run in.
    pub fresh: bool,
    /// Deterministic time, in a machine of its own that runs one command at a time.
    pub icount: bool,
    /// The emulated machine's memory, MiB.
    pub memory: u32,
    /// A machine apart from everybody else's.
    pub name: String,
    /// Where the steps of a start are told.
    pub report: Report,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            fresh: false,
            icount: false,
            memory: MEMORY,
            name: "default".to_owned(),
            report: Report::default(),
        }
    }
}

impl Options {
    /// The name of the machine's directory.
    fn machine_name(&self) -> String {
        let kind = if self.icount { "-icount" } else { "" };
        format!("{}{kind}", self.name)
    }
}

/// A host whose KVM is real. Dropping it lets the emulated machine go idle; it stays warm.
#[derive(Debug)]
pub struct Host {
    workspace: PathBuf,
    lease: Option<Lease>,
}

impl Host {
    /// This machine if its KVM is real, else the emulated one: found warm, or made.
    ///
    /// # Errors
    /// When a package, the kernel or the machine can't be had; the error says which step.
    pub fn acquire(options: &Options) -> Result<Self> {
        let workspace = workspace()?;
        if is_kvm_real() && !options.icount {
            return Ok(Self {
                workspace,
                lease: None,
            });
        }
        let home = home(&workspace)?;
        let (kernel, image) = {
            // Several callers at once: the first prepares.
            let preparing = File::create(home.join("lock")).context("open the host's lock")?;
            preparing.lock().context("wait for the host's lock")?;
            packages::ensure_needed(&options.report)?;
            let kernel = kernel::ensure_kernel(&home, &options.report)?;
            let image = image::ensure_image(&workspace, &home, &kernel, &options.report)?;
            (kernel, image)
        };
        let plan = Plan {
            name: &options.machine_name(),
            icount: options.icount,
            memory: options.memory,
            kernel: &kernel,
            image: &image,
        };
        let lease = machine::lease(&home.join("run"), &plan, options.fresh, &options.report)?;
        Ok(Self {
            workspace,
            lease: Some(lease),
        })
    }

    /// For a test: as [`Self::acquire`], or none after saying aloud why the test is skipped.
    ///
    /// # Panics
    /// Instead of a skip where `HULL_REQUIRE_KVM` is 1.
    #[expect(clippy::panic, reason = "a test that must not be skipped fails")]
    #[must_use]
    pub fn acquire_or_skip(options: &Options) -> Option<Self> {
        match Self::acquire(options) {
            Ok(host) => Some(host),
            Err(error) if env::var("HULL_REQUIRE_KVM").is_ok_and(|value| value == "1") => {
                panic!("no KVM host, and HULL_REQUIRE_KVM=1: {error:#}")
            }
            Err(error) => {
                // Not by eprintln: the test harness would keep it to itself.
                let _said = writeln!(io::stderr(), "SKIPPED, no KVM host: {error:#}");
                None
            }
        }
    }

    /// Ends the warm machine that these options name. True if there was one.
    ///
    /// # Errors
    /// When it can't be ended.
    pub fn stop(options: &Options) -> Result<bool> {
        let runs = home(&workspace()?)?.join("run");
        machine::end(&runs, &options.machine_name())
    }

    /// Whether commands run on this machine itself.
    #[must_use]
    pub fn is_native(&self) -> bool {
        self.lease.is_none()
    }

    /// A command, by default with the caller's directory and the part of its environment that
    /// builds and tests need.
    pub fn command<A: Into<String>>(&self, argv: impl IntoIterator<Item = A>) -> Command<'_> {
        Command::new(self, argv.into_iter().map(Into::into).collect())
    }

    fn open(&self, argv: Vec<String>) -> Open {
        Open {
            token: String::new(),
            argv,
            env: env::vars().filter(|(key, _)| is_passed(key)).collect(),
            cwd: env::current_dir().unwrap_or_else(|_| self.workspace.clone()),
            live: live_directories(&self.workspace),
            packages: packages::epoch(),
            terminal: None,
        }
    }

    /// A stream with the command opened on it, or none on this machine itself.
    fn connect(&self, open: &Open) -> Result<Option<TcpStream>> {
        let Some(lease) = &self.lease else {
            return Ok(None);
        };
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, lease.state.port));
        let mut stream = connected.map_err(|error| self.gone().context(error))?;
        stream.set_nodelay(true)?;
        let open = Open {
            token: lease.state.token.clone(),
            ..open.clone()
        };
        wire::write(&mut stream, &Message::Open(open)).context("send the command")?;
        Ok(Some(stream))
    }

    fn pulse(&self) -> Pulse {
        let is_counted = self.lease.as_ref().is_some_and(|lease| lease.icount);
        Pulse {
            // Where instructions are counted each question is seen.
            beat: match is_counted {
                true => Duration::from_secs(20),
                false => Duration::from_millis(250),
            },
            answer: Duration::from_secs(180),
        }
    }

    /// Ends the machine, which doesn't answer any more: no later caller is to find it.
    fn hung(&self) -> anyhow::Error {
        let lease = self.lease.as_ref();
        let state = lease.map_or_else(String::new, |lease| machine::end_hung(&lease.directory));
        anyhow::anyhow!("the emulated KVM host hung and was ended; what it was at:\n{state}")
    }

    fn gone(&self) -> anyhow::Error {
        let lease = self.lease.as_ref();
        let words = lease.map(|lease| machine::last_words(&lease.directory));
        let words = words
            .filter(|words| !words.is_empty())
            .map_or_else(String::new, |words| format!("; its last words:{words}"));
        anyhow::anyhow!("the emulated KVM host ended (the next call starts a new one){words}")
    }
}

/// Whether this machine's processor has virtualisation of its own and `/dev/kvm` opens.
#[must_use]
pub fn is_kvm_real() -> bool {
    let processor = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    has_virtualisation(&processor)
        && File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_ok()
}

fn has_virtualisation(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .filter(|line| line.starts_with("flags"))
        .flat_map(str::split_whitespace)
        .any(|flag| flag == "vmx" || flag == "svm")
}

/// The directory of the workspace this process works in.
fn workspace() -> Result<PathBuf> {
    let start = env::var_os("CARGO_MANIFEST_DIR").map(PathBuf::from);
    let start = match start {
        Some(manifest) => manifest,
        None => env::current_dir().context("find the current directory")?,
    };
    start
        .ancestors()
        .find(|directory| directory.join("tests/src/bin/hull-host-init").is_dir())
        .map(Path::to_owned)
        .with_context(|| format!("no Hull workspace at or above {}", start.display()))
}

/// `target/host`, whatever the cargo target directory is: one warm machine serves a workspace.
fn home(workspace: &Path) -> Result<PathBuf> {
    let home = workspace.join("target/host");
    fs::create_dir_all(&home).with_context(|| format!("make {}", home.display()))?;
    Ok(home)
}

/// The workspace, and where cargo puts what it builds should that be elsewhere.
fn live_directories(workspace: &Path) -> Vec<PathBuf> {
    let mut live = vec![workspace.to_owned()];
    let configured = env::var_os("CARGO_TARGET_DIR").map(|target| workspace.join(target));
    let own = env::current_exe().ok().and_then(|exe| target_of(&exe));
    for directory in configured.into_iter().chain(own) {
        if directory.is_dir() && !live.iter().any(|seen| directory.starts_with(seen)) {
            live.push(directory);
        }
    }
    live
}

/// The cargo target directory that holds a binary: cargo tags it.
fn target_of(exe: &Path) -> Option<PathBuf> {
    exe.ancestors()
        .skip(1)
        .find(|directory| directory.join("CACHEDIR.TAG").is_file())
        .map(Path::to_owned)
}

/// Whether a variable of the caller's is for the command as well: what builds and tests read,
/// and no secrets.
fn is_passed(key: &str) -> bool {
    const NAMES: [&str; 8] = [
        "PATH", "HOME", "USER", "TERM", "LANG", "CI", "NO_COLOR", "TZ",
    ];
    const PREFIXES: [&str; 6] = ["HULL_", "CARGO", "RUST", "LC_", "PROPTEST_", "INSTA_"];
    let is_secret = ["TOKEN", "SECRET", "PASSWORD"]
        .iter()
        .any(|word| key.contains(word));
    !is_secret && (NAMES.contains(&key) || PREFIXES.iter().any(|prefix| key.starts_with(prefix)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtualisation_is_a_flag_and_not_a_part_of_another() {
        assert!(has_virtualisation("flags\t\t: fpu vmx sse\n"));
        assert!(has_virtualisation("processor: 0\nflags : fpu svm\n"));
        assert!(!has_virtualisation(
            "flags : fpu svm_lock\nvmx flags : vnmi\n"
        ));
    }

    #[test]
    fn variables_of_builds_are_passed_and_secrets_are_not() {
        for key in [
            "PATH",
            "HULL_REQUIRE_KVM",
            "RUST_BACKTRACE",
            "CARGO_TERM_COLOR",
        ] {
            assert!(is_passed(key), "{key}");
        }
        for key in [
            "CARGO_REGISTRY_TOKEN",
            "AWS_PROFILE",
            "HULL_PASSWORD",
            "LD_PRELOAD",
        ] {
            assert!(!is_passed(key), "{key}");
        }
    }

    #[test]
    fn icount_is_another_machine() {
        let icount = Options {
            icount: true,
            ..Options::default()
        };
        assert_ne!(icount.machine_name(), Options::default().machine_name());
    }
}
