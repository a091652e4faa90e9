//! What this runtime can do, and a configuration to begin with.

use std::fs::File;
use std::io::{Write, stdout};

use anyhow::Context;
use oci_spec::runtime::Spec;

use crate::args::SpecArgs;

/// Prints it.
pub(crate) fn features() -> anyhow::Result<u8> {
    let features = hull_shim::features::features();
    writeln!(stdout(), "{}", serde_json::to_string_pretty(&features)?)?;
    Ok(0)
}

/// Writes `config.json`, which must not be there yet.
pub(crate) fn spec(args: &SpecArgs) -> anyhow::Result<u8> {
    let path = args.bundle.join("config.json");
    let file =
        File::create_new(&path).with_context(|| format!("cannot create \"{}\"", path.display()))?;
    let mut spec = Spec::default();
    spec.set_hostname(Some("hull".to_owned()));
    serde_json::to_writer_pretty(file, &spec)
        .with_context(|| format!("cannot write \"{}\"", path.display()))?;
    Ok(0)
}
