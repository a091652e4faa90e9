//! Limits that mean what they say: seen inside, changed while the container runs, held on the
//! host, and told apart when they are hit.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::{DEADLINE, Process, Running};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Prints its limits, and again for every line that it reads.
const LIMITS: &str = "cd /sys/fs/cgroup; show() { cat memory.max pids.max cpu.max; echo shown; }
                      show; while read line; do show; done";

/// A bundle of a Hull's, and the runtime that runs it.
struct Bundle<'a> {
    hull: &'a Hull,
    id: String,
    /// Its cgroup on the host, if it has one.
    cgroup: PathBuf,
}

impl<'a> Bundle<'a> {
    fn new(hull: &'a Hull, name: &str, script: &str, linux: &Value) -> Self {
        let bundle = Self {
            hull,
            id: format!("{name}-{}", std::process::id()),
            cgroup: PathBuf::new(),
        };
        let directory = bundle.directory();
        Image::new().unpack(&directory.join("rootfs"));
        let words = ["spec".to_owned(), "-b".to_owned(), text(&directory)];
        bundle.oci(&words).output().ok();
        let file = directory.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        config["process"]["args"] = json!(["sh", "-c", script]);
        config["process"]["terminal"] = json!(false);
        for (key, value) in linux.as_object().unwrap() {
            config["linux"][key] = value.clone();
        }
        fs::write(&file, config.to_string()).unwrap();
        bundle
    }

    /// As [`Self::new`], in a cgroup of the test's own.
    fn in_cgroup(hull: &'a Hull, name: &str, script: &str, resources: &Value) -> Self {
        let path = format!("/hull-test-{}/{name}", std::process::id());
        let linux = json!({"cgroupsPath": path, "resources": resources});
        Self {
            cgroup: Path::new("/sys/fs/cgroup").join(&path[1..]),
            ..Self::new(hull, name, script, &linux)
        }
    }

    fn directory(&self) -> PathBuf {
        self.hull.path().join(&self.id)
    }

    fn oci<T: AsRef<str>>(&self, words: &[T]) -> Process {
        let config = self.hull.path().join("config.toml");
        fs::write(&config, "").unwrap();
        let program = self.hull.program().with_file_name("hull-oci");
        let mut argv = vec![
            text(&program),
            "--root".into(),
            text(&self.hull.path().join("oci")),
        ];
        argv.extend(words.iter().map(|word| word.as_ref().to_owned()));
        Process::new(argv)
            .env("HULL_CONFIG", text(&config))
            .env("HULL_STATE_DIR", text(&self.hull.state_dir()))
            .env("HULL_RUN_DIR", text(&self.hull.run_dir()))
    }

    /// Runs it in the foreground.
    fn run(&self) -> Running {
        let directory = text(&self.directory());
        self.oci(&["run", "-b", &directory, &self.id])
            .stdin_open()
            .spawn()
    }

    /// A command about it; the id comes last.
    fn about(&self, words: &[&str]) -> Process {
        self.oci(&[words, &[&self.id]].concat())
    }

    fn stats(&self) -> Value {
        let line = self.about(&["events", "--stats"]).output().ok();
        let event: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&event["type"], &event["id"]),
            (&json!("stats"), &json!(self.id))
        );
        event["data"].clone()
    }

    fn monitor(&self) -> Pid {
        let state: Value = serde_json::from_str(&self.about(&["state"]).output().ok()).unwrap();
        let pid = i32::try_from(state["pid"].as_i64().unwrap()).unwrap();
        Pid::from_raw(pid).unwrap()
    }

    fn host(&self, file: &str) -> String {
        fs::read_to_string(self.cgroup.join(file)).unwrap()
    }

    /// Nothing is left of it on the host.
    fn check(&self) {
        assert!(!self.cgroup.exists(), "{:?} is left", self.cgroup);
        // The cgroup above is the test's to remove, as an engine's is the engine's.
        let _still_used = fs::remove_dir(self.cgroup.parent().unwrap());
    }
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

