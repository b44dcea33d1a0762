//! Steps about jobs whose worker or orchestrator dies midway.

use std::time::Duration;

use cucumber::{given, then, when};
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::job::AttemptOutcome;
use pool_core::kit::sse::SseEvent as _;
use reqwest::StatusCode;
use serde_json::{Value, json};

use super::durability::{orchestrator_pid, wait_for_end};
use super::setting::both_daemons_with_interval;
use crate::house::House;
use crate::process;
use crate::stream::{self, Received};

/// Time limit of a job that needs another worker to be started.
const JOB_LIMIT: Duration = Duration::from_secs(300);

#[given("a running orchestrator that keeps its port and a running pool")]
async fn keeps_its_port(house: &mut House) {
    // With this interval the pool is back within a second; the default would take a quarter of a minute.
    both_daemons_with_interval(house, Duration::from_millis(500)).await;
}

#[given("an undisturbed job of 60 tokens at temperature 0.8")]
async fn undisturbed(house: &mut House) {
    submit(house).await;
    house.events = follow(house, None, |_| false).await;
    house.undisturbed = std::mem::take(&mut house.events);
    assert_eq!(
        house.undisturbed.last().map(|last| last.event.name()),
        Some("end")
    );
}

/// Submits the job of these scenarios: it samples with a fixed seed, and its repetition penalty covers the whole text.
async fn submit(house: &mut House) {
    let body = json!({"model": "smollm2-135m", "raw": true, "prompt": "Once upon a time", "max_tokens": 60,
        "temperature": 0.8, "top_p": 0.95, "repetition_penalty": 1.1, "seed": 20_261_122});
    let answer = reqwest::Client::new()
        .post(house.url("/v2/tasks"))
        .json(&body)
        .send()
        .await
        .expect("the orchestrator answers");
    assert_eq!(answer.status(), StatusCode::ACCEPTED);
    let answer: Value = answer.json().await.expect("JSON");
    house.job = Some(answer["job_id"].as_str().expect("an id").to_owned());
}

async fn follow(
    house: &House,
    after: Option<&str>,
    enough: impl FnMut(&Received) -> bool + Send + 'static,
) -> Vec<Received> {
    stream::follow(&house.url("/v2/tasks/JOB/events"), after, JOB_LIMIT, enough).await
}

/// Submits the job again and follows it until it has produced this many tokens.
async fn again(house: &mut House, tokens: usize) {
    submit(house).await;
    let mut seen = 0;
    house.events = follow(house, None, move |received| {
        seen += usize::from(matches!(received.event, TaskEvent::Token(_)));
        seen == tokens
    })
    .await;
}

#[when(expr = "the same job is submitted again and its worker is killed after {int} token(s)")]
async fn worker_killed(house: &mut House, tokens: usize) {
    // Looked up first: a fast machine finishes the text while a command starts.
    let listed = house
        .succeed("llorch-pool worker list --format json")
        .await
        .stdout
        .clone();
    let listed: Value = serde_json::from_str(&listed).expect("a JSON array");
    let live = |worker: &&Value| worker["status"] == "ready" || worker["status"] == "busy";
    let worker = listed.as_array().expect("an array").iter().find(live);
    let pid = worker.expect("a worker")["pid"].as_u64().expect("a pid");
    let pid = u32::try_from(pid).expect("a process id");
    again(house, tokens).await;
    process::signal(pid, "-KILL");
}

#[when(
    expr = "the same job is submitted again and the orchestrator gets SIG{word} after {int} tokens"
)]
async fn orchestrator_ended(house: &mut House, signal: String, tokens: usize) {
    again(house, tokens).await;
    let pid = orchestrator_pid(house);
    process::signal(pid, &format!("-{signal}"));
    wait_for_end(house, pid).await;
    house.succeed("llorch orchestrator start").await;
}

#[when("I follow the rest of its events")]
async fn rest(house: &mut House) {
    let last = house.events.iter().rev().find_map(|event| event.id.clone());
    let rest = follow(house, last.as_deref(), |_| false).await;
    house.events.extend(rest);
}

/// Returns the index and the text of every token.
fn texts(events: &[Received]) -> Vec<(u32, &str)> {
    let mut texts = Vec::new();
    for received in events {
        if let TaskEvent::Token(token) = &received.event {
            texts.push((token.i, token.t.as_str()));
        }
    }
    texts
}

