//! The store's promises: names are unique, prefixes find, locks tell, remains are cleared.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::thread;

use super::*;
use crate::plan::{HostFacts, Identity};
use crate::request::{Root, RunRequest};

fn store(directory: &Path) -> (Store, Settings) {
    let mut settings = Settings::load().unwrap();
    settings.state_dir = directory.join("state");
    settings.run_dir = directory.join("run");
    (Store::new(&settings), settings)
}

fn create(store: &Store, settings: &Settings, name: Option<&str>) -> Result<Entry, StoreError> {
    let planned = |id, name| {
        let mut request = RunRequest::new(Root::Directory("/".into()));
        request.command = vec!["/bin/true".to_owned()];
        let identity = Identity {
            id,
            name,
            created_at: jiff::Timestamp::now(),
        };
        let facts = HostFacts {
            cpus: 1,
            memory_bytes: 1 << 40,
            ..HostFacts::default()
        };
        Ok(crate::plan::plan(&request, identity, settings, &facts).unwrap())
    };
    store
        .create::<StoreError>(None, name, planned)
        .map(|created| created.entry)
}

#[test]
fn a_container_is_found_by_id_prefix_and_name_until_it_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let entry = create(&store, &settings, Some("box")).unwrap();
    for asked in [entry.id(), &entry.id()[..12], &entry.id()[..1], "box"] {
        assert_eq!(store.find(asked).unwrap(), entry, "{asked}");
    }
    assert_eq!(
        store.find("bo").unwrap_err().to_string(),
        "No such container: bo"
    );
    for hostile in ["", ".", "..", "../containers", "box/", "/", "*"] {
        assert!(
            matches!(store.find(hostile), Err(StoreError::NotFound(_))),
            "{hostile}"
        );
    }
    let lock = store.claim(&entry).unwrap().unwrap();
    store.remove(&entry, &lock).unwrap();
    assert!(store.find("box").unwrap_err().is_missing());
    assert!(store.list().unwrap().is_empty());
    assert_eq!(store.clear_remains().unwrap(), 0);
    create(&store, &settings, Some("box")).unwrap();
}

#[test]
fn one_of_many_gets_the_name() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let results: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| create(&store, &settings, Some("box"))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    let winner = results
        .iter()
        .find_map(|result| result.as_ref().ok())
        .unwrap();
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let expected = format!(
        "Conflict. The container name \"/box\" is already in use by container \"{}\". You have to remove (or rename) that container to be able to reuse that name.",
        winner.id()
    );
    for error in results.iter().filter_map(|result| result.as_ref().err()) {
        assert_eq!(error.to_string(), expected);
    }
    assert_eq!(store.list().unwrap().len(), 1);
}

#[test]
fn the_lock_tells_who_lives_however_often_it_is_asked() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let entry = create(&store, &settings, None).unwrap();
    assert!(!store.is_alive(&entry).unwrap());
    // Asking never keeps a claim from being had.
    thread::scope(|scope| {
        let asking = scope.spawn(|| (0..200).all(|_| store.is_alive(&entry).is_ok()));
        for _ in 0..200 {
            assert!(store.claim(&entry).unwrap().is_some());
        }
        assert!(asking.join().unwrap());
    });
    let lock = store.claim(&entry).unwrap().unwrap();
    assert!(store.is_alive(&entry).unwrap());
    assert!(store.claim(&entry).unwrap().is_none());
    drop(lock);
    assert!(!store.is_alive(&entry).unwrap());
}

#[test]
fn a_lock_is_seized_once_its_holder_is_known_or_lets_go() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let entry = create(&store, &settings, None).unwrap();
    let none = store.claim(&entry).unwrap().unwrap();
    let patience = Duration::from_millis(20);
    assert!(store.seize(&entry, patience).unwrap().is_none());
    // Somebody is about to start it: whom to kill is known only then.
    let long = Duration::from_secs(60);
    let mut monitor = {
        let mut command = std::process::Command::new("sleep");
        command.arg("999").stdin(none.try_clone().unwrap());
        command.spawn().unwrap()
    };
    let seized = thread::scope(|scope| {
        let seizing = scope.spawn(|| store.seize(&entry, long).unwrap().unwrap());
        writeln!(&none, "{}", monitor.id()).unwrap();
        let ended = monitor.wait().unwrap();
        assert_eq!(ended.signal(), Some(9));
        // The other holder has not signed, and is waited for.
        drop((monitor, none));
        seizing.join().unwrap()
    });
    assert!(store.is_alive(&entry).unwrap());
    assert_eq!(fs::read(entry.directory().join("lock")).unwrap(), b"");
    store.remove(&entry, &seized).unwrap();
    assert!(store.seize(&entry, long).unwrap_err().is_missing());
}

#[test]
fn a_failed_creation_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let refused =
        store.create::<StoreError>(None, Some("box"), |id, _| Err(StoreError::NotFound(id)));
    assert!(refused.is_err());
    assert_eq!(
        fs::read_dir(settings.state_dir.join("containers"))
            .unwrap()
            .count(),
        0
    );
    assert_eq!(
        fs::read_dir(settings.state_dir.join("names"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn what_the_killed_leave_half_done_is_cleared_and_never_seen() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let entry = create(&store, &settings, Some("kept")).unwrap();
    let containers = settings.state_dir.join("containers");
    let other = "b".repeat(64);
    fs::create_dir(containers.join(format!(".{other}.new"))).unwrap();
    fs::create_dir_all(containers.join(format!(".{other}.gone/upper/a"))).unwrap();
    fs::create_dir_all(settings.run_dir.join(&other)).unwrap();
    symlink(&other, settings.state_dir.join("names/lost")).unwrap();
    assert_eq!(store.list().unwrap(), [entry]);
    assert!(store.find("lost").unwrap_err().is_missing());
    assert_eq!(store.clear_remains().unwrap(), 4);
    assert_eq!(store.clear_remains().unwrap(), 0);
    assert!(store.find("kept").is_ok());
    create(&store, &settings, Some("lost")).unwrap();
}

#[test]
fn records_are_read_back_and_forgotten_before_the_next_run() {
    let directory = tempfile::tempdir().unwrap();
    let (store, settings) = store(directory.path());
    let entry = create(&store, &settings, None).unwrap();
    let record = ExitRecord {
        code: 3,
        signal: None,
        oom: false,
        started_at: None,
        finished_at: jiff::Timestamp::UNIX_EPOCH,
        error: Some("why".to_owned()),
    };
    entry.write_exit(&record, true).unwrap();
    assert_eq!(entry.exit().unwrap(), Some(record));
    entry.forget_run().unwrap();
    assert_eq!(entry.exit().unwrap(), None);
    fs::write(entry.directory().join("exit.json"), "{").unwrap();
    assert!(matches!(entry.exit(), Err(StoreError::Malformed { .. })));
}
