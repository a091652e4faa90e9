//! Loads and pulls, killed.

use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Instant;

use hull_tests::hull::Hull;
use hull_tests::image::Image;
use hull_tests::process::DEADLINE;
use rustix::process::Signal;

use super::archive::Tar;
use super::moments::later;
use super::registry::{Answer, Content, Registry};

fn names(hull: &Hull, part: &str) -> Vec<String> {
    let directory = hull.state_dir().join("images").join(part);
    let names = fs::read_dir(directory).unwrap();
    let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
    names
        .map(|entry| name(entry).to_string_lossy().into_owned())
        .collect()
}

/// Asserts that what the killed one left half-made is gone, once another command has looked.
#[track_caller]
fn nothing_half_made(hull: &Hull) {
    for part in ["ingest", "unpack"] {
        assert_eq!(names(hull, part), Vec::<String>::new(), "{part}");
    }
}

fn load(hull: &Hull, archive: &Path) -> hull_tests::process::Process {
    let words = [
        "load".as_ref(),
        "-q".as_ref(),
        "-i".as_ref(),
        archive.as_os_str(),
    ];
    hull.cmd(words)
}

#[test]
fn a_load() {
    let Some(hull) = Hull::new() else { return };
    let archive = hull.path().join("archive.tar");
    Image::new().save(&archive);
    let begun = Instant::now();
    load(&hull, &archive).output().ok();
    let whole = begun.elapsed();
    hull.cmd(["rmi", "busybox:test", "configured:test"])
        .output()
        .ok();
    assert_eq!(names(&hull, "layers"), Vec::<String>::new());
    const MOMENTS: u32 = 6;
    for moment in 0..MOMENTS {
        let loading = load(&hull, &archive).spawn();
        later(loading.pid(), whole * moment / MOMENTS);
        let pid = loading.pid();
        // Not by `Running::signal`, as it may have ended by itself.
        let _gone = rustix::process::kill_process(pid, Signal::KILL);
        let _killed = loading.wait();
        let listed = hull.cmd(["images", "-aq"]).output().ok();
        assert!(listed.lines().count() <= 2, "{listed}");
        nothing_half_made(&hull);
    }
    assert_eq!(
        load(&hull, &archive).output().ok(),
        "Loaded image: busybox:test\nLoaded image: configured:test\n"
    );
    nothing_half_made(&hull);
    let done = hull
        .cmd(["run", "--rm", "busybox:test", "echo", "whole"])
        .output();
    assert_eq!(done.all(), (0, "whole\n".into(), String::new()));
}

#[test]
fn a_pull() {
    let Some(hull) = Hull::new() else { return };
    let layer = Tar::default()
        .file("f", &"content ".repeat(99_999))
        .finish();
    let content = Content::new(&layer);
    let digest = content.layer.clone();
    let (told, half_sent) = mpsc::channel();
    let stalls = Arc::new(AtomicBool::new(true));
    let stalling = Arc::clone(&stalls);
    let registry = Registry::serve(move |path| match content.honest(path) {
        Answer::Whole(bytes)
            if path.ends_with(&content.layer) && stalling.load(Ordering::SeqCst) =>
        {
            Answer::Half(bytes, told.clone())
        }
        answer => answer,
    });
    let name = registry.name("a/b:1");
    for signal in [Signal::KILL, Signal::INT, Signal::TERM] {
        let pulling = hull.cmd(["pull", "-q", &name]).spawn();
        half_sent.recv_timeout(DEADLINE).unwrap();
        pulling.signal(signal);
        assert_eq!(pulling.wait().code, 128 + signal.as_raw());
        assert_eq!(hull.cmd(["images", "-aq"]).output().ok(), "");
        assert_eq!(names(&hull, "layers"), Vec::<String>::new());
        assert!(!names(&hull, "blobs/sha256").contains(&digest[7..].to_owned()));
        let ran = hull.cmd(["run", "--rm", "--pull", "never", &name]).output();
        assert_eq!(ran.code, 125, "{:?}", ran.all());
    }
    stalls.store(false, Ordering::SeqCst);
    let pulled = hull.cmd(["pull", "-q", &name]).output();
    assert!(pulled.ok().contains("a/b:1"), "{pulled:?}");
    nothing_half_made(&hull);
    assert_eq!(names(&hull, "layers").len(), 1);
    hull.cmd(["rmi", &name]).output().ok();
    assert_eq!(names(&hull, "blobs/sha256"), Vec::<String>::new());
}
