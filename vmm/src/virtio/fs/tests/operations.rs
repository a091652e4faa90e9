//! What well-behaved guests do.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::time::UNIX_EPOCH;

use super::*;
use crate::testing::persist_roundtrip;

const AUTO: CachePolicy = CachePolicy::Auto;
const ALWAYS: CachePolicy = CachePolicy::Always;
const CREATED: i32 = libc::O_CREAT | libc::O_EXCL;

#[test]
fn the_tree_holds_each_export_under_its_name() {
    let (one, two) = (Host::new(), Host::new());
    fs::write(one.path("a"), "one").unwrap();
    fs::write(two.path("b"), "two").unwrap();
    let mut second = two.export(true, AUTO);
    second.name = "volume-1".to_owned();
    let mut guest = Guest::new(vec![one.export(false, ALWAYS), second]);
    guest.call(OPENDIR, ROOT, &words(&[0, 0]), 16).unwrap();
    let names: Vec<_> = guest
        .list(ROOT, 0, true)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, [".", "..", "root", "volume-1"]);
    assert_eq!(guest.list(ROOT, 0, false).len(), 4);
    let b = guest.lookup(ROOT, "volume-1/b").unwrap();
    let handle = guest.open(b, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(b, handle, 0, 100).unwrap(), b"two");
    assert_eq!(guest.lookup(ROOT, "volume-1/a"), Err(libc::ENOENT));
    assert_eq!(
        Attributes(&guest.attributes(ROOT).unwrap()).mode(),
        libc::S_IFDIR | 0o555
    );
}

#[test]
fn what_is_mounted_decides_whether_files_are_opened() {
    let host = Host::new();
    let flags = |exports| word_at(&Guest::unmounted(exports, FsLimits::default()).mount(), 12);
    let (no_open, no_opendir, auto_plus) = (1 << 17, 1 << 24, 1 << 14);
    let always = flags(vec![host.export(true, ALWAYS)]);
    assert_eq!(
        always & (no_open | no_opendir | auto_plus),
        no_open | no_opendir
    );
    let writable = flags(vec![host.export(false, ALWAYS)]);
    assert_eq!(writable & (no_open | no_opendir | auto_plus), no_open);
    let mut volume = host.export(false, AUTO);
    volume.name = "v".to_owned();
    let mixed = flags(vec![host.export(false, ALWAYS), volume]);
    assert_eq!(mixed & (no_open | no_opendir | auto_plus), auto_plus);
}

#[test]
fn a_read_leaves_the_access_time() {
    let host = Host::new();
    let old = fs::FileTimes::new().set_accessed(UNIX_EPOCH);
    for (cache, file) in [(ALWAYS, "kept"), (AUTO, "opened")] {
        let path = host.path(file);
        fs::write(&path, "contents").unwrap();
        // Older than its change, so that even `relatime` would note a read.
        fs::File::open(&path).unwrap().set_times(old).unwrap();
        let (mut guest, root) = host.guest(false, cache);
        let id = guest.lookup(root, file).unwrap();
        let handle = guest.open(id, libc::O_RDONLY).unwrap_or(0);
        assert_eq!(guest.read(id, handle, 0, 100).unwrap(), b"contents");
        assert_eq!(fs::metadata(&path).unwrap().atime(), 0);
    }
}

#[test]
fn an_exclusive_export_is_read_and_written_without_opening() {
    let host = Host::new();
    fs::write(host.path("big"), vec![7; 3 << 20]).unwrap();
    let (mut guest, root) = host.guest(false, ALWAYS);
    let answer = guest.call(LOOKUP, root, &name("big"), 128).unwrap();
    let big = long_at(&answer, 0);
    // Valid for a year, name and attributes.
    assert!(long_at(&answer, 16) > 86_400 && long_at(&answer, 24) > 86_400);
    assert_eq!(guest.open(big, libc::O_RDONLY), Err(libc::ENOSYS));
    assert_eq!(
        guest.read(big, 0, 1 << 20, 1 << 20).unwrap(),
        vec![7; 1 << 20]
    );
    assert_eq!(guest.write(big, 0, 1, (0, libc::O_RDWR), b"xyz"), Ok(3));
    assert_eq!(
        fs::read(host.path("big")).unwrap()[..5],
        [7, b'x', b'y', b'z', 7]
    );
    // A name that isn't there is kept as such, too.
    let missing = guest.call(LOOKUP, root, &name("missing"), 128).unwrap();
    assert!(long_at(&missing, 0) == 0 && long_at(&missing, 16) > 86_400);
    let (made, handle) = guest
        .create(root, "missing", CREATED | libc::O_WRONLY, 0o640)
        .unwrap();
    assert_eq!(
        (handle, guest.write(made, 0, 0, (0, libc::O_WRONLY), b"now")),
        (0, Ok(3))
    );
    assert_eq!(fs::read(host.path("missing")).unwrap(), b"now");
}

