//! Guests that go on in another network.

use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::process::DEADLINE;

use crate::peer;
use crate::wire::Wire;

/// What the guest serves, to whoever is at the other end.
fn served(wire: &Wire, address: &'static str) -> String {
    let begun = Instant::now();
    loop {
        // The server may still be coming up.
        match wire.as_peer(move || peer::fetch(address, "/f")).join() {
            Ok(said) => return said,
            Err(_) => assert!(begun.elapsed() < DEADLINE, "nobody serves at {address}"),
        }
    }
}

#[test]
fn a_copy_has_its_own_networks_addresses_and_serves_there() {
    let Some(hull) = Hull::new() else { return };
    let (here, there, wide) = (Wire::new(), Wire::new(), Wire::new());
    there.in_pod(
        "link set eth0 address 02:00:00:00:00:22
        address del 10.7.0.2/24 dev eth0
        address add 10.7.0.22/24 dev eth0
        route add default via 10.7.0.1",
    );
    wide.add_second();
    let (image, network) = (hull.image(), here.network());
    let script = "mkdir /tmp/w; echo from-the-guest > /tmp/w/f; httpd -p 80 -h /tmp/w; \
        echo serving; while :; do sleep 1; done";
    let words = ["run", "-d", "--name", "web", "--network", &network];
    let command = [&*image, "sh", "-c", script];
    hull.cmd(words.into_iter().chain(command)).output().ok();
    let mut logs = hull.cmd(["logs", "-f", "web"]).spawn();
    logs.await_stdout("serving");
    assert!(served(&here, "10.7.0.2:80").ends_with("from-the-guest\n"));
    let saved = hull.path().join("saved").display().to_string();
    hull.cmd(["checkpoint", "-R", "web", &saved]).output().ok();
    let from = ["run", "-d", "--name", "copy", "--from", &saved];
    for (more, words) in [
        (&[][..], "of a container that had a network"),
        (
            &["--network", &wide.network()],
            "has 1 network cards, and its network now 2",
        ),
    ] {
        let refused = hull.cmd(from.iter().chain(more).copied()).output();
        assert_eq!(refused.code, 125, "{refused:?}");
        assert!(refused.errors().contains(words), "{:?}", refused.all());
    }
    let network = there.network();
    let more = ["--network", &*network];
    hull.cmd(from.into_iter().chain(more)).output().ok();
    let show = "cat /sys/class/net/eth0/address; ls /sys/class/net; ip -o -4 address show eth0; \
        ip -4 route";
    let said = hull.cmd(["exec", "copy", "sh", "-c", show]).output().ok();
    assert!(said.starts_with("02:00:00:00:00:22\neth0\nlo\n"), "{said}");
    assert!(
        said.contains("inet 10.7.0.22/24") && !said.contains("10.7.0.2/24"),
        "{said}"
    );
    assert!(said.contains("default via 10.7.0.1 dev eth0"), "{said}");
    assert!(served(&there, "10.7.0.22:80").ends_with("from-the-guest\n"));
    // The one that was saved is where it was.
    assert!(served(&here, "10.7.0.2:80").ends_with("from-the-guest\n"));
    hull.cmd(["rm", "-f", "copy", "web"]).output().ok();
    let _ended = logs.wait();
}
