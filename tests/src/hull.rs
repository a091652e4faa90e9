//! A Hull of a test's own: its own state, the real command, and nothing left at the end.
//!
//! ```no_run
//! # use hull_tests::hull::Hull;
//! let Some(hull) = Hull::new() else { return };
//! let image = hull.image();
//! let done = hull.cmd(["run", "--rm", &image, "echo", "hello"]).output();
//! assert_eq!(done.all(), (0, "hello\n".into(), String::new()));
//! ```
//!
//! Owns: the directories, the way to the command, the check when it is dropped. Refuses: to reach
//! into Hull by any other way than its commands.

#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "what a fixture can't have ends its test"
)]

use std::env;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::symlink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tempfile::TempDir;

use crate::host;
use crate::image::{self, Image};
use crate::leftovers::Traces;
use crate::process::Process;

/// How long a monitor may live on after its container's command is known to have ended.
const GOODBYE: Duration = Duration::from_secs(20);

/// Where all but [`Hull::apart`] keep their templates: each shape is booted once for all tests.
const TEMPLATES: &str = "hull-test-templates";

/// A Hull with a state of its own, but for the templates. When it is dropped, every container is removed by force, and
/// then nothing may be left.
#[derive(Debug)]
pub struct Hull {
    program: PathBuf,
    directory: TempDir,
    loaded: OnceLock<()>,
    id_files: AtomicU32,
}

impl Hull {
    /// One to use; or none, after saying aloud why the test is skipped.
    ///
    /// # Panics
    /// Instead of a skip where `HULL_REQUIRE_KVM` is 1.
    #[must_use]
    pub fn new() -> Option<Self> {
        let hull = Self::apart()?;
        let shared = env::temp_dir().join(TEMPLATES);
        fs::create_dir_all(&shared).expect("make a directory");
        fs::create_dir_all(hull.state_dir()).expect("make a directory");
        symlink(shared, hull.state_dir().join("templates")).expect("make a link");
        Some(hull)
    }

    /// As [`Self::new`], but it has no template before it makes one.
    ///
    /// # Panics
    /// As [`Self::new`].
    #[must_use]
    pub fn apart() -> Option<Self> {
        let reason = match env::var_os("HULL_BIN") {
            None => "HULL_BIN names no hull (use `cargo xtask test`)",
            Some(_) if !host::is_kvm_real() => "this machine's KVM runs no guests",
            Some(program) => {
                let directory = tempfile::Builder::new()
                    .prefix("hull-")
                    .tempdir()
                    .expect("make a directory");
                return Some(Self {
                    program: program.into(),
                    directory,
                    loaded: OnceLock::new(),
                    id_files: AtomicU32::new(0),
                });
            }
        };
        if env::var_os("HULL_REQUIRE_KVM").is_some_and(|value| value == "1") {
            panic!("{reason}, and HULL_REQUIRE_KVM=1");
        }
        // Not by eprintln: the test harness would keep it to itself.
        let _said = writeln!(io::stderr(), "SKIPPED: {reason}");
        None
    }

    /// The program under test; Hull's others lie beside it.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// A directory of the test's own, on the file system that holds Hull's state.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where Hull keeps what survives a reboot.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.path().join("state")
    }

    /// Where Hull keeps what doesn't.
    #[must_use]
    pub fn run_dir(&self) -> PathBuf {
        self.path().join("run")
    }

    /// The command with these arguments. The id of a container that `run` makes is kept for the
    /// check at the end.
    pub fn cmd<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> Process {
        let mut argv: Vec<OsString> = vec![self.program.clone().into()];
        argv.extend(arguments.into_iter().map(|word| word.as_ref().to_owned()));
        let has_id_file = argv.iter().any(|word| word == "--cidfile");
        if argv.get(1).is_some_and(|word| word == "run") && !has_id_file {
            let number = self.id_files.fetch_add(1, Ordering::Relaxed);
            let directory = self.path().join("ids");
            fs::create_dir_all(&directory).expect("make a directory");
            let file = directory.join(number.to_string()).into_os_string();
            argv.splice(2..2, ["--cidfile".into(), file]);
        }
        let config = self.path().join("config.toml");
        if !config.exists() {
            fs::write(&config, "").expect("write Hull's settings");
        }
        Process::new(argv)
            .env("HULL_CONFIG", config.to_string_lossy())
            .env("HULL_STATE_DIR", self.state_dir().to_string_lossy())
            .env("HULL_RUN_DIR", self.run_dir().to_string_lossy())
    }

    /// The name of the plain image, loaded by the first who asks.
    pub fn image(&self) -> String {
        self.loaded.get_or_init(|| {
            let archive = self.path().join("image.tar");
            Image::new().save(&archive);
            let words = [
                "load".as_ref(),
                "-q".as_ref(),
                "-i".as_ref(),
                archive.as_os_str(),
            ];
            self.cmd(words).output().ok();
            fs::remove_file(&archive).expect("remove the archive");
        });
        image::PLAIN.to_owned()
    }

    /// The name of the image with a whole configuration, loaded by the first who asks.
    pub fn configured_image(&self) -> String {
        self.image();
        image::CONFIGURED.to_owned()
    }

    /// Ids of all the containers that [`Self::cmd`] has made.
    #[must_use]
    pub fn ids(&self) -> Vec<String> {
        let Ok(files) = fs::read_dir(self.path().join("ids")) else {
            return Vec::new();
        };
        files
            .flatten()
            .filter_map(|file| fs::read_to_string(file.path()).ok())
            .map(|id| id.trim().to_owned())
            .filter(|id| !id.is_empty())
            .collect()
    }

    /// What Hull has left on this host: processes, mounts, files, sockets, cgroups. Empty once
    /// every container is removed.
    #[must_use]
    pub fn leftovers(&self) -> Vec<String> {
        self.traces(&self.ids(), |traces| traces.all())
    }

    /// As [`Self::leftovers`], once Hull's last processes have had the time to say goodbye.
    #[must_use]
    pub fn settled_leftovers(&self) -> Vec<String> {
        self.traces(&self.ids(), |traces| {
            traces.await_processes(GOODBYE);
            traces.all()
        })
    }

    /// Process ids of Hull's own that belong to this state.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        self.traces(&self.ids(), |traces| traces.processes())
    }

    fn traces<T>(&self, ids: &[String], look: impl FnOnce(&Traces<'_>) -> T) -> T {
        look(&Traces {
            base: self.path(),
            state: &self.state_dir(),
            run: &self.run_dir(),
            ids,
        })
    }

    /// Removes every container by force; says what was said if that didn't go well.
    fn remove_all(&self) -> Result<(), String> {
        let listed = self.cmd(["ps", "-aq", "--no-trunc"]).output();
        let mut words = vec!["rm".to_owned(), "-f".to_owned()];
        words.extend(listed.text().lines().map(str::to_owned));
        if words.len() == 2 {
            return Ok(());
        }
        let removed = self.cmd(&words).output();
        match removed.code {
            0 => Ok(()),
            _ => Err(format!("hull rm -f failed: {:?}", removed.all())),
        }
    }
}

impl Drop for Hull {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // The first failure is the one to tell.
            let _told = catch_unwind(AssertUnwindSafe(|| self.remove_all()));
            return;
        }
        if let Err(words) = self.remove_all() {
            panic!("{words}");
        }
        let left = self.settled_leftovers();
        assert!(left.is_empty(), "Hull left on this host: {left:#?}");
    }
}
