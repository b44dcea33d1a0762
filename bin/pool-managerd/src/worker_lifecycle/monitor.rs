//! One worker, from start to end: its health taken over, its timeouts enforced, its end recorded.

use std::convert::Infallible;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use pool_core::api::worker::WorkerHealth;
use pool_core::client::ApiClient;
use pool_core::lifecycle::{Ended, ExitFacts, ObserveError};
use pool_core::process::{Signal, SignalOutcome};
use pool_core::registry::WorkerRecord;
use pool_core::worker::{WorkerInfo, WorkerStatus};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{ending, report_end};
use crate::pool::Pool;

/// How often a worker that loads is asked how it is.
const LOADING_INTERVAL: Duration = Duration::from_millis(250);
/// How often one that has loaded is.
const SERVING_INTERVAL: Duration = Duration::from_secs(1);
/// How long it may take to answer: `/health` never waits for inference.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);

/// Watches the worker until its process has ended and that is recorded.
pub async fn watch(
    pool: Arc<Pool>,
    record: WorkerRecord,
    child: Option<Child>,
    nudge: Arc<Notify>,
) {
    let id = record.info.id.clone();
    let mut next = Some((record, child));
    // Once, or more often where a port was found taken: each process is watched by itself.
    while let Some((record, child)) = next {
        let ending = ending::of(record.identity.clone(), child);
        let mut watched = Watched::new(record);
        let facts = tokio::select! {
            // Whatever else is going on, the end comes first.
            biased;
            facts = ending => facts.unwrap_or(ExitFacts::Unknown),
            never = watched.look_after(&pool, &nudge) => match never {},
        };
        next = watched.ended(&pool, facts).await;
    }
    pool.watched().remove(&id);
}

/// One process of the worker.
struct Watched {
    record: WorkerRecord,
    client: Option<ApiClient>,
    since: Instant,
    /// When it is killed if it hasn't stopped by then.
    kill_at: Option<Instant>,
    /// The start timeout that it was killed for.
    start_timeout: Option<Duration>,
}

impl Watched {
    fn new(record: WorkerRecord) -> Self {
        let client = ApiClient::new(&record.url(), None)
            .map(|client| client.with_answer_timeout(ANSWER_TIMEOUT));
        Self {
            client: client.ok(),
            since: Instant::now(),
            kill_at: None,
            start_timeout: None,
            record,
        }
    }

    /// Enforces the timeouts and takes over the worker's health, until it is dropped, which may be at any point.
    async fn look_after(&mut self, pool: &Arc<Pool>, nudge: &Notify) -> Infallible {
        loop {
            self.look(pool, nudge).await;
        }
    }

    /// One round of it, and the wait for the next.
    async fn look(&mut self, pool: &Arc<Pool>, nudge: &Notify) {
        let id = self.record.info.id.clone();
        if let Some(record) = pool
            .blocking(move |pool| pool.lifecycle.registry().get(&id))
            .await
        {
            self.record = record;
        }
        let now = Instant::now();
        let workers = &pool.lifecycle.config().workers;
        if self.record.stop_requested {
            let timeout = self.record.args.stop_timeout();
            let kill_at = *self.kill_at.get_or_insert(now + timeout);
            if now >= kill_at {
                tracing::warn!(
                    worker = self.record.info.id,
                    "a worker did not stop in time and is killed"
                );
                self.kill_at = Some(now + timeout);
                self.kill(pool).await;
            }
        } else if self.record.info.status == WorkerStatus::Starting {
            let timeout = workers.start_timeout(self.record.info.model_file.size_bytes);
            if now.duration_since(self.since) >= timeout && self.start_timeout.is_none() {
                // Noted before, because the end may be heard of before the kill returns.
                self.start_timeout = Some(timeout);
                if !self.kill(pool).await {
                    self.start_timeout = None;
                }
            }
        }
        self.ask(pool).await;
        let interval = if self.record.info.status == WorkerStatus::Starting {
            LOADING_INTERVAL
        } else {
            SERVING_INTERVAL
        };
        let wake_at = self
            .kill_at
            .map_or(now + interval, |kill_at| kill_at.min(now + interval));
        tokio::select! {
            () = tokio::time::sleep_until(wake_at) => {}
            () = nudge.notified() => {}
        }
    }

