//! A daemon under test, and the FAKE pool and FAKE workers that it talks to. The fakes compute nothing: a test says
//! which events a worker sends and when. They speak the wire types of `pool-core` over real connections.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::{Stream, StreamExt};
use jiff::Timestamp;
use orchestrator_core::api::events::{EventId, TaskEvent};
use orchestrator_core::api::tasks::{TaskAccepted, TaskView};
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::{JobId, JobStatus};
use orchestratord::Daemon;
use pool_core::api::models::{DownloadEvent, ModelDownloadRequest};
use pool_core::api::pool::{
    DeviceInfo, DiskInfo, DrainRequest, DrainStatus, Heartbeat, ModelOnDisk, PoolSnapshot,
    PoolStatus, RegisterRequest, WorkerEndpoint, WorkerSpawnRequest,
};
use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, NEWEST_EVENT, Origin, StopReason, WorkerEnd,
    WorkerError, WorkerErrorCode, WorkerEvent, WorkerStarted, WorkerToken,
};
use pool_core::client::{ApiClient, ClientError, EventStream, Method};
use pool_core::home::Home;
use pool_core::service::{Json, ServiceError, Shutdown};
use pool_core::worker::{
    Backend, Device, ExitReason, ModelFile, WorkerExit, WorkerInfo, WorkerMemory, WorkerStatus,
};
use serde::de::IgnoredAny;
use serde_json::json;
use tokio::process::{Child, Command};
use tokio::sync::watch;
use tokio::task::JoinHandle;

pub const MODEL: &str = "smollm2-135m";
/// Longer than anything here takes; only a failing test waits for it.
pub const LONG: Duration = Duration::from_secs(20);

