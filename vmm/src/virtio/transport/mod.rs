//! virtio-mmio, version 2 (virtio 1.3 §4.2): the registers of one device.
//!
//! A [`Slot`] is one device with its registers, its queues, its interrupt line
//! and its doorbells. vCPU threads come in through `read` and `write`, the
//! worker through `on_kick` and `on_events`; one lock serialises them, but the
//! interrupt's status, which a guest reads at every interrupt, has none.
//!
//! ```text
//!  status 0 ─► ACKNOWLEDGE ─► DRIVER ─► FEATURES_OK ─► DRIVER_OK ═► running
//!     ▲                                                                │ guest broke a rule
//!     └───────────────── driver writes 0 ◄───────── NEEDS_RESET ◄──────┘
//! ```

mod registers;
#[cfg(test)]
mod tests;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use rustix::event::EventfdFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::registers::{FEATURES_OK, Registers, fresh_queues, half};
use super::device::{Activation, DeviceError, DynDevice, Readiness, RestoreError};
use super::queue::{Interrupt, Queue, QueueState};
use super::worker::{DeviceWakers, Poller};
use crate::memory::{ChangingRam, Window};
use crate::outcome::{Outcome, VmExit, lock};

/// Size of a device's register window in bytes.
pub const WINDOW_BYTES: u64 = 0x1000;
/// The register that rings a queue's doorbell.
pub const QUEUE_NOTIFY: u64 = 0x50;

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"HULL");
const CONFIG_SPACE: u64 = 0x100;

/// Features of the ring and the transport, offered for every device (virtio 1.3 §6).
const RING_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

const DRIVER_OK: u32 = 4;
const NEEDS_RESET: u32 = 64;
const STATUS_BITS: u32 = 0xff;

/// Interrupt status: used buffers; configuration changed.
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

/// How often in a row the worker looks again at a queue that a guest keeps filling.
const ROUNDS: usize = 16;
/// How many broken rules of one device are worth a line in the log.
const LOGGED_FAULTS: u32 = 8;

/// The slots' interrupt lines, as they lead into the machine's interrupt chip.
pub trait Lines: Send + Sync {
    /// Raises the line of slot `index` for a moment: one interrupt.
    fn pulse(&self, index: usize);
}

/// A device's interrupt: a status register and a line.
struct Line {
    status: AtomicU32,
    index: usize,
    lines: Arc<dyn Lines>,
}

impl Line {
    fn raise_status(&self, bits: u32) {
        self.status.fetch_or(bits, Ordering::SeqCst);
        self.lines.pulse(self.index);
    }
}

impl Interrupt for Line {
    fn raise(&self, _index: usize) {
        self.raise_status(USED_BUFFER);
    }
}

/// A slot's part of a snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SlotState {
    /// The device's unit: a state is applied to a slot that holds the same one.
    pub unit: String,
    registers: Registers,
    interrupt_status: u32,
    device: Vec<u8>,
}

impl SlotState {
    /// The state of the slot's device.
    ///
    /// # Errors
    /// If it isn't one of such a device.
    pub fn device_state<S: DeserializeOwned>(&self) -> Result<S, RestoreError> {
        rmp_serde::from_slice(&self.device).map_err(|source| RestoreError::Decode {
            unit: self.unit.clone(),
            source,
        })
    }
}

struct Shared {
    registers: Registers,
    device: Box<dyn DynDevice>,
    /// There while the device runs.
    queues: Vec<Queue>,
    wakers: Option<Arc<DeviceWakers>>,
    faults: u32,
}

/// One device in the machine.
pub struct Slot {
    index: usize,
    unit: &'static str,
    line: Arc<Line>,
    doorbells: Vec<OwnedFd>,
    memory: ChangingRam,
    window: Option<Arc<Window>>,
    poller: Arc<Poller>,
    outcome: Arc<Outcome>,
    shared: Mutex<Shared>,
}

/// What all slots of a machine have in common.
#[derive(Clone)]
pub struct Board {
    /// Guest memory.
    pub memory: ChangingRam,
    /// Where the guest sees files beside it.
    pub window: Option<Arc<Window>>,
    /// Where interrupts go.
    pub lines: Arc<dyn Lines>,
    /// Where a device that can't live any longer reports.
    pub outcome: Arc<Outcome>,
}

