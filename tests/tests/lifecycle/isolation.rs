//! Containers beside each other.

use hull_tests::hull::Hull;

use super::{inspect, start};

#[test]
fn two_at_once_know_nothing_of_each_other() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo $0 > /tmp/mine; echo ready; sleep 1000 & wait";
    for name in ["red", "blue"] {
        start(
            &hull,
            &["--name", name, &image, "sh", "-c", script, name],
            "ready",
        );
    }
    assert_eq!(hull.cmd(["ps", "-q"]).output().ok().lines().count(), 2);
    let look =
        "cat /tmp/mine /proc/sys/kernel/random/boot_id; hostname; ps -o args | grep -c '[b]lue'
                ls /sys/class/net";
    let said = ["red", "blue"].map(|name| {
        let done = hull.cmd(["exec", name, "sh", "-c", look]).output();
        done.text().lines().map(str::to_owned).collect::<Vec<_>>()
    });
    let [red, blue] = &said;
    assert_eq!((red[0].as_str(), blue[0].as_str()), ("red", "blue"));
    assert_ne!(red[1], blue[1], "two kernels were booted");
    assert_ne!(red[2], blue[2]);
    assert_eq!((red[3].as_str(), blue[3].as_str()), ("0", "1"));
    assert_eq!(red[4..], ["lo"]);

    let pids = ["red", "blue"].map(|name| inspect(&hull, name)["State"]["Pid"].clone());
    assert_ne!(pids[0], pids[1]);
    hull.cmd(["rm", "-f", "red"]).output().ok();
    let left = hull.cmd(["exec", "blue", "cat", "/tmp/mine"]).output();
    assert_eq!(left.ok(), "blue\n");
}
