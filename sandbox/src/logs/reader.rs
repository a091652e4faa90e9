//! Reading a log: what is there, and with `follow` what comes.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};

use crate::control::{self, Request};
use crate::engine::EngineError;
use crate::rotate::older;

use super::{Line, LogStream, MAX_PIECE};

/// Longest line of the file that a reader takes: a piece of control characters, escaped.
const MAX_ENTRY: u64 = 8 * MAX_PIECE as u64;

/// A line (or a piece of one) of a container's output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// The bytes, with the newline if there was one.
    pub log: Vec<u8>,
    /// Whether it went to stderr.
    pub stderr: bool,
    /// When it was taken.
    pub time: Timestamp,
}

/// How to read a container's log.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// Goes on until the container ends.
    pub follow: bool,
    /// Only this many of the last lines.
    pub tail: Option<usize>,
}

/// Entries of a log, one after the other; with `follow`, `next` waits.
#[derive(Debug)]
pub struct LogReader {
    file: LogFile,
    ready: VecDeque<LogEntry>,
    follow: Option<Follow>,
}

/// What tells that there is more, or that there will be no more.
#[derive(Debug)]
struct Follow {
    changes: OwnedFd,
    /// Hangs up when the monitor is gone or the container has ended.
    monitor: UnixStream,
    ended: bool,
}

impl LogReader {
    /// Opens the log at `path`; goes on for as long as `monitor` is connected.
    pub(crate) fn open(
        path: &Path,
        options: &LogOptions,
        monitor: Option<UnixStream>,
    ) -> io::Result<Self> {
        let follow = monitor
            .map(|monitor| Follow::new(path, monitor))
            .transpose()?;
        let mut file = LogFile::open(path)?;
        let ready = match options.tail {
            Some(count) => file.tail(count)?,
            None => VecDeque::new(),
        };
        Ok(Self {
            file,
            ready,
            follow,
        })
    }

    fn advance(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(Some(entry));
            }
            // Looked at before reading, so that nothing said before the end is missed.
            let over = self.follow.as_ref().is_none_or(|follow| follow.ended);
            if let Some(entry) = self.file.next()? {
                return Ok(Some(entry));
            }
            match &mut self.follow {
                Some(follow) if !over => follow.wait()?,
                _ => return Ok(None),
            }
        }
    }
}

impl Iterator for LogReader {
    type Item = Result<LogEntry, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.advance()
            .map_err(|source| EngineError::Host {
                action: format!("read \"{}\"", self.file.path.display()),
                source,
            })
            .transpose()
    }
}

impl Follow {
    fn new(path: &Path, monitor: UnixStream) -> io::Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let wanted = WatchFlags::MODIFY | WatchFlags::CREATE | WatchFlags::MOVED_FROM;
        let directory = path.parent().unwrap_or(Path::new("/"));
        inotify::add_watch(&changes, directory, wanted)?;
        let asked = control::ask(&monitor, Request::Wait);
        Ok(Self {
            changes,
            monitor,
            ended: asked.is_err(),
        })
    }

    /// Waits until there may be more, or the end has come.
    fn wait(&mut self) -> io::Result<()> {
        let mut fds = [
            PollFd::new(&self.changes, PollFlags::IN),
            PollFd::new(&self.monitor, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ended = !fds[1].revents().is_empty();
        let mut events = [0; 4096];
        // What changed doesn't matter; that it did has been seen.
        while rustix::io::read(&self.changes, &mut events).is_ok_and(|count| count > 0) {}
        self.ended = ended;
        Ok(())
    }
}

fn parse(line: &[u8]) -> io::Result<LogEntry> {
    let line: Line<'_> = serde_json::from_slice(line)?;
    Ok(LogEntry {
        log: line.log.into_owned().into_bytes(),
        stderr: line.stream == LogStream::Stderr,
        time: line.time,
    })
}

/// Reads entries, the oldest first, through the rotation.
#[derive(Debug)]
pub(super) struct LogFile {
    path: PathBuf,
    open: Option<BufReader<File>>,
    inode: u64,
    partial: Vec<u8>,
}

impl LogFile {
    /// Opens the log at `path`; there need not be one yet.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let mut log = Self {
            path: path.to_owned(),
            open: None,
            inode: 0,
            partial: Vec::new(),
        };
        if !log.switch_to(&older(path))? {
            log.switch_to(path)?;
        }
        Ok(log)
    }

    /// The next entry that is there by now.
    pub(super) fn next(&mut self) -> io::Result<Option<LogEntry>> {
        loop {
            if let Some(reader) = &mut self.open {
                let room = MAX_ENTRY.saturating_sub(self.partial.len() as u64);
                let mut limited = io::Read::take(&mut *reader, room);
                limited.read_until(b'\n', &mut self.partial)?;
                if self.partial.last() == Some(&b'\n') {
                    let entry = parse(&self.partial);
                    self.partial.clear();
                    return entry.map(Some);
                }
                if self.partial.len() as u64 >= MAX_ENTRY {
                    return Err(io::ErrorKind::InvalidData.into());
                }
            }
            // At the end: of the newest file, or of one that has been rotated away.
            let current = match std::fs::metadata(&self.path) {
                Ok(metadata) => metadata.ino(),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            };
            if self.open.is_some() && current == self.inode {
                return Ok(None);
            }
            self.partial.clear();
            let path = self.path.clone();
            if !self.switch_to(&path)? {
                return Ok(None);
            }
        }
    }

    /// The last `count` entries that are there by now; what follows comes from [`Self::next`].
    pub(super) fn tail(&mut self, count: usize) -> io::Result<VecDeque<LogEntry>> {
        let mut last = VecDeque::new();
        while let Some(entry) = self.next()? {
            if last.len() == count {
                last.pop_front();
            }
            if count > 0 {
                last.push_back(entry);
            }
        }
        Ok(last)
    }

    fn switch_to(&mut self, path: &Path) -> io::Result<bool> {
        match File::open(path) {
            Ok(file) => {
                self.inode = file.metadata()?.ino();
                self.open = Some(BufReader::new(file));
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }
}
