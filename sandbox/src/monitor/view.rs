//! What a host's engine meets where it looks for a container by its process: `/proc/PID/root`,
//! `/proc/PID/ns/mnt` and the like, by which files are copied in and out (`podman cp`). They are
//! those of the process's first thread. It stands in the container's root, with its volumes in
//! their places and no right of its own, and waits; another thread is the monitor.
//!
//! Without it, whoever enters the "container" would be in the host's own root. A network namespace
//! that is the container's own and filled by others is made, and read when it is, by this thread,
//! too: until then it keeps the right to (`CAP_NET_ADMIN`).

use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::{Sender, channel};
use std::thread;

use hull_netlink::NetworkError;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{CapabilitySet, LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::exit::CODE_HULL_FAILED;
use crate::names;
use crate::network::{self, Joined, Own};
use crate::plan::Plan;
use crate::rootfs::SharedDirectory;
use crate::store::Entry;
use crate::sys;

use super::jail;

/// A container as it is seen from the host: taken while its monitor may, shown when all of it is
/// made.
pub(super) struct Scene {
    /// An empty place to begin from.
    base: PathBuf,
    root: OwnedFd,
    /// Its volumes, and where they are in it.
    volumes: Vec<(OwnedFd, PathBuf)>,
    network: Network,
}

/// The network that a container's engine meets.
enum Network {
    /// None.
    Empty,
    /// The one that its guest is joined to.
    Joined(OwnedFd),
    /// The first thread's, which waits to be filled.
    Own,
}

impl Scene {
    /// Takes copies of all the mounts of `shares`, the root first.
    pub(super) fn take(entry: &Entry, plan: &Plan, shares: &[SharedDirectory]) -> io::Result<Self> {
        let (root, others) = shares.split_first().ok_or(io::ErrorKind::NotFound)?;
        let glance = plan.glance();
        let mut volumes = Vec::new();
        for share in others {
            let seen = Path::new(hull_proto::SHARES_DIR).join(&share.name);
            for mount in glance.mounts() {
                let below = mount
                    .source()
                    .as_deref()
                    .map(|source| source.strip_prefix(&seen));
                if let Some(Ok(below)) = below {
                    let tree = copy(&share.directory, below)?;
                    volumes.push((tree, mount.destination().clone()));
                }
            }
        }
        let network = match &plan.network {
            Some(path) => Network::Joined(std::fs::File::open(path)?.into()),
            None if plan.makes_network => Network::Own,
            None => Network::Empty,
        };
        Ok(Self {
            base: entry.run.with_file_name(names::MOUNTS),
            root: copy(&root.directory, Path::new(""))?,
            volumes,
            network,
        })
    }

    /// Has this thread stand in it, for good.
    fn enter(self) -> io::Result<()> {
        sys::private_mounts()?;
        attach(&self.root, CWD, &self.base)?;
        fchdir(&self.root)?;
        // The old root is stacked on the new one's place, and `.` then names the upper, old one.
        pivot_root(c".", c".")?;
        unmount(c".", UnmountFlags::DETACH)?;
        chdir(c"/")?;
        for (volume, place) in &self.volumes {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            // What the guest has no place for isn't seen there either.
            if let Ok(target) = openat2(CWD, place, flags, Mode::empty(), ResolveFlags::IN_ROOT) {
                attach(volume, &target, Path::new(""))?;
            }
        }
        sys::unshare(UnshareFlags::NEWIPC | UnshareFlags::NEWUTS)?;
        let rights = match &self.network {
            Network::Joined(network) => {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(network.as_fd(), kind)?;
                CapabilitySet::empty()
            }
            Network::Empty => {
                sys::unshare(UnshareFlags::NEWNET)?;
                CapabilitySet::empty()
            }
            Network::Own => CapabilitySet::NET_ADMIN,
        };
        jail::keep_only(rights).map_err(io::Error::other)
    }
}

type Work = Box<dyn FnOnce() + Send>;

/// The process's first thread, which does what it is told.
#[derive(Clone)]
pub(super) struct View {
    work: Sender<Work>,
}

impl View {
    /// Shows a container; once.
    pub(super) fn show(&self, scene: Scene) -> io::Result<()> {
        self.perform(move || scene.enter())?
    }

    /// Makes a network namespace that others will fill.
    pub(super) fn make_network(&self) -> io::Result<Result<Joined, NetworkError>> {
        self.perform(Own::make)
    }

    /// Ties the guest's cards to what is in that namespace now; once.
    pub(super) fn tie_network(&self, own: Own) -> io::Result<Result<Joined, NetworkError>> {
        self.perform(move || {
            let joined = own.tie();
            if joined.is_ok() {
                // To have fewer needs no right.
                let _ = jail::drop_all_but(CapabilitySet::empty());
            }
            joined
        })
    }

    /// Connects to the name server of that network.
    pub(super) fn reach_resolver(&self) -> io::Result<TcpStream> {
        self.perform(network::reach_resolver)?
    }

    fn perform<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<T> {
        let gone = || io::Error::other("the first thread is gone");
        let (tell, told) = channel();
        // Nobody waits any more: then nobody need know.
        let work = move || drop(tell.send(work()));
        self.work.send(Box::new(work)).map_err(|_| gone())?;
        told.recv().map_err(|_| gone())
    }
}

/// Does `work` on another thread while this one, the process's first, is what is seen.
pub(super) fn beside(work: impl FnOnce(View) -> ExitCode + Send) -> ExitCode {
    let (view, told) = channel::<Work>();
    thread::scope(|scope| {
        let name = thread::Builder::new().name("monitor".to_owned());
        let worker = name.spawn_scoped(scope, || work(View { work: view }));
        while let Ok(work) = told.recv() {
            work();
        }
        match worker {
            // A panic has ended the process.
            Ok(worker) => worker.join().unwrap_or(ExitCode::from(CODE_HULL_FAILED)),
            Err(_) => ExitCode::from(CODE_HULL_FAILED),
        }
    })
}

fn copy(directory: &OwnedFd, below: &Path) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    flags.set(OpenTreeFlags::AT_EMPTY_PATH, below.as_os_str().is_empty());
    Ok(open_tree(directory, below, flags)?)
}

fn attach(tree: &OwnedFd, at: impl AsFd, path: &Path) -> io::Result<()> {
    let mut flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    if path.as_os_str().is_empty() {
        flags |= MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    }
    Ok(move_mount(tree, c"", at, path, flags)?)
}