#[test]
fn a_shared_export_is_opened_and_shows_what_the_host_wrote() {
    let host = Host::new();
    fs::write(host.path("f"), "old").unwrap();
    let (mut guest, root) = host.guest(false, AUTO);
    let answer = guest.call(LOOKUP, root, &name("f"), 128).unwrap();
    assert_eq!((long_at(&answer, 16), long_at(&answer, 24)), (1, 0));
    let f = long_at(&answer, 0);
    fs::write(host.path("f"), "newer").unwrap();
    let answer = guest.call(OPEN, f, &words(&[0, 0]), 16).unwrap();
    assert_eq!(word_at(&answer, 8), 0, "the guest would keep what it has");
    assert_eq!(guest.read(f, long_at(&answer, 0), 0, 10).unwrap(), b"newer");
    assert_eq!(Attributes(&guest.attributes(f).unwrap()).size(), 5);
    let release = [longs(&[long_at(&answer, 0)]), words(&[0, 0]), longs(&[0])].concat();
    guest.call(RELEASE, f, &release, 0).unwrap();
    assert_eq!(guest.call(RELEASE, f, &release, 0), Err(libc::EBADF));
}

#[test]
fn appending_is_the_hosts_and_mapped_pages_still_go_where_they_belong() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, handle) = guest
        .create(root, "log", CREATED | libc::O_RDWR | libc::O_APPEND, 0o644)
        .unwrap();
    guest
        .write(f, handle, 0, (0, libc::O_RDWR | libc::O_APPEND), b"guest")
        .unwrap();
    use std::io::Write;
    fs::OpenOptions::new()
        .append(true)
        .open(host.path("log"))
        .unwrap()
        .write_all(b"+host")
        .unwrap();
    guest
        .write(f, handle, 5, (0, libc::O_RDWR | libc::O_APPEND), b"+again")
        .unwrap();
    assert_eq!(fs::read(host.path("log")).unwrap(), b"guest+host+again");
    // WRITE_CACHE: out of the page cache, by whichever handle there is.
    guest
        .write(f, handle, 0, (1, libc::O_RDWR | libc::O_APPEND), b"GUEST")
        .unwrap();
    assert_eq!(fs::read(host.path("log")).unwrap(), b"GUEST+host+again");
}

#[test]
fn files_belong_to_the_guests_user_whatever_groups_it_is_in() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    // A directory that only an additional group of the user may write to.
    fs::create_dir(host.path("shared")).unwrap();
    fs::set_permissions(host.path("shared"), fs::Permissions::from_mode(0o770)).unwrap();
    std::os::unix::fs::chown(host.path("shared"), Some(0), Some(4000)).unwrap();
    let shared = guest.lookup(root, "shared").unwrap();
    guest.user = (1000, 1001);
    guest
        .create(shared, "f", CREATED | libc::O_WRONLY, 0o600)
        .unwrap();
    guest
        .call(
            MKDIR,
            shared,
            &[words(&[0o750, 0o027]), name("d")].concat(),
            128,
        )
        .unwrap();
    guest
        .call(
            SYMLINK,
            shared,
            &[name("s"), name("anywhere")].concat(),
            128,
        )
        .unwrap();
    guest
        .call(
            MKNOD,
            shared,
            &[words(&[libc::S_IFIFO | 0o600, 0, 0, 0]), name("p")].concat(),
            128,
        )
        .unwrap();
    for made in ["f", "d", "s", "p"] {
        let status = fs::symlink_metadata(host.path("shared").join(made)).unwrap();
        assert_eq!((made, status.uid(), status.gid()), (made, 1000, 1001));
    }
    assert_eq!(rustix::process::geteuid().as_raw(), 0);
    guest.user = (u32::MAX, 0);
    assert_eq!(guest.create(shared, "g", CREATED, 0o600), Err(libc::EINVAL));
    // In a set-group-id directory, to its group.
    fs::set_permissions(host.path("shared"), fs::Permissions::from_mode(0o2770)).unwrap();
    guest.user = (1000, 1001);
    guest.create(shared, "h", CREATED, 0o600).unwrap();
    assert_eq!(fs::metadata(host.path("shared/h")).unwrap().gid(), 4000);
}

