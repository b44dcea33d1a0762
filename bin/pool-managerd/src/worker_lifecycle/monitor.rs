//! The watch over one worker: takes over its health, enforces its timeouts and records its end.

use std::convert::Infallible;
use std::process::Child;
use std::sync::Arc;
use std::time::Duration;

use pool_core::api::worker::WorkerHealth;
use pool_core::kit::cgroup::OomMark;
use pool_core::kit::client::ApiClient;
use pool_core::kit::clock;
use pool_core::kit::crash::crash_point;
use pool_core::kit::process::{ProcessIdentity, Signal, SignalOutcome};
use pool_core::lifecycle::{Deadlines, Ended, ExitFacts, ObserveError, ProgressWatch, Stall};
use pool_core::registry::{TerminationCause, WorkerRecord};
use pool_core::worker::{WorkerInfo, WorkerStatus};
use tokio::sync::Notify;
use tokio::time::Instant;

use super::{ending, report_end};
use crate::pool::Pool;

/// Interval between checks of a worker that loads its model.
const LOADING_INTERVAL: Duration = Duration::from_millis(250);
/// Interval between checks of a worker that has loaded.
const SERVING_INTERVAL: Duration = Duration::from_secs(1);
/// Time limit for an answer to a check: `/health` never waits for inference.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// Time between SIGTERM and SIGKILL for a condemned worker.
const CONDEMNED_GRACE: Duration = Duration::from_secs(2);
/// Shortest time that a worker is watched before it can exceed its start timeout.
const HEARING: Duration = Duration::from_secs(5);

/// Watches the worker until its process has ended and the end is recorded.
pub async fn watch(
    pool: Arc<Pool>,
    record: WorkerRecord,
    child: Option<Child>,
    nudge: Arc<Notify>,
) {
    let _entry = Entry {
        pool: Arc::clone(&pool),
        id: record.info.id.clone(),
    };
    let mut next = Some((record, child));
    // Repeats only if a port was found taken: each process gets its own watch.
    while let Some((record, child)) = next {
        let ending = ending::of(record.identity.clone(), child);
        let mut watched = Watched::new(&pool, record);
        let facts = tokio::select! {
            // The end takes precedence over everything else.
            biased;
            facts = ending => facts,
            never = watched.look_after(&pool, &nudge) => match never {},
        };
        next = watched.ended(&pool, facts).await;
    }
}

/// The worker's entry among the watched ones. On drop, even after a panic, the worker can be adopted again.
struct Entry {
    pool: Arc<Pool>,
    id: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.pool.watched().remove(&self.id);
    }
}

/// One process of the worker, under watch.
struct Watched {
    record: WorkerRecord,
    /// Identity of the process, fixed when the watch began: a later one in the record is not taken over.
    process: Option<ProcessIdentity>,
    client: Option<ApiClient>,
    progress: ProgressWatch,
    /// Age of the process when the watch began.
    age: Duration,
    /// Time at which the process is killed unless it has ended, by the clock of this process's own running time: the worker may
    /// not have run during a gap of the daemon either.
    kill_at: Option<Duration>,
}

impl Watched {
    fn new(pool: &Pool, record: WorkerRecord) -> Self {
        let client = ApiClient::new(&record.url(), None)
            .map(|client| client.with_answer_timeout(ANSWER_TIMEOUT));
        let workers = &pool.lifecycle.config().workers;
        let size = record.info.model_file.size_bytes;
        let backend = record.info.device.backend;
        let deadlines = Deadlines::of(size, backend, workers.stall_timeout());
        Self {
            client: client.ok(),
            progress: ProgressWatch::new(deadlines, std::time::Instant::now()),
            age: record.age(),
            kill_at: None,
            process: record.identity.clone(),
            record,
        }
    }

    /// Enforces the deadlines and takes over the worker's health until the future is dropped, which may happen at any await.
    async fn look_after(&mut self, pool: &Arc<Pool>, nudge: &Notify) -> Infallible {
        loop {
            self.look(pool, nudge).await;
        }
    }

