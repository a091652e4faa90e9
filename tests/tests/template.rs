//! Starts from templates: like cold ones, each its own machine, whatever happens to the template.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::collections::HashSet;
use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hull_tests::hull::Hull;
use hull_tests::image::{self, Image};
use hull_tests::process::{Output, Process, rounds};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};
use serde_json::{Value, json};

/// What no two machines may have in common, one a line.
const UNIQUE: &str = "cat /proc/sys/kernel/random/boot_id; hostname; \
    od -An -N16 -tx1 /dev/urandom; cat /etc/machine-id 2>/dev/null || hostname";
/// What all of one shape have in common.
const COMMON: &str = "uname -srm; nproc; id; pwd; ulimit -a; env | grep -v HOSTNAME; ls /dev; \
    sed q /proc/self/mounts; cut -d' ' -f2- /proc/self/mounts | sort; grep -i memtotal /proc/meminfo; cat /proc/sys/kernel/pid_max";

fn run(hull: &Hull, script: &str) -> Output {
    hull.cmd(["run", "--rm", &hull.image(), "sh", "-c", script])
        .output()
}

/// The one template of this Hull, asserted to be usable.
#[track_caller]
fn only_template(hull: &Hull) -> PathBuf {
    let format = ["template", "ls", "--format", "{{.ID}} {{.Status}}"];
    let listed = hull.cmd(format).output().ok();
    let words: Vec<&str> = listed.split_whitespace().collect();
    assert!(matches!(words.as_slice(), [_, "usable"]), "{listed:?}");
    hull.state_dir().join("templates").join(words[0])
}

fn now() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap().as_secs_f64()
}

#[test]
fn a_copy_is_like_a_guest_that_booted_and_knows_the_time() {
    let Some(hull) = Hull::apart() else { return };
    let image = hull.image();
    let cold = ["run", "--rm", "--no-template", &image, "sh", "-c", COMMON];
    let booted = hull.cmd(cold).output().ok();
    assert!(!hull.state_dir().join("templates").exists());
    assert_eq!(run(&hull, COMMON).ok(), booted);
    let template = only_template(&hull);
    assert_eq!(run(&hull, COMMON).ok(), booted);
    assert_eq!(only_template(&hull), template, "it was made again");
    // Seconds since the epoch by the guest's clock, and how long it says it has been up.
    let before = now();
    let said = run(&hull, "date +%s; date +%s > /now; sleep 1; date +%s").ok();
    let after = now();
    let times: Vec<f64> = said.lines().map(|line| line.parse().unwrap()).collect();
    let in_order = [before.floor(), times[0], times[1], after];
    assert!(in_order.is_sorted() && times[1] > times[0], "{in_order:?}");
}

/// Asked again and again, a guest's clock leaves room for a difference from the host's of less than
/// a millisecond only: each answer is of a moment between its question and its coming.
#[test]
fn the_clock_is_the_hosts_in_a_copy_and_after_a_boot() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    hull.cmd(["run", "--rm", &image, "true"]).output().ok();
    for flag in ["--rm", "--no-template"] {
        difference(&hull, &["run", "-i", flag]);
    }
}

#[track_caller]
fn difference(hull: &Hull, start: &[&str]) {
    let image = hull.image();
    let script = "echo up; while read -r number; do \
        adjtimex | sed -n 's/ *time.tv_u*sec: *//p'; echo said $number; done";
    let mut copy = hull
        .cmd([start, &[&image, "sh", "-c", script]].concat())
        .stdin_open()
        .spawn();
    copy.await_stdout("up\n");
    let (mut least, mut most) = (f64::NEG_INFINITY, f64::INFINITY);
    for number in 0..20 {
        let before = now();
        copy.write(format!("{number}\n"));
        copy.await_stdout(&format!("said {number}\n"));
        let after = now();
        let said = copy.said();
        let numbers = said.lines().rev().skip(1).take(2);
        let numbers: Vec<f64> = numbers.map(|line| line.parse().unwrap()).collect();
        let guest = numbers[1] + numbers[0] / 1e6;
        (least, most) = (least.max(guest - after), most.min(guest - before));
    }
    copy.close_stdin();
    assert_eq!(copy.wait().code, 0);
    assert!(least < 0.001 && most > -0.001, "{least} to {most} s");
}

