//! One blob from a registry into the store, however often the line breaks.
//!
//! Owns: resuming, retrying and their delays. Refuses: believing the registry about sizes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::{Response, StatusCode};

use super::client::{Client, Failure};
use super::{PullError, PullOptions};
use crate::digest::Digest;
use crate::progress::Step;
use crate::store::{ImageStore, Ingest, StoreError};

const FIRST_DELAY: Duration = Duration::from_millis(250);
const LONGEST_DELAY: Duration = Duration::from_secs(8);
/// An attempt that got this much further does not count as one that failed.
const WORTHWHILE_BYTES: u64 = 256 * 1024;
const REPORT_BYTES: u64 = 256 * 1024;

/// What it takes to fetch.
pub(super) struct Fetcher<'a> {
    pub(super) client: &'a Client,
    pub(super) store: &'a ImageStore,
    pub(super) runtime: &'a tokio::runtime::Runtime,
    pub(super) options: &'a PullOptions<'a>,
    /// The reference asked for, for errors.
    pub(super) reference: String,
    /// Set when the pull has failed elsewhere: transfers end, and keep what they have.
    pub(super) stopped: AtomicBool,
}

impl Fetcher<'_> {
    /// Runs `request` until it succeeds, fails for good, or failed too often; a refused token is
    /// renewed once.
    pub(super) fn attempt<T, F>(&self, mut request: impl FnMut() -> F) -> Result<T, PullError>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let mut attempt = 1;
        let mut renewed = false;
        loop {
            let failure = match self.runtime.block_on(request()) {
                Ok(value) => return Ok(value),
                Err(failure) => failure,
            };
            if failure.unauthorized && !renewed {
                renewed = true;
                self.runtime
                    .block_on(self.client.authenticate())
                    .map_err(|f| f.error)?;
            } else if failure.transient && attempt < self.options.attempts {
                attempt += 1;
                self.pause(attempt);
            } else {
                return Err(failure.error);
            }
        }
    }

    /// Brings the blob `digest` of `size` bytes into the store, if it is not there.
    pub(super) fn blob(&self, digest: &Digest, size: u64) -> Result<(), PullError> {
        let stored = |source| self.stored(source);
        let Some(mut ingest) = self.store.ingest(digest, size).map_err(stored)? else {
            return Ok(());
        };
        let mut attempt = 1;
        let mut renewed = false;
        let mut best = ingest.received();
        while ingest.received() < size || size == 0 {
            self.report(digest, ingest.received(), size);
            let failure = match self
                .runtime
                .block_on(self.transfer(&mut ingest, digest, size))
            {
                Ok(()) => break,
                Err(failure) => failure,
            };
            // Against the best so far: who always begins anew makes no progress.
            if ingest.received() >= best.saturating_add(WORTHWHILE_BYTES) {
                best = ingest.received();
                (attempt, renewed) = (1, false);
            }
            if failure.unauthorized && !renewed {
                renewed = true;
                self.runtime
                    .block_on(self.client.authenticate())
                    .map_err(|f| f.error)?;
            } else if failure.transient && attempt < self.options.attempts {
                attempt += 1;
                let reason = failure.error.to_string();
                self.options
                    .progress
                    .step(digest, Step::Retrying { attempt, reason });
                self.pause(attempt);
            } else {
                return Err(self.given_up(failure, digest, ingest.received()));
            }
        }
        ingest.commit().map_err(stored)
    }

    fn pause(&self, attempt: u32) {
        // The timer must be made inside the runtime.
        self.runtime
            .block_on(async { tokio::time::sleep(delay(attempt)).await });
    }

    /// One request, as far as it goes.
    async fn transfer(
        &self,
        ingest: &mut Ingest,
        digest: &Digest,
        size: u64,
    ) -> Result<(), Failure> {
        let offset = ingest.received();
        let mut response = self.client.blob(digest, offset).await?;
        if !resumes(&response, offset) {
            // The registry sends all of it, or something else than what was asked for.
            let begun_anew = response.status() == StatusCode::OK;
            ingest.restart().map_err(|error| self.stored(error))?;
            if !begun_anew {
                let reason = "it cannot resume; beginning again".to_owned();
                return Err(self.client.cut_off(reason));
            }
        }
        if let Some(coming) = response.content_length() {
            let actual = ingest.received().saturating_add(coming);
            if actual != size {
                let digest = digest.clone();
                return Err(self
                    .stored(StoreError::SizeMismatch {
                        digest,
                        declared: size,
                        actual,
                    })
                    .into());
            }
        }
        self.receive(ingest, &mut response, digest, size).await?;
        if ingest.received() < size {
            let reason = "the connection was closed early".to_owned();
            return Err(self.client.cut_off(reason));
        }
        self.report(digest, size, size);
        Ok(())
    }

    /// Keeps what arrives, until no more does or the pull has failed elsewhere.
    async fn receive(
        &self,
        ingest: &mut Ingest,
        response: &mut Response,
        digest: &Digest,
        size: u64,
    ) -> Result<(), Failure> {
        let mut reported = ingest.received();
        loop {
            let chunk = response
                .chunk()
                .await
                .map_err(|error| self.client.lost(&error))?;
            let Some(chunk) = chunk else { break };
            if self.stopped.load(Ordering::Relaxed) {
                let reason = "the pull was given up".to_owned();
                return Err(self.client.broken(reason));
            }
            ingest.append(&chunk).map_err(|error| self.stored(error))?;
            if ingest.received() - reported >= REPORT_BYTES {
                reported = ingest.received();
                self.report(digest, reported, size);
            }
        }
        Ok(())
    }

    fn report(&self, digest: &Digest, done_bytes: u64, total_bytes: u64) {
        self.options.progress.step(
            digest,
            Step::Downloading {
                done_bytes,
                total_bytes,
            },
        );
    }

    fn given_up(&self, failure: Failure, digest: &Digest, received: u64) -> PullError {
        let registry = self.client.registry().to_owned();
        match failure.error {
            PullError::Registry { reason, .. } if failure.transient => PullError::BrokeOff {
                registry,
                digest: digest.clone(),
                received,
                reason,
            },
            PullError::NotFound { reason, .. } => PullError::Registry {
                registry,
                reason: format!("it does not have {digest}, which its manifest lists{reason}"),
            },
            other => other,
        }
    }

    pub(super) fn stored(&self, source: StoreError) -> PullError {
        PullError::Store {
            reference: self.reference.clone(),
            source,
        }
    }
}

/// Whether the response goes on exactly where we stopped.
fn resumes(response: &Response, offset: u64) -> bool {
    if offset == 0 {
        return response.status() == StatusCode::OK;
    }
    let range = response.headers().get(reqwest::header::CONTENT_RANGE);
    let start = format!("bytes {offset}-");
    response.status() == StatusCode::PARTIAL_CONTENT
        && range
            .and_then(|value| value.to_str().ok())
            .is_some_and(|text| text.starts_with(&start))
}

fn delay(attempt: u32) -> Duration {
    FIRST_DELAY
        .saturating_mul(1 << attempt.saturating_sub(2).min(8))
        .min(LONGEST_DELAY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_bound() {
        let all: Vec<_> = (2..10).map(|n| delay(n).as_millis()).collect();
        assert_eq!(all, [250, 500, 1000, 2000, 4000, 8000, 8000, 8000]);
    }
}
