//! The log: lines as containerd's own shims write them, to the fifo that containerd reads.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::Context;
use jiff::Timestamp;
use log::{LevelFilter, Log, Metadata, Record};
use rustix::fs::{Mode, OFlags};

/// Its name in a bundle.
const FIFO: &str = "log";

struct FifoLog {
    fifo: File,
    about: String,
}

/// Logs to the fifo of `bundle` from here on.
pub(crate) fn to_fifo(bundle: &Path, namespace: &str, id: &str, debug: bool) -> anyhow::Result<()> {
    let path = bundle.join(FIFO);
    // With a reader of our own it outlives containerd's, who comes back; full, it loses lines.
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fifo = rustix::fs::open(&path, flags, Mode::empty())
        .with_context(|| format!("cannot open \"{}\"", path.display()))?;
    log::set_boxed_logger(Box::new(FifoLog {
        fifo: fifo.into(),
        about: format!("id={id} namespace={namespace} runtime={}", crate::RUNTIME),
    }))?;
    log::set_max_level(if debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    });
    Ok(())
}

impl Log for FifoLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The library tells its own comings and goings at the level of ours.
        !metadata.target().starts_with("ttrpc") || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = format!(
            "time=\"{}\" level={} msg={:?} {}\n",
            Timestamp::now(),
            record.level().as_str().to_lowercase(),
            record.args().to_string(),
            self.about
        );
        // In one write, which a pipe takes whole.
        let _ = (&self.fifo).write_all(line.as_bytes());
    }

    fn flush(&self) {}
}
