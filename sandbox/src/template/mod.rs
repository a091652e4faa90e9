//! Templates: booted, still empty guests on disk, that starts are copied from.
//!
//! ```text
//! STATE/templates/           its flock: whoever makes a template holds it
//!   0123456789abcdef         one template, named by its key; see `file`
//!   0123456789abcdef.pages   which of its pages a start needs; see `pages`
//!   0123456789abcdef.failed  why none could be made or used; believed for a while
//! ```
//!
//! Owns that directory: finding, making room, publishing whole files only. A template in the
//! making has no name, so one whose maker is killed is gone. Refuses: to know how a VM boots, and
//! anything that isn't of exactly the key that is asked for.

pub(crate) mod file;
mod key;
mod pages;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::PathBuf;
use std::time::Duration;

use hull_vmm::machine::MachineState;
use hull_vmm::memory::{WorkingSet, hold_program};
use jiff::Timestamp;
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::plan::PlannedVm;
use crate::scratch::{Content, Kept};
use crate::settings::Settings;
use crate::sys;

use file::{FileError, Header, Kind, Saved, Stored, WithDisk};
pub(crate) use key::{Ground, Key, KeyError, Start};

/// The directory below the state's.
pub(crate) const DIRECTORY: &str = "templates";
/// How many templates are kept.
const MOST: usize = 8;
/// Bytes that all of them may take on disk.
const MOST_BYTES: u64 = 2 << 30;
/// How long a template that couldn't be made or used isn't tried again.
const FAILURE_HOLDS: Duration = Duration::from_secs(600);
const FAILED: &str = ".failed";
const PAGES: &str = ".pages";

/// A template that can't be had, kept or removed.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// There is none of this name.
    #[error("no such template: {0}")]
    Unknown(String),
    /// One exists and isn't what was made.
    #[error("template \"{path}\" can't be used")]
    Unusable {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The disk refused.
    #[error("cannot {action} \"{path}\"")]
    Disk {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// None could be made.
    #[error("cannot make a template: {0}")]
    Make(String),
}

/// One template, as `ls` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TemplateInfo {
    /// Its name, 16 hexadecimal digits.
    pub name: String,
    /// Processors of its guest.
    pub vcpus: u8,
    /// Network cards of its guest.
    pub cards: u8,
    /// Size of its guest's disk in bytes; 0 if it has none.
    pub scratch_bytes: u64,
    /// Memory of its guest in bytes.
    pub memory_bytes: u64,
    /// Bytes that it takes on disk.
    pub size_bytes: u64,
    /// The guest kernel's release.
    pub kernel: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// When a start last used it.
    pub used_at: Timestamp,
    /// Why no start can use it any more, if none can.
    pub stale: Option<String>,
}

/// A template that was found, ready to be copied.
#[derive(Debug)]
pub(crate) struct Template {
    /// Begins with the memory.
    pub(crate) file: File,
    pub(crate) state: MachineState,
    /// What its guest expects on its disk, if it has that mounted, and where in the file its bytes
    /// begin.
    pub(crate) scratch: Option<(Content, u64)>,
    /// The guest kernel's release.
    pub(crate) kernel: String,
    /// What its starts need, once one has been watched.
    pub(crate) working_set: Option<WorkingSet>,
}

impl Template {
    /// What its guest expects on its disk, if it has that mounted.
    pub(crate) fn scratch(&self) -> Option<Kept<'_>> {
        let (content, offset) = self.scratch.as_ref()?;
        Some(Kept {
            content,
            file: &self.file,
            offset: *offset,
        })
    }
}

/// A guest to be copied, but for its memory and its disk's.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct SavedGuest<M> {
    pub(crate) machine: M,
    /// What it expects on its disk, if it has that mounted.
    pub(crate) scratch: Option<Content>,
}

/// The templates of one state directory.
#[derive(Debug, Clone)]
pub struct Templates {
    directory: PathBuf,
}

/// The sole right to make templates.
#[derive(Debug)]
pub(crate) struct Maker<'a> {
    templates: &'a Templates,
    directory: OwnedFd,
}

