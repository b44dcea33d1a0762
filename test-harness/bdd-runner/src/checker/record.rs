//! The contents of the job database, read by the checker's own SQL.

use std::collections::BTreeMap;
use std::path::Path;

use orchestrator_core::JobId;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::JobStatus;
use serde::Deserialize;
use sqlx::sqlite::{SqliteConnectOptions, SqliteRow};
use sqlx::{ConnectOptions as _, Connection as _, Row as _};

/// Contents of the job database.
#[derive(Debug, Clone, Default)]
pub struct Record {
    /// All jobs, by id.
    pub jobs: BTreeMap<JobId, JobRecord>,
    /// All idempotency keys, of all callers.
    pub keys: Vec<KeyRecord>,
}

/// The record of a job.
#[derive(Debug, Clone)]
pub struct JobRecord {
    /// State of the job.
    pub status: JobStatus,
    /// Fence of the latest lease.
    pub fence: u64,
    /// Labels of the request.
    pub labels: BTreeMap<String, String>,
    /// Attempts in the order of their numbers.
    pub attempts: Vec<AttemptRecord>,
    /// Events of the log, in order.
    pub events: Vec<(EventId, TaskEvent)>,
}

/// The record of an attempt.
#[derive(Debug, Clone)]
pub struct AttemptRecord {
    /// Number of the attempt within its job.
    pub number: u32,
    /// Fence of the attempt's lease.
    pub fence: u64,
    /// True if the attempt has an end time.
    pub ended: bool,
    /// Outcome of the attempt; `None` if none is stored.
    pub outcome: Option<String>,
}

/// The record of an idempotency key.
#[derive(Debug, Clone)]
pub struct KeyRecord {
    /// Caller that owns the key.
    pub caller: String,
    /// Key, unique for its caller.
    pub key: String,
    /// Id of the job that the key names.
    pub job: JobId,
}

/// The reason why the database can't be judged.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The database can't be read.
    #[error("the job database can't be read")]
    Sql(#[from] sqlx::Error),
    /// A value is not a job, event or number of the contract.
    #[error("the job database has unexpected contents: {0}")]
    Unexpected(String),
    /// SQLite's integrity check fails.
    #[error("the job database is damaged: {0}")]
    Damaged(String),
}

fn unexpected(what: impl ToString) -> RecordError {
    RecordError::Unexpected(what.to_string())
}

#[derive(Deserialize)]
struct StoredEvent {
    e: TaskEvent,
}

impl Record {
    /// Reads the database at `path`, after SQLite's integrity check.
    pub async fn read(path: &Path) -> Result<Self, RecordError> {
        let options = SqliteConnectOptions::new().filename(path).read_only(true);
        let mut conn = options.disable_statement_logging().connect().await?;
        let verdict: String = sqlx::query("PRAGMA integrity_check(1)")
            .fetch_one(&mut conn)
            .await?
            .try_get(0)?;
        if verdict != "ok" {
            return Err(RecordError::Damaged(verdict));
        }
        // One transaction, so that all tables show the same moment.
        let mut transaction = conn.begin().await?;
        let mut record = Self::default();
        let jobs = sqlx::query("SELECT id, status, fence, labels FROM jobs")
            .fetch_all(&mut *transaction)
            .await?;
        for row in &jobs {
            let job = JobRecord {
                status: parse(row, "status")?,
                fence: number(row, "fence")?,
                labels: serde_json::from_str(row.try_get("labels")?).map_err(unexpected)?,
                attempts: Vec::new(),
                events: Vec::new(),
            };
            record.jobs.insert(parse(row, "id")?, job);
        }
        let sql =
            "SELECT job_id, number, fence, ended_us, outcome FROM attempts ORDER BY job_id, number";
        for row in &sqlx::query(sql).fetch_all(&mut *transaction).await? {
            let attempt = AttemptRecord {
                number: number(row, "number")?,
                fence: number(row, "fence")?,
                ended: row.try_get::<Option<i64>, _>("ended_us")?.is_some(),
                outcome: row.try_get("outcome")?,
            };
            record.of(row)?.attempts.push(attempt);
        }
        let sql = "SELECT job_id, attempt, first_seq, last_seq, payload FROM events ORDER BY job_id, first_seq";
        for row in &sqlx::query(sql).fetch_all(&mut *transaction).await? {
            let (attempt, first, last) = (
                number(row, "attempt")?,
                number::<u64>(row, "first_seq")?,
                number::<u64>(row, "last_seq")?,
            );
            let events: Vec<StoredEvent> =
                serde_json::from_str(row.try_get("payload")?).map_err(unexpected)?;
            if first + events.len() as u64 != last + 1 {
                return Err(unexpected(format!(
                    "a row of the log is labelled {first} to {last} but holds {} events",
                    events.len()
                )));
            }
            let job = record.of(row)?;
            job.events.extend(
                events
                    .into_iter()
                    .zip(first..)
                    .map(|(stored, seq)| (EventId { attempt, seq }, stored.e)),
            );
        }
        for row in &sqlx::query("SELECT caller, key, job_id FROM idempotency")
            .fetch_all(&mut *transaction)
            .await?
        {
            let key = KeyRecord {
                caller: row.try_get("caller")?,
                key: row.try_get("key")?,
                job: parse(row, "job_id")?,
            };
            record.keys.push(key);
        }
        transaction.commit().await?;
        conn.close().await?;
        Ok(record)
    }

    fn of(&mut self, row: &SqliteRow) -> Result<&mut JobRecord, RecordError> {
        let id: JobId = parse(row, "job_id")?;
        self.jobs
            .get_mut(&id)
            .ok_or_else(|| unexpected(format!("a row of {id}, which is not a job")))
    }
}

fn parse<T: std::str::FromStr<Err: ToString>>(
    row: &SqliteRow,
    column: &str,
) -> Result<T, RecordError> {
    row.try_get::<&str, _>(column)?
        .parse()
        .map_err(|error: T::Err| unexpected(error.to_string()))
}

fn number<T: TryFrom<i64>>(row: &SqliteRow, column: &str) -> Result<T, RecordError> {
    let value: i64 = row.try_get(column)?;
    T::try_from(value).map_err(|_| unexpected(format!("`{column}` is {value}")))
}
