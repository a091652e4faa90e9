//! Debian's podman and buildah with Hull as their OCI runtime, and a storage of a test's own.
//!
//! Owns: their flags, the image that they start with, the check that nothing is left. Refuses: to
//! use the machine's own storage.

#![expect(
    clippy::expect_used,
    reason = "what a fixture can't have ends its test"
)]

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use crate::hull::Hull;
use crate::image::Image;
use crate::process::{Process, install};

/// An engine's own storage beside a Hull's.
#[derive(Debug)]
pub struct Engine<'a> {
    hull: &'a Hull,
    runtime: PathBuf,
}

impl<'a> Engine<'a> {
    /// Engines with an empty storage that holds the plain image.
    ///
    /// # Panics
    /// When they can't have it.
    #[must_use]
    pub fn new(hull: &'a Hull) -> Self {
        let runtime = hull.path().join("hull-oci");
        // Not by podman's own flags for runtimes: those it forgets when it clears up.
        let program = hull.program().with_file_name("hull-oci");
        let root = hull.path().join("oci");
        let text = format!(
            "#!/bin/sh\nexec {} --root {} \"$@\"\n",
            program.display(),
            root.display()
        );
        install(&runtime, text);
        let engine = Self { hull, runtime };
        let archive = hull.path().join("image.tar");
        Image::new().save(&archive);
        engine
            .podman(&[
                "load",
                "-q",
                "-i",
                archive.to_str().expect("a path in UTF-8"),
            ])
            .output()
            .ok();
        engine
    }

    fn storage(&self) -> [OsString; 6] {
        let at = |name: &str| self.hull.path().join(name).into_os_string();
        [
            "--root".into(),
            at("storage"),
            "--runroot".into(),
            at("storage-run"),
            "--storage-driver".into(),
            "vfs".into(),
        ]
    }

    /// podman with these words.
    #[must_use]
    pub fn podman(&self, words: &[&str]) -> Process {
        let mut argv: Vec<OsString> = vec!["podman".into()];
        argv.extend(self.storage());
        argv.extend(["--runtime".into(), self.runtime.clone().into_os_string()]);
        argv.extend(["--cgroup-manager=cgroupfs", "--events-backend=none"].map(OsString::from));
        argv.extend(words.iter().map(OsString::from));
        self.process(argv)
    }

    /// `buildah bud` with these words.
    #[must_use]
    pub fn build(&self, words: &[&str]) -> Process {
        let mut argv: Vec<OsString> = vec!["buildah".into()];
        argv.extend(self.storage());
        argv.extend(["bud", "--isolation", "oci", "--network", "none"].map(OsString::from));
        argv.extend(["--runtime".into(), self.runtime.clone().into_os_string()]);
        argv.extend(words.iter().map(OsString::from));
        self.process(argv)
    }

    fn process(&self, argv: Vec<OsString>) -> Process {
        let config = self.hull.path().join("config.toml");
        if !config.exists() {
            fs::write(&config, "").expect("write Hull's settings");
        }
        let engine = self.hull.path().join("containers.conf");
        if !engine.exists() {
            // Without this word, podman looks for what was set up on this machine before.
            let text = "[network]\nnetwork_backend = \"netavark\"\n";
            fs::write(&engine, text).expect("write the engines' settings");
        }
        Process::new(argv)
            .env("CONTAINERS_CONF", engine.to_string_lossy())
            .env("HULL_CONFIG", config.to_string_lossy())
            .env("HULL_STATE_DIR", self.hull.state_dir().to_string_lossy())
            .env("HULL_RUN_DIR", self.hull.run_dir().to_string_lossy())
    }

    /// `podman run` with these words; nothing stays of the container.
    #[must_use]
    pub fn run(&self, words: &[&str]) -> Process {
        let all = [&["run", "--rm", "--network", "none"], words].concat();
        self.podman(&all)
    }

    /// Nothing is left of any container.
    ///
    /// # Panics
    /// When something is.
    pub fn check(&self) {
        let left = self.podman(&["ps", "-aq"]).output().ok();
        assert_eq!(left, "");
        for directory in ["containers", "names"] {
            let path = self.hull.path().join("oci").join(directory);
            let names: Vec<_> = fs::read_dir(path)
                .expect("list what is left")
                .flatten()
                .collect();
            assert!(names.is_empty(), "{names:?}");
        }
    }
}