#[test]
fn limits_are_seen_and_change_while_the_container_runs() {
    let Some(hull) = Hull::new() else { return };
    let resources = json!({"memory": {"limit": 128 << 20}, "pids": {"limit": 50},
        "cpu": {"quota": 50_000, "period": 100_000, "shares": 512}});
    let bundle = Bundle::in_cgroup(&hull, "update", LIMITS, &resources);
    let mut run = bundle.run();
    run.await_stdout("134217728\n50\n50000 100000\nshown\n");
    let monitor = bundle.monitor().as_raw_nonzero().to_string();
    assert!(
        bundle
            .host("cgroup.procs")
            .lines()
            .any(|pid| pid == monitor)
    );
    assert_eq!(bundle.host("cpu.max"), "50000 100000\n");

    let flags = [
        "update",
        "--memory",
        "64M",
        "--pids-limit",
        "20",
        "--cpu-quota",
        "80000",
    ];
    bundle.about(&flags).output().ok();
    run.write("\n");
    run.await_stdout("67108864\n20\n80000 100000\nshown\n");
    assert_eq!(bundle.host("cpu.max"), "80000 100000\n");
    // Which processors are meant are the host's.
    bundle
        .about(&["update", "--cpuset-cpus", "0"])
        .output()
        .ok();
    assert_eq!(bundle.host("cpuset.cpus"), "0\n");
    let more = json!({"memory": {"limit": 100 << 20}, "pids": {"limit": -1}}).to_string();
    bundle
        .about(&["update", "--resources", "-"])
        .stdin(more)
        .output()
        .ok();
    run.write("\n");
    run.await_stdout("104857600\nmax\n80000 100000\nshown\n");
    for (flag, value, why) in [
        ("--memory", "1024G", "can have"),
        ("--cpu-quota", "200000", "was started with"),
    ] {
        let refused = bundle.about(&["update", flag, value]).output();
        assert_eq!(refused.code, 1);
        assert!(refused.errors().contains(why), "{:?}", refused.all());
    }
    run.close_stdin();
    assert_eq!(run.wait().code, 0);
    bundle.check();
}

/// For each line that it reads: fills 300 MiB of memory and holds it, lets go of it, or waits until
/// its guest has less than so many MiB. Says the line again when that is done.
const HOLDS: &str = "
    total() { while read k v u; do [ $k = MemTotal: ] && echo $((v / 1024)); done </proc/meminfo; }
    used() { read now </sys/fs/cgroup/memory.current; echo $((now / 1048576)); }
    kills() { grep -w oom_kill /sys/fs/cgroup/memory.events; }
    hold() {
        dd if=/dev/zero bs=300M count=1 2>/dev/null | sleep 1000 &
        until [ $(used) -ge 300 ]; do [ \"$(kills)\" = \"$1\" ] || return; sleep 0.1; done
    }
    echo up $(total)
    while read word number; do
        case $word in
            hold) hold \"$(kills)\";;
            free) killall dd sleep; wait;;
            below) until [ $(total) -lt $number ]; do sleep 0.1; done;;
        esac
        echo $word $number: $(cat /sys/fs/cgroup/memory.max) $(kills)
    done";

#[test]
fn memory_above_the_starts_comes_and_goes() {
    let Some(hull) = Hull::new() else { return };
    let limit = json!({"memory": {"limit": 96 << 20}});
    let bundle = Bundle::in_cgroup(&hull, "grows", HOLDS, &limit);
    let directory = text(&bundle.directory());
    let words = ["run", "-b", &directory, &bundle.id];
    // It fills hundreds of MiB, twice, on a machine that may be emulated.
    let run = bundle.oci(&words).stdin_open().deadline(3 * DEADLINE);
    let mut run = run.spawn();
    run.await_stdout("up ");
    let status = format!("/proc/{}/status", bundle.monitor().as_raw_nonzero());
    let resident_mib = || -> u64 {
        let text = fs::read_to_string(&status).unwrap();
        let mut lines = text.lines();
        let kib = lines.find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next());
        kib.unwrap().parse::<u64>().unwrap() >> 10
    };
    let update = |limit: &str| bundle.about(&["update", "--memory", limit]).output().ok();
    update("400M");
    run.write("hold 1\n");
    run.await_stdout("hold 1: 419430400 oom_kill 0\n");
    let grown = resident_mib();
    assert!(grown >= 300, "{grown} MiB");
    run.write("free 1\n");
    run.await_stdout("free 1: ");

    // What the guest gives up is the host's at once. It had 144 MiB.
    update("96M");
    run.write("below 180\n");
    run.await_stdout("below 180: 100663296 oom_kill 0\n");
    let shrunk = resident_mib();
    assert!(shrunk + 200 < grown, "{grown} MiB, then {shrunk}");

    // And again.
    update("400M");
    run.write("hold 2\n");
    run.await_stdout("hold 2: 419430400 oom_kill 0\n");
    run.write("free 2\n");
    run.await_stdout("free 2: ");
    run.close_stdin();
    assert_eq!(run.wait().code, 0);
    bundle.check();
}

