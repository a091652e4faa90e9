//! Guests in network namespaces that somebody else has set up: as a process would be there, for
//! the guest, for who talks to it, and for who counts; and nothing left, whatever ends.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that can't go on has failed"
)]

mod copies;
mod peer;
mod wire;

use std::fs;
use std::path::Path;

use hull_tests::hull::Hull;
use hull_tests::process::Process;
use rustix::process::{Pid, Signal, kill_process};

use peer::{PAYLOAD_BYTES, payload};
use wire::Wire;

fn run(hull: &Hull, wire: &Wire, script: &str) -> Process {
    let words = ["run", "--rm", "-i", "--network", &wire.network()];
    let image = hull.image();
    hull.cmd(words.into_iter().chain([&*image, "sh", "-c", script]))
}

/// Starts a container that does nothing by itself.
fn idle(hull: &Hull, wire: &Wire, name: &str) {
    let words = ["run", "-d", "--name", name, "--network", &wire.network()];
    let image = hull.image();
    let command = [&*image, "sleep", "999"];
    hull.cmd(words.into_iter().chain(command)).output().ok();
}

/// The lines between `### NAME` and the next such line.
fn section<'a>(text: &'a str, name: &str) -> &'a str {
    let mark = format!("### {name}\n");
    let (_, rest) = text
        .split_once(&mark)
        .unwrap_or_else(|| panic!("no {name} in {text}"));
    rest.split("###").next().unwrap_or_default()
}

/// What ip(8) of busybox says of routes, without what it says of the interface's state.
fn lines(text: &str) -> Vec<String> {
    let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut lines: Vec<String> = text.lines().map(words).collect();
    lines.sort();
    lines
}

#[test]
fn a_guest_has_the_interfaces_as_they_are_in_its_namespace() {
    let Some(hull) = Hull::new() else { return };
    let wire = Wire::new();
    wire.add_second();
    let before = wire.interfaces();
    let show = "for i in lan0 eth0 lo; do cd /sys/class/net/$i; \
        echo $i $(cat address mtu operstate); done; \
        echo '### v4'; ip -4 route; echo '### v6'; ip -6 route; \
        echo '### addresses'; ip -o address | grep -v fe80: | cut -d' ' -f2-8; \
        echo '### neighbours'; ip neigh; \
        echo '### end'";
    let shown = format!("echo '### links'; ls /sys/class/net; {show}");
    let inside = run(&hull, &wire, &shown).output().ok();
    let busybox = |script: &str| {
        let words = [
            "ip", "netns", "exec", &wire.pod, "busybox", "sh", "-c", script,
        ];
        Process::new(words).output().ok()
    };
    assert_eq!(
        section(&inside, "links"),
        "eth0\nlan0\nlo\nlan0 02:00:00:00:00:02 1400 up\neth0 02:00:00:00:00:12 1500 up\n\
         lo 00:00:00:00:00:00 65536 unknown\n"
    );
    let link_local = |line: &String| !line.contains("fe80") && !line.contains("ff00");
    let there = busybox(
        "ip() { busybox ip \"$@\"; }; echo '### v4'; ip -4 route; \
        echo '### v6'; ip -6 route; echo '### end'",
    );
    for family in ["v4", "v6"] {
        let (mut guests, mut hosts) = (
            lines(section(&inside, family)),
            lines(section(&there, family)),
        );
        guests.retain(link_local);
        hosts.retain(link_local);
        assert_eq!(guests, hosts, "{family}");
        assert!(guests.len() >= 2 || family == "v6", "{guests:?}");
    }
    let addresses = section(&inside, "addresses");
    for address in [
        "lan0 inet 10.7.0.2/24",
        "eth0 inet 10.8.0.2/24",
        "lan0 inet6 fd07::2/64",
    ] {
        assert!(
            lines(addresses).iter().any(|line| line.contains(address)),
            "{addresses}"
        );
    }
    let neighbours = section(&inside, "neighbours");
    assert!(
        neighbours.contains("10.7.0.9 dev lan0 lladdr 02:00:00:00:00:09"),
        "{neighbours}"
    );
    assert_eq!(wire.interfaces(), before);
}

