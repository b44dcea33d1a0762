mod backup;
mod model;
mod open;
mod receipts;
mod retention;

use super::commands::{StoredEvent, to_json};
use super::*;
use orchestrator_core::api::events::{Queued, TaskEvent, Token};
use orchestrator_core::api::tasks::TaskSubmitRequest;
use orchestrator_core::job::{AttemptOutcome, JobError, JobErrorCode, JobEvent, Priority};
use sqlx::Row as _;

fn entry(attempt: u32, seq: u64, event: TaskEvent) -> Arc<LogEntry> {
    Arc::new(LogEntry {
        id: EventId { attempt, seq },
        event,
        token_ids: vec![1, 2],
        origin: None,
    })
}

fn token(attempt: u32, seq: u64) -> Arc<LogEntry> {
    entry(
        attempt,
        seq,
        TaskEvent::Token(Token {
            t: format!("{seq},"),
            i: 0,
        }),
    )
}

fn events(events: impl IntoIterator<Item = Arc<LogEntry>>) -> Progress {
    Progress {
        started_at: None,
        events: events.into_iter().collect(),
    }
}

async fn store(dir: &tempfile::TempDir) -> Store {
    Store::open(&dir.path().join("jobs.db")).await.unwrap()
}

/// Runs a statement on the writer's connection.
async fn sql(store: &Store, statement: String) {
    let statement = sqlx::AssertSqlSafe(statement);
    store
        .writer
        .run(move |conn| {
            Box::pin(async move { Ok(sqlx::raw_sql(statement).execute(conn).await.map(drop)?) })
        })
        .await
        .unwrap();
}

async fn submitted(store: &Store) -> JobId {
    let request = TaskSubmitRequest {
        model: "m".into(),
        prompt: Some("hi".into()),
        ..Default::default()
    };
    let job = Job::new(
        JobId::random(),
        request.validate().unwrap(),
        crate::clock::now(),
    );
    let id = job.id;
    let queued = Queued {
        job_id: id,
        model: job.spec.model.clone(),
        queue_position: 0,
    };
    store
        .submit(job, None, entry(0, 1, TaskEvent::Queued(queued)))
        .await
        .unwrap();
    id
}

fn ending(event: JobEvent, fence: Option<u64>, last: Arc<LogEntry>) -> Ending {
    Ending {
        event,
        fence,
        at: crate::clock::now(),
        progress: events([last]),
        usage: None,
        receipt: None,
        error: None,
        outcome: AttemptOutcome::Failed,
    }
}

fn error_event() -> TaskEvent {
    TaskEvent::Error(JobError {
        code: JobErrorCode::Cancelled,
        message: String::new(),
        retriable: false,
    })
}

// [ORCHD-003] P4
#[tokio::test]
async fn a_stale_fence_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let first = store.lease(id, "p", "w", now).await.unwrap();
    let requeue = Requeue {
        fence: first.fence,
        at: now,
        progress: Progress {
            started_at: Some(now),
            events: vec![token(1, 2)],
        },
        outcome: AttemptOutcome::WorkerLost,
        reason: "gone".into(),
        not_before: None,
        context_needed: None,
    };
    store.requeue(id, requeue.clone()).await.unwrap();
    let second = store.lease(id, "p", "w", now).await.unwrap();
    assert_eq!(
        (
            second.fence,
            second.attempt,
            second.lost,
            second.started_before
        ),
        (2, 2, 1, true)
    );
    assert_eq!(second.last_reason.as_deref(), Some("gone"));

    let before = store.job(id).await.unwrap();
    let is_stale = |result: Result<(), StoreError>| {
        matches!(
            result,
            Err(StoreError::StaleFence {
                given: 1,
                current: 2,
                ..
            })
        )
    };
    assert!(is_stale(store.progress(id, 1, events([token(1, 3)])).await));
    assert!(is_stale(store.requeue(id, requeue).await));
    let end = ending(JobEvent::Errored, Some(1), entry(1, 3, error_event()));
    assert!(is_stale(store.end(id, end).await.map(drop)));
    assert_eq!(store.job(id).await.unwrap(), before);
}

