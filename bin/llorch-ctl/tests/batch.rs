//! `llorch jobs batch` against a fake orchestrator with a queue: the submitted tasks, the number in flight, and the effect of a
//! second run.

#![allow(clippy::unwrap_used)]

mod support;

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::{Arc, Mutex};

use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use orchestrator_core::api::tasks::TaskView;
use orchestrator_core::job::{Job, JobError, JobErrorCode, JobStatus};
use orchestrator_core::{JobId, TaskSubmitRequest};
use pool_core::kit::process::{ProcessIdentity, Signal};
use pool_core::kit::sse::SseEvent as _;
use serde_json::{Value, json};
use support::{LIMIT, Ran, end, finish, llorch, ran, until};
use tokio::sync::watch;

/// State of a fake orchestrator that has one job per key. No job ends before a test releases it.
#[derive(Default)]
struct Inner {
    jobs: HashMap<JobId, TaskSubmitRequest>,
    keys: BTreeMap<String, JobId>,
    submits: usize,
    full: usize,
    readers: usize,
    most_readers: usize,
}

#[derive(Clone)]
struct Queue {
    inner: Arc<Mutex<Inner>>,
    /// Number of jobs that may still end.
    released: watch::Sender<usize>,
    url: String,
}

impl Queue {
    /// Answers the first `full` submits with 429.
    async fn start(full: usize) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let queue = Self {
            inner: Arc::new(Mutex::new(Inner {
                full,
                ..Inner::default()
            })),
            released: watch::Sender::new(0),
            url: format!("http://{}", listener.local_addr().unwrap()),
        };
        let version = json!({"name": "orchestratord", "version": "0.0.0-fake", "api_version": 2});
        let router = Router::new()
            .route("/version", get(async || Json(version)))
            .route("/v2/tasks", post(submit))
            .route("/v2/tasks/{id}", get(job))
            .route("/v2/tasks/{id}/events", get(events))
            .with_state(queue.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        queue
    }

    fn command(&self, args: &[&str]) -> tokio::process::Command {
        let mut command = llorch(&[&["jobs", "batch"], args].concat());
        command.env("LLORCH_ORCHESTRATOR_URL", &self.url);
        command
    }

    async fn run(&self, args: &[&str]) -> Ran {
        ran(self.command(args)).await
    }

    fn look<T>(&self, look: impl FnOnce(&Inner) -> T) -> T {
        look(&self.inner.lock().unwrap())
    }
}

fn refusal(status: StatusCode, code: &str, after_ms: Option<u64>) -> Response {
    let error = json!({"error": {"code": code, "message": "as the test wants", "correlation_id": "c",
        "retriable": after_ms.is_some(), "retry_after_ms": after_ms}});
    (status, Json(error)).into_response()
}

async fn submit(
    State(queue): State<Queue>,
    headers: HeaderMap,
    Json(request): Json<TaskSubmitRequest>,
) -> Response {
    let mut inner = queue.inner.lock().unwrap();
    inner.submits += 1;
    if inner.submits <= inner.full {
        return refusal(StatusCode::TOO_MANY_REQUESTS, "QUEUE_FULL", Some(50));
    }
    if request.model == "none" {
        return refusal(StatusCode::NOT_FOUND, "MODEL_NOT_FOUND", None);
    }
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let id = *inner.keys.entry(key).or_insert_with(JobId::random);
    inner.jobs.insert(id, request);
    let answer = json!({"job_id": id, "status": "queued", "queue_position": 0, "events_url": "x"});
    (StatusCode::ACCEPTED, Json(answer)).into_response()
}

/// Returns a finished job, which failed if its prompt is `fail`.
async fn job(State(queue): State<Queue>, UrlPath(id): UrlPath<JobId>) -> Json<TaskView> {
    let request = queue.look(|inner| inner.jobs[&id].clone());
    let prompt = request.prompt.clone().unwrap();
    let mut job = Job::new(id, request.validate().unwrap(), jiff::Timestamp::now());
    job.status = JobStatus::Completed;
    job.text = format!("answer to {prompt}");
    if prompt == "fail" {
        job.status = JobStatus::Failed;
        job.error = Some(JobError {
            code: JobErrorCode::WorkerLost,
            message: "lost".into(),
            retriable: true,
        });
    }
    Json(TaskView::new(job, None))
}

