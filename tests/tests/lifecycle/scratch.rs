//! What a container writes over its image: on a disk of its own, which the host never reads.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::image::{self, Image};
use hull_tests::process::{DEADLINE, Process};
use rustix::process::{Pid, Signal, kill_process};

use super::{inspect, start};

/// Runs until it is stopped, and is quick to stop.
const IDLE: &str = "trap 'exit 0' TERM; echo ready; sleep 9999 & wait";

#[track_caller]
fn exec(hull: &Hull, name: &str, script: &str) -> String {
    hull.cmd(["exec", name, "sh", "-c", script]).output().ok()
}

/// A container that idles.
#[track_caller]
fn idle(hull: &Hull, name: &str, more: &[&str]) -> String {
    let image = hull.image();
    let words = ["--name", name].into_iter().chain(more.iter().copied());
    let words: Vec<&str> = words.chain([&*image, "sh", "-c", IDLE]).collect();
    start(hull, &words, "ready")
}

/// The container's disk.
fn disk(hull: &Hull, id: &str) -> PathBuf {
    hull.state_dir().join("containers").join(id).join("scratch")
}

/// What e2fsck(8) thinks of a disk that nobody has, which it leaves as it is.
#[track_caller]
fn assert_clean(disk: &Path) {
    let words = ["e2fsck".into(), "-fn".into(), disk.as_os_str().to_owned()];
    let said = Process::new(words).output();
    assert_eq!(said.code, 0, "{}{}", said.text(), said.errors());
    let text = said.text() + &said.errors();
    assert!(!text.contains("journal"), "its journal isn't empty: {text}");
}

#[track_caller]
fn kill_monitor(hull: &Hull, name: &str) {
    let pid = inspect(hull, name)["State"]["Pid"].as_i64().unwrap();
    let pid = Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    assert_eq!(hull.cmd(["wait", name]).output().ok(), "137\n");
}

#[test]
fn file_capabilities_of_an_image_are_copied_up_with_the_file() {
    // Version 2, effective: CAP_NET_BIND_SERVICE.
    let capabilities = [[1, 0, 0, 2], [0, 4, 0, 0], [0; 4], [0; 4], [0; 4]].concat();
    let Some(hull) = Hull::new() else { return };
    let archive = hull.path().join("capable.tar");
    let image = Image::new().with_capable("srv/sed", &capabilities);
    image.save_as(&archive, [("capable:test", image::plain())]);
    let load = ["load".into(), "-i".into(), archive.into_os_string()];
    hull.cmd(load).output().ok();
    let words = ["--name", "web", "capable:test", "sh", "-c", IDLE];
    start(&hull, &words, "ready");
    let rights = |applet| {
        let show = [applet, "-n", "s/^CapEff:\t//p", "/proc/self/status"];
        let exec = [&["exec", "-u", "alice", "web"][..], &show].concat();
        hull.cmd(exec).output().ok()
    };
    let (none, bind) = ("0000000000000000\n", "0000000000000400\n");
    assert_eq!(
        (rights("/bin/sed").as_str(), rights("/srv/sed").as_str()),
        (none, bind)
    );
    // Its mode first, then its content: what is not changed stays.
    for change in ["chmod 755 /srv/sed", "touch /srv/sed"] {
        exec(&hull, "web", change);
        assert_eq!(rights("/srv/sed"), bind, "{change}");
    }
    hull.cmd(["stop", "web"]).output().ok();
    hull.cmd(["start", "web"]).output().ok();
    assert_eq!(rights("/srv/sed"), bind);
    // Who writes to a program takes its capabilities away (capabilities(7)).
    exec(&hull, "web", "cat /bin/busybox > /srv/sed");
    assert_eq!(rights("/srv/sed"), none);
}

#[test]
fn what_was_written_outlives_a_stop_and_a_kill() {
    let Some(hull) = Hull::new() else { return };
    let id = idle(&hull, "web", &[]);
    exec(
        &hull,
        "web",
        "echo one > /one; rm /etc/motd; mkdir /srv/new",
    );
    hull.cmd(["stop", "web"]).output().ok();
    assert_clean(&disk(&hull, &id));
    hull.cmd(["start", "web"]).output().ok();
    let seen = "cat /one; ls -d /etc/motd /srv/new 2>&1; cat /data/seed";
    let expected = "one\nls: /etc/motd: No such file or directory\n/srv/new\nfrom the image\n";
    assert_eq!(exec(&hull, "web", &format!("{seen} || true")), expected);
    // What is killed has the time for nothing: what was synced is there, and all else is whole.
    exec(
        &hull,
        "web",
        "echo two > /two; sync; rm -r /srv; mv /one /three",
    );
    kill_monitor(&hull, "web");
    hull.cmd(["start", "web"]).output().ok();
    let said = exec(
        &hull,
        "web",
        "cat /two; cat /one /three 2>/dev/null; echo four > /four",
    );
    assert_eq!(said, "two\none\n");
    hull.cmd(["kill", "web"]).output().ok();
    hull.cmd(["wait", "web"]).output().ok();
    assert_clean(&disk(&hull, &id));
    hull.cmd(["rm", "web"]).output().ok();
    assert!(!disk(&hull, &id).exists());
}

