//! Reports to the orchestrator: a registration, then heartbeats, at an interval and on every change.
//!
//! The pool keeps serving while the orchestrator is away. Calls are made one after another, so `seq` grows in the order of the
//! snapshots.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use pool_core::POOL_API_VERSION;
use pool_core::api::pool::{
    Heartbeat, POOL_ID_TAKEN, RegisterRequest, Registration, RegistrationState,
};
use pool_core::config::STANDARD_ORCHESTRATOR_URL;
use pool_core::kit::backoff::Backoff;
use pool_core::kit::client::{ApiClient, ClientError};
use pool_core::kit::errors::with_causes;
use pool_core::kit::run_files;
use pool_core::kit::secret::Secret;
use pool_core::registry::RegistryError;
use serde::de::IgnoredAny;

use crate::pool::Pool;
use crate::registration::standing;

/// Time limit for an answer of the orchestrator.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Changes within this time go into one heartbeat.
const COALESCE: Duration = Duration::from_millis(20);
/// Pauses between attempts while the orchestrator is away.
const BACKOFF: Backoff = Backoff {
    first: Duration::from_millis(250),
    longest: Duration::from_secs(5),
};
/// Time limit for deregistration, within the daemon's own time to stop.
const GOODBYE_TIMEOUT: Duration = Duration::from_secs(1);
/// The orchestrator's code for a heartbeat of a replaced instance.
const STALE_HEARTBEAT: &str = "STALE_HEARTBEAT";

/// The orchestrator to report to.
#[derive(Debug, Clone)]
pub enum Goal {
    /// The orchestrator at this URL, even while it does not answer.
    Named(String),
    /// The orchestrator of this home, which may come, go and change its address.
    Local {
        /// State folder in which the orchestrator writes its address.
        state: PathBuf,
        /// True if an orchestrator at the standard address is accepted while none runs on this home.
        or_standard: bool,
    },
}

impl Goal {
    /// Returns the orchestrator's current URL; `None` if none runs on this home. Reads files.
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
    /// Identity of this host; `None` if its folder is not writable.
    host_id: Option<String>,
    /// Client for the orchestrator that was called last; `None` before the first call.
    client: Option<ApiClient>,
    interval: Duration,
    registered: bool,
    seq: u64,
    /// The failure logged last; `None` once a heartbeat succeeds.
    trouble: Option<String>,
}

/// Reason a heartbeat failed.
#[derive(Debug, thiserror::Error)]
enum BeatError {
    /// No orchestrator to report to.
    #[error("no orchestrator is running in this home")]
    Nobody,
    /// Failed call.
    #[error(transparent)]
    Call(#[from] ClientError),
    /// Registry that can't be read, which leaves nothing to report.
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
            _ if self.is_contested() => "superseded",
            (_, Some(_)) => "refused",
            (_, None) => "unreachable",
        }
    }

    fn code(&self) -> Option<&str> {
        match self {
            Self::Call(error) => error.api().map(|error| error.code.as_str()),
            Self::Nobody | Self::Registry(_) => None,
        }
    }

    /// Returns whether another instance holds this pool's id.
    fn is_contested(&self) -> bool {
        matches!(self.code(), Some(POOL_ID_TAKEN | STALE_HEARTBEAT))
    }

    fn hint(&self) -> Option<String> {
        match self {
            _ if self.is_contested() => Some(
                "two daemons use this pool id: on one of their hosts set `pool_id` in pool-managerd.toml, or \
                 LLORCH_POOL_ID, and restart its daemon"
                    .to_owned(),
            ),
            Self::Call(error) if error.status() == Some(401) => Some(
                "give this pool and its orchestrator the same LLORCH_POOL_TOKEN, and restart the daemon".to_owned(),
            ),
            Self::Call(error) => error.hint(),
            Self::Nobody | Self::Registry(_) => None,
        }
    }
}

impl Heart {
    /// Creates the task that reports to the orchestrator `goal`. Fails if its URL is invalid.
    pub fn new(
        pool: Arc<Pool>,
        goal: Goal,
        token: Option<Secret>,
        host_id: Option<String>,
    ) -> Result<Self, ClientError> {
        if let Goal::Named(url) = &goal {
            ApiClient::new(url, None)?;
        }
        let interval = Duration::from_millis(pool.lifecycle.config().heartbeat_interval_ms);
        pool.link.set(standing(RegistrationState::Pending));
        Ok(Self {
            pool,
            goal,
            token,
            host_id,
            client: None,
            interval,
            registered: false,
            seq: 0,
            trouble: None,
        })
    }

    /// Sends heartbeats until the daemon is asked to stop, and then deregisters.
    pub async fn beat(mut self) {
        let shutdown = self.pool.shutdown.clone();
        tokio::select! {
            biased;
            () = shutdown.requested() => {}
            () = self.report_on() => {}
        }
        self.say_goodbye().await;
    }

