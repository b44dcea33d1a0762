//! The scheduler's input: the state of jobs and fleet at one moment.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::api::pool::{ContextMemory, PoolStatus};
use pool_core::worker::{Device, ExitReason, ModelFile, WorkerInfo, WorkerStatus};
use serde::{Deserialize, Serialize};

use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// Everything that a plan depends on. Cloning is cheap, because jobs and pools are shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// Time of the pass.
    pub now: Timestamp,
    /// Start of this orchestrator. Jobs stored before are not rejected until their pools have had time to register.
    pub started_at: Timestamp,
    /// The operator's limits on the scheduler.
    pub settings: Settings,
    /// Waiting jobs in queue order.
    pub jobs: Vec<Arc<QueuedJob>>,
    /// Registered pools, sorted by name.
    pub pools: Vec<Arc<PoolState>>,
    /// Pool of each session's latest run.
    pub sessions: BTreeMap<String, String>,
    /// Size in bytes of each model that pools may be asked to download.
    pub sizes: BTreeMap<ModelRef, u64>,
    /// Number of the next dispatch or start, which increases by one with each. See [`WorkerState::last_turn`].
    pub turns: u64,
}

/// The operator's limits on actions other than dispatches and starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// Idle time after which a worker is stopped; `None` never stops a worker for being idle.
    pub idle_ttl: Option<SignedDuration>,
    /// True if idle workers are stopped when a waiting job needs their memory.
    pub evict: bool,
    /// Longest residence of an idle worker that waiting jobs could use. See [`Settings::residence`].
    pub min_residence: SignedDuration,
    /// True if pools are asked to download a model that none of them has.
    pub download: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            idle_ttl: Some(SignedDuration::from_mins(10)),
            evict: true,
            min_residence: SignedDuration::from_mins(1),
            download: false,
        }
    }
}

/// Residence of a worker as a multiple of its load time. With 3, loading takes at most a quarter of the time when two models
/// take turns.
const RESIDENCE_LOADS: i32 = 3;

impl Settings {
    /// Returns the time for which a worker stays while waiting jobs could use it: two models that don't fit in memory together
    /// take turns of this length instead of reloading endlessly.
    pub fn residence(&self, worker: &WorkerState) -> SignedDuration {
        let loading = worker
            .ready_at
            .map_or(SignedDuration::ZERO, |at| {
                at.duration_since(worker.created_at)
            })
            .max(SignedDuration::ZERO);
        loading
            .saturating_mul(RESIDENCE_LOADS)
            .min(self.min_residence)
    }
}

/// A pool as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolState {
    /// Unique name.
    pub id: String,
    /// Liveness, judged by the pool's heartbeats.
    pub liveness: PoolLiveness,
    /// True if the pool refuses new work.
    pub draining: bool,
    /// Devices on which a worker can be started, with their memory.
    pub devices: Vec<DeviceState>,
    /// Workers, including failed ones.
    pub workers: Vec<WorkerState>,
    /// Models on the pool's disk.
    pub models: Vec<ModelState>,
    /// Bytes of disk space left for models.
    pub disk_free_bytes: u64,
    /// Downloads in progress, including requested ones.
    pub downloads: Vec<DownloadState>,
    /// Recently refused starts, which are not requested again yet.
    pub refused_starts: Vec<RefusedStart>,
    /// Recently failed downloads, which are not requested again yet.
    pub refused_downloads: Vec<RefusedDownload>,
    /// Number of the latest worker start on this pool; 0 if there was none. See [`WorkerState::last_turn`].
    pub last_start: u64,
}

/// A start that a pool refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedStart {
    /// Model that the worker was to load.
    pub model: ModelRef,
    /// Device that the worker was to compute on.
    pub device: Device,
    /// Requested tokens of context; `None` for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// The pool's error message.
    pub message: String,
}

/// A download that a pool refused or that failed on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedDownload {
    /// Model that was to be downloaded.
    pub model: ModelRef,
    /// The pool's error message.
    pub message: String,
}

/// A download in progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadState {
    /// Model that is being downloaded.
    pub model: ModelRef,
    /// Progress in percent; `None` if unknown.
    pub percent: Option<u8>,
}

