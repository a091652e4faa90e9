//! Ids and names: 64 hexadecimal digits for machines, `adjective_noun` for people.

use std::mem::MaybeUninit;

use rustix::rand::{GetRandomFlags, getrandom};

const ADJECTIVES: [&str; 48] = [
    "able", "agile", "amber", "ample", "azure", "bold", "brave", "bright", "brisk", "calm",
    "clear", "clever", "cosy", "crisp", "daring", "eager", "early", "fair", "firm", "fleet",
    "fond", "frank", "fresh", "gentle", "glad", "golden", "grand", "happy", "hardy", "jolly",
    "keen", "kind", "lively", "loyal", "lucid", "mellow", "merry", "mild", "neat", "noble",
    "patient", "proud", "quick", "quiet", "sharp", "steady", "sunny", "swift",
];

/// Ships, their parts, and what they meet.
const NOUNS: [&str; 48] = [
    "anchor", "barge", "beacon", "bow", "breeze", "bridge", "brig", "buoy", "cabin", "canoe",
    "captain", "clipper", "compass", "coral", "cove", "current", "cutter", "deck", "dinghy",
    "dock", "dolphin", "ferry", "fjord", "galley", "gull", "harbour", "haven", "heron", "island",
    "kayak", "keel", "ketch", "lagoon", "lantern", "mast", "pilot", "quay", "reef", "rigging",
    "rudder", "sail", "schooner", "sextant", "shoal", "sloop", "tide", "tugboat", "voyage",
];

/// A fresh id.
pub(crate) fn id() -> String {
    random::<32>()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// A name for people; from the second attempt on with a number, as names run out.
pub(crate) fn made_up(attempt: u32) -> String {
    let [a, b, c] = random::<3>();
    let adjective = ADJECTIVES[usize::from(a) % ADJECTIVES.len()];
    let noun = NOUNS[usize::from(b) % NOUNS.len()];
    if attempt < 2 {
        format!("{adjective}_{noun}")
    } else {
        format!("{adjective}_{noun}{}", u32::from(c) + (attempt << 8))
    }
}

/// Whether this can be an id: one of ours, or a caller's, who may choose any name but that of the
/// place where monitors mount.
pub(crate) fn is_id(text: &str) -> bool {
    is_name(text) && text != MOUNTS
}

/// Where monitors mount, among the run directories of containers.
pub(crate) const MOUNTS: &str = "mnt";

/// Whether this can be a container's name, and so a file's.
pub(crate) fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    text.len() <= 128
        && bytes
            .next()
            .is_some_and(|byte| byte.is_ascii_alphanumeric())
        && bytes.all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

/// Fresh random bytes of the kernel's.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        let mut chunk = [MaybeUninit::<u8>::uninit(); 64];
        let want = (N - filled).min(chunk.len());
        // Only an interruption can fail here, and it is tried again.
        if let Ok((fresh, _)) = getrandom(&mut chunk[..want], GetRandomFlags::empty()) {
            bytes[filled..filled + fresh.len()].copy_from_slice(fresh);
            filled += fresh.len();
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_and_names_have_their_shape() {
        let first = id();
        assert!(is_id(&first));
        assert_ne!(first, id());
        assert!(is_id("web-1") && !is_id(MOUNTS));
        for attempt in 0..4 {
            assert!(is_name(&made_up(attempt)));
        }
    }

    #[test]
    fn what_could_leave_the_directory_is_no_name() {
        for text in ["", ".", "..", "../x", "a/b", "-a", "_a", &"a".repeat(129)] {
            assert!(!is_name(text), "{text}");
        }
    }
}
