//! The namespace's own `localhost`, where whoever forwards a port to a pod connects: the guest has
//! one of its own. Connections to 127.0.0.0/8 are turned to a socket of the monitor's (nft(8),
//! `redirect`), which knows whom they were for.
//!
//! Owns: that socket and the rule, both gone with their descriptors. Refuses: to know who answers.

use std::io;
use std::net::{Ipv4Addr, TcpListener, TcpStream};

use hull_netlink::{EXCLUSIVE, Message, Protocol, Socket};
use hull_proto::RESOLVER;
use rustix::net::sockopt::ip_original_dst;

use super::redirect::{
    APPEND, BATCH_BEGIN, BATCH_END, CHAIN_HOOK, CHAIN_NAME, CHAIN_TABLE, CHAIN_TYPE, DATA_VALUE,
    HOOK_NUMBER, HOOK_PRIORITY, IMMEDIATE_DATA, IMMEDIATE_REGISTER, NEW_CHAIN, NEW_RULE, NEW_TABLE,
    OWNED, REGISTER, RULE_CHAIN, RULE_EXPRESSIONS, RULE_TABLE, TABLE, TABLE_FLAGS, TABLE_NAME,
    edge, expression, new_in,
};

const FAMILY_IPV4: u8 = 2;
const CHAIN: &str = "local";
/// `NF_INET_LOCAL_OUT`, at the place of destinations that change.
const OUTPUT: u32 = 3;
const PRIORITY: i32 = -100;
const TCP: u8 = 6;

// The attributes of the expressions (linux/netfilter/nf_tables.h).
const META_REGISTER: u16 = 1;
const META_KEY: u16 = 2;
const META_PROTOCOL: u32 = 16;
const COMPARE_REGISTER: u16 = 1;
const COMPARE_HOW: u16 = 2;
const COMPARE_DATA: u16 = 3;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const PAYLOAD_REGISTER: u16 = 1;
const PAYLOAD_BASE: u16 = 2;
const PAYLOAD_OFFSET: u16 = 3;
const PAYLOAD_LENGTH: u16 = 4;
const NETWORK_HEADER: u32 = 1;
/// The destination in an IPv4 header: the first byte says all of 127.0.0.0/8.
const DESTINATION: u32 = 16;
const REDIRECT_FIRST_PORT: u16 = 1;

/// A listener in a namespace that isn't this process's.
#[derive(Debug)]
pub(crate) struct Local {
    listener: TcpListener,
    _rule: Socket,
}

impl Local {
    /// Waits for somebody; also returns the port that was meant.
    pub(crate) fn accept(&self) -> io::Result<(TcpStream, u16)> {
        let (stream, _) = self.listener.accept()?;
        // Who comes to the socket itself meant no port.
        let port = ip_original_dst(&stream).map_or(0, |meant| meant.port());
        Ok((stream, port))
    }
}

/// Listens in this thread's namespace.
pub(super) fn listen() -> io::Result<Local> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let own = listener.local_addr()?.port();
    let mut socket = Socket::open(Protocol::Filter)?;
    let new = |kind, flags| new_in(FAMILY_IPV4, kind, flags);
    socket.ask(&[
        edge(BATCH_BEGIN),
        new(NEW_TABLE, EXCLUSIVE)
            .with_text(TABLE_NAME, TABLE)
            .with(TABLE_FLAGS, &OWNED.to_be_bytes()),
        new(NEW_CHAIN, 0)
            .with_text(CHAIN_TABLE, TABLE)
            .with_text(CHAIN_NAME, CHAIN)
            .with_nested(CHAIN_HOOK, |hook| {
                hook.with(HOOK_NUMBER, &OUTPUT.to_be_bytes())
                    .with(HOOK_PRIORITY, &PRIORITY.to_be_bytes())
            })
            .with_text(CHAIN_TYPE, "nat"),
        new(NEW_RULE, APPEND)
            .with_text(RULE_TABLE, TABLE)
            .with_text(RULE_CHAIN, CHAIN)
            .with_nested(RULE_EXPRESSIONS, |rule| to_port(rule, own)),
        edge(BATCH_END),
    ])?;
    Ok(Local {
        listener,
        _rule: socket,
    })
}

/// `meta l4proto tcp ip daddr 127.0.0.0/8 ip daddr != RESOLVER redirect to :PORT`: that address is
/// the engine's name server, which isn't the guest's.
fn to_port(rule: Message, port: u16) -> Message {
    let rule = expression(rule, "meta", |data| {
        data.with(META_REGISTER, &REGISTER.to_be_bytes())
            .with(META_KEY, &META_PROTOCOL.to_be_bytes())
    });
    let rule = compare(rule, EQUAL, &[TCP]);
    let rule = compare(destination(rule, 1), EQUAL, &[127]);
    let rule = compare(destination(rule, 4), NOT_EQUAL, &RESOLVER.octets());
    let rule = expression(rule, "immediate", |data| {
        data.with(IMMEDIATE_REGISTER, &REGISTER.to_be_bytes())
            .with_nested(IMMEDIATE_DATA, |data| {
                data.with(DATA_VALUE, &port.to_be_bytes())
            })
    });
    expression(rule, "redir", |data| {
        data.with(REDIRECT_FIRST_PORT, &REGISTER.to_be_bytes())
    })
}

/// The first bytes of the destination.
fn destination(rule: Message, bytes: u32) -> Message {
    expression(rule, "payload", |data| {
        data.with(PAYLOAD_REGISTER, &REGISTER.to_be_bytes())
            .with(PAYLOAD_BASE, &NETWORK_HEADER.to_be_bytes())
            .with(PAYLOAD_OFFSET, &DESTINATION.to_be_bytes())
            .with(PAYLOAD_LENGTH, &bytes.to_be_bytes())
    })
}

fn compare(rule: Message, how: u32, value: &[u8]) -> Message {
    expression(rule, "cmp", |data| {
        data.with(COMPARE_REGISTER, &REGISTER.to_be_bytes())
            .with(COMPARE_HOW, &how.to_be_bytes())
            .with_nested(COMPARE_DATA, |data| data.with(DATA_VALUE, value))
    })
}
