//! The part of a job's record from which an attempt continues. Loaded when needed and not kept: a long answer has many ids.

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::api::events::TaskEvent;
use sqlx::{Row as _, SqlitePool};

use super::commands::{
    Earlier, StoredEvent, earlier, from_json, given_up, micros, number, parse, signed,
};
use crate::state::spec::StoredSpec;
use crate::state::{Lease, Orphan, ResumePoint, StoreError};

pub(super) async fn load(pool: &SqlitePool, job: JobId) -> Result<ResumePoint, StoreError> {
    // One transaction, so that log and attempts are of one moment.
    let mut transaction = pool.begin().await?;
    let sql = "SELECT attempt, payload FROM events WHERE job_id = ? ORDER BY first_seq";
    let rows = sqlx::query(sql)
        .bind(job.to_string())
        .fetch_all(&mut *transaction)
        .await?;
    let mut point = ResumePoint::default();
    let mut announced_attempt = 0;
    for row in &rows {
        announced_attempt = number(row.try_get("attempt")?)?;
        let events: Vec<StoredEvent<TaskEvent>> = from_json(row.try_get("payload")?)?;
        for StoredEvent { e, ids, from } in events {
            match e {
                TaskEvent::Started(_) => point.origin = from,
                TaskEvent::Attempt(further) if further.continues => point.origin = from,
                TaskEvent::Attempt(_) => {
                    point = ResumePoint {
                        origin: from,
                        ..ResumePoint::default()
                    };
                }
                TaskEvent::Token(token) => {
                    let class = point.origin.as_ref().map(|origin| &origin.build);
                    point.classes.extend(
                        class
                            .filter(|class| !point.classes.contains(class))
                            .cloned(),
                    );
                    point.token_ids.extend(ids);
                    point.next_index = token.i + 1;
                }
                _ => {}
            }
        }
    }
    point.seen_more = given_up(&mut transaction, job, announced_attempt).await?;
    transaction.commit().await?;
    Ok(point)
}

pub(super) async fn held_lease(
    pool: &SqlitePool,
    job: JobId,
    fence: u64,
) -> Result<Option<Lease>, StoreError> {
    let mut transaction = pool.begin().await?;
    let sql = "SELECT spec, started_us FROM jobs JOIN requests ON job_id = id \
               WHERE id = ? AND fence = ? AND status IN ('dispatched', 'running')";
    let row = sqlx::query(sql)
        .bind(job.to_string())
        .bind(signed(fence)?)
        .fetch_optional(&mut *transaction)
        .await?;
    let Some(row) = row else { return Ok(None) };
    let Earlier {
        count,
        lost,
        last_reason,
    } = earlier(&mut transaction, job, fence).await?;
    transaction.commit().await?;
    Ok(Some(Lease {
        attempt: count + 1,
        fence,
        spec: from_json::<StoredSpec>(row.try_get("spec")?)?.0,
        lost,
        started_before: row.try_get::<Option<i64>, _>("started_us")?.is_some(),
        last_reason,
    }))
}

/// Its list of outcomes is that of the index `attempts_given_up`, or SQLite does not use it.
pub(super) const ORPHANS: &str = "SELECT job_id, fence, pool_id, worker_id FROM attempts WHERE ended_steady_us >= ? \
    AND outcome IN ('worker_lost', 'orchestrator_restarted', 'cancelled', 'expired')";

pub(super) async fn orphans(
    pool: &SqlitePool,
    since: Timestamp,
) -> Result<Vec<Orphan>, StoreError> {
    let query = sqlx::query(ORPHANS).bind(micros(since));
    let rows = query.fetch_all(pool).await?;
    let orphan = |row: &sqlx::sqlite::SqliteRow| {
        Ok(Orphan {
            job: parse(row.try_get("job_id")?)?,
            fence: number(row.try_get("fence")?)?,
            pool_id: row.try_get("pool_id")?,
            worker_id: row.try_get("worker_id")?,
        })
    };
    rows.iter().map(orphan).collect()
}
