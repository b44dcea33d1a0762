use orchestrator_core::JobStatus;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::job::{AttemptOutcome, JobErrorCode};

use super::attempt_end::AttemptEnd;
use super::*;
use crate::clock;
use crate::testing::{Parts, task};

/// Returns the attempt that a pass begins for the only waiting job.
fn attempt(parts: &Parts, queued: &QueuedJob) -> Attempt {
    let slot = parts.pass().pop().expect("the worker has a free slot");
    Attempt {
        dispatcher: Arc::clone(&parts.dispatcher),
        live: parts.jobs.live.get(queued.id).unwrap(),
        queued: queued.clone(),
        slot,
    }
}

/// Submits a task that gives up after `max_attempts` lost attempts, to a fleet of one worker with one slot.
async fn submitted(max_attempts: u32) -> (Parts, QueuedJob) {
    let parts = Parts::new(&OrchestratorConfig::default()).await;
    parts.report_a_worker();
    let mut spec = task("hi");
    spec.max_attempts = max_attempts;
    let id = parts.submit(spec, None).await.unwrap().id;
    let (job, _) = parts.jobs.store.job(id).await.unwrap().unwrap();
    (parts, QueuedJob::new(&job, None))
}

fn endpoint(parts: &Parts) -> WorkerEndpoint {
    parts.fleet.endpoint("p", "w").unwrap()
}

async fn status(parts: &Parts, job: JobId) -> JobStatus {
    parts.jobs.store.status(job).await.unwrap().unwrap()
}

// [ORCHD-243] P2
#[tokio::test]
async fn lost_attempts_are_repeated_after_a_pause_until_the_job_fails() {
    let (parts, queued) = submitted(2).await;
    let first = attempt(&parts, &queued);
    let lease = first.lease().await.unwrap();
    let lost = AttemptEnd::Lost("its pool is gone".into());
    first.apply_end(&lease, &endpoint(&parts), lost).await;
    assert_eq!(status(&parts, queued.id).await, JobStatus::Queued);
    // It backs off: a pass at once gives it no slot, although one is free.
    assert!(parts.pass().is_empty());
    let waiting = parts.jobs.live.waiting(queued.id, clock::now()).unwrap();
    assert!(
        waiting
            .explanation
            .message
            .contains("the next one can start in")
    );

    // Puts it back without the pause.
    parts.jobs.live.forget(queued.id);
    parts.jobs.live.insert(Arc::clone(&first.live));
    parts.jobs.live.put(queued.clone());
    let second = attempt(&parts, &queued);
    let lease = second.lease().await.unwrap();
    assert_eq!((lease.attempt, lease.fence, lease.lost), (2, 2, 1));
    let lost = AttemptEnd::Lost("it was killed".into());
    second.apply_end(&lease, &endpoint(&parts), lost).await;
    let view = parts.jobs.view(queued.id).await.unwrap().unwrap();
    let error = view.error.unwrap();
    assert_eq!(
        (view.status, error.code),
        (JobStatus::Failed, JobErrorCode::WorkerLost)
    );
    assert_eq!(
        error.message,
        "2 of 2 attempts were lost; the last: it was killed"
    );
    assert!(parts.jobs.live.leases().is_empty());
}

// [ORCHD-243]
#[tokio::test]
async fn a_refused_attempt_does_not_count() {
    let (parts, queued) = submitted(1).await;
    let first = attempt(&parts, &queued);
    let lease = first.lease().await.unwrap();
    first
        .requeue_with_retry(
            &lease,
            queued.clone(),
            AttemptOutcome::Refused,
            "full".into(),
        )
        .await;
    let second = attempt(&parts, &queued);
    let lease = second.lease().await.unwrap();
    assert_eq!((lease.attempt, lease.lost), (2, 0));
}

// [ORCHD-243] P5
#[tokio::test]
async fn a_job_that_ended_gets_no_attempt_and_no_second_end() {
    let (parts, queued) = submitted(3).await;
    let late = attempt(&parts, &queued);
    parts.jobs.cancel(queued.id).await.unwrap();
    assert!(late.lease().await.is_none());
    late.end_with_retry(None, JobEnd::internal()).await;
    assert_eq!(status(&parts, queued.id).await, JobStatus::Cancelled);
    // Its slot is still held until the worker has stopped.
    assert_eq!(parts.jobs.live.leases().len(), 1);
    late.release_unless_stopping();
    assert!(parts.jobs.live.leases().is_empty());
}
