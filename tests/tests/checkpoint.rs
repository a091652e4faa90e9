//! Containers that are saved while they run, and those that go on from there.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use hull_tests::hull::Hull;
use hull_tests::process::{DEADLINE, Output};

/// Counts in a file and on stdout, and keeps the randomness that it was given each time.
const COUNT: &str = "n=0; while :; do n=$((n+1)); echo $n > /count; echo line $n; \
    od -An -N16 -tx1 /dev/urandom >> /random; sleep 0.1; done";
/// What no two containers may have in common, one a line.
const UNIQUE: &str = "cat /proc/sys/kernel/random/boot_id; hostname; cat /etc/machine-id; \
    od -An -N16 -tx1 /dev/urandom; tail -n1 /random";

/// Runs a script in the background.
#[track_caller]
fn run(hull: &Hull, name: &str, more: &[&str], script: &str) {
    let image = hull.image();
    let words = ["run", "-d", "--name", name].into_iter();
    let words = words.chain(more.iter().copied());
    let words = words.chain([&*image, "sh", "-c", script]);
    hull.cmd(words).output().ok();
}

#[track_caller]
fn exec(hull: &Hull, name: &str, script: &str) -> String {
    hull.cmd(["exec", name, "sh", "-c", script]).output().ok()
}

/// Waits until the container has counted past `last`; returns how far it is.
#[track_caller]
fn counted(hull: &Hull, name: &str, last: u64) -> u64 {
    let begun = Instant::now();
    loop {
        let now = exec(hull, name, "cat /count || sleep 0.2").trim().parse();
        match now {
            Ok(now) if now > last => return now,
            _ => assert!(begun.elapsed() < DEADLINE, "{name} doesn't count on"),
        }
    }
}

fn checkpoint(hull: &Hull, name: &str, more: &[&str]) -> (PathBuf, Output) {
    let to = hull.path().join(format!("checkpoint-of-{name}"));
    let words = ["checkpoint", name].into_iter();
    let words = words.chain([to.to_str().unwrap()]);
    let said = hull.cmd(words.chain(more.iter().copied())).output();
    (to, said)
}

fn go_on(hull: &Hull, from: &Path, more: &[&str]) -> Output {
    let words = ["run", "--from", from.to_str().unwrap()].into_iter();
    hull.cmd(words.chain(more.iter().copied())).output()
}

