//! What hostile guests do; what lies beside the export is compared afterwards.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use proptest::prelude::*;

use super::*;

const AUTO: CachePolicy = CachePolicy::Auto;
const ALWAYS: CachePolicy = CachePolicy::Always;

type Listing = BTreeMap<String, (u32, u64, u32, i64, i64, Vec<u8>)>;

/// Everything below `dir`: mode, size, owner, times and contents.
fn everything(dir: &Path) -> Listing {
    let mut all = Listing::new();
    let mut left = vec![dir.to_owned()];
    while let Some(path) = left.pop() {
        let status = fs::symlink_metadata(&path).unwrap();
        let contents = if status.is_file() {
            fs::read(&path).unwrap()
        } else {
            Vec::new()
        };
        if status.is_dir() {
            left.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
        }
        let key = path.strip_prefix(dir).unwrap().to_str().unwrap().to_owned();
        all.insert(
            key,
            (
                status.mode(),
                status.size(),
                status.uid(),
                status.mtime_nsec(),
                status.ctime_nsec(),
                contents,
            ),
        );
    }
    all
}

fn entry(mode: u32, file: &str) -> Vec<u8> {
    [words(&[mode, 0]), name(file)].concat()
}

fn rename(to: u64, old: &str, new: &str) -> Vec<u8> {
    [longs(&[to]), words(&[0, 0]), name(old), name(new)].concat()
}

#[test]
fn names_that_lead_out_are_refused() {
    let host = Host::new();
    let outside = everything(&host.dir.path().join("outside"));
    let (mut guest, root) = host.guest(false, AUTO);
    guest.call(MKDIR, root, &entry(0o755, "d"), 128).unwrap();
    let d = guest.lookup(root, "d").unwrap();
    let bad_names = [
        "..",
        ".",
        "",
        "../outside",
        "../../etc",
        "/etc",
        "d/x",
        "a/../../outside/secret",
    ];
    for (bad, parent) in bad_names
        .into_iter()
        .flat_map(|bad| [(bad, root), (bad, d)])
    {
        let requests = [
            (LOOKUP, name(bad)),
            (CREATE, [words(&[2, 0o644, 0, 0]), name(bad)].concat()),
            (MKDIR, entry(0o755, bad)),
            (UNLINK, name(bad)),
            (RMDIR, name(bad)),
            (RENAME2, rename(root, "d", bad)),
            (RENAME2, rename(root, bad, "e")),
            (SYMLINK, [name(bad), name("target")].concat()),
            (LINK, [longs(&[d]), name(bad)].concat()),
        ];
        for (opcode, body) in requests {
            let outcome = guest.call(opcode, parent, &body, 144);
            assert_eq!(outcome, Err(libc::EINVAL), "operation {opcode} on {bad:?}");
        }
    }
    let long = name(&"n".repeat(256));
    assert_eq!(
        guest.call(LOOKUP, root, &long, 128),
        Err(libc::ENAMETOOLONG)
    );
    for up in ["..", "root/..", "root/../.."] {
        assert!(guest.lookup(ROOT, up).is_err());
    }
    assert_eq!(everything(&host.dir.path().join("outside")), outside);
}

