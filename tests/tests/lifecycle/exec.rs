//! Further processes in a container that runs.

use hull_tests::hull::Hull;
use hull_tests::process::{Output, Process};

use super::start;

struct Shared {
    hull: Hull,
}

impl Shared {
    fn new() -> Option<Self> {
        let hull = Hull::new()?;
        let image = hull.image();
        let words = [
            "--name",
            "c",
            "-e",
            "OUTER=1",
            "-w",
            "/srv",
            &image,
            "sh",
            "-c",
            "echo ready; sleep 1000 & wait",
        ];
        start(&hull, &words, "ready");
        Some(Self { hull })
    }

    fn cmd(&self, flags: &[&str], command: &[&str]) -> Process {
        let words = ["exec"].iter().chain(flags).chain(&["c"]).chain(command);
        self.hull.cmd(words)
    }

    fn exec(&self, flags: &[&str], command: &[&str]) -> Output {
        self.cmd(flags, command).output()
    }
}

/// One container serves all of it: a start is dear on an emulated host.
#[test]
fn processes_are_as_they_were_asked_for() {
    let Some(shared) = Shared::new() else { return };
    streams_and_codes(&shared);
    surroundings(&shared);
    failures(&shared);
    terminals(&shared);
    together(&shared);
}

fn streams_and_codes(shared: &Shared) {
    let done = shared.exec(&[], &["sh", "-c", "echo out; echo err >&2; exit 33"]);
    assert_eq!(done.all(), (33, "out\n".into(), "err\n".into()));
    let killed = shared.exec(&[], &["sh", "-c", "kill -9 $$"]);
    assert_eq!(killed.code, 137);
    let bytes: Vec<u8> = (0..300_000_u32)
        .map(|number| (number % 253) as u8)
        .collect();
    let done = shared.cmd(&["-i"], &["cat"]).stdin(bytes.clone()).output();
    assert!(
        done.stdout == bytes,
        "{} bytes came back",
        done.stdout.len()
    );
    let deaf = shared.cmd(&[], &["cat"]).stdin("not passed on").output();
    assert_eq!(deaf.all(), (0, String::new(), String::new()));
}

fn surroundings(shared: &Shared) {
    let script = "echo $OUTER $INNER $FROM_IMAGE $(pwd) $(id -u):$(id -g) $HOME";
    let done = shared.exec(&[], &["sh", "-c", script]);
    assert_eq!(done.ok(), "1 yes /srv 0:0 /root\n");
    let flags = [
        "-e", "INNER=2", "-e", "OUTER=x", "-w", "/tmp", "-u", "alice",
    ];
    let done = shared.exec(&flags, &["sh", "-c", script]);
    assert_eq!(done.ok(), "x 2 yes /tmp 1000:1000 /home/alice\n");
    let done = shared.exec(&["-u", "bob:staff"], &["id", "-G"]);
    assert_eq!(done.ok(), "50\n");
    // The same container: its processes, its root, its name, its rights.
    let script = "cat /proc/1/comm; test $$ != 1 && hostname";
    let done = shared.exec(&[], &["sh", "-c", script]);
    let id = shared.hull.cmd(["ps", "-q"]).output().ok();
    assert_eq!(done.ok(), format!("sh\n{id}"));
    let rights = ["sed", "-n", "s/^CapEff:\\t//p", "/proc/self/status"];
    assert_eq!(shared.exec(&[], &rights).ok(), "00000000a80425fb\n");
    assert_eq!(
        shared.exec(&["--privileged"], &rights).ok(),
        "000001ffffffffff\n"
    );
    shared
        .exec(&[], &["sh", "-c", "echo kept > /tmp/file"])
        .ok();
    assert_eq!(shared.exec(&[], &["cat", "/tmp/file"]).ok(), "kept\n");
}

fn failures(shared: &Shared) {
    for (flags, command, code, word) in [
        (&[][..], "no-such-program", 127, "no-such-program"),
        (&[], "/srv/plain", 126, "/srv/plain"),
        (&["-u", "nobody-knows"], "true", 126, "nobody-knows"),
    ] {
        let done = shared.exec(flags, &[command]);
        assert_eq!((done.code, done.text()), (code, String::new()), "{command}");
        assert!(done.errors().contains(word), "{}", done.errors());
    }
    // None of that has harmed it.
    assert_eq!(shared.exec(&[], &["echo", "well"]).ok(), "well\n");
}

fn terminals(shared: &Shared) {
    let script =
        "test -t 0 && test -t 1 && stty size; echo $TERM; echo ask; read x; echo got $x; exit 5";
    let mut running = shared
        .cmd(&["-it"], &["sh", "-c", script])
        .tty(31, 97)
        .spawn();
    running.await_stdout("ask\r\n");
    running.write("word\r");
    let done = running.wait();
    assert_eq!(
        done.all(),
        (
            5,
            "31 97\r\nxterm\r\nask\r\nword\r\ngot word\r\n".into(),
            String::new()
        )
    );
    let refused = shared.exec(&["-it"], &["true"]);
    assert!(
        refused.errors().contains("not a TTY"),
        "{:?}",
        refused.all()
    );
}

fn together(shared: &Shared) {
    // Each waits for the other, so both must run at once.
    shared.exec(&[], &["mkfifo", "/tmp/a", "/tmp/b"]).ok();
    let one = shared
        .cmd(&[], &["sh", "-c", "echo from one > /tmp/a; cat /tmp/b"])
        .spawn();
    let two = shared
        .cmd(&[], &["sh", "-c", "cat /tmp/a; echo from two > /tmp/b"])
        .spawn();
    assert_eq!(one.wait().ok(), "from two\n");
    assert_eq!(two.wait().ok(), "from one\n");
    // One in the background is no longer its caller's.
    let said = shared.exec(&["-d"], &["sh", "-c", "echo from behind > /tmp/a"]);
    assert_eq!(said.all(), (0, String::new(), String::new()));
    assert_eq!(shared.exec(&[], &["cat", "/tmp/a"]).ok(), "from behind\n");
}
