//! Ports of the guest's own address, for who connects to the network namespace's; and the other
//! way round, the namespace's name server for the guest.
//!
//! Owns: a thread that waits for them, and one each; three for names, and two for each who asks by
//! TCP. Refuses more than a few at a time.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::thread;

use hull_proto::{Frame, PROCESS_PORT, Spawn};
use hull_vmm::virtio::vsock::Connector;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

use crate::carry::{Stdio, carry};
use crate::network::Local;
use crate::stream::{ProcessStream, StreamError};

/// Most connections at a time.
const MOST: usize = 64;
const STACK: usize = 128 * 1024;

/// Forwards for as long as this process lives. Without a thread for it, nobody is forwarded.
pub(super) fn start(local: Arc<Local>, guest: Connector) {
    let serve = move || {
        let taken = Arc::new(());
        let mut reserve = None;
        while let Some((client, port)) = next(|| local.accept(), &mut reserve) {
            if Arc::strong_count(&taken) > MOST {
                continue;
            }
            let place = Arc::clone(&taken);
            let streams = guest.connect(PROCESS_PORT);
            let forward = move || {
                // Either side's end is the other's: there is nobody to tell more.
                let _ = streams
                    .map_err(StreamError::from)
                    .and_then(|stream| forward(OwnedFd::from(client), stream, port));
                drop(place);
            };
            // Without a thread, the client is hung up on.
            let _ = spawn("forward", forward);
        }
    };
    let _ = spawn("forwards", serve);
}

/// Passes what the guest that `asking` brings asks on to `server`, and its answers back: the first
/// stream's questions one by one (UDP), each other's as they come, over a connection (TCP). What
/// either side says is the other's to judge.
pub(super) fn answer(
    server: UdpSocket,
    asking: Receiver<UnixStream>,
    connect: impl Fn() -> io::Result<TcpStream> + Clone + Send + 'static,
) {
    let serve = move || {
        // Without a guest that asks there is nothing to do.
        let Ok(guest) = asking.recv() else { return };
        let pair = guest
            .try_clone()
            .and_then(|back| Ok((back, server.try_clone()?)));
        let Ok((back, answers)) = pair else { return };
        if guest.set_nonblocking(false).is_err()
            || spawn("answers", move || drop(pass_answers(&answers, &back))).is_err()
            || spawn("questions", move || drop(pass_questions(&guest, &server))).is_err()
        {
            return;
        }
        let taken = Arc::new(());
        while let Ok(guest) = asking.recv() {
            if Arc::strong_count(&taken) > MOST {
                continue;
            }
            let (place, connect) = (Arc::clone(&taken), connect.clone());
            // Whom nobody answers is hung up on.
            let _ = spawn("question", move || {
                let _ = connect().and_then(|server| converse(&guest, &server));
                drop(place);
            });
        }
    };
    let _ = spawn("names", serve);
}

/// Has both say what they have to, until both are done.
fn converse(mut guest: &UnixStream, mut server: &TcpStream) -> io::Result<()> {
    guest.set_nonblocking(false)?;
    thread::scope(|scope| {
        let back = thread::Builder::new().stack_size(STACK);
        back.spawn_scoped(scope, move || {
            let _ = io::copy(&mut server, &mut guest);
            let _ = guest.shutdown(Shutdown::Write);
        })?;
        let passed = io::copy(&mut guest, &mut server);
        // Its last answer may still be on its way.
        let _ = server.shutdown(Shutdown::Write);
        passed.map(drop)
    })
}

fn pass_questions(mut guest: &UnixStream, server: &UdpSocket) -> io::Result<()> {
    let mut message = vec![0; usize::from(u16::MAX)];
    loop {
        let mut size = [0; 2];
        guest.read_exact(&mut size)?;
        let message = &mut message[..usize::from(u16::from_be_bytes(size))];
        guest.read_exact(message)?;
        // One that doesn't arrive is asked again.
        let _ = server.send(message);
    }
}

fn pass_answers(server: &UdpSocket, mut guest: &UnixStream) -> io::Result<()> {
    let mut message = vec![0; 2 + usize::from(u16::MAX)];
    loop {
        let length = match server.recv(&mut message[2..]) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => continue,
            received => received?,
        };
        let size = u16::try_from(length).unwrap_or(u16::MAX);
        message[..2].copy_from_slice(&size.to_be_bytes());
        guest.write_all(&message[..2 + length])?;
    }
}

/// The next one that comes. Where there are no more descriptors, one is hung up on for want of a
/// place: it would be met again and again otherwise. `None` when nobody comes any more.
fn next<T>(mut accept: impl FnMut() -> io::Result<T>, reserve: &mut Option<OwnedFd>) -> Option<T> {
    loop {
        if reserve.is_none() {
            *reserve = eventfd(0, EventfdFlags::CLOEXEC).ok();
        }
        let error = match accept() {
            Ok(client) => return Some(client),
            Err(error) => error,
        };
        match Errno::from_io_error(&error) {
            // The listener itself is none.
            None | Some(Errno::BADF | Errno::INVAL | Errno::NOTSOCK | Errno::FAULT) => return None,
            Some(Errno::MFILE | Errno::NFILE) => {
                drop(reserve.take());
                drop(accept());
            }
            // Who came went before it was met, or the host is short of memory (accept(2)).
            Some(_) => {}
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<()> {
    let thread = thread::Builder::new().name(name.to_owned());
    thread.stack_size(STACK).spawn(body).map(drop)
}

fn forward(client: OwnedFd, guest: UnixStream, port: u16) -> Result<(), StreamError> {
    guest.set_nonblocking(false)?;
    let mut stream = ProcessStream::new(guest)?;
    stream.send(&Frame::Spawn(Spawn::Connect { port }))?;
    let Some(Frame::Started { .. }) = stream.receive()? else {
        return Ok(());
    };
    let stdio = Stdio {
        stdin: client.try_clone()?,
        stdout: client.try_clone()?,
        stderr: client,
        terminal: false,
    };
    carry(stream, stdio, None)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_cannot_be_met_is_not_the_last() {
        let failed = |errno: Errno| Err(io::Error::from(errno));
        let answers = [
            failed(Errno::CONNABORTED),
            failed(Errno::MFILE),
            Ok("hung up on"),
            failed(Errno::INTR),
            Ok("met"),
            failed(Errno::BADF),
            Ok("never asked for"),
        ];
        let mut answers = answers.into_iter();
        let mut accept = || answers.next().unwrap();
        let mut reserve = None;
        assert_eq!(next(&mut accept, &mut reserve), Some("met"));
        assert!(reserve.is_some(), "a place is kept for the next shortage");
        assert_eq!(next(&mut accept, &mut reserve), None);
    }
}
