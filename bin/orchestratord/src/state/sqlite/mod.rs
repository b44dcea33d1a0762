//! The record of all jobs in one SQLite file. No module outside of this one contains SQL or names its library.
//!
//! One task writes (see [`writer`]); readers use read-only connections of their own.

mod backup;
mod commands;
mod error;
mod holder;
mod pools;
mod queries;
mod resume_point;
mod retention;
mod schema;
mod timeline;
mod writer;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use orchestrator_core::api::events::EventId;
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::Job;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::RegisterRequest;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, SqlitePool};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use super::{
    Cutoffs, Ending, IdempotencyKey, Lease, ListFilter, LogEnd, LogEntry, Orphan, Progress,
    Recovered, Requeue, ResumePoint, Step, StoreError, StoredPool, Submitted,
};
use crate::clock;

pub use backup::backup;
use error::{unavailable, while_opening};
use writer::Writer;

/// Number of connections for reading.
const READERS: u32 = 4;
/// Time for which a statement waits for a lock, which only another program could hold.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// The store. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    writer: Writer,
    readers: SqlitePool,
    task: Arc<Mutex<Option<JoinHandle<()>>>>,
}

impl Store {
    /// Opens the database at `path`, creates it if there is none (mode 0600), and migrates it to this build's version. From
    /// then on this run owns it: an earlier run that still has the file open can't write.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_now(path).await.map_err(while_opening)
    }

    async fn open_now(path: &Path) -> Result<Self, StoreError> {
        let io = |error: std::io::Error| unavailable(&sqlx::Error::Io(error));
        // Create the file here for its mode; SQLite gives its side files the same mode.
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)
            .map_err(io)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .busy_timeout(BUSY_TIMEOUT)
            // This must precede the journal mode, which writes the file's first page.
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            // Overwrite deleted texts, so that they are gone from the file and not only from its tables.
            .pragma("secure_delete", "ON")
            .disable_statement_logging();
        let mut conn = options.connect().await?;
        schema::check_library(&mut conn).await?;
        let version = schema::version(&mut conn).await?;
        schema::check_for_damage(&mut conn, version).await?;
        schema::migrate(&mut conn, version).await?;
        schema::let_it_shrink(&mut conn).await?;
        let epoch = holder::seize(&mut conn).await?;
        clock::resume(timeline::resume(&mut conn).await?);
        let read_only = SqliteConnectOptions::new()
            .filename(path)
            .busy_timeout(BUSY_TIMEOUT)
            .read_only(true)
            .disable_statement_logging();
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            // Open all connections now and keep them: later, descriptors or threads may have run out.
            .min_connections(READERS)
            .idle_timeout(None)
            .max_lifetime(None)
            .connect_with(read_only)
            .await?;
        let (writer, task) = Writer::start(conn, epoch);
        Ok(Self {
            writer,
            readers,
            task: Arc::new(Mutex::new(Some(task))),
        })
    }

    /// Returns once another run of the daemon has taken over the database. From then on every write is refused as if the store
    /// were closed.
    pub async fn taken_over(&self) {
        self.writer.taken_over().await;
    }

    /// Returns whether another run of the daemon has taken over the database.
    pub fn is_taken_over(&self) -> bool {
        self.writer.is_taken_over()
    }

    /// Closes the database once its other users are gone, but waits at most `grace`.
    pub async fn close(self, grace: Duration) {
        let Self {
            writer,
            readers,
            task,
        } = self;
        let task = task.lock().await.take();
        let closed = async {
            // Close the readers first: the last connection to close writes the log back and removes it, and a reader can't.
            readers.close().await;
            drop(writer);
            if let Some(task) = task {
                let _ = task.await;
            }
        };
        if tokio::time::timeout(grace, closed).await.is_err() {
            tracing::warn!(
                "the database is still in use; its log is written back at the next start"
            );
        }
    }

    /// Simulates a killed daemon: whatever is under way is cut off.
    #[cfg(test)]
    async fn crash(&self) {
        if let Some(task) = self.task.lock().await.take() {
            task.abort();
            let _ = task.await;
        }
        self.readers.close().await;
    }

    /// Stores a new job with its first event, unless `key` names a stored job.
    pub async fn submit(
        &self,
        job: Job,
        key: Option<IdempotencyKey>,
        first: Arc<LogEntry>,
    ) -> Result<Submitted, StoreError> {
        self.writer
            .run(move |conn| {
                Box::pin(async move { commands::submit(conn, &job, key.as_ref(), &first).await })
            })
            .await
    }

    /// Leases a waiting job to a worker.
    pub async fn lease(
        &self,
        job: JobId,
        pool: &str,
        worker: &str,
        at: Timestamp,
    ) -> Result<Lease, StoreError> {
        let (pool, worker) = (pool.to_owned(), worker.to_owned());
        self.writer
            .run(move |conn| {
                Box::pin(async move { commands::lease(conn, job, &pool, &worker, at).await })
            })
            .await
    }

    /// Records the progress of the attempt with `fence`.
    pub async fn progress(
        &self,
        job: JobId,
        fence: u64,
        progress: Progress,
    ) -> Result<(), StoreError> {
        self.writer
            .run(move |conn| {
                Box::pin(async move { commands::progress(conn, job, fence, &progress).await })
            })
            .await
    }

    /// Ends a job, and returns its state. A job that is over keeps its state.
    pub async fn end(&self, job: JobId, ending: Ending) -> Result<JobStatus, StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { commands::end(conn, job, &ending).await }))
            .await
    }

    /// Ends an attempt and queues its job again.
    pub async fn requeue(&self, job: JobId, requeue: Requeue) -> Result<(), StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { commands::requeue(conn, job, &requeue).await }))
            .await
    }

    /// Returns the jobs that are not over.
    pub async fn recover(&self) -> Result<Vec<Recovered>, StoreError> {
        let mut conn = self.readers.acquire().await?;
        commands::recover(&mut conn).await
    }

    /// Returns the lease with `fence`, if an attempt still holds the job under it.
    pub async fn held_lease(&self, job: JobId, fence: u64) -> Result<Option<Lease>, StoreError> {
        resume_point::held_lease(&self.readers, job, fence).await
    }

    /// Loads the point from which an attempt continues the job's text. Reads its whole log.
    pub async fn resume_point(&self, job: JobId) -> Result<ResumePoint, StoreError> {
        resume_point::load(&self.readers, job).await
    }

    /// Returns the executions that were given up since `since`, of which their workers may not know.
    pub async fn orphans(&self, since: Timestamp) -> Result<Vec<Orphan>, StoreError> {
        resume_point::orphans(&self.readers, since).await
    }

    /// Returns the job with its attempts and its logged text, and the id of the last logged event.
    pub async fn job(&self, id: JobId) -> Result<Option<(Job, EventId)>, StoreError> {
        queries::job(&self.readers, id).await
    }

    /// Returns the job's state; `None` if there is no such job.
    pub async fn status(&self, id: JobId) -> Result<Option<JobStatus>, StoreError> {
        queries::status(&self.readers, id).await
    }

    /// Returns the job that a key names.
    pub async fn known_key(
        &self,
        key: &IdempotencyKey,
    ) -> Result<Option<(JobId, JobStatus)>, StoreError> {
        let mut conn = self.readers.acquire().await?;
        commands::known_key(&mut conn, key).await
    }

    /// Lists jobs, newest first.
    pub async fn list(&self, filter: &ListFilter) -> Result<Vec<TaskSummary>, StoreError> {
        queries::list(&self.readers, filter).await
    }

    /// Returns the number of matching jobs, regardless of the filter's cursor and limit.
    pub async fn count(&self, filter: &ListFilter) -> Result<u64, StoreError> {
        queries::count(&self.readers, filter).await
    }

    /// Returns about `limit` events after `after`, in order: at least one if there is any.
    pub async fn events_after(
        &self,
        job: JobId,
        after: EventId,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        queries::events_after(&self.readers, job, after, limit).await
    }

    /// Returns the end of the job's log; `None` if there is no such job.
    pub async fn log_end(&self, job: JobId) -> Result<Option<LogEnd>, StoreError> {
        queries::log_end(&self.readers, job).await
    }

    /// Performs one small step of retention.
    pub async fn sweep(&self, cutoffs: Cutoffs, now: Timestamp) -> Result<Step, StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { retention::step(conn, cutoffs, now).await }))
            .await
    }

    /// Records the timeline's present point, from which the next start continues.
    pub async fn note_time(&self) -> Result<(), StoreError> {
        self.writer
            .run(|conn| Box::pin(async move { timeline::note(conn, clock::now()).await }))
            .await
    }

    /// Stores a pool's registration.
    pub async fn save_pool(
        &self,
        request: RegisterRequest,
        at: Timestamp,
    ) -> Result<(), StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { pools::save(conn, &request, at).await }))
            .await
    }

    /// Records that a pool stopped on purpose.
    pub async fn stop_pool(&self, id: &str, at: Timestamp) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.writer
            .run(move |conn| Box::pin(async move { pools::stop(conn, &id, at).await }))
            .await
    }

    /// Deletes a pool's stored registration.
    pub async fn remove_pool(&self, id: &str) -> Result<(), StoreError> {
        let id = id.to_owned();
        self.writer
            .run(move |conn| Box::pin(async move { pools::remove(conn, &id).await }))
            .await
    }

    /// Returns the registered pools, by id.
    pub async fn pools(&self) -> Result<Vec<StoredPool>, StoreError> {
        pools::all(&self.readers).await
    }

    /// Empties the write-ahead log, which may still hold dropped texts. Returns false while a reader needs the log.
    pub async fn forget_log(&self) -> bool {
        self.writer.forget_log().await
    }

    /// Fails if the database can't be read, or if writing has failed and is not known to work again.
    pub async fn check(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1 FROM jobs LIMIT 1")
            .fetch_optional(&self.readers)
            .await?;
        self.writer.probe().await
    }
}

#[cfg(test)]
mod tests;
