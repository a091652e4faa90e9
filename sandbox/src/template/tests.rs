//! Templates of a made-up machine: what was written is read, and nothing else is.

use std::fs::FileTimes;
use std::os::unix::fs::FileExt;
use std::time::SystemTime;

use proptest::prelude::*;
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};

use super::*;

const MEMORY: u64 = 64 << 20;

fn memory() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    file.write_all_at(b"first page", 0).unwrap();
    file.write_all_at(&[7; 3 << 20], 5 << 20).unwrap();
    file.write_all_at(&[0; 1 << 20], 20 << 20).unwrap();
    file.write_all_at(b"last page", MEMORY - 4096).unwrap();
    file
}

/// What is on a disk, and its bytes.
fn disk() -> (Content, Vec<u8>) {
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(b"mounted", 1 << 20).unwrap();
    file.write_all_at(&[9; 9000], 3 << 20).unwrap();
    Content::of(&file).unwrap()
}

fn state() -> MachineState {
    let empty = serde_json::json!({
        "epoch": 1, "vcpus": [], "slots": [], "serial": null,
        "vm": { "clock": vec![0u8; 48], "chips": [] },
    });
    serde_json::from_value(empty).unwrap()
}

fn made(directory: &std::path::Path) -> (Templates, Key) {
    let templates = Templates::at(directory.join("state/templates"));
    let key = key::sample(MEMORY);
    make(&templates, &key);
    (templates, key)
}

fn make(templates: &Templates, key: &Key) {
    let maker = templates.maker().unwrap().unwrap();
    let (content, bytes) = disk();
    let guest = SavedGuest {
        machine: &state(),
        scratch: Some(content),
    };
    maker
        .publish(key, "6.12", &memory(), &bytes, &guest)
        .unwrap();
}

fn names(templates: &Templates) -> usize {
    fs::read_dir(&templates.directory).unwrap().count()
}

#[test]
fn what_was_made_is_found_with_its_memory() {
    let directory = tempfile::tempdir().unwrap();
    let (templates, key) = made(directory.path());
    let template = templates.find(&key).unwrap().unwrap();
    assert_eq!(template.kernel, "6.12");
    let (content, bytes) = disk();
    let kept = template.scratch().unwrap();
    assert_eq!(*kept.content, content);
    let mut given = vec![0; bytes.len()];
    kept.file.read_exact_at(&mut given, kept.offset).unwrap();
    assert!(given == bytes);
    let (mut ours, mut given) = (vec![0; MEMORY as usize], vec![0; MEMORY as usize]);
    memory().read_exact_at(&mut ours, 0).unwrap();
    template.file.read_exact_at(&mut given, 0).unwrap();
    assert!(ours == given);
    let all = templates.list().unwrap();
    let [info] = all.as_slice() else {
        panic!("{all:?}")
    };
    assert_eq!((info.vcpus, info.memory_bytes), (1, MEMORY));
    assert!(info.size_bytes < 8 << 20, "{info:?}");
    assert_eq!(info.stale, None);
    let other = key::sample(MEMORY + (2 << 20));
    assert!(templates.find(&other).unwrap().is_none());
    templates.remove(&info.name).unwrap();
    assert!(matches!(
        templates.remove(&info.name),
        Err(TemplateError::Unknown(_))
    ));
    assert_eq!(names(&templates), 0);
}

#[test]
fn a_checkpoint_is_no_template_and_its_state_may_be_large() {
    let write = |kind| {
        let file = tempfile::tempfile().unwrap();
        let saved = Saved {
            kind,
            key: &7_u32,
            kernel: "6.12",
            memory_bytes: MEMORY,
            state: &vec![5_u8; 5 << 20],
        };
        let memory = memory();
        let memory = Stored {
            file: &memory,
            length: MEMORY,
        };
        file::write(&file, &saved, &memory).unwrap();
        file
    };
    let file = write(Kind::Checkpoint);
    let (header, state): (Header<u32>, _) = file::read_head(&file, Kind::Checkpoint).unwrap();
    assert_eq!((header.key, header.memory_bytes), (7, MEMORY));
    assert_eq!(state.read::<Vec<u8>>().unwrap().len(), 5 << 20);
    assert!(file::read_head::<u32>(&file, Kind::Template).is_err());
    assert!(file::read_head::<u32>(&write(Kind::Template), Kind::Checkpoint).is_err());
    // What was written to is looked at, and is what it was.
    let touched = Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: 1,
            tv_nsec: 0,
        },
    };
    futimens(&file, &touched).unwrap();
    file::check_memory(&file, &header).unwrap();
    futimens(&file, &touched).unwrap();
    file.write_all_at(b"!", 30 << 20).unwrap();
    futimens(&file, &touched).unwrap();
    assert!(file::check_memory(&file, &header).is_err());
}

