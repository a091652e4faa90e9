//! System calls that `rustix` has no safe form of.
//!
//! Owns: every `unsafe` operation of the agent, and the program's entry. Refuses: policy; each
//! function is one call with its arguments checked by type.
#![expect(
    unsafe_code,
    reason = "clone3, execve, mount_setattr, seccomp and the vsock addresses have no safe wrapper"
)]

use std::ffi::{CStr, CString, c_char, c_int, c_long, c_uint};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::{io, ptr};

use rustix::process::Pid;
use rustix::thread::UnshareFlags;

/// The program's entry. It stands in for the standard library's, which aborts when descriptors 0
/// to 2 are closed and there is no /dev/null yet: the state that PID 1 is born in.
#[cfg(not(test))]
#[unsafe(no_mangle)]
extern "C" fn main(_count: c_int, _arguments: *const *const c_char) -> c_int {
    crate::start()
}

fn check(result: c_long) -> io::Result<c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn own(fd: c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just returned this descriptor to the caller, which owns it alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// `CLONE_INTO_CGROUP` of clone(2).
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Which side of a [`fork`] one is on.
#[derive(Debug)]
pub(crate) enum Forked {
    /// The new process.
    Child,
    /// The old process, with the new one's id and a descriptor for it.
    Parent(Pid, OwnedFd),
}

/// `clone3(2)` without shared memory: a fork, into new namespaces (`CLONE_NEW*` in `namespaces`)
/// and into the cgroup whose directory is given.
///
/// # Errors
/// As clone3(2) has them.
pub(crate) fn fork(namespaces: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Forked> {
    let mut pidfd: c_int = -1;
    let into = cgroup.map_or(0, |_| CLONE_INTO_CGROUP);
    let arguments = libc::clone_args {
        flags: namespaces | libc::CLONE_PIDFD as u64 | into,
        pidfd: (&raw mut pidfd).addr() as u64,
        child_tid: 0,
        parent_tid: 0,
        exit_signal: libc::SIGCHLD as u64,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: cgroup.map_or(0, |dir| dir.as_raw_fd() as u64),
    };
    (&raw mut pidfd).expose_provenance();
    // SAFETY: without CLONE_VM the child runs on its own copy of this one thread's memory, and
    // the agent never has a second thread whose locks could be copied while held. The structure
    // and the place for the descriptor outlive the call.
    let pid = check(unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw const arguments,
            size_of::<libc::clone_args>(),
        )
    })?;
    match Pid::from_raw(pid as i32) {
        None => Ok(Forked::Child),
        Some(pid) => Ok(Forked::Parent(pid, own(pidfd)?)),
    }
}

/// `unshare(2)`.
///
/// # Errors
/// As unshare(2) has them.
pub(crate) fn unshare(flags: UnshareFlags) -> io::Result<()> {
    // SAFETY: the agent has one thread; descriptors are not what is unshared.
    unsafe { rustix::thread::unshare_unsafe(flags) }?;
    Ok(())
}

/// Ends this process at once: no destructors, no buffers flushed. For forked children, whose
/// memory is a copy of the agent's.
pub(crate) fn leave(code: i32) -> ! {
    // SAFETY: _exit takes any code and has no preconditions.
    unsafe { libc::_exit(code) }
}

/// `execve(2)`: returns only with its error.
pub(crate) fn execute(path: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let pointers = |strings: &[CString]| -> Vec<*const c_char> {
        let all = strings.iter().map(|string| string.as_ptr());
        all.chain([ptr::null()]).collect()
    };
    let arguments = pointers(arguments);
    let environment = pointers(environment);
    // SAFETY: both arrays end with a null pointer and, with the strings, outlive the call.
    unsafe { libc::execve(path.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Blocks every signal and returns a descriptor that reports SIGCHLD.
///
/// # Errors
/// As signalfd(2) has them.
pub(crate) fn child_signals() -> io::Result<OwnedFd> {
    set_mask(!0)?;
    let mask: u64 = 1 << (libc::SIGCHLD - 1);
    // SAFETY: the kernel reads the eight bytes of the mask, which outlive the call.
    let fd = check(unsafe {
        libc::syscall(
            libc::SYS_signalfd4,
            -1,
            &raw const mask,
            size_of::<u64>(),
            libc::SFD_CLOEXEC | libc::SFD_NONBLOCK,
        )
    })?;
    own(fd as c_int)
}

/// Has every signal do what it does by default: who started this process may have had some
/// ignored, which `execve` keeps.
pub(crate) fn default_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler of anybody's is replaced by one: SIG_DFL is none. Those that can't be
        // changed are refused.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Sets the mask of blocked signals, bit n - 1 for signal n.
///
/// # Errors
/// None that a correct call can have.
pub(crate) fn set_mask(mask: u64) -> io::Result<()> {
    // SAFETY: the kernel reads the eight bytes of the mask, which outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const mask,
            ptr::null_mut::<u64>(),
            size_of::<u64>(),
        )
    })?;
    Ok(())
}

