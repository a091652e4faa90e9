//! What becomes of a pod whose processes on the host are killed, and what is left of it.

use hull_tests::hull::Hull;
use hull_tests::process::Process;
use rustix::process::{Pid, Signal, kill_process};

use super::node::Node;

/// The process on the host that a word of its command line and a container's id are of.
fn process(program: &str, id: &str) -> Pid {
    let listed = Process::new(["ps", "-eo", "pid,args"]).output().ok();
    let mut lines = listed.lines().map(str::trim);
    let line = lines.find(|line| line.contains(program) && line.contains(id));
    let pid = line.and_then(|line| line.split(' ').next()?.parse().ok());
    Pid::from_raw(pid.unwrap_or_else(|| panic!("no {program} of {id} in {listed}"))).unwrap()
}

pub(crate) fn kill(program: &str, id: &str) {
    kill_process(process(program, id), Signal::KILL).unwrap();
}

#[test]
fn one_whose_monitor_is_killed_goes_alone() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let pod = node.run(node.config("one"));
    let a = pod.start("a", "echo up; sleep 9999");
    let b = pod.start("b", "echo up; httpd -f -p 127.0.0.1:80 & sleep 9999");
    pod.await_log("b", "up");
    let script = "until netstat -ltn | grep -q :80; do sleep 0.1; done; echo taken";
    assert_eq!(pod.says(&a, script), "taken\n");
    kill("hull-monitor", &b);
    assert_eq!(pod.await_exit(&b), 137);
    // Its processes have ended in the guest as well: the port is free again.
    let script = "while netstat -ltn | grep -q :80; do sleep 0.1; done; echo free";
    assert_eq!(pod.says(&a, script), "free\n");
    let c = pod.start("c", "exit 2");
    assert_eq!(pod.await_exit(&c), 2);
    pod.remove();
    node.check();
}

#[test]
fn all_go_with_the_sandboxs_monitor() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let pod = node.run(node.config("one"));
    let a = pod.start("a", "sleep 9999");
    kill("hull-monitor", &pod.id);
    assert_ne!(pod.await_exit(&a), 0);
    pod.remove();
    node.check();
}

#[test]
fn nothing_is_left_of_a_pod_whose_shim_is_killed() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let pod = node.run(node.config("one"));
    let a = pod.start("a", "sleep 9999");
    kill("containerd-shim-hull", &pod.id);
    // Containerd itself has a code for those whose shim is gone.
    assert_ne!(pod.await_exit(&a), 0);
    pod.remove();
    node.check();
}