impl Templates {
    /// Those of these settings' state. Touches nothing.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self::at(settings.state_dir.join(DIRECTORY))
    }

    pub(crate) fn at(directory: PathBuf) -> Self {
        Self { directory }
    }

    fn disk(
        &self,
        action: &'static str,
        name: &str,
    ) -> impl FnOnce(io::Error) -> TemplateError + use<> {
        let path = self.directory.join(name);
        move |source| TemplateError::Disk {
            action,
            path,
            source,
        }
    }

    /// The template of this key, if there is one.
    ///
    /// # Errors
    /// [`TemplateError::Unusable`] for one that isn't what was made; it is removed by then.
    pub(crate) fn find(&self, key: &Key) -> Result<Option<Template>, TemplateError> {
        let name = key.name();
        let file = match self.open(&name) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(self.disk("open", &name)(error)),
        };
        let unusable = |source: Box<dyn std::error::Error + Send + Sync>| {
            self.discard(&name);
            TemplateError::Unusable {
                path: self.directory.join(&name),
                source,
            }
        };
        let checked = file::read_head(&file, Kind::Template).and_then(|(header, state)| {
            let header: Header<Key> = header;
            if header.key != *key {
                return Err(FileError::Wrong("it was made for something else"));
            }
            let is_new = file::check_memory(&file, &header)?;
            let guest = state.read::<SavedGuest<MachineState>>()?;
            let on_disk = guest.scratch.as_ref().map_or(0, Content::length);
            if header.memory_bytes != stored_bytes(key.memory_bytes, on_disk) {
                return Err(FileError::Wrong("it has another memory or disk"));
            }
            Ok((header.kernel, guest, is_new))
        });
        let (kernel, guest, is_new) = checked.map_err(|error| unusable(error.into()))?;
        let pages = fs::read(self.directory.join(name + PAGES)).ok();
        let working_set = pages.and_then(|bytes| pages::decode(&bytes));
        if is_new {
            hold_programs();
            if let Some(set) = &working_set {
                set.hold(&file);
            }
        }
        Ok(Some(Template {
            file,
            state: guest.machine,
            scratch: guest.scratch.map(|content| (content, key.memory_bytes)),
            kernel,
            working_set,
        }))
    }

    /// Notes what a start from the template of this key needed.
    ///
    /// # Errors
    /// If the disk refuses: then the next start is watched.
    pub(crate) fn learn(&self, key: &Key, mut set: WorkingSet) -> io::Result<()> {
        set.gather(&self.open(&key.name())?);
        let Some(bytes) = pages::encode(&set) else {
            return Ok(());
        };
        let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let mut file = File::from(rustix::fs::open(&self.directory, flags, mode)?);
        file.write_all(&bytes)?;
        let name = self.directory.join(key.name() + PAGES);
        let path = sys::descriptor_path(&file);
        // A start that comes between the two is watched, too.
        let _ = fs::remove_file(&name);
        Ok(linkat(CWD, path, CWD, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Opens one whose access time stays what it was made to be.
    fn open(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOATIME | OFlags::CLOEXEC;
        let file = rustix::fs::open(self.directory.join(name), flags, Mode::empty())?;
        Ok(file.into())
    }

    fn discard(&self, name: &str) {
        // What can't be removed is replaced or refused the next time.
        let _ = fs::remove_file(self.directory.join(name));
        let _ = fs::remove_file(self.directory.join(format!("{name}{PAGES}")));
    }

    /// Forgets a template that was found and didn't work, and doesn't try its like for a while.
    pub(crate) fn give_up(&self, key: &Key, why: &str) {
        let name = key.name();
        self.discard(&name);
        // Nothing but time is lost if this can't be noted.
        let _ = fs::write(self.directory.join(name + FAILED), why);
    }

    /// Whether making or using such a template failed a short while ago.
    pub(crate) fn given_up(&self, key: &Key) -> bool {
        let path = self.directory.join(key.name() + FAILED);
        let age = fs::metadata(path).and_then(|metadata| metadata.modified());
        age.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < FAILURE_HOLDS))
    }

    /// The right to make one; `None` if somebody has it.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn maker(&self) -> Result<Option<Maker<'_>>, TemplateError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.directory)
            .map_err(self.disk("create", ""))?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&self.directory, flags, Mode::empty())
            .map_err(|error| self.disk("open", "")(error.into()))?;
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Maker {
                templates: self,
                directory,
            })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(self.disk("lock", "")(error.into())),
        }
    }

    /// All of them, the one used last first.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub fn list(&self) -> Result<Vec<TemplateInfo>, TemplateError> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(self.disk("read", "")(error)),
        };
        let mut all: Vec<TemplateInfo> = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|name| key::is_name(name))
            .filter_map(|name| self.describe(name).ok())
            .collect();
        all.sort_by_key(|template| Reverse(template.used_at));
        Ok(all)
    }

    fn describe(&self, name: String) -> io::Result<TemplateInfo> {
        let file = self.open(&name)?;
        let metadata = file.metadata()?;
        let time = |seconds, nanoseconds| {
            let nanoseconds = i32::try_from(nanoseconds).unwrap_or_default();
            Timestamp::new(seconds, nanoseconds).unwrap_or_default()
        };
        let head = file::read_head(&file, Kind::Template);
        let header = head.map(|(header, _): (Header<Key>, _)| header);
        let host = key::host();
        let stale = match &header {
            Ok(header) if header.key.host == host => None,
            Ok(_) => Some("the host has another kernel".to_owned()),
            Err(error) => Some(error.to_string()),
        };
        let header = header.ok();
        Ok(TemplateInfo {
            name,
            vcpus: header.as_ref().map_or(0, |header| header.key.vcpus),
            cards: header.as_ref().map_or(0, |header| header.key.cards),
            scratch_bytes: header.as_ref().map_or(0, |header| header.key.scratch_bytes),
            memory_bytes: header.as_ref().map_or(0, |header| header.key.memory_bytes),
            size_bytes: metadata.blocks() * 512,
            kernel: header.map(|header| header.kernel).unwrap_or_default(),
            created_at: time(metadata.mtime(), 0),
            used_at: time(metadata.atime(), metadata.atime_nsec()),
            stale,
        })
    }

    /// Removes one by its name. Guests that were copied from it go on.
    ///
    /// # Errors
    /// [`TemplateError::Unknown`] if there is none.
    pub fn remove(&self, name: &str) -> Result<(), TemplateError> {
        if !key::is_name(name) {
            return Err(TemplateError::Unknown(name.to_owned()));
        }
        for of_it in [FAILED, PAGES] {
            let _ = fs::remove_file(self.directory.join(format!("{name}{of_it}")));
        }
        match fs::remove_file(self.directory.join(name)) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(TemplateError::Unknown(name.to_owned()))
            }
            Err(error) => Err(self.disk("remove", name)(error)),
        }
    }
}

