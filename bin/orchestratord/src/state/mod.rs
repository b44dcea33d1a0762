//! The record of all jobs: one SQLite file. No other module knows SQL.
//!
//! One task writes (see [`writer`]); readers use connections of their own that can't. Every change of a job's state goes
//! through [`JobStatus::transition`], and every change on behalf of an attempt compares its fence in the same
//! transaction.

mod backup;
mod commands;
mod holder;
mod pools;
mod queries;
mod retention;
mod schema;
mod seam;
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
pub use pools::StoredPool;
pub use retention::{Cutoffs, Step};
pub use seam::Seam;
use writer::Writer;

/// Connections for reading.
const READERS: u32 = 4;
/// How long a statement waits for a lock; only a program other than ours could hold one.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the store did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk is full or broken, or the file can't be written.
    #[error("the job database can't be used now: {0}")]
    Unavailable(Arc<sqlx::Error>),
    /// The store is stopping.
    #[error("the job database is closed")]
    Closed,
    /// No such job.
    #[error("there is no {0}")]
    NotFound(JobId),
    /// The report comes from a lease that is over.
    #[error("fence {given} of {job} is stale: the current one is {current}")]
    StaleFence {
        /// The job.
        job: JobId,
        /// The report's fence.
        given: u64,
        /// The fence of the latest lease.
        current: u64,
    },
    /// The job is in a state in which this can't happen.
    #[error(transparent)]
    Illegal(#[from] IllegalTransition),
    /// The idempotency key was used for another request.
    #[error("this Idempotency-Key was used for another request, {0}")]
    KeyMismatch(JobId),
    /// A newer build has written this file.
    #[error(
        "the job database has version {found}; this build of orchestratord knows up to version {known}"
    )]
    NewerDatabase {
        /// The file's version.
        found: i64,
        /// The newest that this build knows.
        known: i64,
    },
    /// Another run of the daemon has raised the epoch.
    #[error("another orchestratord has taken over the job database")]
    TakenOver,
    /// Another process stands in the midst of a write.
    #[error("another process holds the job database in the midst of a write")]
    Locked,
    /// The file is not sound.
    #[error("the job database is damaged: {0}")]
    Damaged(String),
    /// The linked SQLite has a known bug in its write-ahead log.
    #[error("this build contains SQLite {version}; 3.51.3 or later is needed")]
    OldLibrary {
        /// What is linked.
        version: String,
    },
    /// A row or a statement is not what this build expects.
    #[error("the job database holds something unexpected: {0}")]
    Corrupt(String),
}

impl StoreError {
    /// What to try next.
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
            Self::TakenOver => Some("look for the other one with `llorch orchestrator status`"),
            Self::Locked => Some(
                "end that process (`kill -9 PID` if it is frozen): what it has not finished to write is undone",
            ),
            Self::Damaged(_) => Some(
                "check the disk, move jobs.db and the files beside it away, and put a backup (`llorch orchestrator backup`) \
                 in its place; `sqlite3 jobs.db .recover` saves what can still be read",
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

/// Whether SQLite was refused memory (`SQLITE_NOMEM`).
fn is_out_of_memory(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|error| error.code());
    code.is_some_and(|code| code == "7")
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        // A statement that broke a rule of the schema is a mistake of ours and fails alone; anything else is the disk.
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

/// The primary result code of SQLite's.
fn sqlite_code(error: &sqlx::Error) -> Option<i32> {
    let code = error.as_database_error()?.code()?;
    Some(code.parse::<i32>().ok()? & 0xff)
}

/// What an error means while the database is being opened: nobody of ours uses it yet, and what is wrong stays wrong.
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
    /// Its id.
    pub id: EventId,
    /// The event.
    pub event: TaskEvent,
    /// The token ids that a `token` event came from.
    pub token_ids: Vec<u32>,
    /// Of `started` and `attempt`: what the tokens after it come from.
    pub origin: Option<Origin>,
}

/// An `Idempotency-Key` with what it stands for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdempotencyKey {
    /// Whose key it is.
    pub caller: String,
    /// The key.
    pub key: String,
    /// Digest of the request.
    pub fingerprint: String,
}

/// What a submit came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Submitted {
    /// The job is stored.
    New,
    /// The key names a job of before.
    Known(JobId, JobStatus),
}

/// A lease that is committed.
#[derive(Debug, Clone)]
pub struct Lease {
    /// Number of the attempt.
    pub attempt: u32,
    /// Its fence.
    pub fence: u64,
    /// What to do.
    pub spec: JobSpec,
    /// Attempts so far that count against `max_attempts`.
    pub lost: u32,
    /// Whether an earlier attempt has told readers that it started.
    pub started_before: bool,
    /// Why the attempt before is over.
    pub last_reason: Option<String>,
}

