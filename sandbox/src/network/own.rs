//! A network namespace of the container's own, empty when its VM is built, that whoever made the
//! container fills before its command runs: Docker, by a hook or between `create` and `start`.
//!
//! Owns: the cards that wait for it, and the way to a name server in it. Refuses: more interfaces
//! than there are cards.

use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hull_netlink::{Change, NetworkError};
use hull_proto::RESOLVER;
use hull_vmm::virtio::net::Offloads;
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::{Joined, NO_TAP, failed, open_route, spare_interface, tie_to};
use crate::sys;

/// Cards of a guest whose network comes later: a machine gets no more while it runs.
const CARDS: u8 = 2;

/// What a name server on the loopback may take to be met.
const PATIENCE: Duration = Duration::from_secs(1);

/// What waits for interfaces in the namespace.
#[derive(Debug, Clone, Default)]
pub(crate) struct Own {
    taps: Vec<Waiting>,
    /// Why there are no more.
    lacks: String,
}

/// A tap that gets its interface when there is one to tie it to: most who make such a namespace
/// leave it empty, and an interface costs the kernel a lot, at its end above all.
#[derive(Debug, Clone)]
pub(crate) struct Waiting {
    tap: Arc<OwnedFd>,
    /// What its reader takes.
    offloads: Arc<Mutex<Offloads>>,
}

impl Waiting {
    fn open() -> io::Result<(OwnedFd, Self)> {
        let tap = sys::open_tap()?;
        let waiting = Self {
            tap: Arc::new(tap.try_clone()?),
            offloads: Arc::default(),
        };
        Ok((tap, waiting))
    }

    /// Tells it what its reader takes, now or when it has its interface.
    pub(crate) fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let mut told = self.told();
        *told = offloads;
        match sys::set_offloads(self.tap.as_fd(), offloads) {
            Err(error) if Errno::from_io_error(&error) == Some(Errno::BADFD) => Ok(()),
            set => set,
        }
    }

    fn plug(&self) -> io::Result<String> {
        let told = self.told();
        let name = sys::plug(self.tap.as_fd())?;
        sys::set_offloads(self.tap.as_fd(), *told)?;
        Ok(name)
    }

    fn told(&self) -> MutexGuard<'_, Offloads> {
        self.offloads.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
            match Waiting::open() {
                Ok((tap, waiting)) => {
                    joined.taps.push(tap);
                    joined.interfaces.push(spare_interface(number));
                    own.taps.push(waiting);
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
        let plugged = self.taps.iter().take(found.len()).map(Waiting::plug);
        let names: Vec<String> = plugged.collect::<io::Result<_>>().map_err(failed(NO_TAP))?;
        let tied = tie_to(&names, &mut route, found)?;
        Ok(Joined { resolver, ..tied })
    }

    /// The taps, one for each card.
    pub(crate) fn taps(&self) -> &[Waiting] {
        &self.taps
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
