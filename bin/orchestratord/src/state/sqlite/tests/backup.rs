//! Backups of a database.

use sqlx::Connection as _;

use super::*;
use crate::state::sqlite::backup::BackupError;

// [ORCHD-076] A file that appears at the destination while the copy is made is not overwritten.
#[tokio::test]
async fn a_goal_that_appears_meanwhile_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let shelf = tempfile::tempdir().unwrap();
    let goal = shelf.path().join("copy");
    let opened = store(&dir).await;
    submitted(&*opened).await;
    opened.close(Duration::from_secs(5)).await;
    // While this connection is open, no other one can read the file: the copy has begun, but can't continue.
    let path = dir.path().join("jobs.db");
    let mut alone = SqliteConnectOptions::new()
        .filename(&path)
        .pragma("locking_mode", "EXCLUSIVE")
        .connect()
        .await
        .unwrap();
    sqlx::raw_sql("UPDATE holder SET clean = clean")
        .execute(&mut alone)
        .await
        .unwrap();
    let copying = tokio::spawn({
        let goal = goal.clone();
        async move { crate::state::backup(&path, &goal, false).await }
    });
    let begun = || std::fs::read_dir(shelf.path()).unwrap().count() > 0;
    while !begun() {
        assert!(!copying.is_finished(), "{:?}", copying.await);
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    std::fs::write(&goal, "somebody else's").unwrap();
    alone.close().await.unwrap();
    let copied = copying.await.unwrap();
    assert!(matches!(copied, Err(BackupError::Exists(_))), "{copied:?}");
    assert_eq!(std::fs::read_to_string(&goal).unwrap(), "somebody else's");
    assert_eq!(std::fs::read_dir(shelf.path()).unwrap().count(), 1);
}
