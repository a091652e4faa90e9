//! What a process holds of the host's memory, its guest's apart.
//!
//! Owns: reading `/proc/PID/smaps` (proc(5)), and telling which mappings are the guest's: those
//! around a template's file, of which the guest has given parts back; else the largest, as guests
//! here have more memory than any program maps. Files that a guest sees by its window are the
//! page cache's, and nobody's private memory: the only mappings that are shared and only read.

use std::fs;

use anyhow::{Context, Result};

use crate::programs::MEMORY_MIB;

/// One process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Memory {
    /// Private pages of every mapping but the guest's memory.
    pub(crate) private: u64,
    /// Those of them that were written.
    pub(crate) dirty: u64,
    /// Resident pages of the guest's memory.
    pub(crate) guest: u64,
    /// Those of them that are no file's.
    pub(crate) copied: u64,
}

/// Reads a process's mappings.
pub(crate) fn of(pid: u32) -> Result<Memory> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(parse(&text))
}

/// What the whole machine holds, in bytes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Machine {
    /// Contents: of files, and what processes and guests have written.
    pub(crate) contents: u64,
    /// Page tables of processes.
    pub(crate) tables: u64,
    /// Page tables of guests.
    pub(crate) nested_tables: u64,
    /// What it could give to others.
    pub(crate) available: u64,
}

/// Asks the kernel for all of it.
pub(crate) fn of_machine() -> Result<Machine> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let bytes = |wanted: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once(':'));
        let (_, value) = lines.find(|(key, _)| *key == wanted)?;
        let kib = value.trim().strip_suffix(" kB")?.parse::<u64>().ok()?;
        Some(kib << 10)
    };
    let bytes = |key: &str| bytes(key).with_context(|| format!("/proc/meminfo lacks {key}"));
    Ok(Machine {
        contents: bytes("Cached")? + bytes("AnonPages")?,
        tables: bytes("PageTables")?,
        nested_tables: bytes("SecPageTables")?,
        available: bytes("MemAvailable")?,
    })
}

/// Private pages of a process, a guest's among them, in bytes.
pub(crate) fn whole(pid: u32) -> Result<u64> {
    sum(pid, "smaps_rollup", "Private_")
}

/// Page tables of a process, in bytes.
pub(crate) fn tables(pid: u32) -> Result<u64> {
    sum(pid, "status", "VmPTE")
}

/// The sum of the lines of a file of a process's whose keys begin so.
fn sum(pid: u32, file: &str, keys: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/{file}");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let kib = |line: &str| {
        let (_, value) = line
            .split_once(':')
            .filter(|(key, _)| key.starts_with(keys))?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    Ok(text.lines().filter_map(kib).sum::<u64>() << 10)
}

#[derive(Debug, Clone, Copy, Default)]
struct Mapping {
    start: u64,
    size: u64,
    resident: u64,
    clean: u64,
    dirty: u64,
    anonymous: u64,
    of_window: bool,
}

fn parse(text: &str) -> Memory {
    let mut mappings: Vec<Mapping> = Vec::new();
    let (mut start, mut of_window, mut copied) = (0, false, None);
    for line in text.lines() {
        if let Some(header) = Header::parse(line) {
            (start, of_window) = (header.start, header.of_window);
            if header.of_template {
                let base = header.start - header.offset;
                copied = Some(base..base + (u64::from(MEMORY_MIB) << 20));
            }
            continue;
        }
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
                start,
                size,
                of_window,
                ..Mapping::default()
            }),
            ("Rss", Some(bytes), Some(last)) => last.resident = bytes,
            ("Private_Clean", Some(bytes), Some(last)) => last.clean = bytes,
            ("Private_Dirty", Some(bytes), Some(last)) => last.dirty = bytes,
            ("Anonymous", Some(bytes), Some(last)) => last.anonymous = bytes,
            _ => {}
        }
    }
    let largest = mappings.iter().max_by_key(|mapping| mapping.size);
    let guest = copied.or_else(|| largest.map(|m| m.start..m.start + m.size));
    let of_guest = |m: &&Mapping| guest.as_ref().is_some_and(|guest| guest.contains(&m.start));
    let others = || mappings.iter().filter(|m| !of_guest(m) && !m.of_window);
    Memory {
        private: others().map(|m| m.clean + m.dirty).sum(),
        dirty: others().map(|m| m.dirty).sum(),
        guest: mappings.iter().filter(of_guest).map(|m| m.resident).sum(),
        copied: mappings.iter().filter(of_guest).map(|m| m.anonymous).sum(),
    }
}

/// The first line of a mapping's block.
struct Header {
    start: u64,
    /// Of its file.
    offset: u64,
    of_template: bool,
    of_window: bool,
}

impl Header {
    /// `start-end permissions offset device inode path`, the numbers in hexadecimal.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let hex = |word: &str| u64::from_str_radix(word, 16).ok();
        let (start, _end) = words.next()?.split_once('-')?;
        let access = words.next()?;
        let offset = hex(words.next()?)?;
        Some(Self {
            start: hex(start)?,
            offset,
            of_window: access == "r--s",
            of_template: line.contains("/templates/"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_mapping_is_the_guests() {
        let text = "5500-5600 r-xp 00000000 00:01 7  /hull-monitor\n\
            Size:    100 kB\nRss:   80 kB\nPrivate_Clean:  60 kB\nPrivate_Dirty:  4 kB\n\
            5600-5700 r--s 00000000 00:01 9  /layers/1/bin/program\n\
            Size:    100 kB\nRss:   80 kB\nPrivate_Clean:  60 kB\nPrivate_Dirty:  0 kB\n\
            7f0000000000-7f0010000000 rw-p 00000000 00:00 0\n\
            Size:   262144 kB\nRss:   30000 kB\nPrivate_Clean: 0 kB\nPrivate_Dirty: 30000 kB\n\
            7fff00000000-7fff00021000 rw-p 00000000 00:00 0  [stack]\n\
            Size:    132 kB\nRss:   8 kB\nPrivate_Clean:  0 kB\nPrivate_Dirty:  8 kB\n";
        let expected = Memory {
            private: 72 << 10,
            dirty: 12 << 10,
            guest: 30_000 << 10,
            copied: 0,
        };
        assert_eq!(parse(text), expected);
        assert_eq!(parse(""), Memory::default());
    }

    #[test]
    fn what_lies_around_a_templates_file_is_the_guests() {
        let block = |head: &str, dirty: u64| {
            let own = dirty / 2;
            format!(
                "{head}\nSize: 1000 kB\nRss: {dirty} kB\nPrivate_Dirty: {dirty} kB\nAnonymous: {own} kB\n"
            )
        };
        let text = [
            block("50000000-58000000 rw-p 00000000 00:00 0", 1),
            block(
                "60000000-61000000 rw-p 00000000 00:01 7  /state/templates/0123",
                20,
            ),
            block("61000000-78000000 rw-p 00000000 00:00 0", 300),
            block(
                "78000000-80000000 rw-p 18000000 00:01 7  /state/templates/0123",
                4000,
            ),
            block("80000000-80021000 rw-p 00000000 00:00 0", 50_000),
        ];
        let expected = Memory {
            private: 50_001 << 10,
            dirty: 50_001 << 10,
            guest: 4320 << 10,
            copied: 2160 << 10,
        };
        assert_eq!(parse(&text.concat()), expected);
    }
}
