//! Debian's containerd with Hull as the runtime of pods, asked as a kubelet asks.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that can't go on has failed"
)]

mod containerd;
mod kills;
mod memory;
mod node;
mod releases;
mod sandboxes;
mod streams;

use std::fs;

use hull_tests::hull::Hull;
use hull_tests::process::rounds;
use k8s_cri::v1::{
    ContainerStatsRequest, LinuxContainerResources, LinuxContainerSecurityContext, Mount,
    NamespaceMode, NamespaceOption, UpdateContainerResourcesRequest,
};

use node::{Node, Pod};

#[test]
fn a_pods_containers_share_a_machine_and_nothing_else() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let shared = node.path("shared");
    let config = node.path("config");
    for directory in [&shared, &config] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::write(config.join("key"), "value\n").unwrap();
    let mounts = |mine: &str| {
        let mount = |host: String, container: &str, readonly| Mount {
            container_path: container.to_owned(),
            host_path: host,
            readonly,
            ..Default::default()
        };
        vec![
            mount(shared.display().to_string(), mine, false),
            mount(config.display().to_string(), "/config", true),
            mount(config.join("key").display().to_string(), "/etc/key", true),
        ]
    };
    let pod = node.run(node.config("one"));
    let script = "mkdir /w; echo from-a > /w/f; echo a > /dev/shm/a; echo a > /empty/a; \
        echo out; echo err >&2; exec httpd -f -p 127.0.0.1:80 -h /w";
    let a = pod.start_with("a", script, |config| config.mounts = mounts("/empty"));
    let script = "trap 'exit 6' TERM; echo up; while :; do sleep 0.2; done";
    let b = pod.start_with("b", script, |config| config.mounts = mounts("/own"));
    pod.await_log("a", "stderr F err");
    pod.await_log("b", "stdout F up");
    assert!(pod.log("a").contains("stdout F out"), "{}", pod.log("a"));
    let seen = "wget -qO- http://127.0.0.1/f; cat /dev/shm/a /own/a /config/key /etc/key; \
        ls -d /w /empty 2>/dev/null; touch /config/x 2>/dev/null || echo kept; hostname";
    let expected = "from-a\na\na\nvalue\nvalue\nkept\none\n";
    assert_eq!(pod.says(&b, seen), expected);
    let machine = "cat /proc/sys/kernel/random/boot_id";
    assert_eq!(pod.says(&a, machine), pod.says(&b, machine));
    assert_eq!(pod.exec(&b, "exit 9").exit_code, 9);

    is_counted_and_limited(&node, &pod, &b);
    is_reached(&node, &pod, &b);
    is_looked_into(&pod, &b);

    // One that ends is removed, and another takes its place.
    pod.remove_container(&a);
    let c = pod.start("c", "hostname; exit 3");
    pod.await_log("c", "stdout F one");
    assert_eq!(pod.await_exit(&c), 3);
    assert_eq!(pod.says(&b, "echo still"), "still\n");
    pod.remove();
    node.check();
}

fn is_counted_and_limited(node: &Node<'_>, pod: &Pod<'_>, b: &str) {
    let stats = ContainerStatsRequest {
        container_id: b.to_owned(),
    };
    let stats = node
        .wait(node.client.clone().container_stats(stats))
        .stats
        .unwrap();
    let memory = stats.memory.unwrap().working_set_bytes.unwrap().value;
    assert!((1..64 << 20).contains(&memory), "{memory}");
    let update = UpdateContainerResourcesRequest {
        container_id: b.to_owned(),
        linux: Some(LinuxContainerResources {
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        }),
        ..Default::default()
    };
    node.wait(node.client.clone().update_container_resources(update));
    assert_eq!(pod.says(b, "cat /sys/fs/cgroup/memory.max"), "67108864\n");
}

fn is_reached(node: &Node<'_>, pod: &Pod<'_>, b: &str) {
    let mut port = node.forward(pod, 80);
    port.write("GET /f HTTP/1.0\r\n\r\n");
    port.until("\r\n\r\nfrom-a\n");
    let mut terminal = node.exec_on_terminal(b, "read line; stty size; echo got $line; exit 5");
    terminal.resize(33, 44);
    terminal.write("this\n");
    terminal.until("33 44\r\ngot this\r\n");
    let status = terminal.status();
    assert!(status.contains("\"message\":\"5\""), "{status}");
}

/// By a container that is to see another's processes, as `kubectl debug` has it.
fn is_looked_into(pod: &Pod<'_>, b: &str) {
    let target = NamespaceOption {
        pid: NamespaceMode::Target.into(),
        target_id: b.to_owned(),
        ..Default::default()
    };
    let debug = pod.start_with("debug", "ps; hostname", |config| {
        config.linux.as_mut().unwrap().security_context = Some(LinuxContainerSecurityContext {
            namespace_options: Some(target),
            ..Default::default()
        });
    });
    assert_eq!(pod.await_exit(&debug), 0);
    let seen = pod.log("debug");
    assert!(
        seen.contains("trap 'exit 6' TERM") && !seen.contains("httpd"),
        "{seen}"
    );
    assert_eq!(pod.says(b, "echo unharmed"), "unharmed\n");
}

#[test]
fn a_sandbox_is_as_large_as_its_pods_limits() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let mut config = node.config("sized");
    let linux = config.linux.as_mut().unwrap();
    linux.resources = Some(LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 256 << 20,
        ..Default::default()
    });
    let pod = node.run(config);
    let a = pod.start("a", "sleep 9999");
    let said = pod.says(&a, "grep MemTotal /proc/meminfo | tr -dc 0-9; echo; nproc");
    let mut lines = said.lines().map(|line| line.parse::<u64>().unwrap());
    let kib = lines.next().unwrap();
    assert!((240 << 10..304 << 10).contains(&kib), "{kib} KiB");
    assert_eq!(lines.next(), Some(1));
    pod.remove();
    // Again and again: nothing stays.
    for round in 0..rounds(3) {
        let pod = node.run(node.config(&format!("round{round}")));
        let a = pod.start("a", "sleep 9999");
        assert_eq!(pod.says(&a, "echo on"), "on\n");
        pod.remove();
    }
    node.check();
}
