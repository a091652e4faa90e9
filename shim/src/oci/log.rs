//! What this program says, where engines look for it: stderr, and the file of `--log`.

use std::fs::File;
use std::io::{self, Write};

use jiff::Timestamp;
use serde_json::json;

use crate::args::{Global, LogFormat};

/// The log.
#[derive(Debug)]
pub(crate) struct Log {
    file: Option<File>,
    format: LogFormat,
}

impl Log {
    /// The log that the flags name. One that can't be opened is no reason to fail.
    pub(crate) fn open(global: &Global) -> Self {
        let file = global.log.as_ref().and_then(|path| {
            let mut options = File::options();
            options.append(true).create(true).open(path).ok()
        });
        Self {
            file,
            format: global.log_format,
        }
    }

    /// Says an error with its causes.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        self.say("error", &describe(error));
        // Nothing more can be done about a stderr that doesn't work.
        let _ = writeln!(io::stderr(), "hull-oci: {}", describe(error));
    }

    /// Says what went wrong beside the point.
    pub(crate) fn warn(&self, error: &anyhow::Error) {
        self.say("warning", &describe(error));
    }

    fn say(&self, level: &str, message: &str) {
        let Some(mut file) = self.file.as_ref() else {
            return;
        };
        let time = Timestamp::now().to_string();
        let line = match self.format {
            LogFormat::Json => json!({"level": level, "msg": message, "time": time}).to_string(),
            LogFormat::Text => format!("time={time:?} level={level} msg={message:?}"),
        };
        let _ = writeln!(file, "{line}");
    }
}

fn describe(error: &anyhow::Error) -> String {
    let mut words: Vec<String> = error.chain().map(ToString::to_string).collect();
    // Transparent errors say what their source says.
    words.dedup();
    words.join(": ")
}
