//! A container by way of containerd: its shims beside each other.
//!
//! Owns: a containerd of its own, in memory. Refuses any other program than a runtime that has a
//! shim there.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::memory;
use crate::programs::Place;
use crate::timing;

/// The image as containerd names it.
const IMAGE: &str = "docker.io/library/bench:latest";
/// What containerd may take to listen.
const LIMIT: Duration = Duration::from_secs(120);

/// A containerd that runs.
pub(crate) struct Containerd<'a> {
    place: &'a Place,
    child: Child,
    runtime: String,
    number: u32,
}

impl<'a> Containerd<'a> {
    /// Starts it and imports the image, for one runtime's containers.
    pub(crate) fn start(place: &'a Place, runtime: &str, log: &Path) -> Result<Self> {
        let at = |name: &str| place.join(name).display().to_string();
        let config = format!(
            "version = 2\nroot = \"{}\"\nstate = \"{}\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.internal.v1.opt\"]\n\
             [grpc]\naddress = \"{}\"\n[ttrpc]\naddress = \"{}\"\n",
            at("containerd/root"),
            at("containerd/state"),
            at("c.sock"),
            at("c.ttrpc"),
        );
        fs::write(place.join("containerd.toml"), config).context("write containerd's settings")?;
        let path = format!(
            "{}:{}:/usr/sbin:/usr/bin:/sbin:/bin",
            at("hull/bin"),
            at("bin")
        );
        let said = || File::create(place.join("containerd.log"));
        let child = Command::new(place.join("bin/containerd"))
            .args(["-c", &at("containerd.toml")])
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(said()?)
            .stderr(said()?)
            .spawn()
            .context("run containerd")?;
        let containerd = Self {
            place,
            child,
            runtime: format!("io.containerd.{runtime}.v2"),
            number: 0,
        };
        let until = Instant::now() + LIMIT;
        while let Err(error) = timing::time(&containerd.ctr(&["version"]), log) {
            ensure!(Instant::now() < until, "no containerd: {error:#}");
        }
        let import = containerd.ctr(&["image", "import", &at("image.tar")]);
        timing::time(&import, log)?;
        Ok(containerd)
    }

    fn ctr(&self, words: &[&str]) -> Vec<String> {
        let program = self.place.join("bin/ctr").display().to_string();
        let socket = self.place.join("c.sock").display().to_string();
        let begin = [program, "--address".to_owned(), socket];
        let words = words.iter().map(|word| (*word).to_owned());
        begin.into_iter().chain(words).collect()
    }

    /// `ctr run` of `true`, from exec to exit, in nanoseconds.
    pub(crate) fn run_true(&mut self, log: &Path) -> Result<u64> {
        self.number += 1;
        let id = format!("true-{}", self.number);
        let run = [
            "run",
            "--rm",
            "--runtime",
            &self.runtime,
            IMAGE,
            &id,
            "true",
        ];
        Ok(timing::time(&self.ctr(&run), log)?.end)
    }

    /// Private bytes of all that a runtime keeps on the host for an idle container, but for the
    /// container's own processes and its guest's memory.
    pub(crate) fn private_bytes(&mut self, log: &Path) -> Result<u64> {
        let id = "idle";
        let run = [
            "run",
            "-d",
            "--runtime",
            &self.runtime,
            IMAGE,
            id,
            "sleep",
            "9999",
        ];
        timing::time(&self.ctr(&run), log)?;
        let sum = kept();
        for words in [&["task", "rm", "-f", id][..], &["container", "rm", id]] {
            timing::time(&self.ctr(words), log)?;
        }
        sum
    }
}

/// The sum over the shims and monitors that there are.
fn kept() -> Result<u64> {
    let mut sum = 0;
    for entry in fs::read_dir("/proc").context("read /proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let Ok(program) = fs::read_link(entry.path().join("exe")) else {
            continue;
        };
        let name = program.file_name().and_then(|name| name.to_str());
        sum += match name.unwrap_or_default() {
            "hull-monitor" => memory::of(pid)?.private,
            name if name.starts_with("containerd-shim-") => memory::whole(pid)?,
            _ => 0,
        };
    }
    ensure!(sum > 0, "no shim is there");
    Ok(sum)
}

impl Drop for Containerd<'_> {
    fn drop(&mut self) {
        // Nothing of it is needed any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
        for name in ["containerd", "c.sock", "c.ttrpc"] {
            let path = self.place.join(name);
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }
}
