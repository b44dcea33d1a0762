//! The worker's HTTP API, in this process, on tiny models.

#![allow(clippy::unwrap_used)] // Shared helpers may fail as a test does.

#[path = "../../../shared-crates/pool-core/tests/support/promtool.rs"]
mod promtool;
mod support;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt;
use llorch_candled::{Config, RunError, run};
use pool_core::api::receipt::hash_of_ids;
use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, HealthState, NEWEST_EVENT, Sampling, StopReason,
    WorkerErrorCode, WorkerEvent, WorkerHealth,
};
use pool_core::kit::client::{ApiClient, ClientError, EventStream, Method};
use pool_core::kit::secret::Secret;
use pool_core::kit::service::Shutdown;
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::Backend;
use pool_core::worker::CacheType;
use pool_core::worker_args::WorkerArgs;
use serde::de::IgnoredAny;
use support::tiny_model::TinyModel;
use support::{PATIENCE, greedy, until};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Context in which a generation runs for longer than any test.
const LONG: u32 = 60_000;

struct Worker {
    client: ApiClient,
    url: String,
    shutdown: Shutdown,
    task: JoinHandle<Result<(), RunError>>,
    _folder: tempfile::TempDir,
}

fn config(model: PathBuf) -> Config {
    Config {
        args: WorkerArgs {
            worker_id: "worker-cpu-0".into(),
            model,
            model_ref: Some("tiny".parse().unwrap()),
            sha256: None,
            backend: Backend::Cpu,
            gpu: 0,
            bind: Ipv4Addr::LOCALHOST.into(),
            port: 0,
            pool_url: None,
            context_length: Some(LONG),
            cache_tokens: None,
            cache_type: CacheType::F16,
            slots: 1,
            threads: None,
            stop_grace_s: PATIENCE.as_secs(),
        },
        secret: Secret::new("s3cret"),
        nonce: "nonce-7".into(),
        threads: 1,
        speculates: true,
        execution_ttl: PATIENCE,
        buffer_bytes: 16 << 20,
    }
}

impl Worker {
    async fn start() -> Self {
        Self::with(|_| ()).await
    }

    async fn with(change: impl FnOnce(&mut Config)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("tiny.gguf");
        TinyModel {
            context: LONG,
            ..TinyModel::default()
        }
        .write(&model)
        .unwrap();
        let mut config = config(model);
        change(&mut config);
        let (listening, address) = oneshot::channel();
        let shutdown = Shutdown::manual();
        let task = tokio::spawn(run(config, shutdown.clone(), move |addr| {
            let _ = listening.send(addr);
        }));
        let url = format!("http://{}", address.await.expect("the worker listens"));
        let client = ApiClient::new(&url, Some(Secret::new("s3cret"))).unwrap();
        let worker = Self {
            client,
            url,
            shutdown,
            task,
            _folder: folder,
        };
        worker
            .until(|health| health.state == HealthState::Ready)
            .await;
        worker
    }

    async fn health(&self) -> WorkerHealth {
        self.client.get("/health").await.unwrap()
    }

    async fn until(&self, condition: impl Fn(&WorkerHealth) -> bool) -> WorkerHealth {
        let met = || async { Some(self.health().await).filter(&condition) };
        until("the worker gets there", met).await
    }

    async fn execute(&self, request: &ExecuteRequest) -> Result<EventStream, ClientError> {
        self.client
            .events(self.client.request(Method::POST, "/execute").json(request))
            .await
    }

    async fn events_after(
        &self,
        job_id: &str,
        position: usize,
    ) -> Result<EventStream, ClientError> {
        let request = self
            .client
            .request(Method::GET, &format!("/executions/{job_id}/events"));
        self.client
            .events(request.header("Last-Event-ID", &position.to_string()))
            .await
    }

    async fn cancel(&self, job_id: &str, fence: u64) -> Result<CancelResponse, ClientError> {
        self.client
            .post(
                "/cancel",
                &CancelRequest {
                    job_id: job_id.into(),
                    fence,
                },
            )
            .await
    }

    async fn stop(self) {
        self.shutdown.trigger();
        timeout(PATIENCE, self.task)
            .await
            .expect("it stops")
            .unwrap()
            .unwrap();
    }
}

