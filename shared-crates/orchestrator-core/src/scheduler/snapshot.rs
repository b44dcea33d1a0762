//! What a plan depends on.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::api::pool::{ContextMemory, PoolStatus};
use pool_core::worker::{Device, ExitReason, ModelFile, WorkerInfo, WorkerStatus};
use serde::{Deserialize, Serialize};

use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// Everything a plan depends on. Cloning one is cheap: jobs and pools are shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The time.
    pub now: Timestamp,
    /// When this orchestrator started: until its pools had time to register, no job of before is rejected.
    pub started_at: Timestamp,
    /// What the operator allows.
    pub settings: Settings,
    /// Waiting jobs in the order of their turns.
    pub jobs: Vec<Arc<QueuedJob>>,
    /// Registered pools, by name.
    pub pools: Vec<Arc<PoolState>>,
    /// The pool on which each session ran last.
    pub sessions: BTreeMap<String, String>,
    /// Bytes of the models that pools may be asked to download.
    pub sizes: BTreeMap<ModelRef, u64>,
    /// How many dispatches and starts there were: the number that the next one gets. See [`WorkerState::last_turn`].
    pub turns: u64,
}

/// What the operator allows the scheduler to do beside dispatching and starting.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settings {
    /// A worker that has been idle for this long is stopped; `None` never stops one for that.
    pub idle_ttl: Option<SignedDuration>,
    /// Whether idle workers are stopped where a waiting job needs their memory.
    pub evict: bool,
    /// Longest residence of an idle worker that waiting jobs could use. See [`Settings::residence`].
    pub min_residence: SignedDuration,
    /// Whether pools are asked to download a model that none of them has.
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

/// Residence of a worker in load times: loading takes at most a quarter of the time when two models take turns.
const RESIDENCE_LOADS: i32 = 3;

impl Settings {
    /// Returns the time for which a worker stays while waiting jobs could use it: two models that don't fit in memory
    /// together take turns of this length instead of loading without end.
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
    /// Name.
    pub id: String,
    /// Whether it is heard from.
    pub liveness: PoolLiveness,
    /// Whether it refuses new workers.
    pub draining: bool,
    /// Devices on which a worker can be started, with the memory that one may take.
    pub devices: Vec<DeviceState>,
    /// Workers, failed ones included.
    pub workers: Vec<WorkerState>,
    /// Models on its disk.
    pub models: Vec<ModelState>,
    /// Bytes that its disk has left for models.
    pub disk_free_bytes: u64,
    /// Models that it was asked to download.
    pub downloads: Vec<DownloadState>,
    /// Starts that it refused a moment ago and that are not to be asked for again yet.
    pub refused_starts: Vec<RefusedStart>,
    /// Downloads that failed a moment ago and that are not to be asked for again yet.
    pub refused_downloads: Vec<RefusedDownload>,
    /// The number of the latest worker start here, 0 for none. See [`WorkerState::last_turn`].
    pub last_start: u64,
}

/// A start that a pool refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedStart {
    /// The model.
    pub model: ModelRef,
    /// Where the worker should have computed.
    pub device: Device,
    /// Requested tokens of context; `None` for the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// What the pool said.
    pub message: String,
}

/// A download that a pool refused, or that failed there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedDownload {
    /// The model.
    pub model: ModelRef,
    /// What the pool said.
    pub message: String,
}

/// A download under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DownloadState {
    /// The model.
    pub model: ModelRef,
    /// How far it is, in percent, where anybody knows.
    pub percent: Option<u8>,
}

/// A device on which a worker can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Which one.
    pub device: Device,
    /// Bytes that a further worker may take.
    pub free_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
}