#[then("its text equals that of the undisturbed job, token by token")]
async fn same_tokens(house: &mut House) {
    assert_eq!(texts(&house.events), texts(&house.undisturbed));
    assert_eq!(house.task().await.text, stream::text(&house.undisturbed));
    let end = |events: &[Received]| match &events.last().expect("events").event {
        TaskEvent::End(end) => (end.tokens_in, end.tokens_out, end.stop_reason),
        other => panic!("{other:?}"),
    };
    assert_eq!(end(&house.events), end(&house.undisturbed));
}

#[then("its receipt equals that of the undisturbed job")]
async fn same_receipt(house: &mut House) {
    let receipt = |events: &[Received]| match &events.last().expect("events").event {
        TaskEvent::End(end) => end.receipt.clone().expect("a receipt"),
        other => panic!("{other:?}"),
    };
    let undisturbed = receipt(&house.undisturbed);
    assert_eq!(receipt(&house.events), undisturbed);
    assert_eq!(house.task().await.receipt, Some(*undisturbed.clone()));
    assert_eq!(undisturbed.output_tokens, 60);
}

#[then("it took two attempts, the second of which continued")]
async fn two_attempts(house: &mut House) {
    let task = house.task().await;
    let outcomes: Vec<_> = task
        .attempts
        .iter()
        .map(|attempt| attempt.outcome)
        .collect();
    assert_eq!(
        outcomes,
        [
            Some(AttemptOutcome::WorkerLost),
            Some(AttemptOutcome::Completed)
        ],
        "{task:#?}"
    );
    let attempts: Vec<_> = house
        .events
        .iter()
        .filter_map(|received| match &received.event {
            TaskEvent::Attempt(attempt) => Some((attempt.attempt, attempt.continues)),
            _ => None,
        })
        .collect();
    assert_eq!(attempts, [(2, true)]);
}

#[then("it took one attempt")]
async fn one_attempt(house: &mut House) {
    let task = house.task().await;
    assert_eq!(task.attempts.len(), 1, "{task:#?}");
}

#[then("its stream can be resumed from every event with the same rest")]
async fn every_place(house: &mut House) {
    let whole = follow(house, None, |_| false).await;
    let shown = |events: &[Received]| -> Vec<_> {
        let logged = events.iter().filter(|received| received.event.is_logged());
        logged
            .map(|received| (received.id.clone(), received.event.clone()))
            .collect()
    };
    assert_eq!(shown(&house.events), shown(&whole));
    for (place, received) in (1..).zip(&whole) {
        let rest = follow(house, received.id.as_deref(), |_| false).await;
        assert_eq!(
            shown(&rest),
            shown(&whole[place..]),
            "after {:?}",
            received.id
        );
    }
}

#[then("a late call for the first attempt is refused")]
async fn late_word(house: &mut House) {
    let task = house.task().await;
    let latest = task.attempts.last().expect("attempts");
    let record = house
        .home()
        .join("state/pool/workers")
        .join(format!("{}.json", latest.worker_id));
    let record = std::fs::read_to_string(record).expect("the worker has a record");
    let record: Value = serde_json::from_str(&record).expect("JSON");
    let url = format!("http://127.0.0.1:{}", record["port"]);
    let secret = record["secret"].as_str().expect("a secret");
    let client = reqwest::Client::new();
    // The job is over, and its buffer is gone. Another job with the same id and the latest fence takes its place.
    let request = |fence: u64| json!({"job_id": task.id, "attempt": fence, "fence": fence, "prompt": "x", "raw": true, "seed": 1, "max_tokens": 1});
    let post = async |path: &str, body: Value| {
        let answer = client
            .post(format!("{url}{path}"))
            .bearer_auth(secret)
            .json(&body);
        answer.send().await.expect("the worker answers")
    };
    let current = post("/execute", request(latest.fence)).await;
    assert!(current.status().is_success(), "{current:?}");
    let cancel = json!({"job_id": task.id, "fence": latest.fence - 1});
    for (path, body) in [("/execute", request(latest.fence - 1)), ("/cancel", cancel)] {
        let late = post(path, body).await;
        assert_eq!(late.status(), StatusCode::CONFLICT, "{path}");
        let error: Value = late.json().await.expect("JSON");
        assert_eq!(error["error"]["code"], "STALE_FENCE");
    }
}
