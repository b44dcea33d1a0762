//! One attempt at one job: from the lease to the end of the worker's stream.
//!
//! Tokens go to readers at once and to the database in batches. Every other event is committed before it is shown.

mod adopted;
mod attempt;
mod attempt_end;
mod orphans;
mod recovery;
mod reports;
mod runner;
#[cfg(test)]
mod tests;
mod worker;

use std::panic::AssertUnwindSafe;
use std::sync::{Arc, OnceLock};

use futures_util::FutureExt as _;
use orchestrator_core::JobId;
use orchestrator_core::config::PrefixSharing;
use orchestrator_core::queue::QueuedJob;
use pool_core::api::pool::WorkerEndpoint;

use crate::background::Background;
use crate::fleet::Fleet;
use crate::jobs::{JobEnd, JobService};
use crate::live::ActiveAttempt;
use attempt::Attempt;
use orphans::Orphans;
use runner::AttemptRunner;

/// A dispatcher of jobs to workers, which runs each attempt in a background task.
pub struct Dispatcher {
    jobs: JobService,
    fleet: Arc<Fleet>,
    background: Background,
    prefix_sharing: PrefixSharing,
    /// Executions that an earlier run of the daemon may have left running at workers.
    orphans: Orphans,
}

impl Dispatcher {
    /// Returns a dispatcher without attempts. `prefix_sharing` says which jobs share their beginnings in a worker's cache.
    pub fn new(
        jobs: JobService,
        fleet: Arc<Fleet>,
        background: Background,
        prefix_sharing: PrefixSharing,
    ) -> Arc<Self> {
        Arc::new(Self {
            jobs,
            fleet,
            background,
            prefix_sharing,
            orphans: Orphans::default(),
        })
    }

    /// Starts an attempt at a job, on the worker whose slot a pass gave to it. Returns false if that is impossible now: the slot
    /// is then free again, and the job has no attempt.
    #[must_use]
    pub fn start(self: &Arc<Self>, queued: &QueuedJob, slot: &Arc<ActiveAttempt>) -> bool {
        let (pool, worker) = (&slot.pool_id, &slot.worker_id);
        self.fleet.leased(pool, worker, queued.id, Some(queued));
        let endpoint = self.fleet.endpoint(pool, worker);
        // Reserve a file descriptor for the attempt. Without one, its worker would look unreachable.
        let place = self.jobs.metrics.load().call();
        let (Some(live), Some(endpoint), Some(place)) =
            (self.jobs.live.get(queued.id), endpoint, place)
        else {
            self.release(queued.id, slot);
            self.jobs.changed.notify_one();
            return false;
        };
        let attempt = Attempt {
            dispatcher: Arc::clone(self),
            live,
            queued: QueuedJob {
                not_before: None,
                ..queued.clone()
            },
            slot: Arc::clone(slot),
        };
        self.background.spawn(async move {
            let _place = place;
            run(attempt, endpoint).await;
        });
        true
    }

    /// Gives the slot of an attempt at the job to others.
    fn release(&self, job: JobId, slot: &ActiveAttempt) {
        if self.jobs.live.end_attempt(job, slot) {
            self.fleet.released(&slot.pool_id, &slot.worker_id, job);
        }
    }
}

/// Runs an attempt, and does not leave its job behind whatever happens.
async fn run(attempt: Attempt, endpoint: WorkerEndpoint) {
    let fence = OnceLock::new();
    let work = AssertUnwindSafe(perform(&attempt, &endpoint, &fence)).catch_unwind();
    if work.await.is_err() {
        let job = attempt.live.id;
        tracing::error!(%job, "an attempt panicked; see standard error");
        attempt.end_with_retry(None, JobEnd::internal()).await;
        if let Some(fence) = fence.get() {
            worker::cancel(&endpoint, job, *fence).await;
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