async fn events(State(queue): State<Queue>, UrlPath(_): UrlPath<JobId>) -> Response {
    {
        let mut inner = queue.inner.lock().unwrap();
        inner.readers += 1;
        inner.most_readers = inner.most_readers.max(inner.readers);
    }
    let mut released = queue.released.subscribe();
    let event = end();
    let body = async_stream::stream! {
        // A comment at once: the client sees that the stream is alive.
        yield Ok::<_, std::convert::Infallible>(": here\n\n".to_owned());
        released.wait_for(|count| *count > 0).await.unwrap();
        queue.released.send_modify(|count| *count -= 1);
        queue.inner.lock().unwrap().readers -= 1;
        yield Ok(format!("event: end\nid: 1.2\ndata: {}\n\n", event.data()));
    };
    let kind = [(header::CONTENT_TYPE, "text/event-stream")];
    (kind, axum::body::Body::from_stream(body)).into_response()
}

fn tasks(folder: &Path, lines: &[&str]) -> String {
    let path = folder.join("tasks.jsonl");
    std::fs::write(&path, lines.join("\n")).unwrap();
    path.to_str().unwrap().to_owned()
}

fn lines(text: &str) -> Vec<Value> {
    let mut lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    lines.sort_by_key(|line| line["line"].as_u64());
    lines
}

#[tokio::test] // [LLORCH-071] [LLORCH-073]
async fn results_come_one_a_line_and_a_full_queue_is_waited_for() {
    let queue = Queue::start(3).await;
    queue.released.send_replace(100);
    let folder = tempfile::tempdir().unwrap();
    let file = tasks(
        folder.path(),
        &[
            r#"{"prompt": "a"}"#,
            r#"{"prompt": "fail", "model": "n"}"#,
            "",
            r#"{"prompt": "c", "model": "none"}"#,
            r#"{"prompt": "a"}"#,
        ],
    );
    let run = queue.run(&[&file, "--model", "m"]).await;
    // A refused task takes precedence over a failed job.
    assert_eq!(run.code, 4, "{}", run.err);
    let got = lines(&run.out);
    let statuses: Vec<_> = got
        .iter()
        .map(|line| {
            (
                line["line"].as_u64().unwrap(),
                line["status"].as_str().unwrap(),
            )
        })
        .collect();
    assert_eq!(
        statuses,
        [
            (1, "completed"),
            (2, "failed"),
            (4, "refused"),
            (5, "completed")
        ]
    );
    assert_eq!(got[0]["text"], "answer to a");
    assert_eq!(got[1]["error"]["code"], "WORKER_LOST");
    assert_eq!(got[2]["error"]["code"], "MODEL_NOT_FOUND");
    assert_ne!(got[0]["id"], got[3]["id"], "two lines are two jobs");
    assert!(run.err.contains("2 completed, 1 failed"), "{}", run.err);
    // Tasks of a batch run after interactive ones, unless they say otherwise.
    let priority = queue.look(|inner| inner.jobs.values().next().unwrap().priority.unwrap());
    assert_eq!(priority.as_str(), "batch");
    assert!(queue.look(|inner| inner.submits) >= 7);
}

