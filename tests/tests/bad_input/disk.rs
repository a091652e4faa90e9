//! Disks that are full, while loading, while pulling, while running.

use std::fs;
use std::path::{Path, PathBuf};

use hull_tests::hull::Hull;
use hull_tests::process::Process;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

use super::archive::{Tar, archive};
use super::refused;
use super::registry::{Content, Registry};

/// A small disk where Hull keeps its state. Dropped before its Hull is, as that must find no mount.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn new(hull: &Hull, size: &str) -> Self {
        let place = hull.state_dir();
        fs::create_dir_all(&place).unwrap();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        mount(
            "small",
            &place,
            "tmpfs",
            MountFlags::empty(),
            options.as_c_str(),
        )
        .unwrap();
        Self(place)
    }

    /// Makes it larger.
    fn grow(&self, size: &str) {
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        mount_remount(&self.0, MountFlags::empty(), options.as_c_str()).unwrap();
    }

    /// Leaves no byte free.
    fn fill(&self) {
        let to = format!("of={}", self.0.join("filler").display());
        let filled = Process::new(["dd", "if=/dev/zero", &to, "bs=4k"]).output();
        assert!(
            filled.errors().contains("No space left"),
            "{}",
            filled.errors()
        );
    }

    fn empty(&self) {
        fs::remove_file(self.0.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Monitors that are about to exit have their own copy of it.
        let gone = unmount(&self.0, UnmountFlags::DETACH);
        assert!(gone.is_ok() || std::thread::panicking(), "{gone:?}");
    }
}

/// Bytes that the files of the store take.
fn content(state: &Path) -> u64 {
    let parts = ["blobs/sha256", "ingest", "layers", "unpack"];
    let entries = parts.map(|part| fs::read_dir(state.join("images").join(part)).unwrap());
    let sizes = entries.into_iter().flatten();
    sizes
        .map(|entry| entry.unwrap().metadata().unwrap().len())
        .sum()
}

#[test]
fn full_while_loading_and_pulling() {
    let Some(hull) = Hull::new() else { return };
    let disk = SmallDisk::new(&hull, "4m");
    let big = Tar::default()
        .file("f", &"sixteen letters!".repeat(384 << 10))
        .finish();
    let loaded = hull
        .cmd(["load", "-q"])
        .stdin(archive("big:1", &big))
        .output();
    let words = ["no room in", "hull image prune", "No space left on device"];
    refused(&loaded, 1, &words);
    assert_eq!(content(&disk.0), 0);
    // What is small enough still fits.
    let small = archive("small:1", &Tar::default().file("f", "fits").finish());
    let loaded = hull.cmd(["load"]).stdin(small).output();
    assert_eq!(loaded.ok(), "Loaded image: small:1\n");
    let images = hull.cmd(["images", "-aq"]).output().ok();
    let before = content(&disk.0);
    let noise = Content::new(&big);
    let registry = Registry::serve(move |path| noise.honest(path));
    let name = registry.name("a/b:1");
    let pulled = hull.cmd(["pull", "-q", &name]).output();
    refused(&pulled, 1, &words);
    assert_eq!(content(&disk.0), before);
    let ran = hull.cmd(["run", "--rm", "-q", &name]).output();
    refused(&ran, 125, &words);
    assert_eq!(content(&disk.0), before);
    // What an interrupted pull left goes when asked to, and only then.
    let partial = disk.0.join("images/ingest").join("a".repeat(64));
    fs::write(&partial, "half").unwrap();
    assert_eq!(hull.cmd(["images", "-aq"]).output().ok(), images);
    assert!(partial.exists());
    let pruned = hull.cmd(["image", "prune", "-f"]).output();
    assert_eq!(pruned.ok(), "Total reclaimed space: 4B\n");
    assert!(!partial.exists());
    assert_eq!(hull.cmd(["images", "-aq"]).output().ok(), images);
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    drop(disk);
}

#[test]
fn full_while_running() {
    let Some(hull) = Hull::new() else { return };
    let disk = SmallDisk::new(&hull, "24m");
    let image = hull.image();
    // The guest's disk is larger than the host's: what the host can't take is an error of the
    // disk's. What was synced before is there when there is room again.
    let script = "cat /before && exit; echo x > /before; sync; \
        dd if=/dev/zero of=/fill bs=64k count=800 conv=fsync; echo dd: $?";
    let words = ["run", "--name", "filler", &image, "sh", "-c", script];
    let ran = hull.cmd(words).output();
    assert_eq!(ran.code, 0, "{:?}", ran.all());
    assert_eq!(ran.text(), "dd: 1\n");
    assert!(ran.errors().contains("error"), "{}", ran.errors());
    disk.grow("96m");
    let started = hull.cmd(["start", "-a", "filler"]).output();
    assert_eq!(started.all(), (0, "x\n".into(), String::new()));
    // With nothing left at all, a start is refused, and what is there can be removed.
    disk.fill();
    let ran = hull.cmd(["run", "--rm", &image, "true"]).output();
    refused(&ran, 125, &["No space left on device"]);
    assert_eq!(hull.cmd(["rm", "filler"]).output().ok(), "filler\n");
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    disk.empty();
    let ran = hull.cmd(["run", "--rm", &image, "echo", "room"]).output();
    assert_eq!(ran.all(), (0, "room\n".into(), String::new()));
    drop(disk);
}