impl Maker<'_> {
    /// A file without a name, to be filled and published.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn fresh_file(&self) -> Result<File, TemplateError> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::openat(&self.directory, ".", flags, mode)
            .map(File::from)
            .map_err(|error| self.templates.disk("create a file in", "")(error.into()))
    }

    /// Fills a file with a guest, whose disk has these bytes, and gives it its name; removes what
    /// is too much by then.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn publish(
        &self,
        key: &Key,
        kernel: &str,
        memory: &File,
        on_disk: &[u8],
        guest: &SavedGuest<&MachineState>,
    ) -> Result<(), TemplateError> {
        let name = key.name();
        let file = self.fresh_file()?;
        let memory_bytes = stored_bytes(key.memory_bytes, on_disk.len() as u64);
        let saved = Saved {
            kind: Kind::Template,
            key,
            kernel,
            memory_bytes,
            state: guest,
        };
        let memory = WithDisk {
            memory: Stored {
                file: memory,
                length: key.memory_bytes,
            },
            on_disk,
        };
        file::write(&file, &saved, &memory).map_err(|source| TemplateError::Unusable {
            path: self.templates.directory.join(&name),
            source: source.into(),
        })?;
        self.templates.discard(&name);
        self.templates.discard(&format!("{name}{FAILED}"));
        let path = sys::descriptor_path(&file);
        linkat(CWD, path, &self.directory, &name, AtFlags::SYMLINK_FOLLOW)
            .map_err(|error| self.templates.disk("create", &name)(error.into()))?;
        hold_programs();
        self.make_room(&name)
    }

    /// Removes those that were used longest ago, and old failures, until the rest is within the
    /// limits.
    fn make_room(&self, newest: &str) -> Result<(), TemplateError> {
        let mut bytes = 0;
        let mut count = 0;
        for template in self.templates.list()? {
            bytes += template.size_bytes;
            count += 1;
            let fits = count <= MOST && bytes <= MOST_BYTES && template.stale.is_none();
            if !fits && template.name != newest {
                self.templates.discard(&template.name);
            }
        }
        Ok(())
    }
}

/// Bytes that a template's file begins with: its guest's memory, and what is on its disk.
fn stored_bytes(memory: u64, on_disk: u64) -> u64 {
    memory + on_disk.next_multiple_of(file::UNIT)
}

/// Has the host hold in huge pages what runs at each start beside the guest: this program, and the
/// one that started it.
fn hold_programs() {
    let starter = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().to_string());
    for process in [Some("self".to_owned()), starter].into_iter().flatten() {
        // One that can't be opened is read as it is.
        if let Ok(program) = File::open(format!("/proc/{process}/exe")) {
            hold_program(&program);
        }
    }
}

/// Where the templates are that a VM of this plan may come from.
pub(crate) fn of(vm: &PlannedVm) -> Option<Templates> {
    vm.templates.clone().map(Templates::at)
}
