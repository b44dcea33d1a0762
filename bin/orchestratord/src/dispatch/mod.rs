//! One attempt at one job: from the lease to the end of the worker's stream.
//!
//! Tokens go to readers at once and to the database in batches. Everything else is committed first and told after.

mod found;
mod orphans;
mod running;
mod verdict;
mod worker;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::FutureExt as _;
use jiff::SignedDuration;
use orchestrator_core::job::{AttemptOutcome, JobErrorCode, backoff_ms};
use orchestrator_core::queue::QueuedJob;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::worker::CacheShortage;
use pool_core::crash::crash_point;
use tokio::sync::OwnedSemaphorePermit;

use crate::app::App;
use crate::clock;
use crate::life::{self, End};
use crate::queue::{ActiveAttempt, LiveJob, Order};
use crate::state::{Lease, Progress, Requeue, Seam, StoreError};

pub use found::{Found, take_up};
pub use orphans::{ORPHANED_WITHIN, Orphans, cancel_orphans};
use running::Running;
use verdict::Verdict;

/// The pause before the database is tried again.
const STORE_PAUSE: Duration = Duration::from_secs(1);

/// A job that has been given to a worker.
pub struct Dispatch {
    /// The job.
    pub live: Arc<LiveJob>,
    /// As it stood in the queue.
    pub queued: QueuedJob,
    /// The slot.
    pub attempt: Arc<ActiveAttempt>,
    /// Where the worker is.
    pub endpoint: WorkerEndpoint,
    /// The descriptor of the attempt's stream.
    pub _place: OwnedSemaphorePermit,
}

/// Runs an attempt, and does not leave its job behind whatever happens.
pub async fn run(app: App, dispatch: Dispatch) {
    let fence = OnceLock::new();
    let work = AssertUnwindSafe(perform(&app, &dispatch, &fence)).catch_unwind();
    if work.await.is_err() {
        let Dispatch {
            live,
            attempt,
            endpoint,
            ..
        } = &dispatch;
        tracing::error!(job = %live.id, "an attempt panicked; standard error says where");
        end_surely(&app, live, attempt, None, End::internal()).await;
        if let Some(fence) = fence.get() {
            worker::cancel(endpoint, live.id, *fence).await;
        }
    }
    // A daemon that stops leaves the slot to the execution, which goes on.
    if !app.shutdown.is_requested() {
        release(&app, &dispatch.live, &dispatch.attempt);
    }
}

/// Leases the job, runs the attempt, and draws the conclusion.
async fn perform(app: &App, dispatch: &Dispatch, fence: &OnceLock<u64>) {
    let Dispatch {
        live,
        queued,
        attempt,
        endpoint,
        ..
    } = dispatch;
    let Some(lease) = lease(app, live, queued, attempt).await else {
        return;
    };
    let _ = fence.set(lease.fence);
    let verdict = match seam(app, live, attempt, &lease).await {
        Ok(seam) => {
            Running::new(app, live, attempt, &lease, &seam)
                .start(endpoint, seam)
                .await
        }
        Err(verdict) => verdict,
    };
    verdict.count(&app.metrics);
    conclude(app, live, queued, attempt, &lease, endpoint, verdict).await;
}

/// Gives the attempt's slot to others.
fn release(app: &App, live: &LiveJob, attempt: &ActiveAttempt) {
    app.jobs.end_attempt(live.id, attempt);
    app.changed.notify_one();
}

/// Commits the lease. `None`: the job is over, or waits again.
async fn lease(
    app: &App,
    live: &LiveJob,
    queued: &QueuedJob,
    attempt: &ActiveAttempt,
) -> Option<Lease> {
    let gate = live.gate.lock().await;
    if live.ended().is_some() {
        return None;
    }
    match app
        .store
        .lease(live.id, &attempt.pool_id, &attempt.worker_id, clock::now())
        .await
    {
        Ok(lease) => {
            crash_point("lease.committed");
            live.hub.forget_momentary();
            app.metrics.dispatched.inc();
            if lease.attempt == 1 {
                app.metrics
                    .queue_wait
                    .observe(seconds_since(live.created_at));
            }
            tracing::info!(job = %live.id, attempt = lease.attempt, fence = lease.fence, pool = attempt.pool_id,
                worker = attempt.worker_id, "leased");
            Some(lease)
        }
        Err(StoreError::Closed) => None,
        Err(error @ StoreError::Unavailable(_)) => {
            tracing::warn!(job = %live.id, %error, "could not lease");
            app.jobs.end_attempt(live.id, attempt);
            let pause = SignedDuration::try_from(STORE_PAUSE).unwrap_or_default();
            app.jobs.put(QueuedJob {
                not_before: clock::now().checked_add(pause).ok(),
                ..queued.clone()
            });
            None
        }
        Err(error) => {
            tracing::error!(job = %live.id, %error, "could not lease");
            drop(gate);
            end_surely(app, live, attempt, None, End::internal()).await;
            None
        }
    }
}

