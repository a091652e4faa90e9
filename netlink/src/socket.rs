//! The socket: messages go, and each call waits for the kernel's answer.
//!
//! It belongs to the network namespace of the thread that opened it, for good.

use std::io;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::message::{Answer, Message, u32_at};

/// `NLM_F_ACK`: an answer even when all went well.
pub const ACK: u16 = 4;
/// `NLM_F_EXCL`: not what exists already.
pub const EXCLUSIVE: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;

const DUMP: u16 = 0x300;
const DUMP_INTERRUPTED: u16 = 0x10;
const ERROR: u16 = 2;
const DONE: u16 = 3;
/// The kernel's own largest piece of a dump.
const READ_BYTES: usize = 32 << 10;
/// How often a dump that others write into is begun anew.
const ATTEMPTS: usize = 16;

/// Which part of the kernel answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// Interfaces, addresses, routes.
    Route,
    /// Packet filters.
    Filter,
}

/// A netlink socket.
#[derive(Debug)]
pub struct Socket {
    socket: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one in this thread's network namespace.
    ///
    /// # Errors
    /// As socket(2) has them.
    pub fn open(protocol: Protocol) -> io::Result<Self> {
        let protocol = match protocol {
            Protocol::Route => None,
            Protocol::Filter => Some(netlink::NETFILTER),
        };
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            protocol,
        )?;
        Ok(Self {
            socket,
            sequence: 0,
        })
    }

    /// Sends messages as one, and waits until each that asks for it is answered.
    ///
    /// # Errors
    /// The kernel's first refusal.
    pub fn ask(&mut self, messages: &[Message]) -> io::Result<()> {
        let first = self.sequence + 1;
        self.send(messages)?;
        let mut open = messages
            .iter()
            .filter(|message| message.is_answered)
            .count();
        let mut space = vec![0; READ_BYTES];
        while open > 0 {
            for answer in self.receive(&mut space)? {
                if answer.sequence < first || answer.kind != ERROR {
                    continue;
                }
                result(&answer)?;
                open = open.saturating_sub(1);
            }
        }
        Ok(())
    }

    /// Asks for all there is of something; `message` has the kind and its structure.
    ///
    /// # Errors
    /// The kernel's refusal, or `WouldBlock` when others change the list all the time.
    pub fn list(&mut self, kind: u16, structure: &[u8]) -> io::Result<Vec<Answer>> {
        for _ in 0..ATTEMPTS {
            if let Some(all) = self.list_once(kind, structure)? {
                return Ok(all);
            }
        }
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn list_once(&mut self, kind: u16, structure: &[u8]) -> io::Result<Option<Vec<Answer>>> {
        self.send(&[Message::new(kind, DUMP, structure)])?;
        let mut space = vec![0; READ_BYTES];
        let mut all = Vec::new();
        let mut is_whole = true;
        loop {
            for answer in self.receive(&mut space)? {
                if answer.sequence != self.sequence {
                    continue;
                }
                is_whole &= answer.flags & DUMP_INTERRUPTED == 0;
                match answer.kind {
                    DONE => return Ok(is_whole.then_some(all)),
                    ERROR => result(&answer)?,
                    _ => all.push(answer),
                }
            }
        }
    }

    fn send(&mut self, messages: &[Message]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for message in messages {
            self.sequence += 1;
            bytes.extend_from_slice(&message.numbered(self.sequence));
        }
        loop {
            match rustix::net::send(&self.socket, &bytes, SendFlags::empty()) {
                Err(Errno::INTR) => {}
                result => return result.map(drop).map_err(io::Error::from),
            }
        }
    }

    fn receive(&self, space: &mut [u8]) -> io::Result<Vec<Answer>> {
        loop {
            match rustix::net::recv(&self.socket, &mut *space, RecvFlags::empty()) {
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
                Ok((count, _)) => {
                    return Ok(Answer::all_of(space.get(..count).unwrap_or_default()));
                }
            }
        }
    }
}

/// `struct nlmsgerr` begins with the error, negative, or 0.
fn result(answer: &Answer) -> io::Result<()> {
    match u32_at(&answer.body, 0).map(u32::cast_signed) {
        Some(0) => Ok(()),
        Some(errno) => Err(io::Error::from_raw_os_error(-errno)),
        None => Err(io::ErrorKind::InvalidData.into()),
    }
}