/// What an attempt has done since it was last written down. Writing it twice changes nothing.
#[derive(Debug, Clone, Default)]
pub struct Progress {
    /// When the worker sent its first event.
    pub started_at: Option<Timestamp>,
    /// Events after those in the log; ones that are there already are left out.
    pub events: Vec<Arc<LogEntry>>,
}

/// The end of a job.
#[derive(Debug, Clone)]
pub struct Ending {
    /// What happened.
    pub event: JobEvent,
    /// The fence on whose behalf; `None` where it is not an attempt that ends the job.
    pub fence: Option<u64>,
    /// When.
    pub at: Timestamp,
    /// What was not yet written down, the last event included.
    pub progress: Progress,
    /// Figures of a completed job.
    pub usage: Option<Usage>,
    /// Receipt of a completed job.
    pub receipt: Option<Box<Receipt>>,
    /// Why it did not complete.
    pub error: Option<JobError>,
    /// How the running attempt ends, where there is one.
    pub outcome: AttemptOutcome,
}

/// The end of an attempt that another may follow.
#[derive(Debug, Clone)]
pub struct Requeue {
    /// The attempt's fence.
    pub fence: u64,
    /// When.
    pub at: Timestamp,
    /// What was not yet written down.
    pub progress: Progress,
    /// How it ended.
    pub outcome: AttemptOutcome,
    /// Why, for people.
    pub reason: String,
    /// Not leased again before this.
    pub not_before: Option<Timestamp>,
    /// Smallest context that runs the job, in tokens, if a worker has counted them.
    pub context_needed: Option<u32>,
}

/// A job that is not over when the daemon starts.
#[derive(Debug, Clone)]
pub struct Recovered {
    /// The queue's view of it.
    pub queued: QueuedJob,
    /// When it expires.
    pub deadline: Option<Timestamp>,
    /// The end of its log.
    pub last_event: EventId,
    /// Whether readers may have seen tokens that its log has not, under ids that nothing else may take.
    pub seen_more: bool,
    /// The attempt that was under way when the daemon ended.
    pub interrupted: Option<Interrupted>,
}

/// An attempt that was under way when the daemon ended: its worker may go on with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interrupted {
    /// The lease's fence.
    pub fence: u64,
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
    /// Whether readers were told that it started, and so may have seen tokens of it.
    pub started: bool,
}

/// An execution that nobody waits for, which its worker may not have heard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Orphan {
    /// The job.
    pub job: JobId,
    /// The attempt's fence.
    pub fence: u64,
    /// The pool.
    pub pool_id: String,
    /// The worker.
    pub worker_id: String,
}

/// How far a job's log goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogEnd {
    /// The job's state.
    pub status: JobStatus,
    /// The last event.
    pub last: Option<EventId>,
    /// When the log was dropped.
    pub dropped_at: Option<Timestamp>,
}