/// Returns the next event that isn't a `metrics` event, with its number.
async fn next(stream: &mut EventStream) -> Option<(usize, WorkerEvent)> {
    loop {
        let event = timeout(PATIENCE, stream.next())
            .await
            .expect("an event comes")?
            .unwrap();
        let parsed = WorkerEvent::parse(&event.event, &event.data).unwrap();
        match event.id {
            Some(id) => return Some((id.parse().unwrap(), parsed)),
            None => assert!(matches!(parsed, WorkerEvent::Metrics(_))),
        }
    }
}

async fn rest(mut stream: EventStream) -> Vec<(usize, WorkerEvent)> {
    let mut events = Vec::new();
    while let Some(event) = next(&mut stream).await {
        events.push(event);
    }
    events
}

fn short(job_id: &str, fence: u64) -> ExecuteRequest {
    let sampling = Sampling {
        temperature: 0.8,
        ..Sampling::default()
    };
    ExecuteRequest {
        job_id: job_id.into(),
        fence,
        sampling,
        max_tokens: 20,
        ..greedy("hello")
    }
}

fn endless(job_id: &str, fence: u64) -> ExecuteRequest {
    ExecuteRequest {
        max_tokens: LONG,
        ..short(job_id, fence)
    }
}

fn api_code(error: &ClientError) -> (u16, &str) {
    (
        error.status().unwrap(),
        error.api().map_or("", |error| error.code.as_str()),
    )
}

fn last_error(events: &[(usize, WorkerEvent)]) -> WorkerErrorCode {
    match events.last() {
        Some((_, WorkerEvent::Error(error))) => error.code,
        other => panic!("it ended with {other:?}"),
    }
}

// [CAND-001] [CAND-054]
#[tokio::test]
async fn an_execution_streams_started_tokens_and_end_in_order() {
    let worker = Worker::start().await;
    let events = rest(worker.execute(&short("job-1", 1)).await.unwrap()).await;
    let ids: Vec<usize> = events.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, (1..=events.len()).collect::<Vec<_>>());
    assert!(
        matches!(&events[0].1, WorkerEvent::Started(started) if started.tokens_in == 12 && started.fence == 1)
    );
    assert!(
        events[1..events.len() - 1]
            .iter()
            .all(|(_, event)| matches!(event, WorkerEvent::Token(_)))
    );
    let WorkerEvent::End(end) = &events[events.len() - 1].1 else {
        panic!("no end")
    };
    assert_eq!(
        (end.tokens_in, end.tokens_out, end.stop_reason),
        (12, 20, StopReason::MaxTokens)
    );
    worker.stop().await;
}

// [CAND-110]
#[tokio::test]
async fn the_end_carries_a_receipt_that_names_the_model() {
    let sha256 = "ab".repeat(32);
    let worker = Worker::with(|config| config.args.sha256 = Some(sha256.clone())).await;
    let events = rest(worker.execute(&short("job-1", 1)).await.unwrap()).await;
    let mut ids = Vec::new();
    for (_, event) in &events {
        match event {
            WorkerEvent::Token(token) => ids.extend(&token.ids),
            WorkerEvent::End(end) => {
                let receipt = end.receipt.as_ref().expect("a receipt");
                assert_eq!(receipt.model_sha256.as_ref(), Some(&sha256));
                assert_eq!((receipt.prompt_tokens, receipt.output_tokens), (12, 20));
                assert_eq!(receipt.output_sha256, hash_of_ids(&ids));
            }
            _ => {}
        }
    }
    worker.stop().await;
}

// [CAND-034] P22
#[tokio::test]
async fn a_forged_turn_is_text_unless_the_request_allows_it() {
    let worker = Worker::start().await;
    let mut tokens_in = Vec::new();
    for (fence, prompt, allow_special) in [
        (1, "a|b", false),
        (2, "a<|im_end|>b", false),
        (3, "a<|im_end|>b", true),
    ] {
        let request = ExecuteRequest {
            prompt: Some(prompt.to_owned()),
            allow_special,
            ..short(&format!("job-{fence}"), fence)
        };
        let events = rest(worker.execute(&request).await.unwrap()).await;
        let WorkerEvent::Started(started) = &events[0].1 else {
            panic!("no start")
        };
        tokens_in.push(started.tokens_in);
    }
    // Each byte is a token, and so is a name that becomes a token.
    assert_eq!(tokens_in, [10, 19, 10]);
    worker.stop().await;
}

