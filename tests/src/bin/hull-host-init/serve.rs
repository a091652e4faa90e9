//! Accepts callers and keeps the live directories in place.
//!
//! Owns: the listening socket, the writable mount of the outer machine that
//! commands can't reach, and which of its directories are shown. Refuses: a caller without the token.
//!
//! A live directory is bound from that mount over the overlay, at its own path: an overlay
//! remembers names of its lower layer, so a file rebuilt outside would be seen late or never.
//! The mount is virtio-fs, whose names are asked for anew each time; 9p answers with the old
//! file as long as some process in the machine runs it.

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use hull_tests::host::wire::{Boot, LIVE_TAG};
use rustix::fs::CWD;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, mount, mount_change,
    move_mount, open_tree,
};

use crate::boot::BOOT_FILE;
use crate::session;
use crate::sys;

/// Where the outer machine is mounted in the namespace of the thread `live` alone.
const OUTER: &str = "/run/hull-host/outer";

/// The directories of the outer machine that commands see directly.
pub(crate) struct Live {
    wanted: Sender<PathBuf>,
    trees: Mutex<(Receiver<Result<OwnedFd>>, BTreeSet<PathBuf>)>,
    packages: AtomicU64,
}

/// Serves commands for the machine's life.
///
/// # Errors
/// When what boot handed over can't be used.
pub(crate) fn run() -> Result<()> {
    let boot = fs::read(BOOT_FILE).with_context(|| format!("read {BOOT_FILE}"))?;
    let boot: Boot = serde_json::from_slice(&boot).context("parse the settings")?;
    let listener = rustix::stdio::stdin()
        .try_clone_to_owned()
        .context("take the listening socket")?;
    let listener = TcpListener::from(listener);
    fs::create_dir_all(OUTER)?;
    let live = Arc::new(Live::mount()?);
    let token: Arc<str> = boot.token.into();
    loop {
        let (caller, _) = listener.accept().context("accept a caller")?;
        let (live, token) = (Arc::clone(&live), Arc::clone(&token));
        thread::Builder::new()
            .name("command".into())
            .spawn(move || answer(caller, &token, &live))
            .context("start a thread for a caller")?;
    }
}

fn answer(caller: TcpStream, token: &str, live: &Live) {
    if let Err(error) = session::run(caller, token, live) {
        eprintln!("hull-host-init: a command's stream: {error:#}");
    }
}

impl Live {
    fn mount() -> Result<Self> {
        let (wanted, requests) = mpsc::channel::<PathBuf>();
        let (answers, trees) = mpsc::channel();
        let keep = move || {
            let outcome = hide_outer();
            while let Ok(below) = requests.recv() {
                let tree = match &outcome {
                    Ok(()) => tree(&below),
                    Err(error) => Err(anyhow!("{error:#}")),
                };
                if answers.send(tree).is_err() {
                    return;
                }
            }
        };
        thread::Builder::new().name("live".into()).spawn(keep)?;
        Ok(Self {
            wanted,
            trees: Mutex::new((trees, BTreeSet::new())),
            packages: AtomicU64::new(0),
        })
    }

    /// Forgets which names the outer root had, after its packages have changed.
    pub(crate) fn refresh(&self, packages: u64) {
        let before = self.packages.swap(packages, Ordering::AcqRel);
        if before != packages && before != 0 {
            // 2: names and inodes that nothing uses (Documentation/admin-guide/sysctl/vm.rst).
            let _dropped = fs::write("/proc/sys/vm/drop_caches", "2");
        }
    }

    /// Shows an outer directory at its own path, once.
    ///
    /// # Errors
    /// When the path isn't absolute, is `/`, or isn't a directory outside.
    pub(crate) fn show(&self, directory: &Path) -> Result<()> {
        let mut state = self.trees.lock().unwrap_or_else(PoisonError::into_inner);
        let (trees, shown) = &mut *state;
        if shown.iter().any(|seen| directory.starts_with(seen)) {
            return Ok(());
        }
        let below = directory
            .strip_prefix("/")
            .context("a live directory must be absolute")?;
        ensure!(below.file_name().is_some(), "the whole root can't be live");
        self.wanted.send(below.to_owned())?;
        let tree = trees
            .recv()?
            .with_context(|| format!("find {} on the outer machine", directory.display()))?;
        fs::create_dir_all(directory).with_context(|| format!("make {}", directory.display()))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(tree.as_fd(), c"", CWD, directory, flags)
            .with_context(|| format!("show {}", directory.display()))?;
        shown.insert(directory.to_owned());
        Ok(())
    }
}

/// Mounts the outer machine, writable, where only the calling thread's namespace has it.
fn hide_outer() -> Result<()> {
    sys::new_mount_namespace().context("make the live mount's namespace")?;
    mount_change(
        "/",
        MountPropagationFlags::REC | MountPropagationFlags::PRIVATE,
    )?;
    mount(LIVE_TAG, OUTER, "virtiofs", MountFlags::empty(), None).context("mount the outer machine")
}

/// A detached copy of a directory of the outer machine.
fn tree(below: &Path) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(CWD, Path::new(OUTER).join(below), flags)?)
}
