//! Pods whose sandbox is no container: containerd 2.x with `sandboxer = "shim"`.

use std::collections::HashMap;
use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::process::DEADLINE;
use k8s_cri::v1::{DnsConfig, LinuxContainerResources, PodSandboxState, PodSandboxStatusRequest};

use super::containerd::{BOXED, Containerd};
use super::kills::kill;
use super::node::{Node, Pod};

#[test]
fn a_sandbox_of_its_own_needs_no_container() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::of(&hull, Containerd::Forky);
    let mut config = node.config("one");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.99.0.1".to_owned()],
        searches: vec!["pods.test".to_owned()],
        options: vec!["ndots:3".to_owned()],
    });
    let linux = config.linux.as_mut().unwrap();
    linux.sysctls = HashMap::from([("kernel.shm_rmid_forced".to_owned(), "1".to_owned())]);
    linux.resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: 256 << 20,
        ..Default::default()
    });
    let pod = node.run_by(BOXED, config);
    assert_eq!(state(&node, &pod), PodSandboxState::SandboxReady);
    let script = "echo from-a > /f; echo a > /dev/shm/a; echo out; echo err >&2; \
        exec httpd -f -p 127.0.0.1:80 -h /";
    let a = pod.start("a", script);
    let b = pod.start(
        "b",
        "trap 'exit 6' TERM; echo up; while :; do sleep 0.2; done",
    );
    pod.await_log("a", "stderr F err");
    pod.await_log("b", "stdout F up");
    let fetch = "until wget -qO- http://127.0.0.1/f 2>/dev/null; do sleep 0.1; done; \
        cat /dev/shm/a; hostname; cat /etc/hostname /etc/resolv.conf /proc/sys/kernel/shm_rmid_forced";
    let expected = "from-a\na\none\none\n\
        search pods.test\nnameserver 10.99.0.1\noptions ndots:3\n1\n";
    assert_eq!(pod.says(&b, fetch), expected);
    let machine = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(pod.says(&a, machine), pod.says(&b, machine));
    let memory = pod.says(&b, "grep MemTotal /proc/meminfo | tr -dc 0-9");
    let kib: u64 = memory.parse().unwrap();
    assert!((240 << 10..304 << 10).contains(&kib), "{kib} KiB");

    super::is_counted_and_limited(&node, &pod, &b);
    super::is_reached(&node, &pod, &b);
    super::is_looked_into(&pod, &b);

    pod.remove_container(&a);
    let c = pod.start("c", "hostname; exit 3");
    pod.await_log("c", "stdout F one");
    assert_eq!(pod.await_exit(&c), 3);
    pod.remove();
    node.check();
}

#[test]
fn nothing_is_left_of_one_whose_processes_are_killed() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::of(&hull, Containerd::Forky);
    for program in ["hull-monitor", "containerd-shim-hull"] {
        let pod = node.run_by(BOXED, node.config("one"));
        let a = pod.start("a", "sleep 9999");
        kill(program, &pod.id);
        assert_ne!(pod.await_exit(&a), 0, "{program}");
        let until = Instant::now() + DEADLINE;
        while state(&node, &pod) != PodSandboxState::SandboxNotready {
            assert!(Instant::now() < until, "{program}");
        }
        pod.remove();
        node.check();
    }
}

fn state(node: &Node<'_>, pod: &Pod<'_>) -> PodSandboxState {
    let request = PodSandboxStatusRequest {
        pod_sandbox_id: pod.id.clone(),
        verbose: true,
    };
    let known = node.wait(node.client.clone().pod_sandbox_status(request));
    known.status.unwrap().state()
}
