//! All layers of an image: several fetched at once, each unpacked as soon as those below it are.
//!
//! Owns: the order of that work, and stopping it at the first failure. Refuses: the transfer
//! itself (`fetch`) and the unpacking (the store).

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::PullError;
use super::fetch::Fetcher;
use crate::digest::Digest;
use crate::progress::Step;
use crate::store::Layer;

/// What the download threads and the unpacking one tell each other.
struct Downloads<'l> {
    state: Mutex<State<'l>>,
    changed: Condvar,
}

struct State<'l> {
    /// Not begun; the next is last.
    waiting: Vec<&'l Layer>,
    /// Not complete.
    missing: BTreeSet<&'l Digest>,
    /// The first failure. After it nothing more is begun.
    failure: Option<PullError>,
}

impl<'l> Downloads<'l> {
    fn lock(&self) -> MutexGuard<'_, State<'l>> {
        // Nothing panics while it holds this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next(&self) -> Option<&'l Layer> {
        let mut state = self.lock();
        match state.failure {
            None => state.waiting.pop(),
            Some(_) => None,
        }
    }

    fn complete(&self, layer: &Layer) {
        self.lock().missing.remove(&layer.digest);
        self.changed.notify_all();
    }

    fn fail(&self, error: PullError) {
        self.lock().failure.get_or_insert(error);
        self.changed.notify_all();
    }

    /// Waits until `layer` is here; false when it never will be.
    fn wait_for(&self, layer: &Layer) -> bool {
        let absent = |state: &mut State<'l>| {
            state.failure.is_none() && state.missing.contains(&layer.digest)
        };
        let state = self.changed.wait_while(self.lock(), absent);
        state
            .unwrap_or_else(PoisonError::into_inner)
            .failure
            .is_none()
    }
}

impl Fetcher<'_> {
    /// Fetches and unpacks `layers`, base first. The caller holds the store.
    pub(super) fn layers(&self, layers: &[Layer]) -> Result<(), PullError> {
        let progress = self.options.progress;
        let sizes: Vec<_> = layers.iter().map(|l| (l.digest.clone(), l.size)).collect();
        progress.layers(&sizes);
        let mut missing = BTreeSet::new();
        let absent = |layer: &&Layer| !self.store.has_blob(&layer.digest);
        let mut waiting: Vec<&Layer> = layers
            .iter()
            .filter(absent)
            .filter(|l| missing.insert(&l.digest))
            .collect();
        for Layer { digest, size, .. } in &waiting {
            progress.step(digest, Step::Waiting { total_bytes: *size });
        }
        waiting.reverse();
        let workers = self.options.concurrency.clamp(1, 16).min(waiting.len());
        let state = Mutex::new(State {
            waiting,
            missing,
            failure: None,
        });
        let downloads = Downloads {
            state,
            changed: Condvar::new(),
        };
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| self.download(&downloads));
            }
            self.unpack(layers, &downloads);
        });
        match downloads
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .failure
        {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    fn download(&self, downloads: &Downloads<'_>) {
        while let Some(layer) = downloads.next() {
            match self.blob(&layer.digest, layer.size) {
                Ok(()) => {
                    self.options.progress.step(&layer.digest, Step::Downloaded);
                    downloads.complete(layer);
                }
                Err(error) => downloads.fail(error),
            }
        }
    }

    fn unpack(&self, layers: &[Layer], downloads: &Downloads<'_>) {
        let mut below = Vec::with_capacity(layers.len());
        for layer in layers {
            if !downloads.wait_for(layer) {
                break;
            }
            match self
                .store
                .unpacked_layer(layer, &below, self.options.progress)
            {
                Ok(directory) => below.push(directory),
                Err(error) => {
                    downloads.fail(self.stored(error));
                    break;
                }
            }
        }
        if below.len() < layers.len() {
            self.stopped.store(true, Ordering::Relaxed);
        }
    }
}
