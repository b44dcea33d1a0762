//! Makes a plan from a snapshot: the plain way, which every faster one is measured against.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};
use serde::{Deserialize, Serialize};

use super::REGISTRATION;
use super::explain::{self, Explanation, WaitReason};
use super::judge::{Class, Held, Verdict, Wish, World, alive, judge, next_spare, startable};
use super::policy::Policy;
use super::snapshot::{DownloadState, PoolState, Snapshot, WorkerState};
use crate::job::{JobErrorCode, JobId};
use crate::queue::QueuedJob;

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
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
        /// Requested tokens of context; absent for the pool's default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        context_length: Option<u32>,
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

/// Outcome of a class for the rest of a pass.
struct Settled {
    /// Code and message of the rejection of its jobs; `None` if they wait.
    rejection: Option<(JobErrorCode, String)>,
    /// Number of classes with an earlier turn that workers are kept for.
    held: usize,
}

/// Decides what to do with the waiting jobs and the idle workers.
pub fn schedule(snapshot: &Snapshot, policy: &dyn Policy) -> Plan {
    let classes: HashSet<Class> = snapshot.jobs.iter().map(|job| Class::of(job)).collect();
    let needed = |pool: &str, worker: &WorkerState| {
        classes
            .iter()
            .any(|class| class.admits_worker(pool, worker))
    };
    let world = World {
        now: snapshot.now,
        settings: &snapshot.settings,
        policy,
        sizes: &snapshot.sizes,
        needed: &needed,
        held: Held::default(),
    };
    let mut pass = Pass {
        snapshot,
        pools: snapshot.pools.clone(),
        sessions: HashMap::new(),
        turns: snapshot.turns,
        actions: Vec::new(),
        wake: None,
    };
    let mut waiting: Vec<(&QueuedJob, Class)> = Vec::new();
    // A class that has to wait, or can't run at all, does so for the rest of the pass: within one, places are only taken.
    let mut settled: HashMap<Class, Settled> = HashMap::new();
    let mut held: Vec<Class> = Vec::new();
    for job in &snapshot.jobs {
        let class = Class::of(job);
        if job.backs_off(snapshot.now) {
            pass.wake_at(job.not_before);
            waiting.push((job, class));
            continue;
        }
        if !settled.contains_key(&class) {
            let before = held.len();
            let kept: Vec<&Class> = held.iter().collect();
            let world = World {
                held: Held(&kept),
                ..world
            };
            let rejection = match pass.judge(&class, job, &world) {
                Verdict::Dispatch { pool, worker } => {
                    pass.dispatch(job, pool, worker);
                    continue;
                }
                Verdict::Reject { code, message } => Some((code, message)),
                verdict => {
                    pass.take(&class, &verdict, &world);
                    if verdict == Verdict::Wait(WaitReason::CacheFull) {
                        held.push(class.clone());
                    }
                    None
                }
            };
            let settling = Settled {
                rejection,
                held: before,
            };
            settled.insert(class.clone(), settling);
        }
        match &settled[&class].rejection {
            Some(_) if awaits_pools(job, snapshot.now, snapshot.started_at) => {
                pass.wake_at(snapshot.started_at.checked_add(REGISTRATION).ok());
                waiting.push((job, class));
            }
            Some((code, message)) => pass.actions.push(Action::Reject {
                job: job.id,
                code: *code,
                message: message.clone(),
            }),
            None => waiting.push((job, class)),
        }
    }
    pass.unload(&world);

    // What is explained is what is left when all is done.
    let classes: HashSet<&Class> = waiting.iter().map(|(_, class)| class).collect();
    let still_needed = |pool: &str, worker: &WorkerState| {
        classes
            .iter()
            .any(|class| class.admits_worker(pool, worker))
    };
    let world = World {
        needed: &still_needed,
        ..world
    };
    let pools: Vec<&PoolState> = pass.pools.iter().map(Arc::as_ref).collect();
    let mut explained: HashMap<Class, Arc<Explanation>> = HashMap::new();
    let waiting = waiting.iter().map(|(job, class)| {
        let explanation = if job.backs_off(snapshot.now) {
            Arc::new(explain::backing_off(job, snapshot.now))
        } else {
            let kept = settled.get(class).map_or(0, |settled| settled.held);
            let kept: Vec<&Class> = held[..kept].iter().collect();
            let world = World {
                held: Held(&kept),
                ..world
            };
            let explain = || Arc::new(explain::explain(class, &pools, &world));
            Arc::clone(explained.entry(class.clone()).or_insert_with(explain))
        };
        (job.id, explanation)
    });
    Plan {
        waiting: waiting.collect(),
        actions: pass.actions,
        wake: pass.wake,
    }
}

/// The pools as a pass changes them.
struct Pass<'a> {
    snapshot: &'a Snapshot,
    pools: Vec<Arc<PoolState>>,
    /// Where sessions ran in this pass.
    sessions: HashMap<&'a str, String>,
    turns: u64,
    actions: Vec<Action>,
    wake: Option<Timestamp>,
}

impl<'a> Pass<'a> {
    fn wake_at(&mut self, at: Option<Timestamp>) {
        self.wake = self.wake.into_iter().chain(at).min();
    }

