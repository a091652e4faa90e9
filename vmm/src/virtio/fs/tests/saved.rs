//! A mounted file system that another device goes on with.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::time::{Duration, SystemTime};

use super::*;
use crate::testing::persist_roundtrip;
use crate::virtio::fs::KnownBy;

const ALWAYS: CachePolicy = CachePolicy::Always;
const AUTO: CachePolicy = CachePolicy::Auto;
/// The node of the only export.
const SHARE: u64 = ROOT + 1;

/// A host directory with a few files.
fn filled() -> Host {
    let host = Host::new();
    fs::create_dir_all(host.path("a/b")).unwrap();
    fs::write(host.path("a/b/file"), "content").unwrap();
    fs::write(host.path("other"), "other").unwrap();
    symlink("/etc/passwd", host.path("a/link")).unwrap();
    host
}

/// A guest that knows all of them, and has one open.
fn busy(host: &Host, cache: CachePolicy) -> (Guest, u64, u64) {
    let (mut guest, root) = host.guest(false, cache);
    let file = guest.lookup(root, "a/b/file").unwrap();
    guest.lookup(root, "a/link").unwrap();
    guest.lookup(root, "other").unwrap();
    let handle = guest.open(file, libc::O_RDWR).unwrap_or_default();
    (guest, file, handle)
}

/// A device of another process that is to go on, showing `host`.
fn heir(host: &Host, cache: CachePolicy, from: &Guest) -> Result<Guest, String> {
    let mut heir = Guest::unmounted(vec![host.export(false, cache)], FsLimits::default());
    let state = from.device.save().map_err(|Unsaveable(why)| why)?;
    heir.device
        .restore(state)
        .map_err(|error| error.to_string())?;
    Ok(heir)
}

#[test]
fn what_the_guest_knows_survives_with_its_numbers() {
    for cache in [ALWAYS, AUTO] {
        let host = filled();
        let (mut guest, file, handle) = busy(&host, cache);
        guest.write(file, handle, 0, (0, 0), b"CON").unwrap();
        let mut other = Guest::unmounted(vec![host.export(false, cache)], FsLimits::default());
        persist_roundtrip(&guest.device, &mut other.device);
        assert_eq!(other.read(file, handle, 0, 100).unwrap(), b"CONtent");
        other.write(file, handle, 3, (0, 0), b"TENT").unwrap();
        assert_eq!(fs::read(host.path("a/b/file")).unwrap(), b"CONTENT");
        // Numbers aren't given out twice, and those that are known stay.
        let fresh = other.lookup(SHARE, "a").unwrap();
        assert_eq!(other.lookup(fresh, "b/file").unwrap(), file);
        fs::write(host.path("new"), "").unwrap();
        let new = other.lookup(SHARE, "new").unwrap();
        assert!(guest.lookup(SHARE, "new").unwrap() == new && new > file);
    }
}

#[test]
fn a_copy_of_the_directory_will_do_where_nobody_else_writes() {
    let (host, copy) = (filled(), filled());
    let (guest, file, handle) = busy(&host, ALWAYS);
    let same_time = |path: &str| {
        let time = fs::metadata(host.path(path)).unwrap().modified().unwrap();
        let file = File::options().write(true).open(copy.path(path)).unwrap();
        file.set_modified(time).unwrap();
    };
    same_time("a/b/file");
    same_time("other");
    let mut heir = heir(&copy, ALWAYS, &guest).unwrap();
    heir.write(file, handle, 0, (0, 0), b"C").unwrap();
    assert_eq!(fs::read(copy.path("a/b/file")).unwrap(), b"Content");
    assert_eq!(fs::read(host.path("a/b/file")).unwrap(), b"content");
}

