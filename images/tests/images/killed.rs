//! Processes killed in the middle of a pull: nothing half-made is seen, and the next one goes on.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use hull_images::{Auth, ImageStore, PullOptions, Reference, Silent};

use crate::server::Server;
use crate::source::{Content, Place, layer, noise};

const STORE: &str = "HULL_TEST_STORE";
const NAME: &str = "HULL_TEST_NAME";

/// Not a test of its own: the process that `a_killed_pull_...` starts and kills.
#[test]
fn child_that_pulls() {
    let (Ok(store), Ok(name)) = (std::env::var(STORE), std::env::var(NAME)) else {
        return;
    };
    let store = ImageStore::open(store).unwrap();
    let options = PullOptions {
        auth: Auth::Anonymous,
        concurrency: 1,
        ..PullOptions::default()
    };
    store
        .pull(&Reference::parse(&name).unwrap(), &options)
        .unwrap();
}

fn start_pull(store: &Path, name: &str) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "killed::child_that_pulls"])
        .env(STORE, store)
        .env(NAME, name)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

#[test]
fn a_killed_pull_leaves_nothing_that_the_next_does_not_use() {
    let layers: Vec<_> = (0..3)
        .map(|n| layer(&[(&format!("f{n}"), &noise(600_000, n))]))
        .collect();
    let content = Content::simple(&layers);
    // Killed at each request in turn: when the manifest, the configuration, a layer is asked for.
    for moment in 0..7 {
        let content = content.clone();
        let (reached, wait) = mpsc::sync_channel(100);
        let server = Server::start(move |request| {
            let _ = reached.try_send(());
            let mut reply = content.answer(request);
            if reply.body.len() > 100_000 && request.header("x-whole").is_none() {
                reply.cut = Some(100_000 + reply.body.len() / 2);
            }
            reply
        });
        let place = Place::new();
        let name = server.name("a/b:1");
        let mut child = start_pull(place.store.root(), &name);
        for _ in 0..=moment {
            // The child may be done with all it asks for before the last of these.
            if wait.recv_timeout(Duration::from_secs(20)).is_err() {
                break;
            }
        }
        child.kill().unwrap();
        child.wait().unwrap();

        let store = ImageStore::open(place.store.root()).unwrap();
        assert_eq!(place.names("unpack"), Vec::<String>::new(), "{moment}");
        for image in store.list().unwrap() {
            assert_eq!(store.unpacked_layers(&image, &Silent).unwrap().len(), 3);
        }
        let pulled = place.pull(&server, "a/b:1").unwrap();
        let directories = store.unpacked_layers(&pulled.image, &Silent).unwrap();
        for (n, directory) in directories.iter().enumerate() {
            let content = std::fs::read(directory.join(format!("f{n}"))).unwrap();
            assert!(content == noise(600_000, n as u64), "{moment}");
        }
        store.collect_garbage().unwrap();
        assert_eq!(place.names("blobs/sha256").len(), 5, "{moment}");
        assert_eq!(place.names("layers").len(), 3, "{moment}");
    }
}
