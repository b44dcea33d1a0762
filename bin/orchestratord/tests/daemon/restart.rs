//! Stopping and starting on the same database.

use orchestrator_core::JobStatus;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::job::AttemptOutcome;
use serde_json::json;

use crate::support::{MODEL, Orchestrator, eventually, kept_text, one_worker, outline};

// [ORCHD-040] P3, P4, P5
#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_waiting_jobs_and_runs_running_ones_again() {
    let (orchestrator, pool, worker) = one_worker().await;
    let running = orchestrator.job().await;
    worker.request(1).await;
    worker.started(running);
    worker.tokens(running, 0..4);
    eventually("the text", async || {
        (orchestrator.show(running).await.text.len() == 12).then_some(())
    })
    .await;
    let waiting = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi", "max_attempts": 1}))
        .await
        .unwrap()
        .job_id;

    let orchestrator = orchestrator.restart().await;
    // No pool has registered yet: both wait, and neither is refused.
    for job in [running, waiting] {
        let view = orchestrator.until(job, JobStatus::Queued).await;
        assert!(view.error.is_none());
    }
    assert_eq!(orchestrator.show(running).await.text, "<0><1><2><3>");
    // Readers come back: one from where it was, one that saw tokens which were never written down.
    let resumed = orchestrator.follow(running, Some("1.6")).await.unwrap();
    let ahead = orchestrator.follow(running, Some("1.50")).await.unwrap();

    pool.register(&orchestrator).await;
    let request = worker.request(2).await;
    assert_eq!(
        (request.job_id.as_str(), request.attempt, request.fence),
        (running.to_string().as_str(), 2, 2)
    );
    worker.started(running);
    worker.tokens(running, 0..2);
    worker.end(running, 2);
    assert_eq!(
        outline(&resumed.rest().await),
        ["attempt 2.7", "token 2.8", "token 2.9", "end 2.10"]
    );
    assert_eq!(
        outline(&ahead.rest().await),
        ["attempt 2.7", "token 2.8", "token 2.9", "end 2.10"]
    );
    let view = orchestrator.until(running, JobStatus::Completed).await;
    assert_eq!(
        view.attempts[0].outcome,
        Some(AttemptOutcome::OrchestratorRestarted)
    );
    let all = orchestrator
        .follow(running, None)
        .await
        .unwrap()
        .rest()
        .await;
    assert_eq!(
        (view.text.as_str(), kept_text(&all).as_str()),
        ("<0><1>", "<0><1>")
    );
    assert!(matches!(&all[6].event, TaskEvent::Attempt(attempt) if !attempt.continues));

    assert_eq!(worker.request(3).await.job_id, waiting.to_string());
    worker.started(waiting);
    worker.end(waiting, 0);
    orchestrator.until(waiting, JobStatus::Completed).await;
}

// [ORCHD-041] P13
#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_state_is_refused() {
    let orchestrator = Orchestrator::start().await;
    let second =
        Orchestrator::start_in(orchestrator.home.clone(), orchestrator.config.clone()).await;
    let error = format!("{:#}", second.err().unwrap());
    assert!(
        error.contains("already runs") && error.contains(&std::process::id().to_string()),
        "{error}"
    );
}

// [ORCHD-002] What a restart finds is what was there.
#[tokio::test(flavor = "multi_thread")]
async fn finished_jobs_read_the_same_after_a_restart() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let done = orchestrator.job().await;
    worker.request(1).await;
    worker.started(done);
    worker.tokens(done, 0..3);
    worker.end(done, 3);
    let before = orchestrator.until(done, JobStatus::Completed).await;
    let events = orchestrator.follow(done, None).await.unwrap().rest().await;
    let orchestrator = orchestrator.restart().await;
    assert_eq!(orchestrator.show(done).await, before);
    assert_eq!(
        orchestrator.follow(done, None).await.unwrap().rest().await,
        events
    );
    assert_eq!(orchestrator.cancel(done).await, JobStatus::Completed);
}

// [ORCHD-022] [ORCHD-042] P5: an id that a reader may have seen before a crash is never that of another event.
#[tokio::test(flavor = "multi_thread")]
async fn what_ends_an_interrupted_job_follows_everything_that_was_shown_of_it() {
    let (orchestrator, pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..4);
    eventually("the text", async || {
        (orchestrator.show(job).await.text.len() == 12).then_some(())
    })
    .await;
    // The second time nothing was running any more, and still no attempt has followed.
    let orchestrator = orchestrator.restart().await.restart().await;
    let ahead = orchestrator.follow(job, Some("1.57")).await.unwrap();
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    assert_eq!(outline(&ahead.rest().await), ["error 2.7"]);
    let late = orchestrator.follow(job, Some("1.57")).await.unwrap();
    assert_eq!(outline(&late.rest().await), ["error 2.7"]);

    // The worker still computes for nobody, until its pool says where it is.
    pool.register(&orchestrator).await;
    let cancel = eventually("the orphan's cancel", async || {
        worker.cancels().first().cloned()
    })
    .await;
    assert_eq!((cancel.job_id, cancel.fence), (job.to_string(), 1));
}
