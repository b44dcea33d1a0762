//! What an attempt needs of the record to go on where another one stopped. Read when it is needed and kept by nobody else:
//! the ids of a long answer are many.

use jiff::Timestamp;
use orchestrator_core::JobId;
use orchestrator_core::api::events::TaskEvent;
use pool_core::api::worker::Origin;
use sqlx::{Row as _, SqlitePool};

use super::commands::{
    Earlier, StoredEvent, earlier, from_json, given_up, micros, number, parse, signed,
};
use super::{Lease, Orphan, StoreError};

/// Where a job's text stands: what its log has since the text began.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seam {
    /// The ids that the text came from.
    pub token_ids: Vec<u32>,
    /// The index of the piece of text that follows.
    pub next_index: u32,
    /// What the latest of the attempts computed with.
    pub origin: Option<Origin>,
    /// Classes of arithmetic (the `build` of origins) that computed tokens of the text, in order, each once.
    pub classes: Vec<String>,
    /// Whether readers may have seen more than the log has: an attempt was given up of which the daemon's end had cut
    /// off the last tokens, and none has been told of since.
    pub seen_more: bool,
}

pub(super) async fn seam(pool: &SqlitePool, job: JobId) -> Result<Seam, StoreError> {
    // One transaction, so that log and attempts are of one moment.
    let mut transaction = pool.begin().await?;
    let sql = "SELECT attempt, payload FROM events WHERE job_id = ? ORDER BY first_seq";
    let rows = sqlx::query(sql)
        .bind(job.to_string())
        .fetch_all(&mut *transaction)
        .await?;
    let mut seam = Seam::default();
    let mut told = 0;
    for row in &rows {
        told = number(row.try_get("attempt")?)?;
        let events: Vec<StoredEvent<TaskEvent>> = from_json(row.try_get("payload")?)?;
        for StoredEvent { e, ids, from } in events {
            match e {
                TaskEvent::Started(_) => seam.origin = from,
                TaskEvent::Attempt(further) if further.continues => seam.origin = from,
                TaskEvent::Attempt(_) => {
                    seam = Seam {
                        origin: from,
                        ..Seam::default()
                    };
                }
                TaskEvent::Token(token) => {
                    let class = seam.origin.as_ref().map(|origin| &origin.build);
                    seam.classes
                        .extend(class.filter(|class| !seam.classes.contains(class)).cloned());
                    seam.token_ids.extend(ids);
                    seam.next_index = token.i + 1;
                }
                _ => {}
            }
        }
    }
    seam.seen_more = given_up(&mut transaction, job, told).await?;
    transaction.commit().await?;
    Ok(seam)
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
        spec: from_json(row.try_get("spec")?)?,
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