#[test]
fn by_what_a_file_is_known_is_its_exports_own() {
    let (host, copy) = (filled(), filled());
    let (mut guest, ..) = busy(&host, AUTO);
    let _socket = UnixListener::bind(host.path("a/socket")).unwrap();
    fs::set_permissions(host.path("a/socket"), Permissions::from_mode(0o640)).unwrap();
    guest.lookup(SHARE, "a/socket").unwrap();
    let heir = |known_by| {
        let mut export = copy.export(false, AUTO);
        export.known_by = known_by;
        let mut heir = Guest::unmounted(vec![export], FsLimits::default());
        let state = guest.device.save().map_err(|Unsaveable(why)| why)?;
        let restored = heir.device.restore(state);
        restored.map_err(|error| error.to_string())
    };
    for path in ["a/b/file", "other"] {
        let time = fs::metadata(host.path(path)).unwrap().modified().unwrap();
        let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let second = SystemTime::UNIX_EPOCH + Duration::from_secs(second.as_secs());
        let file = File::options().write(true).open(copy.path(path)).unwrap();
        file.set_modified(second).unwrap();
    }
    // As an archive has it.
    assert_eq!(heir(KnownBy::Content), Ok(()));
    // What an archive leaves out.
    let made = fs::metadata(copy.path("a/socket")).unwrap();
    assert!(made.file_type().is_socket());
    assert_eq!(made.mode() & 0o777, 0o640);
    let why = heir(KnownBy::Inode).unwrap_err();
    assert!(why.contains("another file is in its place"), "{why}");
    fs::write(copy.path("other"), "others").unwrap();
    let why = heir(KnownBy::Content).unwrap_err();
    assert!(
        why.contains("\"/other\"") && why.contains("changed"),
        "{why}"
    );
    assert_eq!(heir(KnownBy::Path), Ok(()));
    fs::remove_file(copy.path("other")).unwrap();
    let why = heir(KnownBy::Path).unwrap_err();
    assert!(
        why.contains("\"/other\"") && why.contains("is gone"),
        "{why}"
    );
}

#[test]
fn a_share_that_changed_underneath_is_named() {
    type Change<'a> = (&'static str, &'a str, &'a dyn Fn(&Host));
    let changes: [Change<'_>; 5] = [
        ("gone", "is gone", &|host| {
            fs::remove_file(host.path("a/b/file")).unwrap()
        }),
        ("a directory gone", "is gone", &|host| {
            fs::remove_dir_all(host.path("a/b")).unwrap();
        }),
        ("replaced", "is not what it was", &|host| {
            fs::write(host.path("fresh"), "contents").unwrap();
            fs::rename(host.path("fresh"), host.path("a/b/file")).unwrap();
        }),
        ("of another kind", "of another kind", &|host| {
            fs::remove_file(host.path("a/b/file")).unwrap();
            fs::create_dir(host.path("a/b/file")).unwrap();
        }),
        ("a link on the way", "is not what it was", &|host| {
            fs::rename(host.path("a/b"), host.path("elsewhere")).unwrap();
            symlink(host.path("elsewhere"), host.path("a/b")).unwrap();
        }),
    ];
    for cache in [ALWAYS, AUTO] {
        for (what, word, change) in &changes {
            let host = filled();
            let (guest, ..) = busy(&host, cache);
            let state = guest.device.save().unwrap();
            change(&host);
            let mut heir = Guest::unmounted(vec![host.export(false, cache)], FsLimits::default());
            let refusal = heir.device.restore(state).unwrap_err().to_string();
            assert!(refusal.contains(word), "{what}: {refusal}");
            assert!(refusal.contains("/a/b"), "{what}: {refusal}");
        }
    }
}

