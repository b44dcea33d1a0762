//! Views that scripts have of a pass, which read one shared snapshot on demand, and the functions that work on them.
//!
//! Numbers follow one rule: a `u64` above the largest Rhai integer appears as the largest one (`i64::MAX`). Ids are strings.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::worker::Device;
use rhai::{Array, Dynamic, Engine, FLOAT, INT, NativeCallContext, Position};

use super::MAX_ARRAY;
use crate::adopt::{Promised, Proposal, tidy_reason};
use crate::job::Priority;
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;
use crate::scheduler::{
    DeviceState, LeastLoaded, Policy as _, PoolState, Rank, Snapshot, StartChoice, WorkerChoice,
    WorkerState,
};

/// Input of a script's run.
#[derive(Debug, Clone)]
pub struct ScriptInput {
    /// Snapshot that the script decides on.
    pub snapshot: Arc<Snapshot>,
    /// Jobs offered to the script, as indices into the snapshot.
    pub candidates: Vec<usize>,
    /// Cost of each pool, as set by the operator; a pool without an entry costs 1.
    pub costs: Arc<BTreeMap<String, f64>>,
}

/// An action returned by a script, with its position in the source.
#[derive(Debug, Clone)]
pub struct Act {
    /// Proposal to check.
    pub proposal: Proposal,
    /// Position of the call that created the action.
    pub position: Position,
}

/// A pass in progress. The places that the script has requested so far no longer appear free to it.
struct Shared {
    pass: Arc<ScriptInput>,
    promised: Mutex<Promised>,
}

impl Shared {
    fn snapshot(&self) -> &Snapshot {
        &self.pass.snapshot
    }

    fn promised(&self) -> MutexGuard<'_, Promised> {
        self.promised.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn pool(&self, pool: usize) -> &PoolState {
        &self.snapshot().pools[pool]
    }

    fn job(&self, job: usize) -> &QueuedJob {
        &self.snapshot().jobs[job]
    }

    fn worker(&self, pool: usize, worker: usize) -> &WorkerState {
        &self.pool(pool).workers[worker]
    }

    fn cost(&self, pool: usize) -> FLOAT {
        let id = &self.pool(pool).id;
        self.pass.costs.get(id).copied().unwrap_or(1.0)
    }

    fn ms_since(&self, then: Timestamp) -> INT {
        let age = self.snapshot().now.duration_since(then).as_millis();
        INT::try_from(age.max(0)).unwrap_or(INT::MAX)
    }
}

/// Converts a number, capping it at `i64::MAX`.
fn int(value: u64) -> INT {
    INT::try_from(value).unwrap_or(INT::MAX)
}

fn count(value: usize) -> INT {
    INT::try_from(value).unwrap_or(INT::MAX)
}

/// Converts `None` to `()`.
fn optional<T: Into<Dynamic>>(value: Option<T>) -> Dynamic {
    value.map_or(Dynamic::UNIT, Into::into)
}

/// The argument of `schedule`.
#[derive(Clone)]
pub(super) struct Ctx(Arc<Shared>);

#[derive(Clone)]
struct Job {
    shared: Arc<Shared>,
    at: usize,
}

#[derive(Clone)]
struct ScriptPool {
    shared: Arc<Shared>,
    at: usize,
}

#[derive(Clone)]
struct DeviceView {
    shared: Arc<Shared>,
    pool: usize,
    device: DeviceState,
}

#[derive(Clone)]
struct Worker {
    shared: Arc<Shared>,
    pool: usize,
    at: usize,
}

impl Ctx {
    pub(super) fn new(pass: Arc<ScriptInput>) -> Self {
        Self(Arc::new(Shared {
            pass,
            promised: Mutex::default(),
        }))
    }

    fn jobs(&mut self) -> Array {
        let shared = &self.0;
        shared
            .pass
            .candidates
            .iter()
            .map(|&at| {
                Dynamic::from(Job {
                    shared: Arc::clone(shared),
                    at,
                })
            })
            .collect()
    }

