//! A file of an engine's: read whole, replaced whole.

use std::fs;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::fs::{Gid, Uid, chown};

/// Largest file that is read, in bytes.
const MAX_FILE: u64 = 4 << 20;

/// The first line of a file that is Hull's own.
pub(super) const OURS: &str = "# Made by `hull install`.\n";

/// What a file is and what it is to be.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// The file.
    pub(super) path: PathBuf,
    /// What it is now; none if it isn't there.
    pub(super) before: Option<String>,
    /// What it is to be; none if it is to go.
    pub(super) after: Option<String>,
}

/// Reads a file that may not be there.
pub(super) fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_FILE => {
            bail!("\"{}\" is larger than {MAX_FILE} bytes", path.display());
        }
        _ => {}
    }
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read \"{}\"", path.display())),
    }
}

impl Change {
    /// Whether anything is to be done.
    pub(super) fn is_one(&self) -> bool {
        self.before != self.after
    }

    /// Does it, wholly or not at all.
    pub(super) fn write(&self) -> anyhow::Result<()> {
        // What a link leads to is replaced, not the link.
        let path = self
            .path
            .canonicalize()
            .unwrap_or_else(|_| self.path.clone());
        match &self.after {
            Some(text) => replace(&path, text),
            None => fs::remove_file(&path),
        }
        .with_context(|| format!("cannot write \"{}\"", path.display()))
    }
}

/// Puts a file with this text in the place of what is there, with the same owner and mode.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(directory)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let beside = directory.join(format!(".{name}.hull-{}", std::process::id()));
    let written = write_like(&beside, path, text).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        // Nothing more can be done about one that stays.
        let _ = fs::remove_file(&beside);
    }
    written?;
    fs::File::open(directory)?.sync_all()
}

fn write_like(to: &Path, like: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::File::create_new(to)?;
    match fs::metadata(like) {
        Ok(metadata) => {
            let (uid, gid) = (Uid::from_raw(metadata.uid()), Gid::from_raw(metadata.gid()));
            chown(to, Some(uid), Some(gid))?;
            file.set_permissions(metadata.permissions())?;
        }
        Err(_) => file.set_permissions(fs::Permissions::from_mode(0o644))?,
    }
    file.write_all(text.as_bytes())?;
    file.sync_all()
}
