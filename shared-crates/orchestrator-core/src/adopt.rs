//! What a policy of the operator's own asks for, held against the snapshot by the rules that bind the built-in ones.
//!
//! A script proposes; nothing that it says is done before it has passed here. One proposal that breaks a rule spoils the
//! whole answer: half a plan of somebody who is wrong about the fleet is worth less than the built-in policy's whole one.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use jiff::SignedDuration;
use pool_core::ModelRef;
use pool_core::units::{human_bytes_down, human_bytes_up, human_duration, human_seconds};
use pool_core::worker::{Device, WorkerStatus};

use crate::job::{JobId, Placement};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;
use crate::scheduler::{
    Action, DeviceState, Explanation, Filter, FilterCount, Plan, Policy, PoolState, Settings,
    Snapshot, StartChoice, WaitReason, WorkerState, could_use, schedule, start_context,
};

/// Most jobs that a script is shown in one pass.
pub const MAX_CANDIDATES: usize = 256;
/// Most actions that it may return.
pub const MAX_ACTIONS: usize = 1024;
/// Longest reason that a script may give, in characters; the rest is cut off.
pub const MAX_REASON: usize = 200;
/// The soonest that a script may ask to be run again for a job that it lets wait, and the latest.
pub const AGAIN: (SignedDuration, SignedDuration) = (
    SignedDuration::from_millis(100),
    SignedDuration::from_hours(1),
);

/// One thing that a policy asks for. Jobs, pools and workers are places in the snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proposal {
    /// Lease the job to the worker.
    Dispatch {
        /// The job.
        job: usize,
        /// The worker's pool.
        pool: usize,
        /// The worker.
        worker: usize,
    },
    /// Start a worker.
    StartWorker {
        /// The pool.
        pool: usize,
        /// Where it shall compute.
        device: Device,
        /// The model.
        model: ModelRef,
        /// Tokens of context; `None` for the pool's default.
        context_length: Option<u32>,
    },
    /// Stop an idle worker.
    EvictWorker {
        /// The worker's pool.
        pool: usize,
        /// The worker.
        worker: usize,
        /// The model that the memory is for.
        needed_by: ModelRef,
    },
    /// Let the job wait although there may be a place.
    Wait {
        /// The job.
        job: usize,
        /// Why, for people; may be empty.
        reason: String,
        /// When to look again if nothing happens before.
        again: Option<SignedDuration>,
    },
}

/// Why a proposal can't be taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The snapshot has no such job, pool or worker, or the job was not offered.
    #[error("{0} is not in this pass")]
    Unknown(String),
    /// The job has an action already.
    #[error("{0} has an action already")]
    Twice(JobId),
    /// The job can't go there.
    #[error("{job} can't go to `{worker}` on pool `{pool}`: {why}")]
    Dispatch {
        /// The job.
        job: JobId,
        /// The pool.
        pool: String,
        /// The worker.
        worker: String,
        /// What is against it.
        why: String,
    },
    /// The worker can't be started.
    #[error("a worker with `{model}` can't start on {device} of pool `{pool}`: {why}")]
    Start {
        /// The model.
        model: String,
        /// Where.
        device: Device,
        /// The pool.
        pool: String,
        /// What is against it.
        why: String,
    },
    /// The worker can't be stopped.
    #[error("`{worker}` on pool `{pool}` can't be evicted: {why}")]
    Evict {
        /// The worker.
        worker: String,
        /// The pool.
        pool: String,
        /// What is against it.
        why: String,
    },
    /// More actions than are allowed.
    #[error("{0} actions; at most {MAX_ACTIONS} are allowed")]
    TooMany(usize),
}

/// The proposal that spoils an answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}")]
pub struct Refused {
    /// Its place in the answer.
    pub index: usize,
    /// What is wrong with it.
    pub why: Refusal,
}

