mod backup;
mod open;
mod retention;

use orchestrator_core::api::events::{Queued, TaskEvent};
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::JobEvent;
use sqlx::Row as _;

use super::commands::{StoredEvent, to_json};
use super::*;
use crate::state::tests::receipts::receipt;
use crate::state::tests::{
    EARLIER_DIGEST, Place, contract, ending, entry, error_event, events, key, submitted, token,
};

/// A folder with a database.
struct Folder(tempfile::TempDir);

impl Place for Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    async fn open(&self) -> crate::state::Store {
        store(&self.0).await
    }
}

contract!(Folder);

async fn store(dir: &tempfile::TempDir) -> Arc<SqliteStore> {
    Arc::new(
        SqliteStore::open(&dir.path().join("jobs.db"))
            .await
            .unwrap(),
    )
}

/// Runs a statement on the writer's connection.
async fn sql(store: &SqliteStore, statement: String) {
    let statement = sqlx::AssertSqlSafe(statement);
    store
        .writer
        .run(move |conn| {
            Box::pin(async move { Ok(sqlx::raw_sql(statement).execute(conn).await.map(drop)?) })
        })
        .await
        .unwrap();
}

// [ORCHD-006] P16: submits are refused while the disk is full, and succeed again after; nothing of a refused batch stays.
#[tokio::test]
async fn a_full_disk_refuses_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let kept = submitted(&*store).await;
    // SQLite raises a limit below the present size to that size: from now on the file can't grow, as on a full disk.
    sql(&store, "PRAGMA max_page_count = 1".into()).await;
    let big = || {
        let prompt = Some("x".repeat(100_000));
        let request = TaskSubmitRequest {
            model: "m".into(),
            prompt,
            ..Default::default()
        };
        Job::new(
            JobId::random(),
            request.validate().unwrap(),
            crate::clock::now(),
        )
    };
    let submit = async |job: Job| {
        let queued = Queued {
            job_id: job.id,
            model: job.spec.model.clone(),
            queue_position: 0,
        };
        store
            .submit(job, None, entry(0, 1, TaskEvent::Queued(queued)))
            .await
    };
    let (a, b) = (big(), big());
    let ids = [a.id, b.id];
    let results = futures_util::future::join(submit(a), submit(b)).await;
    for result in [results.0, results.1] {
        assert!(
            matches!(result, Err(StoreError::Unavailable(_))),
            "{result:?}"
        );
    }
    assert_eq!(store.status(kept).await.unwrap(), Some(JobStatus::Queued));
    for id in ids {
        assert_eq!(store.status(id).await.unwrap(), None);
    }
    sql(&store, "PRAGMA max_page_count = 1000000".into()).await;
    submit(big()).await.unwrap();
}

// [ORCHD-080]
#[tokio::test]
async fn what_is_done_again_and_again_walks_through_no_table() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    for sql in [resume_point::ORPHANS, super::retention::PURGE] {
        let explain = format!("EXPLAIN QUERY PLAN {sql}");
        let plan = sqlx::query(sqlx::AssertSqlSafe(explain))
            .fetch_all(&store.readers)
            .await
            .unwrap();
        let steps: Vec<String> = plan.iter().map(|row| row.get("detail")).collect();
        // All logs that are being purged are scanned; there are never many.
        let walks = |step: &&String| step.starts_with("SCAN") && *step != "SCAN p";
        assert_eq!(steps.iter().find(walks), None, "{sql}: {steps:?}");
    }
}
