use futures_util::StreamExt as _;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::{JobErrorCode, JobSpec};
use orchestrator_core::{JobId, JobStatus};
use pool_core::kit::sse::SseEvent as _;

use super::*;
use crate::state::{Fingerprint, IdempotencyKey, StoreError};
use crate::testing::{Parts, task};

/// Returns the same key for any request.
fn key(spec: &JobSpec) -> Option<IdempotencyKey> {
    Some(IdempotencyKey {
        caller: "operator".into(),
        key: "k".into(),
        fingerprint: Fingerprint::of(spec, false).unwrap(),
    })
}

/// Returns the names of the events that a reader gets until the job ends.
async fn events(jobs: &JobService, id: JobId) -> Vec<&'static str> {
    let feed = jobs.follow(id, None).await.unwrap().unwrap();
    let logged = feed.filter_map(async |item| match item {
        Feed::Logged(entry) => Some(entry.event.name()),
        Feed::Momentary(_) | Feed::Stopping => None,
    });
    logged.collect().await
}

// [ORCHD-243] P1, P5
#[tokio::test]
async fn a_cancelled_job_has_one_end_for_readers_from_before_and_after() {
    let parts = Parts::new(&OrchestratorConfig::default()).await;
    let jobs = &parts.jobs;
    let id = parts.submit(task("hi"), None).await.unwrap().id;
    let (seen, _) = tokio::join!(events(jobs, id), jobs.cancel(id));
    assert_eq!(seen, ["queued", "error"]);
    assert_eq!(events(jobs, id).await, ["queued", "error"]);

    let view = jobs.view(id).await.unwrap().unwrap();
    assert_eq!(view.status, JobStatus::Cancelled);
    let error = view.error.unwrap();
    assert_eq!(error.code, JobErrorCode::Cancelled);
    // A repeated cancel reports the first end, and an unknown job is none.
    assert_eq!(jobs.cancel(id).await.unwrap(), Some(JobStatus::Cancelled));
    assert_eq!(jobs.cancel(JobId::random()).await.unwrap(), None);
}

// [ORCHD-243] P3
#[tokio::test]
async fn a_repeated_request_gets_its_job_even_when_the_queue_is_full() {
    let mut config = OrchestratorConfig::default();
    config.queue.capacity = 1;
    let parts = Parts::new(&config).await;
    let (same, other) = (task("hi"), task("other"));
    let first = parts.submit(same.clone(), key(&same)).await.unwrap();
    let again = parts.submit(same.clone(), key(&same)).await.unwrap();
    assert_eq!((again.id, again.position), (first.id, Some(0)));

    let other = parts.submit(other.clone(), key(&other)).await;
    let taken = StoreError::KeyMismatch(first.id).to_string();
    assert_eq!(other.unwrap_err().to_string(), taken);
    let full = parts.submit(task("one more"), None).await;
    assert!(matches!(full, Err(SubmitError::Queue(_))), "{full:?}");
    // A refused task leaves nothing behind: its place is free again.
    parts.jobs.cancel(first.id).await.unwrap();
    parts.submit(task("one more"), None).await.unwrap();
}

// [ORCHD-243]
#[tokio::test]
async fn a_stopping_daemon_accepts_no_task_and_lets_readers_go() {
    let parts = Parts::new(&OrchestratorConfig::default()).await;
    let id = parts.submit(task("hi"), None).await.unwrap().id;
    let feed = parts.jobs.follow(id, None).await.unwrap().unwrap();
    parts.jobs.shutdown.trigger();
    let items: Vec<_> = feed.collect().await;
    assert!(matches!(items.last(), Some(Feed::Stopping)), "{items:?}");
    let refused = parts.submit(task("hi"), None).await;
    assert!(matches!(refused, Err(SubmitError::Stopping)));
}

// [ORCHD-110]
#[tokio::test]
async fn a_waiting_job_is_explained_until_it_has_a_place() {
    let parts = Parts::new(&OrchestratorConfig::default()).await;
    let id = parts.submit(task("hi"), None).await.unwrap().id;
    parts.pass();
    let explained = parts.jobs.explain(&parts.fleet, id).await.unwrap().unwrap();
    let waiting = explained.waiting.unwrap().explanation;
    assert_eq!(waiting.message, "no pool has registered");

    parts.report_a_worker();
    assert_eq!(parts.pass().len(), 1);
    let explained = parts.jobs.explain(&parts.fleet, id).await.unwrap().unwrap();
    assert!(explained.waiting.is_none(), "{explained:?}");
    let unknown = parts.jobs.explain(&parts.fleet, JobId::random()).await;
    assert!(unknown.unwrap().is_none());
}
