//! A rehearsal: a guest that is to be copied starts a container before it is saved, and sees it
//! end. What a first container costs a guest — caches that are filled, code that is patched, page
//! tables that are made — is in the template then, and no copy does or writes it again.
//!
//! Owns that container: a root in a tmpfs that has no place in any tree, so that it is gone with
//! its last descriptor. Refuses to leave anything of it in the guest; the identity that the guest
//! had meanwhile is replaced by each copy's own.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::time::Duration;

use hull_proto::{ContainerStart, ExitStatus, FrameError, OciJson};
use hull_vmm::virtio::fs::KnownBy;
use rustix::fs::{Mode, OFlags, mkdirat, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
    fsopen,
};

use crate::plan::{self, IDENTITY_NAME, PlanError, PlannedVm, ROOT_NAME};
use crate::rootfs::SharedDirectory;

use super::boot::{self, Agent, BootError, Furniture};
use super::guest::Guest;

/// The container's program, below its root.
const PROGRAM: &str = "program";
/// Its name in the guest, and its guest's.
const NAME: &str = "rehearsal";

/// A rehearsal that failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RehearsalError {
    /// Its root can't be made.
    #[error("cannot make a root in memory")]
    Stage(#[from] io::Error),
    /// It can't be planned: a bug.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The guest failed.
    #[error(transparent)]
    Guest(#[from] BootError),
    /// The program did something else.
    #[error("its program ended with {0:?}")]
    Ended(ExitStatus),
}

/// The shares of the rehearsal, as a container has them; to `ours_alone` nobody else writes.
pub(super) fn shares(ours_alone: bool) -> Result<Vec<SharedDirectory>, RehearsalError> {
    let stage = memory()?;
    let shared = |name: &str| -> io::Result<SharedDirectory> {
        mkdirat(&stage, name, Mode::from_raw_mode(0o755))?;
        let flags = OFlags::DIRECTORY | OFlags::PATH | OFlags::CLOEXEC;
        Ok(SharedDirectory {
            name: name.to_owned(),
            directory: openat(&stage, name, flags, Mode::empty())?,
            read_only: false,
            exclusive: ours_alone,
            known_by: KnownBy::Content,
        })
    };
    let (root, identity) = (shared(ROOT_NAME)?, shared(IDENTITY_NAME)?);
    write(&root, PROGRAM, &program())?;
    for file in ["hostname", "hosts", "resolv.conf"] {
        write(&identity, file, b"rehearsal\n")?;
    }
    Ok(vec![root, identity])
}

/// A tmpfs that is mounted nowhere.
fn memory() -> io::Result<OwnedFd> {
    let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&new, "size", "1m")?;
    fsconfig_create(&new)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
    Ok(fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

fn write(share: &SharedDirectory, name: &str, content: &[u8]) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(0o755);
    File::from(openat(&share.directory, name, flags, mode)?).write_all(content)
}

/// Has the guest run the container to its end.
pub(super) fn run(
    guest: &dyn Guest,
    agent: &mut Agent,
    vm: &PlannedVm,
    limit: Duration,
) -> Result<(), RehearsalError> {
    let furniture = Furniture {
        hostname: NAME,
        interfaces: &[],
        layers: vm.scratch.as_ref().map(|_| ROOT_NAME),
        shared_memory: false,
    };
    agent.setup(guest, furniture, limit)?;
    let spec = plan::rehearsal(&format!("/{PROGRAM}"), vm.scratch.is_some())?;
    let start = ContainerStart {
        id: NAME.to_owned(),
        spec: OciJson::write(&spec)
            .map_err(FrameError::from)
            .map_err(BootError::from)?,
        init: false,
        hold: false,
    };
    let started = boot::start_container(guest, start, limit)?;
    match boot::finish(guest, started, limit)? {
        ExitStatus::Exited(0) => Ok(()),
        other => Err(RehearsalError::Ended(other)),
    }
}

/// A program in one page: an ELF header and one segment (elf(5)), which writes a line and exits.
fn program() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    const CODE: &[u8] = &[
        0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
        0xbf, 1, 0, 0, 0, // mov edi, 1
        0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip + 16]: behind the code
        0xba, 5, 0, 0, 0, // mov edx, 5
        0x0f, 0x05, // syscall
        0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
        0x31, 0xff, // xor edi, edi
        0x0f, 0x05, // syscall
    ];
    const LINE: &[u8] = b"hull\n";
    let size = HEADERS + (CODE.len() + LINE.len()) as u64;
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // An executable for x86-64.
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    // Where it begins, where its segments are told, no sections; flags.
    for word in [BASE + HEADERS, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend([0; 4]);
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    // One to be loaded, read and executed: all of the file.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    for word in [0, BASE, BASE, size, size, 4096] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(CODE);
    elf.extend(LINE);
    elf
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_program_says_its_line_and_ends_well() {
        let directory = tempfile::tempdir().unwrap();
        let (written, path) = (
            directory.path().join("written"),
            directory.path().join(PROGRAM),
        );
        std::fs::write(&written, program()).unwrap();
        // By another process: a child that another test forks has whatever this one has open for
        // writing, and nobody can execute that (execve(2), `ETXTBSY`).
        let mut install = Command::new("install");
        let installed = install.args(["-m", "755"]).args([&written, &path]).status();
        assert!(installed.unwrap().success());
        let output = Command::new(&path).output().unwrap();
        assert_eq!(output.stdout, b"hull\n");
        assert!(output.status.success());
    }
}
