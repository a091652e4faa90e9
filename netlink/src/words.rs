//! rtnetlink's numbers (linux/rtnetlink.h, linux/if_addr.h, linux/neighbour.h).

pub(crate) const AF_INET: u8 = 2;
pub(crate) const AF_INET6: u8 = 10;

pub(crate) const RTM_NEWADDR: u16 = 20;
pub(crate) const RTM_GETADDR: u16 = 22;
/// `struct ifaddrmsg`.
pub(crate) const ADDRESS_BYTES: usize = 8;
pub(crate) const IFA_ADDRESS: u16 = 1;
pub(crate) const IFA_LOCAL: u16 = 2;
pub(crate) const IFA_BROADCAST: u16 = 4;
pub(crate) const IFA_FLAGS: u16 = 8;
pub(crate) const IFA_F_NODAD: u32 = 0x02;
pub(crate) const IFA_F_DADFAILED: u32 = 0x08;
pub(crate) const IFA_F_PERMANENT: u32 = 0x80;
pub(crate) const IFA_F_NOPREFIXROUTE: u32 = 0x200;

pub(crate) const RTM_NEWROUTE: u16 = 24;
pub(crate) const RTM_GETROUTE: u16 = 26;
/// `struct rtmsg`.
pub(crate) const ROUTE_BYTES: usize = 12;
pub(crate) const RT_TABLE_MAIN: u32 = 254;
pub(crate) const RTN_UNICAST: u8 = 1;
pub(crate) const RTPROT_RA: u8 = 9;
pub(crate) const RTM_F_CLONED: u32 = 0x200;
pub(crate) const RTNH_F_DEAD: u32 = 1;
pub(crate) const RTNH_F_ONLINK: u32 = 4;
pub(crate) const RTA_DST: u16 = 1;
pub(crate) const RTA_OIF: u16 = 4;
pub(crate) const RTA_GATEWAY: u16 = 5;
pub(crate) const RTA_PRIORITY: u16 = 6;
pub(crate) const RTA_PREFSRC: u16 = 7;
pub(crate) const RTA_METRICS: u16 = 8;
pub(crate) const RTA_MULTIPATH: u16 = 9;
pub(crate) const RTA_TABLE: u16 = 15;
pub(crate) const RTA_VIA: u16 = 18;
pub(crate) const RTAX_MTU: u16 = 2;

pub(crate) const RTM_NEWNEIGH: u16 = 28;
pub(crate) const RTM_GETNEIGH: u16 = 30;
/// `struct ndmsg`.
pub(crate) const NEIGHBOUR_BYTES: usize = 12;
pub(crate) const NUD_PERMANENT: u16 = 0x80;
pub(crate) const NDA_DST: u16 = 1;
pub(crate) const NDA_LLADDR: u16 = 2;
