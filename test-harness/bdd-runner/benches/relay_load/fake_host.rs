//! A FAKE pool host with FAKE workers, for measuring `orchestratord` alone. The workers compute nothing, but speak the real
//! contract: registration and heartbeats, `/execute` and `/executions/{id}/events` as event streams, cancel and delete. The
//! text of every token carries the time of its emission.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use futures_util::Stream;
use pool_core::api::pool::{
    DeviceInfo, DiskInfo, Heartbeat, ModelOnDisk, PoolSnapshot, PoolStatus, RegisterRequest,
    WorkerEndpoint,
};
use pool_core::api::worker::{
    CancelRequest, CancelResponse, ExecuteRequest, NEWEST_EVENT, StopReason, WorkerEnd,
    WorkerEvent, WorkerStarted, WorkerToken,
};
use pool_core::kit::client::ApiClient;
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::{Backend, Device, ModelFile, WorkerInfo, WorkerMemory, WorkerStatus};
use serde::de::IgnoredAny;
use tokio::net::TcpListener;
use tokio::sync::watch;

/// Model that the fake workers claim to serve.
pub const MODEL: &str = "smollm2-135m";
/// Number of workers, which share the streams.
const WORKERS: usize = 4;
const POOL: &str = "fake-host";
const HEARTBEAT: Duration = Duration::from_millis(1000);

/// Returns the current time, counted from `base`, as the text of a token.
pub fn stamp(base: Instant) -> String {
    format!("{:015} ", base.elapsed().as_nanos())
}

/// Returns the time of emission that a token's text contains.
pub fn emitted(text: &str) -> Option<Duration> {
    text.split_whitespace()
        .next_back()?
        .parse()
        .ok()
        .map(Duration::from_nanos)
}

struct Execution {
    request: ExecuteRequest,
    events: Vec<WorkerEvent>,
    changed: watch::Sender<()>,
}

/// The executions of all fake workers, by job.
#[derive(Clone)]
struct Shared {
    executions: Arc<Mutex<HashMap<String, Arc<Mutex<Execution>>>>>,
    /// Emitted texts, by job. They outlive the deletion of the execution.
    texts: Arc<Mutex<HashMap<String, String>>>,
    base: Instant,
    period: Duration,
}

/// A fake pool host with its fake workers.
pub struct FakeHost {
    shared: Shared,
    workers: Vec<SocketAddr>,
    url: String,
    slots: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl FakeHost {
    /// Starts fake workers that run `streams` executions concurrently, each with a token every `period`.
    pub async fn start(streams: usize, period: Duration, base: Instant) -> anyhow::Result<Self> {
        let shared = Shared {
            executions: Arc::default(),
            texts: Arc::default(),
            base,
            period,
        };
        let mut workers = Vec::new();
        for _ in 0..WORKERS {
            let router = Router::new()
                .route("/execute", post(execute))
                .route("/executions/{id}/events", get(reattach))
                .route("/executions/{id}", delete(forget))
                .route("/cancel", post(cancel))
                .with_state(shared.clone());
            workers.push(serve(router).await?);
        }
        // The pool itself serves no route, because no request needs one.
        let pool = serve(Router::new()).await?;
        let slots = u32::try_from(streams.div_ceil(WORKERS))?;
        Ok(Self {
            shared,
            workers,
            url: format!("http://{pool}"),
            slots,
        })
    }

    /// Registers the pool, and sends heartbeats until the process ends.
    pub async fn join(&self, orchestrator: &str) -> anyhow::Result<()> {
        let client = ApiClient::new(orchestrator, None)?;
        let registration = RegisterRequest {
            pool_id: POOL.to_owned(),
            instance_id: "1".to_owned(),
            url: self.url.clone(),
            api_version: pool_core::POOL_API_VERSION,
            heartbeat_interval_ms: u64::try_from(HEARTBEAT.as_millis())?,
            host_id: None,
        };
        let _: IgnoredAny = client.post("/v2/pools/register", &registration).await?;
        let mut heartbeat = Heartbeat {
            instance_id: "1".to_owned(),
            seq: 0,
            snapshot: self.snapshot()?,
        };
        tokio::spawn(async move {
            loop {
                heartbeat.seq += 1;
                let told = client
                    .post::<_, IgnoredAny>(&format!("/v2/pools/{POOL}/heartbeat"), &heartbeat)
                    .await;
                if let Err(error) = told {
                    eprintln!("a heartbeat: {error}");
                }
                tokio::time::sleep(HEARTBEAT).await;
            }
        });
        Ok(())
    }

    /// Removes and returns the text that was emitted for a job.
    pub fn take_text(&self, job: &str) -> Option<String> {
        lock(&self.shared.texts).remove(job)
    }

    fn snapshot(&self) -> anyhow::Result<PoolSnapshot> {
        let file = ModelFile {
            size_bytes: 1000,
            modified_ns: 1,
            sha256: None,
        };
        let model = ModelOnDisk {
            model_ref: MODEL.parse()?,
            aliases: Vec::new(),
            file: file.clone(),
            needed_bytes: 1000,
            context: None,
            unsupported: None,
        };
        let device = DeviceInfo {
            device: Device::CPU,
            name: "fake".to_owned(),
            memory_total_bytes: 1 << 30,
            memory_free_bytes: 1 << 29,
            memory_reserved_bytes: 0,
            gpu: None,
        };
        let named: Vec<_> = self
            .workers
            .iter()
            .enumerate()
            .map(|(n, addr)| (format!("worker-cpu-{n}"), addr))
            .collect();
        let worker = |(id, addr): &(String, &SocketAddr)| WorkerInfo {
            id: id.clone(),
            model_ref: model.model_ref.clone(),
            model_file: file.clone(),
            device: Device::CPU,
            status: WorkerStatus::Ready,
            pid: Some(std::process::id()),
            port: addr.port(),
            context_length: Some(1 << 20),
            slots: self.slots,
            active: 0,
            cache: None,
            load_percent: 100,
            memory: WorkerMemory::default(),
            created_at: jiff::Timestamp::now(),
            ready_at: None,
            idle_since: None,
            ending: None,
            exit: None,
        };
        let endpoint = |(id, addr): &(String, &SocketAddr)| WorkerEndpoint {
            worker_id: id.clone(),
            url: format!("http://{addr}"),
            secret: "secret".to_owned(),
        };
        let endpoints = named.iter().map(endpoint).collect();
        let status = PoolStatus {
            pool_id: POOL.to_owned(),
            instance_id: "1".to_owned(),
            version: "0.0.0".to_owned(),
            started_at: jiff::Timestamp::now(),
            draining: false,
            drain: None,
            backends: vec![Backend::Cpu],
            devices: vec![device],
            workers: named.iter().map(worker).collect(),
            models: vec![model],
            downloads: Vec::new(),
            disk: DiskInfo::default(),
        };
        Ok(PoolSnapshot {
            status,
            endpoints,
            ages: BTreeMap::new(),
        })
    }
}

async fn serve(router: Router) -> anyhow::Result<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    // Every event is sent at once, as a real worker's server does.
    let listener =
        axum::serve::ListenerExt::tap_io(listener, |stream| drop(stream.set_nodelay(true)));
    tokio::spawn(async move { axum::serve(listener, router).await });
    Ok(address)
}

