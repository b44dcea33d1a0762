//! The drain of a pool.

use std::time::Duration;

use futures_util::StreamExt;
use pool_core::api::pool::{DrainRequest, PoolStatus};
use pool_core::kit::client::{ApiClient, Method};
use pool_core::worker::WorkerStatus;
use serde_json::{Value, json};

use crate::support::{Daemon, Host, refusal, until};

async fn drain(daemon: &Daemon, request: DrainRequest) -> PoolStatus {
    daemon.client.post("/drain", &request).await.unwrap()
}

/// Starts a job on the worker, which runs until the test lets its tokens out.
pub async fn job(client: &ApiClient, worker: &str) -> pool_core::kit::client::EventStream {
    let request = client
        .request(Method::POST, &format!("/workers/{worker}/execute"))
        .json(&json!({"job_id": "job-1", "attempt": 1, "fence": 7, "prompt": "x", "seed": 1, "max_tokens": 5}));
    client.events(request).await.unwrap()
}

#[tokio::test] // [POOLD-080]
async fn a_drained_pool_takes_no_workers_and_leaves_those_it_has() {
    let host = Host::new();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    let drained: PoolStatus = daemon.client.post("/drain", &()).await.unwrap();
    assert!(drained.draining);
    assert_eq!(drained.drain.unwrap().remaining, [""; 0], "it runs nothing");
    for _ in 0..2 {
        assert_eq!(
            refusal(daemon.spawn(&host.request("serve")).await),
            (503, "POOL_DRAINING".into())
        );
        assert_eq!(
            refusal(daemon.client.get::<Value>("/ready").await),
            (503, "POOL_DRAINING".into())
        );
    }
    let too_long = json!({"deadline_ms": 8 * 24 * 3_600_000u64});
    let refused = daemon.client.post::<_, Value>("/drain", &too_long).await;
    assert_eq!(refusal(refused), (400, "INVALID_REQUEST".into()));
    assert_eq!(daemon.worker(&worker.id).await.status, WorkerStatus::Ready);

    let resumed: PoolStatus = daemon.client.post("/resume", &()).await.unwrap();
    assert!(!resumed.draining && resumed.drain.is_none());
    daemon.spawn(&host.request("serve")).await.unwrap();
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-081]
async fn with_stop_workers_each_ends_when_it_has_finished() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let (idle, busy) = (daemon.ready(&host).await, daemon.ready(&host).await);
    let mut events = job(&daemon.client, &busy.id).await;
    until("it is at work", async || {
        (daemon.worker(&busy.id).await.active > 0).then_some(())
    })
    .await;
    let request = DrainRequest {
        stop_workers: true,
        ..DrainRequest::default()
    };
    let drained = drain(&daemon, request).await.drain.unwrap();
    assert_eq!(drained.remaining, [idle.id.clone(), busy.id.clone()]);
    daemon.until_status(&idle.id, WorkerStatus::Stopped).await;
    let status: PoolStatus = daemon.client.get("/status").await.unwrap();
    assert_eq!(
        status.drain.unwrap().remaining,
        std::slice::from_ref(&busy.id)
    );
    assert_eq!(daemon.worker(&busy.id).await.active, 1);

    host.let_out(5);
    let mut last = None;
    while let Some(event) = events.next().await {
        last = Some(event.unwrap().event);
    }
    assert_eq!(last.as_deref(), Some("end"));
    daemon.until_status(&busy.id, WorkerStatus::Stopped).await;
    let status: PoolStatus = daemon.client.get("/status").await.unwrap();
    assert_eq!(status.drain.unwrap().remaining, [""; 0]);
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-082]
async fn at_the_deadline_what_still_runs_is_stopped_oldest_first() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let busy = [daemon.ready(&host).await, daemon.ready(&host).await];
    let idle = daemon.ready(&host).await;
    for worker in &busy {
        job(&daemon.client, &worker.id).await;
    }
    until("both are at work", async || {
        let first = daemon.worker(&busy[0].id).await.active;
        (first + daemon.worker(&busy[1].id).await.active == 2).then_some(())
    })
    .await;
    let request = DrainRequest {
        deadline_ms: Some(1_500),
        stop_workers: false,
    };
    let drained = drain(&daemon, request).await.drain.unwrap();
    assert_eq!(drained.remaining, busy.clone().map(|worker| worker.id));
    let deadline = drained.deadline.unwrap();
    assert_eq!(
        deadline.duration_since(drained.since).as_millis(),
        1_500,
        "{drained:?}"
    );
    let [first, second] = &busy;
    let first = daemon.until_status(&first.id, WorkerStatus::Stopped).await;
    let second = daemon.until_status(&second.id, WorkerStatus::Stopped).await;
    for ended in [first, second] {
        assert!(ended.exit.unwrap().at >= deadline);
    }
    assert_eq!(daemon.worker(&idle.id).await.status, WorkerStatus::Ready);
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-080]
async fn a_repeated_drain_keeps_the_deadline_unless_it_has_one() {
    let host = Host::new();
    let daemon = host.start().await;
    let request = |deadline_ms| DrainRequest {
        deadline_ms,
        stop_workers: false,
    };
    let deadline = async |ms| drain(&daemon, request(ms)).await.drain.unwrap().deadline;
    let first = deadline(Some(600_000)).await;
    assert!(first.is_some());
    assert_eq!(deadline(None).await, first);
    assert!(deadline(Some(1_200_000)).await > first);
    daemon.shut_down().await;
}

#[tokio::test] // [POOLD-083]
async fn a_drain_survives_the_daemon() {
    let host = Host::new().executing();
    let daemon = host.start().await;
    let worker = daemon.ready(&host).await;
    job(&daemon.client, &worker.id).await;
    until("it is at work", async || {
        (daemon.worker(&worker.id).await.active > 0).then_some(())
    })
    .await;
    let request = DrainRequest {
        deadline_ms: Some(100),
        stop_workers: true,
    };
    // The daemon stops before the deadline, which passes while no daemon runs.
    let before = drain(&daemon, request).await.drain.unwrap();
    daemon.shut_down().await;
    tokio::time::sleep(Duration::from_millis(150)).await;

    let daemon = host.start().await;
    let after: PoolStatus = daemon.client.get("/status").await.unwrap();
    let after = after.drain.expect("it still drains");
    assert_eq!(
        (after.since, after.deadline, after.stop_workers),
        (before.since, before.deadline, true)
    );
    assert_eq!(
        refusal(daemon.spawn(&host.request("serve")).await),
        (503, "POOL_DRAINING".into())
    );
    daemon.until_status(&worker.id, WorkerStatus::Stopped).await;
    daemon.shut_down().await;
}