/// A device on which a worker can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Backend and number of the device.
    pub device: Device,
    /// Bytes that another worker may take.
    pub free_bytes: u64,
    /// Bytes of memory in total.
    pub total_bytes: u64,
}

/// A model on a pool's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelState {
    /// Reference by which jobs name the model.
    pub model: ModelRef,
    /// Identity of the file.
    pub file: ModelFile,
    /// Bytes that a worker of the model needs with the default context.
    pub needed_bytes: u64,
    /// Possible contexts of a worker, and their memory; `None` if the pool reports none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context: Option<ContextMemory>,
}

impl ModelState {
    /// Returns the cost of starting a worker.
    pub(crate) fn cost(&self) -> StartCost {
        StartCost {
            needed_bytes: self.needed_bytes,
            context: self.context,
        }
    }

    /// Returns the bytes of a worker with a context of `tokens`, or with the default.
    pub fn bytes(&self, tokens: Option<u32>) -> u64 {
        self.cost().size(tokens).bytes
    }
}

/// Step between the contexts of started workers, in tokens.
const CONTEXT_STEP: u32 = 256;

/// Cost of starting a worker with a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct StartCost {
    needed_bytes: u64,
    context: Option<ContextMemory>,
}

/// Size of a worker to start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StartSize {
    /// Tokens of context; `None` for the default.
    pub(crate) context: Option<u32>,
    /// Bytes of memory.
    pub(crate) bytes: u64,
}

impl StartCost {
    fn size(&self, context: Option<u32>) -> StartSize {
        let bytes = context
            .zip(self.context)
            .map_or(self.needed_bytes, |(tokens, memory)| {
                memory.needed_bytes(tokens)
            });
        StartSize { context, bytes }
    }

    fn rounded(&self, memory: &ContextMemory, tokens: u32) -> StartSize {
        let tokens = tokens
            .checked_next_multiple_of(CONTEXT_STEP)
            .unwrap_or(u32::MAX)
            .min(memory.max_tokens);
        self.size((tokens != memory.default_tokens).then_some(tokens))
    }

    /// Returns the smallest worker for jobs that need `tokens` of context. `None` if the model's context is shorter, or
    /// its pool does not report the limit.
    pub(crate) fn least(&self, tokens: u32) -> Option<StartSize> {
        if tokens == 0 {
            return Some(self.size(None));
        }
        let memory = self.context.filter(|memory| tokens <= memory.max_tokens)?;
        Some(self.rounded(&memory, tokens))
    }

    /// Returns the preferred worker for such a job: at least the default context, with room for a prompt of about `prompt`
    /// tokens and an answer of `answer`. An answer limit that is unlikely to be reached takes no more than the default
    /// context.
    pub(crate) fn roomy(&self, tokens: u32, prompt: u32, answer: u32) -> Option<StartSize> {
        let memory = self.context.filter(|memory| tokens <= memory.max_tokens)?;
        let answer = answer.min(memory.default_tokens);
        match prompt.saturating_add(answer) {
            wanted if wanted <= memory.default_tokens => Some(self.size(None)),
            wanted => Some(self.rounded(&memory, wanted)),
        }
    }
}

/// A worker as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerState {
    /// Id on its pool; empty if the worker was just requested.
    pub id: String,
    /// Model that the worker loaded.
    pub model: ModelRef,
    /// Identity of the file that the worker was started with.
    pub file: ModelFile,
    /// Device that the worker computes on.
    pub device: Device,
    /// State, as its pool reported it.
    pub status: WorkerStatus,
    /// Tokens of context of each sequence; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Most sequences that the worker runs at once.
    pub slots: u32,
    /// Sequences that the worker runs now.
    pub active: u32,
    /// Tokens of the cache that remain free if all jobs of the worker generate their longest answers, as the pool reported,
    /// minus those given to jobs since; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_tokens: Option<u32>,
    /// Jobs on their way to the worker, which has not answered yet whether it takes them.
    #[serde(default)]
    pub unanswered: u32,
    /// True if the worker recently refused a job for lack of room. It gets no jobs for a while, whatever its slots say.
    pub full: bool,
    /// Bytes that become free when the worker ends.
    pub memory_bytes: u64,
    /// Time at which the worker was requested.
    pub created_at: Timestamp,
    /// Time at which the worker first became ready; `None` before.
    pub ready_at: Option<Timestamp>,
    /// Start of the current idle time; `None` while the worker has work, and before it was ready.
    pub idle_since: Option<Timestamp>,
    /// Number of the latest dispatch to the worker; 0 if there was none. The worker with the lowest number has waited longest
    /// for its turn.
    pub last_turn: u64,
    /// Error with which the worker refused its model's file; `None` otherwise. Other ends during the start say nothing about
    /// the file.
    pub start_failure: Option<String>,
}

