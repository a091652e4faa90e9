//! Recognises the detach keys in what is typed.
//!
//! ```text
//! waiting for key 0 ──key 0──► waiting for key 1 ──key 1──► … ──last key──► detached
//!        ▲                          │ any other key: all that was held goes on
//!        └──────────────────────────┘ and the key is looked at again
//! ```

/// What has been typed so far of the sequence.
#[derive(Debug)]
pub(crate) struct DetachScanner {
    keys: Vec<u8>,
    matched: usize,
}

/// What to do with typed bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Scanned {
    /// Bytes for the container, without a sequence that is not yet complete.
    pub(crate) forward: Vec<u8>,
    /// Whether the sequence is complete. What was typed after it is dropped.
    pub(crate) detached: bool,
}

impl DetachScanner {
    /// Looks for `keys`; for nothing when there are none.
    pub(crate) fn new(keys: Vec<u8>) -> Self {
        Self { keys, matched: 0 }
    }

    /// Takes bytes as they are typed.
    pub(crate) fn feed(&mut self, typed: &[u8]) -> Scanned {
        let mut scanned = Scanned::default();
        if self.keys.is_empty() {
            scanned.forward.extend_from_slice(typed);
            return scanned;
        }
        for &byte in typed {
            self.step(byte, &mut scanned.forward);
            if self.matched == self.keys.len() {
                self.matched = 0;
                scanned.detached = true;
                break;
            }
        }
        scanned
    }

    fn step(&mut self, byte: u8, forward: &mut Vec<u8>) {
        // The longest end of what was typed that begins the sequence stays held.
        let held = self.matched;
        let mut typed = self.keys[..held].to_vec();
        typed.push(byte);
        let keep = (0..=typed.len())
            .rev()
            .find(|&count| self.keys.starts_with(&typed[typed.len() - count..]))
            .unwrap_or(0);
        forward.extend_from_slice(&typed[..typed.len() - keep]);
        self.matched = keep;
    }

    /// What is held and will not become a sequence any more: stdin has ended.
    pub(crate) fn rest(&mut self) -> Vec<u8> {
        let held = self.matched;
        self.matched = 0;
        self.keys[..held].to_vec()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn feed(keys: &[u8], pieces: &[&[u8]]) -> (Vec<u8>, bool) {
        let mut scanner = DetachScanner::new(keys.to_vec());
        let mut all = Vec::new();
        for piece in pieces {
            let scanned = scanner.feed(piece);
            all.extend(scanned.forward);
            if scanned.detached {
                return (all, true);
            }
        }
        all.extend(scanner.rest());
        (all, false)
    }

    #[test]
    fn the_sequence_detaches_and_is_not_forwarded() {
        assert_eq!(
            feed(b"\x10\x11", &[b"ab\x10\x11cd"]),
            (b"ab".to_vec(), true)
        );
        assert_eq!(
            feed(b"\x10\x11", &[b"ab\x10", b"\x11"]),
            (b"ab".to_vec(), true)
        );
    }

    #[test]
    fn half_a_sequence_goes_on_when_another_key_follows() {
        assert_eq!(
            feed(b"\x10\x11", &[b"\x10", b"x"]),
            (b"\x10x".to_vec(), false)
        );
        assert_eq!(
            feed(b"\x10\x11", &[b"\x10\x10\x11"]),
            (b"\x10".to_vec(), true)
        );
        assert_eq!(feed(b"aab", &[b"aaab"]), (b"a".to_vec(), true));
        assert_eq!(feed(b"\x10\x11", &[b"\x10"]), (b"\x10".to_vec(), false));
    }

    #[test]
    fn no_keys_never_detach() {
        assert_eq!(feed(b"", &[b"\x10\x11"]), (b"\x10\x11".to_vec(), false));
    }

    proptest! {
        #[test]
        fn it_finds_what_a_search_finds(
            keys in proptest::collection::vec(0_u8..3, 1..4),
            typed in proptest::collection::vec(0_u8..3, 0..40),
            cut in 1_usize..7,
        ) {
            let pieces: Vec<&[u8]> = typed.chunks(cut).collect();
            let expected = match typed.windows(keys.len()).position(|window| window == keys) {
                Some(at) => (typed[..at].to_vec(), true),
                None => (typed.clone(), false),
            };
            prop_assert_eq!(feed(&keys, &pieces), expected);
        }
    }
}
