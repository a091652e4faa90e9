//! Becoming another guest: one that was saved goes on as several, and each is to be its own.
//!
//! Owns: fresh randomness, the clock, host names, the boot id and the machine id, of the guest and
//! of every container in it, while their processes stand still. Refuses: to change what a program
//! has read already; its environment and its memory are its own.
//!
//! The kernel makes its boot id once, when it is first read. So containers get a file with another
//! one over it, as systemd-nspawn does it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use hull_proto::{Identity, Moment};
use rustix::fs::{Mode, OFlags, ResolveFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{WaitOptions, waitpid};
use rustix::rand::{GetRandomFlags, getrandom};
use rustix::thread::UnshareFlags;
use rustix::time::ClockId;

use crate::container::{Container, Containers};
use crate::fault::{Fault, Tried};
use crate::mounts;
use crate::namespaces;
use crate::resolve;
use crate::sys::{self, Forked};

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
const MACHINE_ID: &str = "/etc/machine-id";
/// Where the ids lie that are put over those; in the guest's own /run, which no container sees.
const IDS: &str = "/run/hull";
/// The largest file in which a host name is replaced, in bytes.
const MAX_FILE: u64 = 1 << 20;

/// Seeds the guest's random generator, sets its clock and its name.
///
/// # Errors
/// What the kernel refuses.
pub(crate) fn be(hostname: &str, moment: Moment, entropy: &[u8; 32]) -> Result<(), Fault> {
    let random = File::options()
        .write(true)
        .open("/dev/urandom")
        .or_internal(|| "cannot open /dev/urandom")?;
    sys::add_entropy(random.as_fd(), entropy).or_internal(|| "cannot seed the random generator")?;
    let now = moment.realtime_at(sys::time_stamp());
    rustix::time::clock_settime(ClockId::Realtime, timespec(now))
        .or_internal(|| "cannot set the clock")?;
    set_hostname(hostname)
}

/// Has the guest and its containers be `identity` from here on.
///
/// # Errors
/// What the kernel refuses; the guest is of no use then.
pub(crate) fn become_another(identity: &Identity, containers: &Containers) -> Result<(), Fault> {
    let before = rustix::system::uname();
    let before = before.nodename().to_string_lossy();
    be(&identity.hostname, identity.moment, &identity.entropy)?;
    for file in &identity.files {
        rename_in(Path::new(file), &before, &identity.hostname)
            .or_internal(|| format!("cannot write the host name to {file}"))?;
    }
    let ids = Ids::make().or_internal(|| "cannot make ids")?;
    for container in containers.each() {
        in_container(container, || ids.show(container, &identity.hostname))?;
    }
    Ok(())
}

fn set_hostname(name: &str) -> Result<(), Fault> {
    rustix::system::sethostname(name.as_bytes())
        .or_refuse(|| format!("cannot set hostname {name:?}"))
}

fn timespec(nanoseconds: u64) -> Timespec {
    const SECOND: u64 = 1_000_000_000;
    Timespec {
        tv_sec: i64::try_from(nanoseconds / SECOND).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(nanoseconds % SECOND).unwrap_or(0),
    }
}

/// Replaces a host name where it stands as a word, if there is such a file.
fn rename_in(path: &Path, before: &str, after: &str) -> io::Result<()> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    // What isn't text holds no name.
    if file.take(MAX_FILE).read_to_string(&mut text).is_err() {
        return Ok(());
    }
    let renamed = renamed(&text, before, after);
    if renamed == text {
        return Ok(());
    }
    fs::write(path, renamed)
}

fn renamed(text: &str, before: &str, after: &str) -> String {
    let words = text.split_inclusive(char::is_whitespace).map(|word| {
        let space = word.strip_prefix(before);
        match space.filter(|space| space.trim().is_empty() && !before.is_empty()) {
            Some(space) => format!("{after}{space}"),
            None => word.to_owned(),
        }
    });
    words.collect()
}

/// Fresh ids, each in a file.
struct Ids {
    machine: String,
    boot_file: OwnedFd,
    machine_file: OwnedFd,
}

impl Ids {
    fn make() -> Result<Self, Errno> {
        // In place: a container that shows such a file already shows what it holds now.
        let file = |name: &str, text: &str| {
            let path = Path::new(IDS).join(name);
            fs::create_dir_all(IDS)
                .and_then(|()| fs::write(&path, text))
                .map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
            let shown = mounts::copy_of(&path, false)?;
            mounts::make_read_only(shown.as_fd(), false)?;
            Ok::<_, Errno>(shown)
        };
        let machine = format!("{}\n", hexadecimal(&random_uuid()));
        Ok(Self {
            boot_file: file("boot_id", &format!("{}\n", dashed(&random_uuid())))?,
            machine_file: file("machine-id", &machine)?,
            machine,
        })
    }

