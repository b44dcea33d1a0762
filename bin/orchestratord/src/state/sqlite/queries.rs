//! Queries that only read.

use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::TaskSummary;
use orchestrator_core::job::{Attempt, Job, Priority, Usage};
use orchestrator_core::{JobId, JobStatus};
use sqlx::sqlite::SqliteRow;
use sqlx::{QueryBuilder, Row as _, Sqlite, SqlitePool};

use super::commands::{
    StoredEvent, from_json, last_event, number, optional_time, parse, parse_outcome, time,
};
use crate::state::spec::StoredSpec;
use crate::state::{ListFilter, LogEnd, LogEntry, StoreError, apply_to_text};

/// Log rows of one page of a replay. A row holds up to about thirty tokens.
const PAGE_ROWS: i64 = 64;

pub(super) async fn status(pool: &SqlitePool, id: JobId) -> Result<Option<JobStatus>, StoreError> {
    let row = sqlx::query("SELECT status FROM jobs WHERE id = ?")
        .bind(id.to_string())
        .fetch_optional(pool)
        .await?;
    row.map(|row| parse(row.try_get("status")?)).transpose()
}

pub(super) async fn log_end(pool: &SqlitePool, id: JobId) -> Result<Option<LogEnd>, StoreError> {
    let mut transaction = pool.begin().await?;
    let row = sqlx::query("SELECT status, dropped_us FROM jobs WHERE id = ?")
        .bind(id.to_string())
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(LogEnd {
        status: parse(row.try_get("status")?)?,
        last: last_event(&mut transaction, id).await?,
        dropped_at: optional_time(row.try_get("dropped_us")?)?,
    }))
}

pub(super) async fn job(
    pool: &SqlitePool,
    id: JobId,
) -> Result<Option<(Job, EventId)>, StoreError> {
    // One transaction, so that state, attempts and text are of one moment.
    let mut transaction = pool.begin().await?;
    let sql = "SELECT status, spec, created_us, started_us, ended_us, dropped_us, fence, context_needed, usage, error, \
               (SELECT receipt FROM receipts WHERE job_id = id) AS receipt FROM jobs JOIN requests ON job_id = id WHERE id = ?";
    let Some(row) = sqlx::query(sql)
        .bind(id.to_string())
        .fetch_optional(&mut *transaction)
        .await?
    else {
        return Ok(None);
    };
    let sql = "SELECT number, fence, pool_id, worker_id, leased_us, started_us, ended_us, outcome, reason \
               FROM attempts WHERE job_id = ? ORDER BY number";
    let attempts = sqlx::query(sql)
        .bind(id.to_string())
        .fetch_all(&mut *transaction)
        .await?;
    let dropped_at = optional_time(row.try_get("dropped_us")?)?;
    let mut log = Vec::new();
    // While a log is being dropped, some of its rows may remain, but their text is no longer shown.
    if dropped_at.is_none() {
        let sql =
            "SELECT attempt, last_seq, payload FROM events WHERE job_id = ? ORDER BY first_seq";
        log = sqlx::query(sql)
            .bind(id.to_string())
            .fetch_all(&mut *transaction)
            .await?;
    }
    transaction.commit().await?;

    let mut text = String::new();
    let mut last = EventId { attempt: 0, seq: 0 };
    for row in &log {
        last = EventId {
            attempt: number(row.try_get("attempt")?)?,
            seq: number(row.try_get("last_seq")?)?,
        };
        let events: Vec<StoredEvent<TaskEvent>> = from_json(row.try_get("payload")?)?;
        events
            .iter()
            .for_each(|stored| apply_to_text(&mut text, &stored.e));
    }
    let job = Job {
        id,
        spec: from_json::<StoredSpec>(row.try_get("spec")?)?.0,
        status: parse(row.try_get("status")?)?,
        created_at: time(row.try_get("created_us")?)?,
        started_at: optional_time(row.try_get("started_us")?)?,
        ended_at: optional_time(row.try_get("ended_us")?)?,
        dropped_at,
        fence: number(row.try_get("fence")?)?,
        context_needed: row
            .try_get::<Option<i64>, _>("context_needed")?
            .map(number)
            .transpose()?,
        attempts: attempts.iter().map(attempt).collect::<Result<_, _>>()?,
        text,
        usage: row
            .try_get::<Option<&str>, _>("usage")?
            .map(from_json)
            .transpose()?,
        receipt: row
            .try_get::<Option<&str>, _>("receipt")?
            .map(from_json)
            .transpose()?,
        error: row
            .try_get::<Option<&str>, _>("error")?
            .map(from_json)
            .transpose()?,
    };
    Ok(Some((job, last)))
}

