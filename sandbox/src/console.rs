//! The guest's console on the host: a bounded file, and the last bytes in memory for messages.
//!
//! These are a guest's bytes: nothing here looks into them but for whole lines to show.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use crate::rotate::Rotated;

/// Bytes that a VM's console may take on disk.
const LIMIT: u64 = 256 * 1024;
/// Bytes of it that are kept at hand.
const TAIL: usize = 4 * 1024;

/// Takes what the guest's console says.
#[derive(Debug)]
pub(crate) struct BootLog {
    /// None for a guest that is nobody's.
    file: Option<Rotated>,
    tail: Tail,
}

/// The last bytes that a console said.
#[derive(Debug, Clone, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl BootLog {
    /// Opens the log at `path`, behind what an earlier boot said.
    pub(crate) fn open(path: PathBuf) -> io::Result<Self> {
        Ok(Self {
            file: Some(Rotated::open(path, LIMIT)?),
            tail: Tail::default(),
        })
    }

    /// Keeps nothing but the last bytes.
    pub(crate) fn unkept() -> Self {
        Self {
            file: None,
            tail: Tail::default(),
        }
    }

    /// What to ask later for the last lines.
    pub(crate) fn tail(&self) -> Tail {
        self.tail.clone()
    }
}

impl Write for BootLog {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.tail.push(bytes);
        if let Some(file) = &mut self.file {
            // A full disk must not stop the guest; its last lines are in memory.
            let _ = file.append(bytes);
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Tail {
    fn push(&self, bytes: &[u8]) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.extend(&bytes[bytes.len().saturating_sub(TAIL)..]);
        let excess = kept.len().saturating_sub(TAIL);
        kept.drain(..excess);
    }

    /// The last `count` lines that aren't empty, without control characters.
    pub(crate) fn lines(&self, count: usize) -> Vec<String> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes: Vec<u8> = kept.iter().copied().collect();
        drop(kept);
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<String> = text
            .lines()
            .map(|line| line.chars().filter(|c| !c.is_control()).collect::<String>())
            .filter(|line| !line.trim().is_empty())
            .collect();
        lines[lines.len().saturating_sub(count)..].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_stays_within_its_bounds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("boot.log");
        let mut log = BootLog::open(path.clone()).unwrap();
        let tail = log.tail();
        for number in 0..100_000 {
            writeln!(log, "line {number}\x1b[0m\r").unwrap();
        }
        let size = std::fs::metadata(&path).unwrap().len()
            + std::fs::metadata(crate::rotate::older(&path))
                .unwrap()
                .len();
        assert!(size <= LIMIT, "{size}");
        assert_eq!(tail.lines(2), ["line 99998[0m", "line 99999[0m"]);
        log.write_all(&vec![b'x'; 3 * TAIL]).unwrap();
        assert_eq!(tail.lines(9).concat().len(), TAIL);
    }
}
