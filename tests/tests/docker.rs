//! Debian's Docker with Hull as a runtime, by way of `hull-oci`: its networks, which come to a
//! container once it is made, and its commands.

#![expect(clippy::unwrap_used, reason = "a test that can't go on has failed")]

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use hull_tests::host::releases;
use hull_tests::hull::Hull;
use hull_tests::image::{self, Image};
use hull_tests::process::{DEADLINE, Process, Running};
use rustix::process::Signal;

/// How long a daemon may live whose test doesn't end it.
const LIFE: Duration = Duration::from_secs(900);

/// A Docker of a test's own, in a network namespace of its own: it makes bridges and firewalls.
struct Docker<'a> {
    hull: &'a Hull,
    programs: PathBuf,
    namespace: String,
    daemon: Option<Running>,
}

impl<'a> Docker<'a> {
    fn new(hull: &'a Hull) -> Self {
        Process::new(["modprobe", "-a", "tun", "veth", "bridge", "br_netfilter"])
            .output()
            .ok();
        let own = hull.path().file_name().unwrap().to_string_lossy();
        let namespace = format!("docker-{own}");
        Process::new(["ip", "netns", "add", &namespace])
            .output()
            .ok();
        let mut docker = Self {
            hull,
            programs: releases::find("bookworm", "docker.io").unwrap().join("usr"),
            namespace,
            daemon: None,
        };
        docker
            .within(&["ip", "link", "set", "lo", "up"])
            .output()
            .ok();
        fs::write(hull.path().join("config.toml"), "").unwrap();
        docker.start();
        let archive = hull.path().join("image.tar");
        Image::new().save(&archive);
        docker
            .docker(&["load", "-q", "-i", archive.to_str().unwrap()])
            .output()
            .ok();
        docker
    }

    fn at(&self, name: &str) -> String {
        self.hull.path().join(name).display().to_string()
    }

    /// A process in the daemon's network namespace.
    fn within(&self, words: &[&str]) -> Process {
        let namespace = format!("--net=/run/netns/{}", self.namespace);
        Process::new([&["nsenter", &namespace], words].concat())
    }

    fn start(&mut self) {
        let script = "exec \"$0/sbin/dockerd\" --data-root \"$1/data\" --exec-root \"$1/exec\" \
             --pidfile \"$1/docker.pid\" -H \"unix://$1/docker.sock\" -s vfs \
             --userland-proxy-path \"$0/sbin/docker-proxy\" --add-runtime \"hull=$2\" \
             >>\"$1/docker.log\" 2>&1";
        let programs = self.programs.display().to_string();
        let runtime = self
            .hull
            .program()
            .with_file_name("hull-oci")
            .display()
            .to_string();
        let words = ["sh", "-c", script, &programs, &self.at(""), &runtime];
        let daemon = self
            .within(&words)
            .env("HULL_CONFIG", self.at("config.toml"))
            .env("HULL_STATE_DIR", self.at("state"))
            .env("HULL_RUN_DIR", self.at("run"))
            .deadline(LIFE)
            .spawn();
        self.daemon = Some(daemon);
        let until = Instant::now() + DEADLINE;
        while self.docker(&["version"]).output().code != 0 {
            let log = fs::read_to_string(self.at("docker.log")).unwrap_or_default();
            assert!(Instant::now() < until, "no daemon: {log}");
        }
    }

    fn docker(&self, words: &[&str]) -> Process {
        let program = self.programs.join("bin/docker").display().to_string();
        let socket = format!("unix://{}", self.at("docker.sock"));
        Process::new([&[program.as_str(), "-H", &socket], words].concat())
    }

    /// A container that serves its own name by HTTP.
    fn serve(&self, name: &str, flags: &[&str]) {
        let begin = [
            "run",
            "--runtime",
            "hull",
            "-d",
            "--name",
            name,
            "--hostname",
            name,
        ];
        let script = "mkdir /tmp/w; hostname >/tmp/w/f; echo up; exec httpd -f -p 80 -h /tmp/w";
        let words = [&begin, flags, &[image::PLAIN, "sh", "-c", script]].concat();
        self.docker(&words).output().ok();
        self.docker(&["logs", "-f", name])
            .spawn()
            .await_stdout("up\n");
    }

    /// How many addresses of a name of four letters a network's name server tells by TCP.
    fn addresses_by_tcp(&self, network: &str, name: &str) -> usize {
        // RFC 1035, sections 4.1 and 4.2.2: a question of 22 bytes for an address.
        let question = format!(
            r"\000\026\022\064\001\000\000\001\000\000\000\000\000\000\004{name}\000\000\001\000\001"
        );
        let ask = format!("printf '{question}' | nc -w 20 127.0.0.11 53 | od -An -v -tx1");
        let begin = ["run", "--runtime", "hull", "--rm", "--network", network];
        let words = [&begin[..], &[image::PLAIN, "sh", "-c", &ask]].concat();
        let said = self.docker(&words).output().ok();
        let answer: Vec<&str> = said.split_whitespace().collect();
        // Its number, behind its length; the number of answers in it.
        assert_eq!(answer.get(2..4), Some(&["12", "34"][..]), "{said}");
        usize::from_str_radix(&answer[8..10].concat(), 16).unwrap()
    }

