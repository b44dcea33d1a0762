//! `llorch dev bench` against a fake server with an OpenAI-style API, and against a fake orchestrator.

// Helpers may panic, as tests do.
#![allow(clippy::unwrap_used)]

mod support;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};
use support::{JOB, Ran, Step, finish, interrupt, llorch, ran, started, until};

/// A server that streams five tokens, and refuses some requests.
#[derive(Default)]
struct Fake {
    models: Vec<&'static str>,
    /// Interval of the requests that are refused as an overload; 0 for none.
    refuses_every: usize,
    asked: AtomicUsize,
    at_once: AtomicUsize,
    most_at_once: AtomicUsize,
}

impl Fake {
    /// Listens for as long as the test's runtime lives, and returns the address.
    async fn start(self) -> (String, Arc<Self>) {
        let fake = Arc::new(self);
        let router = Router::new()
            .route("/v1/models", get(models))
            .route("/v1/completions", post(complete))
            .with_state(Arc::clone(&fake));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        (url, fake)
    }
}

async fn models(State(fake): State<Arc<Fake>>) -> Json<Value> {
    let models: Vec<Value> = fake.models.iter().map(|id| json!({"id": id})).collect();
    Json(json!({"data": models}))
}

async fn complete(
    State(fake): State<Arc<Fake>>,
    headers: HeaderMap,
    Json(request): Json<Value>,
) -> Response {
    // A worker's secret must reach no other server.
    assert!(!headers.contains_key(header::AUTHORIZATION));
    assert_eq!(request["stream"], true);
    assert_eq!(request["max_tokens"], 5);
    assert_eq!(request["prompt"].as_str().unwrap().split(' ').count(), 7);
    let number = fake.asked.fetch_add(1, Ordering::SeqCst);
    if fake.refuses_every > 0 && number % fake.refuses_every == 1 {
        return (StatusCode::SERVICE_UNAVAILABLE, "too much to do").into_response();
    }
    let now = fake.at_once.fetch_add(1, Ordering::SeqCst) + 1;
    fake.most_at_once.fetch_max(now, Ordering::SeqCst);
    let events = async_stream::stream! {
        for piece in ["a", "b", "c", "d", "e"] {
            let chunk = json!({"choices": [{"text": piece}]});
            yield Ok::<_, Infallible>(format!("data: {chunk}\n\n"));
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let usage = json!({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}});
        yield Ok(format!("data: {usage}\n\ndata: [DONE]\n\n"));
        fake.at_once.fetch_sub(1, Ordering::SeqCst);
    };
    let head = [(header::CONTENT_TYPE, "text/event-stream")];
    (head, Body::from_stream(events)).into_response()
}

async fn bench(url: &str, more: &[&str]) -> Ran {
    let mut args = vec!["dev", "bench", "--url", url, "--prompt-tokens", "7"];
    args.extend(["--output-tokens", "5", "--requests", "9"]);
    args.extend(more);
    let mut command = llorch(&args);
    command.env("LLORCH_WORKER_SECRET", "s3cret");
    ran(command).await
}

#[tokio::test] // [LLORCH-100]
async fn a_server_is_measured_with_so_many_requests_at_once() {
    let (url, fake) = Fake {
        models: vec!["tiny"],
        ..Fake::default()
    }
    .start()
    .await;
    let run = bench(&url, &["--concurrency", "1,3", "--format", "json"]).await;
    assert_eq!(run.code, 0, "{}", run.err);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(
        (&report["api"], &report["model"]),
        (&"openai".into(), &"tiny".into())
    );
    for (level, concurrency) in [(0, 1), (1, 3)] {
        let level = &report["levels"][level];
        assert_eq!(level["concurrency"], concurrency);
        assert_eq!(
            (&level["requests"], &level["errors"]),
            (&9.into(), &0.into())
        );
        assert_eq!(
            (&level["tokens_in"], &level["tokens_out"]),
            (&81.into(), &45.into())
        );
        // The tokens are sent two milliseconds apart, which a busy machine blurs.
        assert!(level["tpot_ms"]["p99"].as_f64().unwrap() > 1.0, "{level}");
        assert!(level["ttft_ms"]["p99"].as_f64() >= level["ttft_ms"]["p50"].as_f64());
        assert!(level["output_tokens_per_s"].as_f64().unwrap() > 0.0);
    }
    assert_eq!(fake.most_at_once.load(Ordering::SeqCst), 3);
    assert_eq!(fake.asked.load(Ordering::SeqCst), 1 + 9 + 9);
    // The default format is a table.
    let run = bench(&url, &["--concurrency", "2"]).await;
    assert!(
        run.out.contains("TOKENS/S") && run.out.lines().count() == 2,
        "{}",
        run.out
    );
}

#[tokio::test] // [LLORCH-100]
async fn failures_are_counted_shown_and_in_the_exit_code() {
    let (url, _) = Fake {
        models: vec!["tiny"],
        refuses_every: 3,
        ..Fake::default()
    }
    .start()
    .await;
    let run = bench(&url, &["--concurrency", "2", "--format", "json"]).await;
    assert_eq!(run.code, 1, "{}", run.err);
    let report: Value = serde_json::from_str(&run.out).unwrap();
    assert_eq!(report["levels"][0]["errors"], 3);
    assert!(run.err.contains("too much to do"), "{}", run.err);
}

#[tokio::test] // [LLORCH-100]
async fn of_several_models_one_has_to_be_named() {
    let (url, _) = Fake {
        models: vec!["tiny", "huge"],
        ..Fake::default()
    }
    .start()
    .await;
    let run = bench(&url, &[]).await;
    assert_eq!(run.code, 2);
    assert!(run.err.contains("--model: tiny, huge"), "{}", run.err);
    assert_eq!(bench(&url, &["--model", "huge"]).await.code, 0);
    let run = bench(&support::nobody(), &[]).await;
    assert_eq!(run.code, 5, "{}", run.err);
}

#[tokio::test] // [LLORCH-101]
async fn an_interrupted_run_cancels_its_jobs() {
    let script = vec![Step::Send("1.2", started()), Step::Hang];
    let orchestrator = support::Fake {
        streams: vec![script],
        ..support::Fake::default()
    };
    let orchestrator = orchestrator.start().await;
    let child = orchestrator
        .llorch(&["dev", "bench", "--model", "m"])
        .spawn()
        .unwrap();
    until("a job is followed", || {
        !orchestrator.asked().resumed_after.is_empty()
    })
    .await;
    interrupt(&child);
    let run = finish(child).await;
    assert_eq!(run.code, 130, "{}", run.err);
    assert!(
        run.err.contains("interrupted: the benchmark"),
        "{}",
        run.err
    );
    assert_eq!(orchestrator.asked().cancels, [JOB.parse().unwrap()]);
}