#[test]
fn statistics_move_and_processes_are_listed() {
    let Some(hull) = Hull::new() else { return };
    let script = "sleep 1000 & echo up; while read line; do
        i=0; while [ $i -lt 2000 ]; do i=$((i+1)); done; echo worked; done; kill %1";
    let bundle = Bundle::in_cgroup(
        &hull,
        "stats",
        script,
        &json!({"memory": {"limit": 96 << 20}}),
    );
    let mut run = bundle.run();
    run.await_stdout("up\n");
    let before = bundle.stats();
    run.write("\n");
    run.await_stdout("worked\n");
    let after = bundle.stats();
    let used = |stats: &Value| stats["cpu"]["usage"]["total"].as_u64().unwrap();
    assert!(used(&after) > used(&before), "{before} {after}");
    assert_eq!(after["memory"]["usage"]["limit"], 96 << 20);
    assert!(
        after["memory"]["usage"]["usage"].as_u64().unwrap() > 0,
        "{after}"
    );
    assert!(
        after["memory"]["raw"]["pgfault"].as_u64().unwrap() > 0,
        "{after}"
    );
    assert_eq!(after["pids"]["current"], 2);

    let listed = bundle.about(&["ps", "--format", "json"]).output().ok();
    assert_eq!(listed, format!("[{}]\n", bundle.monitor().as_raw_nonzero()));
    let table = bundle.about(&["ps"]).output().ok();
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[0].starts_with("UID") && lines[0].ends_with("CMD"),
        "{table}"
    );
    assert!(
        lines.iter().any(|line| line.ends_with("sleep 1000")),
        "{table}"
    );

    // What stands still can't answer, and says so at once.
    bundle.about(&["pause"]).output().ok();
    let begun = Instant::now();
    let paused = bundle.about(&["events", "--stats"]).output();
    assert!(
        paused.code == 1 && paused.errors().contains("paused"),
        "{:?}",
        paused.all()
    );
    assert!(begun.elapsed().as_secs() < 8, "{:?}", begun.elapsed());
    bundle.about(&["resume"]).output().ok();
    run.close_stdin();
    assert_eq!(run.wait().code, 0);
    let gone = bundle.about(&["events", "--stats"]).output();
    assert!(
        gone.errors().contains("container does not exist"),
        "{:?}",
        gone.all()
    );
    bundle.check();
}

#[test]
fn memory_that_runs_out_in_the_guest_is_an_event_and_a_137() {
    let Some(hull) = Hull::new() else { return };
    let script = "tail /dev/zero; echo hog $?; read line; exec tail /dev/zero";
    let bundle = Bundle::in_cgroup(
        &hull,
        "oom",
        script,
        &json!({"memory": {"limit": 32 << 20}}),
    );
    let mut run = bundle.run();
    run.await_stdout("hog 137\n");
    let mut events = bundle.about(&["events", "--interval", "1h"]).spawn();
    let oom = format!("{{\"id\":\"{}\",\"type\":\"oom\"}}\n", bundle.id);
    events.await_stdout(&oom);
    run.write("\n");
    assert_eq!(run.wait().code, 137);
    // Its end is the events' end.
    let told = events.wait();
    assert_eq!(
        (told.code, told.text().matches("oom").count() >= 2),
        (0, true),
        "{told:?}"
    );
    bundle.check();

    // A killed child is enough, whatever the command makes of it.
    let image = hull.image();
    let words = [
        "run",
        "--name",
        "hog",
        "--memory",
        "64m",
        &image,
        "sh",
        "-c",
        "tail /dev/zero; exit 0",
    ];
    assert_eq!(hull.cmd(words).output().code, 0);
    let format = "{{.State.OOMKilled}} {{.State.ExitCode}}";
    let seen = hull.cmd(["inspect", "-f", format, "hog"]).output().ok();
    assert_eq!(seen, "true 0\n");
}

/// A thread of the monitor's that has ended is in its cgroup for a moment more, now and then.
/// Here a process stands for it.
#[test]
fn a_cgroup_that_is_left_late_goes_with_its_passing_container() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = ["run", "-d", "--rm", "--cpus", "0.9", &image, "sleep", "999"];
    let id = hull.cmd(words).output().ok();
    let id = id.trim();
    let members = format!("/sys/fs/cgroup/hull/{id}/cgroup.procs");
    let late = Process::new(["cat"]).stdin_open().spawn();
    let late_pid = late.pid().as_raw_nonzero().to_string();
    fs::write(&members, &late_pid).unwrap();
    hull.cmd(["kill", id]).output().ok();
    // The monitor has left the cgroup before this goes.
    let socket = hull.run_dir().join(id).join("control.sock");
    let begun = Instant::now();
    while socket.exists() {
        assert!(begun.elapsed() < DEADLINE, "{}", socket.display());
        std::thread::yield_now();
    }
    assert_eq!(fs::read_to_string(&members).unwrap().trim(), late_pid);
    // With its stdin, it ends.
    late.wait().ok();
    assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
}

