//! The host's record of containers: directories, names, the lock that says who lives.
//!
//! ```text
//! STATE/containers/            its own flock guards every change of names and membership
//!   ID/plan.json               written once
//!   ID/limits.json             limits that were changed since, by whoever asked for them
//!   ID/lock                    flocked by the monitor: held = it lives; its text is its pid
//!   ID/state.json exit.json    written by the monitor alone
//!   ID/passing                 it is to leave nothing, so whoever finds it dead removes it
//!   .ID.new .ID.gone           half made, half removed: anybody may clear them under the lock
//! STATE/names/NAME             symlink to ID
//! RUN/ID/control.sock          the monitor's control socket
//! ```
//!
//! Owns that layout. Refuses to judge what a container does.

mod files;
pub(crate) mod lock;
#[cfg(test)]
mod tests;

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::names;
use crate::plan::{Limits, Plan, Update};
use crate::settings::Settings;
use crate::state::{ExitRecord, Running};

use files::{directory_names, make_directory, private_file, read, remove_tree, write_atomically};
use lock::try_lock;

const PLAN: &str = "plan.json";
const LOCK: &str = "lock";
const STATE: &str = "state.json";
const EXIT: &str = "exit.json";
pub(crate) const LIMITS: &str = "limits.json";
const PASSING: &str = "passing";

/// What the store could not do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No container has this name or id.
    #[error("No such container: {0}")]
    NotFound(String),
    /// Several ids begin like this.
    #[error("several containers' ids begin with {0}")]
    Ambiguous(String),
    /// An id of a caller's that isn't one.
    #[error("invalid container id {0:?}: [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, up to 128")]
    Id(String),
    /// Another container has the name.
    #[error(
        "Conflict. The container name \"/{name}\" is already in use by container \"{holder}\". You have to remove (or rename) that container to be able to reuse that name."
    )]
    NameInUse {
        /// The name.
        name: String,
        /// The id of the container that has it.
        holder: String,
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
    /// A file that Hull wrote isn't what Hull writes.
    #[error("\"{path}\" is not what Hull wrote")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Where it goes wrong.
        source: serde_json::Error,
    },
}

