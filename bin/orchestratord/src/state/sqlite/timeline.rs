//! The timeline that measures durations, kept across restarts.
//!
//! The timeline grows by the time that processes observe. Under one boot, the time since boot also covers the time without a
//! daemon. After a reboot, only the wall clock could give the length of the absence, and a wrong clock would make every record
//! old. So the timeline then continues from its last point, which can only delay what is due.

use std::time::Duration;

use jiff::Timestamp;
use pool_core::kit::{clock, process};
use sqlx::{Row as _, SqliteConnection};

use super::commands::{micros, time};
use crate::state::StoreError;

/// Records and returns the timeline's present point. A new database begins with the wall clock.
pub(super) async fn resume(conn: &mut SqliteConnection) -> Result<Timestamp, StoreError> {
    let row = sqlx::query("SELECT at_us, boot_id, boot_us FROM timeline")
        .fetch_one(&mut *conn)
        .await?;
    let (boot, since_boot) = boot();
    let same = !boot.is_empty() && boot == row.try_get::<&str, _>("boot_id")?;
    let away = if same {
        since_boot.saturating_sub(row.try_get("boot_us")?).max(0)
    } else {
        0
    };
    let noted: Option<i64> = row.try_get("at_us")?;
    let at = noted
        .map(|at| at.saturating_add(away))
        .max(newest(conn).await?);
    let at = match at {
        Some(at) => time(at)?,
        None => crate::clock::now(),
    };
    // The record matters only after a reboot, so a full disk does not prevent the daemon's start.
    if let Err(error) = note(conn, at).await {
        tracing::warn!(%error, "could not record the timeline");
    }
    Ok(at)
}

/// Records `at` as the present point.
pub(super) async fn note(conn: &mut SqliteConnection, at: Timestamp) -> Result<(), StoreError> {
    let (boot, since_boot) = boot();
    sqlx::query("UPDATE timeline SET at_us = ?, boot_id = ?, boot_us = ?")
        .bind(micros(at))
        .bind(boot)
        .bind(since_boot)
        .execute(conn)
        .await?;
    Ok(())
}

/// Returns the newest point in a job's record: after a reboot it may be later than the last recorded point.
async fn newest(conn: &mut SqliteConnection) -> Result<Option<i64>, StoreError> {
    let sql = "SELECT MAX(at) FROM (SELECT (SELECT created_steady_us FROM jobs ORDER BY id DESC LIMIT 1) AS at UNION ALL \
               SELECT MAX(ended_steady_us) FROM jobs WHERE ended_steady_us IS NOT NULL AND dropped_us IS NULL)";
    Ok(sqlx::query(sql).fetch_one(conn).await?.try_get(0)?)
}

/// Returns the id of the present boot, empty if the system gives none, and the microseconds since that boot.
fn boot() -> (String, i64) {
    let micros = |time: Duration| i64::try_from(time.as_micros()).unwrap_or(i64::MAX);
    (
        process::boot_id().unwrap_or_default(),
        micros(clock::since_boot()),
    )
}
