//! FAKE pools: a pool manager's calls to the orchestrator, and its answers.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::sse::{Event, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use jiff::Timestamp;
use pool_core::api::models::{DownloadEvent, ModelDownloadRequest};
use pool_core::api::pool::{
    DeviceInfo, DiskInfo, DrainRequest, DrainStatus, Heartbeat, ModelOnDisk, PoolSnapshot,
    PoolStatus, RegisterRequest, WorkerAges, WorkerEndpoint, WorkerSpawnRequest,
};
use pool_core::kit::client::ApiClient;
use pool_core::kit::service::{Json, ServiceError};
use pool_core::kit::sse::SseEvent as _;
use pool_core::worker::{Backend, Device, WorkerInfo, WorkerStatus};
use serde::de::IgnoredAny;
use tokio::task::JoinHandle;

use super::worker::{FakeWorker, correlation_of, model_file, worker_info};
use super::{Api, MODEL, Orchestrator, eventually};

type Spawned = Arc<Mutex<Vec<WorkerSpawnRequest>>>;

/// A FAKE pool, which reports what a test wants, when the test wants.
pub struct FakePool {
    pub id: String,
    pub instance: String,
    pub workers: Vec<WorkerInfo>,
    pub endpoints: Vec<WorkerEndpoint>,
    pub ages: BTreeMap<String, WorkerAges>,
    pub models: Vec<ModelOnDisk>,
    pub interval_ms: u64,
    pub host_id: Option<String>,
    pub spawned: Spawned,
    /// Message with which spawns are refused; `None` accepts them.
    pub refusal: Arc<Mutex<Option<String>>>,
    /// Correlation ids of the requested spawns.
    pub correlations: Arc<Mutex<Vec<String>>>,
    addr: SocketAddr,
    server: JoinHandle<()>,
    seq: AtomicU64,
    pub asked: Asked,
}

impl FakePool {
    /// Starts a pool with the default model on its disk and no worker.
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
            aliases: Vec::new(),
            file: model_file(),
            needed_bytes: 1000,
            context: None,
            unsupported: None,
        };
        Self {
            id: id.to_owned(),
            instance: "instance-1".to_owned(),
            workers: Vec::new(),
            endpoints: Vec::new(),
            ages: BTreeMap::new(),
            models: vec![model],
            interval_ms: 60_000,
            host_id: None,
            asked,
            spawned,
            refusal,
            correlations,
            addr,
            server,
            seq: AtomicU64::new(0),
        }
    }

    /// Adds a ready worker to the pool's reports.
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
            host_id: self.host_id.clone(),
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
            ages: self.ages.clone(),
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
        self.introduce_at(orchestrator).await;
        self.beat_at(orchestrator).await;
    }

    /// Registers, without a first heartbeat.
    pub async fn introduce(&self, orchestrator: &Api) {
        self.introduce_at(&orchestrator.client).await;
    }

    async fn introduce_at(&self, orchestrator: &ApiClient) {
        let _: IgnoredAny = orchestrator
            .post("/v2/pools/register", &self.registration())
            .await
            .unwrap();
    }

    /// Sends a heartbeat with a changed report.
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

    /// Sends heartbeats in quick succession, as a pool with a short interval must, until `condition` returns a value.
    pub async fn speaks_until<T>(
        &self,
        what: &str,
        orchestrator: &Api,
        mut condition: impl AsyncFnMut() -> Option<T>,
    ) -> T {
        eventually(what, async || {
            self.beat(orchestrator).await;
            condition().await
        })
        .await
    }

    pub async fn beat_at(&self, orchestrator: &ApiClient) {
        let path = format!("/v2/pools/{}/heartbeat", self.id);
        let _: IgnoredAny = orchestrator
            .post(&path, &self.next_heartbeat())
            .await
            .unwrap();
    }
}

/// The requests to a FAKE pool other than spawns.
#[derive(Clone, Default)]
pub struct Asked {
    /// Workers that the pool was asked to stop.
    pub stops: Arc<Mutex<Vec<String>>>,
    /// Models that the pool was asked to download.
    pub downloads: Arc<Mutex<Vec<String>>>,
    /// Number of requests for a heartbeat.
    pub beats: Arc<AtomicU64>,
    /// Events of the next download. The stream stays open until the last event is there.
    pub events: Arc<Mutex<Vec<DownloadEvent>>>,
}

impl Asked {
    fn routes(&self) -> Router {
        Router::new()
            .route("/workers/{id}/stop", post(stop_worker))
            .route("/models/download", post(download))
            .route("/heartbeat", post(heartbeat))
            .route("/drain", post(drain))
            .route("/resume", post(resume))
            .with_state(self.clone())
    }
}

async fn stop_worker(State(asked): State<Asked>, Path(id): Path<String>) -> Response {
    asked.stops.lock().unwrap().push(id.clone());
    Json(worker_info(&id, WorkerStatus::Draining)).into_response()
}

async fn heartbeat(State(asked): State<Asked>) -> Json<serde_json::Value> {
    asked.beats.fetch_add(1, Ordering::Relaxed);
    Json(serde_json::json!({}))
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
            yield Ok::<_, std::convert::Infallible>(Event::default().event(event.name()).data(event.data()));
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

/// Returns the report of a pool without workers and models.
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
        downloads: Vec::new(),
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
