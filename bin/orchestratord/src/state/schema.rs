//! Bringing a database to the version that this build knows.

use sqlx::{Connection as _, Row as _, SqliteConnection};

use super::StoreError;

/// Every version's script, the first one making version 1. A script that was released is never edited.
const MIGRATIONS: [&str; 1] = [include_str!("migrations/0001_jobs.sql")];

/// The version that this build reads and writes.
pub(super) const VERSION: i64 = MIGRATIONS.len() as i64;

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

/// Runs the scripts that the database has not seen, each in a transaction with its version number.
pub(super) async fn migrate(conn: &mut SqliteConnection) -> Result<(), StoreError> {
    let found: i64 = sqlx::query("PRAGMA user_version")
        .fetch_one(&mut *conn)
        .await?
        .get(0);
    if found > VERSION {
        return Err(StoreError::NewerDatabase {
            found,
            known: VERSION,
        });
    }
    let pending = MIGRATIONS
        .iter()
        .zip(1i64..)
        .skip(usize::try_from(found).unwrap_or(0));
    for (script, version) in pending {
        let mut transaction = conn.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::raw_sql(*script).execute(&mut *transaction).await?;
        // A pragma takes no parameters; the number is ours.
        let set_version = sqlx::AssertSqlSafe(format!("PRAGMA user_version = {version}"));
        sqlx::raw_sql(set_version)
            .execute(&mut *transaction)
            .await?;
        transaction.commit().await?;
        tracing::info!(version, "database migrated");
    }
    Ok(())
}
