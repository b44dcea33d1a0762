//! The types of the seam: what a store takes, what it returns, and how it fails. None of them names a database.

use std::sync::Arc;

use jiff::Timestamp;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::{
    AttemptOutcome, IllegalTransition, JobError, JobEvent, JobIdPrefix, JobSpec, Priority, Usage,
};
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::RegisterRequest;
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::Origin;

use super::Fingerprint;

/// A failed operation of the store.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The disk is full or broken, or the file can't be written.
    #[error("the job database is unavailable: {0}")]
    Unavailable(Outage),
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
            Self::Unavailable(outage) if outage.kind == OutageKind::OutOfMemory => Some(
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

    /// Returns the error for content that violates this build's expectations.
    pub(super) fn corrupt(what: impl ToString) -> Self {
        Self::Corrupt(what.to_string())
    }
}

/// The cause of an unavailable store.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Outage {
    /// The part of the cause that changes how the daemon reacts.
    pub kind: OutageKind,
    /// Error of the database, as text: its type would bind the callers to one implementation.
    pub message: String,
}

/// Kinds of outages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutageKind {
    /// The process was refused memory.
    OutOfMemory,
    /// Another process holds a lock.
    Locked,
    /// The stored data are damaged, or are no database.
    Damaged,
    /// The disk failed to sync: its state is unknown.
    SyncFailed,
    /// Any other cause, such as a full disk.
    Other,
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
    /// Digests of the request.
    pub fingerprint: Fingerprint,
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

/// The state of a job's text in its log, from which an attempt continues.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResumePoint {
    /// Token ids of the text.
    pub token_ids: Vec<u32>,
    /// Index of the next piece of text.
    pub next_index: u32,
    /// Model file and arithmetic of the latest attempt.
    pub origin: Option<Origin>,
    /// Classes of arithmetic (the `build` of origins) that computed tokens of the text, in order, each once.
    pub classes: Vec<String>,
    /// True if readers may have seen tokens that the log lacks: an end of the daemon cut off the last tokens of an attempt that was
    /// given up, and no attempt has been announced since.
    pub seen_more: bool,
}

/// A pool as an earlier run stored it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredPool {
    /// The pool's latest registration.
    pub request: RegisterRequest,
    /// Time of that registration.
    pub registered_at: Timestamp,
    /// Point of the timeline at which the pool stopped on purpose; `None` if it has registered since.
    pub stopped_at: Option<Timestamp>,
}

/// Points of the timeline that separate old records from new ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cutoffs {
    /// Time before which a job must have ended to lose its prompt, text and log; `None` keeps them.
    pub drop: Option<Timestamp>,
    /// Time before which a job must have ended to be forgotten, once its texts are gone; `None` keeps it.
    pub forget: Option<Timestamp>,
}

/// The outcome of one retention step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// Nothing is left to do.
    Done,
    /// This many jobs lost their texts. From now on their logs can't be read.
    Dropped(u64),
    /// Some rows of such logs were deleted.
    Purged,
    /// This many jobs were deleted.
    Forgotten(u64),
    /// The file has shrunk.
    Shrunk,
}

/// Applies an event to the text of a job, as a reader of all events sees it.
pub fn apply_to_text(text: &mut String, event: &TaskEvent) {
    match event {
        TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
        TaskEvent::Token(token) => text.push_str(&token.t),
        _ => {}
    }
}
