//! Attempts that were under way when an earlier run of the daemon ended. Their workers go on without us: each is taken up
//! again as soon as its pool says where its worker is.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use futures_util::FutureExt as _;
use orchestrator_core::job::AttemptOutcome;
use orchestrator_core::queue::QueuedJob;
use pool_core::api::pool::WorkerEndpoint;

use super::running::{Cut, Running, cut};
use super::{conclude, end_surely, pause_for_store, release, requeue_surely, seam, worker};
use crate::app::App;
use crate::life::End;
use crate::queue::{ActiveAttempt, LiveJob};
use crate::state::{Interrupted, Lease, Orphan, StoreError};

/// A job with the attempt that held it when the daemon ended.
pub struct Found {
    /// The job.
    pub live: Arc<LiveJob>,
    /// As it stands in the queue when the attempt is given up.
    pub queued: QueuedJob,
    /// The slot.
    pub attempt: Arc<ActiveAttempt>,
    /// What the record has of the attempt.
    pub interrupted: Interrupted,
}

/// Takes the attempt up where its worker has it, gives it up where it has not, and does not leave its job behind whatever
/// happens.
pub async fn take_up(app: App, found: Found) {
    // The attempt already runs, so it is followed without a place; a new dispatch waits for a place.
    let _place = app.metrics.load().call();
    let work = AssertUnwindSafe(perform(&app, &found)).catch_unwind();
    if work.await.is_err() {
        tracing::error!(job = %found.live.id, "an attempt panicked; standard error says where");
        end_surely(&app, &found.live, &found.attempt, None, End::internal()).await;
        tell_worker(&app, &found).await;
    }
    // A daemon that stops leaves the slot to the execution, which goes on.
    if !app.shutdown.is_requested() {
        release(&app, &found.live, &found.attempt);
    }
}

async fn perform(app: &App, found: &Found) {
    let Found {
        live,
        queued,
        attempt,
        interrupted,
    } = found;
    let Some(lease) = lease(app, found).await else {
        return;
    };
    let (endpoint, verdict) = match endpoint(app, attempt).await {
        Ok(endpoint) => {
            let verdict = match seam(app, live, attempt, &lease).await {
                Ok(seam) => {
                    Running::new(app, live, attempt, &lease, &seam)
                        .take_up(&endpoint, interrupted.started)
                        .await
                }
                Err(verdict) => verdict,
            };
            (endpoint, verdict)
        }
        // Nobody knows where the worker is, if it is at all.
        Err(Cut::Gone(reason)) => {
            tracing::warn!(job = %live.id, attempt = lease.attempt, reason, "attempt not found again");
            let outcome = AttemptOutcome::OrchestratorRestarted;
            requeue_surely(app, live, attempt, &lease, queued.clone(), outcome, reason).await;
            return tell_worker(app, found).await;
        }
        Err(Cut::Over) => return tell_worker(app, found).await,
        Err(Cut::Stopping) => return,
    };
    verdict.count(&app.metrics);
    conclude(app, live, queued, attempt, &lease, &endpoint, verdict).await;
}

/// What the record says of the attempt, however long the database needs. `None`: it holds the job no more.
async fn lease(app: &App, found: &Found) -> Option<Lease> {
    let Found { live, attempt, .. } = found;
    loop {
        match app.store.held_lease(live.id, found.interrupted.fence).await {
            Ok(lease) => return lease,
            Err(StoreError::Unavailable(error)) => {
                tracing::warn!(job = %live.id, %error, "could not read the attempt yet");
                if pause_for_store(app, attempt).await {
                    return None;
                }
            }
            Err(StoreError::Closed) => return None,
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not read the attempt");
                end_surely(app, live, attempt, None, End::internal()).await;
                tell_worker(app, found).await;
                return None;
            }
        }
    }
}

/// Where the worker is, once its pool says so.
async fn endpoint(app: &App, attempt: &ActiveAttempt) -> Result<WorkerEndpoint, Cut> {
    let mut heard = app.fleet.subscribe();
    let mut orders = attempt.orders();
    loop {
        heard.borrow_and_update();
        if let Some(endpoint) = app.fleet.endpoint(&attempt.pool_id, &attempt.worker_id) {
            return Ok(endpoint);
        }
        tokio::select! {
            cut = cut(app, &mut orders, true) => return Err(cut),
            _ = heard.changed() => {}
        }
    }
}

/// Lets the worker hear that nobody waits for the execution any more: now, or when its pool speaks.
async fn tell_worker(app: &App, found: &Found) {
    let Found {
        live,
        attempt,
        interrupted,
        ..
    } = found;
    let orphan = Orphan {
        job: live.id,
        fence: interrupted.fence,
        pool_id: attempt.pool_id.clone(),
        worker_id: attempt.worker_id.clone(),
    };
    match app.fleet.endpoint(&orphan.pool_id, &orphan.worker_id) {
        Some(endpoint) => worker::cancel(&endpoint, orphan.job, orphan.fence).await,
        None => app.orphans.add([orphan]),
    }
}
