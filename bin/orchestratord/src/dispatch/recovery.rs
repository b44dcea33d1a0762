//! The jobs that an earlier run of the daemon left unfinished.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pool_core::kit::crash::crash_point;

use super::Dispatcher;
use super::adopted::{self, AdoptedAttempt};
use super::attempt::Attempt;
use crate::clock;
use crate::live::{ActiveAttempt, JobLog, LiveJob};
use crate::state::{Interrupted, StoreError};

/// Age up to which the daemon looks for orphans at its start. No execution runs for so long.
const ORPHANED_WITHIN: SignedDuration = SignedDuration::from_hours(24);

impl Dispatcher {
    /// Restores every job that is not over: queues the waiting ones, and adopts the attempts of the running ones.
    pub async fn recover(self: &Arc<Self>) -> Result<(), StoreError> {
        let live_jobs = &self.jobs.live;
        let recovered = self.jobs.store.recover().await?;
        let since = clock::now().saturating_sub(ORPHANED_WITHIN);
        let orphans = self.jobs.store.orphans(since.unwrap_or(Timestamp::MIN));
        self.orphans.add(orphans.await?);
        crash_point("recover.read");
        let (mut waiting, mut running) = (0, 0);
        for job in recovered {
            let (id, created_at) = (job.queued.id, job.queued.created_at);
            let log = JobLog::new(job.last_event, job.seen_more);
            let live = Arc::new(LiveJob::new(id, created_at, job.deadline, log));
            live_jobs.insert(Arc::clone(&live));
            let Some(interrupted) = job.interrupted else {
                waiting += 1;
                live_jobs.put(job.queued);
                continue;
            };
            running += 1;
            let Interrupted {
                pool_id, worker_id, ..
            } = interrupted.clone();
            self.fleet.leased(&pool_id, &worker_id, id, None);
            let slot = Arc::new(ActiveAttempt::new(pool_id, worker_id));
            live_jobs.begin_attempt(id, Arc::clone(&slot));
            let adopted = AdoptedAttempt {
                attempt: Attempt {
                    dispatcher: Arc::clone(self),
                    live,
                    queued: job.queued,
                    slot,
                },
                interrupted,
            };
            self.background.spawn(adopted::adopt(adopted));
        }
        if waiting + running > 0 {
            tracing::info!(waiting, running, "recovered unfinished jobs");
        }
        Ok(())
    }
}
