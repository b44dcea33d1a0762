//! Which run of the daemon the database belongs to, and in what state the run before left it.

use sqlx::{Row as _, SqliteConnection};

use super::StoreError;

/// The number of a run. Every start raises it, so a run that slept through another's start holds an old one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(i64);

/// Makes the database this run's: from here on no earlier run can write, and until [`release`] it counts as left open.
pub(super) async fn seize(conn: &mut SqliteConnection) -> Result<Epoch, StoreError> {
    let epoch = sqlx::query("UPDATE holder SET epoch = epoch + 1, clean = 0 RETURNING epoch")
        .fetch_one(conn)
        .await?
        .try_get("epoch")?;
    Ok(Epoch(epoch))
}

/// Fails unless the database is still the one of this run. To be asked inside the transaction that writes.
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

/// Writes what is there already, to see whether anything can be written.
pub(super) async fn touch(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    sqlx::query("UPDATE holder SET epoch = epoch")
        .execute(conn)
        .await?;
    Ok(())
}

/// Notes that this run closes the database in order.
pub(super) async fn release(conn: &mut SqliteConnection, ours: Epoch) -> Result<(), StoreError> {
    sqlx::query("UPDATE holder SET clean = 1 WHERE epoch = ?")
        .bind(ours.0)
        .execute(conn)
        .await?;
    Ok(())
}

/// Whether the run before closed the database in order.
pub(super) async fn was_released(conn: &mut SqliteConnection) -> Result<bool, StoreError> {
    let clean: i64 = sqlx::query("SELECT clean FROM holder")
        .fetch_one(conn)
        .await?
        .try_get("clean")?;
    Ok(clean == 1)
}