/// A start went well, and said nothing that another one had said.
fn is_new(done: &Output, seen: &mut HashSet<String>) {
    assert_eq!((done.code, done.errors()), (0, String::new()));
    let lines: HashSet<String> = done.text().lines().map(str::to_owned).collect();
    assert!(lines.len() >= 3, "{lines:?}");
    for line in lines {
        assert!(seen.insert(line.clone()), "{line} came twice");
    }
}

/// `HULL_ROUNDS` of them, four at a time: a thousand by hand, few in every run.
#[test]
fn of_many_starts_none_is_stuck_and_no_two_are_alike() {
    let Some(hull) = Hull::apart() else { return };
    let image = hull.image();
    let starts = rounds(20);
    run(&hull, "true").ok();
    let template = only_template(&hull);
    let mut seen = HashSet::new();
    for first in (0..starts).step_by(4) {
        let words = ["run", "--rm", &image, "sh", "-c", UNIQUE];
        let batch = first..starts.min(first + 4);
        let running: Vec<_> = batch.map(|_| hull.cmd(words).spawn()).collect();
        for start in running {
            is_new(&start.wait(), &mut seen);
        }
    }
    assert_eq!(only_template(&hull), template, "it was made again");
}

#[test]
fn starts_at_once_make_one_template_and_differ() {
    let Some(hull) = Hull::apart() else { return };
    hull.image();
    let mut seen = HashSet::new();
    for count in [3, 2] {
        let script = ["sh", "-c", UNIQUE];
        let image = hull.image();
        let words = ["run", "--rm", &image].into_iter().chain(script);
        let starts: Vec<_> = (0..count)
            .map(|_| hull.cmd(words.clone()).spawn())
            .collect();
        for start in starts {
            is_new(&start.wait(), &mut seen);
        }
        only_template(&hull);
    }
}

/// All that can be told of a tree from inside; times of what no start changes.
const TREE: &str = "stat -c '%n %A %u:%g %h' / /srv; stat -c '%n %A %u:%g %s %Y' /srv/* /home/*; \
    ls -a / /srv; cat /etc/hostname /etc/motd; id; touch /own && ls -l /own | cut -d' ' -f1-4";

/// A template's guest has its disk laid over shares that copies have others for.
#[test]
fn a_copy_sees_its_own_image_and_the_volumes_of_others() {
    let Some(hull) = Hull::apart() else { return };
    let archive = hull.path().join("other.tar");
    // Version 2, effective: CAP_NET_BIND_SERVICE.
    let capabilities = [[1, 0, 0, 2], [0, 4, 0, 0], [0; 4], [0; 4], [0; 4]].concat();
    let other = Image::new().with_capable("srv/capable", &capabilities);
    other.save_as(&archive, [("other:test", image::plain())]);
    let load = ["load".into(), "-qi".into(), archive.into_os_string()];
    hull.cmd(load).output().ok();
    let image = hull.image();
    let look = |first: &str, image: &str, more: &[&str]| {
        let words = ["run", first, "--rm", "--hostname", "me"];
        let command = [image, "sh", "-c", TREE];
        hull.cmd([&words, more, &command].concat()).output().ok()
    };
    for more in [&[][..], &["-v", "/more", "-u", "0:50"]] {
        let booted = [&*image, "other:test"].map(|image| look("--no-template", image, more));
        assert!(booted[1].contains("/srv/capable") && booted[0] != booted[1]);
        for _ in 0..2 {
            let copied = [&*image, "other:test"].map(|image| look("--pull=never", image, more));
            assert_eq!(copied, booted, "{more:?}");
        }
    }
    // Nobody else writes to any of these, so that they all are copies of one.
    let alone = only_template(&hull);
    let directory = hull.path().join("volume");
    fs::create_dir(&directory).unwrap();
    let mount = format!("{}:/srv", directory.display());
    let words = |script| {
        [
            "run", "-i", "--rm", "-v", &mount, &image, "sh", "-c", script,
        ]
    };
    for round in ["first", "second"] {
        fs::write(directory.join("file"), round).unwrap();
        let script = "cat /srv/file; read -r line; cat /srv/file; > /srv/file";
        let mut guest = hull.cmd(words(script)).stdin_open().spawn();
        guest.await_stdout(round);
        fs::write(directory.join("file"), "the host's own").unwrap();
        guest.write("go\n");
        guest.await_stdout("the host's own");
        assert_eq!(guest.wait().code, 0);
        assert_eq!(fs::read(directory.join("file")).unwrap(), b"");
    }
    let all = hull
        .cmd(["template", "ls", "--format", "{{.ID}}"])
        .output()
        .ok();
    assert_eq!(all.lines().count(), 2, "{all} and {alone:?}");
}

