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
use serde::{Deserialize, Serialize};

use crate::plan::PlannedScratch;
use crate::rootfs::{copy_content, copy_run, each_run};
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
/// The most that an empty disk has on it, in bytes; some 60 KiB for 10 GiB.
const MOST_CONTENT: usize = 8 << 20;
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

    /// Makes a disk empty again.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn clear(&self, used: &File) -> Result<(), ScratchError> {
        let path = self.pristine();
        let pristine = File::open(&path).map_err(disk("open", &path))?;
        used.set_len(0).map_err(disk("copy", &path))?;
        copy_content(&pristine, used, self.bytes).map_err(disk("copy", &path))
    }

    /// The disk of the container whose directory this is; at first with what a guest's kernel
    /// expects that has it mounted already, or else an empty one.
    ///
    /// # Errors
    /// If the disk refuses.
    pub(crate) fn open(
        &self,
        directory: &Path,
        mounted: Option<Kept<'_>>,
    ) -> Result<File, ScratchError> {
        let path = directory.join(NAME);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let fresh = match mounted {
                    Some(kept) => {
                        let fresh = nameless(directory)?;
                        kept.fill(&fresh, self.bytes).map_err(disk("fill", &path))?;
                        fresh
                    }
                    None => self.copy_in(directory)?,
                };
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
        let copy = nameless(directory)?;
        self.clear(&copy)?;
        Ok(copy)
    }
}

/// What is on a disk, all but zeroes: where each run of bytes lies, and how many it has. The bytes
/// are kept elsewhere, one run behind the other.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Content {
    runs: Vec<(u64, u32)>,
}

impl Content {
    /// What is on `disk` now, and its bytes.
    ///
    /// # Errors
    /// If it can't be read, or has more than a disk has that was never written to.
    pub(crate) fn of(disk: &File) -> io::Result<(Self, Vec<u8>)> {
        let mut content = Self::default();
        let mut bytes = Vec::new();
        let length = disk.metadata()?.len();
        each_run(disk, length, |run| {
            let begin = bytes.len();
            let count = u32::try_from(run.end - run.start).map_err(io::Error::other)?;
            let end = begin + count as usize;
            if end > MOST_CONTENT {
                return Err(io::Error::other("there is too much on it"));
            }
            bytes.resize(end, 0);
            let place = bytes.get_mut(begin..).unwrap_or_default();
            disk.read_exact_at(place, run.start)?;
            content.runs.push((run.start, count));
            Ok(run.end)
        })?;
        Ok((content, bytes))
    }

    /// How many bytes it has.
    pub(crate) fn length(&self) -> u64 {
        self.runs.iter().map(|(_, count)| u64::from(*count)).sum()
    }
}

/// A disk's content, and where its bytes are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kept<'a> {
    pub(crate) content: &'a Content,
    pub(crate) file: &'a File,
    /// Where the first is.
    pub(crate) offset: u64,
}

impl Kept<'_> {
    /// Puts it on a disk of so many bytes that has nothing on it.
    fn fill(&self, disk: &File, length: u64) -> io::Result<()> {
        disk.set_len(length)?;
        let mut from = self.offset;
        for &(at, count) in &self.content.runs {
            let run = from..from + u64::from(count);
            from = run.end;
            copy_run(self.file, run, disk, at)?;
        }
        Ok(())
    }
}

/// Whether the container whose directory this is has one already.
pub(crate) fn is_in(directory: &Path) -> bool {
    directory.join(NAME).exists()
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
            fleeting: false,
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
    fn a_disk_begins_as_a_guest_left_another() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = planned(directory.path(), BYTES);
        scratch.prepare().unwrap();
        let left = scratch.stand_in().unwrap();
        left.write_all_at(b"of a rehearsal", 5 << 20).unwrap();
        scratch.clear(&left).unwrap();
        assert_eq!(
            Content::of(&left).unwrap(),
            Content::of(&File::open(scratch.pristine()).unwrap()).unwrap()
        );
        left.write_all_at(b"mounted", 3 << 20).unwrap();
        let (content, bytes) = Content::of(&left).unwrap();
        assert_eq!(content.length(), bytes.len() as u64);
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 77).unwrap();
        let kept = Kept {
            content: &content,
            file: &file,
            offset: 77,
        };
        let container = directory.path().join("container");
        fs::create_dir(&container).unwrap();
        assert!(!is_in(&container));
        let own = scratch.open(&container, Some(kept)).unwrap();
        assert!(is_in(&container));
        assert_eq!(own.metadata().unwrap().len(), BYTES);
        assert!(Content::of(&own).unwrap() == (content.clone(), bytes.clone()));
        // What a later guest finds is what was left, not what another expects.
        own.write_all_at(b"written", 9 << 20).unwrap();
        let again = scratch.open(&container, Some(kept)).unwrap();
        assert!(Content::of(&again).unwrap().1 != bytes);

        left.write_all_at(&vec![1; MOST_CONTENT + 1], 0).unwrap();
        assert!(Content::of(&left).is_err());
    }

    #[test]
    fn a_containers_disk_is_its_own_and_stays() {
        let directory = tempfile::tempdir().unwrap();
        let scratch = planned(directory.path(), BYTES);
        scratch.prepare().unwrap();
        let pristine = fs::read(scratch.pristine()).unwrap();
        let container = directory.path().join("container");
        fs::create_dir(&container).unwrap();
        let own = scratch.open(&container, None).unwrap();
        assert!(fs::read(container.join(NAME)).unwrap() == pristine);
        own.write_all_at(b"written", 1 << 20).unwrap();
        let mut seen = [0; 7];
        let again = scratch.open(&container, None).unwrap();
        again.read_exact_at(&mut seen, 1 << 20).unwrap();
        assert_eq!(&seen, b"written");
        assert!(fs::read(scratch.pristine()).unwrap() == pristine);
        again.set_len(1).unwrap();
        assert!(matches!(
            scratch.open(&container, None),
            Err(ScratchError::Wrong(_))
        ));
    }
}