/// Waits for `condition`, and fails with `what` when it does not come.
pub async fn eventually<T>(what: &str, mut condition: impl AsyncFnMut() -> Option<T>) -> T {
    let end = tokio::time::Instant::now() + LONG;
    loop {
        if let Some(value) = condition().await {
            return value;
        }
        assert!(
            tokio::time::Instant::now() < end,
            "{what} did not come about"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `work`, unless it takes suspiciously long.
pub async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    match tokio::time::timeout(LONG, work).await {
        Ok(value) => value,
        Err(_) => panic!("{what} takes too long"),
    }
}

/// A daemon under test with a home of its own.
pub struct Orchestrator {
    pub home: Arc<tempfile::TempDir>,
    pub config: OrchestratorConfig,
    pub addr: SocketAddr,
    api: Api,
    shutdown: Shutdown,
    daemon: Daemon,
}

impl std::ops::Deref for Orchestrator {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Orchestrator {
    pub async fn start() -> Self {
        Self::start_with(|_| {}).await
    }

    pub async fn start_with(change: impl FnOnce(&mut OrchestratorConfig)) -> Self {
        let mut config = OrchestratorConfig {
            bind: ([127, 0, 0, 1], 0).into(),
            ..Default::default()
        };
        change(&mut config);
        Self::start_in(Arc::new(tempfile::tempdir().unwrap()), config)
            .await
            .unwrap()
    }

    pub async fn start_in(
        home: Arc<tempfile::TempDir>,
        config: OrchestratorConfig,
    ) -> anyhow::Result<Self> {
        let shutdown = Shutdown::manual();
        let daemon = Daemon::start(config.clone(), Home::at(home.path()), shutdown.clone()).await?;
        let addr = daemon.addr();
        let client = ApiClient::new(&format!("http://{addr}"), None)?;
        Ok(Self {
            home,
            config,
            addr,
            api: Api { client },
            shutdown,
            daemon,
        })
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    pub fn begin_stop(&self) {
        self.shutdown.trigger();
    }

    pub async fn stop(self) -> (Arc<tempfile::TempDir>, OrchestratorConfig) {
        self.shutdown.trigger();
        soon("stopping", self.daemon.finished()).await.unwrap();
        (self.home, self.config)
    }

    /// Returns when it ends by itself.
    pub async fn ended(self) -> anyhow::Result<()> {
        self.daemon.finished().await
    }

    pub async fn restart(self) -> Self {
        let (home, config) = self.stop().await;
        Self::start_in(home, config).await.unwrap()
    }
}

/// The real binary, in a process of its own that can be killed.
pub struct Process {
    pub home: Arc<tempfile::TempDir>,
    api: Api,
    child: Child,
}

impl std::ops::Deref for Process {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Process {
    pub async fn start_in(home: Arc<tempfile::TempDir>) -> Self {
        let (child, client) = crate::process::start(home.path()).await;
        Self {
            home,
            api: Api { client },
            child,
        }
    }

    /// Sends a signal and waits for the process's end.
    pub async fn end(mut self, signal: &str) -> Arc<tempfile::TempDir> {
        let pid = self.child.id().unwrap().to_string();
        let sent = Command::new("kill").args([signal, &pid]).status().await;
        assert!(sent.unwrap().success());
        soon("the daemon's end", self.child.wait()).await.unwrap();
        self.home
    }

    /// A connection to the job database beside the daemon's.
    pub async fn database(&self) -> sqlx::SqliteConnection {
        use sqlx::ConnectOptions as _;
        let path = self.home.path().join("state/orchestratord/jobs.db");
        let options = sqlx::sqlite::SqliteConnectOptions::new().filename(path);
        options.connect().await.unwrap()
    }
}

/// What a client of a daemon does.
pub struct Api {
    pub client: ApiClient,
}

impl Api {
    pub async fn submit(&self, body: serde_json::Value) -> Result<TaskAccepted, ClientError> {
        self.client.post("/v2/tasks", &body).await
    }

    /// Submits a prompt with the default model.
    pub async fn job(&self) -> JobId {
        self.submit(json!({"model": MODEL, "prompt": "hi", "seed": 1}))
            .await
            .unwrap()
            .job_id
    }

    /// A job that runs on a worker of a pool that must be heard ten times a second.
    pub async fn runs_on_a_hasty_pool(&self) -> (FakeWorker, FakePool, JobId) {
        let worker = FakeWorker::start("worker-cpu-0").await;
        let mut pool = FakePool::start("pool-a").await.has(&worker);
        pool.interval_ms = 100;
        pool.register(self).await;
        let job = self.job().await;
        worker.request(1).await;
        worker.started(job);
        self.until(job, JobStatus::Running).await;
        (worker, pool, job)
    }

    pub async fn show(&self, job: JobId) -> TaskView {
        self.client.get(&format!("/v2/tasks/{job}")).await.unwrap()
    }

    pub async fn until(&self, job: JobId, status: JobStatus) -> TaskView {
        let what = format!("{job} being {status}");
        eventually(&what, async || {
            Some(self.show(job).await).filter(|view| view.status == status)
        })
        .await
    }

    pub async fn cancel(&self, job: JobId) -> JobStatus {
        let answer: orchestrator_core::api::tasks::CancelResponse = self
            .client
            .post(&format!("/v2/tasks/{job}/cancel"), &json!({}))
            .await
            .unwrap();
        answer.status
    }

    pub async fn follow(&self, job: JobId, after: Option<&str>) -> Result<Reader, ClientError> {
        let mut request = self
            .client
            .request(Method::GET, &format!("/v2/tasks/{job}/events"));
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        Ok(Reader {
            stream: self.client.events(request).await?,
        })
    }
}

/// One event as a reader got it.
#[derive(Debug, Clone, PartialEq)]
pub struct Got {
    pub id: Option<EventId>,
    pub event: TaskEvent,
}

/// A reader of a job's events.
pub struct Reader {
    pub stream: EventStream,
}

impl Reader {
    /// The next event that is logged; momentary ones are skipped.
    pub async fn logged(&mut self) -> Option<Got> {
        loop {
            let got = self.any().await?;
            if got.event.is_logged() {
                return Some(got);
            }
        }
    }

    pub async fn any(&mut self) -> Option<Got> {
        let event = soon("an event", self.stream.next()).await?.ok()?;
        let id = event.id.map(|id| id.parse().unwrap());
        Some(Got {
            id,
            event: TaskEvent::parse(&event.event, &event.data).unwrap(),
        })
    }

    /// All logged events until the stream ends.
    pub async fn rest(mut self) -> Vec<Got> {
        let mut all = Vec::new();
        while let Some(got) = self.logged().await {
            all.push(got);
        }
        all
    }
}

/// Names with ids, as `started 1.2`.
pub fn outline(events: &[Got]) -> Vec<String> {
    let line = |got: &Got| match got.id {
        Some(id) => format!("{} {id}", got.event.name()),
        None => got.event.name().to_owned(),
    };
    events.iter().map(line).collect()
}

/// The text that a reader keeps.
pub fn kept_text(events: &[Got]) -> String {
    let mut text = String::new();
    for got in events {
        match &got.event {
            TaskEvent::Attempt(attempt) if !attempt.continues => text.clear(),
            TaskEvent::Token(token) => text.push_str(&token.t),
            _ => {}
        }
    }
    text
}

#[derive(Default)]
struct Execution {
    fence: u64,
    events: Vec<WorkerEvent>,
    /// Streams opened before this many breaks are cut.
    breaks: u64,
}

#[derive(Default)]
struct WorkerInner {
    executions: HashMap<String, Execution>,
    requests: Vec<ExecuteRequest>,
    cancels: Vec<CancelRequest>,
    deleted: Vec<String>,
    /// Answers to the next `/execute` calls.
    refusals: Vec<WorkerErrorCode>,
    /// Whether cancels wait for their answers.
    slow_cancels: bool,
    /// Whether `/execute` calls are lost on their way.
    lose_executes: bool,
    /// Correlation ids of the executions that it accepted.
    correlations: Vec<String>,
    /// Whether each execution says a few words and ends, without being told to.
    fluent: bool,
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

    /// Waits until an `/execute` call went astray.
    pub async fn lost_execute(&self) {
        let mut lost = self.lost.subscribe();
        soon("a lost call", lost.wait_for(|count| *count > 0))
            .await
            .unwrap();
    }

    /// Another address at which the same worker answers, as a pool that relays has after a restart.
    pub async fn answers_elsewhere(&self) -> (SocketAddr, JoinHandle<()>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, goal) = (listener.local_addr().unwrap(), self.addr);
        let relay = tokio::spawn(async move {
            loop {
                let (mut from, _) = listener.accept().await.unwrap();
                tokio::spawn(async move {
                    let mut to = tokio::net::TcpStream::connect(goal).await.unwrap();
                    let _ = tokio::io::copy_bidirectional(&mut from, &mut to).await;
                });
            }
        });
        (addr, relay)
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

    /// Lets `/execute` calls go astray: they arrive nowhere and are not answered.
    pub fn lose_executes(&self, lose: bool) {
        self.change(|inner| inner.lose_executes = lose);
    }

    pub fn correlations(&self) -> Vec<String> {
        self.inner.lock().unwrap().correlations.clone()
    }

    /// From now on each execution says three tokens and ends.
    pub fn be_fluent(&self) {
        self.change(|inner| inner.fluent = true);
    }

    /// Lets cancels wait for their answers, or go on.
    pub fn slow_cancels(&self, slow: bool) {
        self.change(|inner| inner.slow_cancels = slow);
    }

    /// The request of the `count`th execution that it accepted.
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

    /// Sends `started` as a real one does that goes on from what it is given.
    pub fn started(&self, job: JobId) {
        self.started_as(job, "a-build");
    }

    /// Sends `started` as a real one of this build does.
    pub fn started_as(&self, job: JobId, build: &str) {
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
        let continues = request.resume.as_ref().is_some_and(|resume| {
            let build = resume.origin.as_ref().is_some_and(|from| *from == origin);
            build || !resume.seen_more
        });
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

    /// Sends tokens `from..to`, each of which says its index.
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

    pub fn end(&self, job: JobId, tokens_out: u32) {
        let end = WorkerEnd {
            tokens_in: 3,
            tokens_out,
            stop_reason: StopReason::Eos,
            seed: 1,
            ttft_ms: 2,
            decode_time_ms: 5,
        };
        self.send(job, WorkerEvent::End(end));
    }

    pub fn error(&self, job: JobId, code: WorkerErrorCode) {
        let error = WorkerError {
            code,
            message: "as the test wants".into(),
            retriable: true,
        };
        self.send(job, WorkerEvent::Error(error));
    }

    /// Drops the execution as if it had never been there.
    pub fn forget(&self, job: JobId) {
        self.change(|inner| inner.executions.remove(&job.to_string()));
    }

    /// Cuts the open streams of the execution, which goes on.
    pub fn cut_streams(&self, job: JobId) {
        self.change(|inner| inner.executions.get_mut(&job.to_string()).unwrap().breaks += 1);
    }

    /// Dies: every connection breaks and nothing listens any more.
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
                let events = if inner.fluent {
                    a_few_words(&request)
                } else {
                    Vec::new()
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

fn correlation_of(headers: &HeaderMap) -> String {
    let id = headers.get("x-correlation-id");
    id.map_or_else(String::new, |id| id.to_str().unwrap().to_owned())
}

/// A whole execution.
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
        modified_ns: 1,
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
        load_percent: 100,
        memory: WorkerMemory::default(),
        created_at: Timestamp::UNIX_EPOCH,
        ready_at: None,
        idle_since: None,
        ending: None,
        exit: None,
    }
}

/// The record of a worker that refused its model's file, or was killed later.
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

type Spawned = Arc<Mutex<Vec<WorkerSpawnRequest>>>;

/// A FAKE pool: it says what a test wants, when a test wants.
pub struct FakePool {
    pub id: String,
    pub instance: String,
    pub workers: Vec<WorkerInfo>,
    pub endpoints: Vec<WorkerEndpoint>,
    pub models: Vec<ModelOnDisk>,
    pub interval_ms: u64,
    pub spawned: Spawned,
    /// The message with which spawns are refused.
    pub refusal: Arc<Mutex<Option<String>>>,
    /// Correlation ids of the spawns that it was asked for.
    pub correlations: Arc<Mutex<Vec<String>>>,
    addr: SocketAddr,
    server: JoinHandle<()>,
    seq: AtomicU64,
    pub asked: Asked,
}

impl FakePool {
    /// A pool with the default model on its disk and no worker.
    pub async fn start(id: &str) -> Self {
        let asked = Asked::default();
        let (spawned, refusal) = (Spawned::default(), Arc::<Mutex<Option<String>>>::default());
        let correlations = Arc::<Mutex<Vec<String>>>::default();
        let ids = Arc::clone(&correlations);
        let app = Router::new()
            .route(
                "/workers/spawn",
                post(async move |headers: HeaderMap, state, request| {
                    ids.lock().unwrap().push(correlation_of(&headers));
                    spawn(state, request).await
                }),
            )
            .with_state((Arc::clone(&spawned), Arc::clone(&refusal)))
            .merge(asked.routes());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let server = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        let model = ModelOnDisk {
            model_ref: MODEL.parse().unwrap(),
            file: model_file(),
            needed_bytes: 1000,
        };
        Self {
            id: id.to_owned(),
            instance: "instance-1".to_owned(),
            workers: Vec::new(),
            endpoints: Vec::new(),
            models: vec![model],
            interval_ms: 60_000,
            asked,
            spawned,
            refusal,
            correlations,
            addr,
            server,
            seq: AtomicU64::new(0),
        }
    }

    /// Puts a ready worker into what the pool says.
    pub fn has(mut self, worker: &FakeWorker) -> Self {
        self.workers.push(worker.info(WorkerStatus::Ready));
        self.endpoints.push(worker.endpoint());
        self
    }

    pub fn registration(&self) -> RegisterRequest {
        RegisterRequest {
            pool_id: self.id.clone(),
            instance_id: self.instance.clone(),
            url: format!("http://{}", self.addr),
            api_version: pool_core::POOL_API_VERSION,
            heartbeat_interval_ms: self.interval_ms,
        }
    }

    pub fn next_heartbeat(&self) -> Heartbeat {
        let status = PoolStatus {
            workers: self.workers.clone(),
            models: self.models.clone(),
            ..pool_status(&self.id, &self.instance)
        };
        let snapshot = PoolSnapshot {
            status,
            endpoints: self.endpoints.clone(),
        };
        Heartbeat {
            instance_id: self.instance.clone(),
            seq: self.seq.fetch_add(1, Ordering::Relaxed) + 1,
            snapshot,
        }
    }

    pub async fn register(&self, orchestrator: &Api) {
        self.register_at(&orchestrator.client).await;
    }

    pub async fn register_at(&self, orchestrator: &ApiClient) {
        let _: IgnoredAny = orchestrator
            .post("/v2/pools/register", &self.registration())
            .await
            .unwrap();
        self.beat_at(orchestrator).await;
    }

    /// Speaks, and says something else of itself than usual.
    pub async fn beat_with(
        &self,
        orchestrator: &Orchestrator,
        change: impl FnOnce(&mut PoolStatus),
    ) {
        let mut heartbeat = self.next_heartbeat();
        change(&mut heartbeat.snapshot.status);
        let path = format!("/v2/pools/{}/heartbeat", self.id);
        let _: IgnoredAny = orchestrator.client.post(&path, &heartbeat).await.unwrap();
    }

    pub async fn beat(&self, orchestrator: &Api) {
        self.beat_at(&orchestrator.client).await;
    }

    pub async fn beat_at(&self, orchestrator: &ApiClient) {
        let path = format!("/v2/pools/{}/heartbeat", self.id);
        let _: IgnoredAny = orchestrator
            .post(&path, &self.next_heartbeat())
            .await
            .unwrap();
    }
}

/// What a FAKE pool was asked for besides workers.
#[derive(Clone, Default)]
pub struct Asked {
    /// Workers that it was told to stop.
    pub stops: Arc<Mutex<Vec<String>>>,
    /// Models that it was told to download.
    pub downloads: Arc<Mutex<Vec<String>>>,
    /// What it says of a download; the stream stays open until the last event is there.
    pub events: Arc<Mutex<Vec<DownloadEvent>>>,
}

impl Asked {
    fn routes(&self) -> Router {
        Router::new()
            .route("/workers/{id}/stop", post(stop_worker))
            .route("/models/download", post(download))
            .route("/drain", post(drain))
            .route("/resume", post(resume))
            .with_state(self.clone())
    }
}

async fn stop_worker(State(asked): State<Asked>, Path(id): Path<String>) -> Response {
    asked.stops.lock().unwrap().push(id.clone());
    Json(worker_info(&id, WorkerStatus::Draining)).into_response()
}

async fn download(
    State(asked): State<Asked>,
    Json(request): Json<ModelDownloadRequest>,
) -> Response {
    asked
        .downloads
        .lock()
        .unwrap()
        .push(request.model.to_string());
    let events = async_stream::stream! {
        let mut next = 0;
        loop {
            let event = asked.events.lock().unwrap().get(next).cloned();
            let Some(event) = event else {
                tokio::time::sleep(Duration::from_millis(5)).await;
                continue;
            };
            next += 1;
            let data = serde_json::to_string(&event).unwrap();
            yield Ok::<_, std::convert::Infallible>(Event::default().event(event.name()).data(data));
            if event.is_last() {
                return;
            }
        }
    };
    Sse::new(events).into_response()
}

impl Drop for FakePool {
    fn drop(&mut self) {
        self.server.abort();
    }
}

/// What a pool without workers and models says of itself.
fn pool_status(id: &str, instance: &str) -> PoolStatus {
    let device = DeviceInfo {
        device: Device::CPU,
        name: "fake".into(),
        memory_total_bytes: 1 << 30,
        memory_free_bytes: 1 << 29,
        memory_reserved_bytes: 0,
        gpu: None,
    };
    PoolStatus {
        pool_id: id.to_owned(),
        instance_id: instance.to_owned(),
        version: "0.0.0".into(),
        started_at: Timestamp::UNIX_EPOCH,
        draining: false,
        drain: None,
        backends: vec![Backend::Cpu],
        devices: vec![device],
        workers: Vec::new(),
        models: Vec::new(),
        disk: DiskInfo::default(),
    }
}

async fn drain(Json(request): Json<DrainRequest>) -> Json<PoolStatus> {
    let drain = DrainStatus {
        since: Timestamp::UNIX_EPOCH,
        deadline: request.deadline_ms.map(|_| Timestamp::UNIX_EPOCH),
        stop_workers: request.stop_workers,
        remaining: Vec::new(),
    };
    Json(PoolStatus {
        draining: true,
        drain: Some(drain),
        ..pool_status("pool-a", "instance-1")
    })
}

async fn resume() -> Json<PoolStatus> {
    Json(pool_status("pool-a", "instance-1"))
}

async fn spawn(
    State((spawned, refusal)): State<(Spawned, Arc<Mutex<Option<String>>>)>,
    Json(request): Json<WorkerSpawnRequest>,
) -> Response {
    let mut spawned = spawned.lock().unwrap();
    spawned.push(request);
    match &*refusal.lock().unwrap() {
        Some(message) => {
            ServiceError::new(StatusCode::CONFLICT, "NO_PORT", message.clone()).into_response()
        }
        None => {
            let info = worker_info(
                &format!("worker-cpu-{}", spawned.len() - 1),
                WorkerStatus::Starting,
            );
            (StatusCode::ACCEPTED, Json(info)).into_response()
        }
    }
}

/// A daemon with one pool that has one ready worker.
pub async fn one_worker() -> (Orchestrator, FakePool, FakeWorker) {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    (orchestrator, pool, worker)
}
