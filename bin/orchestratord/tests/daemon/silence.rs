//! Open streams of workers whose pool is silent.

use std::time::Duration;

use jiff::Timestamp;
use orchestrator_core::JobStatus;
use orchestrator_core::api::pools::PoolView;
use orchestrator_core::api::tasks::TaskExplanation;
use orchestrator_core::pool::PoolLiveness;

use crate::support::{Orchestrator, eventually};

// [ORCHD-096] P7: a stream outlives any silence of its pool. If the stream then breaks, there is nothing left to wait for: the
// attempt is given up, even if nothing else happens.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_the_silence_of_its_pool_and_nothing_is_waited_for_after_it() {
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = 300).await;
    let (worker, _pool, job) = orchestrator.runs_on_a_hasty_pool().await;
    eventually("silence", async || {
        let view: PoolView = orchestrator.client.get("/v2/pools/pool-a").await.unwrap();
        (view.liveness == PoolLiveness::Offline).then_some(())
    })
    .await;
    // Longer than the window, and than a dead worker's last report may take.
    tokio::time::sleep(Duration::from_secs(3)).await;
    worker.tokens(job, 0..3);
    eventually("the text", async || {
        (orchestrator.show(job).await.text == "<0><1><2>").then_some(())
    })
    .await;
    worker.kill().await;
    let view = orchestrator.until(job, JobStatus::Queued).await;
    let reasons: Vec<_> = view.attempts.iter().map(|a| a.reason.as_deref()).collect();
    assert_eq!(reasons, [Some("pool `pool-a` is silent")]);
}

// [ORCHD-120] A job whose worker is unreachable says so, until when it waits, and what happens then.
#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_which_nothing_is_heard_says_what_it_waits_for() {
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = 5000).await;
    let (worker, _pool, job) = orchestrator.runs_on_a_hasty_pool().await;
    let path = format!("/v2/tasks/{job}/explain");
    let explain = async || {
        let explained = orchestrator.client.get::<TaskExplanation>(&path).await;
        explained.unwrap()
    };
    assert_eq!(explain().await.out_of_reach, None, "its stream is open");
    worker.kill().await;
    let unheard = eventually("the explanation", async || {
        explain()
            .await
            .out_of_reach
            .filter(|unheard| unheard.given_up_at.is_some())
    })
    .await;
    assert_eq!(
        (unheard.pool_id.as_str(), unheard.worker_id.as_str()),
        ("pool-a", "worker-cpu-0")
    );
    assert_eq!(unheard.message, "pool `pool-a` is silent");
    assert!(
        unheard.then.contains("another one continues"),
        "{unheard:?}"
    );
    let until = unheard.given_up_at.unwrap();
    let silence = until.duration_since(unheard.last_heard.unwrap());
    assert!(silence.as_secs() >= 5, "{unheard:?}");
    assert_eq!(orchestrator.show(job).await.status, JobStatus::Running);

    let view = orchestrator.until(job, JobStatus::Queued).await;
    let ended = view.attempts[0].ended_at.unwrap();
    assert!(
        until <= ended && ended <= Timestamp::now(),
        "{until} {ended}"
    );
    assert_eq!(explain().await.out_of_reach, None);
}
