//! Streams that are open while their pool is not heard from.

use std::time::Duration;

use orchestrator_core::JobStatus;
use orchestrator_core::api::pools::PoolView;
use orchestrator_core::pool::PoolLiveness;

use crate::support::{Orchestrator, eventually};

// [ORCHD-096] P7: a stream outlives the silence of its pool, however long that lasts. When the stream breaks then, there is
// nothing to wait for any more: the attempt is given up, though nothing else happens.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_outlives_the_silence_of_its_pool_and_nothing_is_waited_for_after_it() {
    let orchestrator = Orchestrator::start_with(|config| config.recovery_window_ms = 300).await;
    let (worker, _pool, job) = orchestrator.runs_on_a_hasty_pool().await;
    eventually("silence", async || {
        let view: PoolView = orchestrator.client.get("/v2/pools/pool-a").await.unwrap();
        (view.liveness == PoolLiveness::Offline).then_some(())
    })
    .await;
    // Longer than the window, and than the last words may take of a worker that is gone.
    tokio::time::sleep(Duration::from_secs(3)).await;
    worker.tokens(job, 0..3);
    eventually("the text", async || {
        (orchestrator.show(job).await.text == "<0><1><2>").then_some(())
    })
    .await;
    worker.kill().await;
    let view = orchestrator.until(job, JobStatus::Queued).await;
    let reasons: Vec<_> = view.attempts.iter().map(|a| a.reason.as_deref()).collect();
    assert_eq!(reasons, [Some("pool `pool-a` is not heard from")]);
}
