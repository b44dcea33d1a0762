//! The record of all jobs: one SQLite file. No other module contains SQL.
//!
//! One task writes (see [`writer`]); readers use read-only connections of their own. Every change of a job's state goes through
//! [`JobStatus::transition`], and every change on behalf of an attempt compares its fence in the same transaction.

mod backup;
mod commands;
mod holder;
mod patience;
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
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::{
    AttemptOutcome, IllegalTransition, Job, JobError, JobEvent, JobIdPrefix, JobSpec, Priority,
    Usage,
};
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::RegisterRequest;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::Origin;
use sqlx::sqlite::{
    SqliteAutoVacuum, SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{ConnectOptions as _, SqlitePool};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;

use crate::clock;

pub use backup::backup;
pub use patience::{STORE_PAUSE, Unfinished};
pub use pools::StoredPool;
pub use resume_point::ResumePoint;
pub use retention::{Cutoffs, Step};
use writer::Writer;

/// Number of connections for reading.
const READERS: u32 = 4;
/// Time for which a statement waits for a lock, which only another program could hold.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// A failed operation of the store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk is full or broken, or the file can't be written.
    #[error("the job database is unavailable: {0}")]
    Unavailable(Arc<sqlx::Error>),
    /// The store is stopping.
    #[error("the job database is closed")]
    Closed,
    /// There is no such job.
    #[error("there is no {0}")]
    NotFound(JobId),
    /// The report comes from a lease that has been superseded.
    #[error("fence {given} of {job} is stale: the current one is {current}")]
    StaleFence {
        /// Job of the report.
        job: JobId,
        /// Fence of the report.
        given: u64,
        /// Fence of the job's latest lease.
        current: u64,
    },
    /// The job's state does not allow the change.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// The idempotency key belongs to another request, the one that created this job.
    #[error("this Idempotency-Key was used for another request, {0}")]
    KeyMismatch(JobId),
    /// A newer build has migrated this file.
    #[error(
        "the job database has version {found}; this build of orchestratord knows up to version {known}"
    )]
    NewerDatabase {
        /// Version of the file.
        found: i64,
        /// Newest version that this build knows.
        known: i64,
    },
    /// Another run of the daemon has raised the epoch.
    #[error("another orchestratord has taken over the job database")]
    TakenOver,
    /// Another process holds the database's lock in the middle of a write.
    #[error("another process holds the job database in the middle of a write")]
    Locked,
    /// The file is damaged.
    #[error("the job database is damaged: {0}")]
    Damaged(String),
    /// The linked SQLite has a known bug in its write-ahead log.
    #[error("this build contains SQLite {version}; 3.51.3 or later is required")]
    OldLibrary {
        /// Version of the linked library.
        version: String,
    },
    /// A row or a statement violates this build's expectations.
    #[error("unexpected content in the job database: {0}")]
    Corrupt(String),
}

impl StoreError {
    /// Returns what to try next, if something may help.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::Unavailable(error) if is_out_of_memory(error) => Some(
                "the process has too little memory: raise its limit (`ulimit -v`, `MemoryMax=` of the systemd unit)",
            ),
            Self::Unavailable(_) => {
                Some("check the free space and the health of the disk that holds the state folder")
            }
            Self::NewerDatabase { .. } => {
                Some("install the newer release again, or move the state folder away")
            }
            Self::KeyMismatch(_) => Some("use a new key for a new request"),
            Self::TakenOver => Some("find the other one with `llorch orchestrator status`"),
            Self::Locked => Some(
                "end that process (`kill -9 PID` if it is frozen): its unfinished write is rolled back",
            ),
            Self::Damaged(_) => Some(
                "check the disk, move jobs.db and the files next to it away, and put a backup (`llorch orchestrator backup`) \
                 in its place; `sqlite3 jobs.db .recover` recovers what is still readable",
            ),
            _ => None,
        }
    }

    fn unavailable(error: sqlx::Error) -> Self {
        Self::Unavailable(Arc::new(error))
    }

    fn corrupt(what: impl ToString) -> Self {
        Self::Corrupt(what.to_string())
    }
}

/// Returns whether SQLite was refused memory (`SQLITE_NOMEM`).
fn is_out_of_memory(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code == "7")
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // A statement that violates the schema is a bug in this program and fails alone. Any other error is blamed on the disk.
        let broke_a_rule = error.as_database_error().is_some_and(|database| {
            database.is_unique_violation()
                || database.is_check_violation()
                || database.is_foreign_key_violation()
        });
        if broke_a_rule
            || matches!(
                error,
                sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_)
            )
        {
            Self::corrupt(error)
        } else {
            Self::unavailable(error)
        }
    }
}

/// Returns SQLite's primary result code.
fn sqlite_code(error: &sqlx::Error) -> Option<i32> {
    let code = error.as_database_error()?.code()?;
    Some(code.parse::<i32>().ok()? & 0xff)
}

/// Maps an error to its meaning while the database is being opened. This process does not use the file yet, so a lock is
/// another process's, and a retry would not help.
fn while_opening(error: StoreError) -> StoreError {
    const BUSY: i32 = 5;
    const CORRUPT: i32 = 11;
    const NOT_A_DATABASE: i32 = 26;
    let StoreError::Unavailable(cause) = &error else {
        return error;
    };
    match sqlite_code(cause) {
        Some(BUSY) => StoreError::Locked,
        Some(CORRUPT | NOT_A_DATABASE) => StoreError::Damaged(cause.to_string()),
        _ => error,
    }
}

