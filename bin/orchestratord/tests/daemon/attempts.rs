//! Attempts: cancel, loss, refusal, fences.

use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::TaskList;
use orchestrator_core::config::PrefixSharing;
use orchestrator_core::job::{AttemptOutcome, JobErrorCode};
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::worker::WorkerErrorCode;
use pool_core::worker::WorkerStatus;
use serde_json::json;

use crate::support::{
    FakePool, FakeWorker, MODEL, Orchestrator, ended, eventually, kept_text, one_worker, outline,
};

// [ORCHD-030] P9
#[tokio::test(flavor = "multi_thread")]
async fn a_waiting_job_can_be_cancelled() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let reader = orchestrator.follow(job, None).await.unwrap();
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    assert_eq!(outline(&reader.rest().await), ["queued 0.1", "error 0.2"]);
    let view = orchestrator.show(job).await;
    assert_eq!(
        (view.status, view.error.unwrap().code),
        (JobStatus::Cancelled, JobErrorCode::Cancelled)
    );
}

// [ORCHD-030] P9: no token follows the cancel, although the worker keeps sending for a while.
#[tokio::test(flavor = "multi_thread")]
async fn after_a_cancel_no_token_is_seen() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    let reader = orchestrator.follow(job, None).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..5);
    orchestrator.until(job, JobStatus::Running).await;
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Cancelled);
    let after_answer = orchestrator.follow(job, None).await.unwrap().rest().await;
    eventually("the worker's cancel", async || {
        worker.cancels().first().cloned()
    })
    .await;
    let seen = reader.rest().await;
    assert_eq!(seen, after_answer);
    let TaskEvent::Error(error) = &seen.last().unwrap().event else {
        panic!("{seen:?}")
    };
    assert_eq!(error.code, JobErrorCode::Cancelled);
    let view = orchestrator.show(job).await;
    assert_eq!(view.text, kept_text(&seen));
    assert_eq!(view.attempts[0].outcome, Some(AttemptOutcome::Cancelled));
    assert_eq!((worker.cancels()[0].fence, worker.cancels().len()), (1, 1));
}

// [ORCHD-031]
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_time_runs_out_expires() {
    let (orchestrator, _pool, worker) = one_worker().await;
    // Enough time for the job to start.
    let running = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi", "timeout_ms": 3000}))
        .await
        .unwrap()
        .job_id;
    let waiting = orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi", "timeout_ms": 300}))
        .await
        .unwrap()
        .job_id;
    worker.request(1).await;
    worker.started(running);
    for job in [running, waiting] {
        let view = orchestrator.until(job, JobStatus::Expired).await;
        assert_eq!(view.error.unwrap().code, JobErrorCode::Timeout);
    }
}

// [ORCHD-062]
#[tokio::test(flavor = "multi_thread")]
async fn jobs_of_different_sessions_share_blocks_only_where_that_is_allowed() {
    for (sharing, expected) in [
        (PrefixSharing::All, [None, None]),
        (PrefixSharing::Session, [Some("session tea"), Some("job ")]),
    ] {
        let orchestrator = Orchestrator::start_with(|config| config.prefix_sharing = sharing).await;
        let worker = FakeWorker::start("worker-cpu-0").await;
        let pool = FakePool::start("pool-a").await.has(&worker);
        pool.register(&orchestrator).await;
        worker.be_fluent();
        for session in [json!("tea"), json!(null)] {
            let body = json!({"model": MODEL, "prompt": "hi", "session_id": session});
            let job = orchestrator.submit(body).await.unwrap().job_id;
            orchestrator.until(job, JobStatus::Completed).await;
        }
        let scopes = worker
            .requests()
            .into_iter()
            .map(|request| request.cache_scope);
        for (scope, expected) in scopes.zip(expected) {
            assert_eq!(scope.is_some(), expected.is_some());
            let scope = scope.unwrap_or_default();
            assert!(scope.starts_with(expected.unwrap_or_default()), "{scope}");
        }
        assert_eq!(worker.requests().len(), 2);
    }
}

