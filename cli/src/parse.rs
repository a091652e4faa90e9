//! Docker's notations, each read by one function.
//!
//! Owns: sizes, limits, times, mounts, environment, detach keys as people type them. Refuses:
//! defaults and the meaning of what was read; those are the engine's.

mod environment;
mod keys;
mod mount;
mod quantity;
mod ulimit;

pub(crate) use environment::{Variable, env_file, variable};
pub(crate) use keys::detach_keys;
pub(crate) use mount::{Mount, mount, tmpfs, volume};
pub(crate) use quantity::{cpus, memory, moment, whole_seconds};
pub(crate) use ulimit::ulimit;

/// A value that isn't what its flag takes. Clap puts the flag and the value before it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Invalid(String);

impl Invalid {
    /// The reason, in a person's words.
    pub(crate) fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }
}

impl std::fmt::Display for Invalid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Invalid {}

/// Reads `key=value`; a bare key has an empty value, as labels do.
pub(crate) fn label(text: &str) -> Result<(String, String), Invalid> {
    let (key, value) = text.split_once('=').unwrap_or((text, ""));
    if key.is_empty() {
        return Err(Invalid::new("a label needs a name"));
    }
    Ok((key.to_owned(), value.to_owned()))
}

/// Reads `key=value` where both sides are needed, as `--sysctl` and `--filter` have it.
pub(crate) fn pair(text: &str) -> Result<(String, String), Invalid> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(Invalid::new("expected NAME=VALUE")),
    }
}

/// Reads a signal's name or number and gives it back as it was written.
pub(crate) fn signal(text: &str) -> Result<String, Invalid> {
    hull_sandbox::parse_signal(text)
        .map(|_| text.to_owned())
        .map_err(|error| Invalid::new(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_label_is_empty_and_a_nameless_one_refused() {
        assert_eq!(label("a=b=c").unwrap(), ("a".into(), "b=c".into()));
        assert_eq!(label("a").unwrap(), ("a".into(), String::new()));
        assert!(label("=b").is_err());
    }

    #[test]
    fn a_pair_needs_both_sides() {
        assert_eq!(pair("status=").unwrap(), ("status".into(), String::new()));
        assert!(pair("status").is_err());
        assert!(pair("=x").is_err());
    }
}