    /// Does one round of the watch, and waits for the next.
    async fn look(&mut self, pool: &Arc<Pool>, nudge: &Notify) {
        self.read_record(pool).await;
        let begun = Instant::now();
        // Read before the health check, so that an answer proves that no kill counted here was this worker's own.
        let mark = self.record.info.pid.and_then(OomMark::of);
        let answer = self.ask(pool).await;
        if answer.is_some() || self.has_moved_to(mark.as_ref()) {
            self.remember(pool, mark).await;
        }
        if self.record.info.ready_at.is_some() {
            self.progress.heard_ready();
        }
        let stall = self
            .progress
            .look(std::time::Instant::now(), answer.as_ref());
        if self.record.stop_requested || self.record.verdict.is_some() {
            self.see_it_end(pool).await;
        } else if let Some(verdict) = self.verdict(pool, stall) {
            self.condemn(pool, verdict).await;
        }
        let interval = if self.record.info.status == WorkerStatus::Starting {
            LOADING_INTERVAL
        } else {
            SERVING_INTERVAL
        };
        let until_kill = self.kill_at.map(|at| at.saturating_sub(clock::elapsed()));
        let wake_at = (begun + interval).min(Instant::now() + until_kill.unwrap_or(interval));
        tokio::select! {
            () = tokio::time::sleep_until(wake_at) => {}
            () = nudge.notified() => {}
        }
    }

    /// Takes over changes by other processes to the worker's record, except its process identity. A record with another
    /// identity would let a stop, or the next daemon, miss the worker, so it is corrected.
    async fn read_record(&mut self, pool: &Arc<Pool>) {
        let id = self.record.info.id.clone();
        let read = pool
            .blocking(move |pool| pool.lifecycle.registry().get(&id))
            .await;
        // Another nonce belongs to a later process. The end of this one is about to be noticed.
        let Some(record) = read.filter(|record| record.nonce == self.record.nonce) else {
            return;
        };
        self.record = record;
        let Some(process) = self.process.clone() else {
            return;
        };
        if self.record.identity.as_ref() == Some(&process) {
            return;
        }
        tracing::warn!(
            worker = self.record.info.id,
            named = self.record.identity.as_ref().map(|named| named.pid),
            pid = process.pid,
            "the record of a worker names another process; restoring it"
        );
        self.record.info.pid = Some(process.pid);
        self.record.identity = Some(process.clone());
        let (id, nonce) = (self.record.info.id.clone(), self.record.nonce.clone());
        let restored = pool
            .blocking(move |pool| pool.lifecycle.restore_process(&id, &nonce, &process))
            .await;
        match restored {
            Ok(_) => pool.changed(),
            Err(error) => {
                tracing::error!(worker = self.record.info.id, %error, "could not restore a worker's record; trying again");
            }
        }
    }

    /// Returns the reason the worker must end, if there is one.
    fn verdict(&self, pool: &Pool, stall: Option<Stall>) -> Option<TerminationCause> {
        let timeout = pool
            .lifecycle
            .config()
            .workers
            .start_timeout(self.record.info.model_file.size_bytes);
        let watched = self.progress.watched_for();
        // A worker that loaded while no daemon ran gets time to report ready.
        if self.record.info.status == WorkerStatus::Starting
            && self.age + watched >= timeout
            && watched >= timeout.min(HEARING)
        {
            return Some(TerminationCause::StartTimeout {
                after_s: timeout.as_secs(),
            });
        }
        stall.map(|stall| TerminationCause::Stalled {
            message: stall.to_string(),
        })
    }

    /// Records the verdict and begins to carry it out.
    async fn condemn(&mut self, pool: &Arc<Pool>, verdict: TerminationCause) {
        let id = self.record.info.id.clone();
        tracing::warn!(worker = id, ?verdict, "a worker must end");
        let condemned = pool
            .blocking(move |pool| pool.lifecycle.condemn(&id, &verdict))
            .await;
        match condemned {
            Ok(Some(record)) => {
                self.record = record;
                // The worker accepts no more work, and the orchestrator must know.
                pool.changed();
                self.see_it_end(pool).await;
            }
            Ok(None) => {}
            Err(error) => {
                tracing::error!(worker = self.record.info.id, %error, "could not record why a worker must end; trying again");
            }
        }
    }

