//! The pool manager's API, and the registration and heartbeats that a pool sends to the orchestrator.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::api::gpu::GpuInfo;
use crate::worker::{Backend, CacheType, Device, ModelFile, WorkerInfo};

/// Heartbeat intervals, in milliseconds, that a pool may choose and the orchestrator accepts.
pub const HEARTBEAT_INTERVAL_MS: RangeInclusive<u64> = 20..=600_000;

/// Body of `POST /workers/spawn`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WorkerSpawnRequest {
    /// Model to serve.
    pub model: ModelRef,
    /// Backend that the worker computes on.
    pub backend: Backend,
    /// Index of the GPU, for `cuda` and `metal`; if absent, the usable GPU with the most free memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<u32>,
    /// Tokens of context per sequence; if absent, the model's context or 8,192, whichever is smaller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Tokens of cache that all sequences share; if absent, room for one sequence of full context.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// Element type of the cached keys and values.
    #[serde(default, skip_serializing_if = "CacheType::is_default")]
    pub cache_type: CacheType,
    /// Sequences that run at once; if absent, one per 1,024 tokens of cache, from 1 to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// Port to listen on; if absent, a free port of the configured range.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Body of `POST /workers/{id}/stop`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WorkerStopRequest {
    /// True to end the worker at once instead of letting its running jobs finish.
    pub force: bool,
}

/// Body of `POST /drain`. An empty body only stops the pool from accepting new workers; its current workers are unaffected.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// Milliseconds, at most a week, until workers that are still busy are asked to stop. If absent, they may take as long as
    /// they need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// True to stop each worker as soon as it is idle, until none is left. Otherwise idle workers stay alive, and serve again
    /// after `POST /resume`.
    pub stop_workers: bool,
}

/// The progress of a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DrainStatus {
    /// Start of the drain.
    pub since: Timestamp,
    /// Time at which the remaining workers are asked to stop; `None` if there is no deadline.
    pub deadline: Option<Timestamp>,
    /// True if workers are stopped once they are idle.
    pub stop_workers: bool,
    /// Ids of the workers that the drain waits for, oldest first: the busy ones, or with `stop_workers` all live ones. Empty
    /// when the drain is complete.
    pub remaining: Vec<String>,
}

/// Answer of `POST /workers/cleanup`: the workers and files removed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CleanupReport {
    /// Ids of workers recorded as running whose process is gone.
    pub reaped: Vec<String>,
    /// Ids of ended workers whose records and logs were removed, including those of `reaped`.
    pub forgotten: Vec<String>,
    /// Names of other files removed: logs without a worker record, unreadable records, and files left half-written by a killed
    /// program.
    pub files: Vec<String>,
    /// Bytes freed in total.
    pub freed_bytes: u64,
}

/// Error codes of the pool manager, in addition to those common to all daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PoolErrorCode {
    /// The request violates the API's rules, or asks for something the model does not support.
    InvalidRequest,
    /// No catalogue entry or file has this name.
    ModelNotFound,
    /// The catalogue lists the model, but its file is not on this host.
    ModelNotDownloaded,
    /// No worker of this version can run the model.
    ModelUnsupported,
    /// The path is outside the folders from which models may be taken.
    ModelNotAllowed,
    /// No worker program for the backend is installed.
    BackendUnavailable,
    /// The host has no such device.
    NoDevice,
    /// The device has too little memory left.
    OutOfMemory,
    /// Every port of the pool's range is in use.
    NoPort,
    /// The requested port is in use.
    PortTaken,
    /// The process could not be started.
    SpawnFailed,
    /// The pool is draining and accepts no new workers.
    PoolDraining,
    /// No worker has this id.
    WorkerNotFound,
    /// The worker has ended.
    WorkerEnded,
    /// The worker does not answer.
    WorkerUnreachable,
    /// The caller is not, or is no longer, the worker it claims to be.
    NotThisWorker,
    /// The download program is not installed.
    NoDownloader,
}