/// The orchestrator's own record of a worker's use, which is newer than any heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WorkerUsage {
    /// Slots held by the worker's leases.
    pub active: u32,
    /// Time at which the latest lease ended; `None` if none did.
    pub released_at: Option<Timestamp>,
    /// Number of the latest dispatch to the worker; 0 if there was none.
    pub last_turn: u64,
    /// Leases of these that the worker has not answered yet.
    pub unanswered: u32,
}

impl WorkerUsage {
    /// Records a lease given by the dispatch with the number `turn`.
    pub(super) fn take(&mut self, turn: u64) {
        self.active += 1;
        self.last_turn = turn;
    }
}

impl WorkerState {
    /// Returns the scheduler's view of a worker that a pool reported. [`WorkerState::apply`] adds the orchestrator's own
    /// knowledge.
    fn new(worker: &WorkerInfo) -> Self {
        let memory = worker.memory;
        Self {
            id: worker.id.clone(),
            model: worker.model_ref.clone(),
            file: worker.model_file.clone(),
            device: worker.device,
            status: worker.status,
            context_length: worker.context_length,
            slots: worker.slots,
            active: 0,
            free_tokens: worker.cache.map(|cache| cache.free_tokens),
            unanswered: 0,
            full: false,
            memory_bytes: memory.measured_bytes.unwrap_or(memory.predicted_bytes),
            created_at: worker.created_at,
            ready_at: worker.ready_at,
            idle_since: worker.idle_since,
            last_turn: 0,
            start_failure: worker
                .exit
                .as_ref()
                .filter(|exit| exit.during_start && exit.reason == ExitReason::ModelInvalid)
                .map(|exit| exit.message.clone()),
        }
    }

    /// Returns a worker that is about to be requested, with a context of `context_length` tokens or the default.
    pub fn asked_for(
        model: &ModelState,
        device: Device,
        context_length: Option<u32>,
        now: Timestamp,
    ) -> Self {
        let default = model.context.map(|context| context.default_tokens);
        Self {
            id: String::new(),
            model: model.model.clone(),
            file: model.file.clone(),
            device,
            status: WorkerStatus::Starting,
            context_length: context_length.or(default),
            slots: 1,
            active: 0,
            free_tokens: None,
            unanswered: 0,
            full: false,
            memory_bytes: model.bytes(context_length),
            created_at: now,
            ready_at: None,
            idle_since: None,
            last_turn: 0,
            start_failure: None,
        }
    }

    /// Overlays the orchestrator's own record on the pool's report.
    pub fn apply(&mut self, usage: WorkerUsage) {
        self.active = usage.active;
        self.last_turn = usage.last_turn;
        self.unanswered = usage.unanswered;
        // A heartbeat sent before our latest lease still reports the worker as idle, since an earlier time.
        self.idle_since = match usage.active {
            0 => self.idle_since.max(self.idle_since.and(usage.released_at)),
            _ => None,
        };
    }

    /// Returns whether the worker can take a job now.
    pub fn has_slot(&self) -> bool {
        self.serves() && !self.full && self.active < self.slots
    }

    /// Returns whether the worker's cache has room for a job that needs `tokens` of it. Unknown free space counts as room, and
    /// a worker without a job has room for any job that its context holds.
    pub fn has_room(&self, tokens: u32) -> bool {
        self.active == 0 || self.free_tokens.is_none_or(|free| free >= tokens)
    }

    /// Returns whether a job that is expected to take at most `tokens` of the cache surely fits in it.
    pub fn surely_has_room(&self, tokens: u32) -> bool {
        self.has_room(self.most_of(tokens))
    }