/// A bundle's root is a share: what its directory is, the guest is told of that, and not of one
/// that the template's guest saw.
#[test]
fn a_bundles_root_is_the_directory_that_it_is() {
    let Some(hull) = Hull::apart() else { return };
    let config = hull.path().join("config.toml");
    let oci = |words: &[&str]| {
        let program = hull.program().with_file_name("hull-oci");
        let root = hull.path().join("oci");
        let argv = [program.to_str().unwrap(), "--root", root.to_str().unwrap()];
        Process::new(argv.iter().chain(words).copied())
            .env("HULL_CONFIG", config.to_string_lossy())
            .env("HULL_STATE_DIR", hull.state_dir().to_string_lossy())
            .env("HULL_RUN_DIR", hull.run_dir().to_string_lossy())
            .output()
    };
    fs::write(&config, "").unwrap();
    let bundles = ["one", "two"].map(|name| hull.path().join(name));
    for (mode, bundle) in [0o755, 0o710].into_iter().zip(&bundles) {
        let root = bundle.join("rootfs");
        Image::new().unpack(&root);
        let place = bundle.to_str().unwrap();
        oci(&["spec", "-b", place]).ok();
        let file = bundle.join("config.json");
        let mut spec: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let look = "stat -c '%A %u:%g %X %Y %Z %s %h' /; ls -a /";
        spec["process"]["args"] = json!(["sh", "-c", look]);
        spec["process"]["terminal"] = json!(false);
        fs::write(&file, spec.to_string()).unwrap();
        fs::set_permissions(&root, Permissions::from_mode(mode)).unwrap();
    }
    let id = format!("root-{}", std::process::id());
    let run = || {
        bundles.each_ref().map(|bundle| {
            let place = bundle.to_str().unwrap();
            oci(&["run", "-b", place, &id]).ok()
        })
    };
    // Directories that each start needs are made by the first.
    fs::write(&config, "templates = false\n").unwrap();
    run();
    let booted = run();
    assert!(booted[0].starts_with("drwxr-xr-x") && booted[1].starts_with("drwx--x---"));
    fs::write(&config, "").unwrap();
    for _ in 0..2 {
        assert_eq!(run(), booted);
    }
    only_template(&hull);
}

#[test]
fn a_harmed_template_is_told_once_and_replaced() {
    let Some(hull) = Hull::apart() else { return };
    assert_eq!(
        run(&hull, "echo ok").all(),
        (0, "ok\n".into(), String::new())
    );
    type Harm<'a> = (&'static str, &'a dyn Fn(&File));
    let harms: [Harm<'_>; 2] = [
        ("truncated", &|file| file.set_len(100 << 20).unwrap()),
        ("flipped", &|file| {
            file.write_all_at(b"!", 16 << 20).unwrap()
        }),
    ];
    for (what, harm) in harms {
        let template = only_template(&hull);
        harm(&File::options().write(true).open(&template).unwrap());
        let told = run(&hull, "echo ok");
        assert_eq!((told.code, told.text()), (0, "ok\n".into()), "{what}");
        let words = told.errors();
        assert!(
            words.contains("started without a template"),
            "{what}: {words}"
        );
        assert!(words.contains(&*template.to_string_lossy()), "{words}");
        assert_eq!(
            run(&hull, "echo ok").all(),
            (0, "ok\n".into(), String::new())
        );
    }
    // Which pages a start needs is advice: what is wrong with it harms no start.
    let pages = only_template(&hull).with_extension("pages");
    let learnt = fs::read(&pages).unwrap();
    for harmed in [&learnt[..learnt.len() / 2], b"", &[0xff; 4096]] {
        fs::write(&pages, harmed).unwrap();
        let done = run(&hull, "echo ok");
        assert_eq!(done.all(), (0, "ok\n".into(), String::new()));
    }
}