impl PoolErrorCode {
    /// Returns the code as it appears on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::InvalidRequest => "INVALID_REQUEST",
            Self::ModelNotFound => "MODEL_NOT_FOUND",
            Self::ModelNotDownloaded => "MODEL_NOT_DOWNLOADED",
            Self::ModelUnsupported => "MODEL_UNSUPPORTED",
            Self::ModelNotAllowed => "MODEL_NOT_ALLOWED",
            Self::BackendUnavailable => "BACKEND_UNAVAILABLE",
            Self::NoDevice => "NO_DEVICE",
            Self::OutOfMemory => "OUT_OF_MEMORY",
            Self::NoPort => "NO_PORT",
            Self::PortTaken => "PORT_TAKEN",
            Self::SpawnFailed => "SPAWN_FAILED",
            Self::PoolDraining => "POOL_DRAINING",
            Self::WorkerNotFound => "WORKER_NOT_FOUND",
            Self::WorkerEnded => "WORKER_ENDED",
            Self::WorkerUnreachable => "WORKER_UNREACHABLE",
            Self::NotThisWorker => "NOT_THIS_WORKER",
            Self::NoDownloader => "NO_DOWNLOADER",
        }
    }
}

/// Answer of `GET /workers`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerList {
    /// All workers of the registry, oldest first.
    pub workers: Vec<WorkerInfo>,
}

/// A device and its memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DeviceInfo {
    /// Identifier, such as `cpu` or `cuda:0`.
    pub device: Device,
    /// Human-readable name.
    pub name: String,
    /// Total memory in bytes.
    pub memory_total_bytes: u64,
    /// Memory available to another worker, in bytes: the smaller of the memory that the device reports free and the memory that
    /// is not reserved.
    pub memory_free_bytes: u64,
    /// Memory reserved by live workers, in bytes.
    pub memory_reserved_bytes: u64,
    /// Further properties of a GPU; absent for the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuInfo>,
}

/// A model file on the pool's host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelOnDisk {
    /// Reference that tasks use for the model.
    pub model_ref: ModelRef,
    /// Alternative names for the model in tasks: paths to its file below `models.allow_paths`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<ModelRef>,
    /// Identity of the file.
    pub file: ModelFile,
    /// Memory that a worker with default settings needs, in bytes.
    pub needed_bytes: u64,
    /// Possible contexts of a worker, and their memory; absent if the file's header can't be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<ContextMemory>,
    /// Reason why no worker of this pool can run the model; absent if one can.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unsupported: Option<String>,
}

/// Possible contexts of a worker with a model, and their memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ContextMemory {
    /// Tokens of context that the model was trained for.
    pub max_tokens: u32,
    /// Tokens of context of a worker started without a requested context.
    pub default_tokens: u32,
    /// Bytes of a worker without its context.
    pub base_bytes: u64,
    /// Bytes of each token of context.
    pub token_bytes: u64,
    /// Least bytes of a worker, because loading needs them.
    pub floor_bytes: u64,
}

impl ContextMemory {
    /// Returns the memory of a worker with a context of `tokens`.
    pub fn needed_bytes(&self, tokens: u32) -> u64 {
        self.token_bytes
            .saturating_mul(tokens.into())
            .saturating_add(self.base_bytes)
            .max(self.floor_bytes)
    }
}

/// Answer of `GET /models`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelList {
    /// Models on disk that tasks can name.
    pub models: Vec<ModelOnDisk>,
}

/// Space of the disk that holds the models.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DiskInfo {
    /// Total size in bytes.
    pub total_bytes: u64,
    /// Bytes available for models.
    pub free_bytes: u64,
}

/// Answer of the pool's `GET /status`, and the public part of a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolStatus {
    /// Name of the pool.
    pub pool_id: String,
    /// Identifier of this run of the daemon; each start creates a new one.
    pub instance_id: String,
    /// Version of the daemon.
    pub version: String,
    /// Start time of this run of the daemon.
    pub started_at: Timestamp,
    /// True if the pool accepts no new workers.
    pub draining: bool,
    /// Progress of the drain; absent unless the pool is draining.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Backends available for new workers on this host.
    pub backends: Vec<Backend>,
    /// Devices of the host; always includes the CPU.
    pub devices: Vec<DeviceInfo>,
    /// Workers of the registry, including failed ones.
    pub workers: Vec<WorkerInfo>,
    /// Models on disk.
    pub models: Vec<ModelOnDisk>,
    /// Models that the daemon is downloading.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub downloads: Vec<ModelRef>,
    /// Space of the disk that holds the models.
    pub disk: DiskInfo,
}

