//! What a guest is given to see of the host: directories, put together so that a monitor that dies
//! leaves no mount.
//!
//! What nobody else changes needs one mount at most, the overlay of the image's layers, which is
//! mounted nowhere. All else is put together in a mount namespace of the monitor's own, where it
//! stays as it is whatever the host mounts and unmounts: a copy of all the host's mounts, each of
//! which costs some 10 k instructions.
//!
//! ```text
//! RUN/mnt            a tmpfs, only in this namespace
//!   root             overlay of the image's layers, read-only
//!   v1/file          one file of the host, alone
//! ```
//!
//! Owns the making of these. Refuses to know who serves them to the guest.

mod copy;
mod populate;

use std::ffi::CString;
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use hull_vmm::virtio::fs::KnownBy;
use rustix::fs::{Mode, OFlags, statfs};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, mount, mount_bind_recursive, mount_remount,
};

pub(crate) use copy::{copy_content, copy_run, copy_whole, each_run, next_run};

use crate::names;
use crate::plan::{Export, ExportSource, FILE_NAME, Plan, PlannedRoot};
use crate::store::Entry;
use crate::sys;

/// File systems that can't hold an image's layers, by the magic number that statfs(2)
/// gives (linux/magic.h).
const NO_LAYERS: [(i64, &str); 5] = [
    (0x794c_7630, "overlay"),
    (0x6969, "nfs"),
    (0x0102_1997, "9p"),
    (0x6573_5546, "fuse"),
    (0x4d44, "vfat"),
];

/// What to do about a state directory on one of them.
pub(crate) const FIT_FOR_LAYERS: &str =
    "set state_dir in the settings to a place on ext4, xfs, btrfs or tmpfs";

/// The kind of file system that `path` lies on, if layers can't.
pub(crate) fn unfit_for_layers(path: &Path) -> Option<&'static str> {
    let magic = statfs(path).ok()?.f_type;
    let unfit = NO_LAYERS.iter().find(|(known, _)| *known == magic);
    unfit.map(|(_, kind)| *kind)
}

