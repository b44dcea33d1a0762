//! The record of earlier attempts, as a further one needs it.

use orchestrator_core::api::events::{FurtherAttempt, Started};
use pool_core::api::worker::Origin;

use super::*;

fn origin(build: &str) -> Option<Origin> {
    Some(Origin {
        model: "sha256:00".into(),
        build: build.into(),
    })
}

fn started(seq: u64, build: &str) -> Arc<LogEntry> {
    let event = TaskEvent::Started(Started {
        attempt: 1,
        pool_id: "p".into(),
        worker_id: "w".into(),
        tokens_in: 3,
        why: None,
    });
    from(build, entry(1, seq, event))
}

fn further(attempt: u32, seq: u64, build: &str, continues: bool) -> Arc<LogEntry> {
    let event = TaskEvent::Attempt(FurtherAttempt {
        attempt,
        pool_id: "p".into(),
        worker_id: "w".into(),
        tokens_in: 3,
        continues,
        reason: "gone".into(),
        why: None,
    });
    from(build, entry(attempt, seq, event))
}

fn from(build: &str, entry: Arc<LogEntry>) -> Arc<LogEntry> {
    Arc::new(LogEntry {
        token_ids: vec![],
        origin: origin(build),
        ..LogEntry::clone(&entry)
    })
}

/// Leases the job, logs the events of the attempt, and loses it.
async fn attempt(
    store: &dyn JobStore,
    job: JobId,
    events: Vec<Arc<LogEntry>>,
    outcome: AttemptOutcome,
) {
    let now = crate::clock::now();
    let fence = store.lease(job, "p", "w", now).await.unwrap().fence;
    let requeue = Requeue {
        fence,
        at: now,
        progress: Progress {
            started_at: Some(now),
            events,
        },
        outcome,
        reason: "gone".into(),
        not_before: None,
        context_needed: None,
    };
    store.requeue(job, requeue).await.unwrap();
}

// [ORCHD-032] [ORCHD-094] [ORCHD-095] [ORCHD-241]
pub async fn an_attempt_continues_from_what_is_logged(place: impl Place) {
    let store = place.open().await;
    let job = submitted(&*store).await;
    let since = crate::clock::now();
    assert_eq!(
        store.resume_point(job).await.unwrap(),
        ResumePoint::default()
    );

    let lost = AttemptOutcome::WorkerLost;
    let first = vec![started(2, "a"), token(1, 3), token(1, 4)];
    attempt(&*store, job, first, lost).await;
    let point = |token_ids: &[u32], origin_: &str, classes: &[&str]| ResumePoint {
        token_ids: token_ids.into(),
        next_index: 1,
        origin: origin(origin_),
        classes: classes.iter().map(|class| (*class).to_owned()).collect(),
        seen_more: false,
    };
    let found = store.resume_point(job).await.unwrap();
    assert_eq!(found, point(&[1, 2, 1, 2], "a", &["a"]));

    let second = vec![further(2, 5, "b", true), token(2, 6)];
    attempt(&*store, job, second, lost).await;
    let found = store.resume_point(job).await.unwrap();
    assert_eq!(found, point(&[1, 2, 1, 2, 1, 2], "b", &["a", "b"]));

    let third = vec![further(3, 7, "c", false), token(3, 8)];
    attempt(&*store, job, third, lost).await;
    let found = store.resume_point(job).await.unwrap();
    assert_eq!(found, point(&[1, 2], "c", &["c"]));

    // Readers may have seen tokens of an attempt that nothing announced, and that was not found after a restart.
    attempt(&*store, job, vec![], AttemptOutcome::OrchestratorRestarted).await;
    let seen_more = ResumePoint {
        seen_more: true,
        ..found
    };
    assert_eq!(store.resume_point(job).await.unwrap(), seen_more);
    assert!(store.recover().await.unwrap()[0].seen_more);

    let mut orphans = store.orphans(since).await.unwrap();
    orphans.sort_by_key(|orphan| orphan.fence);
    let found: Vec<_> = orphans
        .iter()
        .map(|orphan| (orphan.job, orphan.fence))
        .collect();
    assert_eq!(found, [1, 2, 3, 4].map(|fence| (job, fence)));
    let later = since + jiff::SignedDuration::from_hours(1);
    assert_eq!(store.orphans(later).await.unwrap(), []);
}
