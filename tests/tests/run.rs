//! `hull run`, from outside.

use hull_tests::hull::Hull;

#[test]
fn hello() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let done = hull.cmd(["run", "--rm", &image, "echo", "hello"]).output();
    assert_eq!(done.all(), (0, "hello\n".into(), String::new()));
}