/// What a policy has asked for so far in a pass: places that are promised are gone.
#[derive(Debug, Clone, Default)]
pub struct Promised {
    /// Jobs that go to each worker, and the tokens that they need of its cache.
    active: HashMap<(usize, usize), (u32, u32)>,
    taken: HashMap<(usize, Device), u64>,
    starts: Vec<(usize, Device, ModelRef, Option<u32>)>,
    evicted: HashSet<(usize, usize)>,
    settled: HashSet<usize>,
}

fn takes_work(pool: &PoolState) -> Result<(), String> {
    if pool.liveness != PoolLiveness::Online {
        return Err(format!("the pool is {}", pool.liveness));
    }
    if pool.draining {
        return Err("the pool drains".to_owned());
    }
    Ok(())
}

fn placement_fits(placement: &Placement, pool: &PoolState, device: Device) -> Result<(), String> {
    if let Some(wanted) = placement.pool.as_ref().filter(|wanted| **wanted != pool.id) {
        return Err(format!("the job asks for pool `{wanted}`"));
    }
    if let Some(wanted) = placement.device.filter(|wanted| *wanted != device) {
        return Err(format!("the job asks for {wanted}"));
    }
    Ok(())
}

impl Promised {
    /// Jobs that go to the worker, and the tokens that they need of its cache.
    fn promised(&self, pool: usize, worker: usize) -> (u32, u32) {
        let known = self.active.get(&(pool, worker));
        known.copied().unwrap_or_default()
    }

    /// Slots of the worker that are still free.
    pub fn free_slots(&self, snapshot: &Snapshot, pool: usize, worker: usize) -> u32 {
        let Some(state) = worker_at(snapshot, pool, worker) else {
            return 0;
        };
        if state.full {
            return 0;
        }
        let (promised, _) = self.promised(pool, worker);
        state
            .slots
            .saturating_sub(state.active)
            .saturating_sub(promised)
    }

    /// Tokens of the worker's cache that are still free; `None` if unknown, or if it has no job and so room for any.
    pub fn free_tokens(&self, snapshot: &Snapshot, pool: usize, worker: usize) -> Option<u32> {
        let state = worker_at(snapshot, pool, worker)?;
        let (promised, tokens) = self.promised(pool, worker);
        let idle = state.active + promised == 0;
        let free = state.free_tokens.filter(|_| !idle)?;
        Some(free.saturating_sub(tokens))
    }

    /// Bytes that a further worker may take on the device.
    pub fn free_bytes(&self, snapshot: &Snapshot, pool: usize, device: Device) -> u64 {
        let found = snapshot
            .pools
            .get(pool)
            .and_then(|pool| pool.devices.iter().find(|state| state.device == device));
        let taken = self.taken.get(&(pool, device)).copied().unwrap_or(0);
        found.map_or(0, |state| state.free_bytes.saturating_sub(taken))
    }

    /// Workers that are loading the model, those included that were asked for in this pass.
    pub fn starting(&self, snapshot: &Snapshot, model: &ModelRef) -> usize {
        let shown = snapshot
            .pools
            .iter()
            .flat_map(|pool| &pool.workers)
            .filter(|w| w.model == *model && w.status == WorkerStatus::Starting);
        shown.count() + self.starts.iter().filter(|(_, _, m, _)| m == model).count()
    }

    /// Whether the job has an action already.
    pub fn is_settled(&self, job: usize) -> bool {
        self.settled.contains(&job)
    }

