//! The name server that an engine runs on its network namespace's own loopback, as Docker does, at
//! the same address of the guest's: questions go to the host over vsock, and answers come back.
//!
//! Those that come by TCP have a stream each, and whoever they are from says when it ends.
//!
//! Owns: that address, and whose question is whose. Refuses: to understand either.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use hull_proto::{RESOLVER, RESOLVER_PORT};
use rustix::io::Errno;

use crate::fault::{Fault, Tried};
use crate::report::{self, Word};
use crate::spawn::{self, Ends};
use crate::sys;

/// Questions that can wait for answers; an older one is forgotten for the next.
const QUESTIONS: usize = 4096;

/// Connections at a time.
const CONNECTIONS: usize = 64;
/// What each of a connection's threads has.
const STACK: usize = 64 * 1024;

/// What the process may take to be there.
const PATIENCE: Duration = Duration::from_secs(5);

/// Answers from here on.
///
/// # Errors
/// If the process can't be made, or its address is taken.
pub(crate) fn start() -> Result<(), Fault> {
    let born = spawn::beside(serve)?;
    let mut serves = false;
    loop {
        match report::hear_within(PATIENCE, &born.line) {
            Ok(Word::Executing) => serves = true,
            Ok(Word::Failed(failure)) => return Err(Fault::internal(failure.message)),
            Ok(Word::Closed) if serves => return Ok(()),
            Err(Errno::TIMEDOUT) => {
                return Err(Fault::internal("the name server doesn't come up"));
            }
            Ok(_) | Err(_) => return Err(Fault::internal("the name server has ended")),
        }
    }
}

fn serve(ends: Ends) -> Result<Infallible, Fault> {
    let socket =
        UdpSocket::bind((RESOLVER, 53)).or_internal(|| format!("cannot answer at {RESOLVER}"))?;
    let listener = TcpListener::bind((RESOLVER, 53))
        .or_internal(|| format!("cannot answer at {RESOLVER} by TCP"))?;
    // The first stream is that of UDP's questions.
    let host = sys::vsock_dial_host(RESOLVER_PORT)
        .map(File::from)
        .or_internal(|| "cannot reach the host's name server")?;
    let back = host
        .try_clone()
        .or_internal(|| "cannot copy a descriptor")?;
    report::about_to_execute(ends.line.as_fd());
    drop(ends);
    let kept = [socket.as_fd(), listener.as_fd(), host.as_fd(), back.as_fd()];
    sys::close_all_but(&kept).or_internal(|| "cannot close descriptors")?;
    let waiting = Mutex::new(Waiting::default());
    thread::scope(|scope| {
        scope.spawn(|| {
            let _ = answer(&back, &socket, &waiting);
            // Without the host there is nothing more to do.
            sys::leave(1)
        });
        scope.spawn(|| connections(&listener));
        let _ = ask(&socket, &host, &waiting);
        sys::leave(1)
    })
}

/// Gives each who connects a stream to the host.
fn connections(listener: &TcpListener) {
    let taken = Arc::new(());
    loop {
        let client = match listener.accept() {
            Ok((client, _)) => client,
            // It went before it was met.
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // For want of something: names are still found by UDP.
            Err(_) => return,
        };
        // One too many is hung up on.
        if Arc::strong_count(&taken) > CONNECTIONS {
            continue;
        }
        let place = Arc::clone(&taken);
        let converse = move || {
            if let Ok(host) = sys::vsock_dial_host(RESOLVER_PORT) {
                converse(&client, &File::from(host));
            }
            drop(place);
        };
        let _ = thread::Builder::new().stack_size(STACK).spawn(converse);
    }
}

/// Has both say what they have to, until both are done.
fn converse(mut client: &TcpStream, mut host: &File) {
    thread::scope(|scope| {
        let back = thread::Builder::new().stack_size(STACK);
        let back = back.spawn_scoped(scope, move || {
            let _ = io::copy(&mut host, &mut client);
            let _ = client.shutdown(Shutdown::Write);
        });
        if back.is_ok() {
            let _ = io::copy(&mut client, &mut host);
        }
        let _ = rustix::net::shutdown(host, rustix::net::Shutdown::Write);
    });
}

fn ask(socket: &UdpSocket, mut host: &File, waiting: &Mutex<Waiting>) -> io::Result<()> {
    let mut message = vec![0; 2 + usize::from(u16::MAX)];
    loop {
        let (length, from) = match socket.recv_from(&mut message[2..]) {
            // An answer met nobody.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            received => received?,
        };
        let (Some([high, low]), Ok(size)) =
            (message[2..2 + length].first_chunk(), length.try_into())
        else {
            continue;
        };
        let number = lock(waiting).add([*high, *low], from);
        message[2..4].copy_from_slice(&number);
        message[..2].copy_from_slice(&u16::to_be_bytes(size));
        host.write_all(&message[..2 + length])?;
    }
}

fn answer(mut host: &File, socket: &UdpSocket, waiting: &Mutex<Waiting>) -> io::Result<()> {
    let mut message = vec![0; usize::from(u16::MAX)];
    loop {
        let mut size = [0; 2];
        host.read_exact(&mut size)?;
        let message = &mut message[..usize::from(u16::from_be_bytes(size))];
        host.read_exact(message)?;
        let Some(number) = message.first_chunk_mut() else {
            continue;
        };
        if let Some((own, to)) = lock(waiting).take(*number) {
            *number = own;
            // Who asked may be gone.
            let _ = socket.send_to(message, to);
        }
    }
}

fn lock(waiting: &Mutex<Waiting>) -> std::sync::MutexGuard<'_, Waiting> {
    waiting.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whose question is whose. Two may have given theirs the same number (RFC 1035 §4.1.1, `ID`), so
/// each gets another on its way.
#[derive(Debug)]
struct Waiting {
    asked: Vec<Option<([u8; 2], SocketAddr)>>,
    next: usize,
}

impl Default for Waiting {
    fn default() -> Self {
        Self {
            asked: vec![None; QUESTIONS],
            next: 0,
        }
    }
}

impl Waiting {
    /// The number that a question goes on with.
    fn add(&mut self, number: [u8; 2], from: SocketAddr) -> [u8; 2] {
        let place = self.next;
        self.next = (place + 1) % QUESTIONS;
        self.asked[place] = Some((number, from));
        u16::try_from(place).unwrap_or(u16::MAX).to_be_bytes()
    }

    /// The number that a question came with, and from whom; once.
    fn take(&mut self, number: [u8; 2]) -> Option<([u8; 2], SocketAddr)> {
        let place = usize::from(u16::from_be_bytes(number));
        self.asked.get_mut(place)?.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_goes_to_who_asked_with_its_own_number_once() {
        let mut waiting = Waiting::default();
        let from = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
        let first = waiting.add([7, 7], from(1));
        let second = waiting.add([7, 7], from(2));
        assert_ne!(first, second);
        assert_eq!(waiting.take(second), Some(([7, 7], from(2))));
        assert_eq!(waiting.take(second), None);
        assert_eq!(waiting.take([255, 255]), None);
        for port in 0..QUESTIONS {
            waiting.add([0, 0], from(u16::try_from(port).unwrap()));
        }
        // The oldest made room.
        assert_ne!(waiting.take(first), Some(([7, 7], from(1))));
    }
}
