//! Debian's podman and buildah with Hull as their OCI runtime, in a few whole containers.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use hull_tests::hull::Hull;
use hull_tests::image::{self, Image};
use hull_tests::process::Process;

/// An engine's own storage beside a Hull's.
struct Engine<'a> {
    hull: &'a Hull,
    runtime: PathBuf,
}

impl<'a> Engine<'a> {
    fn new(hull: &'a Hull) -> Self {
        let runtime = hull.path().join("hull-oci");
        // Not by podman's own flags for runtimes: those it forgets when it clears up.
        let program = hull.program().with_file_name("hull-oci");
        let root = hull.path().join("oci");
        let text = format!(
            "#!/bin/sh\nexec {} --root {} \"$@\"\n",
            program.display(),
            root.display()
        );
        fs::write(&runtime, text).unwrap();
        fs::set_permissions(&runtime, fs::Permissions::from_mode(0o755)).unwrap();
        let engine = Self { hull, runtime };
        let archive = hull.path().join("image.tar");
        Image::new().save(&archive);
        engine
            .podman(&["load", "-q", "-i", archive.to_str().unwrap()])
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

    fn podman(&self, words: &[&str]) -> Process {
        let mut argv: Vec<OsString> = vec!["podman".into()];
        argv.extend(self.storage());
        argv.extend(["--runtime".into(), self.runtime.clone().into_os_string()]);
        argv.extend(["--cgroup-manager=cgroupfs", "--events-backend=none"].map(OsString::from));
        argv.extend(words.iter().map(OsString::from));
        self.process(argv)
    }

    fn process(&self, argv: Vec<OsString>) -> Process {
        let config = self.hull.path().join("config.toml");
        if !config.exists() {
            fs::write(&config, "").unwrap();
        }
        Process::new(argv)
            .env("HULL_CONFIG", config.to_string_lossy())
            .env("HULL_STATE_DIR", self.hull.state_dir().to_string_lossy())
            .env("HULL_RUN_DIR", self.hull.run_dir().to_string_lossy())
    }

    fn run(&self, words: &[&str]) -> Process {
        let all = [&["run", "--rm", "--network", "none"], words].concat();
        self.podman(&all)
    }

    /// Nothing is left of any container.
    fn check(&self) {
        let left = self.podman(&["ps", "-aq"]).output().ok();
        assert_eq!(left, "");
        for directory in ["containers", "names"] {
            let path = self.hull.path().join("oci").join(directory);
            let names: Vec<_> = fs::read_dir(path).unwrap().flatten().collect();
            assert!(names.is_empty(), "{names:?}");
        }
    }
}

#[test]
fn a_command_runs_with_its_streams_and_its_code() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let script = "cat; echo err >&2; uname -r; exit 7";
    let ran = engine
        .run(&["-i", image::PLAIN, "sh", "-c", script])
        .stdin("in\n")
        .output();
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy();
    assert_eq!((ran.code, ran.errors().as_str()), (7, "err\n"), "{ran:?}");
    let text = ran.text();
    assert!(text.starts_with("in\n") && !text.contains(&*host), "{text}");
    let missing = engine.run(&[image::PLAIN, "no-such-command"]).output();
    assert_eq!(missing.code, 127, "{:?}", missing.all());
    engine.check();
}

#[test]
fn a_container_in_the_background_is_entered_read_and_stopped() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let script = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    let mut words = vec!["run", "-d", "--network", "none", "--name", "c", "-t"];
    words.extend([image::PLAIN, "sh", "-c", script]);
    engine.podman(&words).output().ok();
    let entered = engine
        .podman(&["exec", "-i", "c", "sh", "-c", "cat; exit 5"])
        .stdin("to exec")
        .output();
    assert_eq!(entered.all(), (5, "to exec".into(), String::new()));
    engine.podman(&["stop", "c"]).output().ok();
    let code = engine.podman(&["inspect", "-f", "{{.State.ExitCode}}", "c"]);
    assert_eq!(code.output().ok().trim(), "3");
    assert_eq!(engine.podman(&["logs", "c"]).output().ok(), "up\r\nbye\r\n");
    engine.podman(&["rm", "c"]).output().ok();
    engine.check();
}

#[test]
fn buildah_runs_each_step_in_a_machine_of_its_own() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let context = hull.path().join("context");
    fs::create_dir(&context).unwrap();
    let text = format!("FROM {}\nRUN echo made > /made\n", image::PLAIN);
    fs::write(context.join("Dockerfile"), text).unwrap();
    let mut argv: Vec<OsString> = vec!["buildah".into()];
    argv.extend(engine.storage());
    argv.extend(["bud", "--isolation", "oci", "--network", "none"].map(OsString::from));
    argv.extend(["--runtime".into(), engine.runtime.clone().into_os_string()]);
    argv.extend(["-q", "-t", "built"].map(OsString::from));
    argv.push(context.into_os_string());
    engine.process(argv).output().ok();
    let made = engine.run(&["localhost/built", "cat", "/made"]).output();
    assert_eq!(made.all(), (0, "made\n".into(), String::new()));
    engine.check();
}
