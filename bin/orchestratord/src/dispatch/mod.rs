//! One attempt at one job: from the lease to the end of the worker's stream.
//!
//! Tokens go to readers at once and to the database in batches. Every other event is committed before it is shown.

mod adopted;
mod attempt;
mod attempt_end;
mod orphans;
mod runner;
mod worker;

use std::panic::AssertUnwindSafe;
use std::sync::OnceLock;

use futures_util::FutureExt as _;
use pool_core::api::pool::WorkerEndpoint;
use tokio::sync::OwnedSemaphorePermit;

use crate::jobs::JobEnd;

pub use adopted::{AdoptedAttempt, adopt};
pub use attempt::{Attempt, release};
pub use orphans::{ORPHANED_WITHIN, Orphans, cancel_orphans};
use runner::AttemptRunner;

/// A job that has been given to a worker.
pub struct Dispatch {
    /// Attempt without a lease.
    pub attempt: Attempt,
    /// Address of the worker.
    pub endpoint: WorkerEndpoint,
    /// The descriptor of the attempt's stream.
    pub _place: OwnedSemaphorePermit,
}

/// Runs an attempt, and does not leave its job behind whatever happens.
pub async fn run(dispatch: Dispatch) {
    let Dispatch {
        attempt, endpoint, ..
    } = &dispatch;
    let fence = OnceLock::new();
    let work = AssertUnwindSafe(perform(attempt, endpoint, &fence)).catch_unwind();
    if work.await.is_err() {
        let job = attempt.live.id;
        tracing::error!(%job, "an attempt panicked; see standard error");
        attempt.end_with_retry(None, JobEnd::internal()).await;
        if let Some(fence) = fence.get() {
            worker::cancel(endpoint, job, *fence).await;
        }
    }
    attempt.release_unless_stopping();
}

/// Leases the job, runs the attempt, and applies its end.
async fn perform(attempt: &Attempt, endpoint: &WorkerEndpoint, fence: &OnceLock<u64>) {
    let Some(lease) = attempt.lease().await else {
        return;
    };
    let _ = fence.set(lease.fence);
    let end = match attempt.resume_point(&lease).await {
        Ok(resume_point) => {
            AttemptRunner::new(attempt, &lease, &resume_point)
                .start(endpoint, resume_point)
                .await
        }
        Err(end) => end,
    };
    attempt.apply_end(&lease, endpoint, end).await;
}