/// A directory that could not be put together.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RootfsError {
    /// A directory or file could not be opened, made or filled.
    #[error("cannot {action} \"{path}\"")]
    Path {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The namespace could not be had.
    #[error("cannot enter a mount namespace of its own")]
    Namespace(#[source] io::Error),
    /// The overlay could not be mounted.
    #[error("cannot mount an overlay of {layers} layers")]
    Overlay {
        /// How many layers.
        layers: usize,
        /// Why not.
        source: io::Error,
    },
}

fn at(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RootfsError {
    move |source| RootfsError::Path {
        action,
        path: path.to_owned(),
        source,
    }
}

/// One directory of the guest's tree.
#[derive(Debug)]
pub(crate) struct SharedDirectory {
    /// Its name in the tree.
    pub(crate) name: String,
    /// The directory.
    pub(crate) directory: OwnedFd,
    /// Refuses writes.
    pub(crate) read_only: bool,
    /// Nobody but this guest changes it, so the guest may cache it without asking again.
    pub(crate) exclusive: bool,
    /// By what a guest that goes on from a checkpoint finds its files again.
    pub(crate) known_by: KnownBy,
}

/// Puts everything together that `plan` shows, where no other process sees it.
pub(crate) fn assemble(entry: &Entry, plan: &Plan) -> Result<Vec<SharedDirectory>, RootfsError> {
    let mut place = Place::new(entry);
    if !plan.is_guests_alone() {
        // What is opened from here on is a copy's.
        place.path()?;
    }
    let root = root_directory(plan, &mut place)?;
    // The guest writes to its own disk then.
    let has_layers = plan.root.is_guests_alone();
    let path = PathBuf::from(sys::descriptor_path(&root));
    let mut shares = vec![SharedDirectory {
        name: plan.root_name(),
        directory: root,
        read_only: has_layers,
        exclusive: has_layers,
        // A bundle's is another directory, to which its engine has copied what was written.
        known_by: KnownBy::Content,
    }];
    for export in &plan.exports {
        shares.push(share(entry, plan, export, &mut place, &path)?);
    }
    Ok(shares)
}

/// Where mounts have names: in a namespace that only this process is in, from its first use.
struct Place {
    path: PathBuf,
    is_entered: bool,
}

impl Place {
    fn new(entry: &Entry) -> Self {
        Self {
            path: entry.run.with_file_name(names::MOUNTS),
            is_entered: false,
        }
    }

    fn path(&mut self) -> Result<&Path, RootfsError> {
        if !self.is_entered {
            let path = &self.path;
            make(path)?;
            sys::private_mounts().map_err(RootfsError::Namespace)?;
            let options = CString::from(c"mode=0700,size=1m");
            let flags = MountFlags::NODEV | MountFlags::NOSUID;
            mount("hull", path, "tmpfs", flags, options.as_c_str())
                .map_err(|error| at("mount a tmpfs at", path)(error.into()))?;
            self.is_entered = true;
        }
        Ok(&self.path)
    }
}

/// The same directories once more.
pub(crate) fn again(shares: &[SharedDirectory]) -> Result<Vec<SharedDirectory>, RootfsError> {
    let again = |share: &SharedDirectory| {
        let directory = share.directory.try_clone();
        Ok(SharedDirectory {
            name: share.name.clone(),
            directory: directory.map_err(at("open", Path::new(&share.name)))?,
            read_only: share.read_only,
            exclusive: share.exclusive,
            known_by: share.known_by,
        })
    };
    shares.iter().map(again).collect()
}

fn root_directory(plan: &Plan, place: &mut Place) -> Result<OwnedFd, RootfsError> {
    let layers = match &plan.root {
        PlannedRoot::Directory(path) => return open(path),
        // An overlay has two at least.
        PlannedRoot::Layers(layers) => match layers.as_slice() {
            [only] => return open(only),
            layers => layers,
        },
    };
    // Overlayfs wants the highest layer first. Named by descriptor, many layers fit into the one
    // page that mount(2) takes.
    let lowers = layers
        .iter()
        .rev()
        .map(|layer| open(layer))
        .collect::<Result<Vec<OwnedFd>, RootfsError>>()?;
    let names: Vec<String> = lowers.iter().map(sys::descriptor_path).collect();
    let failed = |source| RootfsError::Overlay {
        layers: layers.len(),
        source,
    };
    if !place.is_entered
        && let Some(overlay) = overlay_nowhere(&names).map_err(failed)?
    {
        return Ok(overlay);
    }
    let target = place.path()?.join(plan.root_name());
    make(&target)?;
    let options = format!("lowerdir={}", names.join(":"));
    let options = CString::new(options).map_err(|error| failed(error.into()))?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID | MountFlags::RDONLY;
    mount("hull", &target, "overlay", flags, options.as_c_str())
        .map_err(|error| failed(error.into()))?;
    open(&target)
}

/// An overlay of these layers, the highest first, that has no name; nothing on a host that takes
/// layers only all at once (before Linux 6.8).
fn overlay_nowhere(lowers: &[String]) -> io::Result<Option<OwnedFd>> {
    let overlay = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&overlay, "source", "hull")?;
    for lower in lowers {
        match fsconfig_set_string(&overlay, "lowerdir+", lower) {
            Err(Errno::INVAL) => return Ok(None),
            set => set?,
        }
    }
    fsconfig_set_flag(&overlay, "ro")?;
    fsconfig_create(&overlay)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(Some(fsmount(&overlay, flags, attributes)?))
}

fn share(
    entry: &Entry,
    plan: &Plan,
    export: &Export,
    place: &mut Place,
    root: &Path,
) -> Result<SharedDirectory, RootfsError> {
    let path = match &export.source {
        ExportSource::Directory(path) => path.clone(),
        ExportSource::File(path) => lone_file(path, &place.path()?.join(&export.name), export)?,
        ExportSource::Anonymous(target) => {
            let volumes = entry.directory.join("volumes");
            make(&volumes)?;
            populate::volume(&volumes.join(&export.name), root, target)?
        }
        ExportSource::Identity => identity(entry, plan)?,
    };
    let exclusive = export.source.is_guests_alone();
    Ok(SharedDirectory {
        name: export.name.clone(),
        directory: open(&path)?,
        read_only: export.read_only,
        exclusive,
        known_by: match exclusive {
            true => KnownBy::Content,
            // What an engine binds is its own to change and to replace.
            false if plan.bundle.is_some() => KnownBy::Path,
            false => KnownBy::Inode,
        },
    })
}

/// Binds `file` into a directory of its own, so that the guest never sees its neighbours.
fn lone_file(file: &Path, directory: &Path, export: &Export) -> Result<PathBuf, RootfsError> {
    make(directory)?;
    let place = directory.join(FILE_NAME);
    File::create(&place).map_err(at("create", &place))?;
    mount_bind_recursive(file, &place).map_err(|error| at("bind", file)(error.into()))?;
    if export.read_only {
        let flags = MountFlags::BIND | MountFlags::RDONLY;
        mount_remount(&place, flags, "")
            .map_err(|error| at("make read-only", file)(error.into()))?;
    }
    Ok(directory.to_owned())
}

/// `hostname`, `hosts` and `resolv.conf`, written at the first start and the container's from
/// then on.
fn identity(entry: &Entry, plan: &Plan) -> Result<PathBuf, RootfsError> {
    let directory = entry.directory.join("identity");
    if directory.is_dir() {
        return Ok(directory);
    }
    let fresh = entry.directory.join("identity.new");
    make(&fresh)?;
    let name = &plan.hostname;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{name}\n"
    );
    for (file, text) in [
        ("hostname", format!("{name}\n")),
        ("hosts", hosts),
        ("resolv.conf", resolvers(plan)),
    ] {
        let path = fresh.join(file);
        let write = || {
            let mut options = File::options();
            let options = options.write(true).create(true).truncate(true).mode(0o644);
            io::Write::write_all(&mut options.open(&path)?, text.as_bytes())
        };
        write().map_err(at("write", &path))?;
    }
    fs::rename(&fresh, &directory).map_err(at("rename", &fresh))?;
    Ok(directory)
}

