//! What a template must share with a start to serve it, to the last bit.
//!
//! Owns: the key, and the name made of it. Refuses: to read a kernel. A file is known by its path,
//! inode, size and times: the change time can't be set back without setting the host's clock
//! back, so whatever writes to a kernel or replaces it makes another key.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hull_vmm::kvm::{self, KvmError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::network::Cards;
use crate::plan::PlannedVm;

/// Version of all that a template holds, whatever else is equal.
const EPOCH: u32 = 6;

/// The running program, whose devices the template's guest knows.
const OWN_PROGRAM: &str = "/proc/self/exe";

/// A key that can't be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyError {
    /// A file of Hull's can't be looked at.
    #[error("cannot look at \"{path}\"")]
    File { path: PathBuf, source: io::Error },
    /// The hypervisor doesn't describe its processor.
    #[error("cannot tell what processor guests see")]
    Processor(#[from] KvmError),
}

/// Everything that shapes a VM up to its idle agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Key {
    epoch: u32,
    /// The host kernel's release and build.
    pub(super) host: String,
    /// What guests see of the host's processor.
    processor: u64,
    monitor: FileIdentity,
    kernel: FileIdentity,
    initrd: FileIdentity,
    cmdline: String,
    pub(super) vcpus: u8,
    /// Network cards: each stands among the devices.
    pub(crate) cards: u8,
    /// They are for what comes when it runs, if it does: no driver has them.
    pub(crate) cards_wait: bool,
    /// The size of its disk; none if it has no disk.
    pub(super) scratch_bytes: u64,
    /// Its guest has the disk mounted, with nothing on it, and laid over the shares: for a
    /// container's first start.
    pub(crate) has_scratch_open: bool,
    /// Its guest has shares mounted to which nobody else writes.
    pub(crate) ours_alone: bool,
    pub(super) memory_bytes: u64,
    window_bytes: u64,
    /// What its memory device has room for.
    growth_bytes: u64,
}

/// What of a start shapes its guest, beside its VM.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) cards: Cards,
    /// Its disk has nothing on it yet.
    pub(crate) is_first: bool,
    /// Nobody else writes to what its guest is shown: other terms are agreed on then.
    pub(crate) ours_alone: bool,
}

/// What a guest stands on that was saved while it ran: all else it has with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Ground {
    epoch: u32,
    host: String,
    processor: u64,
}

impl Ground {
    /// This host's, for a guest with so many processors.
    pub(crate) fn of(vcpus: u8, kvm: BorrowedFd<'_>) -> Result<Self, KeyError> {
        Ok(Self {
            epoch: EPOCH,
            host: host(),
            processor: kvm::processor(kvm, vcpus)?,
        })
    }

    /// Reads what [`Ground::of`] was made to.
    pub(crate) fn read(value: &Value) -> Result<Self, serde_json::Error> {
        Self::deserialize(value)
    }

    /// What this host hasn't in common with the one that a guest was saved on.
    pub(crate) fn differs(&self, saved: &Self) -> Option<String> {
        let (here, there) = (&self.host, &saved.host);
        if self.epoch != saved.epoch {
            let (here, there) = (self.epoch, saved.epoch);
            return Some(format!("it is of format {there}, this Hull reads {here}"));
        }
        if here != there {
            return Some(format!(
                "it was made on a host with kernel \"{there}\", this one has \"{here}\""
            ));
        }
        (self.processor != saved.processor).then(|| {
            "it was made on a host whose processor, or its features, are others".to_owned()
        })
    }
}

