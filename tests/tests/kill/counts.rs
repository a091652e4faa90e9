//! Many starts, and many commands in one container: what there is on the host doesn't grow.

use std::fs;

use hull_tests::hull::Hull;

/// What a start must not leave one more of.
#[derive(Debug, PartialEq, Eq)]
struct Counts {
    mounts: usize,
    cgroups: usize,
    sockets: usize,
    processes: usize,
    files: usize,
}

impl Counts {
    fn of(hull: &Hull) -> Self {
        let base = hull.path().to_str().unwrap();
        let lines = |file: &str, word: &str| {
            let text = fs::read_to_string(file).unwrap();
            text.lines().filter(|line| line.contains(word)).count()
        };
        let entries = |path: &str| fs::read_dir(path).map_or(0, Iterator::count);
        // This test's own bookkeeping isn't Hull's.
        let files = |path| walk(path);
        Self {
            mounts: lines("/proc/self/mountinfo", base),
            cgroups: entries("/sys/fs/cgroup/hull"),
            sockets: lines("/proc/net/unix", base),
            processes: hull.processes().len(),
            files: files(&hull.state_dir()) + files(&hull.run_dir()),
        }
    }
}

fn walk(path: &std::path::Path) -> usize {
    let Ok(entries) = fs::read_dir(path) else {
        return 0;
    };
    let count = |entry: fs::DirEntry| match entry.file_type() {
        Ok(kind) if kind.is_dir() => 1 + walk(&entry.path()),
        _ => 1,
    };
    entries.flatten().map(count).sum()
}

#[test]
fn ten_starts() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let run = |number: usize| {
        let name = format!("n{number}");
        match number % 2 {
            0 => {
                let words = ["run", "--rm", "--cpus", "0.9", &image, "true"];
                hull.cmd(words).output().ok();
            }
            _ => {
                hull.cmd(["run", "--name", &name, &image, "true"])
                    .output()
                    .ok();
                hull.cmd(["rm", &name]).output().ok();
            }
        }
        assert_eq!(hull.settled_leftovers(), Vec::<String>::new());
    };
    // The first makes directories that stay.
    run(0);
    let before = Counts::of(&hull);
    for number in 0..10 {
        run(number);
    }
    assert_eq!(Counts::of(&hull), before);
}

#[test]
fn ten_commands_in_one_container() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    hull.cmd(["run", "-d", "--name", "host", &image, "sleep", "999"])
        .output()
        .ok();
    let pid = hull
        .cmd(["inspect", "-f", "{{.State.Pid}}", "host"])
        .output()
        .ok();
    let open = || {
        // A connection that was just closed is noticed when the next is answered.
        hull.cmd(["exec", "host", "true"]).output().ok();
        hull.cmd(["inspect", "host"]).output().ok();
        fs::read_dir(format!("/proc/{}/fd", pid.trim()))
            .unwrap()
            .count()
    };
    let inside = || {
        let seen = hull.cmd(["exec", "host", "sh", "-c", "ls /proc | grep -c '^[0-9]'"]);
        seen.output().ok().trim().parse::<usize>().unwrap()
    };
    let before = (open(), inside());
    for number in 0..10 {
        let words = match number % 2 {
            0 => ["exec", "host", "true"],
            _ => ["exec", "host", "nosuchcommand"],
        };
        let done = hull.cmd(words).output();
        assert_eq!(
            done.code,
            if number % 2 == 0 { 0 } else { 127 },
            "{:?}",
            done.all()
        );
    }
    // The last command's own stream and process may still be on their way out; one left by each
    // would be ten.
    let after = (open(), inside());
    assert!(
        after.0 < before.0 + 5 && after.1 < before.1 + 5,
        "{before:?}, then {after:?}"
    );
    hull.cmd(["rm", "-f", "host"]).output().ok();
}
