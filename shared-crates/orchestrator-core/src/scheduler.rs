//! Which job runs where, decided by a pure function: the same snapshot gives the same plan.
//!
//! For each waiting job, in the order of their turns, pools are filtered: known → alive → backend → model present →
//! memory fits → slots. What is left is given to the [`Policy`]. Where nothing is left, the job gets the counts of every
//! filter, the constraint that binds, and what would lift it. A job that can't run now never holds up one behind it.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;
use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::api::pool::PoolStatus;
use pool_core::worker::{Device, ExitReason, ModelFile, WorkerInfo, WorkerStatus};
use serde::{Deserialize, Serialize};

use crate::job::{JobErrorCode, JobId, Placement};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// How long pools have to register after a restart of the orchestrator: a little more than the default interval of their
/// heartbeats.
pub const REGISTRATION: SignedDuration = SignedDuration::from_secs(20);

/// Everything a plan depends on.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The time.
    pub now: Timestamp,
    /// When this orchestrator started: until its pools had time to register, no job of before is rejected.
    pub started_at: Timestamp,
    /// Waiting jobs in the order of their turns.
    pub jobs: Vec<QueuedJob>,
    /// Registered pools.
    pub pools: Vec<PoolState>,
}

/// A pool as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Starts that it refused a moment ago and that are not to be asked for again yet.
    pub refused_starts: Vec<RefusedStart>,
}

/// A start that a pool refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RefusedStart {
    /// The model.
    pub model: ModelRef,
    /// Where the worker should have computed.
    pub device: Device,
    /// What the pool said.
    pub message: String,
}

/// A device on which a worker can be started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceState {
    /// Which one.
    pub device: Device,
    /// Bytes that a further worker may take.
    pub free_bytes: u64,
}

/// A model on a pool's disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelState {
    /// How jobs name it.
    pub model: ModelRef,
    /// The file's identity.
    pub file: ModelFile,
    /// Bytes that a worker needs for it.
    pub needed_bytes: u64,
}

/// A worker as the scheduler sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerState {
    /// Id on its pool.
    pub id: String,
    /// Its model.
    pub model: ModelRef,
    /// The file that it was started with.
    pub file: ModelFile,
    /// Where it computes.
    pub device: Device,
    /// State.
    pub status: WorkerStatus,
    /// Sequences that it runs at once.
    pub slots: u32,
    /// Sequences that it runs now.
    pub active: u32,
    /// Why it refused its model's file, where it did. Another end while it started says nothing of the file.
    pub start_failure: Option<String>,
}

impl PoolState {
    /// The scheduler's view of what a pool said last. `active` counts the sequences of a worker, which the caller
    /// knows better than the pool: its own leases are newer than any heartbeat.
    pub fn new(
        status: &PoolStatus,
        liveness: PoolLiveness,
        active: impl Fn(&WorkerInfo) -> u32,
    ) -> Self {
        let devices = status
            .devices
            .iter()
            .filter(|d| status.backends.contains(&d.device.backend));
        let worker = |worker: &WorkerInfo| WorkerState {
            id: worker.id.clone(),
            model: worker.model_ref.clone(),
            file: worker.model_file.clone(),
            device: worker.device,
            status: worker.status,
            slots: worker.slots,
            active: active(worker),
            start_failure: worker
                .exit
                .as_ref()
                .filter(|exit| exit.during_start && exit.reason == ExitReason::ModelInvalid)
                .map(|exit| exit.message.clone()),
        };
        Self {
            id: status.pool_id.clone(),
            liveness,
            draining: status.draining,
            devices: devices
                .map(|d| DeviceState {
                    device: d.device,
                    free_bytes: d.memory_free_bytes,
                })
                .collect(),
            workers: status.workers.iter().map(worker).collect(),
            models: status
                .models
                .iter()
                .map(|m| ModelState {
                    model: m.model_ref.clone(),
                    file: m.file.clone(),
                    needed_bytes: m.needed_bytes,
                })
                .collect(),
            refused_starts: Vec::new(),
        }
    }

    /// Why the model as it lies on this pool's disk now could not be started here, where that was tried. A file that
    /// was replaced since is given a new chance.
    fn start_failure(&self, model: &ModelState) -> Option<&str> {
        let same = |w: &&WorkerState| {
            w.status == WorkerStatus::Failed && w.model == model.model && w.file == model.file
        };
        self.workers
            .iter()
            .filter(same)
            .find_map(|w| w.start_failure.as_deref())
    }

