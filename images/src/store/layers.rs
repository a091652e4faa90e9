//! Unpacked layers.
//!
//! Owns: `layers/` and `unpack/`. A layer is unpacked into `unpack/`, synced, and renamed into
//! `layers/` when its diff id is right; nobody sees it before. The sweep lock, held by the caller,
//! keeps others from taking it for a leftover. Refuses: reading tar (see [`crate::unpack`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{ImageStore, Layer, Result, StoreError, failed, lock};
use crate::progress::{Progress, Step};
use crate::unpack;

static SERIAL: AtomicU64 = AtomicU64::new(0);

/// A half-unpacked layer's directory; deleted with all below it unless it was renamed away.
struct Scratch {
    path: PathBuf,
    directory: File,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.path.exists() {
            // What cannot be deleted now is swept at the next open.
            let _ = unpack::remove_tree(&self.path);
        }
    }
}

impl ImageStore {
    fn layer_path(&self, layer: &Layer) -> PathBuf {
        self.path("layers").join(layer.chain_id.hex())
    }

    /// The directory of `layer`, unpacked now if it is not there. `below` are the directories of
    /// the layers under it, base first. The caller holds the sweep lock.
    pub(crate) fn unpacked_layer(
        &self,
        layer: &Layer,
        below: &[PathBuf],
        progress: &dyn Progress,
    ) -> Result<PathBuf> {
        let target = self.layer_path(layer);
        if target.is_dir() {
            progress.step(&layer.digest, Step::Ready);
            return Ok(target);
        }
        let scratch = self.scratch(layer)?;
        let report = |done_bytes: u64| {
            let total_bytes = layer.size;
            progress.step(
                &layer.digest,
                Step::Unpacking {
                    done_bytes,
                    total_bytes,
                },
            );
        };
        let job = unpack::Job {
            diff_id: Some(&layer.diff_id),
            below,
            limits: self.limits(),
            report: &report,
        };
        let blob = self.open_blob(&layer.digest)?;
        unpack::unpack(blob, &scratch.path, &job).map_err(|source| StoreError::Unpack {
            layer: layer.digest.clone(),
            source: Box::new(source),
        })?;
        self.publish(&scratch, &target)?;
        progress.step(&layer.digest, Step::Ready);
        Ok(target)
    }

    fn scratch(&self, layer: &Layer) -> Result<Scratch> {
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}.{}.{serial}", layer.chain_id.hex(), std::process::id());
        let path = self.path("unpack").join(name);
        std::fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .map_err(failed("create directory", &path))?;
        let directory = File::open(&path).map_err(failed("open directory", &path))?;
        Ok(Scratch { path, directory })
    }

    fn publish(&self, scratch: &Scratch, target: &Path) -> Result<()> {
        rustix::fs::syncfs(&scratch.directory)
            .map_err(|errno| failed("sync", &scratch.path)(errno.into()))?;
        match std::fs::rename(&scratch.path, target) {
            Ok(()) => lock::sync_directory(&self.path("layers")),
            // Another process was faster; its directory holds the same.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists
                ) =>
            {
                Ok(())
            }
            Err(error) => Err(failed("rename into place", target)(error)),
        }
    }
}