fn disk(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

fn malformed(path: &Path) -> impl FnOnce(serde_json::Error) -> StoreError {
    move |source| StoreError::Malformed {
        path: path.to_owned(),
        source,
    }
}

/// All containers of this host.
#[derive(Debug, Clone)]
pub struct Store {
    containers: PathBuf,
    names: PathBuf,
    run: PathBuf,
}

impl Store {
    /// The store that these settings name. Touches nothing.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            containers: settings.state_dir.join("containers"),
            names: settings.state_dir.join("names"),
            run: settings.run_dir.clone(),
        }
    }

    /// A store that lies in one directory. Touches nothing.
    #[must_use]
    pub fn at(root: &Path) -> Self {
        Self {
            containers: root.join("containers"),
            names: root.join("names"),
            run: root.join("run"),
        }
    }

    /// Gives a container its directory and its name, and the caller the right to run it, so that
    /// nobody takes it for one that was left behind. `planned` is called with the id and the
    /// name, which are made-up ones unless `id` and `name` ask for some.
    ///
    /// # Errors
    /// If the name is in use, `planned` fails, or the disk refuses; nothing is left then.
    pub fn create<E: From<StoreError>>(
        &self,
        id: Option<&str>,
        name: Option<&str>,
        planned: impl FnOnce(String, String) -> Result<Plan, E>,
    ) -> Result<Created, E> {
        if let Some(id) = id.filter(|id| !names::is_id(id)) {
            return Err(StoreError::Id(id.to_owned()).into());
        }
        make_directory(&self.containers)?;
        make_directory(&self.names)?;
        let id = id.map_or_else(names::id, str::to_owned);
        let _guard = self.guard()?;
        let name = match name {
            Some(name) => name.to_owned(),
            None => self.free_name()?,
        };
        if let Some(holder) = self.holder(&name)? {
            return Err(StoreError::NameInUse { name, holder }.into());
        }
        let plan = planned(id.clone(), name)?;
        let fresh = self.containers.join(format!(".{id}.new"));
        match self.fill(&fresh, &plan) {
            Ok((entry, claim)) => Ok(Created { entry, plan, claim }),
            Err(error) => {
                // The first error is the one to tell; the sweep clears what stays.
                let _ = fs::remove_dir_all(&fresh);
                Err(error.into())
            }
        }
    }

    fn fill(&self, fresh: &Path, plan: &Plan) -> Result<(Entry, Option<File>), StoreError> {
        make_directory(fresh)?;
        write_atomically(fresh, PLAN, plan, !plan.auto_remove)?;
        // One that is still to be given its disk leaves nothing if nobody does.
        if plan.auto_remove || plan.guest_id.is_some() {
            let passing = fresh.join(PASSING);
            private_file(&passing).map_err(disk("create", &passing))?;
        }
        let lock = fresh.join(LOCK);
        private_file(&lock).map_err(disk("create", &lock))?;
        let claim = try_lock(&lock)?;
        let directory = self.containers.join(&plan.id);
        let name = self.names.join(&plan.name);
        // The name first: a name without a container is free, a container always has its name.
        match fs::remove_file(&name) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(disk("replace", &name)(error));
            }
            _ => {}
        }
        symlink(&plan.id, &name).map_err(disk("create", &name))?;
        fs::rename(fresh, &directory).map_err(disk("rename", fresh))?;
        let run = self.run.join(&plan.id);
        Ok((Entry { directory, run }, claim))
    }

    /// The container with exactly this id.
    ///
    /// # Errors
    /// If there is none.
    pub fn get(&self, id: &str) -> Result<Entry, StoreError> {
        match names::is_id(id) && self.containers.join(id).is_dir() {
            true => Ok(self.entry(id)),
            false => Err(StoreError::NotFound(id.to_owned())),
        }
    }

    /// The container with this name, id, or unique beginning of an id.
    ///
    /// # Errors
    /// If there is none, or several ids begin so.
    pub fn find(&self, asked: &str) -> Result<Entry, StoreError> {
        let none = || StoreError::NotFound(asked.to_owned());
        let hexadecimal = !asked.is_empty() && asked.bytes().all(|byte| byte.is_ascii_hexdigit());
        if asked.len() == 64 && hexadecimal && self.containers.join(asked).is_dir() {
            return Ok(self.entry(asked));
        }
        if names::is_name(asked)
            && let Some(holder) = self.holder(asked)?
        {
            return Ok(self.entry(&holder));
        }
        if !hexadecimal {
            return Err(none());
        }
        let ids = self.ids()?;
        let mut matching = ids.iter().filter(|id| id.starts_with(asked));
        match (matching.next(), matching.next()) {
            (None, _) => Err(none()),
            (Some(id), None) => Ok(self.entry(id)),
            (Some(_), Some(_)) => Err(StoreError::Ambiguous(asked.to_owned())),
        }
    }

    /// Every container, in no order.
    ///
    /// # Errors
    /// If the directory can't be read.
    pub fn list(&self) -> Result<Vec<Entry>, StoreError> {
        Ok(self.ids()?.iter().map(|id| self.entry(id)).collect())
    }

    /// Takes the right to run a container, which lasts as long as the file is open anywhere.
    ///
    /// # Errors
    /// If the disk refuses. `None` is somebody else's having it.
    pub fn claim(&self, entry: &Entry) -> Result<Option<File>, StoreError> {
        let _guard = self.guard()?;
        let path = entry.directory.join(LOCK);
        let lock = try_lock(&path)?;
        if let Some(lock) = &lock {
            lock::forget_holder(lock, &path)?;
        }
        Ok(lock)
    }

    /// Waits until nobody runs a container, or it is gone.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn await_release(&self, entry: &Entry) -> Result<(), StoreError> {
        match lock::await_release(&entry.directory.join(LOCK)) {
            Err(error) if error.is_missing() => Ok(()),
            result => result,
        }
    }

    /// Takes that right from whoever has it: a monitor is killed, one that is about to be started
    /// is waited for and killed, and whoever has the lock for another purpose is waited for.
    ///
    /// # Errors
    /// If the disk refuses, or the container is gone. `None`: `limit` is over.
    pub(crate) fn seize(&self, entry: &Entry, limit: Duration) -> Result<Option<File>, StoreError> {
        let deadline = Instant::now() + limit;
        let path = entry.directory.join(LOCK);
        let mut wait = Some(lock::Wait::of(&path)?);
        while let Some(waiting) = wait.take() {
            lock::kill_holder(&path)?;
            let seen = waiting.next(deadline).map_err(disk("wait for", &path))?;
            match seen {
                (lock::Seen::Had(lock), _) if path.exists() => {
                    lock::forget_holder(&lock, &path)?;
                    return Ok(Some(lock));
                }
                (lock::Seen::Had(_), _) => {
                    return Err(StoreError::NotFound(entry.id().to_owned()));
                }
                (_, more) => wait = more,
            }
        }
        Ok(None)
    }

    /// Whether a container's monitor (or who starts it) lives.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn is_alive(&self, entry: &Entry) -> Result<bool, StoreError> {
        let ask = || {
            let _guard = self.guard()?;
            // Unlocked before the guard is, so that asking never stands in a claim's way.
            let lock = try_lock(&entry.directory.join(LOCK))?;
            Ok(lock.is_none())
        };
        match ask() {
            Err(error) if StoreError::is_missing(&error) => Ok(false),
            result => result,
        }
    }

    /// Removes a container's directories and its name. Whoever calls holds `claim`.
    ///
    /// # Errors
    /// If the disk refuses; what is left then is cleared by the sweep.
    pub fn remove(&self, entry: &Entry, claim: &File) -> Result<(), StoreError> {
        let _ = claim;
        let id = entry.id();
        let gone = self.containers.join(format!(".{id}.gone"));
        {
            let _guard = self.guard()?;
            match fs::rename(&entry.directory, &gone) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(disk("remove", &entry.directory)(error));
                }
                _ => {}
            }
            self.forget_name(&gone, id)?;
        }
        remove_tree(&entry.run)?;
        remove_tree(&gone)
    }

    /// Has a container's next start have limits that were changed.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn keep_limits(&self, entry: &Entry, update: &Update) -> Result<(), StoreError> {
        // One change at a time: each adds to what it finds.
        let _guard = self.guard()?;
        let path = entry.directory.join(LIMITS);
        let limits: Limits = read(&path)?.unwrap_or_default();
        let limits = limits.and(update).map_err(malformed(&path))?;
        write_atomically(&entry.directory, LIMITS, &limits, !entry.is_passing())
    }

    fn forget_name(&self, gone: &Path, id: &str) -> Result<(), StoreError> {
        let Ok(plan) = read::<Plan>(&gone.join(PLAN)) else {
            return Ok(());
        };
        let Some(plan) = plan else { return Ok(()) };
        let name = self.names.join(&plan.name);
        if fs::read_link(&name).is_ok_and(|holder| holder == Path::new(id)) {
            fs::remove_file(&name).map_err(disk("remove", &name))?;
        }
        Ok(())
    }

    /// Removes what was half made or half removed when somebody was killed.
    ///
    /// # Errors
    /// If the disk refuses.
    pub fn clear_remains(&self) -> Result<usize, StoreError> {
        let Some(_guard) = self.existing_guard()? else {
            return Ok(0);
        };
        let mut cleared = 0;
        for name in directory_names(&self.containers)? {
            if name.starts_with('.') && (name.ends_with(".new") || name.ends_with(".gone")) {
                remove_tree(&self.containers.join(name))?;
                cleared += 1;
            }
        }
        for name in directory_names(&self.names)? {
            if self.holder(&name)?.is_none() {
                let path = self.names.join(name);
                fs::remove_file(&path).map_err(disk("remove", &path))?;
                cleared += 1;
            }
        }
        for id in directory_names(&self.run)? {
            if names::is_id(&id) && !self.containers.join(&id).exists() {
                remove_tree(&self.run.join(id))?;
                cleared += 1;
            }
        }
        Ok(cleared)
    }

    fn entry(&self, id: &str) -> Entry {
        Entry {
            directory: self.containers.join(id),
            run: self.run.join(id),
        }
    }

    fn ids(&self) -> Result<Vec<String>, StoreError> {
        let mut ids = directory_names(&self.containers)?;
        ids.retain(|name| names::is_id(name));
        Ok(ids)
    }

    /// The id of the container that has `name`.
    fn holder(&self, name: &str) -> Result<Option<String>, StoreError> {
        let path = self.names.join(name);
        let holder = match fs::read_link(&path) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(disk("read", &path)(error)),
        };
        Ok((names::is_id(&holder) && self.containers.join(&holder).is_dir()).then_some(holder))
    }

    fn free_name(&self) -> Result<String, StoreError> {
        for attempt in 0..8 {
            let name = names::made_up(attempt);
            if self.holder(&name)?.is_none() {
                return Ok(name);
            }
        }
        Ok(names::id())
    }

    /// Held for an instant by whoever changes or tests membership, names and locks.
    fn guard(&self) -> Result<File, StoreError> {
        let guard = File::open(&self.containers).map_err(disk("open", &self.containers))?;
        flock(&guard, FlockOperation::LockExclusive)
            .map_err(|error| disk("lock", &self.containers)(error.into()))?;
        Ok(guard)
    }

    fn existing_guard(&self) -> Result<Option<File>, StoreError> {
        match self.guard() {
            Ok(guard) => Ok(Some(guard)),
            Err(error) if error.is_missing() => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl StoreError {
    /// Whether the thing isn't there (any more).
    #[must_use]
    pub fn is_missing(&self) -> bool {
        match self {
            Self::NotFound(_) => true,
            Self::Disk { source, .. } => source.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// A container that was just made, and the right to run it.
#[derive(Debug)]
pub struct Created {
    /// Where it lies.
    pub entry: Entry,
    /// What it was made to be.
    pub plan: Plan,
    /// See [`Store::claim`].
    pub claim: Option<File>,
}

/// Where one container lies on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub(crate) directory: PathBuf,
    pub(crate) run: PathBuf,
}

impl Entry {
    /// An entry by its two directories, as the monitor is given them.
    #[must_use]
    pub fn new(directory: PathBuf, run: PathBuf) -> Self {
        Self { directory, run }
    }

    /// The container's id.
    #[must_use]
    pub fn id(&self) -> &str {
        let name = self.directory.file_name().unwrap_or_default();
        name.to_str().unwrap_or_default()
    }

    /// Its directory below the state directory.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads its plan, with the limits that it has by now and a VM that begins with room for them.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn plan(&self) -> Result<Plan, StoreError> {
        Ok(self.saved_plan()?.grown())
    }

    /// Reads its plan, with the limits that it has by now and the VM that it was made with.
    pub(crate) fn saved_plan(&self) -> Result<Plan, StoreError> {
        let plan: Option<Plan> = read(&self.directory.join(PLAN))?;
        let plan = plan.ok_or_else(|| StoreError::NotFound(self.id().to_owned()))?;
        let path = self.directory.join(LIMITS);
        match read::<Limits>(&path)? {
            Some(limits) => plan.limited(limits).map_err(malformed(&path)),
            None => Ok(plan),
        }
    }

    /// What the monitor said when the first process began to run.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn running(&self) -> Result<Option<Running>, StoreError> {
        read(&self.directory.join(STATE))
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// If it can't be read.
    pub fn exit(&self) -> Result<Option<ExitRecord>, StoreError> {
        read(&self.directory.join(EXIT))
    }

    /// Nothing runs after a power cut, so this needn't outlive one.
    pub(crate) fn write_running(&self, running: &Running) -> Result<(), StoreError> {
        write_atomically(&self.directory, STATE, running, false)
    }

    pub(crate) fn write_exit(&self, exit: &ExitRecord, durable: bool) -> Result<(), StoreError> {
        write_atomically(&self.directory, EXIT, exit, durable)
    }

    /// The store that this entry is in.
    pub(crate) fn store(&self) -> Store {
        let parent = |path: &Path| path.parent().unwrap_or(Path::new("/")).to_owned();
        let containers = parent(&self.directory);
        Store {
            names: parent(&containers).join("names"),
            run: parent(&self.run),
            containers,
        }
    }

    pub(crate) fn log_path(&self) -> PathBuf {
        self.directory.join("log.json")
    }

    pub(crate) fn boot_log_path(&self) -> PathBuf {
        self.directory.join("boot.log")
    }

    /// Whether it is to leave nothing.
    pub(crate) fn is_passing(&self) -> bool {
        self.directory.join(PASSING).exists()
    }

    /// It runs, and is to be there when it has ended.
    pub(crate) fn stay(&self) -> Result<(), StoreError> {
        let passing = self.directory.join(PASSING);
        match fs::remove_file(&passing) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(disk("remove", &passing)(error))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn journal_path(&self) -> PathBuf {
        self.directory.join("monitor.log")
    }

    pub(crate) fn socket_path(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Makes the directory of what doesn't survive a reboot.
    pub(crate) fn make_run_directory(&self) -> Result<(), StoreError> {
        make_directory(&self.run)
    }

    /// Forgets an earlier run, before the next.
    pub(crate) fn forget_run(&self) -> Result<(), StoreError> {
        for name in [STATE, EXIT] {
            let path = self.directory.join(name);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(disk("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}
