//! Names of images, by Docker's rules.
//!
//! Owns: parsing `alpine`, `alpine:3`, `localhost:5000/a/b@sha256:…` and saying them again, in
//! full or as people write them. Refuses: I/O; what a name points to is the store's business.
//!
//! Grammar: `github.com/distribution/reference`; the defaults (`docker.io`, `library/`, `latest`)
//! are Docker's `ParseDockerRef`. The parser is our own because each start runs it: the registry
//! client's compiles a regular expression first, at 248 M instructions.

use std::fmt;
use std::str::FromStr;

use crate::digest::Digest;

mod grammar;

const HUB: &str = "docker.io";
/// The Hub's name in old references.
const HUB_OLD: &str = "index.docker.io";
const OFFICIAL: &str = "library/";
const LATEST: &str = "latest";

/// Longest reference, in bytes.
const MAX_TEXT: usize = 1024;
/// Longest repository, in bytes.
const MAX_REPOSITORY: usize = 255;

/// A complete image reference: registry, repository, and a tag or a digest or both.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a text is not an image reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// The grammar is broken.
    #[error("invalid reference format: {text:?}{}", reason_suffix(.reason))]
    Format {
        /// What was given.
        text: String,
        /// What is wrong, if more can be said.
        reason: Option<&'static str>,
    },
}

fn reason_suffix(reason: &Option<&'static str>) -> String {
    reason.map(|r| format!(": {r}")).unwrap_or_default()
}

impl Reference {
    /// Parses a reference with Docker's defaults filled in.
    ///
    /// # Errors
    /// [`ReferenceError`] naming the text and, where known, the rule it breaks.
    pub fn parse(text: &str) -> Result<Self, ReferenceError> {
        grammar::parse(text).map_err(|reason| ReferenceError::Format {
            text: text.chars().take(300).collect(),
            reason,
        })
    }

    /// Host and port of the registry, `docker.io` for Docker Hub.
    #[must_use]
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// Host and port that requests go to (Docker Hub answers on another host than its name).
    #[must_use]
    pub fn registry_address(&self) -> &str {
        match self.registry() {
            HUB => HUB_OLD,
            registry => registry,
        }
    }

    /// Path of the repository in its registry, e.g. `library/alpine`.
    #[must_use]
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, `latest` when neither tag nor digest was given.
    #[must_use]
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if the reference is pinned.
    #[must_use]
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// Registry and repository, without tag and digest: `docker.io/library/alpine`.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}/{}", self.registry(), self.repository())
    }

    /// The repository as people write it: `alpine`, not `docker.io/library/alpine`.
    #[must_use]
    pub fn familiar_name(&self) -> String {
        if self.registry() == HUB {
            let repository = self.repository();
            match repository.strip_prefix(OFFICIAL) {
                Some(short) if !short.contains('/') => short.to_owned(),
                _ => repository.to_owned(),
            }
        } else {
            self.name()
        }
    }

    /// The whole reference as people write it: `alpine:3`.
    #[must_use]
    pub fn familiar(&self) -> String {
        let mut text = self.familiar_name();
        if let Some(tag) = self.tag() {
            text = format!("{text}:{tag}");
        }
        match &self.digest {
            Some(digest) => format!("{text}@{digest}"),
            None => text,
        }
    }

    /// The same repository, pinned to `digest`, without a tag.
    #[must_use]
    pub fn with_digest(&self, digest: &Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest.clone()),
            ..self.clone()
        }
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text)
    }
}