/// One event of a job's log.
#[derive(Debug, Clone, PartialEq)]
pub struct LogEntry {
    /// Id of the event: the attempt, and the event's number in the job.
    pub id: EventId,
    /// Content of the event, as readers get it.
    pub event: TaskEvent,
    /// Ids of the tokens in a `token` event.
    pub token_ids: Vec<u32>,
    /// In `started` and `attempt` events, the origin of the tokens that follow.
    pub origin: Option<Origin>,
}

/// An `Idempotency-Key` with the request that it names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// Credential that the key belongs to: `anonymous`, `operator` or the name of a scope.
    pub caller: String,
    /// Value of the header.
    pub key: String,
    /// SHA-256 of the request, in hexadecimal.
    pub fingerprint: String,
}

/// The outcome of a submit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// The job is stored.
    New,
    /// The key names an earlier job, which is in this state.
    Known(JobId, JobStatus),
}

/// A committed lease: an attempt's exclusive claim on its job.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Number of the attempt.
    pub attempt: u32,
    /// The lease's fencing token.
    pub fence: u64,
    /// Task to run.
    pub spec: JobSpec,
    /// Attempts so far that count against `max_attempts`.
    pub lost: u32,
    /// True if an earlier attempt was announced to readers as started.
    pub started_before: bool,
    /// Reason for the end of the previous attempt.
    pub last_reason: Option<String>,
}

/// An attempt's progress since the last write. Writing it twice changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// Time of the worker's first event.
    pub started_at: Option<Timestamp>,
    /// Events after those in the log. Events that are logged already are skipped.
    pub events: Vec<Arc<LogEntry>>,
}

/// The end of a job.
#[derive(Debug, Clone)]
pub struct Ending {
    /// Transition of the job's state.
    pub event: JobEvent,
    /// Fence of the attempt that ends the job; `None` if no attempt does.
    pub fence: Option<u64>,
    /// Time of the end.
    pub at: Timestamp,
    /// Progress not yet recorded, including the last event.
    pub progress: Progress,
    /// Token counts and times of a completed job.
    pub usage: Option<Usage>,
    /// Receipt of a completed job.
    pub receipt: Option<Box<Receipt>>,
    /// Error of a job that did not complete.
    pub error: Option<JobError>,
    /// Outcome of the running attempt, if there is one.
    pub outcome: AttemptOutcome,
}

/// The end of an attempt after which the job waits again.
#[derive(Debug, Clone)]
pub struct Requeue {
    /// Fence of the attempt.
    pub fence: u64,
    /// Time of the end.
    pub at: Timestamp,
    /// Progress not yet recorded.
    pub progress: Progress,
    /// Outcome of the attempt.
    pub outcome: AttemptOutcome,
    /// Reason for the end, for people to read.
    pub reason: String,
    /// Time before which the job is not leased again.
    pub not_before: Option<Timestamp>,
    /// Smallest context that runs the job, in tokens, if a worker has counted them.
    pub context_needed: Option<u32>,
}

/// A job that is not over when the daemon starts.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// The job as the queue orders it.
    pub queued: QueuedJob,
    /// Time at which the job expires.
    pub deadline: Option<Timestamp>,
    /// Id of the last logged event.
    pub last_event: EventId,
    /// True if readers may have seen tokens that the log lacks. Their ids must not be used again.
    pub seen_more: bool,
    /// The attempt that was under way when the daemon ended.
    pub interrupted: Option<Interrupted>,
}

/// An attempt that was under way when the daemon ended. Its worker may still run it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interrupted {
    /// Fence of the lease.
    pub fence: u64,
    /// Pool that the job was leased to.
    pub pool_id: String,
    /// Worker that the job was leased to.
    pub worker_id: String,
    /// True if the attempt's start was announced to readers, so that they may have seen tokens of it.
    pub started: bool,
}

/// An execution whose result is no longer wanted, of which its worker may not know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// Job of the execution.
    pub job: JobId,
    /// Fence of the attempt.
    pub fence: u64,
    /// Pool of the worker.
    pub pool_id: String,
    /// Worker that may still run the execution.
    pub worker_id: String,
}

/// The end of a job's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// State of the job.
    pub status: JobStatus,
    /// Id of the last event; `None` for an empty log.
    pub last: Option<EventId>,
    /// Time at which the log was dropped.
    pub dropped_at: Option<Timestamp>,
}

/// The selection of jobs in a list.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// Accepted states; empty for all.
    pub statuses: Vec<JobStatus>,
    /// Required model; `None` for all.
    pub model: Option<String>,
    /// Required class; `None` for all.
    pub priority: Option<Priority>,
    /// Required beginning of the id.
    pub prefix: Option<JobIdPrefix>,
    /// Job that the listed ones are older than; `None` for the first page.
    pub before: Option<JobId>,
    /// Maximum number of jobs.
    pub limit: u32,
    /// True to add the shortest unambiguous beginning of each id.
    pub short_ids: bool,
}

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
        let io = |error: std::io::Error| StoreError::unavailable(sqlx::Error::Io(error));
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

/// Applies an event to the text of a job, as a reader of all events sees it.
pub fn apply_to_text(text: &mut String, event: &TaskEvent) {
    match event {
        TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
        TaskEvent::Token(token) => text.push_str(&token.t),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
