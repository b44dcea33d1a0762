//! The steps of an attempt that change its job.

use std::sync::Arc;

use jiff::SignedDuration;
use orchestrator_core::job::{AttemptOutcome, JobErrorCode, pause_after};
use orchestrator_core::queue::QueuedJob;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::worker::CacheShortage;
use pool_core::kit::crash::crash_point;
use tokio::sync::watch;

use super::attempt_end::AttemptEnd;
use super::{Dispatcher, worker};
use crate::clock;
use crate::jobs::JobEnd;
use crate::live::{ActiveAttempt, LiveJob, Order};
use crate::state::{Lease, Progress, Requeue, ResumePoint, STORE_PAUSE, StoreError, Unfinished};

/// An attempt at a job, with what each of its steps uses.
pub struct Attempt {
    /// The dispatcher that runs the attempt.
    pub dispatcher: Arc<Dispatcher>,
    /// Job, live while the attempt runs.
    pub live: Arc<LiveJob>,
    /// The job as it stood in the queue.
    pub queued: QueuedJob,
    /// The slot that the attempt holds.
    pub slot: Arc<ActiveAttempt>,
}

/// The reason for the early end of a wait.
#[derive(Debug)]
pub(super) enum Interruption {
    /// The worker is gone, for the pool's reason.
    WorkerGone(String),
    /// The job ended, by this attempt or from outside.
    Over,
    /// The daemon stops; the execution continues.
    Stopping,
}

impl From<Interruption> for AttemptEnd {
    fn from(interruption: Interruption) -> Self {
        match interruption {
            Interruption::WorkerGone(reason) => Self::Lost(reason),
            Interruption::Over => Self::Over,
            Interruption::Stopping => Self::Stopping,
        }
    }
}

impl Attempt {
    /// Gives the attempt's slot to others.
    fn release(&self) {
        self.dispatcher.release(self.live.id, &self.slot);
        self.dispatcher.jobs.changed.notify_one();
    }

    /// Queues the attempt's job again, and gives the slot to others.
    fn put_back(&self, queued: QueuedJob) {
        let Dispatcher { jobs, fleet, .. } = self.dispatcher.as_ref();
        if jobs.live.requeue(queued, &self.slot) {
            fleet.released(&self.slot.pool_id, &self.slot.worker_id, self.live.id);
        }
    }

    /// Gives the attempt's slot to others, unless the daemon stops: then the execution continues and keeps it.
    pub(super) fn release_unless_stopping(&self) {
        if !self.dispatcher.jobs.shutdown.is_requested() {
            self.release();
        }
    }

    /// Waits until the attempt has to stop. With `heed_gone`, also for the pool's report that the worker is gone.
    pub(super) async fn interrupted(
        &self,
        orders: &mut watch::Receiver<Order>,
        heed_gone: bool,
    ) -> Interruption {
        let order = orders.wait_for(|order| match order {
            Order::Go => false,
            Order::WorkerGone(_) => heed_gone,
            Order::Stop => true,
        });
        tokio::select! {
            order = order => match order.as_deref() {
                Ok(Order::WorkerGone(reason)) => Interruption::WorkerGone(reason.clone()),
                _ => Interruption::Over,
            },
            () = self.dispatcher.jobs.shutdown.requested() => Interruption::Stopping,
        }
    }

    /// Runs a database operation, and repeats it while the database is unavailable and the attempt may continue. `what` names
    /// the operation in the daemon's log.
    pub(super) async fn patiently<T, O>(
        &self,
        what: &str,
        operation: impl FnMut() -> O,
    ) -> Result<T, Unfinished<Interruption>>
    where
        O: Future<Output = Result<T, StoreError>>,
    {
        let mut orders = self.slot.orders();
        let stop = self.interrupted(&mut orders, false);
        let store = &self.dispatcher.jobs.store;
        let result = store.patiently(self.live.id, what, stop, operation);
        match result.await {
            Err(Unfinished::Failed(StoreError::Closed)) => {
                Err(Unfinished::Stopped(Interruption::Stopping))
            }
            result => result,
        }
    }