impl Slot {
    /// Puts `device` into slot `index`, served by `poller`'s thread.
    ///
    /// # Errors
    /// When the host has no eventfd left.
    pub fn new(
        index: usize,
        device: Box<dyn DynDevice>,
        board: &Board,
        poller: &Arc<Poller>,
    ) -> std::io::Result<Self> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let queues = fresh_queues(device.as_ref());
        let mut doorbells = Vec::with_capacity(queues.len());
        for _ in &queues {
            doorbells.push(rustix::event::eventfd(0, flags)?);
        }
        let line = Line {
            status: AtomicU32::new(0),
            index,
            lines: Arc::clone(&board.lines),
        };
        Ok(Self {
            index,
            unit: device.unit(),
            line: Arc::new(line),
            doorbells,
            memory: board.memory.clone(),
            window: board.window.clone(),
            poller: Arc::clone(poller),
            outcome: Arc::clone(&board.outcome),
            shared: Mutex::new(Shared {
                registers: Registers {
                    queues,
                    ..Registers::default()
                },
                device,
                queues: Vec::new(),
                wakers: None,
                faults: 0,
            }),
        })
    }

    /// The device's unit.
    #[must_use]
    pub fn unit(&self) -> &'static str {
        self.unit
    }

    /// The eventfds that the queues' doorbells count up.
    #[must_use]
    pub fn doorbells(&self) -> &[OwnedFd] {
        &self.doorbells
    }

    /// The driver reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_SPACE {
            lock(&self.shared)
                .device
                .read_config(offset - CONFIG_SPACE, data);
        } else if let Ok(word) = <&mut [u8; 4]>::try_from(data) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        if offset == 0x60 {
            return self.line.status.load(Ordering::SeqCst);
        }
        let shared = lock(&self.shared);
        let registers = &shared.registers;
        let queue = registers.queues.get(registers.queue_select as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => shared.device.id(),
            0x0c => VENDOR,
            0x10 => half(
                shared.device.features() | RING_FEATURES,
                registers.device_features_select,
            ),
            0x34 => queue.map_or(0, |q| u32::from(q.max_size)),
            0x44 => queue.map_or(0, |q| u32::from(q.ready)),
            0x70 => registers.status,
            0xb0..=0xbc => shared.shared_memory_register(offset),
            0xfc => registers.config_generation,
            _ => 0,
        }
    }

    /// The driver writes `data` at `offset` of the window.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_SPACE {
            lock(&self.shared)
                .device
                .write_config(offset - CONFIG_SPACE, data);
            return;
        }
        let Ok(word) = <[u8; 4]>::try_from(data) else {
            return;
        };
        let value = u32::from_le_bytes(word);
        match offset {
            // KVM takes the doorbells of queues that exist.
            QUEUE_NOTIFY => {}
            0x64 => {
                self.line.status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.write_status(value),
            _ => {
                let mut shared = lock(&self.shared);
                let running = shared.running();
                shared.registers.write(offset, value, running);
            }
        }
    }

    fn write_status(&self, value: u32) {
        let mut shared = lock(&self.shared);
        let old = shared.registers.status;
        if value == 0 {
            self.reset(&mut shared);
            return;
        }
        // §2.1.1: the driver never clears a bit; what it may not set stays as it is.
        let mut new = old | value & STATUS_BITS & !NEEDS_RESET;
        let offered = shared.device.features() | RING_FEATURES;
        let chosen = shared.registers.driver_features;
        if chosen & !offered != 0 || chosen & VERSION_1 == 0 {
            new &= !FEATURES_OK;
        }
        if new & FEATURES_OK == 0 {
            new &= !DRIVER_OK;
        }
        shared.registers.status = new;
        if new & DRIVER_OK != 0 && old & DRIVER_OK == 0 {
            let result = self.activate(&mut shared);
            self.settle(&mut shared, result);
        }
    }

    fn reset(&self, shared: &mut Shared) {
        self.stop_device(shared);
        shared.registers = Registers {
            queues: fresh_queues(shared.device.as_ref()),
            config_generation: shared.registers.config_generation,
            ..Registers::default()
        };
        self.line.status.store(0, Ordering::SeqCst);
    }

    fn stop_device(&self, shared: &mut Shared) {
        shared.device.reset();
        shared.queues.clear();
        if let Some(wakers) = shared.wakers.take() {
            wakers.close();
        }
    }

    fn activate(&self, shared: &mut Shared) -> Result<(), DeviceError> {
        let event_idx = shared.registers.driver_features & EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(shared.registers.queues.len());
        for (index, state) in shared.registers.queues.iter().enumerate() {
            let state = QueueState {
                event_idx,
                ..*state
            };
            let interrupt: Arc<dyn Interrupt> = Arc::<Line>::clone(&self.line);
            let memory = self.memory.clone();
            let queue = Queue::new(&state, index, memory, interrupt)?;
            queues.push(queue.with_window(self.window.clone()));
        }
        let wakers = Arc::new(DeviceWakers::new(Arc::clone(&self.poller), self.index));
        shared.wakers = Some(Arc::clone(&wakers));
        shared.device.activate(Activation {
            features: shared.registers.driver_features,
            wakers,
        })?;
        shared.queues = queues;
        Ok(())
    }

    /// Draws the consequences of what a device said.
    fn settle(&self, shared: &mut Shared, result: Result<(), DeviceError>) {
        let Err(error) = result else { return };
        let cause = chain(&error);
        if let DeviceError::Host { .. } = error {
            self.outcome.report(VmExit::DeviceFailed {
                device: self.unit.to_owned(),
                cause,
            });
        } else {
            shared.faults = shared.faults.saturating_add(1);
            if shared.faults <= LOGGED_FAULTS {
                log::warn!("device {} stops until it is reset: {cause}", self.unit);
            }
        }
        self.stop_device(shared);
        shared.registers.status |= NEEDS_RESET;
        self.line.raise_status(CONFIG_CHANGE);
    }

    /// Tells the driver, if there is one, that the configuration space holds something else.
    pub fn config_changed(&self) {
        let mut shared = lock(&self.shared);
        let registers = &mut shared.registers;
        registers.config_generation = registers.config_generation.wrapping_add(1);
        if shared.running() {
            self.line.raise_status(CONFIG_CHANGE);
        }
    }

    /// The doorbell of queue `index` rang.
    pub fn on_kick(&self, index: usize) {
        let mut count = [0; 8];
        if let Some(doorbell) = self.doorbells.get(index) {
            let _ = rustix::io::read(doorbell, &mut count);
        }
        let mut shared = lock(&self.shared);
        let result = shared.serve(index).map(|more| {
            if more {
                self.ring(index)
            }
        });
        self.settle(&mut shared, result);
    }

    /// Rings a doorbell from our side: the worker looks at the queue when its turn comes.
    pub fn ring(&self, index: usize) {
        if let Some(doorbell) = self.doorbells.get(index) {
            let _ = rustix::io::write(doorbell, &1u64.to_ne_bytes());
        }
    }

    /// Descriptors that the device watches are ready.
    pub fn on_events(&self) {
        let mut shared = lock(&self.shared);
        let Some(wakers) = shared.wakers.clone() else {
            return;
        };
        for (token, readiness) in wakers.ready() {
            let result = shared
                .on_event(token, readiness)
                .map(|again| again.into_iter().for_each(|index| self.ring(index)));
            self.settle(&mut shared, result);
        }
    }

    /// Takes the slot's state. vCPUs and workers stand still.
    ///
    /// # Errors
    /// What the device's state says.
    pub fn save(&self) -> Result<SlotState, RestoreError> {
        let shared = lock(&self.shared);
        let mut registers = shared.registers.clone();
        for (state, queue) in registers.queues.iter_mut().zip(&shared.queues) {
            *state = queue.state();
        }
        Ok(SlotState {
            unit: self.unit.to_owned(),
            registers,
            interrupt_status: self.line.status.load(Ordering::SeqCst),
            device: shared.device.save()?,
        })
    }

    /// Applies a state to a freshly built slot: the device goes on as if it had never
    /// stopped, and looks at all its queues once more.
    ///
    /// # Errors
    /// [`RestoreError`] when the state is another device's.
    pub fn restore(&self, state: SlotState) -> Result<(), RestoreError> {
        let mut shared = lock(&self.shared);
        let sizes = |queues: &[QueueState]| queues.iter().map(|q| q.max_size).collect::<Vec<_>>();
        let fresh = fresh_queues(shared.device.as_ref());
        if state.unit != self.unit || sizes(&state.registers.queues) != sizes(&fresh) {
            return Err(RestoreError::Mismatch {
                unit: self.unit.to_owned(),
                why: format!("it was saved from unit {:?} with other queues", state.unit),
            });
        }
        shared.device.restore(&state.device)?;
        shared.registers = state.registers;
        self.line
            .status
            .store(state.interrupt_status, Ordering::SeqCst);
        let status = shared.registers.status;
        if status & DRIVER_OK != 0 && status & NEEDS_RESET == 0 {
            let result = self.activate(&mut shared);
            self.settle(&mut shared, result);
            (0..shared.queues.len()).for_each(|index| self.ring(index));
        }
        Ok(())
    }
}