    fn judge(&self, class: &Class, job: &QueuedJob, world: &World<'_>) -> Verdict {
        let session = job.session_id.as_deref();
        let prefer = session.and_then(|session| {
            let known = self.snapshot.sessions.get(session);
            self.sessions.get(session).or(known).map(String::as_str)
        });
        let pools: Vec<&PoolState> = self.pools.iter().map(Arc::as_ref).collect();
        judge(class, &Wish::of(job, prefer), &pools, world)
    }

    fn dispatch(&mut self, job: &'a QueuedJob, pool: usize, worker: usize) {
        self.turns += 1;
        let pool = Arc::make_mut(&mut self.pools[pool]);
        let worker = &mut pool.workers[worker];
        worker.take_slot(self.turns, job.cache_tokens());
        if let Some(session) = &job.session_id {
            self.sessions.insert(session, pool.id.clone());
        }
        self.actions.push(Action::Dispatch {
            job: job.id,
            pool: pool.id.clone(),
            worker: worker.id.clone(),
        });
    }

    /// Does what a verdict says that is not about one job.
    fn take(&mut self, class: &Class, verdict: &Verdict, world: &World<'_>) {
        match verdict {
            Verdict::Start {
                pool,
                device,
                context,
            } => {
                self.turns += 1;
                let pool = Arc::make_mut(&mut self.pools[*pool]);
                let now = self.snapshot.now;
                pool.reserve_start(&class.model, *device, *context, now, self.turns);
                self.actions.push(Action::StartWorker {
                    pool: pool.id.clone(),
                    model: class.model.clone(),
                    device: *device,
                    context_length: *context,
                });
            }
            Verdict::Evict { pool, workers } => {
                let pool = Arc::make_mut(&mut self.pools[*pool]);
                for &worker in workers {
                    pool.workers[worker].status = WorkerStatus::Draining;
                    self.actions.push(Action::EvictWorker {
                        pool: pool.id.clone(),
                        worker: pool.workers[worker].id.clone(),
                        needed_by: class.model.clone(),
                    });
                }
            }
            Verdict::Download { pool } => {
                let pool = Arc::make_mut(&mut self.pools[*pool]);
                let size = world.sizes.get(&class.model).copied();
                pool.reserve_download(&class.model, size.unwrap_or_default());
                self.actions.push(Action::Download {
                    pool: pool.id.clone(),
                    model: class.model.clone(),
                });
            }
            Verdict::Wait(WaitReason::MemoryShort) if world.settings.evict => {
                let with_file = self
                    .pools
                    .iter()
                    .filter(|pool| class.admits_pool(&pool.id) && alive(pool))
                    .filter(|pool| startable(class, pool).is_some());
                let soonest = with_file
                    .flat_map(|pool| pool.devices.iter().map(move |d| (pool, d.device)))
                    .filter(|(_, device)| class.admits_device(*device))
                    .filter_map(|(pool, device)| next_spare(world, pool, device))
                    .min();
                self.wake_at(soonest);
            }
            _ => {}
        }
    }

    /// Stops what has been idle for too long.
    fn unload(&mut self, world: &World<'_>) {
        let Some(ttl) = world.settings.idle_ttl else {
            return;
        };
        for index in 0..self.pools.len() {
            for worker in 0..self.pools[index].workers.len() {
                let pool = &self.pools[index];
                let Some(due) = idle_until(&pool.workers[worker], ttl) else {
                    continue;
                };
                if !alive(pool) || (world.needed)(&pool.id, &pool.workers[worker]) {
                    continue;
                }
                if due > world.now {
                    self.wake_at(Some(due));
                    continue;
                }
                let pool = Arc::make_mut(&mut self.pools[index]);
                pool.workers[worker].status = WorkerStatus::Draining;
                self.actions.push(Action::UnloadWorker {
                    pool: pool.id.clone(),
                    worker: pool.workers[worker].id.clone(),
                });
            }
        }
    }
}

/// When a worker has been idle for `ttl`, while it is.
pub(super) fn idle_until(worker: &WorkerState, ttl: jiff::SignedDuration) -> Option<Timestamp> {
    let idle = worker.status == WorkerStatus::Ready && worker.active == 0;
    worker
        .idle_since
        .filter(|_| idle)
        .and_then(|since| since.checked_add(ttl).ok())
}

/// Whether the job is of before a restart, and pools that could do it may not have registered since.
pub(super) fn awaits_pools(job: &QueuedJob, now: Timestamp, started_at: Timestamp) -> bool {
    job.created_at < started_at && now.duration_since(started_at) < REGISTRATION
}

impl PoolState {
    /// Takes the memory of a worker that is about to be started, so that a later job of the pass does not count on it,
    /// and shows the worker as starting, so that a job of another placement does not start a second one.
    pub(super) fn reserve_start(
        &mut self,
        model: &ModelRef,
        device: Device,
        context_length: Option<u32>,
        now: Timestamp,
        turn: u64,
    ) {
        self.last_start = turn;
        let Some(found) = self.model(model).cloned() else {
            return;
        };
        if let Some(state) = self.devices.iter_mut().find(|d| d.device == device) {
            let needed = found.bytes(context_length);
            state.free_bytes = state.free_bytes.saturating_sub(needed);
        }
        self.workers
            .push(WorkerState::asked_for(&found, device, context_length, now));
    }

    /// Takes the room of a download that is about to begin.
    pub(super) fn reserve_download(&mut self, model: &ModelRef, size: u64) {
        self.disk_free_bytes = self.disk_free_bytes.saturating_sub(size);
        self.downloads.push(DownloadState {
            model: model.clone(),
            percent: None,
        });
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