    async fn report_on(&mut self) {
        let pool = Arc::clone(&self.pool);
        let (mut changes, mut asked) = (pool.changes(), pool.link.asked());
        let mut failures = 0u32;
        loop {
            // Mark changes as seen before the snapshot is taken: a change during the call causes another heartbeat.
            changes.borrow_and_update();
            let covered = *asked.borrow_and_update();
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
                            "the orchestrator accepts heartbeats"
                        );
                    }
                    failures = 0;
                    pool.link.set(Registration {
                        orchestrator: self.orchestrator().map(str::to_owned),
                        accepted_at: Some(Timestamp::now()),
                        ..standing(RegistrationState::Registered)
                    });
                    pool.link.answer(covered);
                    tokio::select! {
                        () = tokio::time::sleep(self.interval) => {}
                        // The pool holds the senders, so these only return after a change.
                        _ = changes.changed() => tokio::time::sleep(COALESCE.min(self.interval)).await,
                        _ = asked.changed() => {}
                    }
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    self.complain(&error);
                    // An earlier retry can't help: a person must change one of the two ids.
                    let pause = if error.is_contested() {
                        self.interval
                    } else {
                        pause_after(failures, self.interval, rand::random())
                    };
                    pool.link.set(self.failure(&error, pause));
                    pool.link.answer(covered);
                    // An orchestrator that has just come back asks for a heartbeat.
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        _ = asked.changed() => {}
                    }
                }
            }
        }
    }

    /// Returns the registration after an attempt that failed with `error`, with the next attempt after `pause`.
    fn failure(&self, error: &BeatError, pause: Duration) -> Registration {
        let local = matches!(self.goal, Goal::Local { .. });
        let state = match error {
            BeatError::Nobody => RegistrationState::NoOrchestrator,
            BeatError::Registry(_) => RegistrationState::Failed,
            BeatError::Call(call) if call.status().is_some() => RegistrationState::Refused,
            // An orchestrator may start at the standard address later. The settings name none now.
            BeatError::Call(_) if local && !self.registered => RegistrationState::NoOrchestrator,
            BeatError::Call(_) => RegistrationState::Unreachable,
        };
        let particulars = state != RegistrationState::NoOrchestrator;
        let orchestrator = self.orchestrator().map(str::to_owned);
        Registration {
            orchestrator: orchestrator.filter(|_| particulars),
            code: error.code().map(str::to_owned),
            message: particulars.then(|| with_causes(error)),
            hint: error.hint().filter(|_| particulars),
            next_try_at: SignedDuration::try_from(pause)
                .ok()
                .and_then(|pause| Timestamp::now().checked_add(pause).ok()),
            ..standing(state)
        }
    }

    /// Notifies the orchestrator that this pool stops on purpose. The workers keep running.
    async fn say_goodbye(&self) {
        let known =
            self.registered || self.pool.link.standing().code.as_deref() == Some(POOL_ID_TAKEN);
        let Some(client) = self.client.as_ref().filter(|_| known) else {
            return;
        };
        let path = format!(
            "/v2/pools/{}?instance_id={}",
            self.pool.lifecycle.config().pool_id,
            self.pool.instance_id
        );
        let call = client.clone().with_answer_timeout(GOODBYE_TIMEOUT);
        match call.delete::<IgnoredAny>(&path).await {
            Ok(_) => tracing::info!(orchestrator = client.base_url(), "deregistered"),
            Err(error) => {
                tracing::warn!(orchestrator = client.base_url(), %error, "could not deregister");
            }
        }
    }

    /// Sends one heartbeat, after a registration if one is due.
    async fn report(&mut self) -> Result<(), BeatError> {
        let client = self.find().await?;
        if self.registered {
            match self.send(&client).await {
                // The orchestrator does not know this pool any more, for example because its database is new. Register again.
                Err(error) if error.status() == Some(404) => self.registered = false,
                // A 409 means that another instance holds this pool's id, so the next report must register again.
                other => {
                    return other
                        .inspect_err(|error| self.registered &= error.status() != Some(409));
                }
            }
        }
        let config = self.pool.lifecycle.config();
        let mut request = RegisterRequest {
            pool_id: config.pool_id.clone(),
            instance_id: self.pool.instance_id.clone(),
            url: self.pool.url.clone(),
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: config.heartbeat_interval_ms,
            host_id: self.host_id.clone(),
        };
        let mut answer = client
            .post::<_, IgnoredAny>("/v2/pools/register", &request)
            .await;
        // An older orchestrator refuses the unknown field.
        if answer
            .as_ref()
            .is_err_and(|error| error.status() == Some(400))
        {
            request.host_id = None;
            answer = client.post("/v2/pools/register", &request).await;
        }
        answer?;
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

    /// Returns a client for the orchestrator's current address. At a new address, the pool has to register again.
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

    /// Logs a failure, once until it changes or a heartbeat succeeds.
    fn complain(&mut self, error: &BeatError) {
        let trouble = format!("{error} {:?}", self.orchestrator());
        if self.trouble.as_ref() == Some(&trouble) {
            return;
        }
        let orchestrator = self.orchestrator();
        match (error, &self.goal) {
            (BeatError::Call(_), _) if error.status().is_some() => {
                let hint = error.hint();
                tracing::error!(orchestrator, %error, hint, "the orchestrator refuses this pool");
            }
            // No setting names an orchestrator, so its absence is not an error.
            (_, Goal::Local { .. }) if !self.registered => {
                tracing::info!(
                    orchestrator,
                    "no orchestrator on this host; waiting for one"
                );
            }
            _ => {
                tracing::warn!(orchestrator, %error, "the orchestrator is unreachable; trying again");
            }
        }
        self.trouble = Some(trouble);
    }
}

/// Returns the pause after `failures` failures in a row, at most the interval between heartbeats. `roll` (0 to 1) is what the pools
/// of a fleet draw, so that they don't all retry at once.
fn pause_after(failures: u32, interval: Duration, roll: f64) -> Duration {
    Backoff::spread(BACKOFF.after(failures).min(interval), roll)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-031]
    fn pauses_double_up_to_a_limit_and_are_spread() {
        let ms = |failures, interval_s, roll| {
            pause_after(failures, Duration::from_secs(interval_s), 1.0 - roll).as_millis()
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
