//! What this host must have for VMs to start: facts, what is wrong, how to mend it. Prints
//! nothing.

use serde::Serialize;

use crate::settings::Settings;

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at, a few words.
    pub subject: String,
    /// How it stands.
    pub health: Health,
    /// What was seen.
    pub seen: String,
    /// What to do about it, when there is something to do.
    pub remedy: Option<String>,
}

/// How a finding stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Health {
    /// As needed.
    Good,
    /// Something works less well or not at all, but VMs start.
    Limited,
    /// No VM starts.
    Broken,
}

/// Looks at everything.
#[must_use]
pub fn examine(settings: &Settings) -> Vec<Finding> {
    let _ = settings;
    Vec::new()
}