#[test]
fn attributes_change_and_set_id_bits_are_lost_on_writing() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, handle) = guest
        .create(root, "f", CREATED | libc::O_RDWR, 0o644)
        .unwrap();
    let (mode, uid_gid, size) = (1, 2 | 4, 8);
    let answer = guest.set_attributes(f, mode, 0, 0o6755, (0, 0)).unwrap();
    assert_eq!(Attributes(&answer[16..]).mode(), libc::S_IFREG | 0o6755);
    guest
        .write(f, handle, 0, (0, libc::O_RDWR), b"by root")
        .unwrap();
    assert_eq!(
        fs::metadata(host.path("f")).unwrap().mode() & 0o7777,
        0o6755
    );
    guest
        .write(f, handle, 0, (4, libc::O_RDWR), b"by user")
        .unwrap();
    assert_eq!(fs::metadata(host.path("f")).unwrap().mode() & 0o7777, 0o755);
    guest.set_attributes(f, mode, 0, 0o6755, (0, 0)).unwrap();
    guest.set_attributes(f, size | 0x800, 3, 0, (0, 0)).unwrap();
    assert_eq!(fs::metadata(host.path("f")).unwrap().mode() & 0o7777, 0o755);
    let answer = guest.set_attributes(f, uid_gid, 0, 0, (5, 6)).unwrap();
    assert_eq!(Attributes(&answer[16..]).owner(), (5, 6));
    assert_eq!(fs::read(host.path("f")).unwrap(), b"by ");
    let (atime, mtime_now) = (16, 32 | 256);
    guest
        .set_attributes(f, atime | mtime_now, 0, 0, (0, 0))
        .unwrap();
    let status = fs::metadata(host.path("f")).unwrap();
    assert!(status.atime() == 0 && status.mtime() > 1_600_000_000);
}

#[test]
fn names_are_linked_moved_and_removed() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, handle) = guest
        .create(root, "f", CREATED | libc::O_RDWR, 0o644)
        .unwrap();
    guest
        .write(f, handle, 0, (0, libc::O_RDWR), b"contents")
        .unwrap();
    let answer = guest
        .call(LINK, root, &[longs(&[f]), name("second")].concat(), 128)
        .unwrap();
    assert_eq!(
        (long_at(&answer, 0), Attributes(&answer[40..]).nlink()),
        (f, 2)
    );
    let rename = |to: u64, flags: u32, old: &str, new: &str| {
        [longs(&[to]), words(&[flags, 0]), name(old), name(new)].concat()
    };
    guest
        .call(MKDIR, root, &[words(&[0o755, 0]), name("d")].concat(), 128)
        .unwrap();
    let d = guest.lookup(root, "d").unwrap();
    guest
        .call(RENAME2, root, &rename(d, 0, "second", "moved"), 0)
        .unwrap();
    assert_eq!(guest.lookup(d, "moved"), Ok(f));
    let noreplace = guest.call(RENAME2, root, &rename(d, 1, "f", "moved"), 0);
    assert_eq!(noreplace, Err(libc::EEXIST));
    assert_eq!(guest.call(RMDIR, root, &name("d"), 0), Err(libc::ENOTEMPTY));
    guest.call(UNLINK, root, &name("f"), 0).unwrap();
    guest.call(UNLINK, d, &name("moved"), 0).unwrap();
    guest.call(RMDIR, root, &name("d"), 0).unwrap();
    // Unlinked, and open: still there for whoever has it.
    assert_eq!(guest.read(f, handle, 0, 100).unwrap(), b"contents");
    assert_eq!(Attributes(&guest.attributes(f).unwrap()).nlink(), 0);
    let handle = guest.open(f, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(f, handle, 3, 2).unwrap(), b"te");
    assert!(fs::read_dir(host.path("")).unwrap().next().is_none());
}