    fn refused(&self, model: &ModelRef, device: Device) -> Option<&RefusedStart> {
        self.refused_starts
            .iter()
            .find(|refused| refused.model == *model && refused.device == device)
    }

    fn active(&self) -> u32 {
        self.workers.iter().map(|w| w.active).sum()
    }
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Lease the job to the worker.
    Dispatch {
        /// The job.
        job: JobId,
        /// The pool.
        pool: String,
        /// The worker.
        worker: String,
    },
    /// Start a worker.
    StartWorker {
        /// The pool.
        pool: String,
        /// The model.
        model: ModelRef,
        /// Where it shall compute.
        device: Device,
    },
    /// The job can't be done by anybody: end it.
    Reject {
        /// The job.
        job: JobId,
        /// The code it ends with.
        code: JobErrorCode,
        /// What happened, for people.
        message: String,
    },
}

/// The constraint that binds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitReason {
    /// No pool is registered, or not the one that the job asks for.
    NoPool,
    /// Pools are registered, and none is heard from or takes work.
    PoolsAway,
    /// No pool has the device that the job asks for, or a worker program for one.
    NoBackend,
    /// No pool has the model on its disk.
    ModelMissing,
    /// No pool has enough free memory.
    MemoryShort,
    /// Every pool that could start a worker refused to, a moment ago.
    StartRefused,
    /// A worker with the model is loading it.
    WorkerStarting,
    /// All workers with the model are busy.
    SlotsBusy,
    /// The job waits a moment after a lost attempt.
    BackingOff,
}

/// How many pools one filter left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilterCount {
    /// The filter.
    pub filter: Filter,
    /// Pools left after it.
    pub pools: u32,
}

/// The filters, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Filter {
    /// Registered, and the one that the job asks for.
    Known,
    /// Heard from and taking work.
    Alive,
    /// Has the device.
    Backend,
    /// Has the model, and did not fail to start it.
    ModelPresent,
    /// Runs the model, or has the memory for it.
    MemoryFits,
    /// Has a worker with a free slot.
    Slots,
}

/// Why a job waits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// The constraint that binds.
    pub reason: WaitReason,
    /// The same, for people, with its numbers.
    pub message: String,
    /// What would lift it.
    pub hint: String,
    /// Pools left after each filter, in order.
    pub filters: Vec<FilterCount>,
}

/// What a pass decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// Why each of the other jobs waits. Jobs that wait for the same share one explanation.
    pub waiting: HashMap<JobId, Arc<Explanation>>,
}

/// A worker that could take the job.
#[derive(Debug, Clone, Copy)]
pub struct WorkerChoice<'a> {
    /// Its pool.
    pub pool: &'a PoolState,
    /// The worker.
    pub worker: &'a WorkerState,
}

/// A device on which a worker could be started.
#[derive(Debug, Clone, Copy)]
pub struct StartChoice<'a> {
    /// Its pool.
    pub pool: &'a PoolState,
    /// The device.
    pub device: DeviceState,
}

/// Chooses among the places that passed every filter. `Less` is better.
pub trait Policy {
    /// Orders workers with a free slot.
    fn compare_workers(&self, a: &WorkerChoice<'_>, b: &WorkerChoice<'_>) -> Ordering;
    /// Orders devices with enough memory.
    fn compare_starts(&self, a: &StartChoice<'_>, b: &StartChoice<'_>) -> Ordering;
}

/// The default policy: the worker with the smallest share of its slots in use, the device of the pool with the least
/// work. Ties go to the most free memory, then the least work, then the lower id.
#[derive(Debug, Clone, Copy, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn compare_workers(&self, a: &WorkerChoice<'_>, b: &WorkerChoice<'_>) -> Ordering {
        // a.active / a.slots < b.active / b.slots, without division.
        let load_a = u64::from(a.worker.active) * u64::from(b.worker.slots);
        let load_b = u64::from(b.worker.active) * u64::from(a.worker.slots);
        let free = |c: &WorkerChoice<'_>| {
            c.pool
                .devices
                .iter()
                .find(|d| d.device == c.worker.device)
                .map_or(0, |d| d.free_bytes)
        };
        let rest = |c: &WorkerChoice<'_>| (Reverse(free(c)), c.worker.active);
        load_a
            .cmp(&load_b)
            .then_with(|| rest(a).cmp(&rest(b)))
            .then_with(|| (&a.pool.id, &a.worker.id).cmp(&(&b.pool.id, &b.worker.id)))
    }

    fn compare_starts(&self, a: &StartChoice<'_>, b: &StartChoice<'_>) -> Ordering {
        let key = |c: &StartChoice<'_>| (c.pool.active(), Reverse(c.device.free_bytes));
        key(a)
            .cmp(&key(b))
            .then_with(|| (&a.pool.id, a.device.device).cmp(&(&b.pool.id, b.device.device)))
    }
}

