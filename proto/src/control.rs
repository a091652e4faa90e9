//! The control stream: one JSON object a line, one request at a time.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cgroup::{CgroupStats, ProcessPage};

use crate::Interface;

/// Longest line of a control stream, in bytes, without its newline.
const MAX_LINE: usize = 64 * 1024;

/// First line of the control stream, said by the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`crate::GENERATION`] of the agent.
    pub generation: u16,
    /// The guest kernel's release, as `uname -r` prints it.
    pub kernel: String,
    /// How long ago the agent began, in nanoseconds of its monotonic clock: what the host takes
    /// off to know when the guest's first process started.
    pub awake_ns: u64,
}

/// What the monitor asks of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "request")]
pub enum Request {
    /// Gives the guest its identity. Comes once, or once more after [`Request::Settle`]; no process
    /// runs before it.
    Setup(Setup),
    /// Makes the network of a guest whose cards were nobody's up to now; those that stay so are
    /// taken away.
    Network {
        /// As in [`Setup::interfaces`].
        interfaces: Vec<Interface>,
        /// Whether questions to [`crate::RESOLVER`] go to [`crate::RESOLVER_PORT`].
        resolver: bool,
    },
    /// Undoes a setup whose processes have all ended, so that the guest can be saved, and copies
    /// set up. Refused by a guest that isn't whole.
    Settle,
    /// Has a settled guest be as the next setup wants it, as far as that can be told before: for one
    /// that is saved, together with what is on its scratch disk by the answer.
    Furnish {
        /// As in [`Setup::layers`].
        layers: Option<String>,
    },
    /// Has every process of every container stand still: answered when they do.
    StandStill,
    /// Has a guest whose processes stand still be another from here on.
    BecomeAnother(Identity),
    /// Lets the processes go on.
    GoOn,
    /// Has all that was written to the scratch disk be on it, and nothing written to it any more.
    PutAway,
    /// Ends every process (SIGTERM is the caller's business), syncs and stops the guest.
    Shutdown,
    /// Asks for nothing but an answer.
    Ping,
    /// Asks what a container has used and may use.
    Stats {
        /// The container's name.
        id: String,
    },
    /// Asks for a container's processes.
    Processes {
        /// The container's name.
        id: String,
        /// Only those with higher ids than this.
        after: u32,
    },
    /// Changes a container's limits while it runs.
    Update {
        /// The container's name.
        id: String,
        /// The limits that change, as the OCI runtime spec has `linux.resources`.
        resources: Value,
    },
    /// Has a container's processes stand still, or go on.
    Freeze {
        /// The container's name.
        id: String,
        /// Whether they are to stand still.
        frozen: bool,
    },
    /// Ends a container, if there still is one of this name.
    Remove {
        /// The container's name.
        id: String,
    },
}

/// A moment on two clocks. Whoever hears of it later knows by the first how much later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Moment {
    /// The guest's time stamp counter.
    pub tsc: u64,
    /// How often that counts in a millisecond; 0 if nobody knows.
    pub tsc_khz: u32,
    /// The host's wall clock, in nanoseconds since the epoch.
    pub realtime_ns: u64,
}

impl Moment {
    /// The host's wall clock when the guest's counter stands at `tsc`; as it was where the counter
    /// is of no use.
    #[must_use]
    pub fn realtime_at(&self, tsc: u64) -> u64 {
        let ticks = u128::from(tsc.saturating_sub(self.tsc));
        let since = (ticks * 1_000_000).checked_div(self.tsc_khz.into());
        let since = since.and_then(|since| u64::try_from(since).ok());
        self.realtime_ns.saturating_add(since.unwrap_or(0))
    }
}

/// What makes one guest different from the next.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setup {
    /// Host name of the guest's initial UTS namespace.
    pub hostname: String,
    /// What time it is.
    pub moment: Moment,
    /// 256 fresh random bits, credited to the guest kernel's generator.
    pub entropy: [u8; 32],
    /// The share that shows an image's layers, over which the scratch disk is to be laid.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layers: Option<String>,
    /// The network cards beside the loopback, by [`crate::MAX_INTERFACES`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// The size of what is to be at [`crate::SHARED_MEMORY_DIR`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_memory_bytes: Option<u64>,
}

/// What makes a guest that went on from a saved one different from it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Host name of the guest's initial UTS namespace and of its containers' own.
    pub hostname: String,
    /// What time it is.
    pub moment: Moment,
    /// 256 fresh random bits, as in [`Setup`].
    pub entropy: [u8; 32],
    /// Files of the guest in which its host name stands, and is to be replaced.
    pub files: Vec<String>,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "reply")]
pub enum Reply {
    /// Done.
    Ok,
    /// What a container has used and may use.
    Stats(Box<CgroupStats>),
    /// A container's processes.
    Processes(ProcessPage),
    /// Not done, and why: a whole sentence for a person.
    Error {
        /// What failed.
        message: String,
    },
}

/// A control stream that broke its rules.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// A line longer than the limit.
    #[error("control line longer than {MAX_LINE} bytes")]
    TooLong,
    /// A line that isn't the expected JSON object.
    #[error("control line is not the expected object")]
    Malformed(#[from] serde_json::Error),
}

