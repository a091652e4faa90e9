//! Two network namespaces and the wires between them: one for a guest, one for who talks to it.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use hull_tests::process::Process;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::peer::until;

static NUMBER: AtomicU32 = AtomicU32::new(0);

/// The namespaces, gone when this is dropped.
pub(crate) struct Wire {
    /// Where the guest's interfaces are.
    pub(crate) pod: String,
    /// Where the other ends are.
    pub(crate) peer: String,
}

impl Wire {
    /// `eth0` in the guest's namespace, with addresses of both families, a route and a known
    /// neighbour; `p0` at its other end.
    pub(crate) fn new() -> Self {
        // The kernel loads nf_tables by itself, but not what makes /dev/net/tun.
        Process::new(["modprobe", "-a", "tun", "veth"])
            .output()
            .ok();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = |side| format!("hull-{side}-{}-{number}", std::process::id());
        let wire = Self {
            pod: name("pod"),
            peer: name("peer"),
        };
        for side in [&wire.pod, &wire.peer] {
            ip(&format!("netns add {side}"));
        }
        ip(&format!(
            "-n {0} link add p0 mtu 1400 type veth peer name eth0 mtu 1400 netns {1}",
            wire.peer, wire.pod
        ));
        wire.in_pod(
            "link set lo up
            link set eth0 address 02:00:00:00:00:02
            link set eth0 up
            address add 10.7.0.2/24 dev eth0
            address add fd07::2/64 dev eth0 nodad
            route add default via 10.7.0.1
            route add 198.51.100.0/24 via 10.7.0.1 mtu 1300
            neighbour add 10.7.0.9 lladdr 02:00:00:00:00:09 dev eth0",
        );
        wire.in_peer(
            "link set lo up
            link set p0 up
            address add 10.7.0.1/24 dev p0
            address add fd07::1/64 dev p0 nodad",
        );
        wire
    }

    /// Another interface, by the name that the guest's first card has before it is named.
    pub(crate) fn add_second(&self) {
        ip(&format!(
            "-n {} link add p1 type veth peer name net1 netns {}",
            self.peer, self.pod
        ));
        self.in_pod(
            "link set eth0 down
            link set eth0 name lan0
            link set lan0 up
            link set net1 name eth0
            link set eth0 address 02:00:00:00:00:12
            address add 10.8.0.2/24 dev eth0
            link set eth0 up
            address add fd07::2/64 dev lan0 nodad
            route add default via 10.7.0.1
            route add 198.51.100.0/24 via 10.7.0.1 mtu 1300
            neighbour add 10.7.0.9 lladdr 02:00:00:00:00:09 dev lan0",
        );
        self.in_peer(
            "link set p1 up
            address add 10.8.0.1/24 dev p1",
        );
    }

    /// What `--network` is given.
    pub(crate) fn network(&self) -> String {
        format!("ns:{}", self.path().display())
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.pod)
    }

    /// Runs lines of ip(8) in the guest's namespace.
    pub(crate) fn in_pod(&self, lines: &str) {
        lines
            .lines()
            .for_each(|line| ip(&format!("-n {} {line}", self.pod)));
    }

    /// Runs lines of ip(8) in the other.
    pub(crate) fn in_peer(&self, lines: &str) {
        lines
            .lines()
            .for_each(|line| ip(&format!("-n {} {line}", self.peer)));
    }

    /// A command's output, run in the guest's namespace.
    pub(crate) fn pod_says(&self, words: &str) -> String {
        let all = format!("ip netns exec {} {words}", self.pod);
        Process::new(all.split_whitespace()).output().ok()
    }

    /// Runs `work` on a thread that is in the other namespace: its sockets are there.
    pub(crate) fn as_peer<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let namespace = File::open(format!("/run/netns/{}", self.peer)).unwrap();
        thread::spawn(move || {
            let kind = Some(LinkNameSpaceType::Network);
            move_into_link_name_space(namespace.as_fd(), kind).unwrap();
            work()
        })
    }

    /// The interfaces of the guest's namespace, as they stand once the kernel has seen that each
    /// has a carrier, but for whether it still makes sure of an address.
    pub(crate) fn interfaces(&self) -> String {
        let mut shown = String::new();
        until(|| {
            shown = self.pod_says("ip -details address");
            !shown.contains("state DOWN")
        });
        shown.replace(" tentative", "")
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        for side in [&self.pod, &self.peer] {
            // One that a test has removed is gone.
            let _gone = Process::new(["ip", "netns", "del", side]).output();
        }
    }
}

fn ip(line: &str) {
    let words = ["ip"].into_iter().chain(line.split_whitespace());
    Process::new(words).output().ok();
}
