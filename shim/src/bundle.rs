//! A bundle on disk: its directory and its `config.json`.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use hull_sandbox::BundleRequest;
use oci_spec::runtime::Spec;

/// Its specification's name in a bundle.
pub const CONFIG: &str = "config.json";

/// Largest `config.json` that is read, in bytes.
const MAX_CONFIG: u64 = 4 << 20;

/// Reads the bundle in `directory`, or in the working directory.
pub fn read(id: &str, directory: Option<&Path>) -> anyhow::Result<BundleRequest> {
    let directory = directory.unwrap_or(Path::new("."));
    let bundle = directory
        .canonicalize()
        .with_context(|| format!("cannot use bundle \"{}\"", directory.display()))?;
    let spec = config(&bundle)?;
    let request = BundleRequest {
        id: id.to_owned(),
        bundle,
        spec,
        checkpoint: None,
        only_holds: false,
    };
    check_root(&request)?;
    Ok(request)
}

/// Reads the specification in `bundle`.
pub fn config(bundle: &Path) -> anyhow::Result<Spec> {
    let path = &bundle.join(CONFIG);
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > MAX_CONFIG => {
            bail!("\"{}\" is larger than {MAX_CONFIG} bytes", path.display());
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            bail!("JSON specification file {} not found", path.display());
        }
        _ => {}
    }
    let text = fs::read(path).with_context(|| format!("cannot read \"{}\"", path.display()))?;
    serde_json::from_slice(&text)
        .with_context(|| format!("\"{}\" is no OCI runtime configuration", path.display()))
}

fn check_root(request: &BundleRequest) -> anyhow::Result<()> {
    let root = request.spec.root().as_ref().map(|root| root.path().clone());
    let root: PathBuf = request.bundle.join(root.unwrap_or_default());
    let metadata =
        fs::metadata(&root).with_context(|| format!("cannot use rootfs \"{}\"", root.display()))?;
    if !metadata.is_dir() {
        bail!("rootfs \"{}\" is not a directory", root.display());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(config: Option<&str>) -> String {
        let directory = tempfile::tempdir().unwrap();
        if let Some(config) = config {
            fs::write(directory.path().join("config.json"), config).unwrap();
        }
        let error = read("x", Some(directory.path())).unwrap_err();
        format!("{error:#}")
    }

    #[test]
    fn what_is_wrong_with_a_bundle_is_said() {
        for (config, words) in [
            (None, "config.json not found"),
            (Some("{"), "is no OCI runtime configuration"),
            (
                Some(r#"{"ociVersion":"1.0.2","root":{"path":"gone"}}"#),
                "cannot use rootfs",
            ),
            (
                Some(r#"{"ociVersion":"1.0.2","root":{"path":"config.json"}}"#),
                "is not a directory",
            ),
        ] {
            let said = failure(config);
            assert!(said.contains(words), "{said}");
        }
    }
}
