//! What an image, an archive or a registry says.

use std::fs;
use std::io::{Seek as _, Write as _};
use std::sync::OnceLock;

use hull_images::{Digest, ImageStore, Reference, Silent, testing};

/// A layer's bytes, compressed or not, unpacked beside a file that must not change.
pub(crate) fn layer(data: &[u8]) {
    let host = tempfile::tempdir().unwrap();
    let (target, secret) = (host.path().join("layer"), host.path().join("secret"));
    fs::create_dir(&target).unwrap();
    fs::write(&secret, "secret").unwrap();
    let mut blob = tempfile::tempfile().unwrap();
    blob.write_all(data).unwrap();
    blob.rewind().unwrap();
    let _ = testing::unpack_layer(blob, &target);
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::read_dir(host.path()).unwrap().count(), 2);
}

pub(crate) fn document(data: &[u8]) {
    testing::read_document(data);
}

pub(crate) fn reference(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let _ = text.parse::<Digest>();
    let Ok(reference) = Reference::parse(text) else {
        return;
    };
    // Its path goes into URLs, its names into files of ours.
    for name in [reference.to_string(), reference.familiar()] {
        assert_eq!(Reference::parse(&name).as_ref(), Ok(&reference), "{name}");
    }
    assert!(
        !reference
            .repository()
            .split('/')
            .any(|part| matches!(part, "" | "." | ".."))
    );
}

/// A tarball given to `hull load`, into a store that stays.
pub(crate) fn archive(data: &[u8]) {
    static STORE: OnceLock<(tempfile::TempDir, ImageStore)> = OnceLock::new();
    let (_, store) = STORE.get_or_init(|| {
        let directory = tempfile::tempdir().unwrap();
        let store = ImageStore::open(directory.path().join("images")).unwrap();
        (directory, store)
    });
    let loaded = store.load_reader(&mut &data[..], "input", &Silent);
    for image in loaded.iter().flatten() {
        let _ = store.remove(&image.id.to_string(), true, &|_| None);
    }
}