/// A model on a pool's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelState {
    /// How jobs name it.
    pub model: ModelRef,
    /// The file's identity.
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
    /// Id on its pool; empty for one that was asked for a moment ago.
    pub id: String,
    /// Its model.
    pub model: ModelRef,
    /// The file that it was started with.
    pub file: ModelFile,
    /// Where it computes.
    pub device: Device,
    /// State.
    pub status: WorkerStatus,
    /// Tokens of context of each sequence; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Sequences that it runs at once.
    pub slots: u32,
    /// Sequences that it runs now.
    pub active: u32,
    /// Tokens of its cache that remain free if all its jobs write their longest answers, as the pool reported, less those
    /// given to jobs since; `None` if unknown.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub free_tokens: Option<u32>,
    /// It had no room a moment ago, whatever is known of its slots: it is left alone for a while.
    pub full: bool,
    /// Bytes that become free when it ends.
    pub memory_bytes: u64,
    /// When it was asked for.
    pub created_at: Timestamp,
    /// When it was ready for the first time.
    pub ready_at: Option<Timestamp>,
    /// Since when it has had nothing to do; `None` while it has, and before it was ready.
    pub idle_since: Option<Timestamp>,
    /// The number of the latest dispatch to it, 0 for none: whoever has the lowest number has waited longest for its turn.
    pub last_turn: u64,
    /// Why it refused its model's file, where it did. Another end while it started says nothing of the file.
    pub start_failure: Option<String>,
}

/// What the orchestrator itself knows of a worker's use: newer than any heartbeat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Slots that its own leases hold.
    pub active: u32,
    /// When the latest of its leases ended.
    pub released_at: Option<Timestamp>,
    /// The number of the latest dispatch to it.
    pub last_turn: u64,
}

impl Usage {
    /// Notes a lease, which the dispatch of this number gave.
    pub(super) fn take(&mut self, turn: u64) {
        self.active += 1;
        self.last_turn = turn;
    }
}

impl WorkerState {
    /// The scheduler's view of what a pool said of a worker. [`WorkerState::apply`] adds what is known besides.
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
            full: false,
            memory_bytes: model.bytes(context_length),
            created_at: now,
            ready_at: None,
            idle_since: None,
            last_turn: 0,
            start_failure: None,
        }
    }

    /// Lays the orchestrator's own knowledge over what the pool said.
    pub fn apply(&mut self, usage: Usage) {
        self.active = usage.active;
        self.last_turn = usage.last_turn;
        // A pool that has not heard of our latest lease calls the worker idle since before.
        self.idle_since = match usage.active {
            0 => self.idle_since.max(self.idle_since.and(usage.released_at)),
            _ => None,
        };
    }

    /// Whether it can be given a job now.
    pub fn has_slot(&self) -> bool {
        self.serves() && !self.full && self.active < self.slots
    }

    /// Returns whether its cache has room for a job that needs `tokens` of it, as far as is known. A worker without a job has
    /// room for any job that its context holds.
    pub fn has_room(&self, tokens: u32) -> bool {
        self.active == 0 || self.free_tokens.is_none_or(|free| free >= tokens)
    }

    /// Gives a slot to a job that needs `tokens` of its cache: the dispatch with the number `turn`.
    pub fn take_slot(&mut self, turn: u64, tokens: u32) {
        self.active += 1;
        self.free_tokens = self.free_tokens.map(|free| free.saturating_sub(tokens));
        self.idle_since = None;
        self.last_turn = turn;
    }

    /// Returns the tokens of context that a job can count on. A starting worker may turn out to have any number.
    pub fn capacity(&self) -> u32 {
        match (self.context_length, self.status) {
            (Some(tokens), _) => tokens,
            (None, WorkerStatus::Starting) => u32::MAX,
            (None, _) => 0,
        }
    }

    /// Whether it takes jobs when it has a slot.
    pub fn serves(&self) -> bool {
        matches!(self.status, WorkerStatus::Ready | WorkerStatus::Busy)
    }
}

impl PoolState {
    /// The scheduler's view of what a pool said last. Leases are not in it: [`WorkerState::apply`] adds them.
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

    /// The model as it lies on the pool's disk.
    pub fn model(&self, model: &ModelRef) -> Option<&ModelState> {
        self.models.iter().find(|m| m.model == *model)
    }

    /// Why the model as it lies on this pool's disk now could not be started here, where that was tried. A file that
    /// was replaced since is given a new chance.
    pub fn start_failure(&self, model: &ModelState) -> Option<&str> {
        let same = |w: &&WorkerState| {
            w.status == WorkerStatus::Failed && w.model == model.model && w.file == model.file
        };
        self.workers
            .iter()
            .filter(same)
            .find_map(|w| w.start_failure.as_deref())
    }

    /// Returns the refusal that blocks this start for now: of a worker with this context or a shorter one.
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

    /// Sequences that its workers run now.
    pub fn active(&self) -> u32 {
        self.workers.iter().map(|w| w.active).sum()
    }
}
