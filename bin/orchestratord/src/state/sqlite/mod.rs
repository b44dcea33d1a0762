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

use futures_util::future::BoxFuture;
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
    Answer, Cutoffs, Ending, IdempotencyKey, JobStore, Lease, ListFilter, LogEnd, LogEntry, Orphan,
    Progress, Recovered, Requeue, ResumePoint, Step, StoreError, StoredPool, Submitted,
};
use crate::clock;

pub use backup::backup;
use error::{unavailable, while_opening};
use writer::Writer;

/// Number of connections for reading.
const READERS: u32 = 4;
/// Time for which a statement waits for a lock, which only another program could hold.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A record of jobs in an SQLite file.
pub struct SqliteStore {
    writer: Writer,
    readers: SqlitePool,
    task: Mutex<Option<JoinHandle<()>>>,
}

impl SqliteStore {
    /// Opens the file at `path` as [`super::open`] describes.
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
            task: Mutex::new(Some(task)),
        })
    }
}

impl JobStore for SqliteStore {
    fn taken_over(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.writer.taken_over())
    }

    fn is_taken_over(&self) -> bool {
        self.writer.is_taken_over()
    }

    fn close(self: Arc<Self>, grace: Duration) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            let task = self.task.lock().await.take();
            let closed = async {
                // Close the readers first: the last connection to close writes the log back and removes it, and a reader can't.
                self.readers.close().await;
                // The writer ends with the last handle to the store.
                drop(self);
                if let Some(task) = task {
                    let _ = task.await;
                }
            };
            if tokio::time::timeout(grace, closed).await.is_err() {
                tracing::warn!(
                    "the database is still in use; its log is written back at the next start"
                );
            }
        })
    }

    #[cfg(test)]
    fn crash(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            if let Some(task) = self.task.lock().await.take() {
                task.abort();
                let _ = task.await;
            }
            self.readers.close().await;
        })
    }

    fn submit(
        &self,
        job: Job,
        key: Option<IdempotencyKey>,
        first: Arc<LogEntry>,
    ) -> Answer<'_, Submitted> {
        Box::pin(self.writer.run(move |conn| {
            Box::pin(async move { commands::submit(conn, &job, key.as_ref(), &first).await })
        }))
    }

    fn lease<'a>(
        &'a self,
        job: JobId,
        pool: &str,
        worker: &str,
        at: Timestamp,
    ) -> Answer<'a, Lease> {
        let (pool, worker) = (pool.to_owned(), worker.to_owned());
        Box::pin(self.writer.run(move |conn| {
            Box::pin(async move { commands::lease(conn, job, &pool, &worker, at).await })
        }))
    }

    fn progress(&self, job: JobId, fence: u64, progress: Progress) -> Answer<'_, ()> {
        Box::pin(self.writer.run(move |conn| {
            Box::pin(async move { commands::progress(conn, job, fence, &progress).await })
        }))
    }

    fn end(&self, job: JobId, ending: Ending) -> Answer<'_, JobStatus> {
        Box::pin(
            self.writer
                .run(move |conn| Box::pin(async move { commands::end(conn, job, &ending).await })),
        )
    }

    fn requeue(&self, job: JobId, requeue: Requeue) -> Answer<'_, ()> {
        Box::pin(
            self.writer.run(move |conn| {
                Box::pin(async move { commands::requeue(conn, job, &requeue).await })
            }),
        )
    }

    fn recover(&self) -> Answer<'_, Vec<Recovered>> {
        Box::pin(async {
            let mut conn = self.readers.acquire().await?;
            commands::recover(&mut conn).await
        })
    }

    fn held_lease(&self, job: JobId, fence: u64) -> Answer<'_, Option<Lease>> {
        Box::pin(resume_point::held_lease(&self.readers, job, fence))
    }

    fn resume_point(&self, job: JobId) -> Answer<'_, ResumePoint> {
        Box::pin(resume_point::load(&self.readers, job))
    }

    fn orphans(&self, since: Timestamp) -> Answer<'_, Vec<Orphan>> {
        Box::pin(resume_point::orphans(&self.readers, since))
    }

    fn job(&self, id: JobId) -> Answer<'_, Option<(Job, EventId)>> {
        Box::pin(queries::job(&self.readers, id))
    }

    fn status(&self, id: JobId) -> Answer<'_, Option<JobStatus>> {
        Box::pin(queries::status(&self.readers, id))
    }

    fn known_key<'a>(&'a self, key: &'a IdempotencyKey) -> Answer<'a, Option<(JobId, JobStatus)>> {
        Box::pin(async {
            let mut conn = self.readers.acquire().await?;
            commands::known_key(&mut conn, key).await
        })
    }

    fn list<'a>(&'a self, filter: &'a ListFilter) -> Answer<'a, Vec<TaskSummary>> {
        Box::pin(queries::list(&self.readers, filter))
    }

    fn count<'a>(&'a self, filter: &'a ListFilter) -> Answer<'a, u64> {
        Box::pin(queries::count(&self.readers, filter))
    }

    fn events_after(&self, job: JobId, after: EventId, limit: usize) -> Answer<'_, Vec<LogEntry>> {
        Box::pin(queries::events_after(&self.readers, job, after, limit))
    }

    fn log_end(&self, job: JobId) -> Answer<'_, Option<LogEnd>> {
        Box::pin(queries::log_end(&self.readers, job))
    }

    fn sweep(&self, cutoffs: Cutoffs, now: Timestamp) -> Answer<'_, Step> {
        Box::pin(
            self.writer.run(move |conn| {
                Box::pin(async move { retention::step(conn, cutoffs, now).await })
            }),
        )
    }

    fn note_time(&self) -> Answer<'_, ()> {
        Box::pin(
            self.writer
                .run(|conn| Box::pin(async move { timeline::note(conn, clock::now()).await })),
        )
    }

    fn save_pool(&self, request: RegisterRequest, at: Timestamp) -> Answer<'_, ()> {
        Box::pin(
            self.writer
                .run(move |conn| Box::pin(async move { pools::save(conn, &request, at).await })),
        )
    }

    fn stop_pool<'a>(&'a self, id: &str, at: Timestamp) -> Answer<'a, ()> {
        let id = id.to_owned();
        Box::pin(
            self.writer
                .run(move |conn| Box::pin(async move { pools::stop(conn, &id, at).await })),
        )
    }

    fn remove_pool<'a>(&'a self, id: &str) -> Answer<'a, ()> {
        let id = id.to_owned();
        Box::pin(
            self.writer
                .run(move |conn| Box::pin(async move { pools::remove(conn, &id).await })),
        )
    }

    fn pools(&self) -> Answer<'_, Vec<StoredPool>> {
        Box::pin(pools::all(&self.readers))
    }

    fn forget_log(&self) -> BoxFuture<'_, bool> {
        Box::pin(self.writer.forget_log())
    }

    fn check(&self) -> Answer<'_, ()> {
        Box::pin(async {
            sqlx::query("SELECT 1 FROM jobs LIMIT 1")
                .fetch_optional(&self.readers)
                .await?;
            self.writer.probe().await
        })
    }
}

#[cfg(test)]
mod tests;