/// Where the text stands that the attempt shall go on with. However long the database needs.
async fn seam(
    app: &App,
    live: &LiveJob,
    attempt: &ActiveAttempt,
    lease: &Lease,
) -> Result<Seam, Verdict> {
    if !lease.started_before {
        return Ok(Seam::default());
    }
    loop {
        match app.store.seam(live.id).await {
            Ok(seam) => return Ok(seam),
            Err(StoreError::Unavailable(error)) => {
                tracing::warn!(job = %live.id, %error, "could not read the job's text yet");
                if pause_for_store(app, attempt).await {
                    return Err(if app.shutdown.is_requested() {
                        Verdict::Stopping
                    } else {
                        Verdict::Over
                    });
                }
            }
            Err(StoreError::Closed) => return Err(Verdict::Stopping),
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not read the job's text");
                return Err(Verdict::Broken);
            }
        }
    }
}

fn seconds_since(at: jiff::Timestamp) -> f64 {
    clock::now().duration_since(at).as_secs_f64().max(0.0)
}

/// Does what follows from the attempt's end. The worker is told last: nothing of it depends on whether it hears.
async fn conclude(
    app: &App,
    live: &Arc<LiveJob>,
    queued: &QueuedJob,
    attempt: &ActiveAttempt,
    lease: &Lease,
    endpoint: &WorkerEndpoint,
    verdict: Verdict,
) {
    let fence = Some(lease.fence);
    let verdict = match verdict {
        // The worker was chosen for that context: such attempts must not repeat endlessly.
        Verdict::Cramped { needed, reason } if queued.context_needed >= Some(needed) => {
            Verdict::Lost(reason)
        }
        verdict => verdict,
    };
    let requeue = |queued, outcome, reason| {
        requeue_surely(app, live, attempt, lease, queued, outcome, reason)
    };
    let at_once = QueuedJob {
        not_before: None,
        ..queued.clone()
    };
    match verdict {
        Verdict::Finished(end) => {
            end_surely(app, live, attempt, fence, End::Completed(end)).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Failed(error) => {
            end_surely(app, live, attempt, fence, End::Error(error)).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Broken | Verdict::Over => {
            if verdict == Verdict::Broken {
                end_surely(app, live, attempt, fence, End::internal()).await;
            }
            crash_point("cancel.unsent");
            // The slot is free for others once the worker has let go of it.
            worker::cancel(endpoint, live.id, lease.fence).await;
            release(app, live, attempt);
            worker::forget(endpoint, live.id).await;
        }
        Verdict::Lost(reason) => {
            let lost = lease.lost + 1;
            tracing::warn!(job = %live.id, attempt = lease.attempt, lost, reason, "attempt lost");
            if lost >= lease.spec.max_attempts {
                let message = format!(
                    "{lost} of {} attempts were lost; the last: {reason}",
                    lease.spec.max_attempts
                );
                end_surely(
                    app,
                    live,
                    attempt,
                    fence,
                    End::error(JobErrorCode::WorkerLost, message, true),
                )
                .await;
                release(app, live, attempt);
            } else {
                let pause = i64::try_from(backoff_ms(lost, rand::random())).unwrap_or(i64::MAX);
                let not_before = clock::now()
                    .checked_add(SignedDuration::from_millis(pause))
                    .ok();
                let queued = QueuedJob {
                    not_before,
                    ..queued.clone()
                };
                requeue(queued, AttemptOutcome::WorkerLost, reason).await;
            }
            // Where it lives after all it shall not go on for nobody. Its buffer is not deleted: by now it may be
            // that of the next attempt, which the fence of this one does not end.
            worker::cancel(endpoint, live.id, lease.fence).await;
        }
        Verdict::NotFound(reason) => {
            tracing::warn!(job = %live.id, attempt = lease.attempt, reason, "attempt not found again");
            requeue(at_once, AttemptOutcome::OrchestratorRestarted, reason).await;
            worker::cancel(endpoint, live.id, lease.fence).await;
        }
        Verdict::Refused(reason) => {
            app.fleet
                .mark_full(&attempt.pool_id, &attempt.worker_id, clock::now());
            requeue(at_once, AttemptOutcome::Refused, reason).await;
        }
        Verdict::Cramped { needed, reason } => {
            tracing::info!(job = %live.id, attempt = lease.attempt, needed, "the worker's context is too small");
            let queued = QueuedJob {
                context_needed: Some(needed),
                ..at_once
            };
            requeue(queued, AttemptOutcome::Refused, reason).await;
        }
        Verdict::NoRoom { shortage, reason } => {
            let CacheShortage {
                needed_tokens,
                free_tokens,
            } = shortage;
            tracing::info!(job = %live.id, attempt = lease.attempt, needed_tokens, free_tokens,
                "the worker's cache has no room now");
            app.fleet.mark_short(
                &attempt.pool_id,
                &attempt.worker_id,
                free_tokens,
                clock::now(),
            );
            let queued = QueuedJob {
                cache_needed: Some(needed_tokens),
                ..at_once
            };
            requeue(queued, AttemptOutcome::Refused, reason).await;
        }
        // The worker goes on, and the database says that the job was running.
        Verdict::Stopping => {}
    }
}

/// Whether the daemon is about to end, or the job is over; else waits a moment for the database.
async fn pause_for_store(app: &App, attempt: &ActiveAttempt) -> bool {
    let mut orders = attempt.orders();
    tokio::select! {
        () = app.shutdown.requested() => true,
        _ = orders.wait_for(|order| *order == Order::Stop) => true,
        () = tokio::time::sleep(STORE_PAUSE) => false,
    }
}

/// Ends the job, however long the database needs. Where the record does not allow this end the job fails with that, and
/// where it does not allow even that the job is let go: none stays that nobody works on.
async fn end_surely(
    app: &App,
    live: &LiveJob,
    attempt: &ActiveAttempt,
    mut fence: Option<u64>,
    mut end: End,
) {
    loop {
        match life::end(app, live, fence, end.clone()).await {
            Ok(_) | Err(StoreError::Closed) => return,
            Err(StoreError::Unavailable(error)) => {
                if pause_for_store(app, attempt).await {
                    return;
                }
                tracing::warn!(job = %live.id, %error, "could not end the job yet");
            }
            Err(error) if end.is_internal() && fence.is_none() => {
                tracing::error!(job = %live.id, %error, "could not fail the job");
                return life::abandon(app, live).await;
            }
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not end the job");
                (fence, end) = (None, End::internal());
            }
        }
    }
}

/// Puts the job back, however long the database needs.
async fn requeue_surely(
    app: &App,
    live: &LiveJob,
    attempt: &ActiveAttempt,
    lease: &Lease,
    queued: QueuedJob,
    outcome: AttemptOutcome,
    reason: String,
) {
    loop {
        let result = {
            let _gate = live.gate.lock().await;
            if live.ended().is_some() {
                return;
            }
            let events = live.hub.unwritten();
            let last = events.last().map(|entry| entry.id.seq);
            let requeue = Requeue {
                fence: lease.fence,
                at: clock::now(),
                progress: Progress {
                    started_at: None,
                    events,
                },
                outcome,
                reason: reason.clone(),
                not_before: queued.not_before,
                context_needed: queued.context_needed,
            };
            let result = app.store.requeue(live.id, requeue).await;
            if result.is_ok() {
                last.inspect(|seq| live.hub.written(*seq));
                // The slot is given back in the same breath: a pass between the two would start the job twice over.
                app.jobs.end_attempt(live.id, attempt);
                app.jobs.put(queued.clone());
                app.changed.notify_one();
            }
            result
        };
        match result {
            Ok(()) | Err(StoreError::Closed) => return,
            Err(StoreError::Unavailable(error)) => {
                if pause_for_store(app, attempt).await {
                    return;
                }
                tracing::warn!(job = %live.id, %error, "could not put the job back yet");
            }
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not put the job back");
                return end_surely(app, live, attempt, None, End::internal()).await;
            }
        }
    }
}