/// What is beside the container in a state directory and beside a checkpoint.
fn names(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

#[test]
fn a_loop_goes_on_from_where_it_stood() {
    let Some(hull) = Hull::new() else { return };
    run(&hull, "loop", &[], COUNT);
    counted(&hull, "loop", 2);
    exec(
        &hull,
        "loop",
        "mkdir /kept; echo kept > /kept/file; rm /etc/passwd",
    );
    let (saved, said) = checkpoint(&hull, "loop", &[]);
    assert_eq!(
        said.all(),
        (0, format!("{}\n", saved.display()), String::new())
    );
    let words = [
        "inspect",
        "-f",
        "{{.State.Status}} {{.State.ExitCode}}",
        "loop",
    ];
    assert_eq!(hull.cmd(words).output().ok(), "exited 137\n");
    let last = hull.cmd(["logs", "-n1", "loop"]).output().ok();
    let last: u64 = last.trim().strip_prefix("line ").unwrap().parse().unwrap();
    let before = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    go_on(&hull, &saved, &["-d", "--name", "again", "-l", "a=b"]).ok();
    let now = counted(&hull, "again", last + 1);
    let logs = hull.cmd(["logs", "again"]).output().ok();
    let first: u64 = logs.lines().next().unwrap()[5..].parse().unwrap();
    assert!((last..=last + 1).contains(&first), "{first} after {last}");
    assert!(now >= first);
    // Its disk, its name, its clock.
    let said = exec(
        &hull,
        "again",
        "cat /kept/file; ls /etc/passwd 2>&1; hostname; cat /etc/hostname; date +%s",
    );
    let lines: Vec<&str> = said.lines().collect();
    let id = hull
        .cmd(["inspect", "-f", "{{.Id}} {{.Config.Labels}}", "again"])
        .output()
        .ok();
    assert_eq!(lines[0], "kept");
    assert!(lines[1].contains("No such file"), "{said}");
    assert!(
        id.starts_with(lines[2]) && lines[2] == lines[3],
        "{said} {id}"
    );
    assert!(id.contains("a"), "{id}");
    let clock: u64 = lines[4].parse().unwrap();
    let after = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(
        (before.as_secs()..=after.as_secs() + 1).contains(&clock),
        "{clock}"
    );
    // It is a container like any other: it stops, and starts anew with its disk.
    hull.cmd(["stop", "-t", "0", "again"]).output().ok();
    hull.cmd(["start", "again"]).output().ok();
    assert_eq!(exec(&hull, "again", "cat /kept/file"), "kept\n");
    // The checkpoint is as it was.
    let run = go_on(&hull, &saved, &["-d", "--rm", "--name", "third"]);
    run.ok();
    counted(&hull, "third", last);
}

#[test]
fn forks_differ_and_the_original_goes_on() {
    let Some(hull) = Hull::new() else { return };
    let script = format!("tr -d - < /proc/sys/kernel/random/boot_id > /etc/machine-id; {COUNT}");
    run(&hull, "one", &[], &script);
    let reached = counted(&hull, "one", 1);
    // Ids that were read are ids that are known.
    exec(&hull, "one", UNIQUE);
    let forked = hull.cmd(["fork", "-n", "3", "--rm", "one"]).output().ok();
    let copies: Vec<&str> = forked.lines().collect();
    assert_eq!(copies.len(), 3);
    let mut seen = HashSet::new();
    for name in copies.iter().copied().chain(["one"]) {
        counted(&hull, name, reached + 1);
        let said = exec(&hull, name, UNIQUE);
        assert_eq!(said.lines().count(), 5, "{said}");
        for line in said.lines() {
            assert!(seen.insert(line.to_owned()), "{name}: {line} came twice");
        }
        let hosts = exec(&hull, name, "grep -c $(hostname) /etc/hosts /etc/hostname");
        assert_eq!(hosts, "/etc/hosts:1\n/etc/hostname:1\n");
    }
    assert_eq!(
        names(&hull.state_dir().join("forks")),
        Vec::<PathBuf>::new()
    );
    // What one writes is its own.
    exec(&hull, copies[0], "echo mine > /mine");
    assert_eq!(
        exec(&hull, "one", "ls /mine 2>/dev/null || echo none"),
        "none\n"
    );
    // A copy is forked like any other.
    let again = hull
        .cmd(["fork", "--name", "grandchild", copies[1]])
        .output();
    again.ok();
    counted(&hull, "grandchild", reached + 1);
    for line in exec(&hull, "grandchild", UNIQUE).lines() {
        assert!(
            seen.insert(line.to_owned()),
            "grandchild: {line} came twice"
        );
    }
    hull.cmd(["rm", "-f", copies[0], copies[1], copies[2], "grandchild"])
        .output()
        .ok();
}

#[test]
fn streams_go_on_with_what_was_on_its_way() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = ["run", "-di", "--name", "cat", &image, "cat"];
    hull.cmd(words).output().ok();
    let (saved, said) = checkpoint(&hull, "cat", &["--leave-running"]);
    said.ok();
    for text in ["one\n", "two\n"] {
        let words = ["run", "--rm", "--from", saved.to_str().unwrap()];
        let done = hull.cmd(words).stdin(text).output();
        assert_eq!(done.all(), (0, text.to_owned(), String::new()));
    }
    let words = ["inspect", "-f", "{{.State.Status}}", "cat"];
    assert_eq!(hull.cmd(words).output().ok(), "running\n");
    // A client that doesn't read: the output is in every buffer on the way.
    let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo $i; done; sleep 999";
    run(&hull, "much", &[], script);
    let (saved, said) = checkpoint(&hull, "much", &[]);
    said.ok();
    let first = hull.cmd(["logs", "much"]).output().ok();
    go_on(&hull, &saved, &["-d", "--name", "rest"]).ok();
    let begun = Instant::now();
    let all = loop {
        let rest = hull.cmd(["logs", "rest"]).output().ok();
        if rest.ends_with("20000\n") || first.ends_with("20000\n") {
            break (first.clone(), rest);
        }
        assert!(
            begun.elapsed() < DEADLINE,
            "it ends with {:?}",
            rest.lines().last()
        );
    };
    // What both have is what was on its way when the first was killed.
    let lines: Vec<u32> = all
        .0
        .lines()
        .chain(all.1.lines())
        .map(|line| line.parse().unwrap())
        .collect();
    let known: HashSet<u32> = lines.iter().copied().collect();
    assert_eq!(known.len(), 20_000);
}