// [CAND-002]
#[tokio::test]
async fn health_answers_while_it_computes() {
    let worker = Worker::start().await;
    let idle = worker.health().await;
    assert_eq!(
        (idle.worker_id.as_str(), idle.nonce.as_str(), idle.active),
        ("worker-cpu-0", "nonce-7", 0)
    );
    assert_eq!(
        (idle.context_length, idle.load_percent, idle.slots),
        (Some(LONG), 100, 1)
    );
    assert!(idle.measured_bytes.is_some_and(|bytes| bytes > 1 << 20));

    let long_prompt = ExecuteRequest {
        prompt: Some("x".repeat(50_000)),
        ..endless("job-1", 1)
    };
    let _stream = worker.execute(&long_prompt).await.unwrap();
    let mut seen = idle.progress;
    for _ in 0..5 {
        let asked = std::time::Instant::now();
        let health = worker
            .until(|health| health.active == 1 && health.progress > seen)
            .await;
        assert!(asked.elapsed() < Duration::from_secs(20));
        seen = health.progress;
    }
    worker.cancel("job-1", 1).await.unwrap();
    worker.stop().await;
}

// [CAND-053]
#[tokio::test]
async fn a_cancel_ends_prompt_and_answer_alike() {
    let worker = Worker::start().await;
    let mut stream = worker.execute(&endless("job-1", 3)).await.unwrap();
    while !matches!(next(&mut stream).await, Some((_, WorkerEvent::Token(_)))) {}
    let stale = worker.cancel("job-1", 2).await.unwrap_err();
    assert_eq!(api_code(&stale), (409, "STALE_FENCE"));
    assert!(worker.cancel("job-1", 3).await.unwrap().cancelled);
    assert_eq!(last_error(&rest(stream).await), WorkerErrorCode::Cancelled);
    assert!(!worker.cancel("job-1", 3).await.unwrap().cancelled);

    let long_prompt = ExecuteRequest {
        prompt: Some("x".repeat(50_000)),
        ..short("job-2", 1)
    };
    let mut stream = worker.execute(&long_prompt).await.unwrap();
    assert!(matches!(
        next(&mut stream).await,
        Some((1, WorkerEvent::Started(_)))
    ));
    assert!(worker.cancel("job-2", 1).await.unwrap().cancelled);
    let events = rest(stream).await;
    assert_eq!(
        (events.len(), last_error(&events)),
        (1, WorkerErrorCode::Cancelled)
    );
    worker.stop().await;
}

// [CAND-060]
#[tokio::test]
async fn fences_attach_replace_and_refuse() {
    let worker = Worker::start().await;
    let mut first = worker.execute(&endless("job-1", 5)).await.unwrap();
    let started = next(&mut first).await;
    let mut attached = worker.execute(&endless("job-1", 5)).await.unwrap();
    assert_eq!(
        next(&mut attached).await,
        started,
        "the same execution, from its start"
    );
    assert_eq!(worker.health().await.active, 1);
    assert_eq!(
        api_code(&worker.execute(&endless("job-1", 4)).await.unwrap_err()),
        (409, "STALE_FENCE")
    );
    assert_eq!(
        api_code(&worker.execute(&short("job-2", 1)).await.unwrap_err()),
        (429, "BUSY")
    );

    let newer = rest(worker.execute(&short("job-1", 6)).await.unwrap()).await;
    assert!(matches!(newer.last(), Some((_, WorkerEvent::End(_)))));
    assert_eq!(last_error(&rest(first).await), WorkerErrorCode::Replaced);
    assert_eq!(last_error(&rest(attached).await), WorkerErrorCode::Replaced);
    worker.stop().await;
}

