//! Reading a namespace: what its interfaces' users know of them.
//!
//! What a kernel makes by itself in any namespace is left to the guest's: loopback, link-local
//! IPv6 and multicast, addresses and routes that routers announce.

use std::net::IpAddr;

use hull_proto::{Address, Interface, MAX_INTERFACES, MAX_NETWORK_ENTRIES, Neighbour, Route};

use crate::link::{Link, links};
use crate::message::{Answer, u16_at, u32_at};
use crate::socket::Socket;
use crate::words::*;
use crate::{NetworkError, failed};

/// Everything of the socket's namespace that a guest in its place must know, each interface with
/// its number. Interfaces without a use (down, no address) and ports of others are left out.
///
/// # Errors
/// [`NetworkError::Refused`] for what a guest can't have.
pub fn read(socket: &mut Socket) -> Result<Vec<(u32, Interface)>, NetworkError> {
    let links = links(socket).map_err(failed("list the interfaces"))?;
    let addresses = socket
        .list(RTM_GETADDR, &[0; ADDRESS_BYTES])
        .map_err(failed("list the addresses"))?;
    let mut interfaces = Vec::new();
    for link in &links {
        let addresses: Vec<Address> = addresses
            .iter()
            .filter_map(|answer| address(answer, link.index))
            .collect();
        let is_used = link.is_up || !addresses.is_empty();
        if is_used && !link.is_loopback && !link.is_port {
            interfaces.push((link.index, interface(link, addresses)?));
        }
    }
    add_routes(socket, &mut interfaces)?;
    add_neighbours(socket, &mut interfaces)?;
    check(&interfaces)?;
    Ok(interfaces)
}

fn interface(link: &Link, addresses: Vec<Address>) -> Result<Interface, NetworkError> {
    let Some(mac) = link.mac else {
        return Err(NetworkError::Refused(format!(
            "interface {} is not Ethernet's: a virtual machine has no other cards",
            link.name
        )));
    };
    Ok(Interface {
        name: link.name.clone(),
        mac,
        mtu: link.mtu,
        addresses,
        routes: Vec::new(),
        neighbours: Vec::new(),
    })
}

fn check(interfaces: &[(u32, Interface)]) -> Result<(), NetworkError> {
    let entries = interfaces.iter().map(|(_, interface)| {
        interface.addresses.len() + interface.routes.len() + interface.neighbours.len()
    });
    if interfaces.len() > MAX_INTERFACES {
        return Err(NetworkError::Refused(format!(
            "{} interfaces are more than the {MAX_INTERFACES} that a virtual machine can have",
            interfaces.len()
        )));
    }
    match entries.sum() {
        0..=MAX_NETWORK_ENTRIES => Ok(()),
        count => Err(NetworkError::Refused(format!(
            "{count} addresses, routes and neighbours are more than the {MAX_NETWORK_ENTRIES} \
             that a virtual machine can be given"
        ))),
    }
}

/// `struct ifaddrmsg`: family, prefix, flags, scope, index.
fn address(answer: &Answer, index: u32) -> Option<Address> {
    let &[_, prefix, short_flags, scope, ..] = answer.body.as_slice() else {
        return None;
    };
    if u32_at(&answer.body, 4)? != index {
        return None;
    }
    let attributes = answer.attributes(ADDRESS_BYTES);
    let flags = attributes
        .number(IFA_FLAGS)
        .unwrap_or_else(|| u32::from(short_flags));
    let far = ip(attributes.get(IFA_ADDRESS)?)?;
    let own = attributes.get(IFA_LOCAL).and_then(ip).unwrap_or(far);
    let is_kernels = match own {
        IpAddr::V4(_) => false,
        IpAddr::V6(own) => own.is_unicast_link_local() || flags & IFA_F_PERMANENT == 0,
    };
    let is_refused = flags & IFA_F_DADFAILED != 0;
    (!is_kernels && !is_refused).then_some(Address {
        address: own,
        prefix,
        peer: (far != own).then_some(far),
        broadcast: match attributes.get(IFA_BROADCAST).and_then(ip) {
            Some(IpAddr::V4(address)) => Some(address),
            _ => None,
        },
        scope,
    })
}

