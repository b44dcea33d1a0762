//! Bringing a database to the version that this build knows.

use std::time::Instant;

use pool_core::crash::crash_point;
use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::{StoreError, holder};

/// Every version's script, the first one making version 1. A script that was released is never edited.
const MIGRATIONS: [&str; 7] = [
    include_str!("migrations/0001_jobs.sql"),
    include_str!("migrations/0002_holder_and_retention.sql"),
    include_str!("migrations/0003_given_up.sql"),
    include_str!("migrations/0004_pool_identity.sql"),
    include_str!("migrations/0005_timeline.sql"),
    include_str!("migrations/0006_context_needed.sql"),
    include_str!("migrations/0007_receipts.sql"),
];

/// The version that this build reads and writes.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

/// The first version that notes whether it was closed in order.
const NOTES_ITS_END: i64 = 2;

/// SQLite before this can corrupt a write-ahead log in a rare race.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);

/// Refuses a library that is too old.
pub(super) async fn check_library(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    let version: String = sqlx::query("SELECT sqlite_version()")
        .fetch_one(&mut *conn)
        .await?
        .get(0);
    let mut parts = version
        .split('.')
        .map(|part| part.parse::<u32>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    if (next(), next(), next()) >= OLDEST_SQLITE {
        Ok(())
    } else {
        Err(StoreError::OldLibrary { version })
    }
}

/// The database's version; 0 is a new file. One that a newer build wrote is refused.
pub(super) async fn version(conn: &mut SqliteConnection) -> Result<i64, StoreError> {
    let found: i64 = sqlx::query("PRAGMA user_version")
        .fetch_one(conn)
        .await?
        .get(0);
    if found > VERSION {
        return Err(StoreError::NewerDatabase {
            found,
            known: VERSION,
        });
    }
    Ok(found)
}

/// Reads the whole file for damage, unless the run before closed it in order: after a crash or a power loss on a disk that
/// lies about its syncs, damage is found before it spreads.
pub(super) async fn check_for_damage(
    conn: &mut SqliteConnection,
    version: i64,
) -> Result<(), StoreError> {
    if version == 0 || (version >= NOTES_ITS_END && holder::was_released(conn).await?) {
        return Ok(());
    }
    tracing::info!("the database was not closed in order the last time; checking it for damage");
    let start = Instant::now();
    let found: String = sqlx::query("PRAGMA quick_check(1)")
        .fetch_one(conn)
        .await?
        .get(0);
    if found != "ok" {
        return Err(StoreError::Damaged(found));
    }
    let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(elapsed_ms, "the database is sound");
    Ok(())
}

/// Runs the scripts that a database of version `found` has not seen, each in a transaction with its version number.
pub(super) async fn migrate(conn: &mut SqliteConnection, found: i64) -> Result<(), StoreError> {
    let pending = MIGRATIONS
        .iter()
        .zip(1i64..)
        .skip(usize::try_from(found).unwrap_or(0));
    // A script that rebuilds a table drops the old one, and what refers to that must stay. SQLite heeds this pragma only
    // outside of transactions.
    execute(conn, "PRAGMA foreign_keys = OFF".to_owned()).await?;
    for (script, version) in pending {
        let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(*script).execute(&mut *transaction).await?;
        let broken = sqlx::query("PRAGMA foreign_key_check")
            .fetch_all(&mut *transaction)
            .await?;
        if !broken.is_empty() {
            let what = format!("{} rows would refer to nothing", broken.len());
            return Err(StoreError::corrupt(what));
        }
        // A pragma takes no parameters; the number is ours.
        execute(&mut transaction, format!("PRAGMA user_version = {version}")).await?;
        crash_point("migrate.uncommitted");
        transaction.commit().await?;
        crash_point("migrate.committed");
        tracing::info!(version, "database migrated");
    }
    execute(conn, "PRAGMA foreign_keys = ON".to_owned()).await
}

/// Lets the file give space back where it was made by a build that did not ask for that. It takes as much free space as the
/// file has, so where that fails the file stays as it is: its pages are used again, just never given back.
pub(super) async fn let_it_shrink(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    const INCREMENTAL: i64 = 2;
    let mode: i64 = sqlx::query("PRAGMA auto_vacuum")
        .fetch_one(&mut *conn)
        .await?
        .get(0);
    if mode != INCREMENTAL {
        execute(conn, format!("PRAGMA auto_vacuum = {INCREMENTAL}")).await?;
        if let Err(error) = execute(conn, "VACUUM".to_owned()).await {
            tracing::warn!(%error, "the database can't be rewritten so that it gives space back");
        }
    }
    Ok(())
}

async fn execute(conn: &mut SqliteConnection, sql: String) -> Result<(), StoreError> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
        .execute(conn)
        .await?;
    Ok(())
}
