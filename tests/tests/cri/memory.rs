//! A pod's machine has as much memory as its containers may use, whatever it was started with.

use k8s_cri::v1::{LinuxContainerResources, UpdateContainerResourcesRequest};

use hull_tests::hull::Hull;

use super::node::{Node, Pod};

fn limit(mib: i64) -> LinuxContainerResources {
    LinuxContainerResources {
        memory_limit_in_bytes: mib << 20,
        ..Default::default()
    }
}

/// Whether a container can have so much memory filled at once.
fn fills(pod: &Pod<'_>, container: &str, mib: u32) -> bool {
    let script = format!("dd if=/dev/zero of=/dev/null bs={mib}M count=1 2>/dev/null");
    pod.exec(container, &script).exit_code == 0
}

#[test]
fn a_pod_grows_with_its_containers_and_shrinks_when_they_go() {
    let Some(hull) = Hull::new() else { return };
    let node = Node::new(&hull);
    let mut config = node.config("grows");
    config.linux.as_mut().unwrap().resources = Some(limit(64));
    let pod = node.run(config);
    let bounded = |name: &str, mib| {
        pod.start_with(name, "sleep 9999", |config| {
            config.linux.as_mut().unwrap().resources = Some(limit(mib));
        })
    };
    let small = bounded("small", 32);
    let total = || {
        let script = "grep MemTotal /proc/meminfo | tr -dc 0-9";
        pod.says(&small, script).parse::<u64>().unwrap() >> 10
    };
    let first = total();
    assert!(first < 128, "{first} MiB");

    let large = bounded("large", 256);
    assert!(total() > 288, "{} MiB", total());
    assert!(fills(&pod, &large, 200));
    assert!(!fills(&pod, &large, 300));
    let update = UpdateContainerResourcesRequest {
        container_id: large.clone(),
        linux: Some(limit(400)),
        ..Default::default()
    };
    node.wait(node.client.clone().update_container_resources(update));
    assert!(fills(&pod, &large, 300));

    pod.remove_container(&large);
    let script = format!(
        "until [ $(grep MemTotal /proc/meminfo | tr -dc 0-9) -lt {} ]; do sleep 0.1; done",
        (first + 32) << 10
    );
    pod.says(&small, &script);
    pod.remove();
    node.check();
}
