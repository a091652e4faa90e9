//! A process that is a connection to a port of the guest's own: for the host, whose `localhost`
//! the guest's isn't.
//!
//! Owns: the connection, and the copying in both directions. Refuses: addresses other than the
//! loopback's.

use std::convert::Infallible;
use std::net::{Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::thread;
use std::time::Duration;

use crate::fault::{Fault, Tried};
use crate::report;
use crate::spawn::{self, Born, Ends};
use crate::sys;

/// What a listener may take to be reached, on this side of any network.
const PATIENCE: Duration = Duration::from_secs(5);

/// Makes a connection.
///
/// # Errors
/// If the process can't be made; that nobody listens comes over its line.
pub(crate) fn to(port: u16) -> Result<Born, Fault> {
    spawn::beside(|ends| carry(port, ends))
}

fn carry(port: u16, ends: Ends) -> Result<Infallible, Fault> {
    let addresses: [SocketAddr; 2] = [
        (Ipv4Addr::LOCALHOST, port).into(),
        (Ipv6Addr::LOCALHOST, port).into(),
    ];
    let connect = |address: &SocketAddr| TcpStream::connect_timeout(address, PATIENCE);
    let [first, second] = &addresses;
    let socket = connect(first)
        .or_else(|refused| connect(second).map_err(|_| refused))
        .or_refuse(|| format!("cannot connect to port {port}"))?;
    let back = socket
        .try_clone()
        .or_internal(|| "cannot copy a descriptor")?;
    let pipes = ends.pipes.ok_or_else(|| Fault::internal("no pipes"))?;
    let [stdin, stdout, _] = pipes.map(std::fs::File::from);
    // As for a command that is executed: the line's end says that it runs.
    report::about_to_execute(ends.line.as_fd());
    drop(ends.line);
    let kept = [socket.as_fd(), back.as_fd(), stdin.as_fd(), stdout.as_fd()];
    sys::close_all_but(&kept).or_internal(|| "cannot close descriptors")?;
    thread::spawn(move || {
        // However it ends, nothing more goes in.
        let _ = std::io::copy(&mut &stdin, &mut &socket);
        let _ = socket.shutdown(Shutdown::Write);
    });
    let done = std::io::copy(&mut &back, &mut &stdout);
    sys::leave(i32::from(done.is_err()))
}