// [ORCHD-032] P5, P6, P22: further attempts continue the text, and a third loss is the last.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_worker_is_not_a_lost_job_until_the_third_time() {
    let orchestrator = Orchestrator::start().await;
    let body = json!({"model": MODEL, "prompt": "hi", "seed": 1, "allow_special": true});
    let job = orchestrator.submit(body).await.unwrap().job_id;
    let reader = orchestrator.follow(job, None).await.unwrap();
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    for attempt in 1..=3u32 {
        let worker = FakeWorker::start(&format!("worker-cpu-{attempt}")).await;
        pool.workers = vec![worker.info(WorkerStatus::Ready)];
        pool.endpoints = vec![worker.endpoint()];
        pool.beat(&orchestrator).await;
        let request = worker.request(1).await;
        assert_eq!(
            (request.attempt, request.fence),
            (attempt, u64::from(attempt))
        );
        // Another worker must read the same prompt.
        assert!(request.allow_special);
        let before = (attempt - 1) * 2;
        let resume = request.resume.unwrap_or_default();
        assert_eq!(resume.token_ids, (100..100 + before).collect::<Vec<_>>());
        assert!(!resume.seen_more);
        worker.started(job);
        worker.tokens(job, before..before + 2);
        let text: String = (0..before + 2).map(|i| format!("<{i}>")).collect();
        eventually("the attempt's text", async || {
            (orchestrator.show(job).await.text == text).then_some(())
        })
        .await;
        worker.kill().await;
        pool.workers = vec![ended(
            worker.info(WorkerStatus::Failed),
            "killed by signal 9",
            false,
        )];
        pool.endpoints.clear();
        pool.beat(&orchestrator).await;
    }
    let seen = reader.rest().await;
    assert_eq!(
        outline(&seen),
        [
            "queued 0.1",
            "started 1.2",
            "token 1.3",
            "token 1.4",
            "attempt 2.5",
            "token 2.6",
            "token 2.7",
            "attempt 3.8",
            "token 3.9",
            "token 3.10",
            "error 3.11"
        ]
    );
    let TaskEvent::Attempt(second) = &seen[4].event else {
        panic!()
    };
    assert!(
        second.continues && second.reason.contains("killed by signal 9"),
        "{second:?}"
    );
    let view = orchestrator.until(job, JobStatus::Failed).await;
    assert_eq!(view.text, kept_text(&seen));
    let error = view.error.unwrap();
    assert_eq!(error.code, JobErrorCode::WorkerLost);
    assert!(error.message.contains("killed by signal 9"), "{error:?}");
    assert_eq!(
        view.attempts.iter().map(|a| a.fence).collect::<Vec<_>>(),
        [1, 2, 3]
    );
    assert!(
        view.attempts
            .iter()
            .all(|a| a.outcome == Some(AttemptOutcome::WorkerLost))
    );
}

// [ORCHD-033] P5: a broken connection to a live worker costs nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_is_opened_again_where_it_broke() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    let reader = orchestrator.follow(job, None).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    for round in 0..4 {
        worker.tokens(job, round * 3..(round + 1) * 3);
        worker.cut_streams(job);
    }
    worker.end(job, 12);
    let seen = reader.rest().await;
    assert_eq!(seen.len(), 15, "{:?}", outline(&seen));
    assert_eq!(
        kept_text(&seen),
        (0..12).map(|i| format!("<{i}>")).collect::<String>()
    );
    assert_eq!(orchestrator.show(job).await.attempts.len(), 1);
}