#[test]
fn directories_list_whole_and_tell_nodes() {
    let host = Host::new();
    for i in 0..300 {
        fs::write(host.path(&format!("file-with-a-name-{i}")), "").unwrap();
    }
    symlink("/etc/passwd", host.path("link")).unwrap();
    for cache in [AUTO, ALWAYS] {
        let (mut guest, root) = host.guest(true, cache);
        let handle = guest
            .call(OPENDIR, root, &words(&[0, 0]), 16)
            .map_or(0, |answer| long_at(&answer, 0));
        for plus in [false, true] {
            let mut lines = guest.list(root, handle, plus);
            assert_eq!(lines.len(), 303);
            lines.retain(|(name, node)| name.starts_with("file") && (*node > 1) == plus);
            assert_eq!(lines.len(), 300);
        }
        let link = guest.lookup(root, "link").unwrap();
        assert_eq!(
            guest.call(READLINK, link, &[], 4096).unwrap(),
            b"/etc/passwd"
        );
    }
}

fn setting(key: &str, value: &[u8]) -> Vec<u8> {
    let length = u32::try_from(value.len()).unwrap();
    [words(&[length, 0]), name(key), value.to_vec()].concat()
}

fn getting(key: &str, size: u32) -> Vec<u8> {
    [words(&[size, 0]), name(key)].concat()
}

#[test]
fn extended_attributes_are_the_guests_own() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, _) = guest
        .create(root, "f", CREATED | libc::O_RDWR, 0o755)
        .unwrap();
    let supported = guest.call(SETXATTR, f, &setting("user.color", b"blue"), 0);
    // Some file systems of the host's have none.
    if supported != Err(libc::EOPNOTSUPP) {
        supported.unwrap();
        let mut get = |size| guest.call(GETXATTR, f, &getting("user.color", size), size.max(8));
        assert_eq!(get(100).unwrap(), b"blue");
        assert_eq!(word_at(&get(0).unwrap(), 0), 4);
        assert_eq!(get(2), Err(libc::ERANGE));
        let names = guest.call(LISTXATTR, f, &words(&[100, 0]), 100);
        assert_eq!(names.unwrap(), b"user.color\0");
        guest.call(REMOVEXATTR, f, &name("user.color"), 0).unwrap();
        let gone = guest.call(GETXATTR, f, &getting("user.color", 9), 9);
        assert_eq!(gone, Err(libc::ENODATA));
    }
    for foreign in [
        "trusted.overlay.opaque",
        "security.selinux",
        "system.posix_acl_access",
    ] {
        let set = guest.call(SETXATTR, f, &setting(foreign, b"y"), 0);
        assert_eq!(set, Err(libc::EOPNOTSUPP));
        let get = guest.call(GETXATTR, f, &getting(foreign, 100), 100);
        assert_eq!(get, Err(libc::EOPNOTSUPP));
    }
}

#[test]
fn file_capabilities_are_kept_until_somebody_writes() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let (f, handle) = guest
        .create(root, "f", CREATED | libc::O_RDWR, 0o755)
        .unwrap();
    // cap_net_raw+ep, as file capabilities of version 2.
    let capability = words(&[0x0200_0001, 1 << 13, 0, 0, 0]);
    let set = setting("security.capability", &capability);
    guest.call(SETXATTR, f, &set, 0).unwrap();
    let get = getting("security.capability", 100);
    assert_eq!(guest.call(GETXATTR, f, &get, 100).unwrap(), capability);
    guest
        .write(f, handle, 0, (0, libc::O_RDWR), b"other code")
        .unwrap();
    assert_eq!(guest.call(GETXATTR, f, &get, 100), Err(libc::ENODATA));
}

