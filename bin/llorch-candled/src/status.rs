//! The worker's health, kept in plain memory so that no computation ever delays `/health`.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use pool_core::api::worker::{HealthState, WorkerHealth};
use pool_core::kit::crash::crash_point;
use pool_core::worker::CacheRoom;
use pool_core::worker_args::WorkerArgs;

use crate::engine::batcher::tokens_of;
use crate::engine::cache::Room;

/// Properties that are known once the model is loaded.
#[derive(Debug, Clone, Copy)]
pub struct Loaded {
    /// Context length of a sequence in tokens.
    pub context_length: u32,
    /// Bytes that the process needs: its private memory, the KV caches that its slots may fill, and the working memory of a
    /// computation. `None` if the system doesn't report them.
    pub measured_bytes: Option<u64>,
}

#[derive(Debug, Clone)]
enum Phase {
    Loading,
    Ready(Loaded),
    Failed(String),
}

/// The state behind `/health`.
#[derive(Debug)]
pub struct Status {
    args: WorkerArgs,
    nonce: String,
    phase: Mutex<Phase>,
    load_percent: AtomicU8,
    cache: Mutex<CacheRoom>,
    progress: AtomicU64,
}

impl Status {
    /// Returns the status of a worker that begins to load.
    pub fn new(args: WorkerArgs, nonce: String) -> Self {
        Self {
            args,
            nonce,
            phase: Mutex::new(Phase::Loading),
            load_percent: AtomicU8::new(0),
            cache: Mutex::default(),
            progress: AtomicU64::new(0),
        }
    }

    /// Records that `done` of `total` bytes are loaded.
    pub fn loading(&self, done: u64, total: u64) {
        // 100 is reserved for a model that is ready.
        let percent = done
            .saturating_mul(100)
            .checked_div(total)
            .unwrap_or(0)
            .min(99);
        self.load_percent.store(percent as u8, Ordering::Relaxed);
        self.advance();
        crash_point("load.step");
    }

    /// Records that the model is loaded.
    pub fn ready(&self, loaded: Loaded) {
        self.load_percent.store(100, Ordering::Relaxed);
        self.set(Phase::Ready(loaded));
    }

    /// Records that the model can't be loaded.
    pub fn failed(&self, reason: String) {
        self.set(Phase::Failed(reason));
    }

    /// Sets the room in the cache, on the assumption that every one of the `executions` writes its longest answer.
    pub fn set_room(&self, room: Room, executions: usize) {
        *self.cache() = CacheRoom {
            tokens: tokens_of(room.total),
            free_tokens: tokens_of(room.free),
            executions: Some(executions as u32),
        };
    }

    fn cache(&self) -> MutexGuard<'_, CacheRoom> {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a step of progress: a layer, a chunk, a token or a step of loading.
    pub fn advance(&self) {
        self.progress.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns whether the model is loaded.
    pub fn is_ready(&self) -> bool {
        matches!(self.get(), Phase::Ready(_))
    }

    /// Returns the body of `/health`, with `active` executions.
    pub fn health(&self, active: usize) -> WorkerHealth {
        let (state, reason, loaded) = match self.get() {
            Phase::Loading => (HealthState::Loading, None, None),
            Phase::Ready(loaded) => (HealthState::Ready, None, Some(loaded)),
            Phase::Failed(reason) => (HealthState::Failed, Some(reason), None),
        };
        WorkerHealth {
            worker_id: self.args.worker_id.clone(),
            nonce: self.nonce.clone(),
            state,
            load_percent: self.load_percent.load(Ordering::Relaxed),
            reason,
            model_ref: self.args.model_ref.clone(),
            sha256: self.args.sha256.clone(),
            context_length: loaded.map(|loaded| loaded.context_length),
            slots: self.args.slots,
            active: active as u32,
            cache: loaded.map(|_| *self.cache()),
            measured_bytes: loaded.and_then(|loaded| loaded.measured_bytes),
            progress: self.progress.load(Ordering::Relaxed),
        }
    }

    fn get(&self) -> Phase {
        self.phase
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn set(&self, phase: Phase) {
        *self.phase.lock().unwrap_or_else(PoisonError::into_inner) = phase;
        self.advance();
    }
}
