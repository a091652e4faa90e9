//! The loop around a vCPU, and the gate that its thread passes at every turn.
//!
//! [`step`] maps an exit to what happens next and is all of the loop that is
//! worth testing; [`Gate`] is how a machine pauses and stops threads that may
//! be anywhere: in the guest, asleep in it, or between two exits.
//!
//! ```text
//!            resume                    a signal kicks it out of the guest
//!  standing ───────► running ────────────────────────────────► standing
//!      │                 │ stop, or the guest ended the machine
//!      └─────────────────┴──────────────► gone
//! ```

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, Once, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::bus::Bus;
use crate::device::power::Request;
use crate::kvm::vcpu::{MAX_ACCESS_BYTES, Vcpu, VcpuEntry, VcpuExit};
use crate::outcome::{Outcome, VmExit, lock};

/// A vCPU thread's stack.
const STACK_BYTES: usize = 128 << 10;
/// How long a kick is given before it is repeated: one that comes between the gate and the
/// guest is lost.
const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// What a vCPU does after an exit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Enters the guest again.
    Continue(VcpuEntry),
    /// Looks at the gate first.
    Gate,
    /// The machine is over.
    End(VmExit),
}

/// What follows from `exit` of vCPU `index`.
#[must_use]
pub fn step(index: u8, exit: VcpuExit, bus: &Bus) -> Step {
    match exit {
        VcpuExit::MmioRead(address, length) => {
            let mut data = [0; MAX_ACCESS_BYTES];
            if let Some(data) = data.get_mut(..length) {
                bus.mmio_read(address, data);
            }
            Step::Continue(VcpuEntry::Data(data))
        }
        VcpuExit::MmioWrite(address, data) => {
            bus.mmio_write(address, data.bytes());
            Step::Continue(VcpuEntry::Run)
        }
        VcpuExit::PortRead(port, length) => {
            let mut data = [0; MAX_ACCESS_BYTES];
            if let Some(data) = data.get_mut(..length) {
                bus.port_read(port, data);
            }
            Step::Continue(VcpuEntry::Data(data))
        }
        VcpuExit::PortWrite(port, data) => match bus.port_write(port, data.bytes()) {
            None => Step::Continue(VcpuEntry::Run),
            Some(Request::Reset) => Step::End(VmExit::Reset),
            Some(Request::Shutdown) => Step::End(VmExit::Shutdown),
        },
        VcpuExit::Interrupted => Step::Gate,
        VcpuExit::TripleFault => Step::End(VmExit::TripleFault),
        VcpuExit::Failed { reason, registers } => Step::End(VmExit::InternalError {
            vcpu: index,
            reason,
            registers,
        }),
    }
}

/// What the machine wants of its vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Stand,
    Run,
    Leave,
}

struct Crowd {
    wish: Wish,
    /// Threads that are neither standing at the gate nor gone.
    moving: usize,
}

/// The gate that all vCPU threads of a machine pass.
pub struct Gate {
    crowd: Mutex<Crowd>,
    /// What `crowd` wishes, for a thread that only glances.
    closed: AtomicBool,
    changed: Condvar,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            crowd: Mutex::new(Crowd {
                wish: Wish::Stand,
                moving: 0,
            }),
            closed: AtomicBool::new(true),
            changed: Condvar::new(),
        }
    }
}

impl Gate {
    /// Called by a thread on its way to the guest; false when it is to end.
    fn pass(&self) -> bool {
        let mut crowd = lock(&self.crowd);
        if crowd.wish == Wish::Run {
            return true;
        }
        crowd.moving -= 1;
        self.changed.notify_all();
        while crowd.wish == Wish::Stand {
            crowd = self
                .changed
                .wait(crowd)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if crowd.wish == Wish::Leave {
            return false;
        }
        crowd.moving += 1;
        true
    }

    /// Whether a thread would have to stop at the gate.
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
    }

    fn wish(&self, wish: Wish) {
        lock(&self.crowd).wish = wish;
        self.closed.store(wish != Wish::Run, Ordering::SeqCst);
        self.changed.notify_all();
    }

    /// Called by a thread that ends by itself.
    fn leave(&self) {
        lock(&self.crowd).moving -= 1;
        self.changed.notify_all();
    }
}

/// All vCPU threads of a machine.
pub struct Vcpus {
    gate: Arc<Gate>,
    /// Each locked by its thread, but while that stands at the gate.
    vcpus: Vec<Arc<Mutex<Vcpu>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts one thread for each of `vcpus`; they stand at the gate.
    ///
    /// # Errors
    /// When the host refuses a thread or the signal.
    pub fn start(vcpus: Vec<Vcpu>, bus: &Arc<Bus>, outcome: &Arc<Outcome>) -> io::Result<Self> {
        install_kick()?;
        let mut all = Self {
            gate: Arc::new(Gate::default()),
            vcpus: vcpus
                .into_iter()
                .map(|vcpu| Arc::new(Mutex::new(vcpu)))
                .collect(),
            threads: Vec::new(),
        };
        for (index, vcpu) in (0u8..).zip(&all.vcpus) {
            let vcpu = Arc::clone(vcpu);
            let (gate, bus) = (Arc::clone(&all.gate), Arc::clone(bus));
            let outcome = Arc::clone(outcome);
            lock(&all.gate.crowd).moving += 1;
            let thread = std::thread::Builder::new()
                .name(format!("vcpu-{index}"))
                .stack_size(STACK_BYTES)
                .spawn(move || drive(index, &vcpu, &gate, &bus, &outcome));
            match thread {
                Ok(thread) => all.threads.push(thread),
                Err(error) => {
                    all.gate.leave();
                    return Err(error);
                }
            }
        }
        Ok(all)
    }

