//! FAKE workers, which speak the real contract and send what a test wants.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::Stream;
use jiff::Timestamp;
use orchestrator_core::JobId;
use pool_core::api::pool::WorkerEndpoint;
use pool_core::api::receipt::{Receipt, hash_of_ids};
use pool_core::api::worker::{
    CacheShortage, CancelRequest, CancelResponse, ContextOverflow, ExecuteRequest, NEWEST_EVENT,
    Origin, Resume, StopReason, WorkerEnd, WorkerError, WorkerErrorCode, WorkerEvent,
    WorkerStarted, WorkerToken,
};
use pool_core::kit::service::{Json, ServiceError};
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::{
    Device, ExitReason, ModelFile, WorkerExit, WorkerInfo, WorkerMemory, WorkerStatus,
};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::{MODEL, eventually, soon};

#[derive(Default)]
struct Execution {
    fence: u64,
    events: Vec<WorkerEvent>,
    /// Number of breaks so far. A break cuts all streams opened before it.
    breaks: u64,
    /// Build that the worker claims to compute with.
    build: String,
}

#[derive(Default)]
struct WorkerInner {
    executions: HashMap<String, Execution>,
    requests: Vec<ExecuteRequest>,
    cancels: Vec<CancelRequest>,
    deleted: Vec<String>,
    /// Answers to the next `/execute` calls.
    refusals: Vec<WorkerErrorCode>,
    /// True if cancels wait for their answers.
    slow_cancels: bool,
    /// True if `/execute` calls are lost on their way.
    lose_executes: bool,
    /// Correlation ids of the accepted executions.
    correlations: Vec<String>,
    /// True if each execution sends a few tokens and ends, without further instruction.
    fluent: bool,
    /// Free tokens of the cache, if a fluent worker refuses longer answers.
    free_tokens: Option<u32>,
}

/// A FAKE worker.
pub struct FakeWorker {
    pub id: String,
    pub secret: String,
    pub addr: SocketAddr,
    inner: Arc<Mutex<WorkerInner>>,
    changed: watch::Sender<()>,
    server: JoinHandle<()>,
    alive: watch::Sender<bool>,
    lost: watch::Sender<usize>,
}

/// Another address that leads to a worker.
pub struct Relay {
    pub addr: SocketAddr,
    closed: watch::Sender<bool>,
    refused: watch::Sender<usize>,
    server: JoinHandle<()>,
}

impl Relay {
    /// Refuses further connections. Open ones stay.
    pub fn close(&self) {
        self.closed.send_replace(true);
    }

    /// Waits until one more connection has been refused.
    pub async fn turns_one_away(&self) {
        let mut refused = self.refused.subscribe();
        let before = *refused.borrow_and_update();
        soon(
            "another try at the closed address",
            refused.wait_for(|count| *count > before),
        )
        .await
        .unwrap();
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.server.abort();
    }
}

#[derive(Clone)]
struct WorkerState {
    inner: Arc<Mutex<WorkerInner>>,
    changed: watch::Sender<()>,
    alive: watch::Receiver<bool>,
    lost: watch::Sender<usize>,
    secret: String,
}

