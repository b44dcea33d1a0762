//! What the orchestrator hears of this pool: a registration, then heartbeats, regularly and at every change.
//!
//! The pool serves on while the orchestrator is away. One call follows another, so `seq` grows in the order of the
//! snapshots.

use std::sync::Arc;
use std::time::Duration;

use pool_core::POOL_API_VERSION;
use pool_core::api::pool::{Heartbeat, RegisterRequest};
use pool_core::client::{ApiClient, ClientError};
use pool_core::registry::RegistryError;
use pool_core::secret::Secret;
use serde::de::IgnoredAny;

use crate::pool::Pool;

/// How long the orchestrator may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Changes within this time go into one heartbeat.
const COALESCE: Duration = Duration::from_millis(20);
/// The first pause after a failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause while the orchestrator is away.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// The task that reports to the orchestrator.
pub struct Heart {
    pool: Arc<Pool>,
    client: ApiClient,
    advertised_url: String,
    interval: Duration,
    registered: bool,
    seq: u64,
}

/// Why the orchestrator did not take a heartbeat.
#[derive(Debug, thiserror::Error)]
enum BeatError {
    /// The call failed.
    #[error(transparent)]
    Call(#[from] ClientError),
    /// There was nothing to tell.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl BeatError {
    fn status(&self) -> Option<u16> {
        match self {
            Self::Call(error) => error.status(),
            Self::Registry(_) => None,
        }
    }

    fn outcome(&self) -> &'static str {
        match (self, self.status()) {
            (Self::Registry(_), _) => "no_snapshot",
            (_, Some(404)) => "unknown_pool",
            (_, Some(409)) => "superseded",
            (_, Some(_)) => "refused",
            (_, None) => "unreachable",
        }
    }
}

impl Heart {
    /// Reports to the orchestrator at `url` that this pool is to be reached at `advertised_url`.
    pub fn new(
        pool: Arc<Pool>,
        url: &str,
        advertised_url: String,
        token: Option<Secret>,
    ) -> Result<Self, ClientError> {
        let client = ApiClient::new(url, token)?.with_answer_timeout(ANSWER_TIMEOUT);
        let interval = Duration::from_millis(pool.lifecycle.config().heartbeat_interval_ms);
        Ok(Self {
            pool,
            client,
            advertised_url,
            interval,
            registered: false,
            seq: 0,
        })
    }

    /// Reports until it is dropped.
    pub async fn beat(mut self) {
        let mut changes = self.pool.changes();
        let mut failures = 0u32;
        loop {
            // Seen before the snapshot is taken: a change during the call makes another heartbeat.
            changes.borrow_and_update();
            let outcome = self.report().await;
            self.pool
                .metrics
                .heartbeat(outcome.as_ref().map_or_else(BeatError::outcome, |()| "ok"));
            match outcome {
                Ok(()) => {
                    if failures > 0 {
                        tracing::info!(
                            orchestrator = self.client.base_url(),
                            failures,
                            "the orchestrator takes heartbeats again"
                        );
                    }
                    failures = 0;
                    tokio::select! {
                        () = tokio::time::sleep(self.interval) => {}
                        // The pool holds the sender, so this only returns for a change.
                        _ = changes.changed() => tokio::time::sleep(COALESCE.min(self.interval)).await,
                    }
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    self.complain(&error, failures);
                    let superseded = error.status() == Some(409);
                    let pause = if superseded {
                        self.interval
                    } else {
                        pause_after(failures, self.interval, rand::random())
                    };
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    /// One heartbeat, after a registration where one is due.
    async fn report(&mut self) -> Result<(), BeatError> {
        if self.registered {
            match self.send().await {
                // The orchestrator forgot us, as one with a new database does.
                Err(error) if error.status() == Some(404) => self.registered = false,
                other => {
                    return other
                        .inspect_err(|error| self.registered &= error.status() != Some(409));
                }
            }
        }
        let config = self.pool.lifecycle.config();
        let request = RegisterRequest {
            pool_id: config.pool_id.clone(),
            instance_id: self.pool.instance_id.clone(),
            url: self.advertised_url.clone(),
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: config.heartbeat_interval_ms,
        };
        let _: IgnoredAny = self.client.post("/v2/pools/register", &request).await?;
        self.registered = true;
        tracing::info!(
            orchestrator = self.client.base_url(),
            pool_id = request.pool_id,
            url = request.url,
            "registered"
        );
        self.send()
            .await
            .inspect_err(|error| self.registered &= !matches!(error.status(), Some(404 | 409)))
    }

    async fn send(&mut self) -> Result<(), BeatError> {
        let snapshot = self.pool.blocking(|pool| pool.snapshot()).await?;
        self.seq += 1;
        let path = format!(
            "/v2/pools/{}/heartbeat",
            self.pool.lifecycle.config().pool_id
        );
        let heartbeat = Heartbeat {
            instance_id: self.pool.instance_id.clone(),
            seq: self.seq,
            snapshot,
        };
        let _: IgnoredAny = self.client.post(&path, &heartbeat).await?;
        Ok(())
    }

    /// Says what is wrong once, and again where somebody has to do something about it.
    fn complain(&self, error: &BeatError, failures: u32) {
        let orchestrator = self.client.base_url();
        match error {
            BeatError::Call(call) if error.status().is_some() => {
                let hint = match error.status() {
                    Some(409) => Some(
                        "another daemon with this pool_id reports to the same orchestrator"
                            .to_owned(),
                    ),
                    _ => call.hint(),
                };
                tracing::error!(orchestrator, %error, hint, "the orchestrator refuses this pool");
            }
            _ if failures == 1 => {
                tracing::warn!(orchestrator, %error, "the orchestrator is away; trying again");
            }
            _ => tracing::debug!(orchestrator, %error, failures, "the orchestrator is still away"),
        }
    }
}

/// The pause after so many failures in a row: doubling, at most as long as the interval between heartbeats, and
/// shortened by up to half with `roll` (0 to 1), so that the pools of a fleet don't all come back at once.
fn pause_after(failures: u32, interval: Duration, roll: f64) -> Duration {
    let doubled = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(16));
    doubled
        .min(LONGEST_PAUSE)
        .min(interval)
        .mul_f64(1.0 - roll.clamp(0.0, 1.0) / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-031]
    fn pauses_double_up_to_a_limit_and_are_spread() {
        let ms = |failures, interval_s, roll| {
            pause_after(failures, Duration::from_secs(interval_s), roll).as_millis()
        };
        assert_eq!(
            [1, 2, 3, 5, 6, 99].map(|failures| ms(failures, 15, 0.0)),
            [250, 500, 1000, 4000, 5000, 5000]
        );
        assert_eq!(ms(99, 15, 1.0), 2500);
        assert_eq!(ms(99, 1, 0.0), 1000);
        assert_eq!(ms(0, 15, 0.0), 250);
    }
}