#[test]
fn special_files_allocation_holes_and_figures_work() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    for (node, kind) in [
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("null", libc::S_IFCHR),
    ] {
        let body = [words(&[kind | 0o600, 0x103, 0, 0]), name(node)].concat();
        guest.call(MKNOD, root, &body, 128).unwrap();
    }
    assert!(
        fs::metadata(host.path("socket"))
            .unwrap()
            .file_type()
            .is_socket()
    );
    assert_eq!(
        fs::metadata(host.path("null")).unwrap().rdev(),
        rustix::fs::makedev(1, 3)
    );
    let (f, handle) = guest
        .create(root, "sparse", CREATED | libc::O_RDWR, 0o644)
        .unwrap();
    let allocate = |mode: i32, offset: u64, length: u64| {
        [
            longs(&[handle, offset, length]),
            words(&[mode.cast_unsigned(), 0]),
        ]
        .concat()
    };
    guest
        .call(FALLOCATE, f, &allocate(0, 0, 1 << 20), 0)
        .unwrap();
    assert_eq!(fs::metadata(host.path("sparse")).unwrap().len(), 1 << 20);
    assert_eq!(
        guest.call(FALLOCATE, f, &allocate(0x4000, 0, 1), 0),
        Err(libc::EOPNOTSUPP)
    );
    guest.set_attributes(f, 8, 0, 0, (0, 0)).unwrap();
    guest.set_attributes(f, 8, 1 << 20, 0, (0, 0)).unwrap();
    guest
        .write(f, handle, 1 << 19, (0, libc::O_RDWR), b"data")
        .unwrap();
    let seek = |whence: i32| [longs(&[handle, 0]), words(&[whence.cast_unsigned(), 0])].concat();
    assert_eq!(
        long_at(&guest.call(LSEEK, f, &seek(libc::SEEK_DATA), 8).unwrap(), 0),
        1 << 19
    );
    assert_eq!(
        long_at(&guest.call(LSEEK, f, &seek(libc::SEEK_HOLE), 8).unwrap(), 0),
        0
    );
    guest
        .call(FSYNC, f, &[longs(&[handle]), words(&[0, 0])].concat(), 0)
        .unwrap();
    guest.call(50, ROOT, &longs(&[0]), 0).unwrap();
    assert!(long_at(&guest.call(STATFS, root, &[], 80).unwrap(), 0) > 0);
}

#[test]
fn a_file_without_a_name_belongs_to_its_user_and_gets_one_by_linking() {
    let host = Host::new();
    for cache in [AUTO, ALWAYS] {
        let (mut guest, root) = host.guest(false, cache);
        guest.user = (1000, 1001);
        let create = words(&[libc::O_RDWR.cast_unsigned(), 0o640, 0, 0]);
        let answer = guest.call(TMPFILE, root, &[create.clone(), name("/")].concat(), 144);
        let answer = answer.unwrap();
        let (node, handle) = (long_at(&answer, 0), long_at(&answer, 128));
        assert_eq!(Attributes(&answer[40..]).nlink(), 0);
        guest
            .write(node, handle, 0, (0, libc::O_RDWR), b"quiet")
            .unwrap();
        assert_eq!(fs::read_dir(host.path("")).unwrap().count(), 0);
        let link = [longs(&[node]), name("named")].concat();
        guest.call(LINK, root, &link, 128).unwrap();
        assert_eq!(fs::read(host.path("named")).unwrap(), b"quiet");
        assert_eq!(fs::metadata(host.path("named")).unwrap().uid(), 1000);
        fs::remove_file(host.path("named")).unwrap();
        let mut reader = Guest::new(vec![host.export(true, cache)]);
        let root = reader.lookup(ROOT, "root").unwrap();
        assert_eq!(reader.call(TMPFILE, root, &create, 144), Err(libc::EROFS));
        assert_eq!(reader.call(TMPFILE, ROOT, &create, 144), Err(libc::EROFS));
        assert_eq!(
            reader.call(TMPFILE, ROOT, &create[..8], 144),
            Err(libc::EINVAL)
        );
    }
}

