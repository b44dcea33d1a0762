//! The record of all jobs: the seam between the daemon and its database.
//!
//! [`JobStore`] is the contract, [`model`] has its types, [`sqlite`] keeps the record in one SQLite file. Every change of a job's
//! state goes through [`JobStatus::transition`], and every change on behalf of an attempt compares its fence in the same
//! transaction. `tests` holds every implementation to this.
//!
//! The trait is object-safe, because settings choose an implementation when the daemon starts, and a type parameter would have to
//! pass through every module that holds the store. The price is one allocation for each call, which a commit or a query costs
//! many times over.

mod fingerprint;
mod model;
mod patience;
mod spec;
mod sqlite;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use orchestrator_core::api::events::EventId;
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::Job;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::RegisterRequest;

pub use fingerprint::Fingerprint;
pub use model::{
    Cutoffs, Ending, IdempotencyKey, Interrupted, Lease, ListFilter, LogEnd, LogEntry, Orphan,
    Outage, OutageKind, Progress, Recovered, Requeue, ResumePoint, Step, StoreError, StoredPool,
    Submitted, apply_to_text,
};
pub use patience::{STORE_PAUSE, Unfinished};
pub use sqlite::backup;

/// A handle to the record of all jobs. Cheap to clone.
pub type Store = Arc<dyn JobStore>;

/// The answer of a store.
pub type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// Opens the database at `path`, creates it if there is none (mode 0600), and migrates it to this build's version. From then on
/// this run owns it: an earlier run that still has the file open can't write.
pub async fn open(path: &Path) -> Result<Store, StoreError> {
    Ok(Arc::new(sqlite::SqliteStore::open(path).await?))
}

/// A record of all jobs that one run of the daemon owns and writes.
///
/// A command is answered once its change survives a crash of the host. A command that fails changes nothing. Commands may come at
/// the same time, and take effect in some order, one after another. Reads see what was committed before they began.
pub trait JobStore: Send + Sync {
    /// Returns once another run of the daemon has taken over the database. From then on every write is refused as if the store
    /// were closed.
    fn taken_over(&self) -> BoxFuture<'_, ()>;

    /// Returns whether another run of the daemon has taken over the database.
    fn is_taken_over(&self) -> bool;

    /// Closes the database once its other users are gone, but waits at most `grace`.
    fn close(self: Arc<Self>, grace: Duration) -> BoxFuture<'static, ()>;

    /// Simulates a killed daemon: whatever is under way is cut off.
    #[cfg(test)]
    fn crash(&self) -> BoxFuture<'_, ()>;

    /// Stores a new job with its first event, unless `key` names a stored job.
    fn submit(
        &self,
        job: Job,
        key: Option<IdempotencyKey>,
        first: Arc<LogEntry>,
    ) -> Answer<'_, Submitted>;

    /// Leases a waiting job to a worker.
    fn lease<'a>(
        &'a self,
        job: JobId,
        pool: &str,
        worker: &str,
        at: Timestamp,
    ) -> Answer<'a, Lease>;

    /// Records the progress of the attempt with `fence`.
    fn progress(&self, job: JobId, fence: u64, progress: Progress) -> Answer<'_, ()>;

    /// Ends a job, and returns its state. A job that is over keeps its state.
    fn end(&self, job: JobId, ending: Ending) -> Answer<'_, JobStatus>;

    /// Ends an attempt and queues its job again.
    fn requeue(&self, job: JobId, requeue: Requeue) -> Answer<'_, ()>;

    /// Returns the jobs that are not over.
    fn recover(&self) -> Answer<'_, Vec<Recovered>>;

    /// Returns the lease with `fence`, if an attempt still holds the job under it.
    fn held_lease(&self, job: JobId, fence: u64) -> Answer<'_, Option<Lease>>;

    /// Loads the point from which an attempt continues the job's text. Reads its whole log.
    fn resume_point(&self, job: JobId) -> Answer<'_, ResumePoint>;

    /// Returns the executions that were given up since `since`, of which their workers may not know.
    fn orphans(&self, since: Timestamp) -> Answer<'_, Vec<Orphan>>;

    /// Returns the job with its attempts and its logged text, and the id of the last logged event.
    fn job(&self, id: JobId) -> Answer<'_, Option<(Job, EventId)>>;

    /// Returns the job's state; `None` if there is no such job.
    fn status(&self, id: JobId) -> Answer<'_, Option<JobStatus>>;

    /// Returns the job that a key names.
    fn known_key<'a>(&'a self, key: &'a IdempotencyKey) -> Answer<'a, Option<(JobId, JobStatus)>>;

    /// Lists jobs, newest first.
    fn list<'a>(&'a self, filter: &'a ListFilter) -> Answer<'a, Vec<TaskSummary>>;

    /// Returns the number of matching jobs, regardless of the filter's cursor and limit.
    fn count<'a>(&'a self, filter: &'a ListFilter) -> Answer<'a, u64>;

    /// Returns about `limit` events after `after`, in order: at least one if there is any.
    fn events_after(&self, job: JobId, after: EventId, limit: usize) -> Answer<'_, Vec<LogEntry>>;

    /// Returns the end of the job's log; `None` if there is no such job.
    fn log_end(&self, job: JobId) -> Answer<'_, Option<LogEnd>>;

    /// Performs one small step of retention.
    fn sweep(&self, cutoffs: Cutoffs, now: Timestamp) -> Answer<'_, Step>;

    /// Records the timeline's present point, from which the next start continues.
    fn note_time(&self) -> Answer<'_, ()>;

    /// Stores a pool's registration.
    fn save_pool(&self, request: RegisterRequest, at: Timestamp) -> Answer<'_, ()>;

    /// Records that a pool stopped on purpose.
    fn stop_pool<'a>(&'a self, id: &str, at: Timestamp) -> Answer<'a, ()>;

    /// Deletes a pool's stored registration.
    fn remove_pool<'a>(&'a self, id: &str) -> Answer<'a, ()>;

    /// Returns the registered pools, by id.
    fn pools(&self) -> Answer<'_, Vec<StoredPool>>;

    /// Erases dropped texts also from what the database keeps apart from its tables, such as a write-ahead log. Returns false
    /// while a reader prevents that.
    fn forget_log(&self) -> BoxFuture<'_, bool>;

    /// Fails if the database can't be read, or if writing has failed and is not known to work again.
    fn check(&self) -> Answer<'_, ()>;
}