impl FakeWorker {
    pub async fn start(id: &str) -> Self {
        let (inner, changed) = (Arc::<Mutex<WorkerInner>>::default(), watch::Sender::new(()));
        let (alive, lost) = (watch::Sender::new(true), watch::Sender::new(0));
        let secret = format!("secret-of-{id}");
        let state = WorkerState {
            inner: Arc::clone(&inner),
            changed: changed.clone(),
            alive: alive.subscribe(),
            lost: lost.clone(),
            secret: secret.clone(),
        };
        let app = Router::new()
            .route("/execute", post(execute))
            .route("/executions/{id}/events", get(reattach))
            .route("/executions/{id}", axum::routing::delete(forget))
            .route("/cancel", post(cancel))
            .with_state(state);
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            id: id.to_owned(),
            secret,
            addr,
            inner,
            changed,
            server,
            alive,
            lost,
        }
    }

    /// Waits until an `/execute` call was lost.
    pub async fn lost_execute(&self) {
        let mut lost = self.lost.subscribe();
        soon("a lost call", lost.wait_for(|count| *count > 0))
            .await
            .unwrap();
    }

    /// Opens another address for the same worker, as a relaying pool has after a restart.
    pub async fn answers_elsewhere(&self) -> Relay {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, goal) = (listener.local_addr().unwrap(), self.addr);
        let (closed, refused) = (watch::Sender::new(false), watch::Sender::new(0));
        let (shut, count) = (closed.subscribe(), refused.clone());
        let server = tokio::spawn(async move {
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                if *shut.borrow() {
                    drop(from);
                    count.send_modify(|count| *count += 1);
                    continue;
                }
                tokio::spawn(async move {
                    let mut to = tokio::net::TcpStream::connect(goal).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                });
            }
        });
        Relay {
            addr,
            closed,
            refused,
            server,
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut WorkerInner) -> T) -> T {
        let result = change(&mut self.inner.lock().unwrap());
        self.changed.send_replace(());
        result
    }

    /// Refuses the next `/execute` calls with these codes.
    pub fn refuse(&self, codes: &[WorkerErrorCode]) {
        self.change(|inner| inner.refusals.extend(codes));
    }

    /// Loses `/execute` calls, or stops losing them: lost calls arrive nowhere and get no answer.
    pub fn lose_executes(&self, lose: bool) {
        self.change(|inner| inner.lose_executes = lose);
    }

    pub fn correlations(&self) -> Vec<String> {
        self.inner.lock().unwrap().correlations.clone()
    }

    /// Makes each further execution send three tokens and end.
    pub fn be_fluent(&self) {
        self.change(|inner| inner.fluent = true);
    }

    /// Makes a fluent worker refuse answers that may be longer than the free tokens of its cache.
    pub fn has_left(&self, free_tokens: Option<u32>) {
        self.change(|inner| inner.free_tokens = free_tokens);
    }

    /// Makes cancels wait for their answers, or lets them continue.
    pub fn slow_cancels(&self, slow: bool) {
        self.change(|inner| inner.slow_cancels = slow);
    }

    /// Waits for the `count`th accepted execution, and returns its request.
    pub async fn request(&self, count: usize) -> ExecuteRequest {
        let what = format!("execution {count} on {}", self.id);
        eventually(&what, async || {
            self.inner.lock().unwrap().requests.get(count - 1).cloned()
        })
        .await
    }

    pub fn requests(&self) -> Vec<ExecuteRequest> {
        self.inner.lock().unwrap().requests.clone()
    }

    pub fn cancels(&self) -> Vec<CancelRequest> {
        self.inner.lock().unwrap().cancels.clone()
    }

    pub fn deleted(&self) -> Vec<String> {
        self.inner.lock().unwrap().deleted.clone()
    }

    pub fn send(&self, job: JobId, event: WorkerEvent) {
        self.change(|inner| {
            inner
                .executions
                .get_mut(&job.to_string())
                .unwrap()
                .events
                .push(event);
        });
    }

    /// Sends `started` as a real worker does that continues the given text.
    pub fn started(&self, job: JobId) {
        self.started_as(job, "a-build");
    }

    /// Sends `started` as a real worker of this build does.
    pub fn started_as(&self, job: JobId, build: &str) {
        self.started_where(job, build, |resume, origin| {
            let build = resume.origin.as_ref().is_some_and(|from| from == origin);
            build || !resume.seen_more
        });
    }

    /// Sends `started` as a worker does that does not continue the given text.
    pub fn starts_over(&self, job: JobId, build: &str) {
        self.started_where(job, build, |_, _| false);
    }

    fn started_where(&self, job: JobId, build: &str, continues: impl Fn(&Resume, &Origin) -> bool) {
        let fence = self.inner.lock().unwrap().executions[&job.to_string()].fence;
        let requests = self.requests();
        let request = requests
            .iter()
            .rfind(|r| r.job_id == job.to_string())
            .unwrap();
        let attempt = request.attempt;
        let origin = Origin {
            model: "sha256:00".into(),
            build: build.into(),
        };
        self.change(|inner| {
            let execution = inner.executions.get_mut(&job.to_string());
            execution.unwrap().build = build.into();
        });
        let resume = request.resume.as_ref();
        let continues = resume.is_some_and(|resume| continues(resume, &origin));
        self.send(
            job,
            WorkerEvent::Started(WorkerStarted {
                job_id: job.to_string(),
                attempt,
                fence,
                tokens_in: 3,
                origin: Some(origin),
                continues,
            }),
        );
    }

    /// Sends the tokens of `range`, each with its index as text.
    pub fn tokens(&self, job: JobId, range: std::ops::Range<u32>) {
        for i in range {
            self.send(
                job,
                WorkerEvent::Token(WorkerToken {
                    i,
                    t: format!("<{i}>"),
                    ids: vec![i + 100],
                }),
            );
        }
    }

    /// Ends the text after `tokens_out` tokens, with a receipt.
    pub fn end(&self, job: JobId, tokens_out: u32) {
        let receipt = self.receipt(job, tokens_out);
        self.end_with(job, tokens_out, Some(receipt));
    }

    pub fn end_with(&self, job: JobId, tokens_out: u32, receipt: Option<Receipt>) {
        let end = WorkerEnd {
            tokens_in: 3,
            tokens_out,
            stop_reason: StopReason::Eos,
            seed: 1,
            ttft_ms: 2,
            decode_time_ms: 5,
            receipt: receipt.map(Box::new),
        };
        self.send(job, WorkerEvent::End(end));
    }

    /// Returns the receipt of an answer of `tokens_out` tokens.
    pub fn receipt(&self, job: JobId, tokens_out: u32) -> Receipt {
        let inner = self.inner.lock().unwrap();
        let job = job.to_string();
        let request = inner.requests.iter().rfind(|r| r.job_id == job).unwrap();
        receipt(request, &inner.executions[&job].build, tokens_out)
    }

    pub fn error(&self, job: JobId, code: WorkerErrorCode) {
        let error = WorkerError {
            code,
            message: "as the test wants".into(),
            retriable: true,
            overflow: None,
            shortage: None,
        };
        self.send(job, WorkerEvent::Error(error));
    }

    /// Reports that the job needs a longer context than the worker has.
    pub fn overflow(&self, job: JobId, overflow: ContextOverflow) {
        let error = WorkerError {
            code: WorkerErrorCode::ContextOverflow,
            message: "no room".into(),
            retriable: false,
            overflow: Some(overflow),
            shortage: None,
        };
        self.send(job, WorkerEvent::Error(error));
    }

    /// Reports that the worker's cache has no room for the job.
    pub fn short(&self, job: JobId, shortage: CacheShortage) {
        self.send(job, self::shortage(shortage));
    }

    /// Forgets the execution, as if it had never existed.
    pub fn forget(&self, job: JobId) {
        self.change(|inner| inner.executions.remove(&job.to_string()));
    }

    /// Cuts the open streams of the execution, which continues.
    pub fn cut_streams(&self, job: JobId) {
        self.change(|inner| inner.executions.get_mut(&job.to_string()).unwrap().breaks += 1);
    }

    /// Kills the worker: every connection breaks, and nothing listens any more.
    pub async fn kill(&self) {
        self.server.abort();
        self.alive.send_replace(false);
        eventually("the fake worker's end", async || {
            tokio::net::TcpStream::connect(self.addr)
                .await
                .is_err()
                .then_some(())
        })
        .await;
    }

    pub fn info(&self, status: WorkerStatus) -> WorkerInfo {
        WorkerInfo {
            port: self.addr.port(),
            ..worker_info(&self.id, status)
        }
    }

    pub fn endpoint(&self) -> WorkerEndpoint {
        WorkerEndpoint {
            worker_id: self.id.clone(),
            url: format!("http://{}", self.addr),
            secret: self.secret.clone(),
        }
    }
}