    fn pools(&mut self) -> Array {
        let shared = &self.0;
        (0..shared.snapshot().pools.len().min(MAX_ARRAY))
            .map(|at| {
                Dynamic::from(ScriptPool {
                    shared: Arc::clone(shared),
                    at,
                })
            })
            .collect()
    }

    fn workers_where(&self, wanted: impl Fn(&PoolState, &WorkerState) -> bool) -> Array {
        let mut found = Array::new();
        for (pool, state) in self.0.snapshot().pools.iter().enumerate() {
            for (at, worker) in state.workers.iter().enumerate() {
                if found.len() == MAX_ARRAY {
                    return found;
                }
                if wanted(state, worker) {
                    found.push(Dynamic::from(Worker {
                        shared: Arc::clone(&self.0),
                        pool,
                        at,
                    }));
                }
            }
        }
        found
    }
}

fn takes_work(pool: &PoolState) -> bool {
    pool.liveness == PoolLiveness::Online && !pool.draining
}

impl Job {
    fn get(&self) -> &QueuedJob {
        self.shared.job(self.at)
    }
}

impl ScriptPool {
    fn get(&self) -> &PoolState {
        self.shared.pool(self.at)
    }

    fn devices(&mut self) -> Array {
        let devices = self.get().devices.iter();
        devices
            .map(|device| {
                Dynamic::from(DeviceView {
                    shared: Arc::clone(&self.shared),
                    pool: self.at,
                    device: *device,
                })
            })
            .collect()
    }

    fn workers(&mut self) -> Array {
        let workers = 0..self.get().workers.len();
        workers
            .map(|at| {
                Dynamic::from(Worker {
                    shared: Arc::clone(&self.shared),
                    pool: self.at,
                    at,
                })
            })
            .collect()
    }
}

impl DeviceView {
    fn free_bytes(&self) -> u64 {
        self.shared
            .promised()
            .free_bytes(self.shared.snapshot(), self.pool, self.device.device)
    }
}

impl Worker {
    fn get(&self) -> &WorkerState {
        self.shared.worker(self.pool, self.at)
    }

    fn free_slots(&self) -> u32 {
        self.shared
            .promised()
            .free_slots(self.shared.snapshot(), self.pool, self.at)
    }

    fn free_tokens(&self) -> Option<u32> {
        self.shared
            .promised()
            .free_tokens(self.shared.snapshot(), self.pool, self.at)
    }

    fn idle_ms(&mut self) -> Dynamic {
        optional(self.get().idle_since.map(|at| self.shared.ms_since(at)))
    }
}

fn fits_worker(job: &Job, worker: &Worker) -> bool {
    let shared = &job.shared;
    shared
        .promised()
        .may_dispatch(shared.snapshot(), job.at, worker.pool, worker.at)
        .is_ok()
}

fn fits_device(job: &Job, device: &DeviceView) -> bool {
    let shared = &job.shared;
    let (pool, device) = (device.pool, device.device.device);
    shared
        .promised()
        .may_start_for(shared.snapshot(), pool, device, job.at)
        .is_ok()
}

/// Returns the worker that `least-loaded` would choose for the job, or `()`.
fn best_worker(ctx: &mut Ctx, job: Job) -> Dynamic {
    let snapshot = ctx.0.snapshot();
    let promised = ctx.0.promised();
    let model = &job.get().model;
    let mut best: Option<((Rank, &String, &String), usize, usize)> = None;
    for (pool, state) in snapshot.pools.iter().enumerate() {
        for (at, worker) in state.workers.iter().enumerate() {
            if worker.model != *model || promised.may_dispatch(snapshot, job.at, pool, at).is_err()
            {
                continue;
            }
            let taken = worker.slots - promised.free_slots(snapshot, pool, at);
            let now = WorkerState {
                active: taken,
                ..worker.clone()
            };
            let rank = LeastLoaded.rank_worker(&WorkerChoice {
                pool: state,
                worker: &now,
            });
            let key = (rank, &state.id, &worker.id);
            if best.as_ref().is_none_or(|(least, ..)| key < *least) {
                best = Some((key, pool, at));
            }
        }
    }
    optional(best.map(|(_, pool, at)| {
        Dynamic::from(Worker {
            shared: Arc::clone(&ctx.0),
            pool,
            at,
        })
    }))
}