    /// Commits the lease. `None` if the job has ended or waits again.
    pub(super) async fn lease(&self) -> Option<Lease> {
        let Self { live, slot, .. } = self;
        let jobs = &self.dispatcher.jobs;
        let log = live.log.lock().await.ok()?;
        let leased = jobs
            .store
            .lease(live.id, &slot.pool_id, &slot.worker_id, clock::now());
        match leased.await {
            Ok(lease) => {
                crash_point("lease.committed");
                log.forget_wait();
                jobs.metrics.dispatched.inc();
                if lease.attempt == 1 {
                    let waited = clock::seconds_since(live.created_at);
                    jobs.metrics.queue_wait.observe(waited);
                }
                tracing::info!(job = %live.id, attempt = lease.attempt, fence = lease.fence, pool = slot.pool_id,
                    worker = slot.worker_id, "leased");
                Some(lease)
            }
            Err(StoreError::Closed) => None,
            Err(error @ StoreError::Unavailable(_)) => {
                tracing::warn!(job = %live.id, %error, "could not lease");
                let pause = SignedDuration::try_from(STORE_PAUSE).unwrap_or_default();
                self.put_back(QueuedJob {
                    not_before: clock::now().checked_add(pause).ok(),
                    ..self.queued.clone()
                });
                None
            }
            Err(error) => {
                tracing::error!(job = %live.id, %error, "could not lease");
                drop(log);
                self.end_with_retry(None, JobEnd::internal()).await;
                None
            }
        }
    }

    /// Loads the resume point. Retries while the database is unavailable.
    pub(super) async fn resume_point(&self, lease: &Lease) -> Result<ResumePoint, AttemptEnd> {
        if !lease.started_before {
            return Ok(ResumePoint::default());
        }
        let job = self.live.id;
        let read = self.patiently("reading the job's text", || {
            self.dispatcher.jobs.store.resume_point(job)
        });
        read.await.map_err(|unfinished| match unfinished {
            Unfinished::Stopped(interruption) => interruption.into(),
            Unfinished::Failed(error) => {
                tracing::error!(%job, %error, "could not read the job's text");
                AttemptEnd::Broken
            }
        })
    }

    /// Applies the end of an attempt to its job. Notifies the worker last, because nothing depends on its answer.
    pub(super) async fn apply_end(
        &self,
        lease: &Lease,
        endpoint: &WorkerEndpoint,
        end: AttemptEnd,
    ) {
        let Dispatcher { jobs, fleet, .. } = self.dispatcher.as_ref();
        end.count(&jobs.metrics);
        let (live, slot, job) = (&self.live, &self.slot, self.live.id);
        let end = match end {
            // The worker was chosen for that context: such attempts must not repeat endlessly.
            AttemptEnd::Cramped { needed, reason }
                if self.queued.context_needed >= Some(needed) =>
            {
                AttemptEnd::Lost(reason)
            }
            end => end,
        };
        let at_once = QueuedJob {
            not_before: None,
            ..self.queued.clone()
        };
        match end {
            AttemptEnd::Finished(end) => {
                self.end_here(lease, endpoint, JobEnd::Completed(end)).await;
            }
            AttemptEnd::Failed(error) => self.end_here(lease, endpoint, JobEnd::Error(error)).await,
            AttemptEnd::Broken => {
                self.end_with_retry(Some(lease.fence), JobEnd::internal())
                    .await;
                self.cancel_here(lease, endpoint).await;
            }
            AttemptEnd::Over => self.cancel_here(lease, endpoint).await,
            AttemptEnd::Lost(reason) => {
                self.lose(lease, reason).await;
                // The buffer of a worker that lives after all is not deleted: it may be the next attempt's by now, which the fence
                // of this one does not end.
                worker::cancel(endpoint, job, lease.fence).await;
            }
            AttemptEnd::NotFound(reason) => {
                tracing::warn!(%job, attempt = lease.attempt, reason, "could not adopt the attempt");
                let outcome = AttemptOutcome::OrchestratorRestarted;
                self.requeue_with_retry(lease, at_once, outcome, reason)
                    .await;
                worker::cancel(endpoint, job, lease.fence).await;
            }
            AttemptEnd::Refused(reason) => {
                fleet.mark_full(&slot.pool_id, &slot.worker_id, clock::now());
                self.requeue_with_retry(lease, at_once, AttemptOutcome::Refused, reason)
                    .await;
            }
            AttemptEnd::Cramped { needed, reason } => {
                tracing::info!(%job, attempt = lease.attempt, needed, "the worker's context is too small");
                let queued = QueuedJob {
                    context_needed: Some(needed),
                    ..at_once
                };
                self.requeue_with_retry(lease, queued, AttemptOutcome::Refused, reason)
                    .await;
            }
            AttemptEnd::NoRoom { shortage, reason } => {
                let CacheShortage {
                    needed_tokens,
                    free_tokens,
                } = shortage;
                tracing::info!(job = %live.id, attempt = lease.attempt, needed_tokens, free_tokens,
                    "the worker's cache has too little room");
                fleet.mark_short(&slot.pool_id, &slot.worker_id, free_tokens, clock::now());
                let queued = QueuedJob {
                    cache_needed: Some(needed_tokens),
                    ..at_once
                };
                self.requeue_with_retry(lease, queued, AttemptOutcome::Refused, reason)
                    .await;
            }
            // The execution continues, and the database says that the job was running.
            AttemptEnd::Stopping => {}
        }
    }

