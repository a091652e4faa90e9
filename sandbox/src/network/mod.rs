//! A network namespace that somebody else has set up (CNI, netavark, a person), joined: its
//! interfaces read, and each tied to a tap for the guest's card.
//!
//! Owns: the taps and the redirection, which live as long as their descriptors and no longer:
//! however the monitor ends, the kernel takes them away. Refuses: to make or change an interface
//! of others, and the host's own namespace.
//!
//! ```text
//! guest ── card ── tap ◄══ redirection ══► interface (eth0) ── … ── the host's bridge
//!                  └───── the namespace, whose own kernel sees none of it ─────┘
//! ```

mod local;
mod own;
mod redirect;

use std::fs::File;
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use hull_netlink::{Change, NetworkError, Protocol, Socket};
use hull_proto::{Interface, spare_mac};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::OFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::sys;

pub(crate) use local::Local;
pub(crate) use own::{Own, reach_resolver};

/// The network namespaces that are the host's own: the first process's, and this one's.
const HOSTS_OWN: [&str; 2] = ["/proc/1/ns/net", "/proc/self/ns/net"];

/// What is tried for each card.
const NO_TAP: &str = "make a tap by /dev/net/tun (is the kernel's module tun loaded?)";

/// A network namespace that can't be joined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    /// It can't be opened.
    #[error("cannot open network namespace \"{path}\"")]
    Open { path: PathBuf, source: io::Error },
    /// It is something else.
    #[error("\"{0}\" is not a network namespace")]
    Other(PathBuf),
    /// It is the host's own.
    #[error(
        "\"{0}\" is the host's own network namespace: a virtual machine that joined it would cut the host off"
    )]
    Hosts(PathBuf),
    /// The container's own, which whoever made it has filled.
    #[error("cannot join the container's own network namespace")]
    Own(#[source] NetworkError),
    /// Nobody can look into it.
    #[error("cannot look into the container's own network namespace")]
    View(#[source] io::Error),
    /// Something in it can't be read or made.
    #[error("cannot join network namespace \"{path}\"")]
    Network {
        path: PathBuf,
        #[source]
        source: NetworkError,
    },
}

/// A network that the guest is to have. What is in here keeps it.
#[derive(Debug, Default)]
pub(crate) struct Joined {
    /// The interfaces, as the guest is to make them.
    pub(crate) interfaces: Vec<Interface>,
    /// A tap for each, in that order.
    pub(crate) taps: Vec<OwnedFd>,
    /// The owner of the redirection.
    pub(crate) owner: Option<Arc<Socket>>,
    /// Who connects to the namespace's own `localhost`, on behalf of the guest's.
    pub(crate) local: Option<Arc<Local>>,
    /// The engine's name server in it, where it has one.
    pub(crate) resolver: Option<UdpSocket>,
    /// The taps are none.
    pub(crate) is_spare: bool,
    /// Its namespace is filled later: until then, the interfaces are spare ones.
    pub(crate) own: Option<Own>,
}

/// The cards of a guest.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Cards {
    pub(crate) count: u8,
    /// They are for interfaces that come later, if any do.
    pub(crate) wait: bool,
}

impl Joined {
    /// What stands for so many interfaces in a guest that is to be copied: no frame ever comes
    /// or goes, as its cards are down.
    pub(crate) fn spare(cards: u8) -> io::Result<Self> {
        let mut spare = Self {
            is_spare: true,
            ..Self::default()
        };
        for number in 0..cards {
            // Something that can be waited for and never has a word.
            let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
            spare.taps.push(eventfd(0, flags)?);
            spare.interfaces.push(spare_interface(number));
        }
        Ok(spare)
    }

    /// What cards the guest has.
    pub(crate) fn cards(&self) -> Cards {
        Cards {
            count: u8::try_from(self.interfaces.len()).unwrap_or(u8::MAX),
            wait: self.own.is_some(),
        }
    }

    /// The same network once more.
    pub(crate) fn again(&self) -> io::Result<Self> {
        let taps: io::Result<_> = self.taps.iter().map(OwnedFd::try_clone).collect();
        Ok(Self {
            interfaces: self.interfaces.clone(),
            taps: taps?,
            owner: self.owner.clone(),
            local: self.local.clone(),
            // Found when it is tied, and there is no other try then.
            resolver: None,
            is_spare: self.is_spare,
            own: self.own.clone(),
        })
    }
}

