//! What the orchestrator hears of this pool: a registration, then heartbeats, regularly and at every change.
//!
//! The pool serves on while the orchestrator is away. One call follows another, so `seq` grows in the order of the
//! snapshots.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use pool_core::POOL_API_VERSION;
use pool_core::api::pool::{Heartbeat, RegisterRequest};
use pool_core::client::{ApiClient, ClientError};
use pool_core::config::STANDARD_ORCHESTRATOR_URL;
use pool_core::registry::RegistryError;
use pool_core::run_files;
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

/// Which orchestrator is reported to.
#[derive(Debug, Clone)]
pub enum Goal {
    /// The one at this address, whether it answers or not.
    Named(String),
    /// The one of this home, which may come, go and change its address.
    Local {
        /// Where it writes its address.
        state: PathBuf,
        /// Whether one at the standard address will do while none runs on this home.
        or_standard: bool,
    },
}

impl Goal {
    /// Its address at this moment. Reads files.
    fn url(&self) -> Option<String> {
        match self {
            Self::Named(url) => Some(url.clone()),
            Self::Local { state, or_standard } => run_files::local_url(state)
                .or_else(|| or_standard.then(|| STANDARD_ORCHESTRATOR_URL.to_owned())),
        }
    }
}

/// The task that reports to the orchestrator.
pub struct Heart {
    pool: Arc<Pool>,
    goal: Goal,
    token: Option<Secret>,
    /// Of the orchestrator that was spoken to last.
    client: Option<ApiClient>,
    interval: Duration,
    registered: bool,
    seq: u64,
    /// What was said of the last failure, until a heartbeat succeeds.
    trouble: Option<String>,
}

/// Why the orchestrator did not take a heartbeat.
#[derive(Debug, thiserror::Error)]
enum BeatError {
    /// There is none.
    #[error("no orchestrator runs on this home")]
    Nobody,
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
            Self::Nobody | Self::Registry(_) => None,
        }
    }

    fn outcome(&self) -> &'static str {
        match (self, self.status()) {
            (Self::Nobody, _) => "nobody",
            (Self::Registry(_), _) => "no_snapshot",
            (_, Some(404)) => "unknown_pool",
            (_, Some(409)) => "superseded",
            (_, Some(_)) => "refused",
            (_, None) => "unreachable",
        }
    }
}

impl Heart {
    /// Reports to the orchestrator that is the `goal`. An address that can't be one is refused here.
    pub fn new(pool: Arc<Pool>, goal: Goal, token: Option<Secret>) -> Result<Self, ClientError> {
        if let Goal::Named(url) = &goal {
            ApiClient::new(url, None)?;
        }
        let interval = Duration::from_millis(pool.lifecycle.config().heartbeat_interval_ms);
        Ok(Self {
            pool,
            goal,
            token,
            client: None,
            interval,
            registered: false,
            seq: 0,
            trouble: None,
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
                    if self.trouble.take().is_some() {
                        tracing::info!(
                            orchestrator = self.orchestrator(),
                            failures,
                            "the orchestrator takes heartbeats"
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
                    self.complain(&error);
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
        let client = self.find().await?;
        if self.registered {
            match self.send(&client).await {
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
            url: self.pool.url.clone(),
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: config.heartbeat_interval_ms,
        };
        let _: IgnoredAny = client.post("/v2/pools/register", &request).await?;
        self.registered = true;
        tracing::info!(
            orchestrator = client.base_url(),
            pool_id = request.pool_id,
            url = request.url,
            "registered"
        );
        self.send(&client)
            .await
            .inspect_err(|error| self.registered &= !matches!(error.status(), Some(404 | 409)))
    }

    /// The orchestrator as it is to be reached now: one that has moved is another, which does not know this pool yet.
    async fn find(&mut self) -> Result<ApiClient, BeatError> {
        let goal = self.goal.clone();
        let url = self.pool.blocking(move |_| goal.url()).await;
        let url = url.ok_or(BeatError::Nobody)?;
        match &self.client {
            Some(client) if client.base_url() == url.trim_end_matches('/') => Ok(client.clone()),
            _ => {
                let client =
                    ApiClient::new(&url, self.token.clone())?.with_answer_timeout(ANSWER_TIMEOUT);
                self.registered = false;
                Ok(self.client.insert(client).clone())
            }
        }
    }

    async fn send(&mut self, client: &ApiClient) -> Result<(), BeatError> {
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
        let _: IgnoredAny = client.post(&path, &heartbeat).await?;
        Ok(())
    }

    fn orchestrator(&self) -> Option<&str> {
        self.client.as_ref().map(ApiClient::base_url)
    }

    /// Says what is wrong, once for as long as it is the same.
    fn complain(&mut self, error: &BeatError) {
        let trouble = format!("{error} {:?}", self.orchestrator());
        if self.trouble.as_ref() == Some(&trouble) {
            return;
        }
        let orchestrator = self.orchestrator();
        match (error, &self.goal) {
            (BeatError::Call(call), _) if error.status().is_some() => {
                let hint = match error.status() {
                    Some(409) => Some(
                        "another daemon with this pool_id reports to the same orchestrator"
                            .to_owned(),
                    ),
                    _ => call.hint(),
                };
                tracing::error!(orchestrator, %error, hint, "the orchestrator refuses this pool");
            }
            // Nobody said that there is one.
            (_, Goal::Local { .. }) if !self.registered => {
                tracing::info!(
                    orchestrator,
                    "no orchestrator on this host; looking out for one"
                );
            }
            _ => {
                tracing::warn!(orchestrator, %error, "the orchestrator is away; trying again");
            }
        }
        self.trouble = Some(trouble);
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