// [ORCHD-003] P5: repeated writes change nothing, and a gap refuses the whole write.
#[tokio::test]
async fn the_log_takes_every_event_once_and_no_gap() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let fence = store.lease(id, "p", "w", now).await.unwrap().fence;
    store
        .progress(id, fence, events([token(1, 2), token(1, 3)]))
        .await
        .unwrap();
    store
        .progress(id, fence, events([token(1, 3), token(1, 4)]))
        .await
        .unwrap();
    let gap = Progress {
        started_at: Some(now),
        events: vec![token(1, 6)],
    };
    assert!(matches!(
        store.progress(id, fence, gap).await,
        Err(StoreError::Corrupt(_))
    ));
    let (job, last) = store.job(id).await.unwrap().unwrap();
    assert_eq!(
        (job.status, job.text.as_str(), last.seq),
        (JobStatus::Dispatched, "2,3,4,", 4)
    );
    let start = EventId { attempt: 0, seq: 0 };
    let log = store.events_after(id, start, 100).await.unwrap();
    assert_eq!(
        log.iter().map(|entry| entry.id.seq).collect::<Vec<_>>(),
        [1, 2, 3, 4]
    );
    assert_eq!(log[1].token_ids, [1, 2]);
    let from_inside_a_row = store
        .events_after(id, EventId { attempt: 1, seq: 2 }, 100)
        .await
        .unwrap();
    assert_eq!(from_inside_a_row[0].id, EventId { attempt: 1, seq: 3 });
}

// [ORCHD-006] P16: submits are refused while the disk is full, and succeed again after; nothing of a refused batch stays.
#[tokio::test]
async fn a_full_disk_refuses_and_heals() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let kept = submitted(&store).await;
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

// [ORCHD-007] A refused command does not affect other commands of its transaction.
#[tokio::test]
async fn commands_of_one_commit_fail_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let id = submitted(&store).await;
    let now = crate::clock::now();
    let leases = (0..20).map(|_| store.lease(id, "p", "w", now));
    let results = futures_util::future::join_all(leases).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let (job, _) = store.job(id).await.unwrap().unwrap();
    assert_eq!((job.fence, job.attempts.len()), (1, 1));
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

// [ORCHD-015] With any filter, a list has the same jobs as a full scan, page after page.
#[tokio::test]
async fn lists_are_those_of_a_full_look() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir).await;
    let mut jobs = Vec::new();
    for n in 0..60 {
        let request = TaskSubmitRequest {
            model: ["a", "b", "c"][n % 3].into(),
            prompt: Some("hi".into()),
            priority: Some(Priority::ALL[n / 2 % 2]),
            ..Default::default()
        };
        let job = Job::new(
            JobId::random(),
            request.validate().unwrap(),
            crate::clock::now(),
        );
        let status = JobStatus::ALL[n * n % 7];
        jobs.push((
            job.id,
            status,
            job.spec.model.to_string(),
            job.spec.priority,
        ));
        store
            .submit(job.clone(), None, entry(0, 1, error_event()))
            .await
            .unwrap();
        sql(
            &store,
            format!(
                "UPDATE jobs SET status = '{status}' WHERE id = '{}'",
                job.id
            ),
        )
        .await;
    }
    jobs.reverse();
    let with_none = |all: &[&'static str]| -> Vec<Option<String>> {
        std::iter::once(None)
            .chain(all.iter().map(|model| Some((*model).to_owned())))
            .collect()
    };
    for status in std::iter::once(None).chain(JobStatus::ALL.map(Some)) {
        for priority in std::iter::once(None).chain(Priority::ALL.map(Some)) {
            for model in with_none(&["a", "b", "c", "d"]) {
                let expected: Vec<_> = jobs
                    .iter()
                    .filter(|(_, s, m, p)| {
                        status.is_none_or(|status| status == *s)
                            && priority.is_none_or(|priority| priority == *p)
                            && model.as_ref().is_none_or(|model| model == m)
                    })
                    .map(|(id, ..)| *id)
                    .collect();
                let mut filter = ListFilter {
                    statuses: status.into_iter().collect(),
                    priority,
                    model,
                    limit: 7,
                    ..ListFilter::default()
                };
                assert_eq!(store.count(&filter).await.unwrap(), expected.len() as u64);
                let mut found = Vec::new();
                loop {
                    let page = store.list(&filter).await.unwrap();
                    found.extend(page.iter().map(|job| job.id));
                    let Some(last) = page.last().filter(|_| page.len() == 7) else {
                        break;
                    };
                    filter.before = Some(last.id);
                }
                assert_eq!(found, expected, "{filter:?}");
            }
        }
    }
}