async fn execute(State(shared): State<Shared>, Json(request): Json<ExecuteRequest>) -> Response {
    let job = request.job_id.clone();
    let known = lock(&shared.executions)
        .get(&job)
        .filter(|e| lock(e).request.fence >= request.fence)
        .cloned();
    let execution = known.unwrap_or_else(|| {
        let changed = watch::Sender::new(());
        let execution = Arc::new(Mutex::new(Execution {
            request,
            events: Vec::new(),
            changed,
        }));
        lock(&shared.executions).insert(job, Arc::clone(&execution));
        tokio::spawn(generate(shared.clone(), Arc::clone(&execution)));
        execution
    });
    answer(execution, 0)
}

async fn reattach(
    State(shared): State<Shared>,
    Path(job): Path<String>,
    headers: HeaderMap,
) -> Response {
    let Some(execution) = lock(&shared.executions).get(&job).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let after = headers
        .get("last-event-id")
        .and_then(|id| id.to_str().ok()?.parse().ok())
        .unwrap_or(0);
    answer(execution, after)
}

async fn forget(State(shared): State<Shared>, Path(job): Path<String>) -> StatusCode {
    lock(&shared.executions).remove(&job);
    StatusCode::NO_CONTENT
}

async fn cancel(
    State(shared): State<Shared>,
    Json(request): Json<CancelRequest>,
) -> Json<CancelResponse> {
    let cancelled = lock(&shared.executions).remove(&request.job_id).is_some();
    Json(CancelResponse { cancelled })
}

/// Emits a token every period, even if earlier events took longer.
async fn generate(shared: Shared, execution: Arc<Mutex<Execution>>) {
    let request = lock(&execution).request.clone();
    let emit = |event| {
        let mut execution = lock(&execution);
        execution.events.push(event);
        execution.changed.send_replace(());
    };
    emit(WorkerEvent::Started(WorkerStarted {
        job_id: request.job_id.clone(),
        attempt: request.attempt,
        fence: request.fence,
        tokens_in: 3,
        origin: None,
        continues: false,
    }));
    // The shift keeps the streams out of step.
    let shift = shared
        .period
        .mul_f64(f64::from(u32::try_from(request.seed % 1000).unwrap_or(0)) / 1000.0);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + shift, shared.period);
    let mut text = String::new();
    for i in 0..request.max_tokens {
        ticks.tick().await;
        let t = format!("token{i} {}", stamp(shared.base));
        text.push_str(&t);
        emit(WorkerEvent::Token(WorkerToken { i, t, ids: vec![i] }));
    }
    lock(&shared.texts).insert(request.job_id.clone(), text);
    emit(WorkerEvent::End(WorkerEnd {
        tokens_in: 3,
        tokens_out: request.max_tokens,
        stop_reason: StopReason::MaxTokens,
        seed: request.seed,
        ttft_ms: 1,
        decode_time_ms: 1,
        receipt: None,
    }));
}

fn answer(execution: Arc<Mutex<Execution>>, after: usize) -> Response {
    let newest = lock(&execution).events.len().to_string();
    ([(NEWEST_EVENT, newest)], Sse::new(follow(execution, after))).into_response()
}

fn follow(
    execution: Arc<Mutex<Execution>>,
    mut after: usize,
) -> impl Stream<Item = Result<Event, Infallible>> {
    let mut changed = lock(&execution).changed.subscribe();
    async_stream::stream! {
        loop {
            changed.borrow_and_update();
            let fresh = lock(&execution).events.get(after..).unwrap_or_default().to_vec();
            for event in fresh {
                after += 1;
                let last = event.is_last();
                yield Ok(Event::default().event(event.name()).data(event.data()).id(after.to_string()));
                if last {
                    return;
                }
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }
}