#[test]
fn what_is_kept_open_never_outlives_a_truncation() {
    let host = Host::new();
    fs::write(host.path("f"), "before").unwrap();
    let (mut guest, root) = host.guest(false, ALWAYS);
    let f = guest.lookup(root, "f").unwrap();
    assert_eq!(guest.read(f, 0, 0, 10).unwrap(), b"before");
    assert_eq!(guest.device.tree.lock().files.kept_open(), 1);
    guest.set_attributes(f, 8, 2, 0, (0, 0)).unwrap();
    assert_eq!(guest.device.tree.lock().files.kept_open(), 0);
    guest.read(f, 0, 0, 10).unwrap();
    guest.write(f, 0, 0, (0, libc::O_RDWR), b"xy").unwrap();
    assert_eq!(guest.device.tree.lock().files.kept_open(), 1);
    assert_eq!(guest.read(f, 0, 0, 10).unwrap(), b"xy");
}

#[test]
fn requests_are_counted_by_kind() {
    let host = Host::new();
    let (mut guest, root) = host.guest(false, AUTO);
    let stats = guest.device.stats();
    let before = stats.total();
    guest.attributes(root).unwrap();
    guest.attributes(root).unwrap();
    assert_eq!(stats.total(), before + 2);
    assert_eq!(
        stats.by_operation(),
        [("lookup", 1), ("getattr", 2), ("init", 1)]
    );
}

#[test]
fn an_unmounted_device_is_saved_and_serves_whatever_it_is_given() {
    let host = Host::new();
    let mut guest = Guest::unmounted(vec![host.export(false, ALWAYS)], FsLimits::default());
    let mut config = [0; 44];
    VirtioDevice::read_config(&guest.device, 0, &mut config);
    assert_eq!(
        (&config[..5], &config[36..]),
        (&b"hull\0"[..], &[1, 0, 0, 0, 0, 0, 0, 0][..])
    );
    let other = Guest::unmounted(vec![], FsLimits::default());
    let mut restored = other.device;
    persist_roundtrip(&guest.device, &mut restored);
    guest.mount();
    // What is mounted shows other directories.
    assert!(restored.restore(guest.device.save().unwrap()).is_err());
    guest.call(DESTROY, 0, &[], 0).unwrap();
    persist_roundtrip(&guest.device, &mut restored);
    guest.mount();
    assert!(guest.lookup(ROOT, "root").is_ok());
}

#[test]
fn directories_come_and_go_while_it_is_mounted() {
    let (one, two) = (Host::new(), Host::new());
    fs::write(two.path("b"), "two").unwrap();
    let mut guest = Guest::new(vec![one.export(false, AUTO)]);
    let shares = guest.device.shares();
    let named = |name: &str| FsExport {
        name: name.to_owned(),
        ..two.export(false, AUTO)
    };
    let before = guest.device.tree.lock().nodes.len();
    shares.add(vec![named("c1.v0"), named("c2.v0")]).unwrap();
    let b = guest.lookup(ROOT, "c1.v0/b").unwrap();
    assert_eq!(
        guest.lookup(ROOT, "c2.v0/b"),
        Ok(b),
        "one directory, one cache"
    );
    let handle = guest.open(b, libc::O_RDONLY).unwrap();

    // All or none.
    let refused = shares.add(vec![named("c3.v0"), named("c1.v0")]);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EEXIST));
    assert_eq!(guest.lookup(ROOT, "c3.v0"), Err(libc::ENOENT));

    shares.remove(&["c1.v0".to_owned()]);
    assert_eq!(guest.lookup(ROOT, "c1.v0"), Err(libc::ENOENT));
    assert_eq!(guest.read(b, handle, 0, 100).unwrap(), b"two", "still c2's");
    shares.remove(&["c2.v0".to_owned()]);
    assert_eq!(guest.read(b, handle, 0, 100), Err(libc::EBADF));
    assert_eq!(guest.attributes(b), Err(libc::EBADF));
    assert_eq!(guest.device.tree.lock().nodes.len(), before);

    // What comes in its place is none of the old one's.
    shares.add(vec![named("c1.v0")]).unwrap();
    assert_ne!(guest.lookup(ROOT, "c1.v0/b").unwrap(), b);
}

#[test]
fn nothing_is_added_for_a_guest_that_does_not_ask_again() {
    let (one, two) = (Host::new(), Host::new());
    let guest = Guest::new(vec![one.export(false, ALWAYS)]);
    let refused = guest.device.shares().add(vec![two.export(false, AUTO)]);
    assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EBUSY));
}
