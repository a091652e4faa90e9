//! What a running monitor may still do, seen from outside.

use std::collections::BTreeMap;
use std::fs;

use hull_tests::hull::Hull;

use super::{inspect, start};

/// chown, dac_override, fowner, fsetid, setgid, setuid, mknod, setfcap (linux/capability.h).
const FILE_SERVER: &str = "00000000880000db";
const NONE: &str = "0000000000000000";

#[test]
fn a_monitor_keeps_the_rights_of_a_file_server() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "echo ready; sleep 999";
    start(&hull, &["--name", "j", &image, "sh", "-c", script], "ready");
    let process = format!("/proc/{}", inspect(&hull, "j")["State"]["Pid"]);
    for task in fs::read_dir(format!("{process}/task")).unwrap().flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap();
        let status: BTreeMap<&str, &str> = status
            .lines()
            .filter_map(|line| line.split_once(":\t"))
            .collect();
        for (field, expected) in [
            ("NoNewPrivs", "1"),
            ("CapEff", FILE_SERVER),
            ("CapPrm", FILE_SERVER),
            ("CapBnd", NONE),
            ("CapInh", NONE),
            ("CapAmb", NONE),
        ] {
            assert_eq!(status[field], expected, "{field} of {}", status["Name"]);
        }
    }
    let limits = fs::read_to_string(format!("{process}/limits")).unwrap();
    let core = limits
        .lines()
        .find(|line| line.starts_with("Max core"))
        .unwrap();
    let values: Vec<&str> = core.split_whitespace().skip(4).take(2).collect();
    assert_eq!(values, ["0", "0"], "{core}");
}
