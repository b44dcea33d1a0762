//! Commands and what they leave in the record.

use super::*;

// [ORCHD-003] P4
pub async fn a_stale_fence_changes_nothing(place: impl Place) {
    let store = place.open().await;
    let id = submitted(&*store).await;
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
pub async fn the_log_takes_every_event_once_and_no_gap(place: impl Place) {
    let store = place.open().await;
    let id = submitted(&*store).await;
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

// [ORCHD-007] A refused command does not affect other commands of its transaction.
pub async fn commands_of_one_commit_fail_alone(place: impl Place) {
    let store = place.open().await;
    let id = submitted(&*store).await;
    let now = crate::clock::now();
    let leases = (0..20).map(|_| store.lease(id, "p", "w", now));
    let results = futures_util::future::join_all(leases).await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let (job, _) = store.job(id).await.unwrap().unwrap();
    assert_eq!((job.fence, job.attempts.len()), (1, 1));
}
