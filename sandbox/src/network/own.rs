//! A network namespace of the container's own, empty when its VM is built, that whoever made the
//! container fills before its command runs: Docker, by a hook or between `create` and `start`.
//!
//! Owns: the cards that wait for it, and the way to a name server in it. Refuses: more interfaces
//! than there are cards.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use hull_netlink::{Change, NetworkError};
use hull_proto::RESOLVER;
use rustix::thread::UnshareFlags;

use super::{Joined, NO_TAP, failed, open_route, spare_interface, tie_to};
use crate::sys;

/// Cards of a guest whose network comes later: a machine gets no more while it runs.
const CARDS: u8 = 2;

/// What a name server on the loopback may take to be met.
const PATIENCE: Duration = Duration::from_secs(1);

/// What waits in the namespace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Own {
    /// Taps, by name.
    taps: Vec<String>,
    /// Why there are no more.
    lacks: String,
}

impl Own {
    /// Has this thread stand in a new namespace, with cards for what will be there.
    pub(crate) fn make() -> Result<Joined, NetworkError> {
        sys::unshare(UnshareFlags::NEWNET).map_err(failed("make a network namespace"))?;
        loopback_up()?;
        let mut joined = Joined::default();
        let mut own = Self {
            lacks: format!("a virtual machine has {CARDS} cards for them"),
            ..Self::default()
        };
        for number in 0..CARDS {
            match sys::make_tap() {
                Ok((tap, name)) => {
                    joined.taps.push(tap);
                    joined.interfaces.push(spare_interface(number));
                    own.taps.push(name);
                }
                // It may well stay empty: nothing is missing then.
                Err(error) => {
                    own.lacks = format!("cannot {NO_TAP}: {error}");
                    break;
                }
            }
        }
        joined.own = Some(own);
        Ok(joined)
    }

    /// Ties the cards to what is in this thread's namespace now; the result has no taps.
    pub(crate) fn tie(&self) -> Result<Joined, NetworkError> {
        let mut route = open_route()?;
        let found = hull_netlink::read(&mut route)?;
        if found.len() > self.taps.len() {
            let (count, lacks) = (found.len(), &self.lacks);
            let why =
                format!("{count} interfaces came when the virtual machine was there: {lacks}");
            return Err(NetworkError::Refused(why));
        }
        let resolver = resolver().ok();
        let tied = tie_to(&self.taps, &mut route, found)?;
        Ok(Joined { resolver, ..tied })
    }
}

/// As every runtime leaves a namespace of its own making.
fn loopback_up() -> Result<(), NetworkError> {
    let mut route = open_route()?;
    let links = hull_netlink::links(&mut route).map_err(failed("list the interfaces"))?;
    let up = Change {
        up: true,
        ..Change::default()
    };
    for link in links.iter().filter(|link| link.is_loopback) {
        hull_netlink::change(&mut route, link.index, up)
            .map_err(failed("bring up the loopback"))?;
    }
    Ok(())
}

/// Connects to the engine's name server in this thread's namespace.
pub(crate) fn reach_resolver() -> io::Result<TcpStream> {
    TcpStream::connect_timeout(&SocketAddr::from((RESOLVER, 53)), PATIENCE)
}

/// The way to the engine's name server, if there is one.
fn resolver() -> io::Result<UdpSocket> {
    let address = SocketAddr::from((RESOLVER, 53));
    reach_resolver()?;
    let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))?;
    socket.connect(address)?;
    Ok(socket)
}