    /// Asks the worker how it is, and takes over what it says. A worker that doesn't answer is none yet, or none any
    /// more, or too busy: its process says the rest.
    async fn ask(&mut self, pool: &Arc<Pool>) {
        let Some(client) = &self.client else { return };
        match client.get::<WorkerHealth>("/health").await {
            Ok(health) => match observe(pool, &self.record.info.id, health).await {
                Ok(Some(info)) => self.record.info = info,
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(worker = self.record.info.id, %error, "an account was not taken over");
                }
            },
            Err(error) => {
                tracing::trace!(worker = self.record.info.id, %error, "no answer from a worker");
            }
        }
    }

    /// Kills it; `false` where the signal did not reach it.
    async fn kill(&self, pool: &Arc<Pool>) -> bool {
        let record = self.record.clone();
        let outcome = pool
            .blocking(move |pool| pool.lifecycle.signal(&record, Signal::KILL))
            .await;
        match outcome {
            Ok(outcome) => outcome == SignalOutcome::Sent,
            Err(error) => {
                tracing::error!(worker = self.record.info.id, %error, "could not kill a worker");
                false
            }
        }
    }

    /// Records the end, and returns what to watch next if the worker was started again.
    async fn ended(
        &mut self,
        pool: &Arc<Pool>,
        facts: ExitFacts,
    ) -> Option<(WorkerRecord, Option<Child>)> {
        let facts = end_of(facts, self.start_timeout.take());
        let id = self.record.info.id.clone();
        let recorded = loop {
            let (id, facts) = (id.clone(), facts.clone());
            match pool
                .blocking(move |pool| pool.lifecycle.process_ended(&id, facts))
                .await
            {
                Ok(recorded) => break recorded,
                // A full disk, say. The end has to be recorded, or the worker's memory stays reserved.
                Err(error) => {
                    tracing::error!(worker = self.record.info.id, %error, "could not record a worker's end");
                }
            }
            tokio::time::sleep(SERVING_INTERVAL).await;
        };
        match recorded {
            Some(Ended::Restarted(started)) => {
                tracing::info!(
                    worker = id,
                    port = started.info.port,
                    pid = started.info.pid,
                    "its port was taken; trying the next"
                );
                pool.metrics.started("port_taken");
                pool.changed();
                let record = pool
                    .blocking(move |pool| pool.lifecycle.registry().get(&id))
                    .await;
                Some((record?, started.child))
            }
            Some(Ended::Over(info)) => {
                report_end(pool, &info);
                None
            }
            None => None,
        }
    }
}

/// What is known of the end of a worker that was killed for `start_timeout`: that, unless it ended another way first.
fn end_of(facts: ExitFacts, start_timeout: Option<Duration>) -> ExitFacts {
    let by_kill =
        facts == ExitFacts::Signalled(Signal::KILL.as_raw()) || facts == ExitFacts::Unknown;
    match start_timeout {
        Some(timeout) if by_kill => ExitFacts::StartTimeout(timeout),
        _ => facts,
    }
}

/// Takes over what a worker says of itself, and tells everybody if that makes a difference.
pub async fn observe(
    pool: &Arc<Pool>,
    id: &str,
    health: WorkerHealth,
) -> Result<Option<WorkerInfo>, ObserveError> {
    let id = id.to_owned();
    pool.blocking(move |pool| {
        let changed = pool.lifecycle.observe(&id, &health)?;
        if let Some((before, info)) = &changed {
            if before.ready_at.is_none() && info.ready_at.is_some() {
                pool.metrics.started("ready");
                let load_s = info
                    .ready_at
                    .map(|at| at.duration_since(info.created_at).as_secs_f64());
                tracing::info!(
                    worker = id,
                    load_s,
                    measured_bytes = info.memory.measured_bytes,
                    "a worker is ready"
                );
            }
            pool.changed();
        }
        Ok(changed.map(|(_, info)| info))
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test] // [POOLD-020]
    fn only_a_kill_of_ours_is_a_start_timeout() {
        let timeout = Duration::from_secs(120);
        for by_kill in [ExitFacts::Signalled(9), ExitFacts::Unknown] {
            assert_eq!(
                end_of(by_kill.clone(), Some(timeout)),
                ExitFacts::StartTimeout(timeout)
            );
            assert_eq!(end_of(by_kill.clone(), None), by_kill);
        }
        // It was faster than the kill.
        assert_eq!(
            end_of(ExitFacts::Exited(65), Some(timeout)),
            ExitFacts::Exited(65)
        );
    }
}