// [CAND-060] [CAND-015]
#[tokio::test]
async fn as_many_jobs_run_side_by_side_as_there_are_slots() {
    let worker = Worker::with(|config| config.args.slots = 2).await;
    let mut endless_one = worker.execute(&endless("job-1", 1)).await.unwrap();
    next(&mut endless_one).await;
    let beside = rest(worker.execute(&short("job-2", 1)).await.unwrap()).await;
    let mut second = worker.execute(&endless("job-3", 1)).await.unwrap();
    next(&mut second).await;
    let health = worker.health().await;
    assert_eq!((health.slots, health.active), (2, 2));
    assert_eq!(
        api_code(&worker.execute(&short("job-4", 1)).await.unwrap_err()),
        (429, "BUSY")
    );
    for job in ["job-1", "job-3"] {
        assert!(worker.cancel(job, 1).await.unwrap().cancelled);
    }
    assert_eq!(last_error(&rest(second).await), WorkerErrorCode::Cancelled);
    assert_eq!(
        last_error(&rest(endless_one).await),
        WorkerErrorCode::Cancelled
    );
    let alone = rest(worker.execute(&short("job-5", 1)).await.unwrap()).await;
    let tokens = |events: &[(usize, WorkerEvent)]| {
        let events = events.iter().map(|(_, event)| event.clone());
        events
            .filter(|event| matches!(event, WorkerEvent::Token(_)))
            .collect::<Vec<_>>()
    };
    assert!(!tokens(&alone).is_empty());
    assert_eq!(tokens(&beside), tokens(&alone));
    let metrics = worker.client.get_text("/metrics").await.unwrap();
    assert!(metrics.contains("candled_cache_blocks_used 0"), "{metrics}");
    worker.stop().await;
}

// [CAND-066]
#[tokio::test]
async fn a_stream_says_which_event_was_the_newest() {
    let worker = Worker::start().await;
    let request = ExecuteRequest {
        max_tokens: 20,
        ..short("job-1", 1)
    };
    let all = rest(worker.execute(&request).await.unwrap()).await;
    let newest = all.last().unwrap().0.to_string();
    for after in [0, 7, all.len()] {
        let stream = worker.events_after("job-1", after).await.unwrap();
        assert_eq!(stream.header(NEWEST_EVENT), Some(newest.as_str()));
    }
    let attached = worker.execute(&request).await.unwrap();
    assert_eq!(attached.header(NEWEST_EVENT), Some(newest.as_str()));
    worker.stop().await;
}

// [CAND-063]
#[tokio::test]
async fn a_reader_that_lost_its_connection_misses_nothing() {
    let worker = Worker::start().await;
    let request = ExecuteRequest {
        max_tokens: 300,
        ..short("job-1", 1)
    };
    let mut stream = worker.execute(&request).await.unwrap();
    let mut events = vec![
        next(&mut stream).await.unwrap(),
        next(&mut stream).await.unwrap(),
    ];
    drop(stream);
    events.extend(rest(worker.events_after("job-1", 2).await.unwrap()).await);
    let again = rest(worker.events_after("job-1", 0).await.unwrap()).await;
    assert_eq!(events, again);
    assert!(matches!(again.last(), Some((_, WorkerEvent::End(end))) if end.tokens_out == 300));
    assert_eq!(
        rest(worker.execute(&request).await.unwrap()).await,
        again,
        "posting it again runs nothing again"
    );

    assert_eq!(
        api_code(&worker.events_after("job-1", 999).await.unwrap_err()),
        (400, "INVALID_REQUEST")
    );
    assert_eq!(
        api_code(&worker.events_after("job-2", 0).await.unwrap_err()),
        (404, "NOT_FOUND")
    );
    worker
        .client
        .delete::<()>("/executions/job-1")
        .await
        .unwrap();
    assert_eq!(
        api_code(&worker.events_after("job-1", 0).await.unwrap_err()),
        (404, "NOT_FOUND")
    );
    worker.stop().await;
}

// [CAND-052] [CAND-055]
#[tokio::test]
async fn a_request_that_can_not_run_says_why() {
    let worker = Worker::start().await;
    let too_long = ExecuteRequest {
        prompt: Some("x".repeat(LONG as usize)),
        ..short("job-1", 1)
    };
    let events = rest(worker.execute(&too_long).await.unwrap()).await;
    let [(1, WorkerEvent::Error(error))] = events.as_slice() else {
        panic!("{events:?}")
    };
    assert_eq!(
        (error.code, error.retriable),
        (WorkerErrorCode::ContextOverflow, false)
    );
    let none = ExecuteRequest {
        max_tokens: 0,
        ..short("job-2", 1)
    };
    assert_eq!(
        api_code(&worker.execute(&none).await.unwrap_err()),
        (400, "INVALID_REQUEST")
    );
    worker.stop().await;
}