fn add_routes(
    socket: &mut Socket,
    interfaces: &mut [(u32, Interface)],
) -> Result<(), NetworkError> {
    let answers = socket
        .list(RTM_GETROUTE, &[0; ROUTE_BYTES])
        .map_err(failed("list the routes"))?;
    for answer in &answers {
        let Some(route) = route(answer) else { continue };
        let attributes = answer.attributes(ROUTE_BYTES);
        if attributes.get(RTA_MULTIPATH).is_some() {
            return Err(NetworkError::Refused(format!(
                "the route to {}/{} has several next hops, which a virtual machine isn't given",
                route.destination, route.prefix
            )));
        }
        let over = attributes.number(RTA_OIF);
        if let Some((_, interface)) = interfaces
            .iter_mut()
            .find(|(index, _)| Some(*index) == over)
        {
            interface.routes.push(route);
        }
    }
    Ok(())
}

/// `struct rtmsg`: family, bits of destination and source, type of service, table, protocol,
/// scope, type, flags.
fn route(answer: &Answer) -> Option<Route> {
    let &[family, prefix, _, _, table, protocol, scope, kind, ..] = answer.body.as_slice() else {
        return None;
    };
    let flags = u32_at(&answer.body, 8)?;
    let attributes = answer.attributes(ROUTE_BYTES);
    let table = attributes.number(RTA_TABLE).unwrap_or(table.into());
    let passing = flags & (RTM_F_CLONED | RTNH_F_DEAD) != 0 || protocol == RTPROT_RA;
    if table != RT_TABLE_MAIN || kind != RTN_UNICAST || passing {
        return None;
    }
    let any = match family {
        AF_INET => IpAddr::from([0; 4]),
        AF_INET6 => IpAddr::from([0; 16]),
        _ => return None,
    };
    let destination = attributes.get(RTA_DST).and_then(ip).unwrap_or(any);
    if let IpAddr::V6(own) = destination
        && (own.is_unicast_link_local() || own.is_multicast())
    {
        return None;
    }
    let via = attributes.get(RTA_VIA).and_then(|via| ip(via.get(2..)?));
    Some(Route {
        destination,
        prefix,
        gateway: attributes.get(RTA_GATEWAY).and_then(ip).or(via),
        source: attributes.get(RTA_PREFSRC).and_then(ip),
        metric: attributes.number(RTA_PRIORITY),
        mtu: attributes.nested(RTA_METRICS).number(RTAX_MTU),
        scope,
        protocol,
        onlink: flags & RTNH_F_ONLINK != 0,
    })
}

/// `struct ndmsg`: family, padding, index, state, flags, type.
fn add_neighbours(
    socket: &mut Socket,
    interfaces: &mut [(u32, Interface)],
) -> Result<(), NetworkError> {
    let answers = socket
        .list(RTM_GETNEIGH, &[0; NEIGHBOUR_BYTES])
        .map_err(failed("list the neighbours"))?;
    for answer in &answers {
        let state = u16_at(&answer.body, 8).unwrap_or(0);
        let family = answer.body.first().copied();
        if state & NUD_PERMANENT == 0 || !matches!(family, Some(AF_INET | AF_INET6)) {
            continue;
        }
        let attributes = answer.attributes(NEIGHBOUR_BYTES);
        let over = u32_at(&answer.body, 4);
        let address = attributes.get(NDA_DST).and_then(ip);
        let mac = attributes
            .get(NDA_LLADDR)
            .and_then(|mac| mac.try_into().ok());
        let found = interfaces
            .iter_mut()
            .find(|(index, _)| Some(*index) == over);
        if let (Some(address), Some(mac), Some((_, interface))) = (address, mac, found)
            && !address.is_multicast()
        {
            interface.neighbours.push(Neighbour { address, mac });
        }
    }
    Ok(())
}

fn ip(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        return Some(four.into());
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}
