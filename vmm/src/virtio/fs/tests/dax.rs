//! Files shown in the window: what is, what may be, and what a guest may ask for.

use std::fs;

use proptest::prelude::*;

use super::*;

const FORGET: u32 = 2;
const CHUNK: u64 = Window::CHUNK;
/// Chunks of the window.
const CHUNKS: u64 = 4;
/// The window's end, and the last chunk that an address could have.
const END: u64 = CHUNKS * CHUNK;
const HIGHEST: u64 = u64::MAX - CHUNK + 1;
/// `FUSE_ATTR_DAX`.
const DAX: u32 = 1 << 1;
/// `FUSE_SETUPMAPPING_FLAG_WRITE` and `FUSE_SETUPMAPPING_FLAG_READ`.
const WRITE_FLAG: u64 = 1;
const READ_FLAG: u64 = 2;
const NO_HANDLE: u64 = u64::MAX;

/// A guest that has mounted `host`'s files, which never change, and sees some in a window.
struct Shown {
    guest: Guest,
    window: Arc<Window>,
    root: u64,
}

fn unchanging(host: &Host) -> FsExport {
    let mut export = host.export(true, CachePolicy::Always);
    export.immutable = true;
    export
}

/// A directory with files of one chunk and some bytes, of two chunks and of a few bytes.
fn filled() -> Host {
    let host = Host::new();
    let bytes = |chunk: usize, more: usize| {
        let mut bytes = vec![1; chunk * CHUNK as usize];
        bytes.resize(bytes.len() + more, 2);
        bytes
    };
    fs::write(host.path("large"), bytes(1, 5000)).unwrap();
    fs::write(host.path("other"), bytes(2, 0)).unwrap();
    fs::write(host.path("small"), "small").unwrap();
    fs::create_dir(host.path("directory")).unwrap();
    host
}

impl Shown {
    fn of(host: &Host) -> Self {
        Self::with(vec![unchanging(host)])
    }

    fn unmounted(exports: Vec<FsExport>) -> (Guest, Arc<Window>) {
        let window = Arc::new(Window::reserve(64 << 20, CHUNKS * CHUNK).unwrap());
        let shared = Some(Arc::clone(&window));
        (
            Guest::with_window(exports, FsLimits::default(), shared),
            window,
        )
    }

    fn with(exports: Vec<FsExport>) -> Self {
        let (mut guest, window) = Self::unmounted(exports);
        guest.mount();
        let root = guest.lookup(ROOT, "root").unwrap();
        Self {
            guest,
            window,
            root,
        }
    }

    fn node(&mut self, name: &str) -> u64 {
        self.guest.lookup(self.root, name).unwrap()
    }

    /// Sends a `FUSE_SETUPMAPPING`: handle, offset, length, flags, place.
    fn map_raw(&mut self, node: u64, wanted: [u64; 5]) -> Result<(), i32> {
        let answer = self.guest.call(SETUPMAPPING, node, &longs(&wanted), 0)?;
        assert!(answer.is_empty());
        Ok(())
    }

    /// As Linux sends it: always a whole chunk.
    fn map(&mut self, node: u64, offset: u64, place: u64) -> Result<(), i32> {
        self.map_raw(node, [NO_HANDLE, offset, CHUNK, READ_FLAG, place])
    }

    fn unmap(&mut self, ranges: &[(u64, u64)]) -> Result<(), i32> {
        let mut body = words(&[u32::try_from(ranges.len()).unwrap()]);
        ranges
            .iter()
            .for_each(|&(place, length)| body.extend(longs(&[place, length])));
        self.guest
            .call(REMOVEMAPPING, self.root, &body, 0)
            .map(drop)
    }

    /// What the guest sees at a place of the window; nothing where it would end.
    fn seen(&self, place: u64) -> Option<u8> {
        let mut byte = [0];
        let read = self.window.read(self.window.address() + place, &mut byte);
        read.is_ok().then_some(byte[0])
    }
}

