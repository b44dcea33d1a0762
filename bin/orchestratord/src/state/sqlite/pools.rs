//! Stored registrations of pools. What a pool has is never stored: it comes with the next heartbeat.

use jiff::Timestamp;
use pool_core::POOL_API_VERSION;
use pool_core::api::pool::RegisterRequest;
use sqlx::{Row as _, SqliteConnection, SqlitePool};

use super::commands::{micros, number, time, wall_micros};
use crate::state::{StoreError, StoredPool};

pub(super) async fn save(
    conn: &mut SqliteConnection,
    request: &RegisterRequest,
    at: Timestamp,
) -> Result<(), StoreError> {
    let interval = i64::try_from(request.heartbeat_interval_ms).map_err(StoreError::corrupt)?;
    let sql = "INSERT INTO pools (id, instance_id, url, heartbeat_interval_ms, registered_us, host_id) \
               VALUES (?, ?, ?, ?, ?, ?) \
               ON CONFLICT (id) DO UPDATE SET instance_id = excluded.instance_id, url = excluded.url, \
               heartbeat_interval_ms = excluded.heartbeat_interval_ms, registered_us = excluded.registered_us, \
               host_id = excluded.host_id, stopped_us = NULL";
    sqlx::query(sql)
        .bind(&request.pool_id)
        .bind(&request.instance_id)
        .bind(&request.url)
        .bind(interval)
        .bind(wall_micros(at))
        .bind(&request.host_id)
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn stop(
    conn: &mut SqliteConnection,
    id: &str,
    at: Timestamp,
) -> Result<(), StoreError> {
    sqlx::query("UPDATE pools SET stopped_us = ? WHERE id = ?")
        .bind(micros(at))
        .bind(id)
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn remove(conn: &mut SqliteConnection, id: &str) -> Result<(), StoreError> {
    sqlx::query("DELETE FROM pools WHERE id = ?")
        .bind(id)
        .execute(conn)
        .await?;
    Ok(())
}

pub(super) async fn all(readers: &SqlitePool) -> Result<Vec<StoredPool>, StoreError> {
    let sql = "SELECT id, instance_id, url, heartbeat_interval_ms, registered_us, host_id, stopped_us \
               FROM pools ORDER BY id";
    let rows = sqlx::query(sql).fetch_all(readers).await?;
    let pool = |row: &sqlx::sqlite::SqliteRow| {
        let request = RegisterRequest {
            pool_id: row.try_get("id")?,
            instance_id: row.try_get("instance_id")?,
            url: row.try_get("url")?,
            // A registration of another version was refused, and never stored.
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: number(row.try_get("heartbeat_interval_ms")?)?,
            host_id: row.try_get("host_id")?,
        };
        let stopped_us: Option<i64> = row.try_get("stopped_us")?;
        Ok(StoredPool {
            request,
            registered_at: time(row.try_get("registered_us")?)?,
            stopped_at: stopped_us.map(time).transpose()?,
        })
    };
    rows.iter().map(pool).collect()
}
