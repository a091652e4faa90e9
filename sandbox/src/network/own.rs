//! A network namespace of the container's own, empty when its VM is built, that whoever made the
//! container fills before its command runs: Docker, by a hook or between `create` and `start`.
//!
//! Owns: the cards that wait for it. Refuses: more interfaces than there are cards.

use hull_netlink::NetworkError;
use rustix::thread::UnshareFlags;

use super::{Joined, NO_TAP, failed, open_route, spare_interface, tie_to};
use crate::sys;

/// Cards of a guest whose network comes later: a machine gets no more while it runs.
const CARDS: u8 = 2;

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
        tie_to(&self.taps, &mut route, found)
    }
}
