//! Deletion of old records, a little at a time: each step is one short command of the writer, so that submits fit in between.

use jiff::Timestamp;
use sqlx::{Row as _, SqliteConnection};

use super::commands::micros;
use crate::state::{Cutoffs, Step, StoreError};

/// Number of jobs in one step.
const JOBS: i64 = 64;
/// Number of log rows in one step.
const ROWS: i64 = 256;
/// Number of pages freed in one step.
const VACUUM_PAGES: i64 = 256;
/// Number of free pages that are kept for new records.
const FREE_PAGES_KEPT: i64 = 512;

/// Deletes some rows of the logs that are being dropped. `CROSS` keeps SQLite from joining the other way: it would scan the
/// logs of all jobs for more rows than there are.
pub(super) const PURGE: &str = "DELETE FROM events WHERE (job_id, first_seq) IN \
    (SELECT e.job_id, e.first_seq FROM purges p CROSS JOIN events e ON e.job_id = p.job_id LIMIT ?)";

/// Performs the next retention step, and records `now` as the time at which texts were dropped. The order completes an
/// interrupted run first.
pub(super) async fn step(
    conn: &mut SqliteConnection,
    cutoffs: Cutoffs,
    now: Timestamp,
) -> Result<Step, StoreError> {
    if purge(conn).await? {
        return Ok(Step::Purged);
    }
    if let Some(before) = cutoffs.drop {
        let jobs = drop_texts(conn, before, now).await?;
        if jobs > 0 {
            return Ok(Step::Dropped(jobs));
        }
    }
    if let Some(before) = cutoffs.forget {
        let jobs = forget(conn, before).await?;
        if jobs > 0 {
            return Ok(Step::Forgotten(jobs));
        }
    }
    match shrink(conn).await? {
        true => Ok(Step::Shrunk),
        false => Ok(Step::Done),
    }
}

/// Deletes some rows of the logs that are being dropped. Returns false if there are no such logs.
async fn purge(conn: &mut SqliteConnection) -> Result<bool, StoreError> {
    let pending = sqlx::query("SELECT 1 FROM purges LIMIT 1")
        .fetch_optional(&mut *conn)
        .await?;
    if pending.is_none() {
        return Ok(false);
    }
    sqlx::query(PURGE).bind(ROWS).execute(&mut *conn).await?;
    let sql = "DELETE FROM purges WHERE NOT EXISTS (SELECT 1 FROM events WHERE events.job_id = purges.job_id)";
    sqlx::query(sql).execute(conn).await?;
    Ok(true)
}

/// Drops prompts and texts of the jobs that ended first, and queues their logs for deletion. Token counts, settings and labels
/// stay. The caller makes sure that no log is queued yet.
async fn drop_texts(
    conn: &mut SqliteConnection,
    before: Timestamp,
    now: Timestamp,
) -> Result<u64, StoreError> {
    let sql = "INSERT INTO purges (job_id) SELECT id FROM jobs \
               WHERE ended_steady_us IS NOT NULL AND dropped_us IS NULL AND ended_steady_us < ? \
               ORDER BY ended_steady_us LIMIT ?";
    let jobs = sqlx::query(sql)
        .bind(micros(before))
        .bind(JOBS)
        .execute(&mut *conn)
        .await?
        .rows_affected();
    if jobs == 0 {
        return Ok(0);
    }
    sqlx::query("UPDATE jobs SET dropped_us = ? WHERE id IN (SELECT job_id FROM purges)")
        .bind(micros(now))
        .execute(&mut *conn)
        .await?;
    // SQLite's JSON functions copy numbers as written, so a seed beyond 2^63 stays exact.
    let sql = "UPDATE requests SET spec = json_set(spec, '$.input', json('{\"prompt\":\"\"}'), '$.system', NULL, \
               '$.stop', json('[]')) WHERE job_id IN (SELECT job_id FROM purges)";
    sqlx::query(sql).execute(conn).await?;
    Ok(jobs)
}

/// Deletes the jobs that ended first among those without texts, with their attempts and keys.
async fn forget(conn: &mut SqliteConnection, before: Timestamp) -> Result<u64, StoreError> {
    let sql = "DELETE FROM jobs WHERE id IN \
               (SELECT id FROM jobs WHERE dropped_us IS NOT NULL AND ended_steady_us < ? ORDER BY ended_steady_us LIMIT ?)";
    let deleted = sqlx::query(sql)
        .bind(micros(before))
        .bind(JOBS)
        .execute(conn)
        .await?;
    Ok(deleted.rows_affected())
}

/// Returns some free pages to the file system. Returns false if none could be.
async fn shrink(conn: &mut SqliteConnection) -> Result<bool, StoreError> {
    let free: i64 = sqlx::query("PRAGMA freelist_count")
        .fetch_one(&mut *conn)
        .await?
        .get(0);
    if free <= FREE_PAGES_KEPT {
        return Ok(false);
    }
    // A pragma takes no parameters.
    let sql = format!("PRAGMA incremental_vacuum({VACUUM_PAGES})");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(&mut *conn)
        .await?;
    let left: i64 = sqlx::query("PRAGMA freelist_count")
        .fetch_one(conn)
        .await?
        .get(0);
    // Without progress, stop: a file that can't shrink would otherwise be tried forever.
    Ok(left < free)
}