/// Returns the device on which `least-loaded` would start a worker for the job, or `()`.
fn best_device(ctx: &mut Ctx, job: Job) -> Dynamic {
    let snapshot = ctx.0.snapshot();
    let promised = ctx.0.promised();
    let mut best: Option<((Rank, &String, Device), usize, DeviceState)> = None;
    for (pool, state) in snapshot.pools.iter().enumerate() {
        for device in &state.devices {
            let may = promised.may_start_for(snapshot, pool, device.device, job.at);
            if may.is_err() {
                continue;
            }
            let now = DeviceState {
                free_bytes: promised.free_bytes(snapshot, pool, device.device),
                ..*device
            };
            let rank = LeastLoaded.rank_start(&StartChoice {
                pool: state,
                device: now,
            });
            let key = (rank, &state.id, device.device);
            if best.as_ref().is_none_or(|(least, ..)| key < *least) {
                best = Some((key, pool, *device));
            }
        }
    }
    optional(best.map(|(_, pool, device)| {
        Dynamic::from(DeviceView {
            shared: Arc::clone(&ctx.0),
            pool,
            device,
        })
    }))
}

/// Creates an action, and reserves its place for the rest of the run. The action is validated when the script returns it; an
/// action that is not returned has no effect.
fn act(context: &NativeCallContext<'_>, shared: &Shared, proposal: Proposal) -> Act {
    let _ = shared.promised().take(shared.snapshot(), &proposal);
    Act {
        proposal,
        position: context.call_position(),
    }
}

fn dispatch(context: NativeCallContext<'_>, job: Job, worker: Worker) -> Act {
    let proposal = Proposal::Dispatch {
        job: job.at,
        pool: worker.pool,
        worker: worker.at,
    };
    act(&context, &job.shared, proposal)
}

fn start_for_job(context: NativeCallContext<'_>, device: DeviceView, job: Job) -> Act {
    let shared = &device.shared;
    let (pool, on) = (device.pool, device.device.device);
    let tokens = shared
        .promised()
        .start_context(shared.snapshot(), pool, on, job.at);
    start(&context, &device, job.get().model.clone(), tokens)
}

fn start_for_model(
    context: &NativeCallContext<'_>,
    device: &DeviceView,
    model: &str,
    tokens: Option<INT>,
) -> Result<Act, Box<rhai::EvalAltResult>> {
    let model = model
        .parse::<ModelRef>()
        .map_err(|error| format!("`{model}` is not a model reference: {error}"))?;
    let tokens = tokens
        .map(|tokens| {
            u32::try_from(tokens).map_err(|_| format!("{tokens} is not a valid number of tokens"))
        })
        .transpose()?;
    Ok(start(context, device, model, tokens))
}

fn start(
    context: &NativeCallContext<'_>,
    device: &DeviceView,
    model: ModelRef,
    context_length: Option<u32>,
) -> Act {
    let proposal = Proposal::StartWorker {
        pool: device.pool,
        device: device.device.device,
        model,
        context_length,
    };
    act(context, &device.shared, proposal)
}

fn evict(context: NativeCallContext<'_>, worker: Worker, job: Job) -> Act {
    let proposal = Proposal::EvictWorker {
        pool: worker.pool,
        worker: worker.at,
        needed_by: job.get().model.clone(),
    };
    act(&context, &worker.shared, proposal)
}

fn wait(context: &NativeCallContext<'_>, job: &Job, reason: &str, again: Option<INT>) -> Act {
    let proposal = Proposal::Wait {
        job: job.at,
        reason: tidy_reason(reason),
        again: again.map(SignedDuration::from_millis),
    };
    act(context, &job.shared, proposal)
}

/// Returns the workers that can serve jobs of the model, now or once a slot is free.
fn workers_with(ctx: &mut Ctx, model: &str) -> Array {
    let Ok(model) = model.parse::<ModelRef>() else {
        return Array::new();
    };
    ctx.workers_where(|pool, worker| takes_work(pool) && worker.serves() && worker.model == model)
}