// [ORCHD-096] P7: a pool's silence ends attempts without an open stream, and no others.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_pool_loses_only_what_has_no_stream() {
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = 300).await;
    let (broken, sound) = (
        FakeWorker::start("worker-cpu-0").await,
        FakeWorker::start("worker-cpu-1").await,
    );
    let mut pool = FakePool::start("pool-a").await.has(&broken);
    pool.interval_ms = 100;
    pool.register(&orchestrator).await;
    let first = orchestrator.job().await;
    pool.speaks_until("the job", &orchestrator, async || broken.requests().pop())
        .await;
    broken.started(first);
    broken.tokens(first, 0..2);
    let pool = pool.has(&sound);
    let second = orchestrator.job().await;
    pool.speaks_until("the second job", &orchestrator, async || {
        sound.requests().pop()
    })
    .await;
    sound.started(second);
    orchestrator.until(second, JobStatus::Running).await;
    eventually("the text", async || {
        (orchestrator.show(first).await.text == "<0><1>").then_some(())
    })
    .await;

    // The pool falls silent, and one of its workers becomes unreachable. Another pool sends heartbeats all the time.
    broken.kill().await;
    let elsewhere = FakeWorker::start("worker-cpu-0").await;
    let mut other = FakePool::start("pool-b").await.has(&elsewhere);
    other.interval_ms = 100;
    other.register(&orchestrator).await;
    let request = other
        .speaks_until("the further attempt", &orchestrator, async || {
            elsewhere.requests().pop()
        })
        .await;
    assert_eq!((request.job_id, request.attempt), (first.to_string(), 2));
    elsewhere.started(first);
    elsewhere.tokens(first, 2..3);
    elsewhere.end(first, 3);
    let view = orchestrator.until(first, JobStatus::Completed).await;
    assert_eq!(view.text, "<0><1><2>");
    let reason = view.attempts[0].reason.as_deref().unwrap();
    assert_eq!(reason, "pool `pool-a` is silent");

    sound.tokens(second, 0..2);
    sound.end(second, 2);
    let view = orchestrator.until(second, JobStatus::Completed).await;
    assert_eq!((view.text.as_str(), view.attempts.len()), ("<0><1>", 1));
}

// [ORCHD-093] P7: if all pools are silent, the fault is probably on this side, and no attempt is given up for a while.
#[tokio::test(flavor = "multi_thread")]
async fn silence_of_all_pools_at_once_takes_nothing_before_the_window_has_passed() {
    const WINDOW: u64 = 1200;
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = WINDOW).await;
    let start = std::time::Instant::now();
    let (worker, pool, job) = orchestrator.runs_on_a_hasty_pool().await;
    // The window after the start is over before the pool falls silent.
    let silent = eventually("the end of the first window", async || {
        let now = std::time::Instant::now();
        pool.beat(&orchestrator).await;
        (start.elapsed().as_millis() > u128::from(WINDOW) + 200).then_some(now)
    })
    .await;
    worker.kill().await;
    orchestrator.until(job, JobStatus::Queued).await;
    // Three and a half heartbeat intervals, and the window.
    let waited = silent.elapsed().as_millis();
    assert!(waited >= u128::from(WINDOW) + 350, "{waited} ms");
}

// [ORCHD-034] P6
#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_request_is_not_retried() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let refused = orchestrator.job().await;
    worker.request(1).await;
    worker.error(refused, WorkerErrorCode::ContextOverflow);
    let view = orchestrator.until(refused, JobStatus::Failed).await;
    assert_eq!(
        (view.error.unwrap().code, view.attempts.len()),
        (JobErrorCode::ContextOverflow, 1)
    );

    worker.refuse(&[WorkerErrorCode::InvalidRequest]);
    let refused = orchestrator.job().await;
    let view = orchestrator.until(refused, JobStatus::Failed).await;
    assert_eq!(
        (view.error.unwrap().code, view.attempts.len()),
        (JobErrorCode::InvalidRequest, 1)
    );
}

// [ORCHD-035]
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_full_after_all_costs_no_attempt() {
    let (orchestrator, _pool, worker) = one_worker().await;
    worker.refuse(&[WorkerErrorCode::Busy, WorkerErrorCode::Loading]);
    let job = orchestrator.job().await;
    let request = worker.request(1).await;
    assert_eq!((request.attempt, request.fence), (3, 3));
    worker.started(job);
    worker.end(job, 0);
    let view = orchestrator.until(job, JobStatus::Completed).await;
    assert!(
        view.attempts[..2]
            .iter()
            .all(|a| a.outcome == Some(AttemptOutcome::Refused)),
        "{:?}",
        view.attempts
    );
    let events = orchestrator.follow(job, None).await.unwrap().rest().await;
    assert_eq!(outline(&events), ["queued 0.1", "started 3.2", "end 3.3"]);
}

