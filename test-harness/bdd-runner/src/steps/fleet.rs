//! Steps about the orchestrator's knowledge of pools: after a restart, a stop, a change.

use std::time::{Duration, Instant};

use cucumber::{given, then, when};
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::durability::{orchestrator_pid, wait_for_end};
use super::setting::both_daemons_with_interval;
use crate::house::{House, test_model};
use crate::process;

#[given("a running orchestrator that keeps its port and a pool that reports every 10 minutes")]
async fn rare_reports(house: &mut House) {
    // With this interval, only a request or a change causes a report within the scenario.
    both_daemons_with_interval(house, Duration::from_mins(10)).await;
}

#[given("the pool has an idle worker")]
async fn idle_worker(house: &mut House) {
    house
        .succeed("llorch-pool worker spawn cpu --model smollm2-135m --wait")
        .await;
}

#[given(expr = "a copy of the default model at {string}")]
fn copy(house: &mut House, path: String) {
    // The last tensor differs by a byte: the catalogue's own file would be imported under the catalogue's name.
    let mut bytes = std::fs::read(test_model()).expect("the test model can be read");
    *bytes.last_mut().expect("the file is not empty") ^= 1;
    std::fs::write(house.fill(&path), bytes).expect("it can be written");
}

#[when(expr = "the orchestrator gets SIG{word} and starts again")]
async fn restarted(house: &mut House, signal: String) {
    let pid = orchestrator_pid(house);
    process::signal(pid, &format!("-{signal}"));
    wait_for_end(house, pid).await;
    house.succeed("llorch orchestrator start").await;
}

#[then(expr = "a job that is submitted now goes to that worker within {int} seconds")]
async fn dispatched(house: &mut House, seconds: u64) {
    let begun = Instant::now();
    let body = json!({"model": "smollm2-135m", "prompt": "hi", "max_tokens": 1});
    let answer = reqwest::Client::new()
        .post(house.url("/v2/tasks"))
        .json(&body)
        .send()
        .await
        .expect("the orchestrator answers");
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let answer: Value = answer.json().await.expect("JSON");
    house.job = Some(answer["job_id"].as_str().expect("an id").to_owned());
    let first = loop {
        if let Some(attempt) = house.task().await.attempts.into_iter().next() {
            break attempt;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(seconds),
            "the job waits"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    assert_eq!(first.worker_id, "worker-cpu-0");
    println!(
        "dispatched {} ms after the submit",
        begun.elapsed().as_millis()
    );
}
