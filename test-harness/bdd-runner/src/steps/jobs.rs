//! Steps about jobs and their streams.

use std::time::{Duration, Instant};

use cucumber::gherkin::Step;
use cucumber::{then, when};
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::job::JobStatus;
use pool_core::kit::sse::SseEvent as _;
use serde_json::{Value, json};

use crate::house::{House, WAIT_LIMIT};
use crate::{process, stream};

/// Time limit of a job.
const JOB_LIMIT: Duration = Duration::from_secs(300);

#[when(expr = "I submit a job of {int} tokens with the prompt {string}")]
async fn submit(house: &mut House, tokens: u32, prompt: String) {
    let line = format!(
        "llorch jobs submit --model smollm2-135m --raw --temperature 0 --max-tokens {tokens} --detach --prompt \"{prompt}\""
    );
    let job = house.succeed(&line).await.stdout.trim().to_owned();
    assert!(job.starts_with("job-"), "`--detach` prints the id: {job:?}");
    house.job = Some(job);
}

#[when(expr = "I submit a job at temperature {float} with the prompt {string}")]
async fn submit_warm(house: &mut House, temperature: f64, prompt: String) {
    let line = format!(
        "llorch jobs submit --model smollm2-135m --temperature {temperature} --max-tokens 40 --detach --prompt \"{prompt}\""
    );
    let job = house.succeed(&line).await.stdout.trim().to_owned();
    house.succeed(&format!("llorch jobs wait {job}")).await;
    house.job = Some(job);
}

#[when("I follow its events to the end")]
async fn follow(house: &mut House) {
    house.events = stream::follow(&house.url("/v2/tasks/JOB/events"), None, JOB_LIMIT, |_| {
        false
    })
    .await;
}

#[when(expr = "I follow its events until {string}")]
async fn follow_until(house: &mut House, id: String) {
    let wanted = id.clone();
    let enough = move |received: &stream::Received| received.id.as_deref() == Some(&wanted);
    house.events =
        stream::follow(&house.url("/v2/tasks/JOB/events"), None, JOB_LIMIT, enough).await;
    assert_eq!(house.events.last().and_then(|e| e.id.clone()), Some(id));
}

#[when(expr = "I come back with the last event id {string}")]
async fn resume(house: &mut House, id: String) {
    let rest = stream::follow(
        &house.url("/v2/tasks/JOB/events"),
        Some(&id),
        JOB_LIMIT,
        |_| false,
    )
    .await;
    house.events.extend(rest);
}

#[when(expr = "it has produced {int} tokens")]
async fn has_given(house: &mut House, tokens: u32) {
    let enough = move |received: &stream::Received| matches!(&received.event, TaskEvent::Token(t) if t.i + 1 >= tokens);
    house.events =
        stream::follow(&house.url("/v2/tasks/JOB/events"), None, JOB_LIMIT, enough).await;
}

#[then("its events are queued, started, tokens and end, each id one higher than the one before")]
fn in_order(house: &mut House) {
    let logged: Vec<_> = house
        .events
        .iter()
        .filter(|e| e.event.is_logged())
        .collect();
    let names: Vec<_> = logged.iter().map(|e| e.event.name()).collect();
    assert_eq!(names[..2], ["queued", "started"]);
    assert_eq!(names[names.len() - 1], "end");
    assert!(
        names[2..names.len() - 1]
            .iter()
            .all(|name| *name == "token"),
        "{names:?}"
    );
    let ids: Vec<EventId> = logged
        .iter()
        .map(|e| e.id.as_deref().expect("an id").parse().expect("an id"))
        .collect();
    assert_eq!(ids[0].attempt, 0);
    assert!(ids[1..].iter().all(|id| id.attempt == 1), "{ids:?}");
    let first = ids[0].seq;
    let sequence: Vec<u64> = ids.iter().map(|id| id.seq).collect();
    assert_eq!(
        sequence,
        (first..first + ids.len() as u64).collect::<Vec<_>>()
    );
}

#[then("its token indices count from 0 without a gap")]
fn contiguous(house: &mut House) {
    let indices: Vec<u32> = house.events.iter().filter_map(token_index).collect();
    assert_eq!(
        indices,
        (0..u32::try_from(indices.len()).expect("few")).collect::<Vec<_>>()
    );
    assert!(!indices.is_empty());
}

fn token_index(received: &stream::Received) -> Option<u32> {
    match &received.event {
        TaskEvent::Token(token) => Some(token.i),
        _ => None,
    }
}