#[test]
fn the_guest_finds_the_window_and_which_files_it_may_see_there() {
    let host = filled();
    let (mut guest, window) = Shown::unmounted(vec![unchanging(&host)]);
    let region = guest.device.shared_memory(0).unwrap();
    assert_eq!(
        (region.base, region.length_bytes),
        (window.address(), CHUNKS * CHUNK)
    );
    assert_eq!(guest.device.shared_memory(1), None);
    let answer = guest.mount();
    assert_eq!(word_at(&answer, 32) & 2, 2, "DAX by inode isn't agreed on");
    assert_eq!(u16::from_le_bytes([answer[30], answer[31]]), 21);
    let root = guest.lookup(ROOT, "root").unwrap();
    let listed = guest.call(OPENDIR, root, &words(&[0, 0]), 16);
    let handle = listed.map_or(0, |answer| long_at(&answer, 0));
    let names = guest.list(root, handle, true);
    for (file, flags) in [
        ("large", DAX),
        ("other", DAX),
        ("small", 0),
        ("directory", 0),
    ] {
        let entry = guest.call(LOOKUP, root, &name(file), 128).unwrap();
        assert_eq!(word_at(&entry, 124), flags, "{file}");
        let node = names.iter().find(|(name, _)| name == file).unwrap().1;
        assert_eq!(
            word_at(&guest.attributes(node).unwrap(), 84),
            flags,
            "{file}"
        );
    }
    assert_eq!(word_at(&guest.attributes(ROOT).unwrap(), 84), 0);
    // Without a window, nobody is told of one.
    let mut guest = Guest::new(vec![unchanging(&host)]);
    assert_eq!(guest.device.shared_memory(0), None);
    let answer = guest.mount();
    assert_eq!(
        (word_at(&answer, 32) & 2, word_at(&answer, 28) >> 16),
        (0, 0)
    );
    let root = guest.lookup(ROOT, "root").unwrap();
    let entry = guest.call(LOOKUP, root, &name("large"), 128).unwrap();
    assert_eq!(word_at(&entry, 124), 0);
    let large = long_at(&entry, 0);
    let wanted = longs(&[NO_HANDLE, 0, CHUNK, READ_FLAG, 0]);
    assert_eq!(
        guest.call(SETUPMAPPING, large, &wanted, 0),
        Err(libc::ENOSYS)
    );
}

#[test]
fn a_file_is_seen_where_the_guest_asks_for_it() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let (large, other) = (shown.node("large"), shown.node("other"));
    assert_eq!(shown.seen(0), None);
    shown.map(large, 0, CHUNK).unwrap();
    shown.map(large, CHUNK, 3 * CHUNK).unwrap();
    assert_eq!((shown.seen(0), shown.seen(CHUNK)), (None, Some(1)));
    assert_eq!(shown.seen(3 * CHUNK + 4999), Some(2));
    // The rest of the file's last page is zeros, and behind it is nothing.
    assert_eq!(shown.seen(3 * CHUNK + 8191), Some(0));
    assert_eq!(shown.seen(3 * CHUNK + 8192), None);
    // Another file in its place, of more than one chunk.
    shown
        .map_raw(other, [NO_HANDLE, 0, 2 * CHUNK, READ_FLAG, 2 * CHUNK])
        .unwrap();
    assert_eq!(shown.seen(3 * CHUNK + 8192), Some(1));
    // And a shorter one in its: of the longer one nothing is left.
    shown.map(large, CHUNK, 3 * CHUNK).unwrap();
    assert_eq!(
        (shown.seen(2 * CHUNK), shown.seen(3 * CHUNK + 8192)),
        (Some(1), None)
    );
    let stats = shown.guest.device.stats().by_operation();
    assert!(stats.contains(&("setupmapping", 4)), "{stats:?}");
}

#[test]
fn what_is_taken_away_is_seen_no_more() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let (large, other) = (shown.node("large"), shown.node("other"));
    for place in 0..CHUNKS {
        shown.map(other, 0, place * CHUNK).unwrap();
    }
    shown.unmap(&[(0, CHUNK), (2 * CHUNK, CHUNK)]).unwrap();
    let all = |shown: &Shown| [0, 1, 2, 3].map(|place| shown.seen(place * CHUNK).is_some());
    assert_eq!(all(&shown), [false, true, false, true]);
    // Twice is no error, nor is nothing at all, nor all at once.
    shown.unmap(&[(0, CHUNK), (0, CHUNK)]).unwrap();
    shown.unmap(&[]).unwrap();
    shown.unmap(&[(0, CHUNKS * CHUNK)]).unwrap();
    assert_eq!(all(&shown), [false; 4]);
    // A file that the guest has forgotten goes by itself.
    shown.map(large, 0, 0).unwrap();
    shown.map(other, 0, CHUNK).unwrap();
    let request = shown.guest.request(FORGET, large, &longs(&[9]));
    shown.guest.raw(1, &request, 0);
    assert_eq!(all(&shown), [false, true, false, false]);
    // So does all at an unmount, a reset, and another mount.
    shown.guest.call(DESTROY, 0, &[], 0).unwrap();
    assert_eq!(all(&shown), [false; 4]);
    for end in [
        |guest: &mut Guest| guest.device.reset(),
        |guest: &mut Guest| drop(guest.mount()),
    ] {
        shown.root = shown.guest.lookup(ROOT, "root").unwrap();
        let other = shown.node("other");
        shown.map(other, 0, CHUNK).unwrap();
        assert_eq!(shown.seen(CHUNK), Some(1));
        end(&mut shown.guest);
        assert_eq!(all(&shown), [false; 4]);
    }
}

