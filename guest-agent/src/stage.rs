//! The file systems of a container, made and covered before the container is known, in a place of
//! their own, and then moved into its root.
//!
//! Owns: what of a spec can be made so, and that place. Refuses: what another spec than the expected
//! one says of them; such a container's are made as any other's are, and these go with the place.

use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::fault::{Fault, Tried};
use crate::mounts;
use crate::resolve;
use crate::rootfs::{self, Covers, DEV, cannot_mount};
use crate::spec::{Mount, Spec};

/// Where they are meanwhile, in the sight of one process.
const PLACE: &str = "/run/hull/stage";

/// What is expected of a spec.
#[derive(Debug, Default)]
pub(crate) struct Scenery {
    root: PathBuf,
    /// Those of its mounts that depend on nothing but their own words.
    mounts: Vec<Mount>,
    masked: Vec<String>,
    read_only: Vec<String>,
}

/// File systems that wait for their container.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    scenery: &'a Scenery,
    root: OwnedFd,
    /// Those that lie in no other.
    trees: Vec<(&'a Mount, OwnedFd)>,
}

impl Scenery {
    /// What a spec has that can be made without its root; nothing if what it covers lies elsewhere.
    pub(crate) fn of(spec: &Spec) -> Self {
        let linux = &spec.linux;
        let own = spec.mounts.iter().filter(|mount| is_own(mount));
        let root = spec.root.as_ref().map(|root| root.path.clone());
        let scenery = Self {
            root: root.unwrap_or_default(),
            mounts: own.cloned().collect(),
            masked: linux.masked_paths.clone(),
            read_only: linux.readonly_paths.clone(),
        };
        let lies_in = |path: &Path| {
            let mut mounts = scenery.mounts.iter();
            mounts.any(|mount| path.starts_with(&mount.destination))
        };
        let can_be_covered = scenery.covered().all(lies_in);
        match can_be_covered {
            true => scenery,
            false => Self {
                root: scenery.root,
                ..Self::default()
            },
        }
    }

    fn covered(&self) -> impl Iterator<Item = &Path> {
        self.masked.iter().chain(&self.read_only).map(Path::new)
    }

    /// Makes all of it. For a process that is in the container's namespaces.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub(crate) fn set(&self) -> Result<Stage<'_>, Fault> {
        let what = || format!("cannot make {PLACE}");
        fs::create_dir_all(PLACE).or_internal(what)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::open(PLACE, flags, Mode::empty()).or_internal(what)?;
        let place = place.as_fd();
        // The first of a container's mounts is its root.
        let root = rootfs::bind_root(&self.root)?;
        let mut trees = Vec::new();
        for mount in &self.mounts {
            let path = &mount.destination;
            let made = rootfs::place(place, mount).and_then(|()| resolve::find(place, path));
            let made = made.or_internal(|| cannot_mount(path))?;
            if is_dev(mount) {
                rootfs::make_default_devices(made.as_fd())?;
            }
            let lies_in = |(other, _): &(&Mount, _)| path.starts_with(&other.destination);
            if !trees.iter().any(lies_in) {
                trees.push((mount, made));
            }
        }
        let mut covers = Covers::take()?;
        rootfs::cover(place, &self.read_only, &self.masked, &mut covers)?;
        Ok(Stage {
            scenery: self,
            root,
            trees,
        })
    }
}

impl Stage<'_> {
    /// The root at `path`, if that was expected.
    pub(crate) fn root(&self, path: &Path) -> Option<BorrowedFd<'_>> {
        (self.scenery.root == path).then(|| self.root.as_fd())
    }

    /// What a spec has mounted beside what is here, if that comes to the same: none of it covers
    /// what is here, is covered by it, or lies where it is hidden.
    pub(crate) fn rest_of<'s>(&self, spec: &'s Spec) -> Option<Vec<&'s Mount>> {
        let (scenery, linux) = (self.scenery, &spec.linux);
        if scenery.masked != linux.masked_paths || scenery.read_only != linux.readonly_paths {
            return None;
        }
        let mut rest = Vec::new();
        let mut expected = scenery.mounts.as_slice();
        for mount in &spec.mounts {
            match expected {
                [next, later @ ..] if next == mount => {
                    expected = later;
                    continue;
                }
                _ => rest.push(mount),
            }
            let path = mount.destination.as_path();
            let mut all = scenery.mounts.iter().map(|other| &other.destination);
            let mut later = expected.iter().map(|other| &other.destination);
            let mut covered = scenery.covered();
            if all.any(|other| other.starts_with(path))
                || later.any(|other| path.starts_with(other))
                || covered.any(|other| other.starts_with(path) || path.starts_with(other))
            {
                return None;
            }
        }
        expected.is_empty().then_some(rest)
    }

    /// Whether the devices that every container has are there.
    pub(crate) fn has_devices(&self) -> bool {
        self.scenery.mounts.iter().any(is_dev)
    }

    /// Moves all into `root`.
    ///
    /// # Errors
    /// Refuses a root that has no place for them.
    pub(crate) fn strike(&self, root: BorrowedFd<'_>) -> Result<(), Fault> {
        for (mount, tree) in &self.trees {
            let path = &mount.destination;
            let kind = rootfs::kind_of(mount);
            let moved = kind
                .and_then(|kind| rootfs::directory_for(root, kind, path))
                .and_then(|(target, _)| mounts::attach(tree.as_fd(), target.as_fd()));
            moved.or_refuse(|| cannot_mount(path))?;
        }
        Ok(())
    }
}