/// Waits for any signal; all must be blocked. Returns its number.
///
/// # Errors
/// EINTR after a stop.
pub(crate) fn wait_signal() -> io::Result<i32> {
    let mask: u64 = !0;
    // SAFETY: the kernel reads the eight bytes of the mask; no information or timeout is asked.
    let signal = check(unsafe {
        libc::syscall(
            libc::SYS_rt_sigtimedwait,
            &raw const mask,
            ptr::null_mut::<libc::siginfo_t>(),
            ptr::null::<libc::timespec>(),
            size_of::<u64>(),
        )
    })?;
    Ok(signal as i32)
}

/// `kill(2)` with any signal number, real-time ones too. A `pid` of -1 means every process.
///
/// # Errors
/// ESRCH if there is none, EINVAL for a signal that doesn't exist.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: no memory is passed.
    check(c_long::from(unsafe { libc::kill(pid, signal) }))?;
    Ok(())
}

/// The words of `mount_setattr(2)`: attributes to set and to clear, and the propagation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct MountAttributes {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub(crate) clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED`, `MS_UNBINDABLE` or 0.
    pub(crate) propagation: u64,
}

/// `mount_setattr(2)` on the mount that `mount` is open on.
///
/// # Errors
/// As mount_setattr(2) has them.
pub(crate) fn set_mount_attributes(
    mount: BorrowedFd<'_>,
    attributes: MountAttributes,
    recursive: bool,
) -> io::Result<()> {
    let attr: [u64; 4] = [attributes.set, attributes.clear, attributes.propagation, 0];
    let recursive = if recursive { libc::AT_RECURSIVE } else { 0 };
    let flags = libc::AT_EMPTY_PATH | recursive;
    // SAFETY: the path is a constant string; `struct mount_attr` is these four 64-bit words,
    // which outlive the call.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of_val(&attr),
        )
    })?;
    Ok(())
}

/// Closes every descriptor from 3 up but those in `keep`.
///
/// # Errors
/// None that a correct call can have.
pub(crate) fn close_all_but(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut keep: Vec<c_uint> = keep
        .iter()
        .filter_map(|fd| c_uint::try_from(fd.as_raw_fd()).ok())
        .collect();
    keep.sort_unstable();
    let mut first: c_uint = 3;
    for fd in keep {
        if fd > first {
            close_range(first, fd - 1, 0)?;
        }
        first = first.max(fd.saturating_add(1));
    }
    close_range(first, c_uint::MAX, 0)
}

/// Marks every descriptor from 3 up to be closed by `execve`.
///
/// # Errors
/// None that a correct call can have.
pub(crate) fn close_all_on_exec() -> io::Result<()> {
    close_range(3, c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as c_int)
}

fn close_range(first: c_uint, last: c_uint, flags: c_int) -> io::Result<()> {
    // SAFETY: only forked children call this, and none of them drops or uses the closed
    // descriptors again: they end in execve, the minimal init or _exit.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) })?;
    Ok(())
}

/// Takes an inherited descriptor by its number.
///
/// # Errors
/// EBADF if it isn't open.
pub(crate) fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD takes no memory.
    check(c_long::from(unsafe {
        libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC)
    }))?;
    own(number)
}

/// Whether descriptor `number` is open.
pub(crate) fn is_open(number: i32) -> bool {
    // SAFETY: F_GETFD takes no memory.
    unsafe { libc::fcntl(number, libc::F_GETFD) >= 0 }
}

/// Makes `fd` also be descriptor `number` (0, 1 or 2), not closed by `execve`.
///
/// # Errors
/// As dup2(2) has them.
pub(crate) fn place(fd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: the numbers 0 to 2 are the standard streams, which no `OwnedFd` holds.
    check(c_long::from(unsafe { libc::dup2(fd.as_raw_fd(), number) }))?;
    Ok(())
}

/// Has the kernel hold the first 2 MiB of a file of a tmpfs in one piece (madvise(2),
/// `MADV_COLLAPSE`, Linux 6.1). Its contents stay what they are.
///
/// # Errors
/// As mmap(2) and madvise(2) have them.
pub(crate) fn hold_in_one_piece(file: BorrowedFd<'_>) -> io::Result<()> {
    const PIECE: usize = 2 << 20;
    let map = |at: *mut libc::c_void, length, access, flags, fd, offset| {
        // SAFETY: a new mapping, or one in the middle of a new one, that nothing refers to.
        match unsafe { libc::mmap(at, length, access, flags, fd, offset) } {
            libc::MAP_FAILED => Err(io::Error::last_os_error()),
            place => Ok(place),
        }
    };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    let space = map(ptr::null_mut(), 2 * PIECE, libc::PROT_NONE, flags, -1, 0)?;
    let begin = space.map_addr(|address| address.next_multiple_of(PIECE));
    let flags = libc::MAP_PRIVATE | libc::MAP_FIXED;
    let access = libc::PROT_READ | libc::PROT_EXEC;
    let done = map(begin, PIECE, access, flags, file.as_raw_fd(), 0).and_then(|mapped| {
        // SAFETY: the range is that mapping, which nothing refers to.
        check(c_long::from(unsafe {
            libc::madvise(mapped, PIECE, libc::MADV_COLLAPSE)
        }))
    });
    // SAFETY: nothing refers to the space.
    check(c_long::from(unsafe { libc::munmap(space, 2 * PIECE) }))?;
    done.map(drop)
}

