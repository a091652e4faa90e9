//! Pods whose sandbox is no container: containerd 2.x with `sandboxer = "shim"`.

use std::collections::HashMap;
use std::thread::{self, JoinHandle};
use std::time::Instant;

use containerd_shim_protos::Client;
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::sandbox_api::{
    PingRequest, SandboxMetricsRequest, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_sync::SandboxClient;
use containerd_shim_protos::ttrpc::context;
use hull_tests::hull::Hull;
use hull_tests::process::{DEADLINE, Process};
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
    let waiting = is_asked(&node, &pod);
    pod.remove();
    let ends = waiting.map(|waiting| waiting.join().unwrap());
    assert_eq!(ends[0].exit_status, 0);
    assert!(ends[0].exited_at.is_some());
    assert_eq!(ends[0], ends[1]);
    node.check();
}

/// What containerd has no command for; leaves two that wait for the end.
fn is_asked(node: &Node<'_>, pod: &Pod<'_>) -> [JoinHandle<WaitSandboxResponse>; 2] {
    let about = format!("{}/k8s.io/{}", node.path("c.sock").display(), pod.id);
    let sum = Process::new(["sha256sum"]).stdin(about).output().ok();
    let name = sum.split_whitespace().next().unwrap();
    let client = Client::connect(&format!("unix:///run/containerd/s/{name}")).unwrap();
    let calls = SandboxClient::new(client);
    let limit = || context::with_duration(DEADLINE);
    let sandbox_id = pod.id.clone();
    let mut ping = PingRequest::default();
    ping.sandbox_id.clone_from(&sandbox_id);
    calls.ping_sandbox(limit(), &ping).unwrap();
    let mut ask = SandboxMetricsRequest::default();
    ask.sandbox_id.clone_from(&sandbox_id);
    let metrics = calls.sandbox_metrics(limit(), &ask).unwrap().metrics;
    let metrics = Metrics::parse_from_bytes(&metrics.data.value).unwrap();
    // Its limit is the machine's memory, of which the kernel has its part.
    let limit_bytes = metrics.memory.usage_limit;
    assert!(
        (256 << 20..320 << 20).contains(&limit_bytes),
        "{limit_bytes}"
    );
    assert!(metrics.memory.usage > 0 && metrics.cpu.usage_usec > 0);
    assert!(metrics.pids.current >= 2, "{}", metrics.pids.current);
    [(); 2].map(|()| {
        let (calls, mut wait) = (calls.clone(), WaitSandboxRequest::default());
        wait.sandbox_id.clone_from(&sandbox_id);
        thread::spawn(move || calls.wait_sandbox(limit(), &wait).unwrap())
    })
}

#[test]
fn containerd_comes_back_to_them() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::of(&hull, Containerd::Forky);
    let pod = node.run_by(BOXED, node.config("one"));
    let a = pod.start("a", "sleep 9999");
    node.restart();
    assert_eq!(state(&node, &pod), PodSandboxState::SandboxReady);
    assert_eq!(pod.says(&a, "echo on"), "on\n");
    let b = pod.start("b", "exit 3");
    assert_eq!(pod.await_exit(&b), 3);
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
