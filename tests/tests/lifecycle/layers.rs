//! Images of several layers, put together in each way that there is.

use std::fs;

use hull_tests::hull::Hull;
use hull_tests::image::{self, Image};

const NAME: &str = "layered:test";
const LOOK: &str = "cat /etc/motd; ls /srv /data; cat /data/new";

#[test]
fn an_image_of_several_layers_is_one_root() {
    let Some(hull) = Hull::new() else { return };
    let directory = tempfile::tempdir().unwrap();
    let archive = directory.path().join("layered.tar");
    Image::new()
        .with_layer(&[("etc/motd", "the middle\n"), ("srv/.wh.plain", "")])
        .with_layer(&[
            ("etc/motd", "the top\n"),
            ("data/.wh..wh..opq", ""),
            ("data/new", "of the top\n"),
        ])
        .save_as(&archive, [(NAME, image::plain())]);
    let archive = archive.to_str().unwrap();
    hull.cmd(["load", "-i", archive]).output().ok();
    let file = directory.path().join("file");
    fs::write(&file, "of the host\n").unwrap();
    // With a file of the host's, it is put together in a namespace.
    let bound = format!("{}:/etc/bound", file.display());
    for more in [
        [].as_slice(),
        &["--no-template"],
        &["-v", "/data"],
        &["-v", &bound],
    ] {
        let run = ["run", "--rm"].iter().chain(more);
        let run = run.chain(&[NAME, "sh", "-c", LOOK]);
        let seen = hull.cmd(run).output().ok();
        let expected = "the top\n/data:\nnew\n\n/srv:\nlost\nscript\nof the top\n";
        // busybox's ls sorts what it is asked for.
        assert_eq!(seen, expected, "{more:?}");
    }
}