impl Drop for FakeWorker {
    fn drop(&mut self) {
        self.server.abort();
        self.alive.send_replace(false);
    }
}

fn refusal(code: WorkerErrorCode) -> Response {
    let status = match code {
        WorkerErrorCode::Busy => StatusCode::TOO_MANY_REQUESTS,
        WorkerErrorCode::StaleFence => StatusCode::CONFLICT,
        WorkerErrorCode::NotFound => StatusCode::NOT_FOUND,
        WorkerErrorCode::Loading | WorkerErrorCode::ShuttingDown => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::BAD_REQUEST,
    };
    ServiceError::new(status, code.as_str(), "as the test wants").into_response()
}

fn authorised(state: &WorkerState, headers: &HeaderMap) -> Result<(), Box<Response>> {
    let given = headers
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    if given == format!("Bearer {}", state.secret) {
        Ok(())
    } else {
        Err(Box::new(
            ServiceError::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", "wrong secret")
                .into_response(),
        ))
    }
}

async fn execute(
    State(state): State<WorkerState>,
    headers: HeaderMap,
    Json(request): Json<ExecuteRequest>,
) -> Response {
    if let Err(response) = authorised(&state, &headers) {
        return *response;
    }
    let job = request.job_id.clone();
    if state.inner.lock().unwrap().lose_executes {
        state.lost.send_modify(|count| *count += 1);
        return std::future::pending().await;
    }
    {
        let mut inner = state.inner.lock().unwrap();
        if !inner.refusals.is_empty() {
            return refusal(inner.refusals.remove(0));
        }
        let current = inner.executions.get(&job).map(|execution| execution.fence);
        match current {
            Some(fence) if request.fence < fence => return refusal(WorkerErrorCode::StaleFence),
            Some(fence) if request.fence == fence => {}
            _ => {
                let free_tokens = inner.free_tokens.filter(|free| request.max_tokens > *free);
                let events = match (inner.fluent, free_tokens) {
                    (false, _) => Vec::new(),
                    (true, None) => a_few_words(&request),
                    (true, Some(free_tokens)) => vec![shortage(CacheShortage {
                        needed_tokens: request.max_tokens,
                        free_tokens,
                    })],
                };
                inner.executions.insert(
                    job.clone(),
                    Execution {
                        fence: request.fence,
                        events,
                        ..Default::default()
                    },
                );
                inner.correlations.push(correlation_of(&headers));
                inner.requests.push(request);
            }
        }
    }
    state.changed.send_replace(());
    Sse::new(stream(state, job, 0)).into_response()
}

