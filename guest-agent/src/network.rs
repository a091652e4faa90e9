//! The guest's network: its namespace is the guest's first, and so every container's.
//!
//! Owns: cards that are taken, as the host says, and those that nobody takes. Refuses: to know
//! how the kernel is told.

use std::fs;
use std::path::Path;

use hull_netlink::{NetworkError, Protocol, Socket};
use hull_proto::{Interface, MAX_INTERFACES, spare_mac};

use crate::fault::{Fault, Tried};

/// Where a driver is told to let go of a device.
const LET_GO: &str = "/sys/bus/virtio/drivers/virtio_net/unbind";

/// Makes the network as the host's namespace has it.
pub(crate) fn make(interfaces: &[Interface]) -> Result<(), Fault> {
    if interfaces.is_empty() {
        return Ok(());
    }
    fault(hull_netlink::apply(&mut socket()?, interfaces))
}

/// As [`make`], where there may be more cards than interfaces: the others go.
pub(crate) fn make_of_spares(interfaces: &[Interface]) -> Result<(), Fault> {
    make(interfaces)?;
    let links = hull_netlink::links(&mut socket()?).or_internal(|| "cannot list the interfaces")?;
    let is_spare = |mac| {
        (0..)
            .take(MAX_INTERFACES)
            .any(|number| spare_mac(number) == mac)
    };
    for link in links.iter().filter(|link| link.mac.is_some_and(is_spare)) {
        let what = || format!("cannot take interface {} away", link.name);
        let device = Path::new("/sys/class/net").join(&link.name).join("device");
        let device = fs::read_link(device).or_internal(what)?;
        let name = device.file_name().unwrap_or_default();
        fs::write(LET_GO, name.as_encoded_bytes()).or_internal(what)?;
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
