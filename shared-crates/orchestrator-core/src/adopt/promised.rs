//! The rules that a proposal must satisfy, and the places already promised by earlier proposals of the pass.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};

use super::{Proposal, Refusal};
use crate::queue::QueuedJob;
use crate::scheduler::rules::{
    self, Check, Needs, Obstacle, at_rest, loadable, resident_until, startable_on, takes_work,
};
use crate::scheduler::snapshot::StartSize;
use crate::scheduler::{DeviceState, PoolState, Snapshot, StartChoice, WorkerState, start_context};

/// Places promised to a policy so far in a pass. A promised place is no longer free.
#[derive(Debug, Clone, Default)]
pub struct Promised {
    /// Jobs promised to each worker, keyed by pool and worker index.
    active: HashMap<(usize, usize), rules::Promised>,
    /// Bytes promised on each device, by pool index.
    taken: HashMap<(usize, Device), u64>,
    /// Promised starts: pool index, device, model and context.
    starts: Vec<(usize, Device, ModelRef, Option<u32>)>,
    evicted: HashSet<(usize, usize)>,
    /// Jobs that already have an action.
    settled: HashSet<usize>,
}

impl Promised {
    fn promised(&self, pool: usize, worker: usize) -> rules::Promised {
        let known = self.active.get(&(pool, worker));
        known.copied().unwrap_or_default()
    }

    /// Returns the worker's free slots: 0 if the worker is unknown or has refused for lack of room.
    pub fn free_slots(&self, snapshot: &Snapshot, pool: usize, worker: usize) -> u32 {
        let Some(state) = worker_at(snapshot, pool, worker) else {
            return 0;
        };
        if state.full {
            return 0;
        }
        let promised = self.promised(pool, worker);
        state
            .slots
            .saturating_sub(state.active)
            .saturating_sub(promised.jobs)
    }

    /// Returns the tokens of the worker's cache that are still free; `None` if they are unknown, or if the worker has no job
    /// and so has room for any.
    pub fn free_tokens(&self, snapshot: &Snapshot, pool: usize, worker: usize) -> Option<u32> {
        let state = worker_at(snapshot, pool, worker)?;
        let promised = self.promised(pool, worker);
        let idle = state.active + promised.jobs == 0;
        let free = state.free_tokens.filter(|_| !idle)?;
        Some(free.saturating_sub(promised.tokens))
    }

    /// Returns the bytes that another worker may take on the device: 0 if the pool or device is unknown.
    pub fn free_bytes(&self, snapshot: &Snapshot, pool: usize, device: Device) -> u64 {
        let found = snapshot
            .pools
            .get(pool)
            .and_then(|pool| pool.devices.iter().find(|state| state.device == device));
        let taken = self.taken.get(&(pool, device)).copied().unwrap_or(0);
        found.map_or(0, |state| state.free_bytes.saturating_sub(taken))
    }

    /// Returns the number of workers that are loading the model, including those promised in this pass.
    pub fn starting(&self, snapshot: &Snapshot, model: &ModelRef) -> usize {
        let shown = snapshot
            .pools
            .iter()
            .flat_map(|pool| &pool.workers)
            .filter(|w| w.model == *model && w.status == WorkerStatus::Starting);
        shown.count() + self.starts.iter().filter(|(_, _, m, _)| m == model).count()
    }

    /// Returns whether the job already has an action.
    pub fn is_settled(&self, job: usize) -> bool {
        self.settled.contains(&job)
    }

    /// Checks whether the job may go to the worker now.
    pub fn may_dispatch(
        &self,
        snapshot: &Snapshot,
        job: usize,
        pool: usize,
        worker: usize,
    ) -> Result<(), Refusal> {
        let queued = job_at(snapshot, job)?;
        if self.is_settled(job) {
            return Err(Refusal::Twice(queued.id));
        }
        let (Some(on), Some(state)) = (snapshot.pools.get(pool), worker_at(snapshot, pool, worker))
        else {
            return Err(Refusal::Unknown(format!("worker {worker} of pool {pool}")));
        };
        let check = self.check_dispatch(snapshot, queued, on, state, (pool, worker));
        check.map_err(|obstacle| Refusal::Dispatch {
            job: queued.id,
            pool: on.id.clone(),
            worker: state.id.clone(),
            why: obstacle.to_string(),
        })
    }

