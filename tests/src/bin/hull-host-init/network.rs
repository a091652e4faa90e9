//! The machine's network: a bare loopback for commands, and the control card out of their sight.
//!
//! Owns: the few netlink requests that takes. Refuses: everything commands set up themselves.
//!
//! The card that QEMU forwards callers through is moved to a namespace of its own, where only
//! the listening socket lives: a test that counts interfaces sees `lo` alone.

use std::fs::File;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use hull_tests::host::wire::PORT;
use rustix::net::netlink;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

/// The address that QEMU's user-mode network gives its first machine.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 15);
const CONTROL_CARD: &str = "eth0";

const RTM_NEWLINK: u16 = 16;
const RTM_NEWADDR: u16 = 20;
const REQUEST_WITH_ACK: u16 = 0x1 | 0x4;
const CREATE_EXCLUSIVE: u16 = 0x400 | 0x200;
const IFLA_NET_NS_FD: u16 = 28;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFF_UP: u32 = 1;

/// Brings up `lo`, hides the control card and listens behind it.
///
/// # Errors
/// When the card is missing or a request is refused.
pub(crate) fn set_up() -> Result<TcpListener> {
    let commands = current_namespace()?;
    sys::new_network_namespace().context("make the control network namespace")?;
    let control = current_namespace()?;
    enter(&commands)?;
    link_up("lo")?;
    move_link(CONTROL_CARD, &control)?;
    enter(&control)?;
    link_up("lo")?;
    link_up(CONTROL_CARD)?;
    add_address(CONTROL_CARD)?;
    let listener =
        TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)).context("listen for commands")?;
    enter(&commands)?;
    Ok(listener)
}

fn current_namespace() -> Result<OwnedFd> {
    Ok(File::open("/proc/thread-self/ns/net")
        .context("open the network namespace")?
        .into())
}

fn enter(namespace: &OwnedFd) -> Result<()> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("enter a network namespace")
}

fn link_up(name: &str) -> Result<()> {
    let body = link_body(index(name)?, IFF_UP);
    request(RTM_NEWLINK, 0, &body).with_context(|| format!("bring up {name}"))
}

fn move_link(name: &str, namespace: &OwnedFd) -> Result<()> {
    let mut body = link_body(index(name)?, 0);
    let fd = u32::try_from(namespace.as_raw_fd()).context("a descriptor is negative")?;
    attribute(&mut body, IFLA_NET_NS_FD, &fd.to_ne_bytes());
    request(RTM_NEWLINK, 0, &body).with_context(|| format!("move {name}"))
}

fn add_address(name: &str) -> Result<()> {
    let mut body = vec![2, 24, 0, 0]; // AF_INET, prefix length, flags, scope
    body.extend_from_slice(&index(name)?.to_ne_bytes());
    attribute(&mut body, IFA_LOCAL, &ADDRESS.octets());
    attribute(&mut body, IFA_ADDRESS, &ADDRESS.octets());
    request(RTM_NEWADDR, CREATE_EXCLUSIVE, &body)
        .with_context(|| format!("give {name} its address"))
}

fn index(name: &str) -> Result<u32> {
    let socket = net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    net::netdevice::name_to_index(&socket, name)
        .with_context(|| format!("find the network interface {name}"))
}

/// `struct ifinfomsg` of rtnetlink(7).
fn link_body(index: u32, flags: u32) -> Vec<u8> {
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&flags.to_ne_bytes());
    body.extend_from_slice(&flags.to_ne_bytes()); // the flags to change
    body
}

fn attribute(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
    body.extend_from_slice(&length.to_ne_bytes());
    body.extend_from_slice(&kind.to_ne_bytes());
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

/// Sends one netlink(7) request and reads its answer.
fn request(kind: u16, flags: u16, body: &[u8]) -> Result<()> {
    let socket = net::socket(
        AddressFamily::NETLINK,
        SocketType::RAW,
        None, // NETLINK_ROUTE
    )
    .context("open a netlink socket")?;
    let length = u32::try_from(body.len() + 16).context("the request is too long")?;
    let mut message = length.to_ne_bytes().to_vec();
    message.extend_from_slice(&kind.to_ne_bytes());
    message.extend_from_slice(&(REQUEST_WITH_ACK | flags).to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence number and port
    message.extend_from_slice(body);
    net::sendto(
        &socket,
        &message,
        SendFlags::empty(),
        &netlink::SocketAddrNetlink::new(0, 0),
    )
    .context("send a netlink request")?;
    let mut answer = [0; 4096];
    let (_, count) =
        net::recv(&socket, &mut answer, RecvFlags::empty()).context("read the netlink answer")?;
    ensure!(count >= 20, "the netlink answer has {count} bytes");
    let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    if code != 0 {
        return Err(std::io::Error::from_raw_os_error(-code)).context("the kernel refused");
    }
    Ok(())
}
