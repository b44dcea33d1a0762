//! What pools said when they registered. What they have is known with their next heartbeat, and never stored.

use jiff::Timestamp;
use pool_core::POOL_API_VERSION;
use pool_core::api::pool::RegisterRequest;
use sqlx::{Row as _, SqliteConnection, SqlitePool};

use super::StoreError;
use super::commands::{micros, number, time};

pub(super) async fn save(
    conn: &mut SqliteConnection,
    request: &RegisterRequest,
    at: Timestamp,
) -> Result<(), StoreError> {
    let interval = i64::try_from(request.heartbeat_interval_ms).map_err(StoreError::corrupt)?;
    let sql = "INSERT INTO pools (id, instance_id, url, heartbeat_interval_ms, registered_us) VALUES (?, ?, ?, ?, ?) \
               ON CONFLICT (id) DO UPDATE SET instance_id = excluded.instance_id, url = excluded.url, \
               heartbeat_interval_ms = excluded.heartbeat_interval_ms, registered_us = excluded.registered_us";
    sqlx::query(sql)
        .bind(&request.pool_id)
        .bind(&request.instance_id)
        .bind(&request.url)
        .bind(interval)
        .bind(micros(at))
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

pub(super) async fn all(
    readers: &SqlitePool,
) -> Result<Vec<(RegisterRequest, Timestamp)>, StoreError> {
    let sql =
        "SELECT id, instance_id, url, heartbeat_interval_ms, registered_us FROM pools ORDER BY id";
    let rows = sqlx::query(sql).fetch_all(readers).await?;
    let pool = |row: &sqlx::sqlite::SqliteRow| {
        let request = RegisterRequest {
            pool_id: row.try_get("id")?,
            instance_id: row.try_get("instance_id")?,
            url: row.try_get("url")?,
            // One of another version was refused, and not stored.
            api_version: POOL_API_VERSION,
            heartbeat_interval_ms: number(row.try_get("heartbeat_interval_ms")?)?,
        };
        Ok((request, time(row.try_get("registered_us")?)?))
    };
    rows.iter().map(pool).collect()
}