/// What may be shared by all jobs that ask for the same model in the same place.
type Class = (ModelRef, Placement);

/// What a pass does with one job of a class.
enum Verdict {
    Dispatch {
        pool: usize,
        worker: usize,
    },
    Start {
        pool: usize,
        device: Device,
        wait: Arc<Explanation>,
    },
    Reject {
        code: JobErrorCode,
        message: String,
    },
    Wait(Arc<Explanation>),
}

/// Decides what to do with the waiting jobs.
pub fn schedule(snapshot: &Snapshot, policy: &dyn Policy) -> Plan {
    let mut pools = snapshot.pools.clone();
    let mut plan = Plan::default();
    // A class that has to wait, or can't run at all, does so for the rest of the pass: within one, places are only taken.
    let mut settled: HashMap<Class, Result<Arc<Explanation>, (JobErrorCode, String)>> =
        HashMap::new();
    for job in &snapshot.jobs {
        if job.not_before.is_some_and(|at| at > snapshot.now) {
            plan.waiting
                .insert(job.id, Arc::new(backing_off(job, snapshot.now)));
            continue;
        }
        let class = (job.model.clone(), job.placement.clone());
        let verdict = match settled.get(&class) {
            Some(Ok(wait)) => Verdict::Wait(Arc::clone(wait)),
            Some(Err((code, message))) => Verdict::Reject {
                code: *code,
                message: message.clone(),
            },
            None => judge(&job.model, &job.placement, &pools, policy),
        };
        match verdict {
            Verdict::Dispatch { pool, worker } => {
                let pool = &mut pools[pool];
                let worker = &mut pool.workers[worker];
                worker.active += 1;
                plan.actions.push(Action::Dispatch {
                    job: job.id,
                    pool: pool.id.clone(),
                    worker: worker.id.clone(),
                });
            }
            Verdict::Start { pool, device, wait } => {
                reserve(&mut pools[pool], &job.model, device);
                let pool = pools[pool].id.clone();
                plan.actions.push(Action::StartWorker {
                    pool,
                    model: job.model.clone(),
                    device,
                });
                plan.waiting.insert(job.id, Arc::clone(&wait));
                settled.insert(class, Ok(wait));
            }
            Verdict::Reject { message, .. } if awaits_pools(job, snapshot) => {
                plan.waiting
                    .insert(job.id, Arc::new(pools_may_come(message)));
            }
            Verdict::Reject { code, message } => {
                settled.insert(class, Err((code, message.clone())));
                plan.actions.push(Action::Reject {
                    job: job.id,
                    code,
                    message,
                });
            }
            Verdict::Wait(wait) => {
                plan.waiting.insert(job.id, Arc::clone(&wait));
                settled.insert(class, Ok(wait));
            }
        }
    }
    plan
}

/// Takes the memory of a worker that is about to be started, so that a later job of the pass does not count on it, and
/// shows the worker as starting, so that a job of another placement does not start a second one.
fn reserve(pool: &mut PoolState, model: &ModelRef, device: Device) {
    let Some(found) = pool.models.iter().find(|m| m.model == *model).cloned() else {
        return;
    };
    if let Some(state) = pool.devices.iter_mut().find(|d| d.device == device) {
        state.free_bytes = state.free_bytes.saturating_sub(found.needed_bytes);
    }
    pool.workers.push(WorkerState {
        id: String::new(),
        model: model.clone(),
        file: found.file,
        device,
        status: WorkerStatus::Starting,
        slots: 1,
        active: 0,
        start_failure: None,
    });
}