/// A way to spoil a checkpoint's file, and the words that tell of it.
type Harm = (&'static str, fn(&File));

const HARMS: [Harm; 6] = [
    ("it was cut", |file| file.set_len(length(file) - 1).unwrap()),
    ("it was cut", |file| file.set_len(64 << 20).unwrap()),
    ("it was cut", |file| file.set_len(0).unwrap()),
    ("doesn't begin as a checkpoint", |file| flip(file, MEMORY)),
    ("its state was changed", |file| {
        flip(file, length(file) - 5000)
    }),
    ("its memory was changed", |file| flip(file, 20 << 20)),
];

/// Where the head of such a file begins: behind the guest's memory.
const MEMORY: u64 = 96 << 20;

fn length(file: &File) -> u64 {
    file.metadata().unwrap().len()
}

fn flip(file: &File, at: u64) {
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 4], at).unwrap();
}

#[test]
fn what_is_no_checkpoint_is_refused_and_leaves_nothing() {
    let Some(hull) = Hull::new() else { return };
    run(&hull, "whole", &["-m", "96m"], COUNT);
    counted(&hull, "whole", 1);
    let (saved, said) = checkpoint(&hull, "whole", &["-R"]);
    said.ok();
    let (_, again) = checkpoint(&hull, "whole", &["-R"]);
    assert!(
        again.code == 1 && again.errors().contains("it exists"),
        "{again:?}"
    );
    let (guest, whole) = (saved.join("guest"), hull.path().join("whole"));
    fs::copy(&guest, &whole).unwrap();
    for (word, harm) in HARMS {
        fs::copy(&whole, &guest).unwrap();
        harm(&File::options().read(true).write(true).open(&guest).unwrap());
        let refused = go_on(&hull, &saved, &["-d"]);
        assert_eq!(refused.code, 125, "{refused:?}");
        assert!(
            refused.errors().contains(word),
            "{word}: {}",
            refused.errors()
        );
    }
    for nothing in ["nowhere", ""] {
        let refused = go_on(&hull, &hull.path().join(nothing), &["-d"]);
        assert!(
            refused.errors().contains("no such checkpoint"),
            "{refused:?}"
        );
    }
    let listed = hull
        .cmd(["ps", "-a", "--format", "{{.Names}}"])
        .output()
        .ok();
    assert_eq!(listed, "whole\n");
    // A copy of it is one, whatever its time.
    fs::copy(&whole, &guest).unwrap();
    go_on(&hull, &saved, &["-d", "--rm", "--name", "good"]).ok();
    counted(&hull, "good", 1);
}

#[test]
fn a_share_that_changed_underneath_is_told() {
    let Some(hull) = Hull::new() else { return };
    let data = hull.path().join("data");
    fs::create_dir(&data).unwrap();
    fs::write(data.join("open"), "one\n").unwrap();
    let volume = format!("{}:/data", data.display());
    let script = "exec 3< /data/open; while read line <&3; do echo $line; done; touch /data/ready; \
        while :; do sleep 0.1; done";
    run(&hull, "reader", &["-v", &volume], script);
    let begun = Instant::now();
    while !data.join("ready").exists() {
        assert!(begun.elapsed() < DEADLINE, "it isn't ready");
        exec(&hull, "reader", "sleep 0.1");
    }
    let (saved, said) = checkpoint(&hull, "reader", &["-R"]);
    said.ok();
    // What the host wrote to the file is no change of the share's.
    fs::write(data.join("open"), "one\ntwo\n").unwrap();
    go_on(&hull, &saved, &["-d", "--rm", "--name", "same"]).ok();
    assert_eq!(exec(&hull, "same", "cat /data/open"), "one\ntwo\n");
    fs::write(data.join("fresh"), "one\n").unwrap();
    fs::rename(data.join("fresh"), data.join("open")).unwrap();
    let refused = go_on(&hull, &saved, &["-d"]);
    let words = refused.errors();
    assert!(
        refused.code == 125 && words.contains("\"/open\""),
        "{words}"
    );
    assert!(words.contains("another file is in its place"), "{words}");
    fs::remove_file(data.join("open")).unwrap();
    let words = go_on(&hull, &saved, &["-d"]).errors();
    assert!(
        words.contains("\"/open\"") && words.contains("is gone"),
        "{words}"
    );
}

