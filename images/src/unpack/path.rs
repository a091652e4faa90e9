//! Names in archives.
//!
//! Owns: taking a tar name apart into components that are safe to look up one by one, and telling
//! whiteouts from files. Refuses: `..` in any place, NUL, names longer than the kernel takes. A
//! leading `/` is dropped, as Docker does: every name is relative to the layer's root.

use super::Limits;
use super::error::{Result, UnpackError, quoted, refused};

const WHITEOUT: &[u8] = b".wh.";
const METADATA: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";

/// A cleaned name: components without `/`, NUL, `.` and `..`, none empty. No components: the root.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Name {
    /// Components joined by `/`.
    joined: Vec<u8>,
    /// Where the last component begins.
    last: usize,
}

/// What an entry's name asks for (image-spec layer.md "Whiteouts").
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// The entry itself.
    Entry(Name),
    /// The lower layers' file of this name is gone.
    Whiteout(Name),
    /// The lower layers' content of this directory is gone.
    Opaque(Name),
    /// Bookkeeping of aufs, of no use to others.
    Ignored,
}

impl Name {
    pub(super) fn parse(raw: &[u8], limits: &Limits) -> Result<Self> {
        if raw.is_empty() {
            return Err(refused(raw, "its name is empty"));
        }
        if raw.len() > limits.path_bytes {
            let text = format!("the path {} has {} bytes", quoted(raw), raw.len());
            return Err(UnpackError::Limit(format!(
                "{text}, at most {}",
                limits.path_bytes
            )));
        }
        if raw.contains(&0) {
            return Err(refused(raw, "its name holds a NUL byte"));
        }
        let mut name = Self::default();
        let mut depth = 0;
        for component in raw.split(|b| *b == b'/') {
            match component {
                b"" | b"." => {}
                b".." => return Err(refused(raw, "its name holds \"..\"")),
                long if long.len() > 255 => {
                    return Err(refused(raw, "a part of its name is longer than 255 bytes"));
                }
                component => {
                    depth += 1;
                    name.push(component);
                }
            }
        }
        if depth > limits.depth {
            let text = format!("the path {} is {depth} deep", quoted(raw));
            return Err(UnpackError::Limit(format!(
                "{text}, at most {}",
                limits.depth
            )));
        }
        Ok(name)
    }

    fn push(&mut self, component: &[u8]) {
        if !self.joined.is_empty() {
            self.joined.push(b'/');
        }
        self.last = self.joined.len();
        self.joined.extend_from_slice(component);
    }

    pub(super) fn is_root(&self) -> bool {
        self.joined.is_empty()
    }

    /// All components joined by `/`; empty for the root.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.joined
    }

    /// The last component; empty for the root.
    pub(super) fn last(&self) -> &[u8] {
        &self.joined[self.last..]
    }

    /// All but the last component, joined by `/`.
    pub(super) fn parent(&self) -> &[u8] {
        &self.joined[..self.last.saturating_sub(1)]
    }

    fn with_last(&self, last: &[u8]) -> Self {
        let mut joined = self.joined[..self.last].to_vec();
        joined.extend_from_slice(last);
        Self {
            joined,
            last: self.last,
        }
    }

    fn to_parent(&self) -> Self {
        let joined = self.parent().to_vec();
        let last = joined
            .iter()
            .rposition(|b| *b == b'/')
            .map_or(0, |slash| slash + 1);
        Self { joined, last }
    }
}

