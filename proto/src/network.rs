//! A guest's network: interfaces as they stand in the host's namespace, to be made again.

use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// Most interfaces of a guest.
pub const MAX_INTERFACES: usize = 8;

/// The address of card `number` in a guest that is to be copied: each copy gives it its own.
#[must_use]
pub const fn spare_mac(number: u8) -> [u8; 6] {
    // One of those that anybody may give away.
    [2, b'h', b'u', b'l', b'l', number]
}

/// Most addresses, routes and neighbours of a guest's interfaces, all counted. With these, a
/// setup fits the control stream's line.
pub const MAX_NETWORK_ENTRIES: usize = 192;

/// One network card of the guest, and all that its kernel is to know of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// The card's address, by which it is found.
    pub mac: [u8; 6],
    /// The largest packet.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<Address>,
    /// The routes that lead over it.
    pub routes: Vec<Route>,
    /// Neighbours that are known for good.
    pub neighbours: Vec<Neighbour>,
}

/// An address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// Bits of its network.
    pub prefix: u8,
    /// The other end of a link between two.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<IpAddr>,
    /// The address that is everybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broadcast: Option<Ipv4Addr>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
}

/// A route over an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Route {
    /// Where it leads; the family's zero address for everywhere.
    pub destination: IpAddr,
    /// Bits of the destination that count.
    pub prefix: u8,
    /// Who takes the packets on, of either family.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
    /// The address that packets are sent from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<IpAddr>,
    /// Its metric: the least is preferred.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<u32>,
    /// The largest packet on this way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// `RT_SCOPE_*`.
    pub scope: u8,
    /// `RTPROT_*`: who made it.
    pub protocol: u8,
    /// The gateway is on the link, whatever the addresses say.
    #[serde(default)]
    pub onlink: bool,
}

/// A neighbour whose card is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Neighbour {
    /// Its address.
    pub address: IpAddr,
    /// Its card's.
    pub mac: [u8; 6],
}