#[test]
fn a_file_that_is_removed_and_still_open_has_no_name_to_be_found_by() {
    let Some(hull) = Hull::new() else { return };
    let data = hull.path().join("data");
    fs::create_dir(&data).unwrap();
    let volume = format!("{}:/data", data.display());
    let script = "cd /data; echo x > held; exec 3< held; rm held; echo removed; \
        while :; do sleep 0.1; done";
    run(&hull, "holder", &["-v", &volume], script);
    let mut logs = hull.cmd(["logs", "-f", "holder"]).spawn();
    logs.await_stdout("removed");
    let (saved, said) = checkpoint(&hull, "holder", &["-R"]);
    assert_eq!(said.code, 1, "{said:?}");
    let words = said.errors();
    assert!(
        words.contains("\"/held\" of share \"v0\" was removed"),
        "{words}"
    );
    assert!(!saved.exists());
    assert_eq!(exec(&hull, "holder", "echo on"), "on\n");
    hull.cmd(["rm", "-f", "holder"]).output().ok();
    let _ended = logs.wait();
}

#[test]
fn the_disk_comes_along_with_what_has_no_name_any_more() {
    let Some(hull) = Hull::new() else { return };
    let script = "echo held > /held; exec 3< /held; rm /held; mkdir /kept; rm -r /etc/passwd; \
        echo kept > /kept/file; ln /kept/file /kept/again; echo ready; \
        while [ ! -e /go ]; do sleep 0.1; done; cat <&3; stat -c %h /kept/again; ls /etc/passwd";
    run(&hull, "one", &[], script);
    let mut logs = hull.cmd(["logs", "-f", "one"]).spawn();
    logs.await_stdout("ready");
    let copies = hull.cmd(["fork", "-n", "2", "one"]).output().ok();
    for name in copies.lines().chain(["one"]) {
        exec(&hull, name, "touch /go");
        assert_eq!(hull.cmd(["wait", name]).output().ok(), "1\n");
        let said = hull.cmd(["logs", name]).output().text();
        assert!(said.ends_with("held\n2\n"), "{name}: {said}");
    }
    let _ended = logs.wait();
    for name in copies.lines() {
        // Started anew on its disk, it comes to its end at once.
        let again = hull.cmd(["start", "-a", name]).output();
        assert!(again.text().ends_with("held\n2\n"), "{again:?}");
    }
}

#[test]
fn a_guest_that_has_grown_goes_on_as_large() {
    let Some(hull) = Hull::new() else { return };
    run(
        &hull,
        "grown",
        &["-m", "100m", "--tmpfs", "/t:size=200m"],
        "sleep 9999",
    );
    let update = |name: &str, limit: &str| {
        hull.cmd(["update", "-m", limit, name]).output().ok();
    };
    let mib = |name: &str| -> u64 {
        let script = "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo";
        exec(&hull, name, script).trim().parse::<u64>().unwrap() >> 10
    };
    let had = mib("grown");
    update("grown", "500m");
    let has = mib("grown");
    assert!(has > had + 300, "{had} MiB, then {has}");
    // More than it was started with.
    exec(
        &hull,
        "grown",
        "dd if=/dev/urandom of=/t/full bs=1M count=170 2>/dev/null",
    );
    let content = "md5sum /t/full; cat /sys/fs/cgroup/memory.max";
    let before = exec(&hull, "grown", content);
    assert!(before.ends_with("\n524288000\n"), "{before}");
    let (saved, said) = checkpoint(&hull, "grown", &[]);
    said.ok();
    go_on(&hull, &saved, &["-d", "--name", "again"]).ok();
    hull.cmd(["fork", "--name", "third", "again"]).output().ok();
    for name in ["again", "third"] {
        assert_eq!(exec(&hull, name, content), before);
        assert_eq!(mib(name), has);
        let words = ["inspect", "-f", "{{.HostConfig.Memory}}", name];
        assert_eq!(hull.cmd(words).output().ok(), "524288000\n");
    }
    // Its memory comes and goes as before, and at its next start it is as large.
    exec(&hull, "third", "rm /t/full");
    update("third", "90m");
    let begun = Instant::now();
    while mib("third") > had + 100 {
        assert!(begun.elapsed() < DEADLINE, "{} MiB", mib("third"));
    }
    update("again", "600m");
    assert!(mib("again") > has + 50, "{} MiB", mib("again"));
    hull.cmd(["kill", "again"]).output().ok();
    hull.cmd(["wait", "again"]).output().ok();
    hull.cmd(["start", "again"]).output().ok();
    let begun = mib("again");
    assert!((600..800).contains(&begun), "{begun} MiB");
    hull.cmd(["rm", "-f", "again", "third"]).output().ok();
}

