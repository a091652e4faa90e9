//! Making interfaces again that were read elsewhere, on cards with the same addresses or spare ones.

use std::net::IpAddr;

use hull_proto::{Address, Interface, Neighbour, Route, spare_mac};

use crate::link::{Change, change, links};
use crate::message::Message;
use crate::socket::{ACK, CREATE, EXCLUSIVE, Socket};
use crate::words::*;
use crate::{NetworkError, failed};

/// Gives each card its name, its address if it came with a spare one, size, addresses, neighbours and routes, and brings it up.
///
/// # Errors
/// A card that isn't there, or what the kernel refused.
pub fn apply(socket: &mut Socket, interfaces: &[Interface]) -> Result<(), NetworkError> {
    let indices = find(socket, interfaces)?;
    let cards = || indices.iter().copied().zip(interfaces);
    name(socket, interfaces, &indices)?;
    for (index, interface) in cards() {
        let up = Change {
            mac: Some(interface.mac),
            mtu: Some(interface.mtu),
            up: true,
            ..Change::default()
        };
        let name = &interface.name;
        change(socket, index, up).map_err(failed(format!("bring interface {name} up")))?;
        for entry in &interface.addresses {
            let what = || format!("give {name} the address {}/{}", entry.address, entry.prefix);
            let message = address(entry, index);
            socket
                .ask(&[message])
                .map_err(|error| failed(what())(error))?;
        }
        for entry in &interface.neighbours {
            let what = || format!("make {} a neighbour over {name}", entry.address);
            let message = neighbour(entry, index);
            socket
                .ask(&[message])
                .map_err(|error| failed(what())(error))?;
        }
    }
    // A gateway must be reachable when it is named: what is on the link comes first.
    for has_gateway in [false, true] {
        for (index, interface) in cards() {
            let routes = interface.routes.iter();
            for entry in routes.filter(|route| route.gateway.is_some() == has_gateway) {
                let what = || {
                    let (to, over) = (entry.destination, &interface.name);
                    format!("route {to}/{} over {over}", entry.prefix)
                };
                let message = route(entry, index);
                socket
                    .ask(&[message])
                    .map_err(|error| failed(what())(error))?;
            }
        }
    }
    Ok(())
}

/// The numbers of the interfaces' cards: in a copied guest, each has the spare address of its
/// place, in others its own.
fn find(socket: &mut Socket, interfaces: &[Interface]) -> Result<Vec<u32>, NetworkError> {
    let links = links(socket).map_err(failed("list the interfaces"))?;
    (0..)
        .zip(interfaces)
        .map(|(number, interface)| {
            let mut macs = [spare_mac(number), interface.mac].into_iter();
            let found = macs.find_map(|mac| links.iter().find(|link| link.mac == Some(mac)));
            found.map(|link| link.index).ok_or_else(|| {
                NetworkError::Refused(format!("there is no card for interface {}", interface.name))
            })
        })
        .collect()
}

/// Names the cards. One may have another's name: all step aside first.
fn name(
    socket: &mut Socket,
    interfaces: &[Interface],
    indices: &[u32],
) -> Result<(), NetworkError> {
    for index in indices {
        let aside = format!("hull{index}");
        rename(socket, *index, &aside)?;
    }
    for (index, interface) in indices.iter().zip(interfaces) {
        rename(socket, *index, &interface.name)?;
    }
    Ok(())
}

fn rename(socket: &mut Socket, index: u32, name: &str) -> Result<(), NetworkError> {
    let named = Change {
        name: Some(name),
        ..Change::default()
    };
    change(socket, index, named).map_err(failed(format!("name an interface {name}")))
}

fn address(entry: &Address, index: u32) -> Message {
    let (family, own) = bytes(entry.address);
    // Every route comes by itself; and whose address it is was settled where it was read.
    let mut flags = IFA_F_NOPREFIXROUTE;
    if family == AF_INET6 {
        flags |= IFA_F_NODAD;
    }
    let mut info = vec![family, entry.prefix, 0, entry.scope];
    info.extend_from_slice(&index.to_ne_bytes());
    let far = entry.peer.map_or_else(|| own.clone(), |peer| bytes(peer).1);
    Message::new(RTM_NEWADDR, ACK | CREATE | EXCLUSIVE, &info)
        .with(IFA_LOCAL, &own)
        .with(IFA_ADDRESS, &far)
        .with_some(
            IFA_BROADCAST,
            entry.broadcast.map(|address| address.octets()),
        )
        .with(IFA_FLAGS, &flags.to_ne_bytes())
}

fn neighbour(entry: &Neighbour, index: u32) -> Message {
    let (family, address) = bytes(entry.address);
    let mut info = vec![family, 0, 0, 0];
    info.extend_from_slice(&index.to_ne_bytes());
    info.extend_from_slice(&NUD_PERMANENT.to_ne_bytes());
    info.extend_from_slice(&[0, RTN_UNICAST]);
    Message::new(RTM_NEWNEIGH, ACK | CREATE, &info)
        .with(NDA_DST, &address)
        .with(NDA_LLADDR, &entry.mac)
}

fn route(entry: &Route, index: u32) -> Message {
    let (family, destination) = bytes(entry.destination);
    let table = u8::try_from(RT_TABLE_MAIN).unwrap_or(u8::MAX);
    let flags = if entry.onlink { RTNH_F_ONLINK } else { 0 };
    let mut info = vec![family, entry.prefix, 0, 0, table];
    info.extend_from_slice(&[entry.protocol, entry.scope, RTN_UNICAST]);
    info.extend_from_slice(&flags.to_ne_bytes());
    let mut message = Message::new(RTM_NEWROUTE, ACK | CREATE | EXCLUSIVE, &info)
        .with(RTA_OIF, &index.to_ne_bytes())
        .with_some(RTA_PRIORITY, entry.metric.map(u32::to_ne_bytes))
        .with_some(RTA_PREFSRC, entry.source.map(|source| bytes(source).1));
    if entry.prefix > 0 {
        message = message.with(RTA_DST, &destination);
    }
    if let Some(gateway) = entry.gateway {
        let (of, gateway) = bytes(gateway);
        message = if of == family {
            message.with(RTA_GATEWAY, &gateway)
        } else {
            let via = [&u16::from(of).to_ne_bytes()[..], &gateway].concat();
            message.with(RTA_VIA, &via)
        };
    }
    match entry.mtu {
        None => message,
        Some(mtu) => message.with_nested(RTA_METRICS, |message| {
            message.with(RTAX_MTU, &mtu.to_ne_bytes())
        }),
    }
}

fn bytes(address: IpAddr) -> (u8, Vec<u8>) {
    match address {
        IpAddr::V4(address) => (AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (AF_INET6, address.octets().to_vec()),
    }
}