// [ORCHD-036] A slot runs one job at a time; the next job follows when the slot is free.
#[tokio::test(flavor = "multi_thread")]
async fn jobs_wait_for_a_slot_in_their_order() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let jobs = [
        orchestrator.job().await,
        orchestrator.job().await,
        orchestrator.job().await,
    ];
    for (count, job) in jobs.iter().enumerate() {
        assert_eq!(worker.request(count + 1).await.job_id, job.to_string());
        assert_eq!(worker.requests().len(), count + 1);
        worker.started(*job);
        worker.end(*job, 0);
    }
    orchestrator.until(jobs[2], JobStatus::Completed).await;
}

// [ORCHD-036] A cancelled job holds its slot until the worker has the cancel.
#[tokio::test(flavor = "multi_thread")]
async fn a_slot_is_free_when_the_worker_has_heard_the_cancel() {
    let (orchestrator, pool, worker) = one_worker().await;
    worker.slow_cancels(true);
    let cancelled = orchestrator.job().await;
    worker.request(1).await;
    worker.started(cancelled);
    let next = orchestrator.job().await;
    orchestrator.cancel(cancelled).await;
    eventually("the worker's cancel", async || {
        worker.cancels().first().cloned()
    })
    .await;
    pool.beat(&orchestrator).await;
    // A refused attempt would show as well.
    let view = orchestrator.show(next).await;
    assert_eq!((view.status, view.attempts.len()), (JobStatus::Queued, 0));
    worker.slow_cancels(false);
    assert_eq!(worker.request(2).await.job_id, next.to_string());
}

/// Damages the database's record of a job.
async fn spoil(orchestrator: &Orchestrator, job: JobId, statements: &[&'static str]) {
    use sqlx::ConnectOptions as _;
    let path = orchestrator.home.path().join("state/orchestratord/jobs.db");
    let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
    let mut conn = options.connect().await.unwrap();
    for statement in statements {
        let spoiled = sqlx::query(*statement).bind(job.to_string());
        spoiled.execute(&mut conn).await.unwrap();
    }
}

const NO_SPEC: &str = "UPDATE requests SET spec = '{}' WHERE job_id = ?";

// [ORCHD-037] A job that can't be leased fails visibly, and the next one runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_whose_record_is_broken_fails_and_is_not_left_behind() {
    let orchestrator = Orchestrator::start().await;
    let broken = orchestrator.job().await;
    let next = orchestrator.job().await;
    let reader = orchestrator.follow(broken, None).await.unwrap();
    spoil(&orchestrator, broken, &[NO_SPEC]).await;

    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    let events = reader.rest().await;
    let TaskEvent::Error(error) = &events.last().unwrap().event else {
        panic!("{events:?}")
    };
    assert_eq!(error.code, JobErrorCode::Internal);
    let failed: TaskList = orchestrator
        .client
        .get("/v2/tasks?status=failed")
        .await
        .unwrap();
    assert_eq!(failed.jobs[0].id, broken);
    assert_eq!(worker.request(1).await.job_id, next.to_string());
}

// [ORCHD-037] P3: if the failure can't be recorded, readers get no end, because the record would not have it.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_can_t_even_fail_is_let_go_without_an_end() {
    let orchestrator = Orchestrator::start().await;
    let broken = orchestrator.job().await;
    let next = orchestrator.job().await;
    let reader = orchestrator.follow(broken, None).await.unwrap();
    let no_log = "DELETE FROM events WHERE job_id = ?";
    spoil(&orchestrator, broken, &[NO_SPEC, no_log]).await;

    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    assert_eq!(outline(&reader.rest().await), ["queued 0.1"]);
    let refused = orchestrator.follow(broken, None).await.err().unwrap();
    assert_eq!(refused.status(), Some(500));
    let jobs: TaskList = orchestrator.client.get("/v2/tasks").await.unwrap();
    assert_eq!(jobs.jobs[1].status, JobStatus::Queued);
    assert_eq!(worker.request(1).await.job_id, next.to_string());
}
