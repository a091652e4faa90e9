//! The grammar of references, read by hand.
//!
//! ```text
//! reference := [domain "/"] component *("/" component) [":" tag] ["@" digest]
//! domain    := (label *("." label) | "[" ipv6 "]") [":" port]
//! label     := alphanumerics and "-", neither first nor last
//! component := lowercase alphanumerics, parted by ".", "_", "__" or any number of "-"
//! tag       := a word character, then at most 127 word characters, "." and "-"
//! ```

use std::net::Ipv6Addr;

use super::{HUB, HUB_OLD, LATEST, MAX_REPOSITORY, MAX_TEXT, OFFICIAL, Reference};
use crate::digest::Digest;

/// Why a text is refused, where more can be said than that it is.
type Reason = Option<&'static str>;

pub(super) fn parse(text: &str) -> Result<Reference, Reason> {
    if text.is_empty() {
        return Err(Some("the name is empty"));
    }
    if text.len() > MAX_TEXT {
        return Err(Some("it is too long"));
    }
    if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
        return Err(Some("64 hexadecimal digits are an image ID, not a name"));
    }
    let (named, digest) = match text.split_once('@') {
        Some((named, digest)) => (named, Some(parse_digest(digest)?)),
        None => (text, None),
    };
    let (domain, rest) = split_domain(named);
    // A colon before the last slash is a port's, of a domain that was told by its looks.
    let (path, tag) = match rest.split_once(':') {
        Some((path, tag)) => (path, Some(tag)),
        None => (rest, None),
    };
    if !is_domain(domain) || tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(None);
    }
    if !path.split('/').all(is_component) {
        let lowered = path.to_ascii_lowercase();
        return Err(match lowered.split('/').all(is_component) {
            true => Some("repository name must be lowercase"),
            false => None,
        });
    }
    let repository = match domain == HUB && !path.contains('/') {
        true => format!("{OFFICIAL}{path}"),
        false => path.to_owned(),
    };
    if repository.len() > MAX_REPOSITORY {
        return Err(Some("repository name must not be more than 255 characters"));
    }
    let tag = match (tag, &digest) {
        (Some(tag), _) => Some(tag.to_owned()),
        (None, None) => Some(LATEST.to_owned()),
        (None, Some(_)) => None,
    };
    Ok(Reference {
        registry: domain.to_owned(),
        repository,
        tag,
        digest,
    })
}

/// The first component is a domain if it looks like one: Docker's `splitDockerDomain`.
fn split_domain(named: &str) -> (&str, &str) {
    match named.split_once('/') {
        Some((HUB | HUB_OLD, rest)) => (HUB, rest),
        Some((first, rest))
            if first.contains(['.', ':'])
                || first == "localhost"
                || first.bytes().any(|b| b.is_ascii_uppercase()) =>
        {
            (first, rest)
        }
        _ => (HUB, named),
    }
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (domain, None),
    };
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit());
    let bracketed = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
    let is_host = match bracketed {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => host.split('.').all(is_label),
    };
    is_host && port.is_none_or(is_port)
}

fn is_label(label: &str) -> bool {
    !label.is_empty()
        && !label.starts_with('-')
        && !label.ends_with('-')
        && label
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-')
}

fn is_component(component: &str) -> bool {
    let is_separator = |b: u8| matches!(b, b'.' | b'_' | b'-');
    let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    let ends_in_words =
        bytes.first().copied().is_some_and(is_word) && bytes.last().copied().is_some_and(is_word);
    let parted = |run: &[u8]| matches!(run, b"." | b"_" | b"__") || run.iter().all(|b| *b == b'-');
    ends_in_words
        && bytes.iter().all(|b| is_word(*b) || is_separator(*b))
        && bytes
            .chunk_by(|a, b| is_separator(*a) == is_separator(*b))
            .all(|run| !is_separator(run[0]) || parted(run))
}

fn is_tag(tag: &str) -> bool {
    let is_word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let rest = match tag.as_bytes() {
        [first, rest @ ..] if is_word(*first) && rest.len() < 128 => rest,
        _ => return false,
    };
    rest.iter().all(|b| is_word(*b) || matches!(b, b'.' | b'-'))
}

fn parse_digest(text: &str) -> Result<Digest, Reason> {
    const MALFORMED: Reason = Some("the digest is malformed");
    let (algorithm, hex) = text.split_once(':').ok_or(MALFORMED)?;
    let is_hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let starts = algorithm
        .bytes()
        .next()
        .is_some_and(|b| b.is_ascii_alphabetic());
    if !starts || hex.len() < 32 || !hex.bytes().all(is_hex) {
        return Err(MALFORMED);
    }
    match algorithm {
        "sha256" => text.parse().map_err(|_| MALFORMED),
        _ => Err(Some("only sha256 digests are supported")),
    }
}
