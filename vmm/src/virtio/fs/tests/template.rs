//! A mount that a template's guest has, and that copies have other directories for.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;

use super::*;

const ALWAYS: CachePolicy = CachePolicy::Always;
const AUTO: CachePolicy = CachePolicy::Auto;

fn named(host: &Host, name: &str, cache: CachePolicy) -> FsExport {
    FsExport {
        name: name.to_owned(),
        ..host.export(false, cache)
    }
}

fn device(exports: Vec<FsExport>, role: FsRole) -> Guest {
    Guest::in_role(exports, role, FsLimits::default(), None)
}

/// A template's guest that has looked up `root` of the two shares that it has mounted.
fn template(stage: &Host, cache: CachePolicy) -> (Guest, u64) {
    let other = Host::new();
    let exports = vec![
        named(stage, "root", cache),
        named(&other, "identity", cache),
    ];
    let mut guest = device(exports, FsRole::Template);
    guest.mount();
    let root = guest.lookup(ROOT, "root").unwrap();
    (guest, root)
}

/// What a device with these directories makes of what was saved.
fn copied(from: &Guest, exports: Vec<FsExport>, role: FsRole) -> Result<Guest, String> {
    let mut copy = device(exports, role);
    let state = from.device.save().map_err(|Unsaveable(why)| why)?;
    let restored = copy.device.restore(state);
    restored.map_err(|error| error.to_string()).map(|()| copy)
}

#[test]
fn a_copys_directories_take_the_place_of_the_templates() {
    let stage = Host::new();
    fs::write(stage.path("program"), "the rehearsal's").unwrap();
    let (template, root) = template(&stage, ALWAYS);
    let (own, identity, volume) = (Host::new(), Host::new(), Host::new());
    fs::write(own.path("file"), "own").unwrap();
    fs::set_permissions(own.path(""), Permissions::from_mode(0o700)).unwrap();
    let exports = vec![
        named(&own, "root", ALWAYS),
        named(&identity, "identity", ALWAYS),
        named(&volume, "v0", ALWAYS),
    ];
    let mut copy = copied(&template, exports, FsRole::Copy).unwrap();
    // What the guest knows is the copy's own directory, by number and by name.
    let mode = |answer: Vec<u8>| Attributes(&answer).mode() & 0o777;
    assert_eq!(mode(copy.attributes(root).unwrap()), 0o700);
    assert_eq!(copy.lookup(ROOT, "root").unwrap(), root);
    assert_eq!(copy.lookup(root, "program"), Err(libc::ENOENT));
    let file = copy.lookup(root, "file").unwrap();
    assert_eq!(copy.read(file, 0, 0, 9).unwrap(), b"own", "without opening");
    let others = [
        copy.lookup(ROOT, "identity").unwrap(),
        copy.lookup(ROOT, "v0").unwrap(),
    ];
    assert!(others.iter().all(|other| *other != root) && others[0] != others[1]);
    // From here on it is saved as any other: with its files, for the same directories.
    let state = copy.device.save().unwrap();
    let exports = || {
        vec![
            named(&own, "root", ALWAYS),
            named(&identity, "identity", ALWAYS),
            named(&volume, "v0", ALWAYS),
        ]
    };
    let mut heir = device(exports(), FsRole::Own);
    heir.device.restore(state.clone()).unwrap();
    assert_eq!(heir.read(file, 0, 0, 9).unwrap(), b"own");
    assert_eq!(heir.lookup(ROOT, "root").unwrap(), root);
    // What is one's own is no other's, whatever its names, and the other way round.
    assert!(
        device(exports(), FsRole::Copy)
            .device
            .restore(state)
            .is_err()
    );
    assert!(copied(&template, exports(), FsRole::Own).is_err());
}

#[test]
fn a_templates_guest_keeps_names_but_no_attributes() {
    for cache in [ALWAYS, AUTO] {
        let stage = Host::new();
        let (mut guest, root) = template(&stage, cache);
        let entry = guest.call(LOOKUP, ROOT, &name("root"), 128).unwrap();
        assert!(long_at(&entry, 16) > 0);
        assert_eq!((long_at(&entry, 24), word_at(&entry, 36)), (0, 0));
        for node in [ROOT, root] {
            let told = guest.call(GETATTR, node, &longs(&[0, 0]), 104).unwrap();
            assert_eq!((long_at(&told, 0), word_at(&told, 8)), (0, 0), "{node}");
        }
        // A copy's does, as long as ever.
        let exports = vec![named(&stage, "root", cache)];
        let mut copy = copied(&guest, exports, FsRole::Copy).unwrap();
        let told = copy.call(GETATTR, root, &longs(&[0, 0]), 104).unwrap();
        assert!(long_at(&told, 0) > 0);
    }
}

#[test]
fn a_guest_that_knows_more_than_names_is_no_template() {
    let stage = Host::new();
    fs::write(stage.path("file"), "").unwrap();
    for cache in [ALWAYS, AUTO] {
        let (mut guest, root) = template(&stage, cache);
        let file = guest.lookup(root, "file").unwrap();
        let Unsaveable(why) = guest.device.save().unwrap_err();
        assert!(why.contains("a file"), "{why}");
        guest.device.tree.forget([(file, 1)]);
        assert!(guest.device.save().is_ok());
        if let Ok(answer) = guest.call(OPENDIR, root, &longs(&[0]), 16) {
            let Unsaveable(why) = guest.device.save().unwrap_err();
            assert!(why.contains("an open file"), "{why}");
            assert!(long_at(&answer, 0) > 0);
        }
        // Its next mount begins with nothing.
        guest.call(DESTROY, 0, &[], 0).unwrap();
        guest.mount();
        assert!(guest.device.save().is_ok());
    }
}

#[test]
fn what_the_copys_directories_do_not_bear_out_is_refused() {
    let stage = Host::new();
    let (template, _) = template(&stage, ALWAYS);
    let own = Host::new();
    let refusal = |exports| copied(&template, exports, FsRole::Copy).err().unwrap();
    let unknown = refusal(vec![named(&own, "rootfs", ALWAYS)]);
    assert!(unknown.contains("\"root\", which isn't shown"), "{unknown}");
    let volume = Host::new();
    let moved = refusal(vec![
        named(&volume, "v0", ALWAYS),
        named(&own, "root", ALWAYS),
    ]);
    assert!(moved.contains("another number"), "{moved}");
    // Others write to one of them: the guest would never see that.
    let shared = refusal(vec![
        named(&own, "root", ALWAYS),
        named(&volume, "v0", AUTO),
    ]);
    assert!(shared.contains("promised more"), "{shared}");
    // Promised less, it asks more often than it must.
    let (template, root) = self::template(&stage, AUTO);
    let exports = vec![named(&own, "root", ALWAYS)];
    let mut copy = copied(&template, exports, FsRole::Copy).unwrap();
    assert!(copy.attributes(root).is_ok());
}

#[test]
fn a_template_whose_guest_has_not_mounted_it_fits_any_copy() {
    let (stage, own) = (Host::new(), Host::new());
    let template = device(vec![named(&stage, "root", ALWAYS)], FsRole::Template);
    let exports = vec![named(&own, "other", AUTO)];
    let mut copy = copied(&template, exports, FsRole::Copy).unwrap();
    copy.mount();
    assert!(copy.lookup(ROOT, "other").is_ok());
}
