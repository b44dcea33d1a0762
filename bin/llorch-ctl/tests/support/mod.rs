//! A fake orchestrator that plays back scripts, and the real `llorch` run against it.

// Each test file uses its own part of this module. Helpers may panic, as tests do.
#![allow(dead_code, clippy::unwrap_used)]

use std::convert::Infallible;
use std::io;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Json;
use axum::Router;
use axum::body::Body;
use axum::extract::{Path as UrlPath, Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use orchestrator_core::api::events::{End, Started, TaskEvent, Token};
use orchestrator_core::api::tasks::{TaskView, TaskWaiting};
use orchestrator_core::job::{Job, JobError, JobErrorCode, JobStatus, Usage};
use orchestrator_core::scheduler::{Explanation, WaitReason};
use orchestrator_core::{JobId, TaskSubmitRequest};
use pool_core::api::receipt::Receipt;
use pool_core::api::worker::StopReason;
use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::kit::sse::SseEvent as _;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};

/// Id of the fake's job.
pub const JOB: &str = "job-01900000-0000-7000-8000-000000000001";
/// Longest wait in a test. Only a hang takes this long.
pub const LIMIT: Duration = Duration::from_secs(120);

/// A step of the script for one connection to the event stream.
#[derive(Debug, Clone)]
pub enum Step {
    /// An event, with its id.
    Send(&'static str, TaskEvent),
    /// A break in the middle of the connection.
    Break,
    /// Silence on a connection that stays open.
    Hang,
    /// Status 204: no event follows.
    Over,
}

/// A fake orchestrator: real wire types, scripted behaviour.
#[derive(Debug, Default)]
pub struct Fake {
    /// Scripts for the first, second, ... connection to the event stream. The last one repeats.
    pub streams: Vec<Vec<Step>>,
    /// Number of submits that break off without an answer before one is answered.
    pub broken_submits: usize,
    /// State in the answer to a cancel; `cancelled` if `None`.
    pub cancel_answers: Option<JobStatus>,
    /// Text of a completed job in `GET /v2/tasks/{id}`; `None` if the job is still running.
    pub text: Option<&'static str>,
    /// Finished jobs, with their events. A submit still answers [`JOB`].
    pub finished: Vec<(TaskView, Vec<Step>)>,
    /// Status and error code with which submits are refused; `None` to accept them.
    pub refuses: Option<(StatusCode, &'static str)>,
    /// Jobs in lists, newest first, with the state of each in the first, second, ... list. If empty, lists have only [`JOB`].
    pub jobs: Vec<(&'static str, Vec<JobStatus>)>,
}

/// The requests that a fake received.
#[derive(Debug, Default, Clone)]
pub struct Asked {
    /// Bodies of submits, with their idempotency keys.
    pub submits: Vec<(String, TaskSubmitRequest)>,
    /// `Last-Event-ID` of each connection to the events.
    pub resumed_after: Vec<Option<String>>,
    /// Jobs of cancel requests.
    pub cancels: Vec<JobId>,
    /// Query parameters of list requests.
    pub lists: Vec<Vec<(String, String)>>,
    /// Number of requests of any kind.
    pub requests: usize,
}

#[derive(Clone)]
struct Shared {
    fake: Arc<Fake>,
    asked: Arc<Mutex<Asked>>,
}

/// A fake that listens.
pub struct Running {
    /// Base URL.
    pub url: String,
    asked: Arc<Mutex<Asked>>,
}

impl Running {
    /// Returns the requests so far.
    pub fn asked(&self) -> Asked {
        self.asked.lock().unwrap().clone()
    }

    /// Returns a command that runs `llorch` with these arguments against the fake.
    pub fn llorch(&self, args: &[&str]) -> Command {
        let mut command = llorch(args);
        command.env("LLORCH_ORCHESTRATOR_URL", &self.url);
        command
    }

    /// Runs `llorch` to its end.
    pub async fn run(&self, args: &[&str]) -> Ran {
        ran(self.llorch(args)).await
    }
}

impl Fake {
    /// Listens on a free port, for as long as the test's runtime lives.
    pub async fn start(self) -> Running {
        let asked = Arc::new(Mutex::new(Asked::default()));
        let shared = Shared {
            fake: Arc::new(self),
            asked: asked.clone(),
        };
        let router = Router::new()
            .route("/version", get(version))
            .route("/v2/tasks", post(submit).get(list))
            .route("/v2/tasks/{id}", get(job))
            .route("/v2/tasks/{id}/events", get(events))
            .route("/v2/tasks/{id}/cancel", post(cancel))
            .route("/v2/pools", get(async || Json(json!({"pools": []}))))
            .with_state(shared);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Running { url, asked }
    }
}

async fn version(State(shared): State<Shared>) -> Json<Value> {
    shared.asked.lock().unwrap().requests += 1;
    Json(json!({"name": "orchestratord", "version": "0.0.0-fake", "api_version": 2}))
}

async fn submit(
    State(shared): State<Shared>,
    headers: HeaderMap,
    Json(request): Json<TaskSubmitRequest>,
) -> Response {
    let mut asked = shared.asked.lock().unwrap();
    asked.submits.push((
        headers["idempotency-key"].to_str().unwrap().to_owned(),
        request,
    ));
    if let Some((status, code)) = shared.fake.refuses {
        return refusal(status, code);
    }
    if asked.submits.len() <= shared.fake.broken_submits {
        // The declared length announces more, but the connection ends.
        let cut = async_stream::stream! { yield Err::<&str, io::Error>(io::Error::other("cut")) };
        return ([(header::CONTENT_LENGTH, "100")], Body::from_stream(cut)).into_response();
    }
    let answer = json!({"job_id": JOB, "status": "queued", "queue_position": 0, "events_url": format!("/v2/tasks/{JOB}/events")});
    (StatusCode::ACCEPTED, Json(answer)).into_response()
}

async fn list(
    State(shared): State<Shared>,
    Query(query): Query<Vec<(String, String)>>,
) -> Json<Value> {
    let of = |name: &str| {
        query
            .iter()
            .find(|(n, _)| n == name)
            .map(|(_, v)| v.as_str())
    };
    let limit = of("limit").map_or(50, |limit| limit.parse().unwrap());
    let prefix = of("id_prefix").unwrap_or_default().to_owned();
    let states =
        of("status").map(|states| states.split(',').map(str::to_owned).collect::<Vec<_>>());
    let start: usize = of("cursor").map_or(0, |cursor| cursor.parse().unwrap());
    let count = of("count").is_some();
    shared.asked.lock().unwrap().lists.push(query);
    let jobs = match shared.fake.jobs.as_slice() {
        [] => vec![(JOB, vec![JobStatus::Queued])],
        jobs => jobs.to_vec(),
    };
    let asked = shared.asked.lock().unwrap().lists.len();
    let matching: Vec<_> = jobs
        .iter()
        // Each list shows a job's next state, up to its last.
        .map(|(id, life)| (id, life[(asked - 1).min(life.len() - 1)]))
        .filter(|(id, status)| {
            id.starts_with(&prefix)
                && states
                    .as_ref()
                    .is_none_or(|s| s.contains(&status.to_string()))
        })
        .map(|(id, status)| {
            let mut summary = orchestrator_core::api::tasks::TaskSummary::from(&a_job());
            summary.id = id.parse().unwrap();
            summary.status = status;
            summary.short_id = Some(id[4..17].to_owned());
            summary
        })
        .collect();
    let total = count.then_some(matching.len());
    // The fake's cursor is a position among all its jobs, so a job that changes its state moves no other.
    let place = |id: JobId| {
        jobs.iter()
            .position(|(job, _)| *job == id.to_string())
            .unwrap()
    };
    let after: Vec<_> = matching
        .into_iter()
        .filter(|job| place(job.id) >= start)
        .collect();
    let more = after.len() > limit;
    let page: Vec<_> = after.into_iter().take(limit).collect();
    let cursor = page
        .last()
        .filter(|_| more)
        .map(|job| (place(job.id) + 1).to_string());
    Json(json!({"jobs": page, "next_cursor": cursor, "total": total}))
}

fn a_job() -> Job {
    let request = TaskSubmitRequest {
        model: "smollm2-135m".into(),
        prompt: Some("p".into()),
        ..Default::default()
    };
    Job::new(
        JOB.parse().unwrap(),
        request.validate().unwrap(),
        jiff::Timestamp::now(),
    )
}

fn refusal(status: StatusCode, code: &str) -> Response {
    let error = json!({"code": code, "message": "it is not there", "correlation_id": "c", "retriable": false});
    (status, Json(json!({"error": error}))).into_response()
}

async fn job(State(shared): State<Shared>, UrlPath(id): UrlPath<String>) -> Response {
    let mut finished = shared.fake.finished.iter();
    if let Some((view, _)) = finished.find(|(view, _)| view.id.to_string() == id) {
        return Json(view).into_response();
    }
    if id != JOB {
        return refusal(StatusCode::NOT_FOUND, "JOB_NOT_FOUND");
    }
    let mut job = a_job();
    job.status = JobStatus::Running;
    if let Some(text) = shared.fake.text {
        job.status = JobStatus::Completed;
        job.text = text.to_owned();
        job.usage = Some(Usage {
            tokens_in: 5,
            tokens_out: 3,
            stop_reason: StopReason::Eos,
            ttft_ms: 12,
            decode_time_ms: 100,
        });
    }
    Json(TaskView::new(job, None)).into_response()
}

async fn events(
    State(shared): State<Shared>,
    UrlPath(id): UrlPath<JobId>,
    headers: HeaderMap,
) -> Response {
    let mut finished = shared.fake.finished.iter();
    if let Some((_, steps)) = finished.find(|(view, _)| view.id == id) {
        return play(steps.clone());
    }
    let number = {
        let mut asked = shared.asked.lock().unwrap();
        let after = headers
            .get("last-event-id")
            .map(|id| id.to_str().unwrap().to_owned());
        asked.resumed_after.push(after);
        asked.resumed_after.len() - 1
    };
    play(shared.fake.streams[number.min(shared.fake.streams.len() - 1)].clone())
}

fn play(steps: Vec<Step>) -> Response {
    if let [Step::Over] = steps[..] {
        return StatusCode::NO_CONTENT.into_response();
    }
    let body = async_stream::stream! {
        for step in steps {
            match step {
                Step::Send(id, event) => {
                    let id = if event.is_logged() { format!("id: {id}\n") } else { String::new() };
                    yield Ok(format!("event: {}\n{id}data: {}\n\n", event.name(), event.data()));
                }
                Step::Break => {
                    // Bytes already sent must arrive before the connection is reset.
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    yield Err(io::Error::other("broken on purpose"));
                }
                Step::Hang => std::future::pending::<()>().await,
                Step::Over => return,
            }
        }
    };
    (
        [(header::CONTENT_TYPE, "text/event-stream")],
        Body::from_stream(body),
    )
        .into_response()
}

async fn cancel(
    State(shared): State<Shared>,
    UrlPath(id): UrlPath<JobId>,
) -> Result<Json<Value>, Infallible> {
    shared.asked.lock().unwrap().cancels.push(id);
    let status = shared.fake.cancel_answers.unwrap_or(JobStatus::Cancelled);
    Ok(Json(json!({"job_id": id, "status": status})))
}

/// Returns the event of the first attempt's start.
pub fn started() -> TaskEvent {
    TaskEvent::Started(Started {
        attempt: 1,
        pool_id: "mac".into(),
        worker_id: "worker-cpu-0".into(),
        tokens_in: 5,
        why: None,
    })
}

/// Returns the event of a job that waits for lack of a pool.
pub fn waiting() -> TaskEvent {
    TaskEvent::Waiting(TaskWaiting {
        queue_position: 0,
        explanation: Explanation {
            reason: WaitReason::NoPool,
            message: "no pool has registered".into(),
            hint: "start one with `llorch-pool daemon start`".into(),
            filters: Vec::new(),
        },
        estimated_start_ms: None,
    })
}

/// Reads a program's output until it contains `part`.
pub async fn read_until(mut source: impl AsyncRead + Unpin, part: &str) -> String {
    let mut text = Vec::new();
    let read = async {
        while !String::from_utf8_lossy(&text).contains(part) {
            let read = source.read_buf(&mut text).await.unwrap();
            assert!(read > 0, "it ended: {}", String::from_utf8_lossy(&text));
        }
    };
    tokio::time::timeout(LIMIT, read)
        .await
        .expect("it never came");
    String::from_utf8(text).unwrap()
}

/// Interrupts a command as Ctrl-C does.
pub fn interrupt(child: &Child) {
    let process = ProcessIdentity::of(child.id().unwrap()).unwrap().unwrap();
    process.signal(Signal::INT).unwrap();
}

/// Returns the event of a token.
pub fn token(i: u32, text: &str) -> TaskEvent {
    TaskEvent::Token(Token { t: text.into(), i })
}

/// Returns the last event of a completed job.
pub fn end() -> TaskEvent {
    end_with(None)
}

/// Returns the last event of a completed job with a receipt.
pub fn end_with(receipt: Option<Receipt>) -> TaskEvent {
    TaskEvent::End(End {
        tokens_in: 5,
        tokens_out: 3,
        stop_reason: StopReason::Eos,
        seed: 7,
        ttft_ms: 12,
        decode_time_ms: 100,
        worker_id: "worker-cpu-0".into(),
        receipt: receipt.map(Box::new),
    })
}

/// Returns the last event of a failed job.
pub fn failed(code: JobErrorCode) -> TaskEvent {
    TaskEvent::Error(JobError {
        code,
        message: "it went wrong".into(),
        retriable: false,
    })
}

/// Returns a command that runs the real program without the caller's settings and without a home.
pub fn llorch(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llorch"));
    for (name, _) in std::env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"LLORCH_") {
            command.env_remove(name);
        }
    }
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command.env("LLORCH_HOME", "/nonexistent/llorch-test");
    command
}

/// The result of a run of `llorch`.
#[derive(Debug, PartialEq)]
pub struct Ran {
    /// Exit code.
    pub code: i32,
    /// Standard output, as UTF-8.
    pub out: String,
    /// Standard error, as UTF-8.
    pub err: String,
}

/// Runs a command to its end.
pub async fn ran(mut command: Command) -> Ran {
    finish(command.spawn().unwrap()).await
}

/// Waits for a running command.
pub async fn finish(child: Child) -> Ran {
    let output = tokio::time::timeout(LIMIT, child.wait_with_output())
        .await
        .expect("llorch hangs")
        .unwrap();
    let Output {
        status,
        stdout,
        stderr,
    } = output;
    Ran {
        code: status.code().expect("it exits by itself"),
        out: String::from_utf8(stdout).unwrap(),
        err: String::from_utf8(stderr).unwrap(),
    }
}

/// Waits until `condition` holds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, wait)
        .await
        .unwrap_or_else(|_| panic!("it never happened: {what}"));
}

/// Returns the URL of a port where nothing listens.
pub fn nobody() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    format!("http://{}", listener.local_addr().unwrap())
}

/// Writes a file and returns its path as an argument.
pub fn file(dir: &Path, name: &str, content: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}
