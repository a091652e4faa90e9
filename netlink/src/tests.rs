//! Messages as bytes, and whole networks made and read in namespaces of their own.

use std::process::Command;

use hull_proto::{Address, Interface, Neighbour, Route};

use crate::{ACK, Answer, Change, Message, NetworkError, Protocol, Socket};
use crate::{apply, change, links, read};

#[test]
fn a_message_reads_back_as_what_was_written() {
    let message = Message::new(16, ACK, &[1, 2, 3])
        .with(5, &[9])
        .with_nested(6, |message| message.with_text(7, "ab").with(8, &[]))
        .with_some(9, Some(7u32.to_ne_bytes()))
        .with_some::<[u8; 4]>(10, None);
    let bytes = message.numbered(77);
    let answers = Answer::all_of(&[&bytes[..], &bytes[..]].concat());
    assert_eq!(answers.len(), 2);
    let answer = &answers[1];
    assert_eq!((answer.kind, answer.sequence), (16, 77));
    assert_eq!(answer.body[..4], [1, 2, 3, 0]);
    let attributes = answer.attributes(3);
    assert_eq!(attributes.get(5), Some(&[9][..]));
    assert_eq!(attributes.nested(6).get(7), Some(&b"ab\0"[..]));
    assert_eq!(attributes.nested(6).get(8), Some(&[][..]));
    assert_eq!(attributes.number(9), Some(7));
    assert_eq!(attributes.get(10), None);
}

#[test]
fn what_is_cut_short_ends_the_list() {
    let bytes = Message::new(16, 0, &[0; 4]).with(1, &[1; 8]).numbered(1);
    for end in 0..bytes.len() {
        assert!(Answer::all_of(&bytes[..end]).is_empty());
    }
    let answer = &Answer::all_of(&bytes)[0];
    for end in 0..answer.body.len() {
        let cut = Answer {
            body: answer.body[..end].to_vec(),
            ..answer.clone()
        };
        assert_eq!(cut.attributes(4).count(), 0);
    }
}

/// Whether this is a network namespace of the test's own: if not, the test is run in one.
fn is_alone(test: &str) -> bool {
    const ALONE: &str = "HULL_NETLINK_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: making network namespaces takes root");
        return false;
    }
    let ran = Command::new("unshare")
        .arg("--net")
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", &format!("tests::{test}")])
        .env(ALONE, "1")
        .status();
    assert!(ran.unwrap().success());
    false
}

/// Runs lines of ip(8).
fn ip(lines: &str) {
    for line in lines.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let ran = Command::new("ip").args(line.split_whitespace()).status();
        assert!(ran.unwrap().success(), "ip {line}");
    }
}

fn socket() -> Socket {
    Socket::open(Protocol::Route).unwrap()
}

fn refused(result: Result<Vec<(u32, Interface)>, NetworkError>) -> String {
    match result {
        Err(NetworkError::Refused(why)) => why,
        other => panic!("{other:?}"),
    }
}

/// What [`NETWORK`] says of its two cards.
fn check(eth0: &Interface, eth1: &Interface) {
    assert_eq!((eth0.mac, eth0.mtu), ([2, 0, 0, 0, 0, 0x10], 1450));
    let first = Address {
        address: [10, 1, 0, 2].into(),
        prefix: 24,
        peer: None,
        broadcast: Some([10, 1, 0, 255].into()),
        scope: 0,
    };
    assert_eq!((eth0.addresses.len(), eth0.addresses[0]), (3, first));
    assert_eq!(eth1.addresses[0].peer, Some([10, 2, 0, 1].into()));
    let way = Route {
        destination: [192, 0, 2, 0].into(),
        prefix: 24,
        gateway: Some([198, 51, 100, 1].into()),
        source: None,
        metric: Some(50),
        mtu: Some(1300),
        scope: 0,
        protocol: 3,
        onlink: true,
    };
    assert!(eth1.routes.contains(&way), "{eth1:?}");
    let gate = Neighbour {
        address: [10, 1, 0, 1].into(),
        mac: [2, 0, 0, 0, 0, 0x99],
    };
    assert_eq!(eth0.neighbours, [gate]);
    let destinations: Vec<_> = eth0.routes.iter().map(|way| way.destination).collect();
    assert!(!destinations.contains(&[10, 9, 0, 0].into()), "{eth0:?}");
}

