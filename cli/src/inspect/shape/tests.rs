//! The object of a container in each of its states.

use hull_sandbox::{ExitRecord, PlannedImage, Running};

use super::*;

fn plan() -> Plan {
    let shares = hull_proto::SHARES_DIR;
    let spec = json!({
        "ociVersion": "1.2.0",
        "process": {
            "cwd": "/srv", "args": ["sh", "-c", "true"], "env": ["A=1"],
            "user": { "uid": 1, "gid": 2 },
        },
        "root": { "path": format!("{shares}/root"), "readonly": true },
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            { "destination": "/etc/hosts", "source": format!("{shares}/identity/hosts") },
            { "destination": "/data", "source": format!("{shares}/v0") },
            { "destination": "/file", "source": format!("{shares}/v1/file") },
            { "destination": "/own", "source": format!("{shares}/v2") },
        ],
    });
    let export = |name: &str, source, read_only| Export {
        name: name.into(),
        source,
        read_only,
    };
    Plan {
        generation: Plan::GENERATION,
        id: "0".repeat(64),
        name: "name".into(),
        created_at: "2026-01-01T00:00:00Z".parse().unwrap(),
        hostname: "host".into(),
        image: Some(image()),
        labels: [("k".to_owned(), "v".to_owned())].into(),
        vm: serde_json::from_value(json!({
            "vcpus": 2, "cpu_quota": 1.5, "memory_bytes": 512 << 20, "kernel": "/k",
            "initrd": "/i", "cmdline": "quiet", "debug": false, "kvm": "/dev/kvm",
            "allow_emulated_kvm": false, "boot_timeout_s": 60,
        }))
        .unwrap(),
        root: PlannedRoot::Layers(vec!["/layer".into()]),
        network: None,
        makes_network: false,
        exports: vec![
            export("identity", ExportSource::Identity, false),
            export("v0", ExportSource::Directory("/host/data".into()), true),
            export("v1", ExportSource::File("/host/file".into()), false),
            export("v2", ExportSource::Anonymous("/own".into()), false),
        ],
        spec: serde_json::from_str(&spec.to_string()).unwrap(),
        init: false,
        tty: true,
        interactive: false,
        stop_signal: 15,
        stop_timeout_s: 10,
        guest_id: None,
        held: false,
        bundle: None,
        sandbox: None,
        cgroup: None,
        limits: None,
        auto_remove: false,
        log_limit_bytes: 1,
    }
}

fn image() -> PlannedImage {
    PlannedImage {
        reference: "thing:1".into(),
        id: "sha256:1".into(),
    }
}

fn described(status: &Status) -> Value {
    describe(
        &plan(),
        status,
        &json!({"attached": 1, "jail": ["seccomp"]}),
        &json!("/s"),
    )
}

#[test]
fn a_running_container_has_its_monitor_as_pid() {
    let seen = described(&Status::Running(Running {
        monitor_pid: 7,
        guest_pid: 3,
        started_at: "2026-01-01T00:00:01Z".parse().unwrap(),
        phase: hull_sandbox::Phase::Running,
        kernel: "6.12.1".into(),
    }));
    let state = &seen["State"];
    assert_eq!(
        (&state["Status"], &state["Pid"]),
        (&json!("running"), &json!(7))
    );
    assert_eq!(state["FinishedAt"], NEVER);
    assert_eq!(seen["Name"], "/name");
    assert_eq!(seen["Args"], json!(["-c", "true"]));
    assert_eq!(seen["Hull"]["Kernel"], "6.12.1");
    assert_eq!(seen["Hull"]["Jail"], json!(["seccomp"]));
}

#[test]
fn volumes_have_the_hosts_paths_and_system_mounts_are_none() {
    let seen = described(&Status::Created);
    assert_eq!(
        seen["HostConfig"]["Binds"],
        json!(["/host/data:/data:ro", "/host/file:/file:rw"])
    );
    let mounts = seen["Mounts"].as_array().unwrap();
    let kinds: Vec<_> = mounts
        .iter()
        .map(|m| (&m["Type"], &m["Destination"]))
        .collect();
    assert_eq!(
        json!(kinds),
        json!([["bind", "/data"], ["bind", "/file"], ["volume", "/own"]])
    );
    assert_eq!(seen["HostConfig"]["NanoCpus"], 1_500_000_000_u64);
    assert_eq!(seen["HostConfig"]["ReadonlyRootfs"], true);
    assert_eq!(seen["Config"]["User"], "1:2");
    assert_eq!(seen["Config"]["StopSignal"], "SIGTERM");
}

#[test]
fn limits_are_those_that_it_was_updated_to() {
    let limits = json!({
        "guest": {"memory": {"limit": 64 << 20}, "cpu": {"quota": 25_000, "period": 100_000}},
        "host": [["cpu.max", "25000 100000"], ["cpuset.cpus", "0-1"]],
    });
    let plan = Plan {
        limits: serde_json::from_value(limits).unwrap(),
        ..plan()
    };
    let seen = host_config(&plan, &Value::Null);
    assert_eq!(
        (&seen["Memory"], &seen["NanoCpus"], &seen["CpusetCpus"]),
        (&json!(64 << 20), &json!(250_000_000), &json!("0-1"))
    );
    assert_eq!(
        (&seen["CpuShares"], &seen["PidsLimit"]),
        (&json!(0), &Value::Null)
    );
}

#[test]
fn an_end_is_told_with_its_cause() {
    let seen = described(&Status::Exited(ExitRecord {
        code: 137,
        signal: Some(9),
        oom: true,
        started_at: None,
        finished_at: "2026-01-01T00:00:02Z".parse().unwrap(),
        error: Some("why".into()),
    }));
    let state = &seen["State"];
    assert_eq!(
        (&state["ExitCode"], &state["OOMKilled"]),
        (&json!(137), &json!(true))
    );
    assert_eq!(
        (&state["Error"], &state["StartedAt"]),
        (&json!("why"), &json!(NEVER))
    );
    assert_eq!(
        (&state["Running"], &state["Pid"]),
        (&json!(false), &json!(0))
    );
}