/// Answer of the pool's `GET /status`: the public part of a heartbeat, and the state of the pool's registration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolReport {
    /// The public part of a heartbeat.
    #[serde(flatten)]
    pub status: PoolStatus,
    /// The pool's registration; absent in answers of older daemons.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub registration: Option<Registration>,
}

/// State of a pool's registration with its orchestrator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "snake_case")]
pub enum RegistrationState {
    /// The settings name no orchestrator (`orchestrator_url = "none"`).
    Off,
    /// The first attempt is in progress.
    Pending,
    /// The latest heartbeat was accepted.
    Registered,
    /// The orchestrator answers, but refuses this pool.
    Refused,
    /// The orchestrator does not answer.
    Unreachable,
    /// No orchestrator runs on this host; the pool registers when one starts.
    NoOrchestrator,
    /// The pool could not produce a heartbeat.
    Failed,
}

/// Registration of a pool with its orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Registration {
    /// State of the registration.
    pub state: RegistrationState,
    /// Address of the orchestrator; absent if none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub orchestrator: Option<String>,
    /// Start of the current state.
    pub since: Timestamp,
    /// Time of the latest accepted heartbeat.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accepted_at: Option<Timestamp>,
    /// The orchestrator's code for a refusal; absent in other states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    /// Reason for a refusal or failure; absent in other states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// Remedy; absent if none is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Time of the next attempt; absent unless the last one failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next_try_at: Option<Timestamp>,
}

/// Error code of an orchestrator that refuses a registration because another live instance holds the pool id.
pub const POOL_ID_TAKEN: &str = "POOL_ID_TAKEN";

/// Body of `POST /v2/pools/register`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct RegisterRequest {
    /// Name of the pool.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9._-]+$")
    )]
    pub pool_id: String,
    /// Identifier of this run of the daemon; each start creates a new one.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9._-]+$")
    )]
    pub instance_id: String,
    /// Base URL at which the orchestrator reaches the pool.
    #[cfg_attr(feature = "openapi", schema(pattern = "^https?://[^/?#]+"))]
    pub url: String,
    /// Version of the pool API that the pool implements.
    pub api_version: u32,
    /// Milliseconds between heartbeats.
    #[cfg_attr(feature = "openapi", schema(minimum = 20, maximum = 600000))]
    pub heartbeat_interval_ms: u64,
    /// Identity of the host and its state folder, stable across restarts of the daemon. It distinguishes a restart from a
    /// second host with the same pool id. Older pools omit it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9._-]+$")
    )]
    pub host_id: Option<String>,
}

/// A worker's address and the secret that grants access to it. Sent only in heartbeats.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerEndpoint {
    /// Identifier of the worker on its pool.
    pub worker_id: String,
    /// Base URL of the worker.
    pub url: String,
    /// Bearer token that the worker requires.
    pub secret: String,
}

impl std::fmt::Debug for WorkerEndpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WorkerEndpoint")
            .field("worker_id", &self.worker_id)
            .field("url", &self.url)
            .finish_non_exhaustive()
    }
}

/// The state of a pool at one moment, including secrets meant only for the orchestrator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolSnapshot {
    /// The part that `GET /status` also returns.
    pub status: PoolStatus,
    /// Addresses and secrets of the ready workers.
    pub endpoints: Vec<WorkerEndpoint>,
    /// Ages of the workers, by worker id.
    #[serde(default)]
    pub ages: BTreeMap<String, WorkerAges>,
}

/// Ages of a worker's events at the time of a heartbeat, in milliseconds. Clocks of two hosts differ, and step, so the
/// orchestrator can't compare the pool's times with its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerAges {
    /// Time since `created_at`.
    pub created_ms: u64,
    /// Time since `ready_at`; absent until the worker is ready.
    pub ready_ms: Option<u64>,
    /// Time since `idle_since`; absent unless the worker is idle.
    pub idle_ms: Option<u64>,
}

/// Body of `POST /v2/pools/{id}/heartbeat`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct Heartbeat {
    /// Identifier of the daemon's run that sends the heartbeat.
    pub instance_id: String,
    /// Sequence number, which increases with every heartbeat of the instance; older numbers are refused.
    pub seq: u64,
    /// Current state of the pool.
    pub snapshot: PoolSnapshot,
}