proptest! {
    #[test]
    fn noise_is_no_saved_guest(
        mut noise in proptest::collection::vec(any::<u8>(), 0..200),
        memory_bytes in 0..100_u64,
    ) {
        noise.extend(memory_bytes.to_le_bytes());
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&noise, 0).unwrap();
        prop_assert!(file::read_head::<u32>(&file, Kind::Checkpoint).is_err());
    }
}

#[test]
fn whatever_was_done_to_it_it_is_refused_once_and_gone() {
    let flip = |file: &File, offset: u64| {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    };
    type Harm<'a> = (&'static str, &'a dyn Fn(&File));
    let harms: [Harm<'_>; 7] = [
        ("cut", &|file| file.set_len(MEMORY + 100).unwrap()),
        ("cut in its memory", &|file| {
            file.set_len(MEMORY / 2).unwrap()
        }),
        ("empty", &|file| file.set_len(0).unwrap()),
        ("a bit of its head", &|file| flip(file, MEMORY + 3)),
        ("a bit of its header", &|file| flip(file, MEMORY + 100)),
        ("a bit of its memory", &|file| flip(file, 6 << 20)),
        ("a zero page of its memory", &|file| flip(file, 40 << 20)),
    ];
    for (what, harm) in harms {
        let directory = tempfile::tempdir().unwrap();
        let (templates, key) = made(directory.path());
        let path = templates.directory.join(key.name());
        harm(&File::options().read(true).write(true).open(path).unwrap());
        let refused = templates.find(&key);
        assert!(
            matches!(refused, Err(TemplateError::Unusable { .. })),
            "{what}"
        );
        assert!(templates.find(&key).unwrap().is_none(), "{what}");
    }
}

#[test]
fn a_bit_that_a_disk_lost_is_found_at_the_first_use_since_the_boot() {
    let directory = tempfile::tempdir().unwrap();
    let (templates, key) = made(directory.path());
    let path = templates.directory.join(key.name());
    let file = File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().mtime();
    let date = |accessed: i64| {
        let time = |tv_sec, tv_nsec| Timespec { tv_sec, tv_nsec };
        let times = Timestamps {
            last_access: match accessed {
                0 => time(0, UTIME_OMIT),
                _ => time(accessed, 0),
            },
            last_modification: time(modified, 0),
        };
        futimens(&file, &times).unwrap();
    };
    date(1);
    assert!(
        templates.find(&key).unwrap().is_some(),
        "whole, not used since"
    );
    file.write_all_at(b"X", 6 << 20).unwrap();
    date(0);
    assert!(
        templates.find(&key).unwrap().is_some(),
        "used since the boot"
    );
    date(1);
    let refused = templates.find(&key).unwrap_err();
    assert!(matches!(refused, TemplateError::Unusable { .. }));
}

#[test]
fn one_at_a_time_makes_and_a_failure_is_believed() {
    let directory = tempfile::tempdir().unwrap();
    let (templates, key) = made(directory.path());
    let maker = templates.maker().unwrap().unwrap();
    assert!(templates.maker().unwrap().is_none());
    drop(maker.fresh_file().unwrap());
    assert_eq!(names(&templates), 1, "a file in the making has a name");
    drop(maker);
    assert!(!templates.given_up(&key));
    templates.give_up(&key, "it doesn't start");
    assert!(templates.given_up(&key));
    assert!(templates.find(&key).unwrap().is_none());
    make(&templates, &key);
    assert!(!templates.given_up(&key));
}

#[test]
fn only_so_many_are_kept_the_latest() {
    let directory = tempfile::tempdir().unwrap();
    let (templates, key) = made(directory.path());
    // The clock of files stands still for milliseconds at a time.
    let file = File::open(templates.directory.join(key.name())).unwrap();
    file.set_times(FileTimes::new().set_accessed(SystemTime::UNIX_EPOCH))
        .unwrap();
    for number in 1..=MOST as u64 {
        make(&templates, &key::sample(MEMORY + number * (2 << 20)));
    }
    let left = templates.list().unwrap();
    assert_eq!(left.len(), MOST);
    assert!(templates.find(&key).unwrap().is_none());
}