/// Whether a mount depends on nothing but its own words.
fn is_own(mount: &Mount) -> bool {
    let options = rootfs::options_of(mount);
    let kind: Result<&str, Errno> = rootfs::kind_of(mount);
    options.bind.is_none()
        && !options.copy_up
        // One without a mode takes that of the directory below it.
        && kind.is_ok_and(|kind| kind != "tmpfs" || options.has("mode"))
        && mount.destination.is_absolute()
        && mount.destination != Path::new("/")
}

fn is_dev(mount: &Mount) -> bool {
    mount.destination == Path::new(DEV)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(mounts: &str, masked: &str) -> Spec {
        let json = format!(
            r#"{{"mounts":[{mounts}],"linux":{{"maskedPaths":[{masked}],"readonlyPaths":["/proc/sys"]}}}}"#
        );
        serde_json::from_str(&json).unwrap()
    }

    const PROC: &str = r#"{"destination":"/proc","type":"proc","source":"proc"}"#;
    const DEVICES: &str = r#"{"destination":"/dev","type":"tmpfs","options":["mode=755"]}"#;
    const CGROUPS: &str = r#"{"destination":"/sys/fs/cgroup","type":"cgroup"}"#;
    const NO_MODE: &str = r#"{"destination":"/run","type":"tmpfs"}"#;

    fn bind(destination: &str) -> String {
        format!(r#"{{"destination":"{destination}","type":"bind","source":"/x"}}"#)
    }

    fn rest<'s>(expected: &Spec, spec: &'s Spec) -> Option<Vec<&'s Mount>> {
        let scenery = Scenery::of(expected);
        let stage = Stage {
            scenery: &scenery,
            root: fs::File::open("/").unwrap().into(),
            trees: Vec::new(),
        };
        stage.rest_of(spec)
    }

    #[test]
    fn what_needs_nothing_of_an_image_is_expected() {
        let all = [PROC, DEVICES, NO_MODE, &bind("/etc/hosts"), CGROUPS].join(",");
        let scenery = Scenery::of(&spec(&all, r#""/proc/keys""#));
        let paths: Vec<_> = scenery.mounts.iter().map(|m| &m.destination).collect();
        assert_eq!(paths, ["/proc", "/dev", "/sys/fs/cgroup"].map(Path::new));
        assert_eq!(scenery.masked, ["/proc/keys"]);
        // What is hidden in an image can't be hidden before.
        let scenery = Scenery::of(&spec(&all, r#""/proc/keys","/etc/secret""#));
        assert!(scenery.mounts.is_empty() && scenery.masked.is_empty());
    }

    #[test]
    fn other_words_or_mounts_that_meet_these_do_not_fit() {
        let masked = r#""/proc/keys""#;
        let expected = spec(&[PROC, DEVICES, CGROUPS].join(","), masked);
        for (more, fits) in [
            ("/data", true),
            ("/dev/fuse", true),
            ("/proc/cmdline", true),
            ("/proc/keys", false),
            ("/proc/sys/net", false),
            ("/proc", false),
            ("/sys", false),
            ("/", false),
            // It would be hidden, and isn't any more.
            ("/sys/fs/cgroup/x", false),
        ] {
            let more = bind(more);
            let among = spec(&[PROC, DEVICES, &more, CGROUPS].join(","), masked);
            let found = rest(&expected, &among);
            assert_eq!(found.is_some(), fits, "{more}");
            assert!(found.is_none_or(|rest| rest == [&among.mounts[2]]));
        }
        let last = spec(
            &[PROC, DEVICES, CGROUPS, &bind("/sys/fs/cgroup/x")].join(","),
            masked,
        );
        assert!(rest(&expected, &last).is_some());
        let other = [
            spec(&[PROC, DEVICES, CGROUPS].join(","), ""),
            spec(&[PROC, DEVICES].join(","), masked),
            spec(&[DEVICES, PROC, CGROUPS].join(","), masked),
            spec(
                &[PROC, &DEVICES.replace("755", "711"), CGROUPS].join(","),
                masked,
            ),
        ];
        assert!(other.iter().all(|other| rest(&expected, other).is_none()));
    }
}