    /// Whether the job may go to the worker now.
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
        let check = || {
            if queued.not_before.is_some_and(|at| at > snapshot.now) {
                return Err("the job waits a moment after a lost attempt".to_owned());
            }
            takes_work(on)?;
            if state.model != queued.model {
                return Err(format!(
                    "it runs `{}`, the job asks for `{}`",
                    state.model, queued.model
                ));
            }
            placement_fits(&queued.placement, on, state.device)?;
            let needed = queued.context_needed.unwrap_or(0);
            if state.capacity() < needed {
                return Err(format!(
                    "the job needs a context of {needed} tokens, the worker has {}",
                    state.capacity()
                ));
            }
            if !state.serves() {
                return Err(format!("the worker is {}", state.status));
            }
            if self.evicted.contains(&(pool, worker)) {
                return Err("the worker is being evicted".to_owned());
            }
            if state.full {
                return Err("it had no room a moment ago".to_owned());
            }
            let tokens = queued.cache_needed.unwrap_or(0);
            let free_tokens = self.free_tokens(snapshot, pool, worker);
            if free_tokens.is_some_and(|free| free < tokens) {
                return Err(format!(
                    "the job needs {tokens} tokens of its cache, {} are free",
                    free_tokens.unwrap_or(0)
                ));
            }
            if self.free_slots(snapshot, pool, worker) == 0 {
                return Err(format!("all {} of its slots are taken", state.slots));
            }
            Ok(())
        };
        check().map_err(|why| Refusal::Dispatch {
            job: queued.id,
            pool: on.id.clone(),
            worker: state.id.clone(),
            why,
        })
    }

    /// Returns the smallest context with which a worker may be started on the device for this job now.
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
                        why: format!(
                            "the job needs a context of {needed} tokens, more than the file allows"
                        ),
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

    /// Returns whether a worker with this device, model and context may be started now, for this job or for any waiting
    /// job.
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
            if !on.devices.iter().any(|state| state.device == device) {
                return Err("the pool has no worker program for it".to_owned());
            }
            let Some(file) = on.model(model) else {
                return Err("the pool does not have the model".to_owned());
            };
            if let Some(failure) = on.start_failure(file) {
                return Err(format!("its file could not be loaded: {failure}"));
            }
            if let Some(asked) = context_length {
                let Some(context) = file.context else {
                    return Err("the pool does not say which contexts the file allows".to_owned());
                };
                let most = context.max_tokens;
                if !(1..=most).contains(&asked) {
                    return Err(format!(
                        "the context is {asked} tokens, the file allows up to {most}"
                    ));
                }
            }
            if let Some(refused) = on.refused(model, device, context_length) {
                return Err(format!(
                    "the pool refused a moment ago: {}",
                    refused.message
                ));
            }
            let free = self.free_bytes(snapshot, pool, device);
            let needed = file.bytes(context_length);
            if needed > free {
                return Err(format!(
                    "it needs {}, {} are free",
                    human_bytes_up(needed),
                    human_bytes_down(free)
                ));
            }
            let worker = WorkerState::asked_for(file, device, context_length, snapshot.now);
            let wants = |(index, job): (usize, &Arc<QueuedJob>)| {
                !self.is_settled(index) && could_use(job, &on.id, &worker)
            };
            let wanted = match job {
                Some(index) => job_at(snapshot, index).is_ok_and(|job| wants((index, job))),
                None => snapshot.jobs.iter().enumerate().any(wants),
            };
            if !wanted {
                return Err("no waiting job could use it".to_owned());
            }
            Ok(())
        };
        check().map_err(|why| Refusal::Start {
            model: model.to_string(),
            device,
            pool: on.id.clone(),
            why,
        })
    }

    /// Whether the worker may be stopped now to make room for the model.
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
                return Err("the settings allow no eviction".to_owned());
            }
            takes_work(on)?;
            let (promised, _) = self.promised(pool, worker);
            // One that is full without a lease of ours works for somebody else.
            let works = state.full || state.active + promised > 0;
            if state.status != WorkerStatus::Ready || works {
                return Err("it is not idle".to_owned());
            }
            if self.evicted.contains(&(pool, worker)) {
                return Err("it is being evicted already".to_owned());
            }
            let missed = snapshot
                .jobs
                .iter()
                .any(|job| could_use(job, &on.id, state));
            let residence = snapshot.settings.residence(state);
            if let Some(ready) = state.ready_at.filter(|at| *at + residence > snapshot.now)
                && missed
            {
                let age = snapshot.now.duration_since(ready).as_secs();
                return Err(format!(
                    "it has been ready for {}; while jobs wait for it, it stays for {}",
                    human_seconds(age),
                    human_duration(residence.unsigned_abs())
                ));
            }
            if !snapshot.jobs.iter().any(|job| job.model == *needed_by) {
                return Err(format!("no waiting job asks for `{needed_by}`"));
            }
            Ok(())
        };
        check().map_err(|why| Refusal::Evict {
            worker: state.id.clone(),
            pool: on.id.clone(),
            why,
        })
    }

    /// Takes the place that the proposal asks for, where the rules allow it.
    pub fn take(&mut self, snapshot: &Snapshot, proposal: &Proposal) -> Result<(), Refusal> {
        match proposal {
            Proposal::Dispatch { job, pool, worker } => {
                self.may_dispatch(snapshot, *job, *pool, *worker)?;
                self.settled.insert(*job);
                let tokens = job_at(snapshot, *job)?.cache_needed.unwrap_or(0);
                let promised = self.active.entry((*pool, *worker)).or_default();
                promised.0 += 1;
                promised.1 = promised.1.saturating_add(tokens);
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

    /// The snapshot's pools with everything that is promised taken away.
    fn pools_after(&self, snapshot: &Snapshot) -> Vec<Arc<PoolState>> {
        let mut pools = snapshot.pools.clone();
        for (&(pool, worker), &(count, tokens)) in &self.active {
            let state = &mut Arc::make_mut(&mut pools[pool]).workers[worker];
            state.active += count;
            state.free_tokens = state.free_tokens.map(|free| free.saturating_sub(tokens));
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

/// Whether no policy could do anything for a job that waits for this reason: it waits for the fleet to change.
fn is_out_of_reach(reason: WaitReason) -> bool {
    use WaitReason as R;
    match reason {
        R::NoPool
        | R::PoolsAway
        | R::NoBackend
        | R::ModelMissing
        | R::ContextShort
        | R::Downloading
        | R::DownloadRefused
        | R::BackingOff => true,
        R::MemoryShort
        | R::Evicting
        | R::StartRefused
        | R::WorkerStarting
        | R::SlotsBusy
        | R::CacheFull
        | R::PolicyHeld => false,
    }
}

fn rejected(plan: &Plan) -> HashSet<JobId> {
    let rejects = plan.actions.iter().filter_map(|action| match action {
        Action::Reject { job, .. } => Some(*job),
        _ => None,
    });
    rejects.collect()
}

/// The jobs that a script is shown, as places in the snapshot, in the order of their turns: those for which something can
/// be done, at most [`MAX_CANDIDATES`]. Where there are more, every kind of job (model and placement) has its share, so
/// that a thousand jobs of one model hide none of another.
pub fn candidates(snapshot: &Snapshot, built_in: &Plan) -> Vec<usize> {
    let rejected = rejected(built_in);
    let within_reach = |job: &QueuedJob| {
        let waits = built_in.waiting.get(&job.id);
        !rejected.contains(&job.id) && !waits.is_some_and(|why| is_out_of_reach(why.reason))
    };
    let all: Vec<usize> = (0..snapshot.jobs.len())
        .filter(|&index| within_reach(&snapshot.jobs[index]))
        .collect();
    if all.len() <= MAX_CANDIDATES {
        return all;
    }
    let mut rank_in_class: HashMap<(&ModelRef, &Placement), usize> = HashMap::new();
    let mut ranked: Vec<(usize, usize)> = all
        .into_iter()
        .map(|index| {
            let job = &snapshot.jobs[index];
            let rank = rank_in_class
                .entry((&job.model, &job.placement))
                .or_default();
            *rank += 1;
            (*rank, index)
        })
        .collect();
    ranked.sort_unstable();
    let mut chosen: Vec<usize> = ranked
        .into_iter()
        .take(MAX_CANDIDATES)
        .map(|(_, index)| index)
        .collect();
    chosen.sort_unstable();
    chosen
}

/// Makes a plan of what a policy asks for, or says what is wrong with it.
///
/// The policy decides on dispatches, starts and evictions. What is nobody's choice stays with the built-in plan: jobs that
/// can't be done by anybody are ended, workers that nobody needed for `idle_ttl` are stopped, missing models are
/// downloaded. Every job that waits has its explanation, and one that waits only because the policy lets it says so.
pub fn adopt(
    snapshot: &Snapshot,
    policy: &dyn Policy,
    built_in: &Plan,
    offered: &[usize],
    proposals: &[Proposal],
) -> Result<Plan, Refused> {
    if proposals.len() > MAX_ACTIONS {
        let why = Refusal::TooMany(proposals.len());
        return Err(Refused {
            index: MAX_ACTIONS,
            why,
        });
    }
    let offered: HashSet<usize> = offered.iter().copied().collect();
    let mut promised = Promised::default();
    let mut plan = Plan {
        wake: built_in.wake,
        ..Plan::default()
    };
    let mut reasons: BTreeMap<usize, &str> = BTreeMap::new();
    let mut dispatched: HashSet<usize> = HashSet::new();
    for (index, proposal) in proposals.iter().enumerate() {
        let refuse = |why| Refused { index, why };
        if let Proposal::Dispatch { job, .. } | Proposal::Wait { job, .. } = proposal
            && !offered.contains(job)
        {
            return Err(refuse(Refusal::Unknown(format!("job {job}"))));
        }
        promised.take(snapshot, proposal).map_err(refuse)?;
        let pool_name = |pool: usize| snapshot.pools[pool].id.clone();
        let worker_name =
            |pool: usize, worker: usize| snapshot.pools[pool].workers[worker].id.clone();
        match proposal {
            Proposal::Dispatch { job, pool, worker } => {
                dispatched.insert(*job);
                plan.actions.push(Action::Dispatch {
                    job: snapshot.jobs[*job].id,
                    pool: pool_name(*pool),
                    worker: worker_name(*pool, *worker),
                });
            }
            Proposal::StartWorker {
                pool,
                device,
                model,
                context_length,
            } => plan.actions.push(Action::StartWorker {
                pool: pool_name(*pool),
                model: model.clone(),
                device: *device,
                context_length: *context_length,
            }),
            Proposal::EvictWorker {
                pool,
                worker,
                needed_by,
            } => plan.actions.push(Action::EvictWorker {
                pool: pool_name(*pool),
                worker: worker_name(*pool, *worker),
                needed_by: needed_by.clone(),
            }),
            Proposal::Wait { job, reason, again } => {
                reasons.insert(*job, reason);
                let wake = again.and_then(|pause| {
                    let pause = pause.clamp(AGAIN.0, AGAIN.1);
                    snapshot.now.checked_add(pause).ok()
                });
                plan.wake = plan.wake.into_iter().chain(wake).min();
            }
        }
    }
    keep_house(snapshot, built_in, &promised, &mut plan);
    explain(
        snapshot,
        policy,
        built_in,
        &promised,
        &dispatched,
        &reasons,
        &mut plan,
    );
    Ok(plan)
}

/// Adds what the built-in plan does that is no policy's choice.
fn keep_house(snapshot: &Snapshot, built_in: &Plan, promised: &Promised, plan: &mut Plan) {
    let in_use: HashSet<(&str, &str)> = promised
        .active
        .keys()
        .chain(&promised.evicted)
        .map(|&(pool, worker)| {
            let pool = &snapshot.pools[pool];
            (pool.id.as_str(), pool.workers[worker].id.as_str())
        })
        .collect();
    let kept = built_in.actions.iter().filter(|action| match action {
        Action::Reject { .. } | Action::Download { .. } => true,
        Action::UnloadWorker { pool, worker } => {
            !in_use.contains(&(pool.as_str(), worker.as_str()))
        }
        Action::Dispatch { .. } | Action::StartWorker { .. } | Action::EvictWorker { .. } => false,
    });
    plan.actions.extend(kept.cloned());
}

/// Model, placement and required tokens of context and cache, shared by jobs that wait for the same workers.
type Kind<'a> = (&'a ModelRef, &'a Placement, Option<u32>, Option<u32>);

fn kind(job: &QueuedJob) -> Kind<'_> {
    (
        &job.model,
        &job.placement,
        job.context_needed,
        job.cache_needed,
    )
}

/// Says of every job that stays why it does.
fn explain(
    snapshot: &Snapshot,
    policy: &dyn Policy,
    built_in: &Plan,
    promised: &Promised,
    dispatched: &HashSet<usize>,
    reasons: &BTreeMap<usize, &str>,
    plan: &mut Plan,
) {
    let rejected = rejected(built_in);
    let mut held: Vec<usize> = Vec::new();
    for (index, job) in snapshot.jobs.iter().enumerate() {
        if dispatched.contains(&index) || rejected.contains(&job.id) {
            continue;
        }
        match built_in.waiting.get(&job.id) {
            Some(why) if is_out_of_reach(why.reason) => {
                plan.waiting.insert(job.id, Arc::clone(why));
            }
            _ => held.push(index),
        }
    }
    // One job of each kind is asked for: what the built-in policy would still find for it tells what binds it now.
    let mut classes: HashMap<Kind<'_>, Arc<Explanation>> = HashMap::new();
    let mut first: Vec<&Arc<QueuedJob>> = Vec::new();
    let mut seen: HashSet<Kind<'_>> = HashSet::new();
    for &index in &held {
        let job = &snapshot.jobs[index];
        if seen.insert(kind(job)) {
            first.push(job);
        }
    }
    let after = Snapshot {
        jobs: first.iter().map(|job| Arc::clone(job)).collect(),
        pools: promised.pools_after(snapshot),
        settings: Settings {
            evict: false,
            ..snapshot.settings
        },
        ..snapshot.clone()
    };
    let found = schedule(&after, policy);
    for job in first {
        let starts_one = found.actions.iter().any(
            |action| matches!(action, Action::StartWorker { model, .. } if *model == job.model),
        );
        let why = match found.waiting.get(&job.id) {
            Some(why) if !starts_one => Arc::clone(why),
            _ => Arc::new(held_back("", snapshot)),
        };
        classes.insert(kind(job), why);
    }
    for index in held {
        let job = &snapshot.jobs[index];
        let Some(why) = classes.get(&kind(job)) else {
            continue;
        };
        let why = match reasons.get(&index) {
            Some(reason) if why.reason == WaitReason::PolicyHeld && !reason.is_empty() => {
                Arc::new(held_back(reason, snapshot))
            }
            _ => Arc::clone(why),
        };
        plan.waiting.insert(job.id, why);
    }
}

fn held_back(reason: &str, snapshot: &Snapshot) -> Explanation {
    let message = match reason {
        "" => "there is a place, and the scheduler's script lets the job wait".to_owned(),
        reason => format!("the scheduler's script lets the job wait: {reason}"),
    };
    Explanation {
        reason: WaitReason::PolicyHeld,
        message,
        hint: "see `llorch orchestrator scheduler show`".to_owned(),
        filters: vec![
            FilterCount {
                filter: Filter::Known,
                pools: u32::try_from(snapshot.pools.len()).unwrap_or(u32::MAX),
            },
            FilterCount {
                filter: Filter::Policy,
                pools: 0,
            },
        ],
    }
}

/// A reason as it is kept: one line of bounded length without control characters.
pub fn tidy_reason(text: &str) -> String {
    text.chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_REASON)
        .collect()
}
