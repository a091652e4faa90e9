//! Debian's podman with Hull as its OCI runtime, in a few whole containers.

use hull_tests::engine::Engine;
use hull_tests::hull::Hull;
use hull_tests::image;

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
