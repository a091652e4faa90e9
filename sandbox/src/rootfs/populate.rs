//! Fills an anonymous volume with what the image has at its place, as Docker does.
//!
//! The image is a stranger's: its paths are resolved within its root, its links are copied and
//! never followed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::copy::Copying;
use super::{RootfsError, at, make};

/// The directory `volume`, filled on its first use with `root`'s directory at `target`.
pub(super) fn volume(volume: &Path, root: &Path, target: &str) -> Result<PathBuf, RootfsError> {
    if volume.is_dir() {
        return Ok(volume.to_owned());
    }
    let fresh = volume.with_extension("new");
    match fs::remove_dir_all(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(at("remove", &fresh)(error));
        }
        _ => {}
    }
    make(&fresh)?;
    fill(&fresh, root, target).map_err(at("copy the image's files to", &fresh))?;
    fs::rename(&fresh, volume).map_err(at("rename", &fresh))?;
    Ok(volume.to_owned())
}

fn fill(fresh: &Path, root: &Path, target: &str) -> io::Result<()> {
    let read = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(root, read, Mode::empty())?;
    let to = rustix::fs::open(fresh, read, Mode::empty())?;
    let inside = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let from = match rustix::fs::openat2(&root, target, read, Mode::empty(), inside) {
        Ok(from) => from,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => {
            rustix::fs::fchmod(&to, Mode::from_raw_mode(0o755))?;
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    };
    Copying::of_image().directory(&from, &to)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn links_are_copied_and_stay_within_the_root() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir_all(root.join("real/sub")).unwrap();
        fs::write(root.join("real/sub/file"), "x").unwrap();
        fs::set_permissions(
            root.join("real/sub/file"),
            PermissionsExt::from_mode(0o4751),
        )
        .unwrap();
        symlink("/etc/passwd", root.join("real/link")).unwrap();
        symlink("/../../real", root.join("data")).unwrap();
        let volume = directory.path().join("v1");
        super::volume(&volume, &root, "/data").unwrap();
        assert_eq!(fs::read_to_string(volume.join("sub/file")).unwrap(), "x");
        let mode = fs::metadata(volume.join("sub/file"))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o4751);
        assert_eq!(
            fs::read_link(volume.join("link")).unwrap(),
            Path::new("/etc/passwd")
        );
    }

    #[test]
    fn a_target_that_the_image_lacks_is_an_empty_volume() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().join("root");
        fs::create_dir(&root).unwrap();
        let volume = directory.path().join("v1");
        super::volume(&volume, &root, "/data").unwrap();
        assert_eq!(fs::read_dir(&volume).unwrap().count(), 0);
    }
}