pub fn correlation_of(headers: &HeaderMap) -> String {
    let id = headers.get("x-correlation-id");
    id.map_or_else(String::new, |id| id.to_str().unwrap().to_owned())
}

/// Returns the receipt of a worker with one rare model, for an answer whose ids count from 100.
fn receipt(request: &ExecuteRequest, build: &str, tokens_out: u32) -> Receipt {
    let resume = request.resume.as_ref();
    let ids: Vec<u32> = (100..100 + tokens_out).collect();
    let mut receipt = Receipt {
        model_sha256: Some("00".into()),
        engine: "fake 1".into(),
        arithmetic: build.into(),
        earlier_arithmetic: Vec::new(),
        tokenizer_sha256: "01".into(),
        chat_template_sha256: Some("02".into()),
        prompt_tokens: 3,
        prompt_sha256: hash_of_ids(&[1, 2, 3]),
        temperature: request.sampling.temperature,
        top_p: request.sampling.top_p,
        top_k: request.sampling.top_k,
        min_p: request.sampling.min_p,
        repetition_penalty: request.sampling.repetition_penalty,
        seed: request.seed,
        max_tokens: request.max_tokens,
        stop_sha256: None,
        output_tokens: tokens_out,
        output_sha256: hash_of_ids(&ids),
    };
    let origin = resume.and_then(|resume| resume.origin.as_ref());
    receipt.note_earlier(origin.map(|origin| origin.build.as_str()));
    receipt
}

/// Returns the error of a worker that lacks room for an answer.
fn shortage(shortage: CacheShortage) -> WorkerEvent {
    WorkerEvent::Error(WorkerError {
        code: WorkerErrorCode::CacheFull,
        message: "the cache is full".into(),
        retriable: true,
        overflow: None,
        shortage: Some(shortage),
    })
}

/// Returns the events of a whole execution.
fn a_few_words(request: &ExecuteRequest) -> Vec<WorkerEvent> {
    let started = WorkerEvent::Started(WorkerStarted {
        job_id: request.job_id.clone(),
        attempt: request.attempt,
        fence: request.fence,
        tokens_in: 3,
        origin: None,
        continues: false,
    });
    let tokens = (0..3).map(|i| {
        WorkerEvent::Token(WorkerToken {
            i,
            t: format!("<{i}>"),
            ids: vec![i + 100],
        })
    });
    let end = WorkerEvent::End(WorkerEnd {
        tokens_in: 3,
        tokens_out: 3,
        stop_reason: StopReason::Eos,
        seed: request.seed,
        ttft_ms: 2,
        decode_time_ms: 5,
        receipt: Some(Box::new(receipt(request, "a-build", 3))),
    });
    std::iter::once(started)
        .chain(tokens)
        .chain(std::iter::once(end))
        .collect()
}

