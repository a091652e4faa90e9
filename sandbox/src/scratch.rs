//! Scratch disks: files that hold what containers write over their images.
//!
//! ```text
//! STATE/scratch/                  its flock: whoever makes a pristine disk holds it
//!   1-10737418240                 an empty file system of so many bytes, never written to again
//!   tree/upper, work              what is in each
//! STATE/containers/ID/scratch     one container's, a copy of it at first
//! ```
//!
//! Owns: making an empty file system once for each size, by mke2fs(8), and handing out copies.
//! Refuses: to look into one that a guest has had; only guests mount them.

use std::env;
use std::fs::{self, DirBuilder, File, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use hull_proto::{SCRATCH_UPPER, SCRATCH_WORK};
use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, flock, linkat};

use crate::plan::PlannedScratch;
use crate::rootfs::copy_content;
use crate::sys;

/// The directory below the state's.
pub(crate) const DIRECTORY: &str = "scratch";
/// A container's disk, in its directory.
pub(crate) const NAME: &str = "scratch";

/// Version of how an empty file system is made.
const EPOCH: u32 = 1;
/// What makes them.
const TOOL: &str = "mke2fs";
/// Where it is looked for beside `PATH`.
const TOOL_PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/usr/local/sbin"];
/// What to do where it isn't.
pub(crate) const TOOL_REMEDY: &str = "install e2fsprogs";

const BLOCK_BYTES: u64 = 4096;
/// No table is written that can be told from zeroes; no copies of what only the host could lose.
const FEATURES: &str = "none,has_journal,ext_attr,dir_index,filetype,extent,flex_bg,\
    sparse_super2,large_file,huge_file,dir_nlink,extra_isize,uninit_bg";
const EXTENDED: &str = "num_backup_sb=0,lazy_itable_init=1,lazy_journal_init=1,\
    packed_meta_blocks=1,nodiscard,root_owner=0:0";
/// Journals of disks below and above this size, in MiB.
const LARGE: u64 = 512 << 20;
const JOURNALS_MIB: [u64; 2] = [4, 16];

/// Where an ext file system's superblock is; in it, its number of blocks and its magic number.
const SUPERBLOCK: u64 = 1024;
const BLOCKS_AT: usize = 0x04;
const MAGIC_AT: usize = 0x38;
const MAGIC: [u8; 2] = [0x53, 0xef];

/// A scratch disk that can't be had.
#[derive(Debug, thiserror::Error)]
pub enum ScratchError {
    /// What makes one isn't there.
    #[error("cannot make a scratch disk: {TOOL} is missing; {TOOL_REMEDY}")]
    NoTool,
    /// It is there and failed.
    #[error("cannot make a scratch disk: {TOOL} says: {0}")]
    Tool(String),
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
    /// One isn't as large as it was made.
    #[error("\"{0}\" isn't the scratch disk that its container was given")]
    Wrong(PathBuf),
    /// The container's files lie elsewhere.
    #[error(
        "an earlier Hull made this container, and keeps what it wrote in \"{0}\": save what you need of it and remove the container"
    )]
    Earlier(PathBuf),
}

fn disk(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ScratchError {
    move |source| ScratchError::Disk {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Where the program is that makes file systems.
pub(crate) fn tool() -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(TOOL_PLACES.map(PathBuf::from));
    places
        .map(|place| place.join(TOOL))
        .find(|tool| tool.is_file())
}

impl PlannedScratch {
    fn pristine(&self) -> PathBuf {
        self.pristine.join(format!("{EPOCH}-{}", self.bytes))
    }

    /// Has an empty disk of this size be there.
    ///
    /// # Errors
    /// If none can be made.
    pub(crate) fn prepare(&self) -> Result<(), ScratchError> {
        let path = self.pristine();
        if self.is_whole(&path) {
            return Ok(());
        }
        let mut directories = DirBuilder::new();
        let directories = directories.recursive(true).mode(0o700);
        let make = |path: &Path| directories.create(path).map_err(disk("create", path));
        make(&self.pristine)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let lock = rustix::fs::open(&self.pristine, flags, Mode::empty())
            .map_err(|error| disk("open", &self.pristine)(error.into()))?;
        flock(&lock, FlockOperation::LockExclusive)
            .map_err(|error| disk("lock", &self.pristine)(error.into()))?;
        // It may have been made meanwhile.
        if self.is_whole(&path) {
            return Ok(());
        }
        let tree = self.pristine.join("tree");
        for (name, mode) in [(SCRATCH_UPPER, 0o755), (SCRATCH_WORK, 0o700)] {
            let directory = tree.join(name);
            make(&directory)?;
            fs::set_permissions(&directory, Permissions::from_mode(mode))
                .map_err(disk("change", &directory))?;
        }
        let fresh = nameless(&self.pristine)?;
        fresh.set_len(self.bytes).map_err(disk("create", &path))?;
        format(&fresh, self.bytes, &tree)?;
        fresh.sync_all().map_err(disk("write", &path))?;
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(disk("replace", &path)(error));
            }
            _ => {}
        }
        name(&fresh, &path)
    }

    /// Whether this is an empty disk of this size, as far as its head tells.
    fn is_whole(&self, path: &Path) -> bool {
        let mut superblock = [0; 64];
        let read = File::open(path).and_then(|file| {
            file.read_exact_at(&mut superblock, SUPERBLOCK)?;
            Ok(file.metadata()?.len())
        });
        let blocks = self.bytes / BLOCK_BYTES;
        read.is_ok_and(|length| length == self.bytes)
            && superblock[MAGIC_AT..].starts_with(&MAGIC)
            && superblock[BLOCKS_AT..].starts_with(&(blocks as u32).to_le_bytes())
    }

    /// An empty disk that is nobody's, and gone with its last descriptor.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn stand_in(&self) -> Result<File, ScratchError> {
        self.copy_in(&self.pristine)
    }

    /// The disk of the container whose directory this is; an empty one at first.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn open(&self, directory: &Path) -> Result<File, ScratchError> {
        let path = directory.join(NAME);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fresh = self.copy_in(directory)?;
                name(&fresh, &path)?;
                fresh
            }
            Err(error) => return Err(disk("open", &path)(error)),
        };
        let metadata = file.metadata().map_err(disk("open", &path))?;
        match metadata.len() == self.bytes {
            true => Ok(file),
            false => Err(ScratchError::Wrong(path)),
        }
    }

    /// A copy of the empty disk that has no name in `directory` yet.
    fn copy_in(&self, directory: &Path) -> Result<File, ScratchError> {
        let path = self.pristine();
        let pristine = File::open(&path).map_err(disk("open", &path))?;
        let copy = nameless(directory)?;
        copy_content(&pristine, &copy, self.bytes).map_err(disk("copy", &path))?;
        Ok(copy)
    }
}