#[test]
fn the_hosts_own_writes_are_no_change_where_it_writes_too() {
    let host = filled();
    let (guest, file, handle) = busy(&host, AUTO);
    let state = guest.device.save().unwrap();
    fs::write(host.path("a/b/file"), "more than before").unwrap();
    let mut other = Guest::unmounted(vec![host.export(false, AUTO)], FsLimits::default());
    other.device.restore(state).unwrap();
    assert_eq!(other.read(file, handle, 0, 4).unwrap(), b"more");
    // Where nobody else is to write, it is one.
    let (guest, ..) = busy(&host, ALWAYS);
    let state = guest.device.save().unwrap();
    let changed = File::options()
        .write(true)
        .open(host.path("a/b/file"))
        .unwrap();
    changed.set_modified(SystemTime::UNIX_EPOCH).unwrap();
    let mut other = Guest::unmounted(vec![host.export(false, ALWAYS)], FsLimits::default());
    let refusal = other.device.restore(state).unwrap_err().to_string();
    assert!(
        refusal.contains("/a/b/file") && refusal.contains("changed since"),
        "{refusal}"
    );
}

#[test]
fn what_has_no_name_can_not_be_saved() {
    let host = filled();
    let (mut guest, file, _) = busy(&host, AUTO);
    fs::remove_file(host.path("a/b/file")).unwrap();
    let Unsaveable(why) = guest.device.save().unwrap_err();
    assert!(
        why.contains("\"/a/b/file\"") && why.contains("removed"),
        "{why}"
    );
    // A name that looks as if it had been removed is none that was.
    guest.device.tree.forget([(file, 1)]);
    fs::write(host.path("a/x (deleted)"), "").unwrap();
    let odd = guest.lookup(SHARE, "a/x (deleted)").unwrap();
    let mut heir = heir(&host, AUTO, &guest).unwrap();
    assert!(heir.attributes(odd).is_ok());
}

#[test]
fn a_state_gives_no_rights_that_the_share_does_not() {
    let host = filled();
    let (guest, file, handle) = busy(&host, AUTO);
    assert!(handle > 0);
    let mut reader = Guest::unmounted(vec![host.export(true, AUTO)], FsLimits::default());
    let state = guest.device.save().unwrap();
    let refusal = reader
        .device
        .restore(state.clone())
        .unwrap_err()
        .to_string();
    assert!(refusal.contains("Read-only"), "{refusal}");
    // Paths lead nowhere but down, and numbers are the guest's alone.
    let text = serde_json::to_value(&state).unwrap();
    let bend = |key: &str, value: serde_json::Value| {
        let mut bent = text.clone();
        let nodes = bent["mounted"]["Own"]["nodes"].as_array_mut().unwrap();
        nodes.iter_mut().for_each(|node| {
            if node["id"] == file {
                node[key] = value.clone();
            }
        });
        serde_json::from_value::<FsState>(bent).unwrap()
    };
    for (key, value) in [
        ("path", serde_json::json!(b"../../etc/passwd".to_vec())),
        ("path", serde_json::json!(b"/etc/passwd".to_vec())),
        ("path", serde_json::json!(b"a/link".to_vec())),
        ("path", serde_json::json!(b"a/link/x".to_vec())),
        ("path", serde_json::json!(vec![0; 3])),
        ("id", serde_json::json!(1)),
        ("id", serde_json::json!(2)),
        ("export", serde_json::json!(7)),
    ] {
        let mut heir = Guest::unmounted(vec![host.export(false, AUTO)], FsLimits::default());
        assert!(
            heir.device.restore(bend(key, value.clone())).is_err(),
            "{key} {value}"
        );
    }
    for key in ["next_node", "next_handle"] {
        let mut bent = text.clone();
        bent["mounted"]["Own"][key] = serde_json::json!(u64::MAX);
        let bent: FsState = serde_json::from_value(bent).unwrap();
        let mut heir = Guest::unmounted(vec![host.export(false, AUTO)], FsLimits::default());
        assert!(heir.device.restore(bent).is_err(), "{key}");
    }
    let few = FsLimits {
        inodes: 2,
        handles: 9,
    };
    let mut heir = Guest::unmounted(vec![host.export(false, AUTO)], few);
    assert!(heir.device.restore(state).is_err());
}
