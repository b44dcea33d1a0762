//! Commands that change the database. Each function runs inside the writer's transaction.

use std::sync::Arc;

use jiff::Timestamp;
use orchestrator_core::api::events::EventId;
use orchestrator_core::job::{AttemptOutcome, Job, JobEvent};
use orchestrator_core::queue::QueuedJob;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::worker::Origin;
use pool_core::kit::crash::crash_point;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sqlx::sqlite::SqliteRow;
use sqlx::{Row as _, SqliteConnection};

use crate::clock;
use crate::state::spec::{StoredSpec, StoredSpecRef};
use crate::state::{
    Ending, IdempotencyKey, Interrupted, Lease, LogEntry, Progress, Recovered, Requeue, StoreError,
    Submitted,
};

/// An event as a log row stores it. The event's id follows from the row.
#[derive(Serialize, Deserialize)]
pub(super) struct StoredEvent<E> {
    pub(super) e: E,
    #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
    pub(super) ids: Vec<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) from: Option<Origin>,
}

pub(super) fn micros(at: Timestamp) -> i64 {
    at.as_microsecond()
}

/// Returns the wall-clock microseconds at a point of the timeline.
pub(super) fn wall_micros(at: Timestamp) -> i64 {
    micros(clock::wall(at))
}

pub(super) fn time(us: i64) -> Result<Timestamp, StoreError> {
    Timestamp::from_microsecond(us).map_err(StoreError::corrupt)
}

pub(super) fn optional_time(us: Option<i64>) -> Result<Option<Timestamp>, StoreError> {
    us.map(time).transpose()
}

pub(super) fn number<T: TryFrom<i64>>(value: i64) -> Result<T, StoreError> {
    T::try_from(value).map_err(|_| StoreError::corrupt(format!("{value} is out of range")))
}

pub(super) fn signed(value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(StoreError::corrupt)
}

pub(super) fn to_json(value: &impl Serialize) -> Result<String, StoreError> {
    serde_json::to_string(value).map_err(StoreError::corrupt)
}

pub(super) fn from_json<T: DeserializeOwned>(text: &str) -> Result<T, StoreError> {
    serde_json::from_str(text).map_err(StoreError::corrupt)
}

pub(super) fn parse<T: std::str::FromStr<Err: ToString>>(text: &str) -> Result<T, StoreError> {
    text.parse().map_err(StoreError::corrupt)
}

/// Returns the name of a unit variant, as serde writes it.
fn outcome_name(outcome: AttemptOutcome) -> Result<String, StoreError> {
    Ok(to_json(&outcome)?.trim_matches('"').to_owned())
}

pub(super) fn parse_outcome(name: &str) -> Result<AttemptOutcome, StoreError> {
    from_json(&format!("\"{name}\""))
}

/// The part of a job's record that decides which changes are legal.
struct Head {
    status: JobStatus,
    fence: u64,
}

async fn head(conn: &mut SqliteConnection, job: JobId) -> Result<Head, StoreError> {
    let row = sqlx::query("SELECT status, fence FROM jobs WHERE id = ?")
        .bind(job.to_string())
        .fetch_optional(conn)
        .await?
        .ok_or(StoreError::NotFound(job))?;
    Ok(Head {
        status: parse(row.try_get("status")?)?,
        fence: number(row.try_get("fence")?)?,
    })
}

/// Loads the job's head for a change on behalf of an attempt. Fails unless `fence` is the job's latest.
async fn head_for(conn: &mut SqliteConnection, job: JobId, fence: u64) -> Result<Head, StoreError> {
    let head = head(conn, job).await?;
    if head.fence == fence {
        Ok(head)
    } else {
        Err(StoreError::StaleFence {
            job,
            given: fence,
            current: head.fence,
        })
    }
}

