//! A file that only grows and never past a bound: when half of the bound is full, it becomes the
//! older half, and the half before it is dropped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// A file of bounded size and the half before it.
#[derive(Debug)]
pub(crate) struct Rotated {
    path: PathBuf,
    file: File,
    length: u64,
    limit: u64,
}

/// Where the older half of `path` lies.
pub(crate) fn older(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    PathBuf::from(name)
}

impl Rotated {
    /// Opens or makes `path`; both halves together take at most `limit` bytes.
    pub(crate) fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = open(&path)?;
        Ok(Self {
            length: file.metadata()?.len(),
            path,
            file,
            limit,
        })
    }

    /// Appends `bytes`, which stay together in one half.
    pub(crate) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let count = bytes.len() as u64;
        if self.length > 0 && self.length + count > self.limit / 2 {
            fs::rename(&self.path, older(&self.path))?;
            self.file = open(&self.path)?;
            self.length = 0;
        }
        self.file.write_all(bytes)?;
        self.length += count;
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_bytes_stay_and_the_bound_holds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let mut log = Rotated::open(path.clone(), 100).unwrap();
        for number in 0..1000 {
            log.append(format!("{number:04}\n").as_bytes()).unwrap();
        }
        let mut text = fs::read_to_string(older(&path)).unwrap();
        text += &fs::read_to_string(&path).unwrap();
        assert!(text.len() <= 100, "{}", text.len());
        assert!(text.ends_with("0998\n0999\n"));
        let mut again = Rotated::open(path.clone(), 100).unwrap();
        again.append(b"more\n").unwrap();
        assert!(fs::read_to_string(&path).unwrap().ends_with("more\n"));
    }
}
