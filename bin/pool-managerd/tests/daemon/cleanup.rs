//! Cleanup after ended workers.

use pool_core::api::pool::{CleanupReport, WorkerList};
use pool_core::worker::WorkerStatus;
use serde_json::json;

use crate::support::{Host, refusal};

#[tokio::test] // [POOLD-084]
async fn ended_workers_are_forgotten_and_live_ones_stay() {
    let host = Host::new();
    let daemon = host.start().await;
    let live = daemon.ready(&host).await;
    let over = daemon.ready(&host).await;
    daemon.stop_worker(&over.id, false).await.unwrap();
    daemon.until_status(&over.id, WorkerStatus::Stopped).await;
    let log = host
        .home()
        .logs_dir()
        .join(format!("workers/{}.log", over.id));
    assert!(log.exists());

    let report: CleanupReport = daemon
        .client
        .post("/workers/cleanup", &json!({}))
        .await
        .unwrap();
    assert_eq!(
        (report.forgotten, report.reaped.len()),
        (vec![over.id.clone()], 0)
    );
    assert!(report.freed_bytes > 0 && !log.exists());
    let list: WorkerList = daemon.client.get("/workers").await.unwrap();
    let ids: Vec<_> = list.workers.iter().map(|worker| &worker.id).collect();
    assert_eq!(ids, [&live.id]);
    let gone = daemon.stop_worker(&over.id, false).await;
    assert_eq!(refusal(gone), (404, "WORKER_NOT_FOUND".into()));
    daemon.shut_down().await;
}