fn attempt(row: &SqliteRow) -> Result<Attempt, StoreError> {
    Ok(Attempt {
        number: number(row.try_get("number")?)?,
        fence: number(row.try_get("fence")?)?,
        pool_id: row.try_get("pool_id")?,
        worker_id: row.try_get("worker_id")?,
        leased_at: time(row.try_get("leased_us")?)?,
        started_at: optional_time(row.try_get("started_us")?)?,
        ended_at: optional_time(row.try_get("ended_us")?)?,
        outcome: row
            .try_get::<Option<&str>, _>("outcome")?
            .map(parse_outcome)
            .transpose()?,
        reason: row.try_get("reason")?,
    })
}

/// Lists jobs, newest first. For each state and class that the filter allows, one range of an index is read from its end: the
/// cost depends on the number of jobs shown, never on the number stored.
pub(super) async fn list(
    pool: &SqlitePool,
    filter: &ListFilter,
) -> Result<Vec<TaskSummary>, StoreError> {
    let limit = i64::from(filter.limit);
    let mut query = QueryBuilder::<Sqlite>::new(
        "SELECT j.id, j.status, j.model, j.priority, j.session_id, j.labels, j.created_us, j.started_us, j.ended_us, \
         j.usage, j.error, a.number, a.pool_id, a.worker_id",
    );
    query.push(if filter.short_ids {
        ", (SELECT id FROM jobs WHERE id < j.id ORDER BY id DESC LIMIT 1) AS older, \
         (SELECT id FROM jobs WHERE id > j.id ORDER BY id LIMIT 1) AS newer"
    } else {
        ", NULL AS older, NULL AS newer"
    });
    query.push(
        " FROM jobs j LEFT JOIN attempts a ON a.job_id = j.id \
         AND a.number = (SELECT MAX(number) FROM attempts WHERE job_id = j.id) WHERE j.id IN (",
    );
    for (n, range) in ranges(filter).into_iter().enumerate() {
        query.push(if n > 0 {
            " UNION ALL SELECT * FROM ("
        } else {
            "SELECT * FROM ("
        });
        query.push("SELECT id FROM jobs");
        push_conditions(&mut query, filter, range);
        if let Some(before) = filter.before {
            query.push(" AND id < ").push_bind(before.to_string());
        }
        query.push(" ORDER BY id DESC LIMIT ").push_bind(limit);
        query.push(")");
    }
    query.push(") ORDER BY j.id DESC LIMIT ").push_bind(limit);
    let rows = query.build().fetch_all(pool).await?;
    rows.iter()
        .map(|row| {
            let mut job = summary(row)?;
            if filter.short_ids {
                job.short_id = Some(job.id.shortest_prefix(neighbours(row)?));
            }
            Ok(job)
        })
        .collect()
}

/// Returns the number of matching jobs. Reads all index entries of the ranges, so a caller must ask for it.
pub(super) async fn count(pool: &SqlitePool, filter: &ListFilter) -> Result<u64, StoreError> {
    let mut query = QueryBuilder::<Sqlite>::new("SELECT ");
    for (n, range) in ranges(filter).into_iter().enumerate() {
        query.push(if n > 0 {
            " + (SELECT COUNT(*) FROM jobs"
        } else {
            "(SELECT COUNT(*) FROM jobs"
        });
        push_conditions(&mut query, filter, range);
        query.push(")");
    }
    number(query.build().fetch_one(pool).await?.try_get(0)?)
}