#[test]
fn what_cant_be_saved_says_why() {
    let Some(hull) = Hull::new() else { return };
    let refused = |name: &str, word: &str| {
        let (saved, said) = checkpoint(&hull, name, &["-R"]);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.errors().contains(word), "{said:?}");
        assert!(!saved.exists());
    };
    refused("nobody", "No such container");
    run(&hull, "over", &[], "true");
    hull.cmd(["wait", "over"]).output().ok();
    refused("over", "is not running");
    run(&hull, "busy", &[], "sleep 999");
    let mut session = hull
        .cmd(["exec", "busy", "sh", "-c", "echo in; sleep 999"])
        .spawn();
    session.await_stdout("in");
    refused("busy", "exec sessions");
    hull.cmd(["rm", "-f", "busy"]).output().ok();
    let _ended = session.wait();
}

#[test]
fn a_full_disk_leaves_nothing_and_the_container_running() {
    use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
    let Some(hull) = Hull::new() else { return };
    run(&hull, "alive", &[], COUNT);
    let reached = counted(&hull, "alive", 1);
    let small = hull.path().join("small");
    fs::create_dir(&small).unwrap();
    mount("small", &small, "tmpfs", MountFlags::empty(), c"size=4m").unwrap();
    let to = small.join("checkpoint");
    let said = hull
        .cmd(["checkpoint", "alive", to.to_str().unwrap()])
        .output();
    let left = names(&small);
    unmount(&small, UnmountFlags::DETACH).unwrap();
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.errors().contains("No space left"), "{said:?}");
    assert_eq!(left, Vec::<PathBuf>::new());
    counted(&hull, "alive", reached);
}

#[test]
fn whoever_is_killed_in_the_middle_nothing_is_left() {
    let Some(hull) = Hull::new() else { return };
    run(&hull, "alive", &[], COUNT);
    counted(&hull, "alive", 1);
    let place = hull.path().join("place");
    fs::create_dir(&place).unwrap();
    let to = place.join("checkpoint");
    let words = ["checkpoint", "alive", to.to_str().unwrap()];
    let empty = |what: &str| {
        let begun = Instant::now();
        while !names(&place).is_empty() {
            assert!(begun.elapsed() < DEADLINE, "{what}: {:?}", names(&place));
            std::thread::yield_now();
        }
    };
    let begun = |process: &hull_tests::process::Running| {
        let begun = Instant::now();
        while names(&place).is_empty() {
            assert!(begun.elapsed() < DEADLINE, "nothing was begun");
            std::thread::yield_now();
        }
        process.pid()
    };
    for wait in [Duration::ZERO, Duration::from_millis(300)] {
        let making = hull.cmd(words).spawn();
        let pid = begun(&making);
        let since = Instant::now();
        while since.elapsed() < wait {
            std::thread::yield_now();
        }
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
        let _killed = making.wait();
        // Whole or not at all.
        if to.exists() {
            fs::remove_dir_all(&to).unwrap();
            return;
        }
        empty("the command");
        let reached = counted(&hull, "alive", 0);
        counted(&hull, "alive", reached);
    }
    let pid = hull
        .cmd(["inspect", "-f", "{{.State.Pid}}", "alive"])
        .output()
        .ok();
    let pid = rustix::process::Pid::from_raw(pid.trim().parse().unwrap()).unwrap();
    let making = hull.cmd(words).spawn();
    begun(&making);
    let killed = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
    let said = making.wait();
    // It is whole if that was quicker, and its container has ended.
    if !to.exists() {
        assert_eq!(killed, Ok(()));
        assert_ne!(said.code, 0);
        empty("the monitor");
    }
}