#[test]
fn packets_of_every_kind_pass_both_ways_and_are_counted_alike() {
    let Some(hull) = Hull::new() else { return };
    let wire = Wire::new();
    let expected = Process::new(["sha256sum"]).stdin(payload()).output().ok();
    let peer = peer::Peer::start(&wire);
    let script = "set -e; ping -c1 -w20 10.7.0.1 >/dev/null; ping6 -c1 -w20 fd07::1 >/dev/null; \
        ping -c1 -w20 -s 4000 10.7.0.1 >/dev/null; \
        nslookup -type=a name.test 10.7.0.1 | grep Address; \
        wget -q -O /tmp/got http://10.7.0.1:8080/; sha256sum < /tmp/got; \
        nc 10.7.0.1 8081 < /tmp/got; \
        wget -q -O - 'http://[fd07::1]:8080/' | sha256sum; \
        mkdir /tmp/w; echo from-the-guest > /tmp/w/f; httpd -p 80 -h /tmp/w; \
        echo serving; read line; \
        echo '### counters'; cat /sys/class/net/eth0/statistics/[rt]x_bytes; echo '### end'";
    let mut guest = run(&hull, &wire, script).stdin_open().spawn();
    guest.await_stdout("serving");
    let fetched = wire
        .as_peer(|| peer::fetch("10.7.0.2:80", "/f"))
        .join()
        .unwrap();
    assert!(fetched.ends_with("from-the-guest\n"), "{fetched}");
    let (name, monitors) = counted(&hull);
    guest.write("\n");
    guest.await_stdout("### end");
    let hosts = ["rx_bytes", "tx_bytes"].map(|name| {
        let path = format!("cat /sys/class/net/eth0/statistics/{name}");
        wire.pod_says(&path).trim().parse::<i64>().unwrap()
    });
    guest.close_stdin();
    let said = guest.wait().ok();
    assert!(said.contains("203.0.113.7"), "{said}");
    assert_eq!(said.matches(&expected).count(), 2, "{said}");
    assert!(peer.uploaded() == payload(), "the upload is another");
    let guests: Vec<i64> = section(&said, "counters")
        .lines()
        .map(|line| line.parse().unwrap())
        .collect();
    let most = i64::try_from(PAYLOAD_BYTES).unwrap() / 50;
    for ((guest, host), monitor) in guests.iter().zip(hosts).zip(monitors) {
        assert!(*guest > PAYLOAD_BYTES as i64, "{guests:?}");
        assert!(
            (guest - host).abs() < most && (guest - monitor).abs() < most,
            "{guests:?}, the host's {hosts:?}, the monitor's {monitors:?}"
        );
    }
    assert_eq!(name, "eth0");
}

/// The interface of the only container and the bytes that went over it, received and sent, as its
/// monitor has counted; and statistics that tell of both.
fn counted(hull: &Hull) -> (String, [i64; 2]) {
    let id = hull.cmd(["ps", "-q"]).output().ok();
    let inspect = ["inspect", "-f", "{{json .Hull.Interfaces}}", id.trim()];
    let seen = hull.cmd(inspect).output().ok();
    let seen: serde_json::Value = serde_json::from_str(&seen).unwrap();
    let stats = ["stats", "--no-stream", "--format", "{{.NetIO}}", id.trim()];
    let shown = hull.cmd(stats).output().ok();
    let (received, sent) = shown.trim().split_once(" / ").unwrap();
    assert!(
        received.ends_with("MB") && sent.ends_with("MB"),
        "{shown:?} of {seen}"
    );
    let number = |key: &str| seen[0][key].as_i64().unwrap();
    let name = seen[0]["Name"].as_str().unwrap().to_owned();
    (name, [number("RxBytes"), number("TxBytes")])
}

#[test]
fn a_start_with_a_network_is_copied_from_a_template_with_as_many_cards() {
    let Some(hull) = Hull::apart() else { return };
    let wire = Wire::new();
    idle(&hull, &wire, "first");
    hull.cmd(["rm", "-f", "first"]).output().ok();
    let listed = [
        "template",
        "ls",
        "--format",
        "{{.ID}} {{.Cards}} {{.Status}}",
    ];
    let made = hull.cmd(listed).output().ok();
    assert!(
        made.ends_with(" 1 usable\n") && made.lines().count() == 1,
        "{made:?}"
    );
    idle(&hull, &wire, "copy");
    // A copy's agent is there at once; one that boots is ready after its first instruction.
    let marks = "{{.Hull.StartMarks.Agent}} {{.Hull.StartMarks.Ready}}";
    let marks = hull.cmd(["inspect", "-f", marks, "copy"]).output().ok();
    let (agent, ready) = marks.trim().split_once(' ').unwrap();
    assert_eq!(agent, ready);
    let script = "cd /sys/class/net/eth0; cat address mtu; ping -c1 -w20 10.7.0.1 >/dev/null";
    let said = hull.cmd(["exec", "copy", "sh", "-c", script]).output().ok();
    assert_eq!(said, "02:00:00:00:00:02\n1400\n");
    hull.cmd(["rm", "-f", "copy"]).output().ok();
    // Two interfaces are another shape.
    wire.add_second();
    let said = run(
        &hull,
        &wire,
        "cd /sys/class/net; cat lan0/address eth0/address",
    )
    .output();
    assert_eq!(said.ok(), "02:00:00:00:00:02\n02:00:00:00:00:12\n");
    let cards = ["template", "ls", "--format", "{{.Cards}}"];
    assert_eq!(lines(&hull.cmd(cards).output().ok()), ["1", "2"]);
    assert!(
        hull.cmd(listed).output().ok().contains(made.trim()),
        "it was made again"
    );
}