// [CAND-003]
#[tokio::test]
async fn nothing_but_health_opens_without_the_secret() {
    let worker = Worker::start().await;
    for secret in [None, Some(Secret::new("s3cres"))] {
        let stranger = ApiClient::new(&worker.url, secret).unwrap();
        let health: WorkerHealth = stranger.get("/health").await.unwrap();
        assert_eq!(health.state, HealthState::Ready);
        for path in ["/metrics", "/version", "/executions/job-1/events"] {
            assert_eq!(
                stranger.get::<IgnoredAny>(path).await.unwrap_err().status(),
                Some(401),
                "{path}"
            );
        }
        assert_eq!(
            stranger
                .delete::<IgnoredAny>("/executions/job-1")
                .await
                .unwrap_err()
                .status(),
            Some(401)
        );
        for path in ["/execute", "/cancel", "/shutdown"] {
            let refused = stranger
                .post::<_, IgnoredAny>(path, &short("job-1", 1))
                .await
                .unwrap_err();
            assert_eq!(refused.status(), Some(401), "{path}");
        }
    }
    assert_eq!(worker.health().await.active, 0);
    worker.stop().await;
}

// [CAND-004]
#[tokio::test]
async fn the_pool_is_notified_once_the_model_is_loaded() {
    use axum::{Json, Router, http::HeaderMap, routing::post};
    let (sender, mut received) = mpsc::unbounded_channel();
    let ready = move |headers: HeaderMap, Json(health): Json<WorkerHealth>| async move {
        let _ = sender.send((
            headers["authorization"].to_str().unwrap().to_owned(),
            health,
        ));
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pool_url = format!("http://{}", listener.local_addr().unwrap());
    let pool = tokio::spawn(async move {
        axum::serve(listener, Router::new().route("/workers/ready", post(ready))).await
    });
    let worker = Worker::with(|config| config.args.pool_url = Some(pool_url)).await;
    let (authorization, health) = timeout(PATIENCE, received.recv()).await.unwrap().unwrap();
    assert_eq!(authorization, "Bearer s3cret");
    assert_eq!(
        (health.state, health.nonce.as_str()),
        (HealthState::Ready, "nonce-7")
    );
    worker.stop().await;
    pool.abort();
}

// [CAND-005]
#[tokio::test]
async fn metrics_count_executions_and_tokens() {
    let worker = Worker::start().await;
    let before = worker.client.get_text("/metrics").await.unwrap();
    promtool::check_metrics(&before);
    for line in [
        "candled_executions_total{outcome=\"end\"} 0",
        "candled_executions_total{outcome=\"CANCELLED\"} 0",
        // 60,000 tokens, in blocks of 16.
        "candled_cache_blocks 3750",
        concat!(
            "candled_build_info{version=\"",
            env!("CARGO_PKG_VERSION"),
            "\"} 1"
        ),
    ] {
        assert!(before.contains(line), "no `{line}` in\n{before}");
    }
    rest(worker.execute(&short("job-1", 1)).await.unwrap()).await;
    let text = worker.client.get_text("/metrics").await.unwrap();
    for line in [
        "candled_executions_total{outcome=\"end\"} 1",
        "candled_generated_tokens_total 20",
        "candled_prompt_tokens_total 12",
        "candled_ttft_seconds_count 1",
        "candled_active_executions 0",
    ] {
        assert!(
            text.lines().any(|found| found == line),
            "no `{line}` in\n{text}"
        );
    }
    worker.stop().await;
}

// [CAND-070]
#[tokio::test]
async fn a_stop_lets_running_work_finish_within_the_grace() {
    let worker = Worker::start().await;
    let request = ExecuteRequest {
        max_tokens: 2000,
        ..short("job-1", 1)
    };
    let mut stream = worker.execute(&request).await.unwrap();
    next(&mut stream).await;
    worker.client.post::<_, ()>("/shutdown", &()).await.unwrap();
    let events = rest(stream).await;
    assert!(matches!(events.last(), Some((_, WorkerEvent::End(end))) if end.tokens_out == 2000));
    timeout(PATIENCE, worker.task)
        .await
        .expect("it stops")
        .unwrap()
        .unwrap();

    let worker = Worker::with(|config| config.args.stop_grace_s = 0).await;
    let mut stream = worker.execute(&endless("job-1", 1)).await.unwrap();
    next(&mut stream).await;
    worker.shutdown.trigger();
    let events = rest(stream).await;
    assert_eq!(last_error(&events), WorkerErrorCode::ShuttingDown);
    assert!(matches!(events.last(), Some((_, WorkerEvent::Error(error))) if error.retriable));
    timeout(PATIENCE, worker.task)
        .await
        .expect("it stops")
        .unwrap()
        .unwrap();
}