    /// Opens the gate.
    pub fn resume(&self) {
        self.gate.wish(Wish::Run);
    }

    /// Closes the gate and waits until every thread stands at it.
    pub fn pause(&self) {
        self.gate.wish(Wish::Stand);
        self.kick_until_still();
    }

    /// Whether every thread stands at the closed gate, or is gone.
    #[must_use]
    pub fn stand_still(&self) -> bool {
        let crowd = lock(&self.gate.crowd);
        crowd.wish != Wish::Run && crowd.moving == 0
    }

    /// Calls `look` with each vCPU in order; all stand still, as after [`Vcpus::pause`].
    ///
    /// # Errors
    /// The first that `look` returns.
    pub fn visit<E>(&self, mut look: impl FnMut(&Vcpu) -> Result<(), E>) -> Result<(), E> {
        self.vcpus.iter().try_for_each(|vcpu| look(&lock(vcpu)))
    }

    /// Ends the threads and waits for them.
    pub fn stop(&mut self) {
        self.gate.wish(Wish::Leave);
        self.kick_until_still();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }

    fn kick_until_still(&self) {
        let mut crowd = lock(&self.gate.crowd);
        while crowd.moving > 0 {
            for thread in &self.threads {
                if !thread.is_finished() {
                    let _ = thread.kill(kick_signal());
                }
            }
            (crowd, _) = self
                .gate
                .changed
                .wait_timeout(crowd, KICK_INTERVAL)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.stop();
    }
}

/// One vCPU's thread.
fn drive(index: u8, vcpu: &Mutex<Vcpu>, gate: &Gate, bus: &Bus, outcome: &Outcome) {
    while gate.pass() {
        if let Some(exit) = run(index, &mut lock(vcpu), gate, bus) {
            outcome.report(exit);
            gate.leave();
            return;
        }
    }
}

/// Runs a vCPU until the gate wants it (nothing) or the machine is over.
fn run(index: u8, vcpu: &mut Vcpu, gate: &Gate, bus: &Bus) -> Option<VmExit> {
    let mut entry = VcpuEntry::Run;
    loop {
        // With the gate closed, KVM completes what the last exit began and comes back.
        vcpu.leave_at_once(gate.is_closed());
        let exit = match vcpu.run(entry) {
            Ok(exit) => exit,
            Err(error) => VcpuExit::Failed {
                reason: format!("{error}: {}", cause(&error)),
                registers: vcpu.registers(),
            },
        };
        entry = match step(index, exit, bus) {
            Step::Continue(next) => next,
            Step::Gate => return None,
            Step::End(exit) => return Some(exit),
        };
    }
}

fn cause(error: &dyn std::error::Error) -> String {
    error.source().map_or_else(String::new, ToString::to_string)
}

fn kick_signal() -> i32 {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // Nothing: KVM_RUN returns with EINTR, which is all that is wanted.
}

fn install_kick() -> io::Result<()> {
    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| {
        result = register_signal_handler(kick_signal(), on_kick).map_err(io::Error::from);
    });
    result
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::vcpu::Access;

    #[test]
    fn each_exit_has_its_consequence() {
        let bus = Bus::new(Vec::new(), None);
        let next = |exit| step(3, exit, &bus);
        let write = |port, byte: u8| VcpuExit::PortWrite(port, Access::new(&[byte]));
        assert_eq!(next(write(0x64, 0xfe)), Step::End(VmExit::Reset));
        assert_eq!(next(write(0x600, 0x34)), Step::End(VmExit::Shutdown));
        assert_eq!(next(write(0x80, 0)), Step::Continue(VcpuEntry::Run));
        assert_eq!(next(VcpuExit::TripleFault), Step::End(VmExit::TripleFault));
        assert_eq!(next(VcpuExit::Interrupted), Step::Gate);
        let floating = VcpuEntry::Data([0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
        assert_eq!(
            next(VcpuExit::MmioRead(0x1000, 4)),
            Step::Continue(floating)
        );
        assert_eq!(next(VcpuExit::PortRead(0x71, 4)), Step::Continue(floating));
        let failed = VcpuExit::Failed {
            reason: "why".to_owned(),
            registers: String::new(),
        };
        let ended = VmExit::InternalError {
            vcpu: 3,
            reason: "why".to_owned(),
            registers: String::new(),
        };
        assert_eq!(next(failed), Step::End(ended));
    }

    #[test]
    fn the_gate_holds_and_lets_go() {
        let gate = Arc::new(Gate::default());
        lock(&gate.crowd).moving = 1;
        let walker = {
            let gate = Arc::clone(&gate);
            std::thread::spawn(move || (gate.pass(), gate.pass()))
        };
        let mut crowd = lock(&gate.crowd);
        while crowd.moving > 0 {
            crowd = gate.changed.wait(crowd).unwrap();
        }
        drop(crowd);
        assert!(gate.is_closed() && !walker.is_finished());
        gate.wish(Wish::Run);
        assert_eq!(walker.join().unwrap(), (true, true));
        gate.wish(Wish::Leave);
        assert!(!gate.pass());
    }
}
