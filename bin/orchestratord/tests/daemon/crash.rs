//! The real binary, killed.

use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use pool_core::client::ApiClient;
use pool_core::run_files;
use serde_json::json;
use tokio::process::{Child, Command};

use crate::support::{MODEL, eventually};

/// Rounds of submits and kills; each has its own instant.
const ROUNDS: u64 = 4;

async fn start(home: &std::path::Path) -> (Child, ApiClient) {
    let child = Command::new(env!("CARGO_BIN_EXE_orchestratord"))
        .args(["--bind", "127.0.0.1:0"])
        .env_clear()
        .env("LLORCH_HOME", home)
        .env("LLORCH_QUEUE_CAPACITY", "-1")
        .env("LLORCH_LOG", "warn")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let state = home.join("state/orchestratord");
    let url = eventually("the daemon's address", async || {
        run_files::local_url(&state)
    })
    .await;
    let client = ApiClient::new(&url, None).unwrap();
    client.get::<serde_json::Value>("/health").await.unwrap();
    (child, client)
}

// [ORCHD-001] P1: whatever was answered 202 is there after a SIGKILL at any instant.
#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_job_survives_a_kill() {
    let home = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<JobId> = Vec::new();
    for round in 0..ROUNDS {
        let (mut daemon, client) = start(home.path()).await;
        for id in &acknowledged {
            client
                .get::<TaskView>(&format!("/v2/tasks/{id}"))
                .await
                .unwrap();
        }
        let answered = Arc::new(Mutex::new(Vec::new()));
        let submits: Vec<_> = (0..200)
            .map(|n| {
                let (client, answered) = (client.clone(), Arc::clone(&answered));
                tokio::spawn(async move {
                    let body = json!({"model": MODEL, "prompt": format!("round {round}, job {n}")});
                    if let Ok(accepted) = client.post::<_, TaskAccepted>("/v2/tasks", &body).await {
                        answered.lock().unwrap().push(accepted.job_id);
                    }
                })
            })
            .collect();
        // After a number of answers rather than a time, so that every round catches submits half-way on any machine.
        let enough = usize::try_from(round * 37 % 150).unwrap() + 1;
        eventually("some answers", async || {
            (answered.lock().unwrap().len() >= enough).then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_micros(round * 613 % 2000)).await;
        daemon.kill().await.unwrap();
        for submit in submits {
            submit.await.unwrap();
        }
        acknowledged.append(&mut answered.lock().unwrap());
    }
    let (_daemon, client) = start(home.path()).await;
    assert!(acknowledged.len() > ROUNDS as usize);
    for id in &acknowledged {
        let view = client
            .get::<TaskView>(&format!("/v2/tasks/{id}"))
            .await
            .unwrap();
        assert_eq!(view.id, *id);
    }
}
