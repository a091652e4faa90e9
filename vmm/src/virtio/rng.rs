//! The entropy device (virtio 1.3 §5.4): the host's randomness for the guest.

use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};

use super::device::{Activation, DeviceError, Persist, RestoreError, Unsaveable, VirtioDevice};
use super::queue::Queue;

/// The most that one request gets: a guest asks again if it wants more.
const MAX_BYTES: u32 = 4096;

/// The device: it has no state at all.
#[derive(Debug, Default)]
pub struct Rng;

/// Nothing.
#[derive(Debug, Serialize, Deserialize)]
pub struct RngState {}

impl Persist for Rng {
    const UNIT: &'static str = "rng";
    type State = RngState;

    fn save(&self) -> Result<RngState, Unsaveable> {
        Ok(RngState {})
    }

    fn restore(&mut self, _state: RngState) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl VirtioDevice for Rng {
    const ID: u32 = 4;

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(());
        };
        let mut bytes = [0u8; MAX_BYTES as usize];
        while let Some(chain) = queue.pop()? {
            let length = chain.writable_len().min(MAX_BYTES);
            let part = bytes.get_mut(..length as usize).unwrap_or_default();
            let got = getrandom(&mut *part, GetRandomFlags::empty()).map_err(|error| {
                DeviceError::Host {
                    what: "get randomness",
                    source: error.into(),
                }
            })?;
            chain.write_at(0, part.get(..got).unwrap_or_default())?;
            queue.complete(&chain, u32::try_from(got).unwrap_or(0))?;
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, Part, persist_roundtrip};

    #[test]
    fn a_request_is_filled_with_bytes_that_differ() {
        let mut bench = Bench::new(Rng);
        let first = bench.round_trip(0, &[Part::Write(32), Part::Write(32)]);
        let second = bench.round_trip(0, &[Part::Write(64)]);
        assert_eq!((first.length, second.length), (64, 64));
        assert_ne!(first.written, second.written);
        assert_ne!(first.written[..32], first.written[32..]);
        assert_eq!(
            bench.round_trip(0, &[Part::Write(10_000)]).length,
            MAX_BYTES
        );
        assert_eq!(bench.round_trip(0, &[Part::Read(vec![1])]).length, 0);
    }

    #[test]
    fn its_state_survives() {
        persist_roundtrip(&Rng, &mut Rng);
    }
}