/// Who answers for names: whom the host asks, but for those that listen on the host alone. A
/// namespace of ip(8)'s may have a file of its own. Without a network there is nobody to ask.
fn resolvers(plan: &Plan) -> String {
    let Some(namespace) = &plan.network else {
        return String::new();
    };
    let own = namespace
        .file_name()
        .map(|name| Path::new("/etc/netns").join(name).join("resolv.conf"));
    if let Some(text) = own.and_then(|own| fs::read_to_string(own).ok()) {
        return text;
    }
    // The second is systemd-resolved's, behind the local address that the first may name.
    let texts = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"]
        .map(|path| reachable(&fs::read_to_string(path).unwrap_or_default()));
    let [first, second] = texts;
    if first.contains("nameserver") || second.is_empty() {
        first
    } else {
        second
    }
}

/// A resolv.conf(5) without the name servers that only the host itself reaches.
fn reachable(text: &str) -> String {
    let is_local = |line: &&str| {
        let mut words = line.split_whitespace();
        words.next() == Some("nameserver")
            && words.next().is_some_and(|word| {
                let address = word.parse::<std::net::IpAddr>();
                address.is_ok_and(|address| address.is_loopback())
            })
    };
    let kept = text.lines().filter(|line| !is_local(line));
    kept.flat_map(|line| [line, "\n"]).collect()
}

fn make(path: &Path) -> Result<(), RootfsError> {
    make_mode(path, 0o700)
}

fn make_mode(path: &Path, mode: u32) -> Result<(), RootfsError> {
    DirBuilder::new()
        .recursive(true)
        .mode(mode)
        .create(path)
        .map_err(at("create", path))
}

fn open(path: &Path) -> Result<OwnedFd, RootfsError> {
    let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty())
        .map_err(|error| at("open directory", path)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_of_the_host_alone_are_left_out() {
        let text = "search a\nnameserver 127.0.0.53\n nameserver ::1\nnameserver 10.0.0.1\n";
        assert_eq!(reachable(text), "search a\nnameserver 10.0.0.1\n");
    }
}