async fn reattach(
    State(state): State<WorkerState>,
    Path(job): Path<String>,
    headers: HeaderMap,
) -> Response {
    if let Err(response) = authorised(&state, &headers) {
        return *response;
    }
    if !state.inner.lock().unwrap().executions.contains_key(&job) {
        return refusal(WorkerErrorCode::NotFound);
    }
    let after = headers
        .get("last-event-id")
        .map_or(0, |id| id.to_str().unwrap().parse().unwrap());
    let newest = state.inner.lock().unwrap().executions[&job].events.len();
    let newest = [(NEWEST_EVENT, newest.to_string())];
    (newest, Sse::new(stream(state, job, after))).into_response()
}

fn stream(
    state: WorkerState,
    job: String,
    mut after: usize,
) -> impl Stream<Item = Result<Event, std::io::Error>> {
    let (mut changed, mut alive) = (state.changed.subscribe(), state.alive.clone());
    let breaks = state.inner.lock().unwrap().executions[&job].breaks;
    async_stream::stream! {
        loop {
            changed.borrow_and_update();
            let (events, cut) = {
                let inner = state.inner.lock().unwrap();
                let Some(execution) = inner.executions.get(&job) else { return };
                (execution.events.get(after..).unwrap_or_default().to_vec(), execution.breaks > breaks)
            };
            for event in events {
                after += 1;
                let last = event.is_last();
                yield Ok(Event::default().event(event.name()).data(event.data()).id(after.to_string()));
                if last {
                    return;
                }
            }
            if cut || !*alive.borrow() {
                yield Err(std::io::Error::other("cut by the test"));
                return;
            }
            tokio::select! {
                _ = changed.changed() => {}
                _ = alive.changed() => {}
            }
        }
    }
}

async fn forget(State(state): State<WorkerState>, Path(job): Path<String>) -> StatusCode {
    let mut inner = state.inner.lock().unwrap();
    inner.executions.remove(&job);
    inner.deleted.push(job);
    StatusCode::NO_CONTENT
}

async fn cancel(State(state): State<WorkerState>, Json(request): Json<CancelRequest>) -> Response {
    let mut changed = state.changed.subscribe();
    state.inner.lock().unwrap().cancels.push(request.clone());
    let _ = changed
        .wait_for(|()| !state.inner.lock().unwrap().slow_cancels)
        .await;
    let inner = state.inner.lock().unwrap();
    let current = inner
        .executions
        .get(&request.job_id)
        .map(|execution| execution.fence);
    match current {
        Some(fence) if request.fence < fence => refusal(WorkerErrorCode::StaleFence),
        current => Json(CancelResponse {
            cancelled: current.is_some(),
        })
        .into_response(),
    }
}

pub fn model_file() -> ModelFile {
    ModelFile {
        size_bytes: 1000,
        // A present-day time, which has more than 53 bits.
        modified_ns: 1_764_433_800_123_456_789,
        sha256: None,
    }
}

pub fn worker_info(id: &str, status: WorkerStatus) -> WorkerInfo {
    WorkerInfo {
        id: id.to_owned(),
        model_ref: MODEL.parse().unwrap(),
        model_file: model_file(),
        device: Device::CPU,
        status,
        pid: Some(1),
        port: 0,
        context_length: Some(4096),
        slots: 1,
        active: 0,
        cache: None,
        load_percent: 100,
        memory: WorkerMemory::default(),
        created_at: Timestamp::UNIX_EPOCH,
        ready_at: None,
        idle_since: None,
        ending: None,
        exit: None,
    }
}

/// Returns the record of a worker that refused its model's file, or was killed later.
pub fn ended(mut info: WorkerInfo, message: &str, during_start: bool) -> WorkerInfo {
    info.status = WorkerStatus::Failed;
    info.exit = Some(WorkerExit {
        reason: if during_start {
            ExitReason::ModelInvalid
        } else {
            ExitReason::Signal(9)
        },
        message: message.to_owned(),
        during_start,
        at: Timestamp::UNIX_EPOCH,
        log_tail: Vec::new(),
    });
    info
}