async fn set_status(
    conn: &mut SqliteConnection,
    job: JobId,
    status: JobStatus,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE jobs SET status = ? WHERE id = ?")
        .bind(status.as_str())
        .bind(job.to_string())
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn known_key(
    conn: &mut SqliteConnection,
    key: &IdempotencyKey,
) -> Result<Option<(JobId, JobStatus)>, StoreError> {
    let sql = "SELECT i.fingerprint, i.job_id, j.status FROM idempotency i JOIN jobs j ON j.id = i.job_id \
               WHERE i.caller = ? AND i.key = ?";
    let Some(row) = sqlx::query(sql)
        .bind(&key.caller)
        .bind(&key.key)
        .fetch_optional(conn)
        .await?
    else {
        return Ok(None);
    };
    let job: JobId = parse(row.try_get("job_id")?)?;
    if !key.fingerprint.matches(row.try_get("fingerprint")?) {
        return Err(StoreError::KeyMismatch(job));
    }
    Ok(Some((job, parse(row.try_get("status")?)?)))
}

pub(super) async fn submit(
    conn: &mut SqliteConnection,
    job: &Job,
    key: Option<&IdempotencyKey>,
    first: &Arc<LogEntry>,
) -> Result<Submitted, StoreError> {
    // Checked in the transaction of the insert, so that of concurrent submits with one key only the first makes a job.
    if let Some(key) = key
        && let Some((known, status)) = known_key(conn, key).await?
    {
        return Ok(Submitted::Known(known, status));
    }
    let id = job.id.to_string();
    let event = StoredEvent {
        e: &first.event,
        ids: first.token_ids.clone(),
        from: first.origin.clone(),
    };
    // One round trip to the database's thread for all three statements. A new log needs none of the checks in `append`.
    let sql = "INSERT INTO jobs (id, status, model, priority, session_id, placement, labels, max_attempts, created_us, \
               created_steady_us, deadline_us, fence) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?); \
               INSERT INTO requests (job_id, spec) VALUES (?, ?); \
               INSERT INTO events (job_id, attempt, first_seq, last_seq, payload) VALUES (?, ?, ?, ?, ?)";
    sqlx::query(sql)
        .bind(&id)
        .bind(job.status.as_str())
        .bind(job.spec.model.to_string())
        .bind(job.spec.priority.as_str())
        .bind(job.spec.session_id.as_deref())
        .bind(to_json(&job.spec.placement)?)
        .bind(to_json(&job.spec.labels)?)
        .bind(i64::from(job.spec.max_attempts))
        .bind(wall_micros(job.created_at))
        .bind(micros(job.created_at))
        .bind(job.deadline().map(micros))
        .bind(signed(job.fence)?)
        .bind(&id)
        .bind(to_json(&StoredSpecRef(&job.spec))?)
        .bind(&id)
        .bind(i64::from(first.id.attempt))
        .bind(signed(first.id.seq)?)
        .bind(signed(first.id.seq)?)
        .bind(to_json(&[event])?)
        .execute(&mut *conn)
        .await?;
    if let Some(key) = key {
        sqlx::query("INSERT INTO idempotency (caller, key, fingerprint, job_id, created_us) VALUES (?, ?, ?, ?, ?)")
            .bind(&key.caller)
            .bind(&key.key)
            .bind(key.fingerprint.as_str())
            .bind(job.id.to_string())
            .bind(wall_micros(job.created_at))
            .execute(conn)
            .await?;
    }
    crash_point("submit.uncommitted");
    Ok(Submitted::New)
}

pub(super) async fn last_event(
    conn: &mut SqliteConnection,
    job: JobId,
) -> Result<Option<EventId>, StoreError> {
    let sql =
        "SELECT attempt, last_seq FROM events WHERE job_id = ? ORDER BY first_seq DESC LIMIT 1";
    let row = sqlx::query(sql)
        .bind(job.to_string())
        .fetch_optional(conn)
        .await?;
    row.map(|row| {
        Ok(EventId {
            attempt: number(row.try_get("attempt")?)?,
            seq: number(row.try_get("last_seq")?)?,
        })
    })
    .transpose()
}

/// Appends events to the log. Stored events are skipped, so that a write whose answer was lost may be repeated. A gap is
/// refused, because readers rely on contiguous ids.
async fn append(
    conn: &mut SqliteConnection,
    job: JobId,
    events: &[Arc<LogEntry>],
) -> Result<(), StoreError> {
    let last = last_event(conn, job).await?.map_or(0, |id| id.seq);
    let known = events
        .iter()
        .take_while(|entry| entry.id.seq <= last)
        .count();
    let fresh = &events[known..];
    let contiguous = fresh
        .iter()
        .zip(last + 1..)
        .all(|(entry, seq)| entry.id.seq == seq);
    if !contiguous {
        return Err(StoreError::corrupt(format!(
            "a gap in the log of {job} after event {last}"
        )));
    }
    for run in fresh.chunk_by(|a, b| a.id.attempt == b.id.attempt) {
        let stored: Vec<_> = run
            .iter()
            .map(|entry| StoredEvent {
                e: &entry.event,
                ids: entry.token_ids.clone(),
                from: entry.origin.clone(),
            })
            .collect();
        sqlx::query("INSERT INTO events (job_id, attempt, first_seq, last_seq, payload) VALUES (?, ?, ?, ?, ?)")
            .bind(job.to_string())
            .bind(i64::from(run[0].id.attempt))
            .bind(signed(run[0].id.seq)?)
            .bind(signed(run[run.len() - 1].id.seq)?)
            .bind(to_json(&stored)?)
            .execute(&mut *conn)
            .await?;
    }
    Ok(())
}

/// Returns whether an attempt since `announced_attempt`, the newest one announced to readers, had started and was given up because it
/// could not be found after a restart. Readers may have seen tokens of such an attempt that no log has. The announcement of a
/// later attempt follows all of them.
pub(super) async fn given_up(
    conn: &mut SqliteConnection,
    job: JobId,
    announced_attempt: u32,
) -> Result<bool, StoreError> {
    let sql = "SELECT EXISTS (SELECT 1 FROM attempts WHERE job_id = ? AND number >= ? AND started_us IS NOT NULL \
               AND outcome = ?)";
    let row = sqlx::query(sql)
        .bind(job.to_string())
        .bind(i64::from(announced_attempt))
        .bind(outcome_name(AttemptOutcome::OrchestratorRestarted)?)
        .fetch_one(conn)
        .await?;
    Ok(row.try_get(0)?)
}

/// Summary of the attempts at a job with lower fences.
pub(super) struct Earlier {
    pub(super) count: u32,
    pub(super) lost: u32,
    pub(super) last_reason: Option<String>,
}

pub(super) async fn earlier(
    conn: &mut SqliteConnection,
    job: JobId,
    fence: u64,
) -> Result<Earlier, StoreError> {
    let sql = "SELECT outcome, reason FROM attempts WHERE job_id = ? AND fence < ? ORDER BY number";
    let rows = sqlx::query(sql)
        .bind(job.to_string())
        .bind(signed(fence)?)
        .fetch_all(conn)
        .await?;
    let mut lost = 0;
    let mut last_reason = None;
    for row in &rows {
        let outcome: Option<&str> = row.try_get("outcome")?;
        if let Some(outcome) = outcome {
            lost += u32::from(parse_outcome(outcome)?.counts());
        }
        last_reason = row.try_get("reason")?;
    }
    Ok(Earlier {
        count: u32::try_from(rows.len()).map_err(StoreError::corrupt)?,
        lost,
        last_reason,
    })
}

pub(super) async fn lease(
    conn: &mut SqliteConnection,
    job: JobId,
    pool: &str,
    worker: &str,
    at: Timestamp,
) -> Result<Lease, StoreError> {
    let head = head(conn, job).await?;
    let status = head.status.transition(JobEvent::Leased)?;
    let fence = head.fence + 1;
    let id = job.to_string();

    let Earlier {
        count,
        lost,
        last_reason,
    } = earlier(conn, job, fence).await?;
    let attempt = count + 1;

    let sql = "INSERT INTO attempts (job_id, number, fence, pool_id, worker_id, leased_us) VALUES (?, ?, ?, ?, ?, ?)";
    sqlx::query(sql)
        .bind(&id)
        .bind(i64::from(attempt))
        .bind(signed(fence)?)
        .bind(pool)
        .bind(worker)
        .bind(wall_micros(at))
        .execute(&mut *conn)
        .await?;
    let sql = "UPDATE jobs SET status = ?, fence = ?, not_before_us = NULL WHERE id = ? \
               RETURNING started_us, (SELECT spec FROM requests WHERE job_id = jobs.id) AS spec";
    let row = sqlx::query(sql)
        .bind(status.as_str())
        .bind(signed(fence)?)
        .bind(&id)
        .fetch_one(conn)
        .await?;
    Ok(Lease {
        attempt,
        fence,
        spec: from_json::<StoredSpec>(row.try_get("spec")?)?.0,
        lost,
        started_before: row.try_get::<Option<i64>, _>("started_us")?.is_some(),
        last_reason,
    })
}

pub(super) async fn progress(
    conn: &mut SqliteConnection,
    job: JobId,
    fence: u64,
    progress: &Progress,
) -> Result<(), StoreError> {
    let head = head_for(conn, job, fence).await?;
    // The fence alone does not suffice: a cancelled job keeps its last fence, but only a job held by an attempt makes progress.
    if !matches!(head.status, JobStatus::Dispatched | JobStatus::Running) {
        return Err(StoreError::Illegal(
            orchestrator_core::job::IllegalTransition {
                from: head.status,
                event: JobEvent::Started,
            },
        ));
    }
    catch_up(conn, job, &head, progress).await?;
    Ok(())
}

/// Records what is not recorded yet, and returns the resulting state.
async fn catch_up(
    conn: &mut SqliteConnection,
    job: JobId,
    head: &Head,
    progress: &Progress,
) -> Result<JobStatus, StoreError> {
    let mut status = head.status;
    if let Some(at) = progress.started_at
        && status == JobStatus::Dispatched
    {
        status = status.transition(JobEvent::Started)?;
        set_status(conn, job, status).await?;
        sqlx::query("UPDATE jobs SET started_us = COALESCE(started_us, ?) WHERE id = ?")
            .bind(wall_micros(at))
            .bind(job.to_string())
            .execute(&mut *conn)
            .await?;
        sqlx::query("UPDATE attempts SET started_us = ? WHERE job_id = ? AND fence = ?")
            .bind(wall_micros(at))
            .bind(job.to_string())
            .bind(signed(head.fence)?)
            .execute(&mut *conn)
            .await?;
    }
    append(conn, job, &progress.events).await?;
    Ok(status)
}

/// Closes the open attempt, if there is one.
async fn end_attempt(
    conn: &mut SqliteConnection,
    job: JobId,
    at: Timestamp,
    outcome: AttemptOutcome,
    reason: Option<&str>,
) -> Result<(), StoreError> {
    let sql = "UPDATE attempts SET ended_us = ?, ended_steady_us = ?, outcome = ?, reason = ? \
               WHERE job_id = ? AND ended_us IS NULL";
    sqlx::query(sql)
        .bind(wall_micros(at))
        .bind(micros(at))
        .bind(outcome_name(outcome)?)
        .bind(reason)
        .bind(job.to_string())
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn end(
    conn: &mut SqliteConnection,
    job: JobId,
    ending: &Ending,
) -> Result<JobStatus, StoreError> {
    let head = match ending.fence {
        Some(fence) => head_for(conn, job, fence).await?,
        None => head(conn, job).await?,
    };
    if head.status.is_terminal() {
        return Ok(head.status.transition(ending.event)?);
    }
    let status = catch_up(conn, job, &head, &ending.progress)
        .await?
        .transition(ending.event)?;
    let usage = ending.usage.as_ref().map(to_json).transpose()?;
    let error = ending.error.as_ref().map(to_json).transpose()?;
    let sql = "UPDATE jobs SET status = ?, ended_us = ?, ended_steady_us = ?, usage = ?, error = ?, not_before_us = NULL \
               WHERE id = ?";
    sqlx::query(sql)
        .bind(status.as_str())
        .bind(wall_micros(ending.at))
        .bind(micros(ending.at))
        .bind(usage)
        .bind(error)
        .bind(job.to_string())
        .execute(&mut *conn)
        .await?;
    if let Some(receipt) = &ending.receipt {
        sqlx::query("INSERT INTO receipts (job_id, receipt) VALUES (?, ?)")
            .bind(job.to_string())
            .bind(to_json(receipt)?)
            .execute(&mut *conn)
            .await?;
    }
    let reason = ending.error.as_ref().map(|error| error.message.as_str());
    end_attempt(conn, job, ending.at, ending.outcome, reason).await?;
    Ok(status)
}

pub(super) async fn requeue(
    conn: &mut SqliteConnection,
    job: JobId,
    requeue: &Requeue,
) -> Result<(), StoreError> {
    let head = head_for(conn, job, requeue.fence).await?;
    // Check this before appending to the log: a job that is over gets no more events.
    head.status.transition(JobEvent::AttemptLost)?;
    let status = catch_up(conn, job, &head, &requeue.progress)
        .await?
        .transition(JobEvent::AttemptLost)?;
    let sql = "UPDATE jobs SET status = ?, not_before_us = ?, context_needed = COALESCE(?, context_needed) WHERE id = ?";
    sqlx::query(sql)
        .bind(status.as_str())
        .bind(requeue.not_before.map(micros))
        .bind(requeue.context_needed.map(i64::from))
        .bind(job.to_string())
        .execute(&mut *conn)
        .await?;
    end_attempt(
        conn,
        job,
        requeue.at,
        requeue.outcome,
        Some(&requeue.reason),
    )
    .await
}

pub(super) async fn recover(conn: &mut SqliteConnection) -> Result<Vec<Recovered>, StoreError> {
    let sql = "SELECT j.id, j.status, j.model, j.priority, j.session_id, j.placement, j.created_steady_us, j.not_before_us, \
               j.deadline_us, j.context_needed, LENGTH(CAST(r.spec AS BLOB)) AS bytes, json_extract(r.spec, '$.max_tokens') AS max_tokens, \
               a.fence, a.pool_id, a.worker_id \
               FROM jobs j JOIN requests r ON r.job_id = j.id LEFT JOIN attempts a ON a.job_id = j.id \
               AND a.number = (SELECT MAX(number) FROM attempts WHERE job_id = j.id) \
               WHERE j.status IN ('queued', 'dispatched', 'running') ORDER BY j.id";
    let rows = sqlx::query(sql).fetch_all(&mut *conn).await?;
    let mut recovered = Vec::with_capacity(rows.len());
    for row in rows {
        recovered.push(recover_one(conn, &row).await?);
    }
    Ok(recovered)
}

async fn recover_one(
    conn: &mut SqliteConnection,
    row: &SqliteRow,
) -> Result<Recovered, StoreError> {
    let job: JobId = parse(row.try_get("id")?)?;
    let status: JobStatus = parse(row.try_get("status")?)?;
    let interrupted = (status != JobStatus::Queued)
        .then(|| {
            Ok::<_, StoreError>(Interrupted {
                fence: number(row.try_get("fence")?)?,
                pool_id: row.try_get("pool_id")?,
                worker_id: row.try_get("worker_id")?,
                started: status == JobStatus::Running,
            })
        })
        .transpose()?;
    let last_event = last_event(conn, job)
        .await?
        .ok_or_else(|| StoreError::corrupt(format!("{job} has no log")))?;
    let runs = interrupted.as_ref().is_some_and(|attempt| attempt.started);
    // The latest run alone does not show this: the job may have waited for a pool over several restarts.
    let seen_more = runs || given_up(conn, job, last_event.attempt).await?;
    Ok(Recovered {
        queued: QueuedJob {
            id: job,
            model: parse(row.try_get("model")?)?,
            priority: parse(row.try_get("priority")?)?,
            session_id: row.try_get("session_id")?,
            created_at: time(row.try_get("created_steady_us")?)?,
            not_before: optional_time(row.try_get("not_before_us")?)?,
            placement: from_json(row.try_get("placement")?)?,
            turn: None,
            bytes: number(row.try_get("bytes")?)?,
            max_tokens: number(row.try_get("max_tokens")?)?,
            context_needed: row
                .try_get::<Option<i64>, _>("context_needed")?
                .map(number)
                .transpose()?,
            cache_needed: None,
        },
        deadline: optional_time(row.try_get("deadline_us")?)?,
        last_event,
        seen_more,
        interrupted,
    })
}