#[test]
fn what_the_host_takes_away_reads_as_zeros() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let large = shown.node("large");
    shown.map(large, 0, CHUNK).unwrap();
    shown.guest.device.shares().remove(&["root".to_owned()]);
    assert_eq!((shown.seen(CHUNK), shown.seen(0)), (Some(0), None));
    // The guest's kernel clears up when it is ready, by nodes that are nobody's any more.
    assert_eq!(shown.map(large, 0, CHUNK), Err(libc::EBADF));
    shown.unmap(&[(CHUNK, CHUNK)]).unwrap();
    assert_eq!(shown.seen(CHUNK), None);
    shown.unmap(&[(CHUNK, CHUNK)]).unwrap();
}

#[test]
fn only_reading_of_files_that_never_change_is_granted() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let (large, root) = (shown.node("large"), shown.root);
    let directory = shown.node("directory");
    let chunk = |flags| [NO_HANDLE, 0, CHUNK, flags, 0];
    for flags in [
        0,
        WRITE_FLAG,
        WRITE_FLAG | READ_FLAG,
        READ_FLAG | 4,
        u64::MAX,
    ] {
        assert_eq!(
            shown.map_raw(large, chunk(flags)),
            Err(libc::EACCES),
            "{flags}"
        );
    }
    for node in [root, directory] {
        assert_eq!(shown.map(node, 0, 0), Err(libc::EACCES));
    }
    for node in [ROOT, 0, 999, u64::MAX] {
        assert_eq!(shown.map(node, 0, 0), Err(libc::EBADF));
    }
    assert_eq!(
        shown.map_raw(large, [7, 0, CHUNK, READ_FLAG, 0]),
        Err(libc::EBADF)
    );
    // Files that may change, if by the host alone, are never shown, nor is the guest told to try.
    for (read_only, cache) in [
        (true, CachePolicy::Always),
        (true, CachePolicy::Auto),
        (false, CachePolicy::Always),
    ] {
        let mut other = Shown::with(vec![host.export(read_only, cache)]);
        let entry = other
            .guest
            .call(LOOKUP, other.root, &name("large"), 128)
            .unwrap();
        assert_eq!(word_at(&entry, 124), 0);
        assert_eq!(other.map(long_at(&entry, 0), 0, 0), Err(libc::EACCES));
    }
    // Nor can what may change be said to never change.
    for (read_only, cache) in [(true, CachePolicy::Auto), (false, CachePolicy::Always)] {
        let mut export = host.export(read_only, cache);
        export.immutable = true;
        let spec = FsSpec {
            tag: "hull".to_owned(),
            dax_window_bytes: 0,
        };
        assert!(Fs::new(&spec, vec![export], FsRole::Own, FsLimits::default(), None).is_err());
    }
}

#[test]
fn every_bound_is_checked() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let large = shown.node("large");
    shown.map(large, 0, 0).unwrap();
    for (offset, length, place) in [
        (0, CHUNK, END),
        (0, 2 * CHUNK, END - CHUNK),
        (0, CHUNK, HIGHEST),
        (0, HIGHEST, CHUNK),
        (0, u64::MAX, 0),
        (0, 0, 0),
        (0, 4096, 0),
        (0, CHUNK, 4096),
        (4096, CHUNK, 0),
        (HIGHEST, CHUNK, 0),
        (2 * CHUNK, CHUNK, 0),
        (1 << 62, CHUNK, 0),
    ] {
        let wanted = [NO_HANDLE, offset, length, READ_FLAG, place];
        assert_eq!(
            shown.map_raw(large, wanted),
            Err(libc::EINVAL),
            "{wanted:x?}"
        );
    }
    let short = longs(&[NO_HANDLE, 0, CHUNK, READ_FLAG]);
    let refused = shown.guest.call(SETUPMAPPING, large, &short, 0);
    assert_eq!(refused, Err(libc::EINVAL));
    assert_eq!(shown.seen(0), Some(1));
}

#[test]
fn a_list_of_what_to_take_away_is_held_to_its_bounds() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let large = shown.node("large");
    shown.map(large, 0, 0).unwrap();
    for range in [
        (END, CHUNK),
        (0, END + CHUNK),
        (HIGHEST, CHUNK),
        (CHUNK, HIGHEST),
        (4096, CHUNK),
        (0, 4096),
        (0, 0),
    ] {
        // All or none.
        assert_eq!(
            shown.unmap(&[(0, CHUNK), range]),
            Err(libc::EINVAL),
            "{range:x?}"
        );
    }
    let mut call = |body: &[u8]| shown.guest.call(REMOVEMAPPING, large, body, 0).map(drop);
    let many = vec![(0, CHUNK); CHUNKS as usize + 1];
    let many: Vec<u8> = many
        .iter()
        .flat_map(|&(at, length)| longs(&[at, length]))
        .collect();
    for body in [
        words(&[]),
        words(&[1]),
        words(&[u32::MAX]),
        [words(&[1]), longs(&[0])].concat(),
        [words(&[0]), longs(&[0, CHUNK])].concat(),
        [words(&[2]), longs(&[0, CHUNK])].concat(),
        [words(&[CHUNKS as u32 + 1]), many].concat(),
    ] {
        assert_eq!(call(&body), Err(libc::EINVAL), "{body:?}");
    }
    assert_eq!(
        shown.seen(0),
        Some(1),
        "a refused request took something away"
    );
}

