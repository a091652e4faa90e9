//! What the monitor itself has to say: warnings, and a bug's last words.
//! A bounded file beside the guest's console; `hull logs --boot` shows both.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::{LevelFilter, Log, Metadata, Record};

/// Bytes that it may take: a guest can provoke warnings.
const LIMIT: usize = 64 * 1024;

static JOURNAL: Journal = Journal {
    file: OnceLock::new(),
    taken: AtomicUsize::new(0),
};

struct Journal {
    file: OnceLock<File>,
    taken: AtomicUsize,
}

/// Begins a new journal at `path`. Without one the monitor works as well, and says nothing.
pub(super) fn begin(path: &Path) {
    let mut options = File::options();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    if let Ok(file) = options.open(path)
        && JOURNAL.file.set(file).is_ok()
        && log::set_logger(&JOURNAL).is_ok()
    {
        log::set_max_level(LevelFilter::Warn);
        std::panic::set_hook(Box::new(|panic| JOURNAL.say(&format!("bug: {panic}"))));
    }
}

impl Journal {
    fn say(&self, text: &str) {
        let line = format!("{text}\n");
        let before = self.taken.fetch_add(line.len(), Ordering::Relaxed);
        if before < LIMIT
            && let Some(mut file) = self.file.get()
        {
            // A full disk is no reason to stop.
            let _ = file.write_all(line.as_bytes());
        }
    }
}

impl Log for Journal {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= LevelFilter::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            self.say(&format!(
                "{}: {}",
                record.level().as_str().to_lowercase(),
                record.args()
            ));
        }
    }

    fn flush(&self) {}
}