/// Which jobs a list shows.
#[derive(Debug, Clone, Default)]
pub struct ListFilter {
    /// Accepted states; empty for all.
    pub statuses: Vec<JobStatus>,
    /// Of this model.
    pub model: Option<String>,
    /// Of this class.
    pub priority: Option<Priority>,
    /// Required beginning of the id.
    pub prefix: Option<JobIdPrefix>,
    /// Older than this one.
    pub before: Option<JobId>,
    /// At most this many.
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
    /// Opens the database at `path`, makes it if there is none (mode 0600), and brings it to this build's version. From then
    /// on it is this run's: an earlier one that still has it open can't write.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        Self::open_now(path).await.map_err(while_opening)
    }

    async fn open_now(path: &Path) -> Result<Self, StoreError> {
        let io = |error: std::io::Error| StoreError::unavailable(sqlx::Error::Io(error));
        // Made here for its mode; SQLite gives its side files the same.
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
            // Before the journal mode, which makes the file's first page.
            .auto_vacuum(SqliteAutoVacuum::Incremental)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            // What is dropped is gone from the file, and not only from its tables.
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
            // All connections open at the start and stay: later there may be no descriptor or thread.
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

    /// Returns when another run of the daemon has taken over the database. From then on every write is refused as if the
    /// store were closed.
    pub async fn taken_over(&self) {
        self.writer.taken_over().await;
    }

    /// Whether another run of the daemon has taken over the database.
    pub fn is_taken_over(&self) -> bool {
        self.writer.is_taken_over()
    }

    /// Closes the database once all its other users are gone, and waits for that at most `grace`.
    pub async fn close(self, grace: Duration) {
        let Self {
            writer,
            readers,
            task,
        } = self;
        let task = task.lock().await.take();
        let closed = async {
            // The last connection to close writes the log back and removes it, and a reader can't.
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

    /// Dies as a killed daemon does: whatever is under way is cut off.
    #[cfg(test)]
    async fn crash(&self) {
        if let Some(task) = self.task.lock().await.take() {
            task.abort();
            let _ = task.await;
        }
        self.readers.close().await;
    }

    /// Stores a new job with its first event, unless `key` names one that is stored already.
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

    /// Writes down what the attempt with `fence` has done.
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

    /// Ends a job, and returns the state that it is in: a job that is over stays as it ended.
    pub async fn end(&self, job: JobId, ending: Ending) -> Result<JobStatus, StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { commands::end(conn, job, &ending).await }))
            .await
    }

    /// Ends an attempt and puts its job back to wait.
    pub async fn requeue(&self, job: JobId, requeue: Requeue) -> Result<(), StoreError> {
        self.writer
            .run(move |conn| Box::pin(async move { commands::requeue(conn, job, &requeue).await }))
            .await
    }

    /// The jobs that are not over.
    pub async fn recover(&self) -> Result<Vec<Recovered>, StoreError> {
        let mut conn = self.readers.acquire().await?;
        commands::recover(&mut conn).await
    }

    /// The lease with `fence`, where an attempt still holds the job with it.
    pub async fn held_lease(&self, job: JobId, fence: u64) -> Result<Option<Lease>, StoreError> {
        seam::held_lease(&self.readers, job, fence).await
    }

    /// Where the job's text stands. Reads its whole log.
    pub async fn seam(&self, job: JobId) -> Result<Seam, StoreError> {
        seam::seam(&self.readers, job).await
    }

    /// Executions that were given up since `since`: their workers may not have heard it.
    pub async fn orphans(&self, since: Timestamp) -> Result<Vec<Orphan>, StoreError> {
        seam::orphans(&self.readers, since).await
    }

    /// The job with its attempts and the text that its log gives, and the end of that log.
    pub async fn job(&self, id: JobId) -> Result<Option<(Job, EventId)>, StoreError> {
        queries::job(&self.readers, id).await
    }

    /// The job's state.
    pub async fn status(&self, id: JobId) -> Result<Option<JobStatus>, StoreError> {
        queries::status(&self.readers, id).await
    }

    /// The job that a key names.
    pub async fn known_key(
        &self,
        key: &IdempotencyKey,
    ) -> Result<Option<(JobId, JobStatus)>, StoreError> {
        let mut conn = self.readers.acquire().await?;
        commands::known_key(&mut conn, key).await
    }

    /// Jobs, newest first.
    pub async fn list(&self, filter: &ListFilter) -> Result<Vec<TaskSummary>, StoreError> {
        queries::list(&self.readers, filter).await
    }

    /// Returns the number of matching jobs, regardless of the filter's cursor and limit.
    pub async fn count(&self, filter: &ListFilter) -> Result<u64, StoreError> {
        queries::count(&self.readers, filter).await
    }

    /// At least one event after `after` where there is any, in order, and about `limit` of them.
    pub async fn events_after(
        &self,
        job: JobId,
        after: EventId,
        limit: usize,
    ) -> Result<Vec<LogEntry>, StoreError> {
        queries::events_after(&self.readers, job, after, limit).await
    }

    /// How far the job's log goes.
    pub async fn log_end(&self, job: JobId) -> Result<Option<LogEnd>, StoreError> {
        queries::log_end(&self.readers, job).await
    }

    /// Does one small step of dropping what is old.
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

    /// Notes what a pool said when it registered.
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

    /// Returns the registered pools, by name.
    pub async fn pools(&self) -> Result<Vec<StoredPool>, StoreError> {
        pools::all(&self.readers).await
    }

    /// Empties the write-ahead log, in which dropped texts may still stand. False where a reader needs it just now.
    pub async fn forget_log(&self) -> bool {
        self.writer.forget_log().await
    }

    /// Fails unless the database can be read, and as far as is known written.
    pub async fn check(&self) -> Result<(), StoreError> {
        sqlx::query("SELECT 1 FROM jobs LIMIT 1")
            .fetch_optional(&self.readers)
            .await?;
        self.writer.probe().await
    }
}

/// What a reader who kept everything has after `event`.
pub fn apply_to_text(text: &mut String, event: &TaskEvent) {
    match event {
        TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
        TaskEvent::Token(token) => text.push_str(&token.t),
        _ => {}
    }
}

#[cfg(test)]
mod tests;
