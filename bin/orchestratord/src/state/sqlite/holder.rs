//! The run of the daemon that owns the database, and the state in which the previous run left the file.

use sqlx::{Row as _, SqliteConnection};

use crate::state::StoreError;

/// The number of a run. Every start raises the stored number, so a run that was frozen during another's start holds an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(i64);

/// Makes this run the owner of the database. From here on no earlier run can write, and until [`release`] the database counts
/// as left open.
pub(super) async fn seize(conn: &mut SqliteConnection) -> Result<Epoch, StoreError> {
    let epoch = sqlx::query("UPDATE holder SET epoch = epoch + 1, clean = 0 RETURNING epoch")
        .fetch_one(conn)
        .await?
        .try_get("epoch")?;
    Ok(Epoch(epoch))
}

/// Fails unless this run still owns the database. Must run inside the transaction that writes.
pub(super) async fn check(conn: &mut SqliteConnection, ours: Epoch) -> Result<(), StoreError> {
    let found: i64 = sqlx::query("SELECT epoch FROM holder")
        .fetch_one(conn)
        .await?
        .try_get("epoch")?;
    if found == ours.0 {
        Ok(())
    } else {
        Err(StoreError::TakenOver)
    }
}

/// Rewrites an unchanged value, to test whether the database can be written.
pub(super) async fn touch(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    sqlx::query("UPDATE holder SET epoch = epoch")
        .execute(conn)
        .await?;
    Ok(())
}

/// Records that this run closes the database in order.
pub(super) async fn release(conn: &mut SqliteConnection, ours: Epoch) -> Result<(), StoreError> {
    sqlx::query("UPDATE holder SET clean = 1 WHERE epoch = ?")
        .bind(ours.0)
        .execute(conn)
        .await?;
    Ok(())
}

/// Returns whether the previous run closed the database in order.
pub(super) async fn was_released(conn: &mut SqliteConnection) -> Result<bool, StoreError> {
    let clean: i64 = sqlx::query("SELECT clean FROM holder")
        .fetch_one(conn)
        .await?
        .try_get("clean")?;
    Ok(clean == 1)
}