/// A file as it was at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FileIdentity {
    path: PathBuf,
    inode: u64,
    size_bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl FileIdentity {
    fn of(path: &Path) -> Result<Self, KeyError> {
        let metadata = fs::metadata(path).map_err(|source| KeyError::File {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            path: path.to_owned(),
            inode: metadata.ino(),
            size_bytes: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl Key {
    /// The key of a start of a VM on this host, as it is now.
    pub(crate) fn of(vm: &PlannedVm, start: Start, kvm: BorrowedFd<'_>) -> Result<Self, KeyError> {
        Ok(Self {
            epoch: EPOCH,
            host: host(),
            processor: kvm::processor(kvm, vm.vcpus)?,
            monitor: FileIdentity::of(Path::new(OWN_PROGRAM))?,
            kernel: FileIdentity::of(&vm.kernel)?,
            initrd: FileIdentity::of(&vm.initrd)?,
            cmdline: vm.cmdline.clone(),
            vcpus: vm.vcpus,
            cards: start.cards.count,
            cards_wait: start.cards.wait,
            scratch_bytes: vm.scratch.as_ref().map_or(0, |scratch| scratch.bytes),
            has_scratch_open: start.is_first && vm.scratch.is_some(),
            ours_alone: start.ours_alone,
            memory_bytes: vm.memory_bytes,
            window_bytes: vm.window_bytes,
            growth_bytes: vm.growth_bytes,
        })
    }

    /// The template's file name: 16 hexadecimal digits. Who finds it compares the whole key.
    pub(crate) fn name(&self) -> String {
        let mut hasher = DefaultHasher::new();
        (self.epoch, &self.host, self.processor).hash(&mut hasher);
        for file in [&self.monitor, &self.kernel, &self.initrd] {
            (&file.path, file.inode, file.size_bytes).hash(&mut hasher);
            (file.modified, file.changed).hash(&mut hasher);
        }
        (&self.cmdline, self.vcpus, self.cards, self.cards_wait).hash(&mut hasher);
        (self.scratch_bytes, self.has_scratch_open, self.ours_alone).hash(&mut hasher);
        (self.memory_bytes, self.window_bytes, self.growth_bytes).hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }
}

/// Whether this is a name as [`Key::name`] makes them.
pub(crate) fn is_name(text: &str) -> bool {
    text.len() == 16
        && text
            .bytes()
            .all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The running kernel, as one line.
pub(super) fn host() -> String {
    let host = rustix::system::uname();
    format!(
        "{} {}",
        host.release().to_string_lossy(),
        host.version().to_string_lossy()
    )
}

#[cfg(test)]
pub(super) fn sample(memory_bytes: u64) -> Key {
    let file = FileIdentity::of(Path::new(OWN_PROGRAM)).unwrap();
    Key {
        epoch: EPOCH,
        host: host(),
        processor: 7,
        monitor: file.clone(),
        kernel: file.clone(),
        initrd: file,
        cmdline: "quiet".to_owned(),
        vcpus: 1,
        cards: 0,
        cards_wait: false,
        scratch_bytes: 0,
        has_scratch_open: false,
        ours_alone: false,
        memory_bytes,
        window_bytes: 0,
        growth_bytes: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_shapes_a_guest_makes_another_name() {
        let key = sample(64 << 20);
        assert!(is_name(&key.name()));
        assert_eq!(key.name(), key.clone().name());
        let changes: [fn(&mut Key); 14] = [
            |key| key.epoch += 1,
            |key| key.host.push('x'),
            |key| key.processor += 1,
            |key| key.kernel.changed.1 += 1,
            |key| key.initrd.inode += 1,
            |key| key.cmdline.clear(),
            |key| key.vcpus += 1,
            |key| key.cards += 1,
            |key| key.cards_wait = true,
            |key| key.scratch_bytes += 1,
            |key| key.has_scratch_open = true,
            |key| key.ours_alone = true,
            |key| key.window_bytes += 1,
            |key| key.growth_bytes += 1,
        ];
        for change in changes {
            let mut other = key.clone();
            change(&mut other);
            assert_ne!(other.name(), key.name());
            assert_ne!(other, key);
        }
    }

    #[test]
    fn what_another_host_lacks_is_named() {
        let ground = || Ground {
            epoch: EPOCH,
            host: host(),
            processor: 7,
        };
        let here = ground();
        assert_eq!(here.differs(&ground()), None);
        type Change = (fn(&mut Ground), &'static str);
        let changes: [Change; 3] = [
            (|ground| ground.epoch += 1, "of format"),
            (|ground| ground.host = "5.10 #1".to_owned(), "\"5.10 #1\""),
            (|ground| ground.processor += 1, "whose processor"),
        ];
        for (change, word) in changes {
            let mut there = ground();
            change(&mut there);
            let said = here.differs(&there).unwrap();
            assert!(said.contains(word), "{said}");
        }
        let told = serde_json::to_value(&here).unwrap();
        assert_eq!(Ground::read(&told).unwrap(), here);
        assert!(Ground::read(&Value::Null).is_err());
    }

    #[test]
    fn a_file_that_is_written_to_is_another() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kernel");
        fs::write(&path, "one").unwrap();
        let before = FileIdentity::of(&path).unwrap();
        assert_eq!(FileIdentity::of(&path).unwrap(), before);
        fs::rename(&path, directory.path().join("old")).unwrap();
        fs::write(&path, "two").unwrap();
        assert_ne!(FileIdentity::of(&path).unwrap(), before);
    }
}