/// Installs a seccomp filter; `flags` are `SECCOMP_FILTER_FLAG_*`.
///
/// # Errors
/// EACCES without CAP_SYS_ADMIN or no_new_privs, EINVAL for a bad program.
pub(crate) fn install_filter(program: &[libc::sock_filter], flags: u64) -> io::Result<()> {
    let too_long = |_| io::Error::from_raw_os_error(libc::E2BIG);
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).map_err(too_long)?,
        filter: program.as_ptr().cast_mut(),
    };
    // SAFETY: the kernel copies `len` instructions from a slice of that length and writes none.
    check(unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags,
            &raw const program,
        )
    })?;
    Ok(())
}

fn vsock_address(cid: u32, port: u32) -> libc::sockaddr_vm {
    libc::sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

fn vsock_socket() -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    own(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) })
}

const VSOCK_ADDRESS_LENGTH: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

/// Listens on a vsock port of this guest.
///
/// # Errors
/// As bind(2) and listen(2) have them.
pub(crate) fn vsock_listen(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_ANY, port);
    // SAFETY: the address is of the family and length stated and outlives the call.
    check(c_long::from(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            VSOCK_ADDRESS_LENGTH,
        )
    }))?;
    rustix::net::listen(&socket, 128)?;
    Ok(socket)
}

/// Connects to a vsock port of the host.
///
/// # Errors
/// As connect(2) has them.
pub(crate) fn vsock_dial_host(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock_socket()?;
    let address = vsock_address(libc::VMADDR_CID_HOST, port);
    // SAFETY: the address is of the family and length stated and outlives the call.
    check(c_long::from(unsafe {
        libc::connect(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            VSOCK_ADDRESS_LENGTH,
        )
    }))?;
    Ok(socket)
}

/// Credits 32 bytes to the kernel's generator and re-seeds it (random(4)).
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN.
pub(crate) fn add_entropy(random: BorrowedFd<'_>, bytes: &[u8; 32]) -> io::Result<()> {
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: c_int,
        size_bytes: c_int,
        bytes: [u8; 32],
    }
    let info = PoolInfo {
        entropy_bits: 256,
        size_bytes: 32,
        bytes: *bytes,
    };
    let fd = random.as_raw_fd();
    // SAFETY: the structure is `struct rand_pool_info` with 32 bytes behind it, as it says.
    check(c_long::from(unsafe {
        libc::ioctl(fd, RNDADDENTROPY as _, &raw const info)
    }))?;
    // SAFETY: RNDRESEEDCRNG takes no memory.
    check(c_long::from(unsafe { libc::ioctl(fd, RNDRESEEDCRNG as _) }))?;
    Ok(())
}

/// Has the file system that `file` lies on written out, and nothing more written to it (`FIFREEZE`).
///
/// # Errors
/// As ioctl_fsfreeze has them: EBUSY if that was done before, EIO if the disk refused.
pub(crate) fn freeze(file: BorrowedFd<'_>) -> io::Result<()> {
    const FIFREEZE: libc::c_ulong = 0xc004_5877;
    // SAFETY: FIFREEZE takes no memory.
    check(c_long::from(unsafe {
        libc::ioctl(file.as_raw_fd(), FIFREEZE as _)
    }))?;
    Ok(())
}

/// The processor's time stamp counter.
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: it only reads a register, which every x86-64 processor has and the kernel leaves to
    // all.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Brings the loopback interface of this network namespace up (netdevice(7)).
///
/// # Errors
/// As netdevice(7) has them.
pub(crate) fn loopback_up() -> io::Result<()> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut request = libc::ifreq {
        ifr_name: [0; libc::IFNAMSIZ],
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_flags: (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short,
        },
    };
    for (place, byte) in request.ifr_name.iter_mut().zip(b"lo") {
        *place = *byte as c_char;
    }
    // SAFETY: SIOCSIFFLAGS reads one `struct ifreq`, which outlives the call.
    check(c_long::from(unsafe {
        libc::ioctl(
            socket.as_fd().as_raw_fd(),
            libc::SIOCSIFFLAGS,
            &raw const request,
        )
    }))?;
    Ok(())
}
