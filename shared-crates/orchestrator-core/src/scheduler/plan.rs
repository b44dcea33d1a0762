//! The reference implementation of a pass, against which the incremental one is tested.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};
use serde::{Deserialize, Serialize};

use super::REGISTRATION;
use super::explain::{self, Explanation};
use super::judge::{Class, ClassDecision, Held, Wish, World, alive, judge};
use super::policy::Policy;
use super::snapshot::{DownloadState, PoolState, Snapshot, WorkerState};
use super::wait_reason::WaitReason;
use crate::job::{JobErrorCode, JobId};
use crate::queue::QueuedJob;

/// An action of the scheduler.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "openapi", derive(utoipa::ToSchema))]
#[serde(tag = "action", rename_all = "snake_case")]
pub enum Action {
    /// Lease the job to the worker.
    Dispatch {
        /// Id of the job.
        job: JobId,
        /// Name of the worker's pool.
        pool: String,
        /// Id of the worker on its pool.
        worker: String,
    },
    /// Start a worker.
    StartWorker {
        /// Name of the pool.
        pool: String,
        /// Model that the worker loads.
        model: ModelRef,
        /// Device that the worker computes on.
        device: Device,
        /// Requested tokens of context; absent for the pool's default.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        context_length: Option<u32>,
    },
    /// Stop an idle worker, because a waiting job needs its memory.
    EvictWorker {
        /// Name of the worker's pool.
        pool: String,
        /// Id of the worker on its pool.
        worker: String,
        /// Model that needs the memory.
        needed_by: ModelRef,
    },
    /// Stop a worker that has been idle for too long.
    UnloadWorker {
        /// Name of the worker's pool.
        pool: String,
        /// Id of the worker on its pool.
        worker: String,
    },
    /// Let a pool download a model.
    Download {
        /// Name of the pool.
        pool: String,
        /// Model to download.
        model: ModelRef,
    },
    /// End a job that no pool can ever run.
    Reject {
        /// Id of the job.
        job: JobId,
        /// Error code with which the job ends.
        code: JobErrorCode,
        /// Description of the error, for people.
        message: String,
    },
}

/// Result of a pass.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Actions to take, in order.
    pub actions: Vec<Action>,
    /// Explanations of the jobs that keep waiting. Jobs that wait for the same reason share one.
    pub waiting: HashMap<JobId, Arc<Explanation>>,
    /// Time from which the plan may change without any other event; `None` if time alone changes nothing.
    pub wake: Option<Timestamp>,
}

/// Decision on a class, which holds for the rest of a pass.
struct Settled {
    /// Code and message of the rejection of its jobs; `None` if they wait.
    rejection: Option<(JobErrorCode, String)>,
    /// Number of classes with an earlier turn for which workers are reserved.
    held: usize,
}

/// Plans dispatches, worker starts and stops, downloads and rejections for the waiting jobs and the idle workers.
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
    let mut pass = PlanBuilder {
        snapshot,
        pools: snapshot.pools.clone(),
        sessions: HashMap::new(),
        turns: snapshot.turns,
        actions: Vec::new(),
        wake: None,
    };
    let mut waiting: Vec<(&QueuedJob, Class)> = Vec::new();
    // A class that has to wait, or can't run at all, does so for the rest of the pass, because places are only taken within
    // one.
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
            let (verdict, wake) = pass.judge(&class, job, &world);
            pass.wake_at(wake);
            let rejection = match verdict {
                ClassDecision::Dispatch { pool, worker } => {
                    pass.dispatch(job, pool, worker);
                    continue;
                }
                ClassDecision::Reject { code, message } => Some((code, message)),
                verdict => {
                    pass.take(&class, &verdict, &world);
                    if verdict == ClassDecision::Wait(WaitReason::CacheFull) {
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

    // Explanations describe the state after all actions of the pass.
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

/// State of the pools, changed by the actions of a pass.
struct PlanBuilder<'a> {
    snapshot: &'a Snapshot,
    pools: Vec<Arc<PoolState>>,
    /// Pool of each session that got a place in this pass.
    sessions: HashMap<&'a str, String>,
    turns: u64,
    actions: Vec<Action>,
    wake: Option<Timestamp>,
}

impl<'a> PlanBuilder<'a> {
    fn wake_at(&mut self, at: Option<Timestamp>) {
        self.wake = self.wake.into_iter().chain(at).min();
    }

    fn judge(
        &self,
        class: &Class,
        job: &QueuedJob,
        world: &World<'_>,
    ) -> (ClassDecision, Option<Timestamp>) {
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
        worker.take_slot(self.turns, job.cache_expected());
        if let Some(session) = &job.session_id {
            self.sessions.insert(session, pool.id.clone());
        }
        self.actions.push(Action::Dispatch {
            job: job.id,
            pool: pool.id.clone(),
            worker: worker.id.clone(),
        });
    }

    /// Carries out a verdict that concerns the whole class, not just one job.
    fn take(&mut self, class: &Class, verdict: &ClassDecision, world: &World<'_>) {
        match verdict {
            ClassDecision::Start {
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
            ClassDecision::Evict { pool, workers } => {
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
            ClassDecision::Download { pool } => {
                let pool = Arc::make_mut(&mut self.pools[*pool]);
                let size = world.sizes.get(&class.model).copied();
                pool.reserve_download(&class.model, size.unwrap_or_default());
                self.actions.push(Action::Download {
                    pool: pool.id.clone(),
                    model: class.model.clone(),
                });
            }
            _ => {}
        }
    }

    /// Stops workers that have been idle for longer than `idle_ttl`.
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

/// Returns the time at which the worker's idle time reaches `ttl`; `None` while the worker is not idle.
pub(super) fn idle_until(worker: &WorkerState, ttl: jiff::SignedDuration) -> Option<Timestamp> {
    let idle = worker.status == WorkerStatus::Ready && worker.active == 0;
    worker
        .idle_since
        .filter(|_| idle)
        .and_then(|since| since.checked_add(ttl).ok())
}

/// Returns whether the job was stored before a restart, and the pools that could run it may not have registered since.
pub(super) fn awaits_pools(job: &QueuedJob, now: Timestamp, started_at: Timestamp) -> bool {
    job.created_at < started_at && now.duration_since(started_at) < REGISTRATION
}

impl PoolState {
    /// Reserves the memory of a worker that is about to be started, so that a later job of the pass does not count on it. Adds
    /// the worker as starting, so that a job with another placement does not start a second one.
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

    /// Reserves the disk space of a download that is about to begin.
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
