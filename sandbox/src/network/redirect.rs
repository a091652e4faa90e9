//! Sending every frame that comes in on one interface out on another, both ways (nft(8), `fwd`).
//!
//! The rules are in a table that belongs to the netlink socket that made it: with the socket's
//! last descriptor, the kernel removes it. What traffic control has for this stays behind on the
//! interface of whoever was killed.

use std::io;

use hull_netlink::{ACK, CREATE, EXCLUSIVE, Message, NetworkError, Protocol, Socket};
use rustix::io::Errno;

/// The table's name: one in a namespace.
pub(super) const TABLE: &str = "hull";

pub(super) const SUBSYSTEM: u16 = 10;
pub(super) const NEW_TABLE: u16 = SUBSYSTEM << 8;
pub(super) const NEW_CHAIN: u16 = SUBSYSTEM << 8 | 3;
pub(super) const NEW_RULE: u16 = SUBSYSTEM << 8 | 6;
pub(super) const BATCH_BEGIN: u16 = 0x10;
pub(super) const BATCH_END: u16 = 0x11;
const FAMILY_NETDEV: u8 = 5;
pub(super) const APPEND: u16 = 0x800;

pub(super) const TABLE_NAME: u16 = 1;
pub(super) const TABLE_FLAGS: u16 = 2;
pub(super) const OWNED: u32 = 2;
pub(super) const CHAIN_TABLE: u16 = 1;
pub(super) const CHAIN_NAME: u16 = 3;
pub(super) const CHAIN_HOOK: u16 = 4;
pub(super) const CHAIN_TYPE: u16 = 7;
pub(super) const HOOK_NUMBER: u16 = 1;
pub(super) const HOOK_PRIORITY: u16 = 2;
const HOOK_DEVICE: u16 = 3;
const INGRESS: u32 = 0;
/// Before all who would look at frames that aren't theirs.
const PRIORITY: i32 = -500;
pub(super) const RULE_TABLE: u16 = 1;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
pub(super) const IMMEDIATE_REGISTER: u16 = 1;
pub(super) const IMMEDIATE_DATA: u16 = 2;
pub(super) const DATA_VALUE: u16 = 1;
const FORWARD_REGISTER: u16 = 1;
pub(super) const REGISTER: u32 = 1;

/// An interface: its number and name.
type Place = (u32, String);

/// Ties the interfaces of each pair together in this thread's namespace, until the socket is
/// closed.
pub(super) fn redirect(pairs: &[[Place; 2]]) -> Result<Socket, NetworkError> {
    let mut socket = Socket::open(Protocol::Filter).map_err(failed)?;
    let mut batch = vec![
        edge(BATCH_BEGIN),
        new(NEW_TABLE, EXCLUSIVE)
            .with_text(TABLE_NAME, TABLE)
            .with(TABLE_FLAGS, &OWNED.to_be_bytes()),
    ];
    for [one, other] in pairs {
        batch.extend(one_way(one, other));
        batch.extend(one_way(other, one));
    }
    batch.push(edge(BATCH_END));
    match socket.ask(&batch) {
        Ok(()) => Ok(socket),
        Err(error) => Err(match Errno::from_io_error(&error) {
            // The table is there: it may be somebody's, and then not be looked at.
            Some(Errno::EXIST | Errno::PERM) => {
                NetworkError::Refused("it is joined by another virtual machine already".to_owned())
            }
            _ => failed(error),
        }),
    }
}

fn failed(source: io::Error) -> NetworkError {
    NetworkError::Kernel {
        what: "redirect its interfaces' frames (by nf_tables and its fwd, of Linux 5.12 or later)"
            .to_owned(),
        source,
    }
}

pub(super) fn edge(kind: u16) -> Message {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Message::new(kind, 0, &[0, 0, high, low])
}

fn new(kind: u16, flags: u16) -> Message {
    new_in(FAMILY_NETDEV, kind, flags)
}

pub(super) fn new_in(family: u8, kind: u16, flags: u16) -> Message {
    Message::new(kind, ACK | CREATE | flags, &[family, 0, 0, 0])
}

/// A chain where frames come in, and the rule that sends them out.
fn one_way((from, device): &Place, (to, _): &Place) -> [Message; 2] {
    let name = format!("from{from}");
    let chain = new(NEW_CHAIN, 0)
        .with_text(CHAIN_TABLE, TABLE)
        .with_text(CHAIN_NAME, &name)
        .with_nested(CHAIN_HOOK, |hook| {
            hook.with(HOOK_NUMBER, &INGRESS.to_be_bytes())
                .with(HOOK_PRIORITY, &PRIORITY.to_be_bytes())
                .with_text(HOOK_DEVICE, device)
        })
        .with_text(CHAIN_TYPE, "filter");
    let rule = new(NEW_RULE, APPEND)
        .with_text(RULE_TABLE, TABLE)
        .with_text(RULE_CHAIN, &name)
        .with_nested(RULE_EXPRESSIONS, |rule| {
            let load = expression(rule, "immediate", |data| {
                data.with(IMMEDIATE_REGISTER, &REGISTER.to_be_bytes())
                    .with_nested(IMMEDIATE_DATA, |data| {
                        data.with(DATA_VALUE, &to.to_ne_bytes())
                    })
            });
            expression(load, "fwd", |data| {
                data.with(FORWARD_REGISTER, &REGISTER.to_be_bytes())
            })
        });
    [chain, rule]
}

pub(super) fn expression(
    rule: Message,
    name: &str,
    data: impl FnOnce(Message) -> Message,
) -> Message {
    rule.with_nested(LIST_ELEMENT, |element| {
        element
            .with_text(EXPRESSION_NAME, name)
            .with_nested(EXPRESSION_DATA, data)
    })
}