/// What a card is until it is somebody's.
fn spare_interface(number: u8) -> Interface {
    Interface {
        name: format!("spare{number}"),
        mac: spare_mac(number),
        // A guest's driver never takes a larger one than it has first seen.
        mtu: u16::MAX.into(),
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    }
}

/// Joins the namespace at `path`, as it is now.
///
/// A thread goes there and ends there: this one, and all that come after, stay where they are.
pub(crate) fn join(path: &Path) -> Result<Joined, JoinError> {
    let namespace = open(path)?;
    let inside = move || -> Result<Joined, NetworkError> {
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(|error| failed("enter it")(error.into()))?;
        tie()
    };
    let thread = thread::Builder::new()
        .name("network".to_owned())
        .spawn(inside)
        .map_err(failed("start a thread"));
    let joined = thread.and_then(|thread| {
        let died = |_| failed("read it")(io::ErrorKind::Other.into());
        thread.join().map_err(died)?
    });
    joined.map_err(|source| JoinError::Network {
        path: path.to_owned(),
        source,
    })
}

fn open(path: &Path) -> Result<File, JoinError> {
    // Whatever it is, opening it must not wait.
    let mut options = File::options();
    options
        .read(true)
        .custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed());
    let failed = |source| JoinError::Open {
        path: path.to_owned(),
        source,
    };
    let file = options.open(path).map_err(failed)?;
    let status = file.metadata().map_err(failed)?;
    let kind = status.file_type();
    let is_odd = kind.is_fifo() || kind.is_char_device() || kind.is_block_device();
    if is_odd || !sys::is_network_namespace(&file) {
        return Err(JoinError::Other(path.to_owned()));
    }
    let is_same = |own: &&str| {
        std::fs::metadata(own)
            .is_ok_and(|own| (own.dev(), own.ino()) == (status.dev(), status.ino()))
    };
    match HOSTS_OWN.iter().any(is_same) {
        true => Err(JoinError::Hosts(path.to_owned())),
        false => Ok(file),
    }
}

/// Reads this thread's namespace and ties a tap to each of its interfaces.
fn tie() -> Result<Joined, NetworkError> {
    let mut route = open_route()?;
    let found = hull_netlink::read(&mut route)?;
    let mut taps = Vec::new();
    let mut names = Vec::new();
    for _ in &found {
        let (tap, name) = sys::make_tap().map_err(failed(NO_TAP))?;
        taps.push(tap);
        names.push(name);
    }
    let tied = tie_to(&names, &mut route, found)?;
    Ok(Joined { taps, ..tied })
}

/// Ties the taps of these names to the interfaces in this thread's namespace, one each.
fn tie_to(
    names: &[String],
    route: &mut Socket,
    found: Vec<(u32, Interface)>,
) -> Result<Joined, NetworkError> {
    let links = hull_netlink::links(route).map_err(failed("list the interfaces"))?;
    let mut joined = Joined::default();
    let mut pairs = Vec::new();
    for ((index, interface), name) in found.into_iter().zip(names) {
        let link = links.iter().find(|link| link.name == *name);
        let link = link.ok_or_else(|| failed("find the tap")(io::ErrorKind::NotFound.into()))?;
        let wanted = Change {
            mtu: Some(interface.mtu),
            up: true,
            is_silent: true,
            ..Change::default()
        };
        hull_netlink::change(route, link.index, wanted).map_err(failed("bring the tap up"))?;
        pairs.push([(index, interface.name.clone()), (link.index, name.clone())]);
        joined.interfaces.push(interface);
    }
    if !pairs.is_empty() {
        joined.owner = Some(Arc::new(redirect::redirect(&pairs)?));
        // Without it nobody reaches the guest's localhost from here: all else works.
        joined.local = local::listen().ok().map(Arc::new);
    }
    Ok(joined)
}

fn open_route() -> Result<Socket, NetworkError> {
    Socket::open(Protocol::Route).map_err(failed("open a netlink socket"))
}

/// Turns an error into one of the network's; for `map_err`.
fn failed(what: &str) -> impl FnOnce(io::Error) -> NetworkError {
    let what = what.to_owned();
    move |source| NetworkError::Kernel { what, source }
}

#[cfg(test)]
mod tests;