/// A namespace with something of everything.
const NETWORK: &str = "link set lo up
        link add eth0 type veth peer name p0
        link add eth1 type veth peer name p1
        tuntap add idle mode tap
        link add bridge type bridge
        link set p0 master bridge
        link set eth0 address 02:00:00:00:00:10 mtu 1450
        link set eth1 address 02:00:00:00:00:11
        link set p1 address 02:00:00:00:00:21
        link set eth0 up
        link set p0 up
        link set eth1 up
        link set p1 up
        address add 10.1.0.2/24 broadcast 10.1.0.255 dev eth0
        address add 10.1.0.3/32 dev eth0
        address add 10.2.0.2 peer 10.2.0.1 dev eth1
        address add fd00:1::2/64 dev eth0 nodad
        route add default via 10.1.0.1
        route add 192.0.2.0/24 via 198.51.100.1 dev eth1 onlink metric 50 mtu 1300
        route add 203.0.113.0/24 dev eth0 src 10.1.0.3
        route add 198.18.0.0/15 via inet6 fd00:1::1 dev eth0
        route add default via fd00:1::1 dev eth0
        route add 10.9.0.0/16 dev eth0 table 100
        neighbour add 10.1.0.1 lladdr 02:00:00:00:00:99 dev eth0";

/// Its cards anew, each with the other one's name.
const CROSSED: &str = "link del eth0
        link del eth1
        link add eth1 type veth peer name p0
        link add eth0 type veth peer name p1
        link set p0 up
        link set p1 up
        link set eth1 address 02:00:00:00:00:10
        link set eth0 address 02:00:00:00:00:11";

#[test]
fn a_namespace_is_read_and_made_again() {
    if !is_alone("a_namespace_is_read_and_made_again") {
        return;
    }
    ip(NETWORK);
    let mut found = read(&mut socket()).unwrap();
    found.sort_by(|(_, one), (_, other)| one.name.cmp(&other.name));
    let mut names: Vec<_> = found.iter().map(|(_, found)| found.name.as_str()).collect();
    // The peer is up, too; the port, the idle one and a bridge that is down are nobody's.
    names.sort_unstable();
    assert_eq!(names, ["eth0", "eth1", "p1"]);
    check(&found[0].1, &found[1].1);
    // The same again, on cards whose names are crossed.
    ip(CROSSED);
    let wanted: Vec<_> = found[..2].iter().map(|(_, found)| found.clone()).collect();
    apply(&mut socket(), &wanted).unwrap();
    let mut made: Vec<_> = read(&mut socket())
        .unwrap()
        .into_iter()
        .map(|(_, made)| made)
        .collect();
    made.retain(|made| made.name.starts_with("eth"));
    made.sort_by(|one, other| one.name.cmp(&other.name));
    assert_eq!(made, wanted);
    let lost = Interface {
        mac: [2; 6],
        ..wanted[0].clone()
    };
    let error = apply(&mut socket(), &[lost]).unwrap_err().to_string();
    assert_eq!(error, "there is no card for interface eth0");
}

#[test]
fn what_a_guest_cannot_have_is_refused() {
    if !is_alone("what_a_guest_cannot_have_is_refused") {
        return;
    }
    ip("link add x0 type veth peer name x1
        link set x0 up
        link set x1 up
        address add 10.0.0.1/24 dev x0
        route add 10.5.0.0/16 nexthop via 10.0.0.2 nexthop via 10.0.0.3");
    let why = refused(read(&mut socket()));
    assert!(
        why.starts_with("the route to 10.5.0.0/16 has several next hops"),
        "{why}"
    );
    ip("route del 10.5.0.0/16");
    for number in 0..hull_proto::MAX_NETWORK_ENTRIES {
        ip(&format!("route add 10.6.{number}.0/24 dev x0"));
    }
    let why = refused(read(&mut socket()));
    let limit = format!("more than the {}", hull_proto::MAX_NETWORK_ENTRIES);
    assert!(why.contains(&limit), "{why}");
    ip("tuntap add t0 mode tun
        link set t0 up");
    let why = refused(read(&mut socket()));
    assert!(why.starts_with("interface t0 is not Ethernet's"), "{why}");
}

#[test]
fn an_interface_is_changed_and_a_missing_one_is_an_error() {
    if !is_alone("an_interface_is_changed_and_a_missing_one_is_an_error") {
        return;
    }
    ip("tuntap add x0 mode tap");
    let find = || {
        let mut links = links(&mut socket()).unwrap();
        links.pop().unwrap()
    };
    let index = find().index;
    let wish = Change {
        name: Some("b"),
        mac: Some([2, 0, 0, 0, 0, 9]),
        mtu: Some(1280),
        up: true,
        is_silent: true,
    };
    change(&mut socket(), index, wish).unwrap();
    let link = find();
    assert_eq!(
        (link.name.as_str(), link.mac, link.mtu, link.is_up),
        ("b", wish.mac, 1280, true)
    );
    let addresses = Command::new("ip")
        .args(["-6", "address", "show", "dev", "b"])
        .output();
    assert!(addresses.unwrap().stdout.is_empty());
    let error = change(&mut socket(), 999, wish).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(19), "{error}");
}
