//! The real binary, killed.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use orchestrator_core::JobId;
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use serde_json::json;

use crate::support::{MODEL, Process, eventually};

/// Rounds of submits and kills, each with a kill at a different moment.
const ROUNDS: u64 = 4;

// [ORCHD-001] P1: every job answered with 202 is there after a SIGKILL at any moment.
#[tokio::test(flavor = "multi_thread")]
async fn every_acknowledged_job_survives_a_kill() {
    let mut home = Arc::new(tempfile::tempdir().unwrap());
    let mut acknowledged: Vec<JobId> = Vec::new();
    for round in 0..ROUNDS {
        let daemon = Process::start_in(home).await;
        let client = daemon.client.clone();
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
        // Kill after a number of answers, not a time, so that every round catches submits half-way on any machine.
        let enough = usize::try_from(round * 37 % 150).unwrap() + 1;
        eventually("some answers", async || {
            (answered.lock().unwrap().len() >= enough).then_some(())
        })
        .await;
        tokio::time::sleep(Duration::from_micros(round * 613 % 2000)).await;
        home = daemon.end("-KILL").await;
        for submit in submits {
            submit.await.unwrap();
        }
        acknowledged.append(&mut answered.lock().unwrap());
    }
    let daemon = Process::start_in(home).await;
    let client = &daemon.client;
    assert!(acknowledged.len() > ROUNDS as usize);
    for id in &acknowledged {
        let view = client
            .get::<TaskView>(&format!("/v2/tasks/{id}"))
            .await
            .unwrap();
        assert_eq!(view.id, *id);
    }
}
