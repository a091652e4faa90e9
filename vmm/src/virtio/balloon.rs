//! The balloon device (virtio 1.3 §5.5), for free page reporting alone: the guest says which of
//! its memory is free, and the host takes it back. It is never asked to give up more than that.

use serde::{Deserialize, Serialize};

use super::device::{
    Activation, DeviceError, Persist, RestoreError, Unsaveable, VirtioDevice, read_config_bytes,
};
use super::queue::Queue;
use crate::memory;

/// `VIRTIO_BALLOON_F_PAGE_REPORTING`.
const PAGE_REPORTING: u64 = 1 << 5;
/// The queue with the reports; before it those of a balloon, which Linux sets up in any case.
/// Drivers number the queues that exist (virtio 1.3 §5.5.2).
const REPORTS: usize = 2;
/// Linux reports 32 ranges at once (`PAGE_REPORTING_CAPACITY`) and refuses smaller queues.
const QUEUE_SIZES: [u16; 3] = [32; 3];
/// How many pages to give up, none; and how many the driver says it has.
const CONFIG: [u8; 8] = [0; 8];

/// The device: it has no state at all.
#[derive(Debug, Default)]
pub struct Balloon;

/// Nothing.
#[derive(Debug, Serialize, Deserialize)]
pub struct BalloonState {}

impl Persist for Balloon {
    const UNIT: &'static str = "balloon";
    type State = BalloonState;

    fn save(&self) -> Result<BalloonState, Unsaveable> {
        Ok(BalloonState {})
    }

    fn restore(&mut self, _state: BalloonState) -> Result<(), RestoreError> {
        Ok(())
    }
}

impl VirtioDevice for Balloon {
    const ID: u32 = 5;

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        PAGE_REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&CONFIG, offset, data);
    }

    fn activate(&mut self, _activation: Activation) -> Result<(), DeviceError> {
        Ok(())
    }

    fn on_queue(&mut self, index: usize, queues: &mut [Queue]) -> Result<(), DeviceError> {
        let Some(queue) = queues.get_mut(index) else {
            return Ok(());
        };
        while let Some(chain) = queue.pop()? {
            if index == REPORTS {
                for buffer in chain.writable() {
                    // What can't be had back now stays the guest's.
                    let _ = memory::discard(chain.memory(), buffer.address, buffer.length);
                }
            }
            queue.complete(&chain, 0)?;
        }
        Ok(())
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Bench, Part, Used, persist_roundtrip};

    #[test]
    fn a_report_frees_its_pages_and_nothing_else() {
        let mut bench = Bench::new(Balloon);
        let freed = |used: &Used| used.written.iter().filter(|&&byte| byte == 0).count();
        let report = bench.round_trip(REPORTS, &[Part::Write(5 * 4096), Part::Write(64)]);
        assert_eq!(report.length, 0);
        // A page that lies in the range in part isn't free.
        assert!([4 * 4096, 5 * 4096].contains(&freed(&report)));
        for other in [0, 1] {
            let used = bench.round_trip(other, &[Part::Read(vec![1; 8]), Part::Write(3 * 4096)]);
            assert_eq!((used.length, freed(&used)), (0, 0));
        }
        assert_eq!(bench.round_trip(REPORTS, &[Part::Read(vec![1])]).length, 0);
    }

    #[test]
    fn it_asks_for_nothing() {
        let mut config = [1; 12];
        Balloon.read_config(0, &mut config);
        assert_eq!(config, [0; 12]);
    }

    #[test]
    fn its_state_survives() {
        persist_roundtrip(&Balloon, &mut Balloon);
    }
}