fn starting(ctx: &mut Ctx, model: &str) -> INT {
    let Ok(model) = model.parse::<ModelRef>() else {
        return 0;
    };
    count(ctx.0.promised().starting(ctx.0.snapshot(), &model))
}

/// Returns the most free memory of any device of the pool, or the free memory of one device.
fn pool_free_bytes(pool: &ScriptPool, device: Option<Device>) -> INT {
    let promised = pool.shared.promised();
    let devices = pool.get().devices.iter().map(|state| state.device);
    let free = devices
        .filter(|of| device.is_none_or(|wanted| wanted == *of))
        .map(|of| promised.free_bytes(pool.shared.snapshot(), pool.at, of));
    int(free.max().unwrap_or(0))
}

pub(super) fn register(engine: &mut Engine) {
    engine
        .register_type_with_name::<Ctx>("Context")
        .register_get("now_ms", |ctx: &mut Ctx| {
            ctx.0.snapshot().now.as_millisecond()
        })
        .register_get("waiting", |ctx: &mut Ctx| {
            count(ctx.0.snapshot().jobs.len())
        })
        .register_get("jobs", Ctx::jobs)
        .register_get("pools", Ctx::pools)
        .register_get("workers", |ctx: &mut Ctx| ctx.workers_where(|_, _| true));

    engine
        .register_type_with_name::<Job>("Job")
        .register_get("id", |job: &mut Job| job.get().id.to_string())
        .register_get("model", |job: &mut Job| job.get().model.to_string())
        .register_get("priority", |job: &mut Job| {
            match job.get().priority {
                Priority::Interactive => "interactive",
                Priority::Batch => "batch",
            }
            .to_owned()
        })
        .register_get("session", |job: &mut Job| {
            optional(job.get().session_id.clone())
        })
        .register_get("age_ms", |job: &mut Job| {
            job.shared.ms_since(job.get().created_at)
        })
        .register_get("max_tokens", |job: &mut Job| {
            int(u64::from(job.get().max_tokens))
        })
        .register_get("request_bytes", |job: &mut Job| int(job.get().bytes))
        .register_get("context_needed", |job: &mut Job| {
            optional(job.get().context_needed.map(|tokens| int(tokens.into())))
        })
        .register_get("cache_needed", |job: &mut Job| {
            optional(job.get().cache_needed.map(|tokens| int(tokens.into())))
        })
        .register_get("pool", |job: &mut Job| {
            optional(job.get().placement.pool.clone())
        })
        .register_get("device", |job: &mut Job| {
            optional(job.get().placement.device.map(|device| device.to_string()))
        })
        .register_get("last_pool", |job: &mut Job| {
            let session = job.get().session_id.as_ref();
            let sessions = &job.shared.snapshot().sessions;
            optional(session.and_then(|session| sessions.get(session).cloned()))
        });

    engine
        .register_type_with_name::<ScriptPool>("Pool")
        .register_get("id", |pool: &mut ScriptPool| pool.get().id.clone())
        .register_get("online", |pool: &mut ScriptPool| takes_work(pool.get()))
        .register_get("cost", |pool: &mut ScriptPool| pool.shared.cost(pool.at))
        .register_get("devices", ScriptPool::devices)
        .register_get("workers", ScriptPool::workers)
        .register_get("models", |pool: &mut ScriptPool| -> Array {
            let models = pool.get().models.iter().take(MAX_ARRAY);
            models.map(|m| m.model.to_string().into()).collect()
        });

    engine
        .register_type_with_name::<DeviceView>("Device")
        .register_get("id", |device: &mut DeviceView| {
            device.device.device.to_string()
        })
        .register_get("pool", |device: &mut DeviceView| {
            device.shared.pool(device.pool).id.clone()
        })
        .register_get("cost", |device: &mut DeviceView| {
            device.shared.cost(device.pool)
        })
        .register_get("free_bytes", |device: &mut DeviceView| {
            int(device.free_bytes())
        })
        .register_get("total_bytes", |device: &mut DeviceView| {
            int(device.device.total_bytes)
        });

    engine
        .register_type_with_name::<Worker>("Worker")
        .register_get("id", |worker: &mut Worker| worker.get().id.clone())
        .register_get("pool", |worker: &mut Worker| {
            worker.shared.pool(worker.pool).id.clone()
        })
        .register_get("model", |worker: &mut Worker| {
            worker.get().model.to_string()
        })
        .register_get("device", |worker: &mut Worker| {
            worker.get().device.to_string()
        })
        .register_get("status", |worker: &mut Worker| {
            worker.get().status.to_string()
        })
        .register_get("context_length", |worker: &mut Worker| {
            optional(worker.get().context_length.map(|tokens| int(tokens.into())))
        })
        .register_get("slots", |worker: &mut Worker| {
            int(u64::from(worker.get().slots))
        })
        .register_get("free_slots", |worker: &mut Worker| {
            int(u64::from(worker.free_slots()))
        })
        .register_get("free_tokens", |worker: &mut Worker| {
            optional(worker.free_tokens().map(|tokens| int(tokens.into())))
        })
        .register_get("memory_bytes", |worker: &mut Worker| {
            int(worker.get().memory_bytes)
        })
        .register_get("idle_ms", Worker::idle_ms)
        .register_get("cost", |worker: &mut Worker| {
            worker.shared.cost(worker.pool)
        });

    engine
        .register_type_with_name::<Act>("Action")
        .register_fn("dispatch", dispatch)
        .register_fn("start_worker", start_for_job)
        .register_fn(
            "start_worker",
            |context: NativeCallContext<'_>, device: DeviceView, model: &str| {
                start_for_model(&context, &device, model, None)
            },
        )
        .register_fn(
            "start_worker",
            |context: NativeCallContext<'_>, device: DeviceView, model: &str, tokens: INT| {
                start_for_model(&context, &device, model, Some(tokens))
            },
        )
        .register_fn("evict_worker", evict)
        .register_fn("wait", |context: NativeCallContext<'_>, job: Job| {
            wait(&context, &job, "", None)
        })
        .register_fn(
            "wait",
            |context: NativeCallContext<'_>, job: Job, reason: &str| {
                wait(&context, &job, reason, None)
            },
        )
        .register_fn(
            "wait",
            |context: NativeCallContext<'_>, job: Job, reason: &str, again_ms: INT| {
                wait(&context, &job, reason, Some(again_ms))
            },
        );

    engine
        .register_fn("fits", |job: Job, worker: Worker| {
            fits_worker(&job, &worker)
        })
        .register_fn("fits", |job: Job, device: DeviceView| {
            fits_device(&job, &device)
        })
        .register_fn("can_evict", |worker: Worker, job: Job| {
            let shared = &worker.shared;
            let promised = shared.promised();
            let model = &job.get().model;
            promised
                .may_evict(shared.snapshot(), worker.pool, worker.at, model)
                .is_ok()
        })
        .register_fn("workers_with", workers_with)
        .register_fn("starting", starting)
        .register_fn("best_worker", best_worker)
        .register_fn("best_device", best_device)
        .register_fn("age_ms", |job: Job| {
            job.shared.ms_since(job.get().created_at)
        })
        .register_fn("cost", |pool: ScriptPool| pool.shared.cost(pool.at))
        .register_fn("cost", |worker: Worker| worker.shared.cost(worker.pool))
        .register_fn("cost", |device: DeviceView| device.shared.cost(device.pool))
        .register_fn("free_bytes", |pool: ScriptPool| {
            pool_free_bytes(&pool, None)
        })
        .register_fn("free_bytes", |pool: ScriptPool, device: &str| {
            device
                .parse::<Device>()
                .map_or(0, |device| pool_free_bytes(&pool, Some(device)))
        })
        .register_fn("free_bytes", |device: DeviceView| int(device.free_bytes()))
        .register_fn("needed_bytes", |device: DeviceView, job: Job| {
            let pool = device.shared.pool(device.pool);
            let needed = job.get().context_needed.unwrap_or(0);
            let size = pool
                .model(&job.get().model)
                .and_then(|model| model.cost().least(needed));
            optional(size.map(|size| int(size.bytes)))
        });
}
