//! What the host says while a person waits.
//!
//! Owns: where the steps go. Refuses: to know about terminals; `xtask` draws its spinner by
//! giving a listener of its own.

use std::fmt;
use std::sync::Arc;

/// Where steps are told. Cloning shares the listener.
#[derive(Clone)]
pub struct Report(Arc<dyn Fn(&str) + Send + Sync>);

impl Report {
    /// Tells each step to `listener`, in lower case and without a full stop.
    pub fn to(listener: impl Fn(&str) + Send + Sync + 'static) -> Self {
        Self(Arc::new(listener))
    }

    /// A step begins.
    pub fn step(&self, text: &str) {
        (self.0)(text);
    }
}

impl Default for Report {
    /// Lines on stderr.
    fn default() -> Self {
        Self::to(|text| eprintln!("host: {text}"))
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Report")
    }
}
