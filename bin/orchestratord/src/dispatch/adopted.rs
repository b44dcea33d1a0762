//! Attempts that were running when an earlier run of the daemon ended. Their workers continue without the daemon; each attempt is
//! adopted as soon as its pool reports the worker's address.

use std::panic::AssertUnwindSafe;

use futures_util::FutureExt as _;
use orchestrator_core::job::AttemptOutcome;
use pool_core::api::pool::WorkerEndpoint;

use super::attempt::{Attempt, Interruption};
use super::runner::AttemptRunner;
use super::{Dispatcher, worker};
use crate::jobs::JobEnd;
use crate::state::{Interrupted, Lease, Orphan, Unfinished};

/// An attempt of an earlier run of the daemon.
pub struct AdoptedAttempt {
    /// Attempt, with the job as it returns to the queue if the attempt is given up.
    pub attempt: Attempt,
    /// The attempt's record.
    pub interrupted: Interrupted,
}

/// Continues the attempt if its worker still has it, and gives it up otherwise. Does not leave its job behind whatever happens.
pub async fn adopt(adopted: AdoptedAttempt) {
    let AdoptedAttempt {
        attempt,
        interrupted,
    } = &adopted;
    // The execution already runs, so the attempt is followed without a place; a new dispatch waits for a place.
    let _place = attempt.dispatcher.jobs.metrics.load().call();
    let work = AssertUnwindSafe(perform(attempt, interrupted)).catch_unwind();
    if work.await.is_err() {
        tracing::error!(job = %attempt.live.id, "an attempt panicked; see standard error");
        attempt.end_with_retry(None, JobEnd::internal()).await;
        cancel_execution(attempt, interrupted).await;
    }
    attempt.release_unless_stopping();
}

async fn perform(attempt: &Attempt, interrupted: &Interrupted) {
    let Some(lease) = held_lease(attempt, interrupted).await else {
        return;
    };
    match endpoint(attempt).await {
        Ok(endpoint) => {
            let end = match attempt.resume_point(&lease).await {
                Ok(resume_point) => {
                    AttemptRunner::new(attempt, &lease, &resume_point)
                        .adopt(&endpoint, interrupted.started)
                        .await
                }
                Err(end) => end,
            };
            attempt.apply_end(&lease, &endpoint, end).await;
        }
        Err(Interruption::WorkerGone(reason)) => {
            tracing::warn!(job = %attempt.live.id, attempt = lease.attempt, reason, "could not adopt the attempt");
            let (queued, outcome) = (
                attempt.queued.clone(),
                AttemptOutcome::OrchestratorRestarted,
            );
            attempt
                .requeue_with_retry(&lease, queued, outcome, reason)
                .await;
            cancel_execution(attempt, interrupted).await;
        }
        Err(Interruption::Over) => cancel_execution(attempt, interrupted).await,
        Err(Interruption::Stopping) => {}
    }
}

/// Loads the attempt's lease. Retries while the database is unavailable. `None` if the attempt no longer holds the job.
async fn held_lease(attempt: &Attempt, interrupted: &Interrupted) -> Option<Lease> {
    let (store, job) = (&attempt.dispatcher.jobs.store, attempt.live.id);
    let read = attempt.patiently("reading the attempt", || {
        store.held_lease(job, interrupted.fence)
    });
    match read.await {
        Ok(lease) => lease,
        Err(Unfinished::Stopped(_)) => None,
        Err(Unfinished::Failed(error)) => {
            tracing::error!(%job, %error, "could not read the attempt");
            attempt.end_with_retry(None, JobEnd::internal()).await;
            cancel_execution(attempt, interrupted).await;
            None
        }
    }
}

/// Waits until the worker's pool reports its address.
async fn endpoint(attempt: &Attempt) -> Result<WorkerEndpoint, Interruption> {
    let (fleet, slot) = (&attempt.dispatcher.fleet, &attempt.slot);
    let mut heard = fleet.subscribe();
    let mut orders = slot.orders();
    loop {
        heard.borrow_and_update();
        if let Some(endpoint) = fleet.endpoint(&slot.pool_id, &slot.worker_id) {
            return Ok(endpoint);
        }
        tokio::select! {
            interruption = attempt.interrupted(&mut orders, true) => return Err(interruption),
            _ = heard.changed() => {}
        }
    }
}

/// Cancels the execution: now, or once its pool reports.
async fn cancel_execution(attempt: &Attempt, interrupted: &Interrupted) {
    let orphan = Orphan {
        job: attempt.live.id,
        fence: interrupted.fence,
        pool_id: attempt.slot.pool_id.clone(),
        worker_id: attempt.slot.worker_id.clone(),
    };
    let Dispatcher { fleet, orphans, .. } = attempt.dispatcher.as_ref();
    match fleet.endpoint(&orphan.pool_id, &orphan.worker_id) {
        Some(endpoint) => worker::cancel(&endpoint, orphan.job, orphan.fence).await,
        None => orphans.add([orphan]),
    }
}