impl Meaning {
    pub(super) fn of(raw: &[u8], limits: &Limits) -> Result<Self> {
        let name = Name::parse(raw, limits)?;
        if name
            .joined
            .split(|b| *b == b'/')
            .rev()
            .skip(1)
            .any(|c| c.starts_with(METADATA))
        {
            return Ok(Self::Ignored);
        }
        if name
            .parent()
            .split(|b| *b == b'/')
            .any(|c| c.starts_with(WHITEOUT))
        {
            return Err(refused(raw, "it is below a whiteout"));
        }
        let last = name.last();
        if last == OPAQUE {
            return Ok(Self::Opaque(name.to_parent()));
        }
        if last.starts_with(METADATA) {
            return Ok(Self::Ignored);
        }
        match last.strip_prefix(WHITEOUT) {
            None => Ok(Self::Entry(name)),
            Some(b"" | b"." | b"..") => Err(refused(raw, "the whiteout names no file")),
            Some(hidden) => Ok(Self::Whiteout(name.with_last(hidden))),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn meaning(raw: &[u8]) -> Result<Meaning> {
        Meaning::of(raw, &Limits::default())
    }

    fn name(raw: &[u8]) -> Name {
        Name::parse(raw, &Limits::default()).unwrap()
    }

    #[test]
    fn names_are_cleaned() {
        for (raw, clean, parent, last) in [
            (&b"./a/b"[..], &b"a/b"[..], &b"a"[..], &b"b"[..]),
            (b"/etc/passwd", b"etc/passwd", b"etc", b"passwd"),
            (b"a//b/./c/", b"a/b/c", b"a/b", b"c"),
            (b"x", b"x", b"", b"x"),
            (b"./", b"", b"", b""),
            (b"/", b"", b"", b""),
        ] {
            let name = name(raw);
            assert_eq!(
                (name.as_bytes(), name.parent(), name.last()),
                (clean, parent, last)
            );
        }
    }

    #[test]
    fn dangerous_names_are_refused() {
        let long = vec![b'a'; 256];
        let deep = b"a/".repeat(256);
        let huge = b"ab/".repeat(1400);
        for raw in [
            &b""[..],
            b"..",
            b"../x",
            b"a/../b",
            b"a/..",
            b"/..",
            b"a\0b",
            &long,
            &deep,
            &huge,
            b".wh...",
            b".wh..",
            b".wh.",
            b"a/.wh...",
            b".wh.a/b",
            b"a/.wh.b/c",
        ] {
            assert!(meaning(raw).is_err(), "{}", String::from_utf8_lossy(raw));
        }
    }

    #[test]
    fn whiteouts_are_told_apart() {
        assert_eq!(
            meaning(b"a/.wh.b").unwrap(),
            Meaning::Whiteout(name(b"a/b"))
        );
        assert_eq!(meaning(b".wh.b").unwrap(), Meaning::Whiteout(name(b"b")));
        assert_eq!(
            meaning(b"a/b/.wh..wh..opq").unwrap(),
            Meaning::Opaque(name(b"a/b"))
        );
        assert_eq!(
            meaning(b".wh..wh..opq").unwrap(),
            Meaning::Opaque(name(b"."))
        );
        assert_eq!(meaning(b".wh..wh.plnk").unwrap(), Meaning::Ignored);
        assert_eq!(meaning(b".wh..wh.plnk/7.8").unwrap(), Meaning::Ignored);
        assert_eq!(
            meaning(b"a/.whatever").unwrap(),
            Meaning::Entry(name(b"a/.whatever"))
        );
        assert_eq!(
            meaning(b".wh....").unwrap(),
            Meaning::Whiteout(name(b"..."))
        );
    }

    proptest! {
        #[test]
        fn no_name_leaves_the_root(raw in proptest::collection::vec(
            prop_oneof![Just(b'/'), Just(b'.'), Just(b'a'), Just(b'w'), Just(b'h'), any::<u8>()],
            0..60,
        )) {
            let names = match meaning(&raw) {
                Ok(Meaning::Entry(n) | Meaning::Whiteout(n) | Meaning::Opaque(n)) => vec![n],
                _ => vec![],
            };
            for name in names.iter().filter(|n| !n.is_root()) {
                for component in name.as_bytes().split(|b| *b == b'/') {
                    prop_assert!(!matches!(component, b"" | b"." | b".."));
                    prop_assert!(!component.contains(&0));
                }
                let mut joined = name.parent().to_vec();
                if !joined.is_empty() {
                    joined.push(b'/');
                }
                joined.extend_from_slice(name.last());
                prop_assert_eq!(&joined[..], name.as_bytes());
            }
        }
    }
}
