//! Makes a plan.

use std::collections::HashMap;
use std::sync::Arc;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};
use serde::{Deserialize, Serialize};

use super::REGISTRATION;
use super::explain::{Explanation, Filter, FilterCount, WaitReason};
use super::policy::{Policy, StartChoice, WorkerChoice};
use super::snapshot::{PoolState, Snapshot, WorkerState};
use crate::job::{JobErrorCode, JobId, Placement};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case")]
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
    /// Stop an idle worker, because a waiting job needs its memory.
    EvictWorker {
        /// The pool.
        pool: String,
        /// The worker.
        worker: String,
        /// The model that the memory is for.
        needed_by: ModelRef,
    },
    /// Stop a worker that has been idle for too long.
    UnloadWorker {
        /// The pool.
        pool: String,
        /// The worker.
        worker: String,
    },
    /// Let a pool download a model.
    Download {
        /// The pool.
        pool: String,
        /// The model.
        model: ModelRef,
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

/// What a pass decided.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// Why each of the other jobs waits. Jobs that wait for the same share one explanation.
    pub waiting: HashMap<JobId, Arc<Explanation>>,
    /// When time alone makes the next plan another one, if nothing else happens before.
    pub wake: Option<Timestamp>,
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
    let mut pools: Vec<PoolState> = snapshot
        .pools
        .iter()
        .map(|pool| PoolState::clone(pool))
        .collect();
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
                reserve(&mut pools[pool], &job.model, device, snapshot.now);
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
fn reserve(pool: &mut PoolState, model: &ModelRef, device: Device, now: Timestamp) {
    let Some(found) = pool.model(model).cloned() else {
        return;
    };
    if let Some(state) = pool.devices.iter_mut().find(|d| d.device == device) {
        state.free_bytes = state.free_bytes.saturating_sub(found.needed_bytes);
    }
    pool.workers
        .push(WorkerState::asked_for(&found, device, now));
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
    let best = free_workers.iter().min_by_key(|&place| {
        let choice = as_choice(place);
        (
            policy.rank_worker(&choice),
            &choice.pool.id,
            &choice.worker.id,
        )
    });
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
    match starts.into_iter().min_by_key(|(_, choice)| {
        (
            policy.rank_start(choice),
            &choice.pool.id,
            choice.device.device,
        )
    }) {
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
#[path = "plan_tests.rs"]
mod tests;
