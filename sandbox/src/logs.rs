//! What a container said: Docker's `json-file` lines, written by the monitor and read by faces.
//!
//! Owns `log.json` and its older half. Refuses to hold a container up when the disk is full:
//! lines are then lost, not the container.

mod reader;

use std::borrow::Cow;
use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::rotate::Rotated;

pub use reader::{LogEntry, LogOptions, LogReader};

/// Longest piece of a line in one entry, in bytes, as Docker's.
const MAX_PIECE: usize = 16 * 1024;
/// Where a process wrote to: its stdout or terminal, or its stderr.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum LogStream {
    Stdout,
    Stderr,
}

/// A line of the file.
#[derive(Serialize, Deserialize)]
struct Line<'a> {
    log: Cow<'a, str>,
    stream: LogStream,
    time: Timestamp,
}

/// Cuts output into entries.
#[derive(Debug)]
pub(crate) struct LogWriter {
    /// None if nothing is to be kept.
    file: Option<Rotated>,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl LogWriter {
    /// Opens the log at `path`, of at most `limit` bytes; none at all for none.
    pub(crate) fn open(path: PathBuf, limit: u64) -> io::Result<Self> {
        let file = (limit > 0).then(|| Rotated::open(path, limit));
        Ok(Self {
            file: file.transpose()?,
            stdout: Vec::new(),
            stderr: Vec::new(),
        })
    }

    /// Takes output; the unfinished last line waits for its rest.
    pub(crate) fn take(&mut self, stream: LogStream, data: &[u8]) -> io::Result<()> {
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        let partial = match stream {
            LogStream::Stdout => &mut self.stdout,
            LogStream::Stderr => &mut self.stderr,
        };
        partial.extend_from_slice(data);
        let mut entries = Vec::new();
        let time = Timestamp::now();
        let mut start = 0;
        while let Some(length) = piece(&partial[start..]) {
            write(&mut entries, &partial[start..start + length], stream, time)?;
            start += length;
        }
        partial.drain(..start);
        if entries.is_empty() {
            return Ok(());
        }
        file.append(&entries)
    }

    /// Writes unfinished lines as they are.
    pub(crate) fn finish(&mut self) -> io::Result<()> {
        let mut entries = Vec::new();
        let time = Timestamp::now();
        for (stream, partial) in [
            (LogStream::Stdout, &mut self.stdout),
            (LogStream::Stderr, &mut self.stderr),
        ] {
            if !partial.is_empty() {
                write(&mut entries, partial, stream, time)?;
                partial.clear();
            }
        }
        match &mut self.file {
            Some(file) => file.append(&entries),
            None => Ok(()),
        }
    }
}

/// The length of the first piece of `bytes` that is ready to be written.
fn piece(bytes: &[u8]) -> Option<usize> {
    match bytes.iter().take(MAX_PIECE).position(|&byte| byte == b'\n') {
        Some(newline) => Some(newline + 1),
        None if bytes.len() >= MAX_PIECE => Some(whole_characters(&bytes[..MAX_PIECE])),
        None => None,
    }
}

/// The longest beginning of `bytes` that doesn't cut a UTF-8 character.
fn whole_characters(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() && error.valid_up_to() > 0 => error.valid_up_to(),
        _ => bytes.len(),
    }
}

fn write(out: &mut Vec<u8>, text: &[u8], stream: LogStream, time: Timestamp) -> io::Result<()> {
    let log = String::from_utf8_lossy(text);
    serde_json::to_writer(&mut *out, &Line { log, stream, time })?;
    out.push(b'\n');
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::reader::LogFile;
    use super::*;

    fn read(path: &Path) -> Vec<(String, bool)> {
        let mut log = LogFile::open(path).unwrap();
        let mut entries = Vec::new();
        while let Some(entry) = log.next().unwrap() {
            let text = String::from_utf8(entry.log).unwrap();
            entries.push((text, entry.stderr));
        }
        entries
    }

    #[test]
    fn lines_are_whole_and_streams_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), 1 << 20).unwrap();
        log.take(LogStream::Stdout, b"one\ntw").unwrap();
        log.take(LogStream::Stderr, b"err\xff\n").unwrap();
        log.take(LogStream::Stdout, b"o\nthree").unwrap();
        log.finish().unwrap();
        let expected = [
            ("one\n", false),
            ("err\u{fffd}\n", true),
            ("two\n", false),
            ("three", false),
        ];
        let expected: Vec<_> = expected
            .map(|(text, stderr)| (text.to_owned(), stderr))
            .into();
        assert_eq!(read(&path), expected);
    }

    #[test]
    fn a_line_without_end_is_cut_between_characters() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), 1 << 20).unwrap();
        let text = "€".repeat(20_000);
        log.take(LogStream::Stdout, text.as_bytes()).unwrap();
        log.finish().unwrap();
        let pieces = read(&path);
        assert!(pieces.iter().all(|(piece, _)| piece.len() <= MAX_PIECE));
        assert_eq!(
            pieces
                .iter()
                .map(|(piece, _)| piece.as_str())
                .collect::<String>(),
            text
        );
    }

    #[test]
    fn a_reader_follows_through_rotations() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log.json");
        let mut log = LogWriter::open(path.clone(), 2000).unwrap();
        let mut reader = LogFile::open(&path).unwrap();
        for number in 0..100 {
            log.take(LogStream::Stdout, format!("{number}\n").as_bytes())
                .unwrap();
            let line = format!("{number}\n");
            assert_eq!(reader.next().unwrap().unwrap().log, line.as_bytes());
            assert!(reader.next().unwrap().is_none());
        }
        let mut again = LogFile::open(&path).unwrap();
        let last: Vec<_> = again
            .tail(2)
            .unwrap()
            .into_iter()
            .map(|entry| entry.log)
            .collect();
        assert_eq!(last, [b"98\n", b"99\n"]);
    }
}
