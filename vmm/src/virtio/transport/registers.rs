//! What a driver writes into the registers, before anything comes of it.

use serde::{Deserialize, Serialize};

use crate::virtio::device::DynDevice;
use crate::virtio::queue::QueueState;

/// Status: the driver has accepted the features, and so has the device.
pub(super) const FEATURES_OK: u32 = 8;

/// What the driver has written.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) shared_memory_select: u32,
    pub(super) config_generation: u32,
    pub(super) queues: Vec<QueueState>,
}

/// The queues as the driver finds them: off, at the device's sizes.
pub(super) fn fresh_queues(device: &dyn DynDevice) -> Vec<QueueState> {
    let fresh = |size: &u16| QueueState {
        max_size: *size,
        size: *size,
        ..QueueState::default()
    };
    device.queue_sizes().iter().map(fresh).collect()
}

impl Registers {
    /// The driver writes a register that selects, negotiates or places a queue.
    pub(super) fn write(&mut self, offset: u64, value: u32, running: bool) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 if self.status & FEATURES_OK == 0 => {
                let select = self.driver_features_select;
                set_half(&mut self.driver_features, select, value);
            }
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0xac => self.shared_memory_select = value,
            _ if running => {}
            _ => {
                let select = self.queue_select as usize;
                if let Some(queue) = self.queues.get_mut(select) {
                    write_queue_register(queue, offset, value);
                }
            }
        }
    }
}

fn write_queue_register(queue: &mut QueueState, offset: u64, value: u32) {
    match offset {
        0x38 => {
            let size = u16::try_from(value).unwrap_or(0);
            if size.is_power_of_two() && size <= queue.max_size {
                queue.size = size;
            }
        }
        0x44 => queue.ready = value & 1 != 0,
        0x80 => set_half(&mut queue.desc_table, 0, value),
        0x84 => set_half(&mut queue.desc_table, 1, value),
        0x90 => set_half(&mut queue.avail_ring, 0, value),
        0x94 => set_half(&mut queue.avail_ring, 1, value),
        0xa0 => set_half(&mut queue.used_ring, 0, value),
        0xa4 => set_half(&mut queue.used_ring, 1, value),
        _ => {}
    }
}

/// One half of a 64-bit register: 0 the low one, 1 the high one, else nothing.
pub(super) fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => (value & u64::from(u32::MAX)) as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_half(register: &mut u64, select: u32, value: u32) {
    match select {
        0 => *register = *register & !u64::from(u32::MAX) | u64::from(value),
        1 => *register = *register & u64::from(u32::MAX) | u64::from(value) << 32,
        _ => {}
    }
}
