//! Migration of a database to the version that this build knows.

use std::time::Instant;

use pool_core::kit::crash::crash_point;
use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::holder;
use crate::state::StoreError;

/// Scripts of all versions, beginning with the one that creates version 1. A released script is never edited.
const MIGRATIONS: [&str; 7] = [
    include_str!("migrations/0001_jobs.sql"),
    include_str!("migrations/0002_holder_and_retention.sql"),
    include_str!("migrations/0003_given_up.sql"),
    include_str!("migrations/0004_pool_identity.sql"),
    include_str!("migrations/0005_timeline.sql"),
    include_str!("migrations/0006_context_needed.sql"),
    include_str!("migrations/0007_receipts.sql"),
];

/// Version that this build reads and writes.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

/// First version that records whether it was closed in order.
const NOTES_ITS_END: i64 = 2;

/// Oldest usable SQLite. Earlier versions can corrupt a write-ahead log in a rare race.
const OLDEST_SQLITE: (u32, u32, u32) = (3, 51, 3);

/// Fails if the linked SQLite is too old.
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

/// Returns the database's version, 0 for a new file. Fails if a newer build has written the file.
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

/// Reads the whole file for damage, unless the previous run closed it in order. After a crash, or a power loss on a disk that
/// lies about its syncs, this finds damage before it spreads.
pub(super) async fn check_for_damage(
    conn: &mut SqliteConnection,
    version: i64,
) -> Result<(), StoreError> {
    if version == 0 || (version >= NOTES_ITS_END && holder::was_released(conn).await?) {
        return Ok(());
    }
    tracing::info!("the database was not closed cleanly; checking it for damage");
    let start = Instant::now();
    let found: String = sqlx::query("PRAGMA quick_check(1)")
        .fetch_one(conn)
        .await?
        .get(0);
    if found != "ok" {
        return Err(StoreError::Damaged(found));
    }
    let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(elapsed_ms, "the database is intact");
    Ok(())
}

/// Runs the scripts that a database of version `found` lacks, each in a transaction with its version number.
pub(super) async fn migrate(conn: &mut SqliteConnection, found: i64) -> Result<(), StoreError> {
    let pending = MIGRATIONS
        .iter()
        .zip(1i64..)
        .skip(usize::try_from(found).unwrap_or(0));
    // A script that rebuilds a table drops the old one, but rows that refer to it must stay. SQLite heeds this pragma only
    // outside of transactions.
    execute(conn, "PRAGMA foreign_keys = OFF".to_owned()).await?;
    for (script, version) in pending {
        let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(*script).execute(&mut *transaction).await?;
        let broken = sqlx::query("PRAGMA foreign_key_check")
            .fetch_all(&mut *transaction)
            .await?;
        if !broken.is_empty() {
            let what = format!("{} rows would have dangling references", broken.len());
            return Err(StoreError::corrupt(what));
        }
        // A pragma takes no parameters; the number is this program's own.
        execute(&mut transaction, format!("PRAGMA user_version = {version}")).await?;
        crash_point("migrate.uncommitted");
        transaction.commit().await?;
        crash_point("migrate.committed");
        tracing::info!(version, "database migrated");
    }
    execute(conn, "PRAGMA foreign_keys = ON".to_owned()).await
}

/// Enables incremental vacuum in a file that an older build created without it. The rewrite needs as much free space as the
/// file has. If it fails, the file stays as it is: free pages are reused, but never returned to the file system.
pub(super) async fn let_it_shrink(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    const INCREMENTAL: i64 = 2;
    let mode: i64 = sqlx::query("PRAGMA auto_vacuum")
        .fetch_one(&mut *conn)
        .await?
        .get(0);
    if mode != INCREMENTAL {
        execute(conn, format!("PRAGMA auto_vacuum = {INCREMENTAL}")).await?;
        if let Err(error) = execute(conn, "VACUUM".to_owned()).await {
            tracing::warn!(%error, "could not rewrite the database to release free space");
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