#[tokio::test] // [LLORCH-074]
async fn no_more_are_under_way_than_was_said() {
    let queue = Queue::start(0).await;
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<String> = (0..12).map(|i| format!(r#"{{"prompt": "{i}"}}"#)).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let file = tasks(folder.path(), &all);
    let running = tokio::spawn({
        let queue = queue.clone();
        async move { queue.run(&[&file, "-m", "m", "--in-flight", "3"]).await }
    });
    // Each job that ends makes room for one more.
    for ended in 0..=9 {
        until("three under way", || {
            queue.look(|inner| (inner.submits, inner.readers)) == (3 + ended, 3)
        })
        .await;
        queue.released.send_modify(|count| *count += 1);
    }
    queue.released.send_replace(100);
    let run = tokio::time::timeout(LIMIT, running).await.unwrap().unwrap();
    assert_eq!((run.code, run.out.lines().count()), (0, 12), "{}", run.err);
    assert_eq!(
        queue.look(|inner| (inner.jobs.len(), inner.most_readers)),
        (12, 3)
    );
}

// [LLORCH-075]
#[tokio::test]
async fn a_batch_in_which_nothing_runs_says_why() {
    let fake = support::Fake {
        streams: vec![vec![
            support::Step::Send("", support::waiting()),
            support::Step::Hang,
        ]],
        ..support::Fake::default()
    };
    let fake = fake.start().await;
    let folder = tempfile::tempdir().unwrap();
    let file = tasks(folder.path(), &[r#"{"prompt": "a"}"#, r#"{"prompt": "b"}"#]);
    let mut child = fake
        .llorch(&["jobs", "batch", &file, "-m", "m"])
        .spawn()
        .unwrap();
    let line = "nothing runs: no pool has registered (start one with `llorch-pool daemon start`)\n";
    support::read_until(child.stderr.as_mut().unwrap(), line).await;
    support::interrupt(&child);
    let run = finish(child).await;
    assert_eq!(run.code, 130);
    assert!(!run.err.contains("nothing runs"), "told once: {}", run.err);
}

#[tokio::test] // [LLORCH-072]
async fn what_was_interrupted_goes_on_and_nothing_is_done_twice() {
    let queue = Queue::start(0).await;
    let folder = tempfile::tempdir().unwrap();
    let all: Vec<String> = (0..6).map(|i| format!(r#"{{"prompt": "{i}"}}"#)).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let file = tasks(folder.path(), &all);
    let output = folder.path().join("out.jsonl");
    let output = output.to_str().unwrap();
    let args = [&file, "-m", "m", "--in-flight", "3", "-o", output];
    let first = queue.command(&args).spawn().unwrap();
    queue.released.send_replace(2);
    let written = || std::fs::read_to_string(output).unwrap_or_default();
    until("two results", || written().lines().count() == 2).await;
    until("three more jobs", || {
        queue.look(|inner| inner.jobs.len() == 5)
    })
    .await;
    let process = ProcessIdentity::of(first.id().unwrap()).unwrap().unwrap();
    process.signal(Signal::INT).unwrap();
    let run = finish(first).await;
    assert_eq!(run.code, 130, "{}", run.err);
    assert!(
        run.err.contains("interrupted after 2 of 6") && run.err.contains("continue with the rest"),
        "{}",
        run.err
    );

    queue.released.send_replace(100);
    let run = queue.run(&args).await;
    assert_eq!(run.code, 0, "{}", run.err);
    assert!(
        run.err.contains("2 of 6 tasks already have results"),
        "{}",
        run.err
    );
    let got = lines(&written());
    assert_eq!(got.len(), 6);
    assert_eq!(queue.look(|inner| inner.jobs.len()), 6, "no job twice");
    assert_eq!(queue.look(|inner| inner.submits), 5 + 4);
    // A third run has nothing to do; another name makes new jobs.
    let run = queue.run(&args).await;
    assert_eq!((run.code, queue.look(|inner| inner.submits)), (0, 9));
    let run = queue.run(&[&file, "-m", "m", "--run", "again"]).await;
    assert_eq!((run.code, queue.look(|inner| inner.jobs.len())), (0, 12));
}

#[tokio::test] // [LLORCH-070]
async fn a_file_with_faults_sends_nothing() {
    let queue = Queue::start(0).await;
    let folder = tempfile::tempdir().unwrap();
    let file = tasks(
        folder.path(),
        &[r#"{"prompt": "a"}"#, r#"{"prompt": "a", "top_p": 7}"#],
    );
    let run = queue.run(&[&file, "-m", "m"]).await;
    assert_eq!((run.code, run.out.as_str()), (2, ""));
    assert!(
        run.err.contains("line 2") && run.err.contains("`top_p`"),
        "{}",
        run.err
    );
    assert_eq!(queue.look(|inner| inner.submits), 0);
}