/// Everything that an overlay does differently from a plain file system, and what must be seen.
const WORKOUT: [(&str, &str); 12] = [
    ("rm -rf /home && mkdir /home && ls -A /home", ""),
    ("mv /bin/tac /bin/cat2 && readlink /bin/cat2", "busybox\n"),
    ("mv /srv /moved && ls /moved", "lost\nplain\nscript\n"),
    ("mkdir /srv && ls -A /srv", ""),
    (
        "ln /etc/motd /hard && echo more >> /hard && cat /etc/motd && stat -c %h /hard",
        "a busybox for tests\nmore\n2\n",
    ),
    (
        "ln -sf /moved/plain /data/link && readlink /data/link",
        "/moved/plain\n",
    ),
    (
        "chown 7:8 /data/seed && stat -c '%a %u:%g' /data/seed && cat /data/seed",
        "640 7:8\nfrom the image\n",
    ),
    (
        "rm /data/seed && ls /data/seed 2>/dev/null || echo gone",
        "gone\n",
    ),
    ("echo again > /data/seed && cat /data/seed", "again\n"),
    (
        "mknod /data/null c 1 3 && echo x > /data/null && mkfifo /data/pipe && \
         stat -c %F /data/null /data/pipe",
        "character special file\nfifo\n",
    ),
    (
        "touch -d @1000 /moved/script && stat -c %Y /moved/script && /moved/script a b",
        "1000\nscript a b\n",
    ),
    // Of one file system, whichever of both a file is on.
    (
        "stat -c %d / /moved /bin/busybox /hard /data/seed | sort -u | wc -l",
        "1\n",
    ),
];

#[test]
fn an_images_files_are_changed_like_any_others() {
    let Some(hull) = Hull::new() else { return };
    idle(&hull, "gym", &[]);
    for (script, expected) in WORKOUT {
        assert_eq!(exec(&hull, "gym", script), expected, "{script}");
    }
    let seen = "ls -A /home /bin/tac /bin/cat2 /srv /moved 2>/dev/null; cat /hard /data/seed; stat -c %h /hard; \
        stat -c '%a %u:%g %Y' /moved/script; readlink /data/link";
    let before = exec(&hull, "gym", seen);
    hull.cmd(["stop", "gym"]).output().ok();
    hull.cmd(["start", "gym"]).output().ok();
    assert_eq!(exec(&hull, "gym", seen), before);
    // Nobody else's image has changed.
    let image = hull.image();
    let words = ["run", "--rm", &image, "cat", "/etc/motd", "/data/seed"];
    let said = hull.cmd(words).output().ok();
    assert_eq!(said, "a busybox for tests\nfrom the image\n");
}

#[test]
fn one_that_is_full_is_full_and_nothing_else() {
    let Some(hull) = Hull::new() else { return };
    let id = idle(&hull, "small", &["--storage-opt", "size=64m"]);
    let fill = "dd if=/dev/zero of=/fill bs=1M 2>&1 | grep -o 'No space left on device'";
    assert_eq!(exec(&hull, "small", fill), "No space left on device\n");
    let size = fs::metadata(disk(&hull, &id)).unwrap();
    assert!(size.len() == 64 << 20 && size.blocks() * 512 <= 64 << 20);
    let said = exec(
        &hull,
        "small",
        "ls /fill; rm /fill; echo room > /room; cat /room",
    );
    assert_eq!(said, "/fill\nroom\n");
    hull.cmd(["stop", "small"]).output().ok();
    assert_clean(&disk(&hull, &id));
    hull.cmd(["start", "small"]).output().ok();
    assert_eq!(exec(&hull, "small", "cat /room"), "room\n");
}