    fn check_dispatch<'a>(
        &self,
        snapshot: &Snapshot,
        job: &'a QueuedJob,
        pool: &'a PoolState,
        worker: &'a WorkerState,
        place: (usize, usize),
    ) -> Check<'a> {
        if job.backs_off(snapshot.now) {
            return Err(Obstacle::BackingOff);
        }
        takes_work(pool)?;
        let needs = Needs::of(job);
        needs.suited_by(&pool.id, worker)?;
        if self.evicted.contains(&place) {
            return Err(Obstacle::Leaving);
        }
        let promised = self.promised(place.0, place.1);
        needs.placed_on(worker, job.cache_expected(), promised)
    }

    /// Returns the smallest context with which a worker may be started on the device for this job now. `None` stands for the
    /// default context.
    pub fn may_start_for(
        &self,
        snapshot: &Snapshot,
        pool: usize,
        device: Device,
        job: usize,
    ) -> Result<Option<u32>, Refusal> {
        let queued = job_at(snapshot, job)?;
        let Some(on) = snapshot.pools.get(pool) else {
            return Err(Refusal::Unknown(format!("pool {pool}")));
        };
        let needed = queued.context_needed.unwrap_or(0);
        let context_length = match on.model(&queued.model) {
            Some(file) => match file.cost().least(needed) {
                Some(size) => size.context,
                None => {
                    return Err(Refusal::Start {
                        model: queued.model.to_string(),
                        device,
                        pool: on.id.clone(),
                        why: Obstacle::FileContext(needed).to_string(),
                    });
                }
            },
            None => None,
        };
        let worker = (device, &queued.model, context_length);
        self.may_start(snapshot, pool, worker, Some(job))?;
        Ok(context_length)
    }

    /// Returns the best context for a new worker on the device for this job, after [`Promised::may_start_for`]: room
    /// for the whole answer, if there is memory for it.
    pub fn start_context(
        &self,
        snapshot: &Snapshot,
        pool: usize,
        device: Device,
        job: usize,
    ) -> Option<u32> {
        let (on, queued) = (snapshot.pools.get(pool)?, snapshot.jobs.get(job)?);
        let state = on.devices.iter().find(|state| state.device == device)?;
        let device = DeviceState {
            free_bytes: self.free_bytes(snapshot, pool, device),
            ..*state
        };
        start_context(queued, &StartChoice { pool: on, device })
    }

    /// Checks whether a worker with this device, model and context may be started now for `job`, or for any waiting job if that
    /// is `None`.
    fn may_start(
        &self,
        snapshot: &Snapshot,
        pool: usize,
        (device, model, context_length): (Device, &ModelRef, Option<u32>),
        job: Option<usize>,
    ) -> Result<(), Refusal> {
        let Some(on) = snapshot.pools.get(pool) else {
            return Err(Refusal::Unknown(format!("pool {pool}")));
        };
        let check = || {
            takes_work(on)?;
            let mut devices = on.devices.iter();
            let state = devices.find(|state| state.device == device);
            let state = state.ok_or(Obstacle::NoProgram)?;
            let file = loadable(on, model)?;
            if let Some(asked) = context_length {
                let context = file.context.ok_or(Obstacle::ContextUnknown)?;
                let most = context.max_tokens;
                if !(1..=most).contains(&asked) {
                    return Err(Obstacle::ContextRange { asked, most });
                }
            }
            let free = DeviceState {
                free_bytes: self.free_bytes(snapshot, pool, device),
                ..*state
            };
            let size = StartSize {
                context: context_length,
                bytes: file.bytes(context_length),
            };
            startable_on(on, model, &free, size)?;
            let worker = WorkerState::asked_for(file, device, context_length, snapshot.now);
            let wants = |(index, job): (usize, &Arc<QueuedJob>)| {
                !self.is_settled(index) && Needs::of(job).suited_by(&on.id, &worker).is_ok()
            };
            let wanted = match job {
                Some(index) => job_at(snapshot, index).is_ok_and(|job| wants((index, job))),
                None => snapshot.jobs.iter().enumerate().any(wants),
            };
            wanted.then_some(()).ok_or(Obstacle::Unwanted)
        };
        check().map_err(|obstacle| Refusal::Start {
            model: model.to_string(),
            device,
            pool: on.id.clone(),
            why: obstacle.to_string(),
        })
    }

    /// Checks whether the worker may be stopped now to make room for the model.
    pub fn may_evict(
        &self,
        snapshot: &Snapshot,
        pool: usize,
        worker: usize,
        needed_by: &ModelRef,
    ) -> Result<(), Refusal> {
        let (Some(on), Some(state)) = (snapshot.pools.get(pool), worker_at(snapshot, pool, worker))
        else {
            return Err(Refusal::Unknown(format!("worker {worker} of pool {pool}")));
        };
        let check = || {
            if !snapshot.settings.evict {
                return Err(Obstacle::EvictionOff);
            }
            takes_work(on)?;
            at_rest(state, self.promised(pool, worker))?;
            if state.status != WorkerStatus::Ready {
                return Err(Obstacle::NotIdle);
            }
            if self.evicted.contains(&(pool, worker)) {
                return Err(Obstacle::AlreadyLeaving);
            }
            let mut jobs = snapshot.jobs.iter();
            let missed = jobs.any(|job| Needs::of(job).suited_by(&on.id, state).is_ok());
            let until = resident_until(&snapshot.settings, state);
            if missed && until.is_some_and(|at| at > snapshot.now) {
                let ready = state.ready_at.unwrap_or(snapshot.now);
                return Err(Obstacle::Resident {
                    ready_s: snapshot.now.duration_since(ready).as_secs(),
                    residence: snapshot.settings.residence(state),
                });
            }
            let mut jobs = snapshot.jobs.iter();
            let asked = jobs.any(|job| job.model == *needed_by);
            asked.then_some(()).ok_or(Obstacle::Unasked(needed_by))
        };
        check().map_err(|obstacle| Refusal::Evict {
            worker: state.id.clone(),
            pool: on.id.clone(),
            why: obstacle.to_string(),
        })
    }

    /// Reserves the place that the proposal asks for, if the rules allow it.
    pub fn take(&mut self, snapshot: &Snapshot, proposal: &Proposal) -> Result<(), Refusal> {
        match proposal {
            Proposal::Dispatch { job, pool, worker } => {
                self.may_dispatch(snapshot, *job, *pool, *worker)?;
                self.settled.insert(*job);
                let expected = job_at(snapshot, *job)?.cache_expected();
                let state = worker_at(snapshot, *pool, *worker);
                let tokens = state.map_or(expected, |state| state.most_of(expected));
                let promised = self.active.entry((*pool, *worker)).or_default();
                promised.jobs += 1;
                promised.tokens = promised.tokens.saturating_add(tokens);
            }
            Proposal::StartWorker {
                pool,
                device,
                model,
                context_length,
            } => {
                let worker = (*device, model, *context_length);
                self.may_start(snapshot, *pool, worker, None)?;
                let needed = snapshot.pools[*pool]
                    .model(model)
                    .map_or(0, |file| file.bytes(*context_length));
                let taken = self.taken.entry((*pool, *device)).or_default();
                *taken = taken.saturating_add(needed);
                let start = (*pool, *device, model.clone(), *context_length);
                self.starts.push(start);
            }
            Proposal::EvictWorker {
                pool,
                worker,
                needed_by,
            } => {
                self.may_evict(snapshot, *pool, *worker, needed_by)?;
                self.evicted.insert((*pool, *worker));
            }
            Proposal::Wait { job, .. } => {
                let queued = job_at(snapshot, *job)?;
                if !self.settled.insert(*job) {
                    return Err(Refusal::Twice(queued.id));
                }
            }
        }
        Ok(())
    }

    /// Returns the workers that were promised a job or an eviction, as pairs of pool and worker index.
    pub(super) fn workers_in_use(&self) -> impl Iterator<Item = (usize, usize)> {
        self.active.keys().chain(&self.evicted).copied()
    }

    /// Returns the snapshot's pools without the places promised so far.
    pub(super) fn pools_after(&self, snapshot: &Snapshot) -> Vec<Arc<PoolState>> {
        let mut pools = snapshot.pools.clone();
        for (&(pool, worker), promised) in &self.active {
            let state = &mut Arc::make_mut(&mut pools[pool]).workers[worker];
            state.active += promised.jobs;
            let free = state.free_tokens;
            state.free_tokens = free.map(|free| free.saturating_sub(promised.tokens));
            state.unanswered += promised.jobs;
        }
        for &(pool, worker) in &self.evicted {
            Arc::make_mut(&mut pools[pool]).workers[worker].status = WorkerStatus::Draining;
        }
        for (pool, device, model, context_length) in &self.starts {
            let pool = Arc::make_mut(&mut pools[*pool]);
            let Some(file) = pool.model(model).cloned() else {
                continue;
            };
            if let Some(state) = pool.devices.iter_mut().find(|d| d.device == *device) {
                let needed = file.bytes(*context_length);
                state.free_bytes = state.free_bytes.saturating_sub(needed);
            }
            pool.workers.push(WorkerState::asked_for(
                &file,
                *device,
                *context_length,
                snapshot.now,
            ));
        }
        pools
    }
}

fn worker_at(snapshot: &Snapshot, pool: usize, worker: usize) -> Option<&WorkerState> {
    snapshot.pools.get(pool)?.workers.get(worker)
}

fn job_at(snapshot: &Snapshot, job: usize) -> Result<&Arc<QueuedJob>, Refusal> {
    let found = snapshot.jobs.get(job);
    found.ok_or_else(|| Refusal::Unknown(format!("job {job}")))
}
