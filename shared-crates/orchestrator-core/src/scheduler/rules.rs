//! The rules that bind every policy: which place a job may get, which worker may be started for it, and which may be stopped.
//!
//! Each rule names the [`Obstacle`] that it finds. The judgement of jobs, its index, the explanations and the checks of a script's
//! proposals apply the same rules.

use std::cmp::Reverse;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::kit::units::{human_bytes_down, human_bytes_up, human_duration, human_seconds};
use pool_core::worker::{Device, WorkerStatus};

use super::snapshot::{DeviceState, ModelState, PoolState, Settings, StartSize, WorkerState};
use crate::job::Placement;
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// Bytes that a download leaves free on a pool's disk.
pub const DISK_RESERVE: u64 = 1 << 30;

/// The rule that an action would break. Displayed as part of a sentence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Obstacle<'a> {
    #[error("the pool is {0}")]
    PoolAway(PoolLiveness),
    #[error("the pool is draining")]
    PoolDraining,
    #[error("the job is backing off after a lost attempt")]
    BackingOff,
    #[error("the worker runs `{loaded}`, but the job asks for `{wanted}`")]
    OtherModel {
        loaded: &'a ModelRef,
        wanted: &'a ModelRef,
    },
    #[error("the job asks for pool `{0}`")]
    OtherPool(&'a str),
    #[error("the job asks for {0}")]
    OtherDevice(Device),
    #[error("the job needs a context of {needed} tokens, but the worker has {capacity}")]
    WorkerContext { needed: u32, capacity: u32 },
    #[error("the worker is {0}")]
    NotServing(WorkerStatus),
    #[error("the worker is being evicted")]
    Leaving,
    #[error("the worker had no room a moment ago")]
    Full,
    #[error("the job needs {needed} tokens of the worker's cache, but only {free} are free")]
    CacheShort { needed: u32, free: u32 },
    #[error(
        "the job may need {expected} tokens of the worker's cache, and earlier ones are on their way there"
    )]
    CacheUnsure { expected: u32 },
    #[error("all {0} slots of the worker are in use")]
    SlotsBusy(u32),
    #[error("the pool has no worker program for the device")]
    NoProgram,
    #[error("the pool does not have the model")]
    NoModel,
    #[error("the model's file could not be loaded: {0}")]
    ModelFailed(&'a str),
    #[error("the job needs a context of {0} tokens, more than the file allows")]
    FileContext(u32),
    #[error("the pool does not report which contexts the file allows")]
    ContextUnknown,
    #[error("the context is {asked} tokens, but the file allows 1 to {most}")]
    ContextRange { asked: u32, most: u32 },
    #[error("the pool refused the start a moment ago: {0}")]
    StartRefused(&'a str),
    #[error("it needs {}, but only {} is free", human_bytes_up(*.needed), human_bytes_down(*.free))]
    MemoryShort { needed: u64, free: u64 },
    #[error("no waiting job could use it")]
    Unwanted,
    #[error("the settings do not allow eviction")]
    EvictionOff,
    #[error("it is not idle")]
    NotIdle,
    #[error("it is already being evicted")]
    AlreadyLeaving,
    #[error(
        "it has been ready for {}; while jobs wait for it, it stays for {}",
        human_seconds(*.ready_s),
        human_duration(.residence.unsigned_abs())
    )]
    Resident {
        ready_s: i64,
        residence: SignedDuration,
    },
    #[error("no waiting job asks for `{0}`")]
    Unasked(&'a ModelRef),
}

/// The outcome of a rule.
pub(crate) type Check<'a, T = ()> = Result<T, Obstacle<'a>>;

/// A job's needs of a place. The same for all jobs of a class.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Needs<'a> {
    pub(super) model: &'a ModelRef,
    pub(super) placement: &'a Placement,
    /// Required tokens of context, if a worker has counted them; 0 otherwise.
    pub(super) context: u32,
    /// Required tokens of a worker's cache, if a worker has counted them; 0 otherwise.
    pub(super) cache: u32,
}

impl<'a> Needs<'a> {
    pub(crate) fn of(job: &'a QueuedJob) -> Self {
        Self {
            model: &job.model,
            placement: &job.placement,
            context: job.context_needed.unwrap_or(0),
            cache: job.cache_tokens(),
        }
    }