#[test]
fn symbolic_links_are_never_followed_by_the_host() {
    let host = Host::new();
    let secret = host.dir.path().join("outside/secret");
    symlink(&secret, host.path("file")).unwrap();
    symlink(host.dir.path().join("outside"), host.path("dir")).unwrap();
    let outside = everything(&host.dir.path().join("outside"));
    for cache in [AUTO, ALWAYS] {
        let (mut guest, root) = host.guest(false, cache);
        let (file, dir) = (
            guest.lookup(root, "file").unwrap(),
            guest.lookup(root, "dir").unwrap(),
        );
        for flags in [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_PATH,
            libc::O_WRONLY | libc::O_TRUNC,
        ] {
            assert!(guest.open(file, flags).is_err());
            assert!(guest.open(dir, flags | libc::O_DIRECTORY).is_err());
        }
        assert!(guest.read(file, 0, 0, 100).is_err());
        assert!(guest.write(file, 0, 0, (0, libc::O_RDWR), b"x").is_err());
        assert!(guest.lookup(dir, "secret").is_err());
        assert!(
            guest
                .create(dir, "new", libc::O_CREAT | libc::O_RDWR, 0o644)
                .is_err()
        );
        assert!(guest.call(OPENDIR, dir, &words(&[0, 0]), 16).is_err());
        for flags in [
            libc::O_RDWR,
            libc::O_PATH,
            libc::O_CREAT | libc::O_TRUNC | libc::O_WRONLY,
            libc::O_PATH | libc::O_CREAT,
        ] {
            assert!(
                guest.create(root, "file", flags, 0o644).is_err(),
                "{flags:#o}"
            );
        }
        // These may change the link itself.
        let _ = guest.set_attributes(file, 1, 0, 0o777, (0, 0));
        let _ = guest.set_attributes(file, 2 | 4, 0, 0, (1, 1));
        let _ = guest.set_attributes(file, 8, 0, 0, (0, 0));
        let _ = guest.set_attributes(file, 16 | 32, 0, 0, (0, 0));
        let set = [words(&[1, 0]), name("user.x"), vec![1]].concat();
        assert!(guest.call(SETXATTR, file, &set, 0).is_err());
        let hard = format!("hard{cache:?}");
        guest
            .call(LINK, root, &[longs(&[file]), name(&hard)].concat(), 128)
            .unwrap();
        assert!(fs::symlink_metadata(host.path(&hard)).unwrap().is_symlink());
    }
    assert_eq!(everything(&host.dir.path().join("outside")), outside);
}

#[test]
fn devices_and_fifos_are_never_opened() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    for (file, kind) in [
        ("null", libc::S_IFCHR),
        ("disk", libc::S_IFBLK),
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
    ] {
        let body = [words(&[kind | 0o666, 0x103, 0, 0]), name(file)].concat();
        let node = long_at(&guest.call(MKNOD, root, &body, 128).unwrap(), 0);
        for flags in [
            libc::O_RDONLY,
            libc::O_WRONLY,
            libc::O_RDWR | libc::O_NONBLOCK,
            libc::O_PATH,
        ] {
            assert!(guest.open(node, flags).is_err(), "{file}");
        }
        assert!(
            guest
                .create(root, file, libc::O_CREAT | libc::O_RDWR, 0o644)
                .is_err()
        );
        assert!(guest.set_attributes(node, 8, 0, 0, (0, 0)).is_err());
        assert!(guest.call(OPENDIR, node, &words(&[0, 0]), 16).is_err());
    }
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0o170_000] {
        let body = [words(&[kind | 0o666, 0, 0, 0]), name("x")].concat();
        assert_eq!(guest.call(MKNOD, root, &body, 128), Err(libc::EINVAL));
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let host = Host::new();
    fs::write(host.path("f"), "f").unwrap();
    fs::create_dir(host.path("d")).unwrap();
    let before = everything(host.dir.path());
    for cache in [AUTO, ALWAYS] {
        let (mut guest, root) = host.guest(true, cache);
        let (f, d) = (
            guest.lookup(root, "f").unwrap(),
            guest.lookup(root, "d").unwrap(),
        );
        let refused = |outcome: Answer| assert_eq!(outcome.map(drop), Err(libc::EROFS));
        for flags in [
            libc::O_WRONLY,
            libc::O_RDWR,
            libc::O_RDONLY | libc::O_TRUNC,
            libc::O_TMPFILE | libc::O_RDWR,
        ] {
            assert!(guest.open(f, flags).is_err());
            assert!(guest.open(d, flags).is_err());
        }
        let handle = guest
            .open(f, libc::O_RDONLY | libc::O_CREAT | libc::O_APPEND)
            .unwrap_or(0);
        assert!(guest.write(f, handle, 0, (0, libc::O_RDWR), b"x").is_err());
        assert!(guest.write(f, handle, 0, (1, libc::O_RDWR), b"x").is_err());
        for flags in [libc::O_RDWR, libc::O_RDONLY, libc::O_EXCL] {
            assert!(guest.create(root, "new", flags, 0o644).is_err());
            assert!(guest.create(root, "f", flags, 0o644).is_err());
        }
        for valid in [1, 2, 4, 8, 16, 32, 1 | 8 | 64] {
            refused(guest.set_attributes(f, valid, 0, 0, (7, 7)));
        }
        refused(guest.call(MKDIR, root, &entry(0o755, "x"), 128));
        refused(guest.call(
            MKNOD,
            root,
            &[words(&[libc::S_IFREG | 0o644, 0, 0, 0]), name("x")].concat(),
            128,
        ));
        refused(guest.call(SYMLINK, root, &[name("x"), name("y")].concat(), 128));
        refused(guest.call(LINK, d, &[longs(&[f]), name("x")].concat(), 128));
        refused(guest.call(UNLINK, root, &name("f"), 0));
        refused(guest.call(RMDIR, root, &name("d"), 0));
        refused(guest.call(RENAME2, root, &rename(d, "f", "g"), 0));
        refused(guest.call(
            SETXATTR,
            f,
            &[words(&[1, 0]), name("user.x"), vec![1]].concat(),
            0,
        ));
        refused(guest.call(REMOVEXATTR, f, &name("user.x"), 0));
        let allocate = [longs(&[handle, 0, 4096]), words(&[0, 0])].concat();
        refused(guest.call(FALLOCATE, f, &allocate, 0));
        refused(guest.call(MKDIR, ROOT, &entry(0o755, "x"), 128));
        assert_eq!(
            guest.call(RENAME2, ROOT, &rename(ROOT, "root", "x"), 0),
            Err(libc::EROFS)
        );
    }
    assert_eq!(everything(host.dir.path()), before);
}