    /// Shows them in the container's namespaces, in which this process is.
    fn show(&self, container: &Container, hostname: &str) -> Result<(), Fault> {
        if container.to_enter() & u64::from(UnshareFlags::NEWUTS.bits()) != 0 {
            set_hostname(hostname)?;
        }
        let what = |path| move || format!("cannot change {path}");
        // A container may have no /proc.
        if let Ok(place) = open(BOOT_ID, OFlags::PATH) {
            put_over(&self.boot_file, &place).or_internal(what(BOOT_ID))?;
        }
        let Some(place) = self.machine_id_to_change() else {
            return Ok(());
        };
        match open(MACHINE_ID, OFlags::WRONLY) {
            Ok(file) => File::from(file)
                .write_all_at(self.machine.as_bytes(), 0)
                .or_internal(what(MACHINE_ID)),
            // A root that is read-only.
            Err(_) => put_over(&self.machine_file, &place).or_internal(what(MACHINE_ID)),
        }
    }

    /// The container's machine id, if it has one (machine-id(5)).
    fn machine_id_to_change(&self) -> Option<OwnedFd> {
        let file = File::from(open(MACHINE_ID, OFlags::RDONLY | OFlags::NONBLOCK).ok()?);
        let mut text = String::new();
        let mut known = file.take(self.machine.len() as u64 + 1);
        known.read_to_string(&mut text).ok()?;
        let is_id = text.trim_end().len() == 32 && text.trim_end().bytes().all(is_digit);
        is_id.then(|| open(MACHINE_ID, OFlags::PATH).ok()).flatten()
    }
}

/// Has `place` show `file`, unless it does.
fn put_over(file: &OwnedFd, place: &OwnedFd) -> Result<(), Errno> {
    let (wanted, shown) = (rustix::fs::fstat(file)?, rustix::fs::fstat(place)?);
    if (wanted.st_dev, wanted.st_ino) == (shown.st_dev, shown.st_ino) {
        return Ok(());
    }
    mounts::attach(file.as_fd(), place.as_fd())
}

fn is_digit(byte: u8) -> bool {
    byte.is_ascii_hexdigit()
}

/// Opens a file of the container, whose namespaces this process is in.
fn open(path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let directory = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", directory, Mode::empty())?;
    let plain = ResolveFlags::empty();
    resolve::open_in(root.as_fd(), Path::new(path), flags, Mode::empty(), plain)
}

/// Does something in a process that is in the container's mount and UTS namespaces.
fn in_container(
    container: &Container,
    work: impl FnOnce() -> Result<(), Fault>,
) -> Result<(), Fault> {
    let (said, saying) = pipe_with(PipeFlags::CLOEXEC).or_internal(|| "cannot make a pipe")?;
    match sys::fork(0, None).or_internal(|| "cannot make a process")? {
        Forked::Child => {
            let wanted = UnshareFlags::NEWNS | UnshareFlags::NEWUTS;
            let flags = container.to_enter() & u64::from(wanted.bits());
            let done = namespaces::enter_all_of(container.pidfd(), flags).and_then(|()| work());
            if let Err(fault) = done {
                let _ = File::from(saying).write_all(fault.to_string().as_bytes());
            }
            sys::leave(0)
        }
        Forked::Parent(pid, _) => {
            drop(saying);
            let mut fault = String::new();
            let heard = File::from(said).read_to_string(&mut fault);
            while let Err(Errno::INTR) = waitpid(Some(pid), WaitOptions::empty()) {}
            heard.or_internal(|| "cannot hear how it went in a container")?;
            match fault.is_empty() {
                true => Ok(()),
                false => Err(Fault::internal(fault)),
            }
        }
    }
}

/// A random UUID (RFC 9562, version 4).
fn random_uuid() -> [u8; 16] {
    let mut uuid = [0; 16];
    // So few bytes are never cut short once the generator is seeded.
    while getrandom(&mut uuid, GetRandomFlags::empty()).is_err() {}
    uuid[6] = uuid[6] & 0x0f | 0x40;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn dashed(uuid: &[u8; 16]) -> String {
    let digits = hexadecimal(uuid);
    let parts = [0..8, 8..12, 12..16, 16..20, 20..32];
    let parts = parts.map(|part| digits.get(part).unwrap_or_default());
    parts.join("-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_reading_keeps_its_nanoseconds() {
        let time = timespec(1_700_000_000_123_456_789);
        assert_eq!((time.tv_sec, time.tv_nsec), (1_700_000_000, 123_456_789));
    }

    #[test]
    fn a_name_is_replaced_where_it_is_a_word() {
        let hosts = "127.0.1.1\tabc  abcd.abc abc\n::1 abc\n";
        assert_eq!(
            renamed(hosts, "abc", "new"),
            "127.0.1.1\tnew  abcd.abc new\n::1 new\n"
        );
        assert_eq!(renamed("abc", "abc", "new"), "new");
        assert_eq!(renamed("a b", "", "new"), "a b");
    }

    #[test]
    fn a_uuid_has_its_form() {
        let uuid = dashed(&random_uuid());
        let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert_eq!(parts, [8, 4, 4, 4, 12]);
        assert_eq!(uuid.get(14..15), Some("4"));
        assert_ne!(uuid, dashed(&random_uuid()));
    }
}