    pub(super) fn on_pool(&self, pool: &str) -> Check<'a> {
        match &self.placement.pool {
            Some(wanted) if !self.placement.admits_pool(pool) => Err(Obstacle::OtherPool(wanted)),
            _ => Ok(()),
        }
    }

    pub(super) fn on_device(&self, device: Device) -> Check<'a> {
        match self.placement.device {
            Some(wanted) if !self.placement.admits_device(device) => {
                Err(Obstacle::OtherDevice(wanted))
            }
            _ => Ok(()),
        }
    }

    /// Checks whether the worker suits the job, regardless of the worker's state.
    pub(crate) fn suited_by<'b>(&self, pool: &str, worker: &'b WorkerState) -> Check<'b>
    where
        'a: 'b,
    {
        let Self { model, context, .. } = *self;
        if worker.model != *model {
            return Err(Obstacle::OtherModel {
                loaded: &worker.model,
                wanted: model,
            });
        }
        self.on_pool(pool)?;
        self.on_device(worker.device)?;
        let capacity = worker.capacity();
        if capacity < context {
            let needed = context;
            return Err(Obstacle::WorkerContext { needed, capacity });
        }
        Ok(())
    }

    /// Checks whether the worker, which suits the job, has a slot and cache room for it now. `tokens` is the most that the job is
    /// expected to take of the cache, and `promised` what was promised to other jobs since the snapshot.
    pub(crate) fn placed_on<'b>(
        &self,
        worker: &'b WorkerState,
        tokens: u32,
        promised: Promised,
    ) -> Check<'b> {
        if !worker.serves() {
            return Err(Obstacle::NotServing(worker.status));
        }
        if worker.full {
            return Err(Obstacle::Full);
        }
        let active = worker.active + promised.jobs;
        // A worker without a job has room for any job that its context holds.
        let known = worker.free_tokens.filter(|_| active > 0);
        if let Some(free) = known.map(|free| free.saturating_sub(promised.tokens)) {
            let needed = self.cache;
            if free < needed {
                return Err(Obstacle::CacheShort { needed, free });
            }
            // One that may be refused is sent alone: of several at once, the worker might take a later one and refuse this.
            let expected = worker.most_of(tokens);
            if worker.unanswered + promised.jobs > 0 && free < expected {
                return Err(Obstacle::CacheUnsure { expected });
            }
        }
        if active >= worker.slots {
            return Err(Obstacle::SlotsBusy(worker.slots));
        }
        Ok(())
    }
}

/// Promises to jobs on a worker since the snapshot.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Promised {
    /// Number of jobs.
    pub(crate) jobs: u32,
    /// Most tokens that the jobs are expected to take in the worker's cache.
    pub(crate) tokens: u32,
}

/// Checks whether the pool is online and takes work.
pub(crate) fn takes_work(pool: &PoolState) -> Check<'_> {
    if pool.liveness != PoolLiveness::Online {
        return Err(Obstacle::PoolAway(pool.liveness));
    }
    if pool.draining {
        return Err(Obstacle::PoolDraining);
    }
    Ok(())
}

/// Returns the pool's file of the model. Fails if there is none, or if no worker could load it.
pub(crate) fn loadable<'a>(pool: &'a PoolState, model: &ModelRef) -> Check<'a, &'a ModelState> {
    let file = pool.model(model).ok_or(Obstacle::NoModel)?;
    match pool.start_failure(file) {
        Some(failure) => Err(Obstacle::ModelFailed(failure)),
        None => Ok(file),
    }
}

/// Checks whether a worker of this size may be started on the device now.
pub(crate) fn startable_on<'a>(
    pool: &'a PoolState,
    model: &ModelRef,
    device: &DeviceState,
    size: StartSize,
) -> Check<'a> {
    let (needed, free) = (size.bytes, device.free_bytes);
    if needed > free {
        return Err(Obstacle::MemoryShort { needed, free });
    }
    match pool.refused(model, device.device, size.context) {
        Some(refused) => Err(Obstacle::StartRefused(&refused.message)),
        None => Ok(()),
    }
}

/// Checks whether the worker has no job. `promised` jobs were given to it since the snapshot. A worker that is full without a
/// lease of ours works for another client.
pub(crate) fn at_rest(worker: &WorkerState, promised: Promised) -> Check<'_> {
    if worker.full || worker.active + promised.jobs > 0 || !worker.serves() {
        return Err(Obstacle::NotIdle);
    }
    Ok(())
}

/// Returns the end of the time for which the worker stays although it is idle, because waiting jobs could use it. `None` if the
/// worker is not ready.
pub(crate) fn resident_until(settings: &Settings, worker: &WorkerState) -> Option<Timestamp> {
    let residence = settings.residence(worker);
    worker.ready_at?.checked_add(residence).ok()
}

/// Returns the device with the most free memory among those that can hold the model, if a download of `size` bytes may go to
/// the pool. `None` if the disk lacks the room, a download was refused, or no device is large enough.
pub(super) fn may_download(needs: Needs<'_>, pool: &PoolState, size: u64) -> Option<DeviceState> {
    let room = pool.disk_free_bytes.checked_sub(DISK_RESERVE)? >= size;
    let mut refused = pool.refused_downloads.iter();
    let refused = refused.any(|r| r.model == *needs.model);
    let mut devices: Vec<_> = pool
        .devices
        .iter()
        .filter(|d| needs.on_device(d.device).is_ok() && d.total_bytes >= size)
        .copied()
        .collect();
    devices.sort_unstable_by_key(|d| (Reverse(d.free_bytes), d.device));
    devices.first().copied().filter(|_| room && !refused)
}
