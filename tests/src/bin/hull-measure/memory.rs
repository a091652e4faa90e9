//! What a process holds of the host's memory, its guest's apart.
//!
//! Owns: reading `/proc/PID/smaps` (proc(5)). Refuses: to guess which mapping is the guest's
//! by name: it is the largest, as guests here have more memory than any program maps.

use std::fs;

use anyhow::{Context, Result};

/// One process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Private pages of every mapping but the guest's memory.
    pub(crate) private: u64,
    /// Those of them that were written.
    pub(crate) dirty: u64,
    /// Resident pages of the guest's memory.
    pub(crate) guest: u64,
}

/// Reads a process's mappings.
pub(crate) fn of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(parse(&text))
}

#[derive(Debug, Clone, Copy, Default)]
struct Mapping {
    size: u64,
    resident: u64,
    clean: u64,
    dirty: u64,
}

fn parse(text: &str) -> Memory {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.lines() {
        let Some((key, value)) = line.split_once(':') else {
            continue;
        };
        let bytes = value
            .trim()
            .strip_suffix(" kB")
            .and_then(|kib| kib.trim().parse::<u64>().ok())
            .map(|kib| kib << 10);
        match (key, bytes, mappings.last_mut()) {
            // The first line of each mapping's block that has a size.
            ("Size", Some(size), _) => mappings.push(Mapping {
                size,
                ..Mapping::default()
            }),
            ("Rss", Some(bytes), Some(last)) => last.resident = bytes,
            ("Private_Clean", Some(bytes), Some(last)) => last.clean = bytes,
            ("Private_Dirty", Some(bytes), Some(last)) => last.dirty = bytes,
            _ => {}
        }
    }
    mappings.sort_by_key(|mapping| mapping.size);
    let guest = mappings.pop().unwrap_or_default();
    Memory {
        private: mappings.iter().map(|m| m.clean + m.dirty).sum(),
        dirty: mappings.iter().map(|m| m.dirty).sum(),
        guest: guest.resident,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_mapping_is_the_guests() {
        let text = "5500-5600 r-xp 00000000 00:01 7  /hull-monitor\n\
            Size:    100 kB\nRss:   80 kB\nPrivate_Clean:  60 kB\nPrivate_Dirty:  4 kB\n\
            7f00-7f90 rw-p 00000000 00:00 0\n\
            Size:   262144 kB\nRss:   30000 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 30000 kB\n\
            7fff-8000 rw-p 00000000 00:00 0  [stack]\n\
            Size:    132 kB\nRss:   8 kB\nPrivate_Clean:  0 kB\nPrivate_Dirty:  8 kB\n";
        let expected = Memory {
            private: 72 << 10,
            dirty: 12 << 10,
            guest: 30_000 << 10,
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse(""), Memory::default());
    }
}