/// A file in `directory` that is gone with its last descriptor unless it is given a name.
fn nameless(directory: &Path) -> Result<File, ScratchError> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)
        .map(File::from)
        .map_err(|error| disk("create a file in", directory)(error.into()))
}

fn name(file: &File, path: &Path) -> Result<(), ScratchError> {
    let own = sys::descriptor_path(file);
    linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW)
        .map_err(|error| disk("create", path)(error.into()))
}

/// Makes a file system in `file`, with what `tree` holds.
fn format(file: &File, bytes: u64, tree: &Path) -> Result<(), ScratchError> {
    let tool = tool().ok_or(ScratchError::NoTool)?;
    let journal = JOURNALS_MIB[usize::from(bytes >= LARGE)];
    let target = file.try_clone().map_err(disk("open", tree))?;
    let output = Command::new(&tool)
        .args([
            "-q", "-F", "-b", "4096", "-I", "256", "-i", "16384", "-m", "0",
        ])
        .args(["-e", "remount-ro", "-O", FEATURES, "-E", EXTENDED])
        .args(["-J", &format!("size={journal}")])
        .arg("-d")
        .arg(tree)
        // Its stdin, which it opens once more.
        .arg("/proc/self/fd/0")
        .stdin(target)
        .stdout(Stdio::null())
        .env_clear()
        // The host's own settings are for its own disks.
        .env("MKE2FS_CONFIG", "/dev/null")
        .output()
        .map_err(disk("run", &tool))?;
    match output.status.success() {
        true => Ok(()),
        false => {
            let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(ScratchError::Tool(said))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::thread;

    use super::*;

    const BYTES: u64 = 64 << 20;

    fn planned(directory: &Path, bytes: u64) -> PlannedScratch {
        PlannedScratch {
            bytes,
            pristine: directory.join(DIRECTORY),
        }
    }

    #[test]
    fn an_empty_disk_is_made_once_and_small() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = planned(directory.path(), 10 << 30);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| scratch.prepare().unwrap());
            }
        });
        let made = fs::metadata(scratch.pristine()).unwrap();
        assert_eq!(made.len(), 10 << 30);
        assert!(made.blocks() < 1024, "{} blocks", made.blocks());
        assert_eq!(made.mode() & 0o777, 0o600);
        scratch.prepare().unwrap();
        assert_eq!(fs::metadata(scratch.pristine()).unwrap().ino(), made.ino());
        let names = fs::read_dir(&scratch.pristine).unwrap().count();
        assert_eq!(names, 2, "the disk and what is in it");
    }

    #[test]
    fn one_that_is_cut_or_of_another_size_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = planned(directory.path(), BYTES);
        for spoil in [
            |path: &Path| {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(4096)
                    .unwrap()
            },
            |path: &Path| {
                let other = planned(path.parent().unwrap().parent().unwrap(), 2 * BYTES);
                other.prepare().unwrap();
                fs::rename(other.pristine(), path).unwrap();
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .set_len(BYTES)
                    .unwrap();
            },
            |path: &Path| {
                let file = File::options().write(true).open(path).unwrap();
                file.write_all_at(&[0; 4096], 0).unwrap();
            },
        ] {
            scratch.prepare().unwrap();
            spoil(&scratch.pristine());
            assert!(!scratch.is_whole(&scratch.pristine()));
            scratch.prepare().unwrap();
            assert!(scratch.is_whole(&scratch.pristine()));
        }
    }

    #[test]
    fn a_containers_disk_is_its_own_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = planned(directory.path(), BYTES);
        scratch.prepare().unwrap();
        let pristine = fs::read(scratch.pristine()).unwrap();
        let container = directory.path().join("container");
        fs::create_dir(&container).unwrap();
        let own = scratch.open(&container).unwrap();
        assert!(fs::read(container.join(NAME)).unwrap() == pristine);
        own.write_all_at(b"written", 1 << 20).unwrap();
        let mut seen = [0; 7];
        let again = scratch.open(&container).unwrap();
        again.read_exact_at(&mut seen, 1 << 20).unwrap();
        assert_eq!(&seen, b"written");
        assert!(fs::read(scratch.pristine()).unwrap() == pristine);
        again.set_len(1).unwrap();
        assert!(matches!(
            scratch.open(&container),
            Err(ScratchError::Wrong(_))
        ));
    }
}
