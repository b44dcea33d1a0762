//! The pool manager's API, and what a pool tells the orchestrator.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::ModelRef;
use crate::gpu::GpuInfo;
use crate::worker::{Backend, CacheType, Device, ModelFile, WorkerInfo};

/// Milliseconds between heartbeats that pools may choose and the orchestrator takes.
pub const HEARTBEAT_INTERVAL_MS: RangeInclusive<u64> = 20..=600_000;

/// Body of `POST /workers/spawn`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields)]
pub struct WorkerSpawnRequest {
    /// The model.
    pub model: ModelRef,
    /// Where to compute.
    pub backend: Backend,
    /// GPU to use, with `cuda` and `metal`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<u32>,
    /// Tokens of context of each sequence; the smaller of the model's and 8,192 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Tokens that all sequences together have room for; one sequence of the context's length where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache_tokens: Option<u32>,
    /// Form of keys and values in the cache.
    #[serde(default, skip_serializing_if = "CacheType::is_default")]
    pub cache_type: CacheType,
    /// Sequences at once; where absent one for each 1,024 tokens of the cache, 1 to 8.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<u32>,
    /// The port to use; a free one of the configured range where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Body of `POST /workers/{id}/stop`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct WorkerStopRequest {
    /// End it at once instead of letting it finish what runs.
    pub force: bool,
}

/// Body of `POST /drain`. Without one, the pool takes no new workers and nothing else happens to those it has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DrainRequest {
    /// Milliseconds, at most a week, after which the workers that still run something are told to stop. Without it they
    /// have all the time they need.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Whether workers are told to stop as soon as they run nothing, so that none is left in the end. Otherwise those
    /// that run nothing stay, and serve again after `POST /resume`.
    pub stop_workers: bool,
}

/// How far a pool that drains has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct DrainStatus {
    /// Since when it drains.
    pub since: Timestamp,
    /// When the workers that are left are told to stop; `None` for never.
    pub deadline: Option<Timestamp>,
    /// Whether workers are stopped once they run nothing.
    pub stop_workers: bool,
    /// The workers that the drain waits for, oldest first: those that run something, or with `stop_workers` all that
    /// live. Empty when the drain is done.
    pub remaining: Vec<String>,
}

/// Answer of `POST /workers/cleanup`: what was cleared away.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct CleanupReport {
    /// Workers that were on record as running and whose process is gone.
    pub reaped: Vec<String>,
    /// Ended workers that were forgotten, with their logs; those of `reaped` are among them.
    pub forgotten: Vec<String>,
    /// Names of other files that were removed: logs of workers that nobody remembers, records that could not be read,
    /// and what a killed program left half-written.
    pub files: Vec<String>,
    /// Bytes that all this took.
    pub freed_bytes: u64,
}

/// Codes of the pool manager's error envelopes, beside those that every daemon has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PoolErrorCode {
    /// The request breaks the API's rules, or asks for what the model can't do.
    InvalidRequest,
    /// No catalogue entry, or no file, has this name.
    ModelNotFound,
    /// The catalogue knows the model, and this host does not have its file.
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
    /// All ports of the pool's range are given away.
    NoPort,
    /// The port asked for is somebody's.
    PortTaken,
    /// The process could not be started.
    SpawnFailed,
    /// The pool takes no new workers.
    PoolDraining,
    /// There is no such worker.
    WorkerNotFound,
    /// The worker has ended.
    WorkerEnded,
    /// The worker does not answer.
    WorkerUnreachable,
    /// The caller is not the worker it says it is, or no longer.
    NotThisWorker,
    /// The program that downloads is not installed.
    NoDownloader,
}

impl PoolErrorCode {
    /// The name on the wire.
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
    /// Which one.
    pub device: Device,
    /// Name for people.
    pub name: String,
    /// Memory in all, bytes.
    pub memory_total_bytes: u64,
    /// Memory that a further worker could take, bytes: the smaller of what the device reports free and what is
    /// not reserved.
    pub memory_free_bytes: u64,
    /// Sum of the live workers' reservations, bytes.
    pub memory_reserved_bytes: u64,
    /// What a GPU has to tell besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<GpuInfo>,
}

/// A model file that the pool has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct ModelOnDisk {
    /// How tasks name it.
    pub model_ref: ModelRef,
    /// Alternative names for the model in tasks: paths to its file below `models.allow_paths`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<ModelRef>,
    /// The file's identity.
    pub file: ModelFile,
    /// Memory that a worker with default settings needs, bytes.
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
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that can be used.
    pub free_bytes: u64,
}

/// Answer of the pool's `GET /status`, and the public part of a heartbeat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolStatus {
    /// Name of the pool.
    pub pool_id: String,
    /// New at each start of the daemon.
    pub instance_id: String,
    /// Version of the program.
    pub version: String,
    /// When this instance started.
    pub started_at: Timestamp,
    /// Whether it refuses new workers.
    pub draining: bool,
    /// How far draining has come, where it drains.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainStatus>,
    /// Backends that a worker can be started with here.
    pub backends: Vec<Backend>,
    /// Devices; the CPU always is one.
    pub devices: Vec<DeviceInfo>,
    /// Workers, failed ones included.
    pub workers: Vec<WorkerInfo>,
    /// Models on disk.
    pub models: Vec<ModelOnDisk>,
    /// Models that the daemon downloads at present.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub downloads: Vec<ModelRef>,
    /// The disk that holds the models.
    pub disk: DiskInfo,
}

/// Answer of the pool's `GET /status`: the public part of a heartbeat, and the pool's standing with its orchestrator.
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
    /// Start of the present state.
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
    /// New at each start of the daemon.
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9._-]+$")
    )]
    pub instance_id: String,
    /// Where the orchestrator reaches the pool.
    #[cfg_attr(feature = "openapi", schema(pattern = "^https?://[^/?#]+"))]
    pub url: String,
    /// The pool API's version that the pool speaks.
    pub api_version: u32,
    /// Milliseconds between heartbeats.
    #[cfg_attr(feature = "openapi", schema(minimum = 20, maximum = 600000))]
    pub heartbeat_interval_ms: u64,
    /// Identity of the host and its state folder, the same at each start of the daemon: it distinguishes a restart from
    /// a second host with the same pool id. Older pools send none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(
        feature = "openapi",
        schema(min_length = 1, max_length = 128, pattern = "^[A-Za-z0-9._-]+$")
    )]
    pub host_id: Option<String>,
}

/// Where the orchestrator reaches a worker, and the secret that opens it. Travels in heartbeats alone.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct WorkerEndpoint {
    /// The worker.
    pub worker_id: String,
    /// Its address.
    pub url: String,
    /// Its bearer token.
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

/// What a pool is at one moment, with what only the orchestrator may know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
pub struct PoolSnapshot {
    /// The public part.
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
    /// The instance that speaks.
    pub instance_id: String,
    /// Grows with every heartbeat of the instance; an old one is refused.
    pub seq: u64,
    /// What the pool is now.
    pub snapshot: PoolSnapshot,
}
