//! The seeds of `corpus/`, and what fuzzing once found, through every target: no panic.
#![allow(clippy::unwrap_used, reason = "test code: a failure is the test's")]

use std::path::Path;

/// Each target with its own seeds, and with nothing at all.
#[test]
fn seeds() {
    hull_fuzz::bound_files();
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in hull_fuzz::TARGETS {
        target(&[]);
        let seeds = std::fs::read_dir(corpus.join(name)).unwrap();
        let mut count = 0;
        for seed in seeds {
            let path = seed.unwrap().path();
            println!("{}", path.display());
            target(&std::fs::read(path).unwrap());
            count += 1;
        }
        assert!(count > 0, "no seeds for {name}");
    }
}
