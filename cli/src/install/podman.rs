//! A drop-in of containers.conf, which podman and buildah read at each start.

use anyhow::bail;

use super::file::{self, Change, OURS};
use super::{Host, NAME, Planned, Wish};

const DIRECTORY: &str = "/etc/containers";
const CONFIG: &str = "/etc/containers/containers.conf.d/hull.conf";

/// Runtimes whose messages engines read as JSON: the list is replaced as a whole, so the engines'
/// own are in it.
const SPEAK_JSON: [&str; 8] = [
    "crun", "runc", "kata", "runsc", "youki", "krun", NAME, "hull-oci",
];

pub(super) fn plan(host: &Host, wish: Wish) -> Planned {
    let path = host.at(CONFIG);
    let before = file::read(&path)?;
    let is_there = host.at(DIRECTORY).is_dir()
        || ["podman", "buildah"]
            .iter()
            .any(|name| host.has_program(name));
    if before.is_none() && (!is_there || wish == Wish::Forgotten) {
        return Ok(None);
    }
    if before.as_ref().is_some_and(|text| !text.starts_with(OURS)) {
        bail!(
            "\"{}\" is left alone: `hull install` didn't make it",
            path.display()
        );
    }
    Ok(Some(Change {
        path,
        before,
        after: (wish == Wish::Known).then(|| text(host)),
    }))
}

fn text(host: &Host) -> String {
    let program = toml_edit::value(host.program("hull-oci"));
    let speakers = SPEAK_JSON.map(|name| format!("\"{name}\"")).join(", ");
    format!(
        "{OURS}\n[engine]\nruntime_supports_json = [{speakers}]\n\n\
         [engine.runtimes]\n{NAME} = [{program}]\nhull-oci = [{program}]\n"
    )
}