    /// Nothing is left, of its containers and of the daemon's.
    fn end(mut self) {
        let left = self.docker(&["ps", "-aq"]).output().ok();
        assert_eq!(left, "");
        let links = self.within(&["ip", "-br", "link"]).output().ok();
        assert!(
            !links.contains("veth") && !links.contains("hull"),
            "{links}"
        );
        let daemon = self.daemon.take().unwrap();
        daemon.signal(Signal::TERM);
        let _ended = daemon.wait();
        // Its own namespace's mark.
        let _unmounted = Process::new(["umount", &self.at("exec/netns/default")]).output();
    }
}

impl Drop for Docker<'_> {
    fn drop(&mut self) {
        drop(self.daemon.take());
        let _removed = Process::new(["ip", "netns", "delete", &self.namespace]).output();
    }
}

#[test]
fn containers_are_on_dockers_networks() {
    let Some(hull) = Hull::new() else { return };
    let docker = Docker::new(&hull);
    docker.serve("web", &["-p", "8085:80"]);
    let fetch = ["busybox", "wget", "-qO-", "http://127.0.0.1:8085/f"];
    assert_eq!(docker.within(&fetch).output().ok(), "web\n");
    let address = "{{.NetworkSettings.IPAddress}}";
    let address = docker
        .docker(&["inspect", "-f", address, "web"])
        .output()
        .ok();
    let script = format!("ls /sys/class/net; wget -qO- http://{}/f", address.trim());
    let ask = [
        "run",
        "--runtime",
        "hull",
        "--rm",
        image::PLAIN,
        "sh",
        "-c",
        &script,
    ];
    assert_eq!(docker.docker(&ask).output().ok(), "eth0\nlo\nweb\n");
    let ls = ["ls", "/sys/class/net"];
    let none = [
        "run",
        "--runtime",
        "hull",
        "--rm",
        "--network",
        "none",
        image::PLAIN,
    ];
    assert_eq!(
        docker.docker(&[&none[..], &ls].concat()).output().ok(),
        "lo\n"
    );
    // On the host a container is its monitor.
    let top = docker.docker(&["top", "web"]).output().ok();
    let lines: Vec<&str> = top.lines().collect();
    assert!(
        lines.len() == 2 && lines[1].contains("hull-monitor"),
        "{top}"
    );
    docker.docker(&["rm", "-f", "web"]).output().ok();
    docker.end();
}

#[test]
fn a_container_is_on_as_many_networks_as_its_machine_has_cards() {
    let Some(hull) = Hull::new() else { return };
    let docker = Docker::new(&hull);
    let create = [
        "create",
        "--runtime",
        "hull",
        "--name",
        "both",
        image::PLAIN,
    ];
    let script = "ls /sys/class/net; trap 'exit 3' TERM; while :; do sleep 0.1; done";
    docker
        .docker(&[&create[..], &["sh", "-c", script]].concat())
        .output()
        .ok();
    for network in ["one", "two"] {
        docker.docker(&["network", "create", network]).output().ok();
    }
    docker
        .docker(&["network", "connect", "one", "both"])
        .output()
        .ok();
    docker.docker(&["start", "both"]).output().ok();
    docker
        .docker(&["logs", "-f", "both"])
        .spawn()
        .await_stdout("eth0\neth1\nlo\n");
    let said = docker
        .docker(&["exec", "both", "sh", "-c", "echo inside; exit 5"])
        .output();
    assert_eq!(said.all(), (5, "inside\n".into(), String::new()));
    let ask = ["run", "--runtime", "hull", "--rm", "--network", "one"];
    let by_name = [image::PLAIN, "ping", "-c1", "-w20", "both"];
    let met = docker.docker(&[&ask[..], &by_name].concat()).output().ok();
    assert!(met.contains("1 packets received"), "{met}");
    assert_eq!(docker.addresses_by_tcp("one", "both"), 1);
    docker.docker(&["stop", "both"]).output().ok();
    let code = docker
        .docker(&["inspect", "-f", "{{.State.ExitCode}}", "both"])
        .output()
        .ok();
    assert_eq!(code, "3\n");
    docker
        .docker(&["network", "connect", "two", "both"])
        .output()
        .ok();
    let refused = docker.docker(&["start", "both"]).output();
    assert_ne!(refused.code, 0);
    let why = "3 interfaces came when the virtual machine was there: a virtual machine has 2 cards";
    assert!(refused.errors().contains(why), "{refused:?}");
    docker.docker(&["rm", "-f", "both"]).output().ok();
    docker.end();
}
