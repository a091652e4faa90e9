//! Which pages a start from a template needs, in a file beside it.
//!
//! ```text
//! 0   CRC-32 of all that follows, 32 bits, little-endian as everything here
//! 4   runs of pages: the first page's number, 32 bits, and how many they are, 31 bits; the
//!     last bit says that they are written. First those touched, then those written.
//! ```
//!
//! Owns that form. It is advice for the memory of one copy, which checks every range anyway.

use std::ops::Range;

use hull_vmm::memory::WorkingSet;

const PAGE: u64 = 4096;
const WRITTEN: u32 = 1 << 31;
/// The most runs that are kept: a start that needs more is none to learn from.
const MOST_RUNS: usize = 16 * 1024;

/// The set as a file's content; `None` for one that is too large to be of use.
pub(super) fn encode(set: &WorkingSet) -> Option<Vec<u8>> {
    let runs = set.touched.iter().map(|run| (run, 0));
    let runs = runs.chain(set.written.iter().map(|run| (run, WRITTEN)));
    let mut bytes = vec![0; 4];
    for (run, flag) in runs {
        let first = u32::try_from(run.start / PAGE).ok()?;
        let count = u32::try_from((run.end - run.start) / PAGE).ok()?;
        bytes.extend_from_slice(&first.to_le_bytes());
        bytes.extend_from_slice(&(count | flag).to_le_bytes());
    }
    let crc = crc32fast::hash(bytes.get(4..)?);
    bytes.get_mut(..4)?.copy_from_slice(&crc.to_le_bytes());
    (bytes.len() <= 4 + MOST_RUNS * 8).then_some(bytes)
}

/// What a file's content says; `None` if it isn't what was written.
pub(super) fn decode(bytes: &[u8]) -> Option<WorkingSet> {
    let (crc, runs) = bytes.split_first_chunk()?;
    if crc32fast::hash(runs) != u32::from_le_bytes(*crc) || runs.len() > MOST_RUNS * 8 {
        return None;
    }
    let mut set = WorkingSet::default();
    let (runs, []) = runs.as_chunks::<8>() else {
        return None;
    };
    for run in runs {
        let (first, count) = run.split_first_chunk()?;
        let (count, _) = count.split_first_chunk()?;
        let (first, count) = (u32::from_le_bytes(*first), u32::from_le_bytes(*count));
        let start = u64::from(first) * PAGE;
        let range: Range<u64> = start..start + u64::from(count & !WRITTEN) * PAGE;
        match count & WRITTEN {
            0 => set.touched.push(range),
            _ => set.written.push(range),
        }
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ranges() -> impl Strategy<Value = Vec<Range<u64>>> {
        let range = (0..1_u64 << 20, 1..64_u64);
        let range = range.prop_map(|(first, count)| first * PAGE..(first + count) * PAGE);
        proptest::collection::vec(range, 0..40)
    }

    proptest! {
        #[test]
        fn a_set_survives_its_file(written in ranges(), touched in ranges(), flip in 0..4000_usize) {
            let set = WorkingSet { written, touched };
            let mut bytes = encode(&set).unwrap();
            prop_assert_eq!(decode(&bytes), Some(set));
            let flip = flip % bytes.len();
            bytes[flip] ^= 1;
            prop_assert_eq!(decode(&bytes), None);
        }

        #[test]
        fn noise_is_refused(noise in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = decode(&noise);
        }
    }

    #[test]
    fn a_set_without_end_is_not_kept() {
        let page = 0..PAGE;
        let set = WorkingSet {
            written: vec![page; MOST_RUNS + 1],
            touched: Vec::new(),
        };
        assert!(encode(&set).is_none());
    }
}