/// Returns the index ranges that hold the filter's jobs. `None` stands for all jobs.
fn ranges(filter: &ListFilter) -> Vec<Option<(JobStatus, Priority)>> {
    if filter.statuses.is_empty() && (filter.priority, &filter.model) == (None, &None) {
        return vec![None];
    }
    let mut statuses = JobStatus::ALL.to_vec();
    statuses.retain(|status| filter.statuses.is_empty() || filter.statuses.contains(status));
    let priorities = filter
        .priority
        .map_or(Priority::ALL.to_vec(), |priority| vec![priority]);
    let pairs = statuses.into_iter().flat_map(|status| {
        let priorities = priorities.clone().into_iter();
        priorities.map(move |priority| Some((status, priority)))
    });
    pairs.collect()
}

/// Adds the filter's conditions on the jobs of one range.
fn push_conditions(
    query: &mut QueryBuilder<Sqlite>,
    filter: &ListFilter,
    range: Option<(JobStatus, Priority)>,
) {
    query.push(" WHERE 1 = 1");
    if let Some((status, priority)) = range {
        query.push(" AND status = ").push_bind(status.as_str());
        query.push(" AND priority = ").push_bind(priority.as_str());
    }
    if let Some(model) = &filter.model {
        query.push(" AND model = ").push_bind(model.clone());
    }
    if let Some(prefix) = &filter.prefix {
        query
            .push(" AND id >= ")
            .push_bind(prefix.as_str().to_owned());
        query.push(" AND id < ").push_bind(prefix.end());
    }
}

/// Returns the ids before and after a job's id, among all stored jobs.
fn neighbours(row: &SqliteRow) -> Result<Vec<JobId>, StoreError> {
    let ids: [Option<&str>; 2] = [row.try_get("older")?, row.try_get("newer")?];
    ids.into_iter().flatten().map(parse).collect()
}

fn summary(row: &SqliteRow) -> Result<TaskSummary, StoreError> {
    let usage: Option<Usage> = row
        .try_get::<Option<&str>, _>("usage")?
        .map(from_json)
        .transpose()?;
    Ok(TaskSummary {
        id: parse(row.try_get("id")?)?,
        status: parse(row.try_get("status")?)?,
        model: parse(row.try_get("model")?)?,
        priority: parse(row.try_get("priority")?)?,
        session_id: row.try_get("session_id")?,
        labels: from_json(row.try_get("labels")?)?,
        created_at: time(row.try_get("created_us")?)?,
        started_at: optional_time(row.try_get("started_us")?)?,
        ended_at: optional_time(row.try_get("ended_us")?)?,
        attempt: number(row.try_get::<Option<i64>, _>("number")?.unwrap_or(0))?,
        pool_id: row.try_get("pool_id")?,
        worker_id: row.try_get("worker_id")?,
        tokens_out: usage.map(|usage| usage.tokens_out),
        error: row
            .try_get::<Option<&str>, _>("error")?
            .map(from_json)
            .transpose()?,
        short_id: None,
    })
}

pub(super) async fn events_after(
    pool: &SqlitePool,
    job: JobId,
    after: EventId,
    limit: usize,
) -> Result<Vec<LogEntry>, StoreError> {
    // Attempt and sequence number rise together, so comparing pairs compares positions in the log. If the last tokens of an
    // attempt were never logged, their ids still precede the attempt that voids them.
    let sql = "SELECT attempt, first_seq, payload FROM events WHERE job_id = ? AND (attempt, last_seq) > (?, ?) \
               ORDER BY first_seq LIMIT ?";
    let rows = sqlx::query(sql)
        .bind(job.to_string())
        .bind(i64::from(after.attempt))
        .bind(i64::try_from(after.seq).unwrap_or(i64::MAX))
        .bind(PAGE_ROWS)
        .fetch_all(pool)
        .await?;
    let mut entries = Vec::new();
    for row in rows {
        let attempt = number(row.try_get("attempt")?)?;
        let first: u64 = number(row.try_get("first_seq")?)?;
        let events: Vec<StoredEvent<TaskEvent>> = from_json(row.try_get("payload")?)?;
        let read = events
            .into_iter()
            .zip(first..)
            .map(|(stored, seq)| LogEntry {
                id: EventId { attempt, seq },
                event: stored.e,
                token_ids: stored.ids,
                origin: stored.from,
            });
        entries.extend(read.filter(|entry| entry.id > after));
        if entries.len() >= limit {
            break;
        }
    }
    Ok(entries)
}