fn judge(
    model: &ModelRef,
    placement: &Placement,
    pools: &[PoolState],
    policy: &dyn Policy,
) -> Verdict {
    let device_ok = |device: Device| placement.device.is_none_or(|wanted| wanted == device);
    let mut filters = Vec::with_capacity(6);
    let mut left: Vec<usize> = (0..pools.len()).collect();
    let mut keep = |filter: Filter, left: &mut Vec<usize>, test: &dyn Fn(&PoolState) -> bool| {
        left.retain(|&index| test(&pools[index]));
        filters.push(FilterCount {
            filter,
            pools: u32::try_from(left.len()).unwrap_or(u32::MAX),
        });
        left.is_empty()
    };

    let wait = |reason, message: String, hint: &str, filters: &[FilterCount]| {
        Verdict::Wait(Arc::new(Explanation {
            reason,
            message,
            hint: hint.to_owned(),
            filters: filters.to_vec(),
        }))
    };

    if keep(Filter::Known, &mut left, &|p| {
        placement.pool.as_ref().is_none_or(|wanted| *wanted == p.id)
    }) {
        let message = match &placement.pool {
            Some(wanted) => format!("pool `{wanted}` has not registered"),
            None => "no pool has registered".to_owned(),
        };
        return wait(
            WaitReason::NoPool,
            message,
            "run `llorch-pool daemon start` on a pool host; on another machine, `orchestrator_url` in its settings tells it where to register",
            &filters,
        );
    }
    let known = left.len();
    if keep(Filter::Alive, &mut left, &|p| {
        p.liveness == PoolLiveness::Online && !p.draining
    }) {
        let message = format!("of {known} pools none is heard from and takes work");
        return wait(
            WaitReason::PoolsAway,
            message,
            "see `llorch-pool daemon status` on the pool hosts",
            &filters,
        );
    }
    if keep(Filter::Backend, &mut left, &|p| {
        p.devices.iter().any(|d| device_ok(d.device))
    }) {
        let message = match placement.device {
            Some(device) => format!("no pool can run a worker on {device}"),
            None => "no pool has a worker program".to_owned(),
        };
        return wait(
            WaitReason::NoBackend,
            message,
            "install `llorch-candled` beside `pool-managerd`",
            &filters,
        );
    }

    let runs = |pool: &PoolState| {
        pool.workers
            .iter()
            .any(|w| w.model == *model && w.status.is_live() && device_ok(w.device))
    };
    let on_disk = |pool: &PoolState| pool.models.iter().any(|m| m.model == *model);
    let failed = |pool: &PoolState| {
        let file = pool.models.iter().find(|m| m.model == *model);
        file.and_then(|m| pool.start_failure(m)).map(str::to_owned)
    };
    let before = left.clone();
    if keep(Filter::ModelPresent, &mut left, &|p| {
        runs(p) || (on_disk(p) && failed(p).is_none())
    }) {
        let failure = before
            .iter()
            .find_map(|&index| failed(&pools[index]).map(|why| (&pools[index].id, why)));
        // A pool that is away now may have a good copy.
        let elsewhere = pools.iter().find(|p| {
            placement.pool.as_ref().is_none_or(|wanted| *wanted == p.id)
                && (p.liveness != PoolLiveness::Online || p.draining)
                && on_disk(p)
                && failed(p).is_none()
        });
        if let Some((pool, why)) = failure {
            let message = format!("`{model}` can't be started on pool `{pool}`: {why}");
            if let Some(elsewhere) = elsewhere {
                let message = format!("{message}; pool `{}` has it and is away", elsewhere.id);
                let hint = "see `llorch-pool daemon status` on that host";
                return wait(WaitReason::PoolsAway, message, hint, &filters);
            }
            return Verdict::Reject {
                code: JobErrorCode::ModelFailed,
                message,
            };
        }
        let hint = format!("on a pool host, run `llorch-pool models download {model}`");
        return wait(
            WaitReason::ModelMissing,
            format!("no pool has `{model}` on its disk"),
            &hint,
            &filters,
        );
    }
    let needed = |pool: &PoolState| {
        pool.models
            .iter()
            .find(|m| m.model == *model)
            .map_or(u64::MAX, |m| m.needed_bytes)
    };
    let fits = |pool: &PoolState| {
        pool.devices
            .iter()
            .any(|d| device_ok(d.device) && d.free_bytes >= needed(pool))
    };
    let before = left.clone();
    if keep(Filter::MemoryFits, &mut left, &|p| runs(p) || fits(p)) {
        let best = before.iter().map(|&index| {
            let free = pools[index]
                .devices
                .iter()
                .filter(|d| device_ok(d.device))
                .map(|d| d.free_bytes)
                .max();
            (free.unwrap_or(0), needed(&pools[index]), &pools[index].id)
        });
        let (free, needed, pool) = best.max().expect("the filter before left a pool");
        let message = format!(
            "`{model}` needs {needed} bytes; the most that is free is {free} on pool `{pool}`"
        );
        return wait(
            WaitReason::MemoryShort,
            message,
            "stop a worker: see `llorch-pool worker list`",
            &filters,
        );
    }

    let candidates = left.clone();
    let mut free_workers = Vec::new();
    for &p in &candidates {
        for (w, worker) in pools[p].workers.iter().enumerate() {
            let serves = matches!(worker.status, WorkerStatus::Ready | WorkerStatus::Busy);
            if serves
                && worker.model == *model
                && device_ok(worker.device)
                && worker.active < worker.slots
            {
                free_workers.push((p, w));
            }
        }
    }
    keep(Filter::Slots, &mut left, &|p| {
        free_workers
            .iter()
            .any(|&(index, _)| pools[index].id == p.id)
    });
    let as_choice = |&(p, w): &(usize, usize)| WorkerChoice {
        pool: &pools[p],
        worker: &pools[p].workers[w],
    };
    let best = free_workers
        .iter()
        .min_by(|a, b| policy.compare_workers(&as_choice(a), &as_choice(b)));
    if let Some(&(pool, worker)) = best {
        return Verdict::Dispatch { pool, worker };
    }

    let running: Vec<&WorkerState> = candidates
        .iter()
        .flat_map(|&p| &pools[p].workers)
        .filter(|w| w.model == *model && w.status.is_live() && device_ok(w.device))
        .collect();
    if running
        .iter()
        .any(|w| matches!(w.status, WorkerStatus::Ready | WorkerStatus::Busy))
    {
        let message = format!("all {} workers with `{model}` are busy", running.len());
        return wait(
            WaitReason::SlotsBusy,
            message,
            "it starts when a job before it ends",
            &filters,
        );
    }
    let starting = |filters: &[FilterCount]| Explanation {
        reason: WaitReason::WorkerStarting,
        message: format!("a worker is loading `{model}`"),
        hint: "it starts when the worker is ready".to_owned(),
        filters: filters.to_vec(),
    };
    if running.iter().any(|w| w.status == WorkerStatus::Starting) {
        return Verdict::Wait(Arc::new(starting(&filters)));
    }
    let starts = candidates.iter().flat_map(|&p| {
        let pool = &pools[p];
        let usable = on_disk(pool) && failed(pool).is_none();
        let devices = pool
            .devices
            .iter()
            .filter(move |d| usable && device_ok(d.device) && d.free_bytes >= needed(pool));
        devices.map(move |&device| (p, StartChoice { pool, device }))
    });
    let refusal = |choice: &StartChoice<'_>| {
        choice
            .pool
            .refused(model, choice.device.device)
            .map(|r| r.message.clone())
    };
    let (refused, starts): (Vec<_>, Vec<_>) =
        starts.partition(|(_, choice)| refusal(choice).is_some());
    match starts
        .into_iter()
        .min_by(|a, b| policy.compare_starts(&a.1, &b.1))
    {
        Some((pool, choice)) => Verdict::Start {
            pool,
            device: choice.device.device,
            wait: Arc::new(starting(&filters)),
        },
        None if !refused.is_empty() => {
            let (_, choice) = refused[0];
            let why = refusal(&choice).unwrap_or_default();
            let message = format!(
                "pool `{}` refused to start a worker with `{model}`: {why}",
                choice.pool.id
            );
            wait(
                WaitReason::StartRefused,
                message,
                "it is asked again in a moment",
                &filters,
            )
        }
        // Only a draining worker is left of the model.
        None => wait(
            WaitReason::SlotsBusy,
            format!("the workers with `{model}` take no more work"),
            "it starts when memory for another worker is free",
            &filters,
        ),
    }
}

/// Whether the job is of before a restart, and pools that could do it may not have registered since.
fn awaits_pools(job: &QueuedJob, snapshot: &Snapshot) -> bool {
    let since_start = snapshot.now.duration_since(snapshot.started_at);
    job.created_at < snapshot.started_at && since_start < REGISTRATION
}

fn pools_may_come(why: String) -> Explanation {
    Explanation {
        reason: WaitReason::PoolsAway,
        message: format!("{why}; other pools may still register after the restart"),
        hint: "it is decided soon".to_owned(),
        filters: Vec::new(),
    }
}

fn backing_off(job: &QueuedJob, now: Timestamp) -> Explanation {
    let pause = job
        .not_before
        .map_or(0, |at| at.duration_since(now).as_millis());
    Explanation {
        reason: WaitReason::BackingOff,
        message: format!("the last attempt was lost; the next follows in {pause} ms"),
        hint: "it goes on by itself".to_owned(),
        filters: Vec::new(),
    }
}

#[cfg(test)]
mod tests;