    /// Makes sure that a worker with a stop request or a verdict ends. Sends SIGTERM again, since the process that made the
    /// request may have died before it sent the signal, and SIGKILL when the grace period is over.
    async fn see_it_end(&mut self, pool: &Arc<Pool>) {
        let grace = match self.record.verdict {
            Some(_) => CONDEMNED_GRACE,
            None => self.record.args.stop_timeout(),
        };
        let now = clock::elapsed();
        match self.kill_at {
            None => {
                self.kill_at = Some(now + grace);
                self.signal(pool, Signal::TERM).await;
            }
            Some(kill_at) if now >= kill_at => {
                // Set again, so that a signal that could not be sent is repeated after another grace period.
                self.kill_at = Some(now + grace);
                crash_point("stop.kill");
                let worker = &self.record.info.id;
                match self.signal(pool, Signal::KILL).await {
                    Some(SignalOutcome::Sent) => {
                        tracing::warn!(worker, "killed a worker that did not end in time");
                    }
                    Some(SignalOutcome::Gone) => {
                        tracing::warn!(
                            worker,
                            pid = self.record.info.pid,
                            "a worker did not end in time, but nothing was killed: its process has just ended or is unknown"
                        );
                    }
                    None => {}
                }
            }
            Some(_) => {}
        }
    }

    /// Queries the worker's health and takes it over. Returns `None` without a valid answer: the worker may not listen yet, be
    /// gone or be busy, which only its process can show.
    async fn ask(&mut self, pool: &Arc<Pool>) -> Option<WorkerHealth> {
        let health = match self.client.as_ref()?.get::<WorkerHealth>("/health").await {
            Ok(health) => health,
            Err(error) => {
                tracing::trace!(worker = self.record.info.id, %error, "no answer from a worker");
                return None;
            }
        };
        match observe(pool, &self.record.info.id, health.clone()).await {
            Ok(Some(info)) => self.record.info = info,
            Ok(None) => {}
            Err(error) => {
                tracing::debug!(worker = self.record.info.id, %error, "could not apply a health report");
                // An answer refused as a stranger's is no sign of life.
                return matches!(error, ObserveError::Registry(_)).then_some(health);
            }
        }
        Some(health)
    }

    /// Returns whether the worker has been moved to another cgroup, and still ran when `mark` was read.
    fn has_moved_to(&self, mark: Option<&OomMark>) -> bool {
        let path = |mark: &OomMark| mark.path.clone();
        let runs = || {
            self.record
                .identity
                .as_ref()
                .is_some_and(|process| process.is_alive())
        };
        mark.is_some() && mark.map(path) != self.record.oom_mark.as_ref().map(path) && runs()
    }

    /// Records the worker's memory cgroup and its counter of kills.
    async fn remember(&mut self, pool: &Arc<Pool>, mark: Option<OomMark>) {
        let Some(mark) = mark.filter(|mark| self.record.oom_mark.as_ref() != Some(mark)) else {
            return;
        };
        let (id, marked) = (self.record.info.id.clone(), mark.clone());
        match pool
            .blocking(move |pool| pool.lifecycle.mark_memory(&id, &marked))
            .await
        {
            Ok(()) => self.record.oom_mark = Some(mark),
            Err(error) => {
                tracing::error!(worker = self.record.info.id, %error, "could not record a worker's cgroup");
            }
        }
    }

    /// Sends the worker a signal. Logs a failure; the next signal due is the next attempt.
    async fn signal(&self, pool: &Arc<Pool>, signal: Signal) -> Option<SignalOutcome> {
        let record = self.record.clone();
        let outcome = pool
            .blocking(move |pool| pool.lifecycle.signal(&record, signal))
            .await;
        outcome
            .inspect_err(|error| {
                tracing::error!(worker = self.record.info.id, %error, ?signal, "could not signal a worker");
            })
            .ok()
    }

    /// Records the end. Returns the process to watch next if the worker was started again.
    async fn ended(
        &mut self,
        pool: &Arc<Pool>,
        facts: ExitFacts,
    ) -> Option<(WorkerRecord, Option<Child>)> {
        let id = self.record.info.id.clone();
        let recorded = loop {
            let (watched, facts) = (self.record.clone(), facts.clone());
            match pool
                .blocking(move |pool| pool.lifecycle.process_ended(&watched, facts))
                .await
            {
                Ok(recorded) => break recorded,
                // For example, a full disk. The end must be recorded, or the worker's memory stays reserved.
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
                    "the port of a worker was taken; trying the next one"
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
            // The starter of the later process watches it. Without its starter, the process is adopted like any other.
            Some(Ended::Replaced(_)) | None => None,
        }
    }
}

/// Takes over the health that a worker reports, and announces the change if there is one.
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
                crash_point("ready.unreported");
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