#[test]
fn a_template_removed_in_use_stays_with_those_who_use_it() {
    let Some(hull) = Hull::apart() else { return };
    let image = hull.image();
    let name = hull.cmd(["template", "build"]).output().ok();
    assert_eq!(only_template(&hull).file_name().unwrap(), name.trim());
    let words = ["run", "-d", "--name", "user", &image, "sleep", "999"];
    hull.cmd(words).output().ok();
    let removed = hull.cmd(["template", "rm", name.trim()]).output().ok();
    assert_eq!(removed, name);
    // Programs that it has not touched yet come from the template's pages.
    let script = "ls -lR /proc/1/ns | wc -l; find /sys/kernel | wc -l; echo fine";
    let said = hull.cmd(["exec", "user", "sh", "-c", script]).output().ok();
    assert!(said.ends_with("fine\n"), "{said}");
    let again = hull.cmd(["template", "rm", name.trim()]).output();
    assert_eq!(again.code, 1);
    assert!(again.errors().contains("no such template"), "{again:?}");
    assert_eq!(run(&hull, "echo ok").ok(), "ok\n");
    only_template(&hull);
}

#[test]
fn a_start_killed_while_it_makes_a_template_leaves_none_in_part() {
    let Some(hull) = Hull::apart() else { return };
    let begun = std::time::Instant::now();
    run(&hull, "true").ok();
    let whole = begun.elapsed();
    for moment in 1..=2 {
        hull.cmd(["template", "rm", "--all"]).output().ok();
        let words = ["run", "--rm", &hull.image(), "true"];
        let starting = hull.cmd(words).spawn();
        later(starting.pid(), whole * moment / 3);
        for pid in hull.processes() {
            let pid = Pid::from_raw(pid).unwrap();
            // The command ends by itself when its monitor is gone.
            if pid != starting.pid() {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ended = starting.wait();
        let left = fs::read_dir(hull.state_dir().join("templates"));
        for file in left.into_iter().flatten().flatten() {
            if file.path().extension().is_none_or(|end| end != "pages") {
                assert_eq!(file.path(), only_template(&hull), "half a template");
            }
        }
        assert_eq!(
            run(&hull, "echo ok").all(),
            (0, "ok\n".into(), String::new())
        );
    }
}

#[test]
fn a_prune_takes_templates_and_what_has_stopped() {
    let Some(hull) = Hull::apart() else { return };
    let image = hull.image();
    let words = [
        "run",
        "--name",
        "over",
        &image,
        "sh",
        "-c",
        "echo x > /file",
    ];
    hull.cmd(words).output().ok();
    let words = ["run", "-d", "--name", "alive", &image, "sleep", "999"];
    let alive = hull.cmd(words).output().ok();
    let over = hull.cmd(["inspect", "-f", "{{.Id}}", "over"]).output().ok();
    let template = only_template(&hull);
    let asked = hull.cmd(["system", "prune"]).stdin("n\n").output().ok();
    assert!(asked.ends_with("[y/N] "), "{asked}");
    let said = hull.cmd(["system", "prune", "-f"]).output().ok();
    let gone: Vec<&str> = said.lines().collect();
    let name = template.file_name().unwrap().to_str().unwrap();
    let expected = [
        "Deleted Containers:",
        over.trim(),
        "Deleted Templates:",
        name,
    ];
    assert_eq!(gone[..4], expected, "{said}");
    let last = gone[4].strip_prefix("Total reclaimed space: ").unwrap();
    assert!(gone.len() == 5 && last.ends_with("MB"), "{said}");
    let left = fs::read_dir(template.parent().unwrap()).unwrap();
    assert_eq!(left.count(), 0);
    let listed = hull.cmd(["ps", "-aq", "--no-trunc"]).output().ok();
    assert_eq!(listed, alive);
    let entered = hull.cmd(["exec", "alive", "echo", "here"]).output().ok();
    assert_eq!(entered, "here\n");
}

/// What of the container's programs its guest sees as the host's page cache has it: where the
/// monitor maps them, to be read alone.
fn seen_in_window(hull: &Hull, name: &str) -> Vec<String> {
    let pid = hull.cmd(["inspect", "-f", "{{.State.Pid}}", name]).output();
    let maps = fs::read_to_string(format!("/proc/{}/maps", pid.ok().trim())).unwrap();
    let shown = maps.lines().filter(|line| line.contains(" r--s "));
    let inode = |line: &str| line.split_whitespace().skip(3).take(2).collect::<String>();
    let shown = shown.filter(|line| line.ends_with("/bin/busybox"));
    shown.map(inode).collect()
}

/// The image's one large program isn't read into any guest. What a container writes over it is on
/// its own disk, and what runs goes on.
#[test]
fn containers_of_an_image_run_its_programs_from_one_copy() {
    const CHANGE: &str = "cp /bin/busybox /bin/copy && mv -f /bin/copy /bin/busybox && \
        cat /bin/busybox | md5sum && md5sum < /bin/busybox";
    let Some(hull) = Hull::apart() else { return };
    let image = hull.image();
    let start = |name, base: Option<&'static str>| {
        let words = ["run", "-d", "--name", name].into_iter().chain(base);
        let words = words.chain([&*image, "sleep", "999"]);
        hull.cmd(words).output().ok();
        seen_in_window(&hull, name)
    };
    let one = start("booted", Some("--no-template"));
    assert_eq!(one.len(), 1, "{one:?}");
    for copy in ["first", "second"] {
        assert_eq!(start(copy, None), one, "{copy}");
    }
    let exec = |name: &str, script: &str| {
        let words = ["exec", name, "sh", "-c", script];
        hull.cmd(words).output().ok()
    };
    let sums = exec("first", CHANGE);
    let sums: Vec<&str> = sums.lines().collect();
    assert_eq!(sums[0], sums[1]);
    let unchanged = exec("second", "md5sum < /bin/busybox");
    assert_eq!(unchanged.trim(), sums[0]);
    assert_eq!(seen_in_window(&hull, "second"), one);
}

/// What the host holds of a container's guest that no file holds, in KiB: its monitor's.
fn resident_kib(hull: &Hull, name: &str) -> u64 {
    let pid = hull.cmd(["inspect", "-f", "{{.State.Pid}}", name]).output();
    let status = fs::read_to_string(format!("/proc/{}/status", pid.ok().trim())).unwrap();
    let line = status.lines().find(|line| line.starts_with("RssAnon:"));
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn memory_that_a_guest_frees_goes_back_to_the_host() {
    const FILL: &str = "dd if=/dev/zero of=/dev/shm/fill bs=1M count=60 2>/dev/null && echo full";
    const FREE: &str = "rm /dev/shm/fill && echo free";
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    for (name, base) in [("copy", None), ("booted", Some("--no-template"))] {
        let words = ["run", "-d", "--name", name].into_iter().chain(base);
        hull.cmd(words.chain([&*image, "sleep", "999"]))
            .output()
            .ok();
        let exec = |script: &str| {
            let words = ["exec", name, "sh", "-c", script];
            hull.cmd(words).output().ok()
        };
        let before = resident_kib(&hull, name);
        assert_eq!(exec(FILL), "full\n");
        let full = resident_kib(&hull, name);
        assert!(
            full > before + (50 << 10),
            "{name}: {before} KiB, then {full}"
        );
        assert_eq!(exec(FREE), "free\n");
        // The guest's kernel reports what has been free for two seconds.
        let freed = (0..30)
            .any(|_| exec("sleep 1").is_empty() && resident_kib(&hull, name) < full - (45 << 10));
        assert!(freed, "{name}: {} of {full} KiB", resident_kib(&hull, name));
        assert_eq!(exec(FILL), "full\n");
    }
}

/// Lets this much time go by, or less if the process ends before.
fn later(process: Pid, time: Duration) {
    if let Ok(process) = pidfd_open(process, PidfdFlags::empty()) {
        let mut ended = [PollFd::new(&process, PollFlags::IN)];
        poll(&mut ended, Some(&Timespec::try_from(time).unwrap())).unwrap();
    }
}