#[test]
fn what_is_shown_is_shown_again_in_another_process() {
    let host = filled();
    let mut shown = Shown::of(&host);
    let (large, other) = (shown.node("large"), shown.node("other"));
    shown.map(large, CHUNK, 0).unwrap();
    shown
        .map_raw(other, [NO_HANDLE, 0, 2 * CHUNK, READ_FLAG, 2 * CHUNK])
        .unwrap();
    let (mut guest, window) = Shown::unmounted(vec![unchanging(&host)]);
    crate::testing::persist_roundtrip(&shown.guest.device, &mut guest.device);
    let (root, heir) = (
        shown.root,
        Shown {
            guest,
            window,
            root: shown.root,
        },
    );
    for place in [0, 4999, 8191, 8192, CHUNK, 2 * CHUNK, 4 * CHUNK - 1] {
        assert_eq!(heir.seen(place), shown.seen(place), "{place}");
    }
    assert_eq!(
        (heir.seen(0), heir.seen(CHUNK), heir.root),
        (Some(2), None, root)
    );
    // Neither in a window that has no such place, nor in none, nor if the file was changed.
    let saved = shown.guest.device.save().unwrap();
    let state = || saved.clone();
    let mut without = Guest::unmounted(vec![unchanging(&host)], FsLimits::default());
    assert!(without.device.restore(state()).is_err());
    let small = Arc::new(Window::reserve(64 << 20, CHUNK).unwrap());
    let exports = vec![unchanging(&host)];
    let mut small = Guest::with_window(exports, FsLimits::default(), Some(small));
    assert!(small.device.restore(state()).is_err());
    fs::write(host.path("other"), "cut").unwrap();
    let (mut changed, window) = Shown::unmounted(vec![unchanging(&host)]);
    let refused = changed.device.restore(state()).unwrap_err().to_string();
    assert!(
        refused.contains("\"/other\" of share \"root\" is not what it was"),
        "{refused}"
    );
    assert_eq!(
        window
            .read(window.address(), &mut [0])
            .unwrap_err()
            .raw_os_error(),
        Some(libc::EFAULT)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is asked for: each place shows what was last asked to be there and granted.
    #[test]
    fn the_window_shows_what_was_granted(
        asked in prop::collection::vec((any::<bool>(), 0..3_u8, 0..6_u64, 0..6_u64, 0..3_u64, any::<u64>()), 1..40)
    ) {
        let host = filled();
        let mut shown = Shown::of(&host);
        let nodes = [shown.node("large"), shown.node("other"), shown.node("small")];
        let mut expected = [None; CHUNKS as usize];
        for (map, file, place, offset, length, noise) in asked {
            // One in eight is no multiple of anything.
            let skew = if noise % 8 == 0 { noise } else { 0 };
            let (place, offset) = ((place * CHUNK).wrapping_add(skew), offset * CHUNK);
            let length = length * CHUNK;
            let granted = if map {
                let wanted = [NO_HANDLE, offset, length, READ_FLAG, place];
                shown.map_raw(nodes[usize::from(file)], wanted)
            } else {
                shown.unmap(&[(place, length)])
            };
            if granted.is_ok() {
                for chunk in 0..length / CHUNK {
                    let sizes = [CHUNK + 5000, 2 * CHUNK, 5];
                    let at = offset + chunk * CHUNK;
                    let there = map && at < sizes[usize::from(file)];
                    let index = usize::try_from(place / CHUNK + chunk).unwrap();
                    expected[index] = there.then_some(match (file, at) {
                        (2, _) => b's',
                        (0, CHUNK) => 2,
                        _ => 1,
                    });
                }
            }
            for (index, byte) in (0..).zip(expected) {
                prop_assert_eq!(shown.seen(index * CHUNK), byte);
            }
        }
    }

    /// Bodies that mean nothing: an answer each time.
    #[test]
    fn no_bytes_of_a_mapping_request_do_harm(
        opcode in prop::sample::select(vec![SETUPMAPPING, REMOVEMAPPING]),
        node in 0..5_u64,
        body in prop::collection::vec(any::<u8>(), 0..120),
    ) {
        let host = filled();
        let mut shown = Shown::of(&host);
        for file in ["large", "other"] {
            shown.node(file);
        }
        let _ = shown.guest.call(opcode, node, &body, 0);
    }
}
