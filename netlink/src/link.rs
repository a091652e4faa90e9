//! Interfaces as such: what there is, and changing one.

use std::io;

use crate::message::{Attributes, Message, u16_at, u32_at};
use crate::socket::{ACK, Socket};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
/// `struct ifinfomsg`.
const INFO_BYTES: usize = 16;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const AF_INET6: u16 = 10;

const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
const ARPHRD_ETHER: u16 = 1;

/// An interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Its number in the namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its card's address, if it is one of Ethernet's.
    pub mac: Option<[u8; 6]>,
    /// Its largest packet.
    pub mtu: u32,
    /// It is up.
    pub is_up: bool,
    /// It is the loopback.
    pub is_loopback: bool,
    /// It is part of another one, such as a bridge.
    pub is_port: bool,
}

/// What is to be changed of an interface.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Change<'a> {
    /// Its name.
    pub name: Option<&'a str>,
    /// Its card's address: only while it is down.
    pub mac: Option<[u8; 6]>,
    /// Its largest packet.
    pub mtu: Option<u32>,
    /// Brings it up.
    pub up: bool,
    /// The kernel says nothing on it by itself: it gets no IPv6 address of its own.
    pub is_silent: bool,
}

/// All interfaces of the socket's namespace, by their numbers.
///
/// # Errors
/// What the kernel says.
pub fn links(socket: &mut Socket) -> io::Result<Vec<Link>> {
    let answers = socket.list(RTM_GETLINK, &[0; INFO_BYTES])?;
    let links = answers
        .iter()
        .filter(|answer| answer.kind == RTM_NEWLINK)
        .filter_map(|answer| link(&answer.body, answer.attributes(INFO_BYTES)));
    let mut links: Vec<Link> = links.collect();
    links.sort_by_key(|link| link.index);
    Ok(links)
}

fn link(info: &[u8], attributes: Attributes<'_>) -> Option<Link> {
    let (kind, flags) = (u16_at(info, 2)?, u32_at(info, 8)?);
    let mac = attributes
        .get(IFLA_ADDRESS)
        .and_then(|bytes| bytes.try_into().ok());
    Some(Link {
        index: u32_at(info, 4)?,
        name: text(attributes.get(IFLA_IFNAME)?),
        mac: mac.filter(|_| kind == ARPHRD_ETHER),
        mtu: attributes.number(IFLA_MTU)?,
        is_up: flags & IFF_UP != 0,
        is_loopback: flags & IFF_LOOPBACK != 0,
        is_port: attributes.number(IFLA_MASTER).is_some(),
    })
}

/// Changes an interface.
///
/// # Errors
/// What the kernel says.
pub fn change(socket: &mut Socket, index: u32, change: Change<'_>) -> io::Result<()> {
    let up = if change.up { IFF_UP } else { 0 };
    let mut info = vec![0; 4];
    for word in [index, up, up] {
        info.extend_from_slice(&word.to_ne_bytes());
    }
    let mut message = Message::new(RTM_NEWLINK, ACK, &info)
        .with_some(IFLA_ADDRESS, change.mac)
        .with_some(IFLA_MTU, change.mtu.map(u32::to_ne_bytes));
    if let Some(name) = change.name {
        message = message.with_text(IFLA_IFNAME, name);
    }
    if change.is_silent {
        message = message.with_nested(IFLA_AF_SPEC, |message| {
            message.with_nested(AF_INET6, |message| {
                message.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
            })
        });
    }
    socket.ask(&[message])
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(bytes.get(..end.unwrap_or(bytes.len())).unwrap_or_default()).into()
}