impl Shared {
    fn running(&self) -> bool {
        !self.queues.is_empty()
    }

    /// §4.2.2.1: the region's length and base; all ones when there is none.
    fn shared_memory_register(&self, offset: u64) -> u32 {
        let id = u8::try_from(self.registers.shared_memory_select).ok();
        let Some(region) = id.and_then(|id| self.device.shared_memory(id)) else {
            return u32::MAX;
        };
        match offset {
            0xb0 => half(region.length_bytes, 0),
            0xb4 => half(region.length_bytes, 1),
            0xb8 => half(region.base, 0),
            _ => half(region.base, 1),
        }
    }

    /// Lets the device work on a queue until it has nothing more to take; true when the
    /// guest fills it faster than that.
    fn serve(&mut self, index: usize) -> Result<bool, DeviceError> {
        for _ in 0..ROUNDS {
            let Some(before) = self.queues.get(index).map(Queue::position) else {
                return Ok(false);
            };
            self.device.on_queue(index, &mut self.queues)?;
            let Some(queue) = self.queues.get_mut(index) else {
                return Ok(false);
            };
            let more = queue.enable_kicks()?;
            if !more || queue.position() == before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Hands an event over; returns the queues that filled up again while the device
    /// took from them.
    fn on_event(&mut self, token: u32, readiness: Readiness) -> Result<Vec<usize>, DeviceError> {
        if !self.running() {
            return Ok(Vec::new());
        }
        let before: Vec<u16> = self.queues.iter().map(Queue::position).collect();
        self.device.on_event(token, readiness, &mut self.queues)?;
        let mut again = Vec::new();
        for (index, (queue, before)) in self.queues.iter_mut().zip(before).enumerate() {
            if queue.position() != before && queue.enable_kicks()? {
                again.push(index);
            }
        }
        Ok(again)
    }
}

/// An error and its sources in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
