//! Retention in a daemon: the deleted texts, and the records that stay.

use orchestrator_core::JobStatus;
use serde_json::json;

use crate::support::{FakePool, FakeWorker, MODEL, Orchestrator, eventually};

// [ORCHD-074] [ORCHD-075] P11
#[tokio::test(flavor = "multi_thread")]
async fn the_events_of_a_job_that_ended_long_ago_are_gone_and_its_state_is_kept() {
    let orchestrator = Orchestrator::start_with(|config| config.store.retention_s = 1).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    const SECRET: &str = "what nobody shall find again";
    let body = json!({"model": MODEL, "prompt": SECRET});
    let job = orchestrator.submit(body).await.unwrap().job_id;
    worker.request(1).await;
    let waiting = orchestrator.job().await;
    worker.started(job);
    worker.tokens(job, 0..3);
    worker.end(job, 3);
    orchestrator.until(job, JobStatus::Completed).await;
    let dropped = eventually("the end of its time", async || {
        Some(orchestrator.show(job).await).filter(|view| view.dropped_at.is_some())
    })
    .await;
    assert_eq!(
        (dropped.status, dropped.text.as_str()),
        (JobStatus::Completed, "")
    );
    assert_eq!(dropped.usage.as_ref().unwrap().tokens_out, 3);

    // The text is in no file any more, although the daemon keeps writing to them.
    let state = orchestrator.home.path().join("state/orchestratord");
    let holds = |file: std::io::Result<std::fs::DirEntry>| {
        let bytes = std::fs::read(file.unwrap().path()).unwrap();
        let mut parts = bytes.windows(SECRET.len());
        parts.any(|part| part == SECRET.as_bytes())
    };
    eventually("the end of the text", async || {
        let mut files = std::fs::read_dir(&state).unwrap();
        (!files.any(holds)).then_some(())
    })
    .await;

    let orchestrator = orchestrator.restart().await;
    for after in [None, Some("1.3"), Some("9.99")] {
        let refused = orchestrator.follow(job, after).await.err().unwrap();
        assert_eq!(refused.status(), Some(410));
        let error = refused.api().unwrap();
        assert_eq!(error.code, "EVENTS_GONE");
        assert!(error.hint.as_ref().unwrap().contains("store.retention_s"));
    }
    assert_eq!(orchestrator.cancel(job).await, JobStatus::Completed);
    // A job that is not over keeps everything, however long it waits.
    let view = orchestrator.show(waiting).await;
    assert!(!view.status.is_terminal(), "{}", view.status);
    assert_eq!(view.dropped_at, None);
    assert_eq!(
        serde_json::to_value(&view.request.input).unwrap(),
        json!({"prompt": "hi"})
    );
    assert_eq!(view.request.model.to_string(), MODEL);
}