/// Appends `value` to `out` as one line.
///
/// # Errors
/// [`ControlError::TooLong`] if the receiver would refuse the line.
pub fn encode_line<T: Serialize>(value: &T, out: &mut Vec<u8>) -> Result<(), ControlError> {
    let line = serde_json::to_vec(value)?;
    if line.len() > MAX_LINE {
        return Err(ControlError::TooLong);
    }
    out.extend_from_slice(&line);
    out.push(b'\n');
    Ok(())
}

/// Cuts a byte stream into lines and holds at most one limit's worth of bytes.
#[derive(Debug, Default)]
pub struct LineDecoder {
    pending: Vec<u8>,
}

impl LineDecoder {
    /// Takes bytes as they arrive.
    pub fn feed(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// Bytes that aren't a whole line yet.
    #[must_use]
    pub fn pending(&self) -> &[u8] {
        &self.pending
    }

    /// The next whole message, or `None` until more bytes arrive.
    ///
    /// # Errors
    /// The stream cannot be used after an error.
    pub fn take<T: DeserializeOwned>(&mut self) -> Result<Option<T>, ControlError> {
        let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') else {
            return if self.pending.len() > MAX_LINE {
                Err(ControlError::TooLong)
            } else {
                Ok(None)
            };
        };
        if end > MAX_LINE {
            return Err(ControlError::TooLong);
        }
        let message = serde_json::from_slice(&self.pending[..end])?;
        self.pending.drain(..=end);
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_is_told_by_the_counter_where_there_is_one() {
        let moment = |tsc_khz| Moment {
            tsc: 5_000,
            tsc_khz,
            realtime_ns: 7,
        };
        // 2 GHz for 3 s.
        assert_eq!(moment(2_000_000).realtime_at(6_000_005_000), 3_000_000_007);
        assert_eq!(moment(2_000_000).realtime_at(4_999), 7);
        assert_eq!(moment(0).realtime_at(u64::MAX), 7);
        assert_eq!(moment(1).realtime_at(u64::MAX), 7);
    }

    #[test]
    fn requests_round_trip_in_pieces() {
        let setup = Request::Setup(Setup {
            hostname: "a".into(),
            moment: Moment {
                tsc: u64::MAX,
                tsc_khz: u32::MAX,
                realtime_ns: u64::MAX,
            },
            entropy: [7; 32],
            layers: Some("root".into()),
            interfaces: Vec::new(),
            shared_memory_bytes: None,
        });
        let mut bytes = Vec::new();
        encode_line(&setup, &mut bytes).unwrap();
        encode_line(&Request::Ping, &mut bytes).unwrap();
        let mut decoder = LineDecoder::default();
        let mut seen = Vec::new();
        for byte in bytes {
            decoder.feed(&[byte]);
            while let Some(request) = decoder.take::<Request>().unwrap() {
                seen.push(request);
            }
        }
        assert_eq!(seen, [setup, Request::Ping]);
    }

    #[test]
    fn the_largest_network_fits_a_line() {
        use crate::{Address, MAX_INTERFACES, MAX_NETWORK_ENTRIES, Route};
        let longest = [0xff; 16].into();
        let route = Route {
            destination: longest,
            prefix: 128,
            gateway: Some(longest),
            source: Some(longest),
            metric: Some(u32::MAX),
            mtu: Some(u32::MAX),
            scope: u8::MAX,
            protocol: u8::MAX,
            onlink: false,
        };
        let address = Address {
            address: longest,
            prefix: 128,
            peer: Some(longest),
            broadcast: Some([255; 4].into()),
            scope: u8::MAX,
        };
        let interface = |routes: usize, addresses: usize| Interface {
            name: "\u{1}".repeat(15),
            mac: [255; 6],
            mtu: u32::MAX,
            addresses: vec![address; addresses],
            routes: vec![route; routes],
            neighbours: Vec::new(),
        };
        let mut interfaces = vec![interface(MAX_NETWORK_ENTRIES, 0)];
        interfaces.resize(MAX_INTERFACES, interface(0, 0));
        for first in [MAX_NETWORK_ENTRIES, 0] {
            interfaces[0] = interface(first, MAX_NETWORK_ENTRIES - first);
            let setup = Request::Setup(Setup {
                hostname: "h".repeat(64),
                moment: Moment {
                    tsc: u64::MAX,
                    tsc_khz: u32::MAX,
                    realtime_ns: u64::MAX,
                },
                entropy: [255; 32],
                layers: Some("root".into()),
                interfaces: interfaces.clone(),
                shared_memory_bytes: Some(u64::MAX),
            });
            let mut line = Vec::new();
            encode_line(&setup, &mut line).unwrap();
            let mut decoder = LineDecoder::default();
            decoder.feed(&line);
            assert_eq!(decoder.take::<Request>().unwrap(), Some(setup));
        }
    }

    #[test]
    fn an_endless_line_is_refused() {
        let mut decoder = LineDecoder::default();
        decoder.feed(&vec![b'x'; MAX_LINE + 1]);
        assert!(matches!(
            decoder.take::<Reply>(),
            Err(ControlError::TooLong)
        ));
    }

    #[test]
    fn a_line_that_is_not_a_reply_is_refused() {
        let mut decoder = LineDecoder::default();
        decoder.feed(b"{\"reply\":\"maybe\"}\n");
        assert!(matches!(
            decoder.take::<Reply>(),
            Err(ControlError::Malformed(_))
        ));
    }
}
