//! Later containerds than this machine's own: their tasks, their pods.

use hull_tests::hull::Hull;

use super::containerd::{Containerd, IMAGE};
use super::node::Node;

#[test]
fn containerd_1_7_runs_containers_and_pods() {
    of(Containerd::Trixie);
}

#[test]
fn containerd_2_runs_containers_and_pods() {
    of(Containerd::Forky);
}

fn of(whose: Containerd) {
    let Some(hull) = Hull::new() else { return };
    let node = Node::of(&hull, whose);
    let runtime = ["run", "--rm", "--runtime", "io.containerd.hull.v2"];
    let script = "cat; head -c 300000 /dev/zero | wc -c; uname -r >&2; exit 7";
    let command = [IMAGE, "task", "sh", "-c", script];
    let ran = node
        .ctr(&[&runtime[..], &command].concat())
        .stdin("in\n")
        .output();
    let (code, said, errors) = ran.all();
    assert_eq!((code, said.as_str()), (7, "in\n300000\n"), "{errors}");
    let host = rustix::system::uname();
    let host = host.release().to_string_lossy().into_owned();
    assert!(!errors.contains(&host), "{errors}");

    let pod = node.run(node.config("one"));
    let a = pod.start("a", "echo from-a > /f; exec httpd -f -p 127.0.0.1:80 -h /");
    let b = pod.start("b", "echo up; sleep 9999");
    pod.await_log("b", "stdout F up");
    let fetch = "until wget -qO- http://127.0.0.1/f 2>/dev/null; do sleep 0.1; done; hostname";
    assert_eq!(pod.says(&b, fetch), "from-a\none\n");
    assert_eq!(pod.exec(&b, "exit 9").exit_code, 9);
    pod.remove_container(&a);
    assert_eq!(pod.says(&b, "echo still"), "still\n");
    pod.remove();
    node.check();
}
