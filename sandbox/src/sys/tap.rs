//! Taps (kernel documentation, networking/tuntap) and what kind of namespace a file is.

use std::ffi::{CStr, c_char, c_int, c_short, c_uint};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use hull_vmm::virtio::net::Offloads;
use rustix::fs::{Mode, OFlags};

/// `struct virtio_net_hdr_v1`.
static HEADER_BYTES: c_int = 12;

fn check(result: c_int) -> io::Result<c_int> {
    match result {
        0.. => Ok(result),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Opens a tap without an interface: [`plug`] makes one, in the network namespace that this thread
/// is in now.
pub(crate) fn open_tap() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/net/tun", flags, Mode::empty())?)
}

/// Gives a tap its interface, with the header of virtio's cards before each frame; returns its
/// name. It is there until the tap's last descriptor is closed.
pub(crate) fn plug(tap: BorrowedFd<'_>) -> io::Result<String> {
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as c_short,
        },
    };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"hull%d") {
        *place = *byte as c_char;
    }
    let descriptor = tap.as_raw_fd();
    // SAFETY: TUNSETIFF reads and writes one `struct ifreq`, which outlives the call.
    check(unsafe { libc::ioctl(descriptor, libc::TUNSETIFF, &raw mut request) })?;
    // SAFETY: TUNSETVNETHDRSZ reads one int, which outlives the call.
    check(unsafe { libc::ioctl(descriptor, libc::TUNSETVNETHDRSZ, &raw const HEADER_BYTES) })?;
    let name: Vec<u8> = request.ifr_name.iter().map(|byte| *byte as u8).collect();
    let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
    Ok(name.to_string_lossy().into_owned())
}

/// Opens a tap and gives it its interface.
pub(crate) fn make_tap() -> io::Result<(OwnedFd, String)> {
    let tap = open_tap()?;
    let name = plug(tap.as_fd())?;
    Ok((tap, name))
}

/// Tells a tap what its reader takes.
pub(crate) fn set_offloads(tap: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (offloads.checksum, libc::TUN_F_CSUM),
        (offloads.tso4, libc::TUN_F_TSO4),
        (offloads.tso6, libc::TUN_F_TSO6),
        (offloads.ecn, libc::TUN_F_TSO_ECN),
    ];
    let chosen = flags.iter().filter(|(is_taken, _)| *is_taken);
    let chosen: c_uint = chosen.map(|(_, flag)| flag).sum();
    // SAFETY: TUNSETOFFLOAD takes a number and touches no memory.
    check(unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, chosen) })?;
    Ok(())
}

/// Whether a file is a network namespace (ioctl_ns(2)).
pub(crate) fn is_network_namespace(file: &File) -> bool {
    const NS_GET_NSTYPE: libc::Ioctl = 0xb703;
    let descriptor = file.as_fd().as_raw_fd();
    // SAFETY: NS_GET_NSTYPE takes no argument; another kind of file refuses it.
    check(unsafe { libc::ioctl(descriptor, NS_GET_NSTYPE) })
        .is_ok_and(|kind| kind == libc::CLONE_NEWNET)
}