#[test]
fn a_monitor_that_is_killed_leaves_the_namespace_as_it_was() {
    let Some(hull) = Hull::new() else { return };
    let wire = Wire::new();
    let before = wire.interfaces();
    let (network, image) = (wire.network(), hull.image());
    idle(&hull, &wire, "k");
    let ping = ["exec", "k", "ping", "-c1", "-w20", "10.7.0.1"];
    hull.cmd(ping).output().ok();
    assert_ne!(wire.interfaces(), before);
    let second = hull
        .cmd(["run", "--rm", "--network", &network, &image, "true"])
        .output();
    assert_eq!(second.code, 125, "{:?}", second.all());
    assert!(
        second
            .errors()
            .contains("joined by another virtual machine already"),
        "{second:?}"
    );
    let mode = hull.cmd(["inspect", "-f", "{{.HostConfig.NetworkMode}}", "k"]);
    assert_eq!(mode.output().ok().trim(), network);
    for _ in 0..2 {
        for pid in hull.processes() {
            kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
        }
        hull.cmd(["wait", "k"]).output().ok();
        // Its own kernel answers again.
        wire.pod_says("busybox ping -c1 -w20 10.7.0.1");
        assert_eq!(wire.interfaces(), before);
        hull.cmd(["start", "k"]).output().ok();
        hull.cmd(ping).output().ok();
    }
    hull.cmd(["kill", "k"]).output().ok();
    hull.cmd(["wait", "k"]).output().ok();
    assert_eq!(wire.interfaces(), before);
}

#[test]
fn an_interface_or_a_namespace_that_goes_away_leaves_a_guest_that_runs() {
    let Some(hull) = Hull::new() else { return };
    let wire = Wire::new();
    idle(&hull, &wire, "c");
    wire.in_pod("link del hull0");
    let ticks = || {
        let threads: Vec<_> = hull
            .processes()
            .into_iter()
            .flat_map(|pid| fs::read_dir(format!("/proc/{pid}/task")).unwrap())
            .map(|task| task.unwrap().path())
            .filter(|task| fs::read_to_string(task.join("comm")).unwrap() == "devices\n")
            .collect();
        let [thread] = threads.as_slice() else {
            panic!("{threads:?}");
        };
        cpu_ticks(thread)
    };
    let before = ticks();
    let deaf = ["exec", "c", "sh", "-c", "ping -c2 -w2 10.7.0.1; sleep 3"];
    assert!(hull.cmd(deaf).output().text().contains("100% packet loss"));
    // A hundred a second, if it spun.
    let spent = ticks() - before;
    assert!(spent < 100, "{spent} ticks");
    Process::new(["ip", "netns", "del", &wire.pod])
        .output()
        .ok();
    hull.cmd(["exec", "c", "true"]).output().ok();
    hull.cmd(["rm", "-f", "c"]).output().ok();
    // With the last descriptor of the namespace its end of the wire went, and so the other.
    peer::until(|| {
        let shown = Process::new(["ip", "-n", &wire.peer, "link", "show", "p0"]);
        shown.output().code != 0
    });
}

/// The processor time of a thread, in ticks: user's and system's.
fn cpu_ticks(thread: &Path) -> u64 {
    let text = fs::read_to_string(thread.join("stat")).unwrap();
    let (_, rest) = text.rsplit_once(')').unwrap();
    let fields: Vec<&str> = rest.split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn without_a_namespace_there_is_the_loopback_alone_and_bad_ones_are_refused() {
    let Some(hull) = Hull::new() else { return };
    let image = hull.image();
    let script = "ls /sys/class/net; ping -c1 -w20 127.0.0.1 >/dev/null; cat /etc/resolv.conf";
    let alone = hull
        .cmd(["run", "--rm", &image, "sh", "-c", script])
        .output();
    assert_eq!(alone.all(), (0, "lo\n".into(), String::new()));
    let file = hull.path().join("file");
    fs::write(&file, "").unwrap();
    let file = format!("ns:{}", file.display());
    for (network, words) in [
        ("ns:/no/such", "cannot open network namespace \"/no/such\""),
        (&*file, "is not a network namespace"),
        ("ns:/proc/self/ns/mnt", "is not a network namespace"),
        ("ns:/proc/1/ns/net", "is the host's own network namespace"),
    ] {
        let refused = hull
            .cmd(["run", "--rm", "--network", network, &image, "true"])
            .output();
        assert_eq!(refused.code, 125, "{:?}", refused.all());
        assert!(refused.errors().contains(words), "{:?}", refused.all());
    }
}
