//! Raw calls: starting the monitor with inherited descriptors, finding them there, a private
//! mount namespace. The only room of this crate with `unsafe`.

#![expect(
    unsafe_code,
    reason = "descriptors by number, code between fork and exec, unshare(2)"
)]

mod tap;

use std::arch::x86_64::__cpuid;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use rustix::mount::{MountPropagationFlags, mount_change};
use rustix::thread::{UnshareFlags, unshare_unsafe};

pub(crate) use tap::{is_network_namespace, make_tap, open_tap, plug, set_offloads};

/// The first inherited descriptor, as systemd counts them.
const FIRST: RawFd = 3;
/// Below this, no descriptor that is about to be handed on may lie.
const ABOVE: RawFd = 16;

/// Starts `command` in a session of its own with `descriptors` at 3, 4, 5… and nothing else
/// but its standard streams.
///
/// # Errors
/// If there are no more descriptors or processes, or the command can't be executed.
pub fn spawn_in_session(
    command: &mut Command,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<Child> {
    let high = descriptors
        .iter()
        .map(|descriptor| rustix::io::fcntl_dupfd_cloexec(descriptor, ABOVE))
        .collect::<rustix::io::Result<Vec<OwnedFd>>>()?;
    let raw: Vec<RawFd> = high.iter().map(AsRawFd::as_raw_fd).collect();
    let prepare = move || {
        let mut target = FIRST;
        for &descriptor in &raw {
            duplicate(descriptor, target)?;
            target += 1;
        }
        close_on_exec_from(target)?;
        rustix::process::setsid()?;
        Ok(())
    };
    // SAFETY: `prepare` runs between fork and exec and makes only system calls that are
    // async-signal-safe (dup2, close_range, setsid); it allocates nothing.
    let command = unsafe { command.pre_exec(prepare) };
    let child = command.spawn();
    drop(high);
    child
}

fn duplicate(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: dup2 touches no memory; `to` is below ABOVE, where this child keeps nothing but
    // what it will hand on.
    let result = unsafe { libc::dup2(from, to) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Whatever else this process inherited without the flag must not reach the monitor.
fn close_on_exec_from(first: RawFd) -> io::Result<()> {
    let first = first.unsigned_abs();
    let flags = libc::CLOSE_RANGE_CLOEXEC.cast_signed();
    // SAFETY: close_range with this flag closes nothing now and touches no memory.
    let result = unsafe { libc::close_range(first, u32::MAX, flags) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Takes the descriptors that [`spawn_in_session`] handed on. To be called once, before any other
/// descriptor is opened.
pub(crate) fn inherited(count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut descriptors = Vec::new();
    for number in (FIRST..).take(count) {
        // SAFETY: `number` is one of the first descriptors after the standard ones; whoever
        // calls is the first code of this process, so nothing owns it yet; if it isn't open,
        // the next line finds out.
        let descriptor = unsafe { BorrowedFd::borrow_raw(number) };
        rustix::io::fcntl_setfd(descriptor, rustix::io::FdFlags::CLOEXEC)?;
        // SAFETY: it is open, as the line above has just seen, and nothing else owns it.
        descriptors.push(unsafe { OwnedFd::from_raw_fd(number) });
    }
    Ok(descriptors)
}

/// Moves this process, still of one thread, into namespaces of its own.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    assert!(
        !flags.contains(UnshareFlags::FILES),
        "descriptor tables stay shared"
    );
    // SAFETY: only `UnshareFlags::FILES` has conditions, and it isn't among the flags.
    unsafe { unshare_unsafe(flags) }?;
    Ok(())
}

/// Gives this process mounts of its own, which end with it and which no one else sees.
pub(crate) fn private_mounts() -> io::Result<()> {
    unshare(UnshareFlags::NEWNS)?;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private)?;
    Ok(())
}

/// Blocks the signals by which a terminal says that it has a new size or is gone, in this thread
/// and those it makes, and returns where they can be read (signalfd(2)).
pub(crate) fn window_signals() -> io::Result<OwnedFd> {
    let mut set = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: sigemptyset writes the whole set and nothing else.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    for signal in [libc::SIGWINCH, libc::SIGHUP] {
        // SAFETY: the set was initialized by the call above.
        unsafe { libc::sigaddset(set.as_mut_ptr(), signal) };
    }
    // SAFETY: the set is initialized; the old mask is not asked for.
    let blocked =
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut()) };
    if blocked != 0 {
        return Err(io::Error::from_raw_os_error(blocked));
    }
    // SAFETY: the set is initialized; -1 asks for a new descriptor.
    let descriptor = unsafe { libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC) };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is fresh and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}

/// Whether this processor can run a guest's kernel itself (Intel SDM, CPUID leaf 1; AMD APM,
/// leaf 0x8000_0001).
pub(crate) fn has_virtualization() -> bool {
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let intel = __cpuid(1).ecx & VMX != 0;
    let amd = __cpuid(0x8000_0000).eax > 0x8000_0000 && __cpuid(0x8000_0001).ecx & SVM != 0;
    intel || amd
}

/// The path by which this process names an open descriptor.
pub(crate) fn descriptor_path(descriptor: impl AsFd) -> String {
    format!("/proc/self/fd/{}", descriptor.as_fd().as_raw_fd())
}

/// The host's `CLOCK_MONOTONIC` (clock_gettime(2)), in nanoseconds.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or_default();
    seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or_default()
}
