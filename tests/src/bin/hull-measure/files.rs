//! A file read twice through virtio-fs: how often the guest asks for what it has seen.
//!
//! Owns: the file and its readers. Refuses: to time them; requests are what counts.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};

use crate::idle::{inspect, remove};
use crate::programs::Place;

const NAME: &str = "bench-files";
/// The file's size, bytes.
const SIZE_BYTES: u64 = 256 << 20;

/// Requests to the host.
#[derive(Debug)]
pub(crate) struct Passes {
    pub(crate) first: u64,
    pub(crate) second: u64,
}

/// Makes the file on the host, so that the guest hasn't seen it, and reads it twice.
pub(crate) fn passes(place: &Place, log: &Path) -> Result<Passes> {
    let share = tempfile::tempdir().context("make a share")?;
    let file = File::create(share.path().join("file")).context("make the file to read")?;
    // Holes are read as any other bytes are.
    file.set_len(SIZE_BYTES).context("size the file to read")?;
    let seen = read(place, share.path(), log);
    remove(place, NAME, log)?;
    seen
}

fn read(place: &Place, share: &Path, log: &Path) -> Result<Passes> {
    let hull = |words: &[&str]| crate::output(&place.hull(words), log);
    let volume = format!("{}:/share", share.display());
    hull(&[
        "run", "-d", "--name", NAME, "--memory", "1g", "-v", &volume, "bench", "sleep", "infinity",
    ])?;
    let requests = || inspect(place, NAME, log).map(|seen| seen.share_requests);
    let copy = |from: &str| hull(&["exec", NAME, "dd", from, "of=/dev/null", "bs=1M"]).map(drop);
    let pass = || copy("if=/share/file");
    // The reader itself is then known to the guest.
    copy("if=/dev/null")?;
    let before = requests()?;
    pass()?;
    let between = requests()?;
    pass()?;
    let after = requests()?;
    Ok(Passes {
        first: between - before,
        second: after - between,
    })
}
