//! A file read twice through virtio-fs: how often the guest asks for what it has seen.
//!
//! Owns: the file and its readers. Refuses: to time them; requests are what counts.

use std::path::Path;

use anyhow::Result;

use crate::idle::{inspect, remove};
use crate::programs::Place;

const NAME: &str = "bench-files";
/// The file in a volume of the container's own, MiB.
const SIZE_MIB: u32 = 256;

/// Requests to the host, without those of a reader that reads nothing.
#[derive(Debug)]
pub(crate) struct Passes {
    pub(crate) first: u64,
    pub(crate) second: u64,
}

/// Makes the file, restarts the guest so that nothing of it is cached, and reads it twice.
pub(crate) fn passes(place: &Place, log: &Path) -> Result<Passes> {
    let seen = read(place, log);
    remove(place, NAME, log)?;
    seen
}

fn read(place: &Place, log: &Path) -> Result<Passes> {
    let hull = |words: &[&str]| crate::output(&place.hull(words), log);
    hull(&[
        "run", "-d", "--name", NAME, "--memory", "1g", "-v", "/data", "bench", "sleep", "infinity",
    ])?;
    let count = format!("count={SIZE_MIB}");
    hull(&[
        "exec",
        NAME,
        "dd",
        "if=/dev/zero",
        "of=/data/file",
        "bs=1M",
        &count,
    ])?;
    hull(&["stop", "-t", "0", NAME])?;
    hull(&["start", NAME])?;
    let requests = || inspect(place, NAME, log).map(|seen| seen.share_requests);
    let copy = |from: &str| hull(&["exec", NAME, "dd", from, "of=/dev/null", "bs=1M"]).map(drop);
    let pass = || copy("if=/data/file");
    // The reader itself is then known to the guest, which still asks for its file capabilities
    // whenever it is executed.
    copy("if=/dev/null")?;
    let mut seen = vec![requests()?];
    copy("if=/dev/null")?;
    seen.push(requests()?);
    for _ in 0..2 {
        pass()?;
        seen.push(requests()?);
    }
    let made: Vec<u64> = seen.windows(2).map(|pair| pair[1] - pair[0]).collect();
    Ok(Passes {
        first: made[1].saturating_sub(made[0]),
        second: made[2].saturating_sub(made[0]),
    })
}