/// In full: `docker.io/library/alpine:3`.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PartialOrd for Reference {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Reference {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.to_string().cmp(&other.to_string())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn docker_defaults() {
        let digest = format!("sha256:{}", "a".repeat(64));
        for (text, full, familiar) in [
            ("alpine", "docker.io/library/alpine:latest", "alpine:latest"),
            ("alpine:3", "docker.io/library/alpine:3", "alpine:3"),
            (
                "docker.io/alpine",
                "docker.io/library/alpine:latest",
                "alpine:latest",
            ),
            ("index.docker.io/a/b", "docker.io/a/b:latest", "a/b:latest"),
            ("a/b", "docker.io/a/b:latest", "a/b:latest"),
            ("localhost/a", "localhost/a:latest", "localhost/a:latest"),
            (
                "localhost:5000/a:1",
                "localhost:5000/a:1",
                "localhost:5000/a:1",
            ),
            (
                "127.0.0.1:5000/a/b/c",
                "127.0.0.1:5000/a/b/c:latest",
                "127.0.0.1:5000/a/b/c:latest",
            ),
            (
                "ghcr.io/o/i:v1.2-x",
                "ghcr.io/o/i:v1.2-x",
                "ghcr.io/o/i:v1.2-x",
            ),
            (
                &format!("alpine@{digest}"),
                &format!("docker.io/library/alpine@{digest}"),
                &format!("alpine@{digest}"),
            ),
            (
                &format!("alpine:3@{digest}"),
                &format!("docker.io/library/alpine:3@{digest}"),
                &format!("alpine:3@{digest}"),
            ),
        ] {
            let reference = Reference::parse(text).unwrap();
            assert_eq!(reference.to_string(), full, "{text}");
            assert_eq!(reference.familiar(), familiar, "{text}");
            assert_eq!(Reference::parse(full).unwrap(), reference, "{text}");
        }
        assert_eq!(
            Reference::parse("alpine").unwrap().registry_address(),
            "index.docker.io"
        );
    }

    #[test]
    fn refusals_say_why() {
        for (text, words) in [
            ("", "empty"),
            ("Alpine", "lowercase"),
            ("a b", "invalid reference format: \"a b\""),
            ("../etc/passwd", "invalid reference format"),
            ("alpine:", "invalid reference format"),
            ("alpine@sha256:abc", "invalid reference format"),
            (
                &format!("alpine@sha256:{}", "a".repeat(63)),
                "digest is malformed",
            ),
            (&format!("alpine@sha512:{}", "a".repeat(128)), "only sha256"),
            (&format!("alpine@md5:{}", "a".repeat(32)), "only sha256"),
            (&"a".repeat(64), "image ID"),
            (&"a/".repeat(600), "too long"),
            (&format!("x/{}", "b".repeat(256)), "255"),
        ] {
            let error = Reference::parse(text).unwrap_err().to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in "\\PC{0,80}") {
            let _ = Reference::parse(&text);
        }

        #[test]
        fn what_is_said_parses_again(
            host in "([a-z]{1,8}\\.[a-z]{2,4}(:[0-9]{2,4})?/)?",
            path in "[a-z0-9]{1,8}(/[a-z0-9]{1,8}){0,3}",
            tag in "(:[a-zA-Z0-9_][a-zA-Z0-9._-]{0,20})?",
        ) {
            let reference = Reference::parse(&format!("{host}{path}{tag}")).unwrap();
            prop_assert_eq!(&Reference::parse(&reference.to_string()).unwrap(), &reference);
            prop_assert_eq!(&Reference::parse(&reference.familiar()).unwrap(), &reference);
        }

        /// `oci-spec` reads names by the same grammar, but for IPv6 and capitals in domains.
        #[test]
        fn others_read_the_same(
            text in "(([a-z0-9.:-]{1,6}|localhost|docker\\.io)/)?[a-z0-9._/-]{0,8}(:[a-z0-9._-]{0,4})?(@sha256:[0-9a-f]{64})?",
        ) {
            let ours = Reference::parse(&text);
            let theirs = oci_spec::distribution::Reference::from_str(&text);
            match (ours, theirs) {
                (Ok(ours), Ok(theirs)) => {
                    prop_assert_eq!(ours.to_string(), theirs.to_string());
                    prop_assert_eq!(ours.registry_address(), theirs.resolve_registry());
                }
                (Err(_), Err(_)) => {}
                (ours, theirs) => panic!("{text}: {ours:?} {theirs:?}"),
            }
        }
    }
}