#[test]
fn dockers_commands_say_the_same() {
    let Some(hull) = Hull::new() else { return };
    let (_log, cgroup) = half(&hull, "sleep 1000 & echo up; wait");
    let format = "{{.Name}} {{.MemUsage}} {{.PIDs}}";
    let stats = hull
        .cmd(["stats", "--no-stream", "--format", format])
        .output()
        .ok();
    assert!(
        stats.starts_with("half ") && stats.ends_with(" / 512MiB 2\n"),
        "{stats}"
    );
    let top = hull.cmd(["top", "half"]).output().ok();
    assert!(top.lines().next().unwrap().ends_with("CMD"), "{top}");
    assert!(top.contains("sleep 1000"), "{top}");
    let update = ["update", "--cpus", "0.25", "-m", "100m", "half"];
    assert_eq!(hull.cmd(update).output().ok(), "half\n");
    assert_eq!(
        fs::read_to_string(cgroup.join("cpu.max")).unwrap(),
        "25000 100000\n"
    );
    let stats = hull.cmd(["stats", "--no-stream", "half"]).output().ok();
    assert!(stats.contains(" / 100MiB"), "{stats}");

    // More than its machine was started with: that is given.
    hull.cmd(["update", "-m", "700m", "half"]).output().ok();
    // Its kernel has the last of it in use a moment after it took it.
    let until = "until read _ kib _ < /proc/meminfo && [ $kib -ge 716800 ]; do sleep 0.1; done";
    let until = ["exec", "half", "sh", "-c", until];
    hull.cmd(until).output().ok();
    hull.cmd(["rm", "-f", "half"]).output().ok();
}

#[test]
fn limits_that_were_updated_outlive_a_stop() {
    let Some(hull) = Hull::new() else { return };
    let (_log, cgroup) = half(&hull, "echo up; sleep 1000");
    let ok = |words: &[&str]| hull.cmd(words).output().ok();
    ok(&["update", "--cpus", "0.25", "-m", "100m", "half"]);
    ok(&["kill", "half"]);
    ok(&["wait", "half"]);
    // One that is stopped has them from its start on.
    ok(&["update", "-m", "90m", "--pids-limit", "33", "half"]);
    ok(&["start", "half"]);
    let file = |name| fs::read_to_string(cgroup.join(name)).unwrap();
    assert_eq!(file("cpu.max"), "25000 100000\n");
    let inside = ["exec", "half", "sh", "-c"];
    let inside = |script| ok(&[&inside[..], &[script]].concat());
    assert_eq!(
        inside("cd /sys/fs/cgroup; cat cpu.max memory.max pids.max"),
        format!("25000 100000\n{}\n33\n", 90 << 20)
    );
    let format = "{{.HostConfig.Memory}} {{.HostConfig.NanoCpus}} {{.HostConfig.PidsLimit}}";
    assert_eq!(
        ok(&["inspect", "-f", format, "half"]),
        format!("{} 250000000 33\n", 90 << 20)
    );
    // What its VM grew to, it begins with, and changes from there.
    let mib = || -> u64 {
        let kib = inside("sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo");
        kib.trim().parse::<u64>().unwrap() >> 10
    };
    ok(&["update", "-m", "700m", "half"]);
    ok(&["kill", "half"]);
    ok(&["wait", "half"]);
    ok(&["start", "half"]);
    let begun = mib();
    assert!((700..900).contains(&begun), "{begun} MiB");
    ok(&["update", "-m", "1000m", "half"]);
    let grown = mib();
    assert!(grown >= 1000, "{grown} MiB");
    ok(&["update", "-m", "90m", "half"]);
    assert_eq!(
        inside("cat /sys/fs/cgroup/memory.max"),
        format!("{}\n", 90 << 20)
    );
    ok(&["rm", "-f", "half"]);
}

/// A container in the background in a cgroup of Hull's own, once it has said "up".
fn half(hull: &Hull, script: &str) -> (Running, PathBuf) {
    let image = hull.image();
    let words = [
        "run", "-d", "--name", "half", "--cpus", "0.5", &image, "sh", "-c", script,
    ];
    let id = hull.cmd(words).output().ok();
    let mut log = hull.cmd(["logs", "-f", "half"]).spawn();
    log.await_stdout("up\n");
    (log, Path::new("/sys/fs/cgroup/hull").join(id.trim()))
}