#[test]
fn nothing_crosses_from_one_export_to_another() {
    let (one, two) = (Host::new(), Host::new());
    fs::write(one.path("f"), "f").unwrap();
    let mut second = two.export(false, AUTO);
    second.name = "other".to_owned();
    let mut guest = Guest::new(vec![one.export(false, AUTO), second]);
    let (root, other) = (
        guest.lookup(ROOT, "root").unwrap(),
        guest.lookup(ROOT, "other").unwrap(),
    );
    let f = guest.lookup(root, "f").unwrap();
    assert_eq!(
        guest.call(RENAME2, root, &rename(other, "f", "f"), 0),
        Err(libc::EXDEV)
    );
    assert_eq!(
        guest.call(LINK, other, &[longs(&[f]), name("f")].concat(), 128),
        Err(libc::EXDEV)
    );
    assert_eq!(
        guest.call(RENAME2, root, &rename(ROOT, "f", "f"), 0),
        Err(libc::EROFS)
    );
}

#[test]
fn handles_and_nodes_end_at_their_limits() {
    let host = Host::new();
    for i in 0..40 {
        fs::write(host.path(&i.to_string()), "").unwrap();
    }
    let mut guest = Guest::unmounted(
        vec![host.export(false, AUTO)],
        FsLimits {
            inodes: 30,
            handles: 10,
        },
    );
    guest.mount();
    let root = guest.lookup(ROOT, "root").unwrap();
    let found: Vec<_> = (0..40)
        .map(|i| guest.lookup(root, &i.to_string()))
        .collect();
    assert_eq!(found.iter().filter(|node| node.is_ok()).count(), 30);
    assert_eq!(found.last(), Some(&Err(libc::ENOMEM)));
    assert_eq!(
        guest.create(root, "more", libc::O_RDWR, 0o644),
        Err(libc::ENOMEM)
    );
    assert!(!host.path("more").exists());
    let opened: Vec<_> = (0..20)
        .map(|_| guest.open(found[0].unwrap(), libc::O_RDONLY))
        .collect();
    assert_eq!(opened.iter().filter(|handle| handle.is_ok()).count(), 10);
    assert_eq!(opened.last(), Some(&Err(libc::ENFILE)));
    // Listing goes on, without nodes for what can't be remembered.
    let mut guest = Guest::unmounted(
        vec![host.export(false, AUTO)],
        FsLimits {
            inodes: 30,
            handles: 10,
        },
    );
    guest.mount();
    let root = guest.lookup(ROOT, "root").unwrap();
    let handle = long_at(&guest.call(OPENDIR, root, &words(&[0, 0]), 16).unwrap(), 0);
    assert_eq!(guest.list(root, handle, true).len(), 42);
}