    /// Ends the job, and lets its worker drop the execution.
    async fn end_here(&self, lease: &Lease, endpoint: &WorkerEndpoint, end: JobEnd) {
        self.end_with_retry(Some(lease.fence), end).await;
        self.release();
        worker::forget(endpoint, self.live.id).await;
    }

    /// Cancels the execution of a job that has ended. The slot is free once the worker has stopped.
    async fn cancel_here(&self, lease: &Lease, endpoint: &WorkerEndpoint) {
        crash_point("cancel.unsent");
        worker::cancel(endpoint, self.live.id, lease.fence).await;
        self.release();
        worker::forget(endpoint, self.live.id).await;
    }

    /// Puts the job of a lost attempt back with a pause, or fails it if it has had all its attempts.
    async fn lose(&self, lease: &Lease, reason: String) {
        let lost = lease.lost + 1;
        let limit = lease.spec.max_attempts;
        tracing::warn!(job = %self.live.id, attempt = lease.attempt, lost, reason, "attempt lost");
        if lost >= limit {
            let message = format!("{lost} of {limit} attempts were lost; the last: {reason}");
            let end = JobEnd::error(JobErrorCode::WorkerLost, message, true);
            self.end_with_retry(Some(lease.fence), end).await;
            return self.release();
        }
        let pause = pause_after(lost, rand::random());
        let queued = QueuedJob {
            not_before: clock::now().checked_add(pause).ok(),
            ..self.queued.clone()
        };
        self.requeue_with_retry(lease, queued, AttemptOutcome::WorkerLost, reason)
            .await;
    }

    /// Ends the job. Retries while the database is unavailable. Where the record does not allow this end, the job fails as an
    /// internal error; where it does not allow even that, the job is dropped, so none stays without an attempt.
    pub(super) async fn end_with_retry(&self, mut fence: Option<u64>, mut end: JobEnd) {
        let (jobs, live) = (&self.dispatcher.jobs, &self.live);
        loop {
            let ended = self.patiently("ending the job", || {
                let end = end.clone();
                async move { jobs.end(live, fence, end).await }
            });
            match ended.await {
                Ok(_) | Err(Unfinished::Stopped(_)) => return,
                Err(Unfinished::Failed(error)) if end.is_internal() && fence.is_none() => {
                    tracing::error!(job = %live.id, %error, "could not fail the job");
                    return jobs.drop_unrecordable(live).await;
                }
                Err(Unfinished::Failed(error)) => {
                    tracing::error!(job = %live.id, %error, "could not end the job");
                    (fence, end) = (None, JobEnd::internal());
                }
            }
        }
    }

    /// Puts the job back into the queue as `queued`. Retries while the database is unavailable.
    pub(super) async fn requeue_with_retry(
        &self,
        lease: &Lease,
        queued: QueuedJob,
        outcome: AttemptOutcome,
        reason: String,
    ) {
        let requeued = self.patiently("requeueing the job", || {
            self.requeue(lease.fence, &queued, outcome, reason.clone())
        });
        if let Err(Unfinished::Failed(error)) = requeued.await {
            tracing::error!(job = %self.live.id, %error, "could not requeue the job");
            self.end_with_retry(None, JobEnd::internal()).await;
        }
    }

    /// Puts the job back into the queue, unless it has ended.
    async fn requeue(
        &self,
        fence: u64,
        queued: &QueuedJob,
        outcome: AttemptOutcome,
        reason: String,
    ) -> Result<(), StoreError> {
        let (jobs, live) = (&self.dispatcher.jobs, &self.live);
        let Ok(log) = live.log.lock().await else {
            return Ok(());
        };
        let written = log.commit(None, |events| {
            let requeue = Requeue {
                fence,
                at: clock::now(),
                progress: Progress {
                    started_at: None,
                    events,
                },
                outcome,
                reason,
                not_before: queued.not_before,
                context_needed: queued.context_needed,
            };
            jobs.store.requeue(live.id, requeue)
        });
        written.await?;
        // The slot is released under the same guard: a pass between the two would start the job twice.
        self.put_back(queued.clone());
        jobs.changed.notify_one();
        Ok(())
    }
}
