//! The line on which a process that is being made tells the agent how far it came.
//!
//! Owns: the messages between a forked child and the agent, one packet each. Refuses: nothing of
//! a container's can reach it; it is closed by the command's `execve`.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use hull_proto::Failure;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

use crate::fault::Fault;

/// Largest packet, in bytes: a failure as JSON with every character escaped.
const MAX_PACKET: usize = 32 * 1024;

const TERMINAL: &[u8] = b"terminal";
const EXECUTING: &[u8] = b"executing";
const WAITING: &[u8] = b"waiting";

/// One message of the child.
#[derive(Debug)]
pub(crate) enum Word {
    /// Its terminal's other end.
    Terminal(OwnedFd),
    /// It does nothing more until it is told to go on.
    Waiting,
    /// The next thing it does is `execve`.
    Executing,
    /// It was not started.
    Failed(Failure),
    /// The line is closed: it runs, if it said that it would, or has died.
    Closed,
}

/// Makes the line: the agent's end and the child's.
///
/// # Errors
/// EMFILE.
pub(crate) fn line() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )
}

/// Tells the agent that all is made, and waits until the command is wanted.
///
/// # Errors
/// If the line closes instead: it never will be.
pub(crate) fn wait_for_go(line: BorrowedFd<'_>) -> Result<(), Errno> {
    ready_for_orders(line);
    receive(line, &mut [0; 2])
}

/// The largest packet of orders, in bytes: what a socket takes at once.
const MAX_PART: usize = 64 * 1024;

/// Hands a process that waits for them its orders: two texts.
///
/// # Errors
/// If it is gone.
pub(crate) fn order(line: BorrowedFd<'_>, orders: [&[u8]; 2]) -> Result<(), Errno> {
    for text in orders {
        let length = (text.len() as u64).to_le_bytes();
        for part in std::iter::once(length.as_slice()).chain(text.chunks(MAX_PART)) {
            // The other side does nothing but take them.
            while let Err(errno) = rustix::net::send(line, part, SendFlags::NOSIGNAL) {
                if errno != Errno::INTR {
                    return Err(errno);
                }
            }
        }
    }
    Ok(())
}

/// Waits for orders.
///
/// # Errors
/// If the line closes instead: there are none to come.
pub(crate) fn wait_for_orders(line: BorrowedFd<'_>) -> Result<[Vec<u8>; 2], Errno> {
    Ok([receive_text(line)?, receive_text(line)?])
}

fn receive_text(line: BorrowedFd<'_>) -> Result<Vec<u8>, Errno> {
    let mut length = [0; 8];
    receive(line, &mut length)?;
    let length = usize::try_from(u64::from_le_bytes(length)).map_err(|_| Errno::NOMEM)?;
    let mut text = vec![0; length];
    for part in text.chunks_mut(MAX_PART) {
        receive(line, part)?;
    }
    Ok(text)
}

/// Takes one packet, which is as long as `part`, by read(2): what a system call filter lets every
/// program do.
fn receive(line: BorrowedFd<'_>, part: &mut [u8]) -> Result<(), Errno> {
    loop {
        match rustix::io::read(line, &mut *part) {
            Err(Errno::INTR) => {}
            Ok(length) if length == part.len() => return Ok(()),
            other => return other.and(Err(Errno::PIPE)),
        }
    }
}

/// Lets the process go on.
///
/// # Errors
/// If it is gone.
pub(crate) fn go(line: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::net::send(line, b"go", SendFlags::NOSIGNAL).map(drop)
}

/// Tells the agent that this process waits for its orders.
pub(crate) fn ready_for_orders(line: BorrowedFd<'_>) {
    let _ = rustix::net::send(line, WAITING, SendFlags::NOSIGNAL);
}

/// Tells the agent that `execve` is next.
pub(crate) fn about_to_execute(line: BorrowedFd<'_>) {
    let _ = rustix::net::send(line, EXECUTING, SendFlags::NOSIGNAL);
}

/// Tells the agent why there will be no process.
pub(crate) fn failed(line: BorrowedFd<'_>, fault: Fault) {
    let failure = fault.into_failure();
    let packet = serde_json::to_vec(&failure).unwrap_or_default();
    let _ = rustix::net::send(line, &packet, SendFlags::NOSIGNAL);
}

/// Hands the agent its end of the terminal.
///
/// # Errors
/// As sendmsg(2) has them.
pub(crate) fn hand_over(line: BorrowedFd<'_>, master: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [master];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(Errno::NOBUFS);
    }
    let data = [IoSlice::new(TERMINAL)];
    sendmsg(line, &data, &mut ancillary, SendFlags::NOSIGNAL).map(drop)
}

/// The next word of the child, waited for.
///
/// # Errors
/// ETIMEDOUT if there is none within `limit`.
pub(crate) fn hear_within(limit: Duration, line: &OwnedFd) -> Result<Word, Errno> {
    let mut packet = vec![0; MAX_PACKET];
    let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
    loop {
        match hear(line, &mut packet) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => {
                match poll(&mut [PollFd::new(line, PollFlags::IN)], Some(&limit)) {
                    Ok(0) => return Err(Errno::TIMEDOUT),
                    Ok(_) | Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno),
                }
            }
            other => return other,
        }
    }
}

/// The next word of the child, taken into `packet`, which must have room for any
/// ([`MAX_PACKET`]).
///
/// # Errors
/// EAGAIN until there is one.
pub(crate) fn hear(line: &OwnedFd, packet: &mut [u8]) -> Result<Word, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let length = {
        let mut data = [IoSliceMut::new(packet)];
        recvmsg(line.as_fd(), &mut data, &mut ancillary, flags)?.bytes
    };
    let mut fds = ancillary
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten();
    let packet = packet.get(..length).unwrap_or_default();
    Ok(match (packet, fds.next()) {
        ([], _) => Word::Closed,
        (TERMINAL, Some(master)) => Word::Terminal(master),
        (WAITING, _) => Word::Waiting,
        (EXECUTING, _) => Word::Executing,
        (json, _) => match serde_json::from_slice(json) {
            Ok(failure) => Word::Failed(failure),
            Err(_) => Word::Failed(
                Fault::internal("the new process said something unknown").into_failure(),
            ),
        },
    })
}