#[test]
fn what_is_forgotten_costs_nothing() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let nodes = guest.device.tree.lock().nodes.len();
    for i in 0..200 {
        let file = i.to_string();
        let (node, handle) = guest.create(root, &file, libc::O_RDWR, 0o644).unwrap();
        guest.call(UNLINK, root, &name(&file), 0).unwrap();
        guest
            .call(
                RELEASE,
                node,
                &[longs(&[handle]), words(&[0, 0]), longs(&[0])].concat(),
                0,
            )
            .unwrap();
        let forget = guest.request(2, node, &longs(&[1]));
        assert_eq!(guest.raw(0, &forget, 0).0, 0);
        assert_eq!(guest.attributes(node), Err(libc::EBADF));
    }
    // More often than it was told: no harm, and the export itself stays.
    let forget = guest.request(2, root, &longs(&[u64::MAX]));
    guest.raw(0, &forget, 0);
    assert!(guest.attributes(root).is_ok());
    let state = guest.device.tree.lock();
    assert_eq!((state.nodes.len(), state.files.len()), (nodes, 0));
}

#[test]
fn numbers_that_were_never_given_are_refused() {
    let host = Host::new();
    fs::write(host.path("f"), "f").unwrap();
    fs::write(host.path("g"), "g").unwrap();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, g) = (
        guest.lookup(root, "f").unwrap(),
        guest.lookup(root, "g").unwrap(),
    );
    let handle = guest.open(f, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(g, handle, 0, 10), Err(libc::EBADF));
    assert_eq!(
        guest.write(f, handle, 0, (0, libc::O_RDONLY), b"x"),
        Err(libc::EBADF)
    );
    for node in [0, 99, u64::MAX] {
        assert!(guest.attributes(node).is_err());
        assert!(guest.open(node, libc::O_RDONLY).is_err());
        assert!(guest.lookup(node, "f").is_err());
        assert!(guest.read(node, handle, 0, 10).is_err());
    }
    assert_eq!(guest.read(f, handle, u64::MAX, 10), Err(libc::EINVAL));
}

#[test]
fn malformed_requests_get_an_answer_or_none_but_never_more() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    assert_eq!(guest.raw(1, &[1; 39], 100).0, 0);
    assert_eq!(guest.raw(1, &[1; 40], 0).0, 0);
    for opcode in [0, 7, 19, 47, 48, 49, 52, 60, 4096, u32::MAX] {
        assert_eq!(
            guest.call(opcode, root, &[0; 64], 64),
            Err(libc::ENOSYS),
            "{opcode}"
        );
    }
    // Lengths that lie: beyond the buffer, and beyond every cap.
    for length in [0, 39, 41, 5000, 1 << 20, u32::MAX] {
        let mut request = guest.request(LOOKUP, root, &name("f"));
        request[..4].copy_from_slice(&length.to_le_bytes());
        let (written, _) = guest.raw(1, &request, 200);
        assert!(written <= 200);
    }
    assert_eq!(guest.call(READ, root, &[0xff; 40], 64), Err(libc::EBADF));
    assert_eq!(guest.call(LOOKUP, root, b"no end", 128), Err(libc::EINVAL));
    let mut large = guest.request(WRITE, root, &[]);
    large.resize(2 << 20, 0);
    let (written, answer) = guest.raw(1, &large, 64);
    assert_eq!(
        (written, word_at(&answer, 4).cast_signed()),
        (16, -libc::E2BIG)
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn random_requests_break_nothing(requests in prop::collection::vec((0u32..56, prop_oneof![Just(1u64), Just(2), 3..8u64, any::<u64>()], prop::collection::vec(prop_oneof![3 => Just(0u8), 1 => any::<u8>(), 1 => Just(b'a')], 0..120), 0u32..4200, 0usize..3), 1..60)) {
        let host = Host::new();
        fs::write(host.path("a"), "a").unwrap();
        let outside = everything(&host.dir.path().join("outside"));
        let (mut guest, _) = host.guest(false, if requests.len() % 2 == 0 { AUTO } else { ALWAYS });
        for (opcode, node, body, room, queue) in requests {
            // Its effect would be on the whole machine.
            if opcode == SYNCFS {
                continue;
            }
            let request = guest.request(opcode, node, &body);
            let (written, _) = guest.raw(queue.min(1), &request, room);
            prop_assert!(written <= room);
        }
        prop_assert_eq!(everything(&host.dir.path().join("outside")), outside);
        prop_assert_eq!(rustix::process::geteuid().as_raw(), 0);
    }
}