#[test]
fn memory_that_runs_out_on_the_host_is_another_matter() {
    let Some(hull) = Hull::new() else { return };
    let (_log, cgroup) = half(&hull, "echo up; sleep 1000");
    // A quarter of what it has while it does nothing.
    fs::write(cgroup.join("memory.max"), "1M").unwrap();
    assert_eq!(hull.cmd(["wait", "half"]).output().ok(), "137\n");
    let format = "{{.State.OOMKilled}} {{.State.Error}}";
    let seen = hull.cmd(["inspect", "-f", format, "half"]).output().ok();
    assert!(
        seen.starts_with("false the host killed the monitor"),
        "{seen}"
    );
    hull.cmd(["rm", "half"]).output().ok();
    assert!(!cgroup.exists());
}

#[test]
fn a_fraction_of_a_processor_holds_on_the_host() {
    let Some(hull) = Hull::new() else { return };
    let script = "cat /sys/fs/cgroup/cpu.max; echo up; i=0
        while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; sleep 1000";
    let (mut log, cgroup) = half(&hull, script);
    let used_us = || {
        let text = fs::read_to_string(cgroup.join("cpu.stat")).unwrap();
        let value = |line: &str| line.strip_prefix("usage_usec ")?.parse::<f64>().ok();
        text.lines().find_map(value).unwrap()
    };
    let (before, begun) = (used_us(), Instant::now());
    log.await_stdout("done\n");
    let share = (used_us() - before) / begun.elapsed().as_secs_f64() / 1e6;
    assert!((0.1..0.6).contains(&share), "{share} of a processor");
    let seen = hull.cmd(["logs", "half"]).output().ok();
    assert!(seen.starts_with("50000 100000\n"), "{seen}");
    hull.cmd(["rm", "-f", "half"]).output().ok();
    assert!(!cgroup.exists());
}

#[test]
fn a_real_time_task_leaves_a_part_to_all_others() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let (spin, usr) = ("while :; do :; done", "/usr:/host:ro");
    let chrt = [
        "/host/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        "--library-path",
        "/host/lib/x86_64-linux-gnu",
        "/host/bin/chrt",
        "-f",
        "50",
    ];
    let run = [
        "run",
        "-d",
        "--name",
        "spinner",
        "--cap-add",
        "SYS_NICE",
        "-v",
        usr,
        &image,
    ];
    let words = [&run[..], &chrt, &["sh", "-c", spin]].concat();
    hull.cmd(words).output().ok();
    // proc_pid_stat(5): field 41 is the policy, and SCHED_FIFO is 1. The agent is none of these.
    let policy = ["exec", "spinner", "cut", "-d ", "-f41", "/proc/1/stat"];
    assert_eq!(hull.cmd(policy).output().ok(), "1\n");
    hull.cmd(["rm", "-f", "spinner"]).output().ok();
}

#[test]
fn a_cgroup_goes_with_its_container_however_that_ends() {
    let Some(hull) = Hull::new() else { return };
    let pid = std::process::id();
    let linux = json!({"cgroupsPath": format!("hulltest{pid}.slice:x:killed")});
    let bundle = Bundle {
        cgroup: format!("/sys/fs/cgroup/hulltest{pid}.slice/x-killed.scope").into(),
        ..Bundle::new(&hull, "killed", "echo up; sleep 1000", &linux)
    };
    let mut run = bundle.run();
    run.await_stdout("up\n");
    let monitor = bundle.monitor();
    let said = fs::read_to_string(format!("/proc/{}/cgroup", monitor.as_raw_nonzero())).unwrap();
    assert_eq!(
        said.trim(),
        format!("0::/hulltest{pid}.slice/x-killed.scope")
    );

    // Nobody else gets in, nor does whoever tries take it away.
    let second = Bundle::new(&hull, "second", "true", &linux);
    let refused = second.run().wait();
    assert_eq!(refused.code, 1);
    assert!(
        refused.errors().contains("cgroup is not empty"),
        "{:?}",
        refused.all()
    );
    assert!(
        bundle
            .host("cgroup.procs")
            .contains(&monitor.as_raw_nonzero().to_string())
    );

    kill_process(monitor, Signal::KILL).unwrap();
    assert_eq!(run.wait().code, 137);
    let again = bundle.about(&["delete", "--force"]).output();
    assert_eq!(again.code, 0, "{:?}", again.all());
    bundle.check();
}