#[then("the text of the events is the text of the job")]
async fn same_text(house: &mut House) {
    let task = house.task().await;
    assert_eq!(stream::text(&house.events), task.text);
    assert!(!task.text.is_empty());
}

#[then("the first token came before half of the time to the end had passed")]
fn streamed(house: &mut House) {
    let at = |wanted: &str| {
        house
            .events
            .iter()
            .find(|e| e.event.name() == wanted)
            .map(|e| e.at)
            .expect("it came")
    };
    let (started, first, end) = (at("started"), at("token"), at("end"));
    assert!(
        first - started < (end - started) / 2,
        "first token {:?}, end {:?}",
        first - started,
        end - started
    );
}

#[then(expr = "the job ends as {word}")]
async fn ends_as(house: &mut House, status: String) {
    let started = Instant::now();
    loop {
        let task = house.task().await;
        if task.status.is_terminal() {
            assert_eq!(task.status.as_str(), status, "{task:#?}");
            return;
        }
        assert!(started.elapsed() < WAIT_LIMIT, "still {}", task.status);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[then(expr = "its error is {string} and names {string}")]
async fn its_error(house: &mut House, code: String, part: String) {
    let error = house.task().await.error.expect("the job has an error");
    assert_eq!(error.code.as_str(), code, "{error:?}");
    assert!(error.message.contains(&part), "{error:?}");
}

#[then("its worker is idle again")]
async fn worker_idle(house: &mut House) {
    let started = Instant::now();
    loop {
        let listed = house
            .succeed("llorch-pool worker list --format json")
            .await
            .stdout
            .clone();
        let listed: serde_json::Value = serde_json::from_str(&listed).expect("a JSON array");
        if listed[0]["active"] == 0 && listed[0]["status"] == "ready" {
            return;
        }
        assert!(started.elapsed() < WAIT_LIMIT, "{listed:#}");
    }
}

#[then(expr = "a further job of {int} tokens completes")]
async fn further_job(house: &mut House, tokens: u32) {
    submit(house, tokens, "The capital of France is".to_owned()).await;
    ends_as(house, JobStatus::Completed.to_string()).await;
}

#[when(expr = "{int} agents submit a job each")]
async fn submit_many(house: &mut House, agents: usize) {
    let client = reqwest::Client::new();
    let url = house.url("/v2/tasks");
    let submits = (0..agents).map(|agent| {
        let body = json!({"model": "smollm2-135m", "prompt": format!("{agent}"), "raw": true, "max_tokens": 2000});
        let request = client.post(&url).json(&body);
        async move {
            let response = request.send().await.expect("the orchestrator answers");
            assert_eq!(response.status(), 202);
            let answer: Value = response.json().await.expect("JSON");
            answer["job_id"].as_str().expect("a 202 names the job").to_owned()
        }
    });
    house.acknowledged = futures_util::future::join_all(submits).await;
}

#[when(expr = "{int} of the jobs are cancelled")]
async fn cancel_some(house: &mut House, count: usize) {
    // Jobs from the middle: the list must skip them.
    let jobs = house.acknowledged[100..100 + count].join(" ");
    house.succeed(&format!("llorch jobs cancel {jobs}")).await;
}

#[when("this script runs:")]
async fn script(house: &mut House, step: &Step) {
    let script = step
        .docstring
        .as_deref()
        .expect("the step has a script")
        .trim();
    let program = process::program("llorch");
    let folder = program.parent().expect("a program lies in a folder");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = process::clean("sh");
    command
        .args(["-e", "-c", script])
        .env("PATH", format!("{}:{path}", folder.display()))
        .env("LLORCH_HOME", house.home());
    house.finished = Some(process::run(command, JOB_LIMIT).await);
}

#[then("standard output has a line for each of the jobs")]
fn a_line_each(house: &mut House) {
    let mut named: Vec<&str> = house
        .last()
        .stdout
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let mut jobs: Vec<&str> = house.acknowledged.iter().map(String::as_str).collect();
    named.sort_unstable();
    jobs.sort_unstable();
    assert_eq!(named, jobs);
}

#[then("none of the jobs waits or runs")]
async fn all_over(house: &mut House) {
    let url = house.url("/v2/tasks?status=queued,dispatched,running&count=true");
    let answer = reqwest::get(url).await.expect("the orchestrator answers");
    let list: Value = answer.json().await.expect("JSON");
    assert_eq!(list["total"], 0, "{list:#}");
}