#[test]
fn what_is_deleted_is_the_hosts_again() {
    let Some(hull) = Hull::new() else { return };
    let id = idle(&hull, "tide", &[]);
    let blocks = || fs::metadata(disk(&hull, &id)).unwrap().blocks() * 512;
    exec(
        &hull,
        "tide",
        "dd if=/dev/urandom of=/high bs=1M count=24 2>/dev/null; sync",
    );
    let high = blocks();
    assert!(high > 24 << 20, "{high}");
    exec(&hull, "tide", "rm /high; sync");
    let begun = Instant::now();
    while blocks() > high - (20 << 20) {
        assert!(begun.elapsed() < DEADLINE, "{} of {high} bytes", blocks());
        exec(&hull, "tide", "sleep 0.2");
    }
}

#[test]
fn its_size_is_asked_for_or_the_hosts_owner_says() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let size = "df -m / | awk 'END { print $2 }'";
    let seen = |more: &[&str]| {
        let words = ["run", "--rm"].into_iter().chain(more.iter().copied());
        let words = words.chain([&*image, "sh", "-c", size]);
        let said = hull.cmd(words).output().ok();
        said.trim().parse::<u64>().unwrap()
    };
    assert!((9_900..=10_240).contains(&seen(&[])));
    assert!((990..=1024).contains(&seen(&["--storage-opt", "size=1G"])));
    let settings = "[defaults]\nscratch_bytes = 134217728\n";
    fs::write(hull.path().join("config.toml"), settings).unwrap();
    assert!((110..=128).contains(&seen(&[])));
    for (option, word) in [
        ("size=1m", "a container can have 64 MiB to"),
        ("size=900t", "a container can have 64 MiB to"),
        ("size=x", "invalid"),
        ("colour=red", "only 'size=BYTES'"),
    ] {
        let words = ["run", "--rm", "--storage-opt", option, &image, "true"];
        let said = hull.cmd(words).output();
        assert_eq!(said.code, 125, "{said:?}");
        assert!(said.errors().contains(word), "{said:?}");
    }
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
}

#[test]
fn an_empty_one_is_made_once_and_again_when_it_is_spoiled() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let words = ["run", "--rm", &image, "true"];
    let both = [(); 2].map(|()| hull.cmd(words).spawn());
    for one in both {
        assert_eq!(one.wait().all(), (0, String::new(), String::new()));
    }
    let disks = || {
        let entries = fs::read_dir(hull.state_dir().join("scratch")).unwrap();
        let disks = entries.map(|entry| entry.unwrap().path());
        disks.filter(|path| path.is_file()).collect::<Vec<_>>()
    };
    let [pristine] = disks().try_into().unwrap();
    let inode = || fs::metadata(&pristine).unwrap().ino();
    let made = inode();
    hull.cmd(words).output().ok();
    assert_eq!(inode(), made);
    fs::File::options()
        .write(true)
        .open(&pristine)
        .unwrap()
        .set_len(99)
        .unwrap();
    hull.cmd(words).output().ok();
    assert_ne!(inode(), made);
    assert_eq!(disks().len(), 1);
}

#[test]
fn without_what_makes_it_there_is_no_start() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    // In a mount namespace of its own, where that place is empty.
    let without = |words: &[&str]| {
        let script = "mount -t tmpfs none /usr/sbin && exec \"$@\"";
        let argv = ["unshare", "-m", "sh", "-c", script, "sh"].map(str::to_owned);
        let program = hull.program().to_string_lossy().into_owned();
        let words = words.iter().map(|word| (*word).to_owned());
        let state = hull.state_dir().to_string_lossy().into_owned();
        let run = hull.run_dir().to_string_lossy().into_owned();
        Process::new(argv.into_iter().chain([program]).chain(words))
            .env("HULL_STATE_DIR", state)
            .env("HULL_RUN_DIR", run)
            .output()
    };
    let ran = without(&["run", "--rm", &image, "true"]);
    let word = "mke2fs is missing; install e2fsprogs";
    assert!(ran.code == 125 && ran.errors().contains(word), "{ran:?}");
    let doctor = without(&["doctor"]);
    assert!(
        doctor.code != 0 && doctor.text().contains("install e2fsprogs"),
        "{doctor:?}"
    );
    assert_eq!(hull.cmd(["ps", "-aq"]).output().ok(), "");
    hull.cmd(["run", "--rm", &image, "true"]).output().ok();
    // Once there is an empty disk, nothing makes one.
    assert_eq!(
        without(&["run", "--rm", &image, "echo", "fine"]).ok(),
        "fine\n"
    );
}
