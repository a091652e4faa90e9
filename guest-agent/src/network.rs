//! The guest's network: its namespace is the guest's first, and so every container's.
//!
//! Owns: cards that are taken, as the host says, and those that nobody takes. Refuses: to know
//! how the kernel is told.

use std::fs;
use std::io;
use std::path::Path;

use hull_netlink::{NetworkError, Protocol, Socket};
use hull_proto::{Interface, MAX_INTERFACES, spare_mac};

use crate::fault::{Fault, Tried};

/// Where a driver is told to take a device, and to let go of it.
const TAKE: &str = "/sys/bus/virtio/drivers/virtio_net/bind";
const LET_GO: &str = "/sys/bus/virtio/drivers/virtio_net/unbind";

/// The devices, and what a network card among them is in `device` (virtio 1.3 §5).
const DEVICES: &str = "/sys/bus/virtio/devices";
const CARD: &str = "0x0001";

/// Makes the network as the host's namespace has it.
pub(crate) fn make(interfaces: &[Interface]) -> Result<(), Fault> {
    if interfaces.is_empty() {
        return Ok(());
    }
    fault(hull_netlink::apply(&mut socket()?, interfaces))
}

/// As [`make`], where there may be more cards than interfaces: the others go. That takes a guest
/// longer than to have one come, so in one that is to be copied all have gone. Those that the guest
/// had before it was saved, with addresses and routes of another network, go first, and come anew.
pub(crate) fn make_of_spares(interfaces: &[Interface]) -> Result<(), Fault> {
    let_go(|mac| !is_spare(mac))?;
    take(interfaces.len()).or_internal(|| "cannot take the network cards")?;
    make(interfaces)?;
    let_go(is_spare)
}

fn is_spare(mac: [u8; 6]) -> bool {
    let mut spares = (0..).take(MAX_INTERFACES).map(spare_mac);
    spares.any(|spare| spare == mac)
}

/// Has the cards with such addresses be driven no longer.
fn let_go(which: impl Fn([u8; 6]) -> bool) -> Result<(), Fault> {
    let links = hull_netlink::links(&mut socket()?).or_internal(|| "cannot list the interfaces")?;
    for link in links.iter().filter(|link| link.mac.is_some_and(&which)) {
        let what = || format!("cannot take interface {} away", link.name);
        let device = Path::new("/sys/class/net").join(&link.name).join("device");
        // What containers made is no card.
        let Ok(device) = fs::read_link(device) else {
            continue;
        };
        let name = device.file_name().unwrap_or_default();
        fs::write(LET_GO, name.as_encoded_bytes()).or_internal(what)?;
    }
    Ok(())
}

/// Has so many cards be driven, as far as there are any.
fn take(count: usize) -> io::Result<()> {
    if count == 0 {
        return Ok(());
    }
    let mut cards = Vec::new();
    for device in fs::read_dir(DEVICES)? {
        let path = device?.path();
        if fs::read_to_string(path.join("device"))?.trim() == CARD {
            cards.push(path);
        }
    }
    let (driven, mut waiting): (Vec<_>, Vec<_>) = cards
        .into_iter()
        .partition(|path| path.join("driver").exists());
    waiting.sort_by_key(|path| (path.as_os_str().len(), path.clone()));
    for path in waiting.iter().take(count.saturating_sub(driven.len())) {
        fs::write(
            TAKE,
            path.file_name().unwrap_or_default().as_encoded_bytes(),
        )?;
    }
    Ok(())
}

fn socket() -> Result<Socket, Fault> {
    Socket::open(Protocol::Route).or_internal(|| "cannot open a netlink socket")
}

fn fault(made: Result<(), NetworkError>) -> Result<(), Fault> {
    match made {
        Err(NetworkError::Kernel { what, source }) => {
            Err(source).or_internal(|| format!("cannot {what}"))
        }
        Err(error) => Err(Fault::internal(error.to_string())),
        Ok(()) => Ok(()),
    }
}
