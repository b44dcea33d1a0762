//! Receipts, from a worker's `end` to the clients that read the job.

use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::WorkerErrorCode;
use pool_core::worker::WorkerStatus;
use serde_json::json;

use crate::support::{
    Api, FakePool, FakeWorker, MODEL, Orchestrator, ended, eventually, one_worker,
};

/// Returns a job's receipts: the one in its view, and the one in its event stream.
async fn receipts(api: &Api, job: JobId) -> [Option<Receipt>; 2] {
    let events = api.follow(job, None).await.unwrap().rest().await;
    let streamed = match &events.last().unwrap().event {
        TaskEvent::End(end) => end.receipt.as_deref().cloned(),
        _ => None,
    };
    [api.show(job).await.receipt, streamed]
}

// [ORCHD-240]
#[tokio::test(flavor = "multi_thread")]
async fn a_receipt_is_shown_streamed_and_there_after_a_restart() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    let reader = orchestrator.follow(job, None).await.unwrap();
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..3);
    orchestrator.until(job, JobStatus::Running).await;
    assert_eq!(orchestrator.show(job).await.receipt, None);
    let receipt = worker.receipt(job, 3);
    worker.end(job, 3);
    let seen = reader.rest().await;
    let TaskEvent::End(end) = &seen.last().unwrap().event else {
        panic!("{seen:?}")
    };
    assert_eq!(end.receipt.as_deref(), Some(&receipt));
    let expected = [Some(receipt.clone()), Some(receipt)];
    assert_eq!(receipts(&orchestrator, job).await, expected);
    let orchestrator = orchestrator.restart().await;
    assert_eq!(receipts(&orchestrator, job).await, expected);
    assert_eq!(
        orchestrator.follow(job, None).await.unwrap().rest().await,
        seen
    );
    orchestrator.stop().await;
}

// [ORCHD-240] A worker of an earlier build sends no receipt, and an incomplete text has none.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_without_a_receipt_ends_as_before() {
    let (orchestrator, _pool, worker) = one_worker().await;
    for (number, last) in (1..).zip([
        JobStatus::Completed,
        JobStatus::Failed,
        JobStatus::Cancelled,
    ]) {
        let job = orchestrator.job().await;
        worker.request(number).await;
        worker.started(job);
        worker.tokens(job, 0..2);
        orchestrator.until(job, JobStatus::Running).await;
        match last {
            JobStatus::Completed => worker.end_with(job, 2, None),
            JobStatus::Failed => worker.error(job, WorkerErrorCode::InvalidRequest),
            _ => {
                orchestrator.cancel(job).await;
            }
        }
        orchestrator.until(job, last).await;
        assert_eq!(receipts(&orchestrator, job).await, [None, None], "{last}");
    }
    orchestrator.stop().await;
}

// [ORCHD-241] Each worker knows only the attempt before its own; the log knows which attempts computed tokens.
#[tokio::test(flavor = "multi_thread")]
async fn the_receipt_of_a_continued_text_names_the_arithmetic_of_all_its_tokens() {
    let orchestrator = Orchestrator::start().await;
    let body = json!({"model": MODEL, "prompt": "hi", "max_attempts": 9});
    let job = orchestrator.submit(body).await.unwrap().job_id;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    // The third attempt computes nothing.
    for (build, from, until) in [
        ("cpu 1", 0, 2),
        ("cpu 2", 2, 4),
        ("cpu 3", 4, 4),
        ("cpu 4", 4, 6),
    ] {
        let worker = FakeWorker::start(&format!("worker of {build}")).await;
        pool.workers = vec![worker.info(WorkerStatus::Ready)];
        pool.endpoints = vec![worker.endpoint()];
        pool.beat(&orchestrator).await;
        worker.request(1).await;
        worker.started_as(job, build);
        worker.tokens(job, from..until);
        let text: String = (0..until).map(|i| format!("<{i}>")).collect();
        eventually("the attempt's text", async || {
            let view = orchestrator.show(job).await;
            (view.status == JobStatus::Running && view.text == text).then_some(())
        })
        .await;
        if build == "cpu 4" {
            worker.end(job, until);
            orchestrator.until(job, JobStatus::Completed).await;
            break;
        }
        worker.kill().await;
        let gone = worker.info(WorkerStatus::Failed);
        pool.workers = vec![ended(gone, "killed by signal 9", false)];
        pool.endpoints.clear();
        pool.beat(&orchestrator).await;
    }
    for receipt in receipts(&orchestrator, job).await {
        let receipt = receipt.unwrap();
        assert_eq!(receipt.arithmetic, "cpu 4");
        assert_eq!(receipt.earlier_arithmetic, ["cpu 1", "cpu 2"]);
        assert_eq!(receipt.output_tokens, 6);
    }
    orchestrator.stop().await;
}

// [ORCHD-241] Tokens computed before a void are not part of the text.
#[tokio::test(flavor = "multi_thread")]
async fn void_text_leaves_no_trace_in_the_receipt() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let first = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&first);
    pool.register(&orchestrator).await;
    first.request(1).await;
    first.started_as(job, "cpu 1");
    first.tokens(job, 0..2);
    eventually("the text", async || {
        (orchestrator.show(job).await.text == "<0><1>").then_some(())
    })
    .await;
    first.kill().await;
    let second = FakeWorker::start("worker-cpu-1").await;
    let gone = first.info(WorkerStatus::Failed);
    pool.workers = vec![ended(gone, "killed by signal 9", false)];
    pool.endpoints.clear();
    let pool = pool.has(&second);
    pool.beat(&orchestrator).await;
    second.request(1).await;
    second.starts_over(job, "cpu 2");
    second.tokens(job, 0..3);
    second.end(job, 3);
    orchestrator.until(job, JobStatus::Completed).await;
    for receipt in receipts(&orchestrator, job).await {
        let receipt = receipt.unwrap();
        assert_eq!(receipt.arithmetic, "cpu 2");
        assert!(receipt.earlier_arithmetic.is_empty(), "{receipt:?}");
    }
    orchestrator.stop().await;
}
