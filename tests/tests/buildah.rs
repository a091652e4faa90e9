//! Debian's buildah with Hull as its OCI runtime.

use std::fs;

use hull_tests::engine::Engine;
use hull_tests::hull::Hull;
use hull_tests::image;

#[test]
fn buildah_runs_each_step_in_a_machine_of_its_own() {
    let Some(hull) = Hull::new() else { return };
    let engine = Engine::new(&hull);
    let context = hull.path().join("context");
    fs::create_dir(&context).unwrap();
    let text = format!("FROM {}\nRUN echo made > /made\n", image::PLAIN);
    fs::write(context.join("Dockerfile"), text).unwrap();
    let context = context.to_str().unwrap();
    engine.build(&["-q", "-t", "built", context]).output().ok();
    let made = engine.run(&["localhost/built", "cat", "/made"]).output();
    assert_eq!(made.all(), (0, "made\n".into(), String::new()));
    engine.check();
}