    /// Returns how many of a job's `tokens` the worker's cache holds at most: no job takes more than the context.
    pub fn most_of(&self, tokens: u32) -> u32 {
        tokens.min(self.context_length.unwrap_or(u32::MAX))
    }

    /// Returns whether the worker may refuse some job for lack of room in its cache.
    pub fn is_short(&self) -> bool {
        !self.surely_has_room(u32::MAX)
    }

    /// Gives a slot to a job that is expected to take at most `tokens` of the worker's cache, by the dispatch with the number
    /// `turn`.
    pub fn take_slot(&mut self, turn: u64, tokens: u32) {
        let tokens = self.most_of(tokens);
        self.active += 1;
        self.unanswered += 1;
        self.free_tokens = self.free_tokens.map(|free| free.saturating_sub(tokens));
        self.idle_since = None;
        self.last_turn = turn;
    }

    /// Returns the tokens of context that a job can rely on. A starting worker may turn out to have any number.
    pub fn capacity(&self) -> u32 {
        match (self.context_length, self.status) {
            (Some(tokens), _) => tokens,
            (None, WorkerStatus::Starting) => u32::MAX,
            (None, _) => 0,
        }
    }

    /// Returns whether the worker takes jobs when it has a free slot.
    pub fn serves(&self) -> bool {
        matches!(self.status, WorkerStatus::Ready | WorkerStatus::Busy)
    }
}

impl PoolState {
    /// Returns the scheduler's view of a pool's latest report. Leases are not included: [`WorkerState::apply`] adds them.
    pub fn new(status: &PoolStatus, liveness: PoolLiveness) -> Self {
        let devices = status
            .devices
            .iter()
            .filter(|d| status.backends.contains(&d.device.backend));
        Self {
            id: status.pool_id.clone(),
            liveness,
            draining: status.draining,
            devices: devices
                .map(|d| DeviceState {
                    device: d.device,
                    free_bytes: d.memory_free_bytes,
                    total_bytes: d.memory_total_bytes,
                })
                .collect(),
            workers: status.workers.iter().map(WorkerState::new).collect(),
            models: status
                .models
                .iter()
                .map(|m| ModelState {
                    model: m.model_ref.clone(),
                    file: m.file.clone(),
                    needed_bytes: m.needed_bytes,
                    context: m.context,
                })
                .collect(),
            disk_free_bytes: status.disk.free_bytes,
            downloads: Vec::new(),
            refused_starts: Vec::new(),
            refused_downloads: Vec::new(),
            last_start: 0,
        }
    }

    /// Returns the scheduler's view of a registered pool whose heartbeat has not arrived yet.
    pub fn unheard(id: &str, liveness: PoolLiveness) -> Self {
        Self {
            id: id.to_owned(),
            liveness,
            draining: false,
            devices: Vec::new(),
            workers: Vec::new(),
            models: Vec::new(),
            disk_free_bytes: 0,
            downloads: Vec::new(),
            refused_starts: Vec::new(),
            refused_downloads: Vec::new(),
            last_start: 0,
        }
    }

    /// Returns the model, if it is on the pool's disk.
    pub fn model(&self, model: &ModelRef) -> Option<&ModelState> {
        self.models.iter().find(|m| m.model == *model)
    }

    /// Returns the error with which the model's current file failed to load on this pool; `None` if no start failed that way.
    /// A file that was replaced since gets a new chance.
    pub fn start_failure(&self, model: &ModelState) -> Option<&str> {
        let same = |w: &&WorkerState| {
            w.status == WorkerStatus::Failed && w.model == model.model && w.file == model.file
        };
        self.workers
            .iter()
            .filter(same)
            .find_map(|w| w.start_failure.as_deref())
    }

    /// Returns the refusal that blocks this start for now: that of a worker with this context or a shorter one.
    pub fn refused(
        &self,
        model: &ModelRef,
        device: Device,
        context_length: Option<u32>,
    ) -> Option<&RefusedStart> {
        self.refused_starts.iter().find(|refused| {
            refused.model == *model
                && refused.device == device
                && refused.context_length <= context_length
        })
    }

    /// Returns the number of sequences that the pool's workers run now.
    pub fn active(&self) -> u32 {
        self.workers.iter().map(|w| w.active).sum()
    }
}
