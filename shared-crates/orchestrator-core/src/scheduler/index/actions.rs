//! Application of a pass's decisions to the index.

use std::sync::Arc;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::worker::WorkerStatus;

use super::{ClassJobs, Index, PassOutcome, Scope};
use crate::job::JobErrorCode;
use crate::queue::{QueuedJob, TurnKey};
use crate::scheduler::REGISTRATION;
use crate::scheduler::explain::{Chooser, Why};
use crate::scheduler::judge::{ClassDecision, Held};
use crate::scheduler::plan::{Action, awaits_pools};
use crate::scheduler::policy::WorkerChoice;
use crate::scheduler::wait_reason::WaitReason;

/// Most sessions whose latest pool is remembered. Beyond that, the older half is dropped.
const SESSIONS: usize = 10_000;

impl Index {
    /// Records the reason that a class waits, after its evaluation.
    pub(super) fn settle(
        &mut self,
        class: usize,
        key: TurnKey,
        verdict: &ClassDecision,
        wake: Option<Timestamp>,
    ) {
        let found = match verdict {
            ClassDecision::Start { .. } => WaitReason::WorkerStarting,
            ClassDecision::Evict { .. } => WaitReason::Evicting,
            ClassDecision::Download { .. } => WaitReason::Downloading,
            ClassDecision::Wait(reason) => *reason,
            _ => return,
        };
        let jobs = self.class_mut(class);
        // An evaluation of a few pools finds their limits, but not those of all the other pools.
        let partial = matches!(jobs.scope, Scope::Pools(_));
        let lacks = matches!(
            found,
            WaitReason::NoPool | WaitReason::PoolsAway | WaitReason::NoBackend
        );
        let reason = if partial && lacks {
            jobs.settled
        } else {
            Some(found)
        };
        self.set_settled(class, reason);
        let held = !self.held(class, key).is_empty();
        let jobs = self.class_mut(class);
        jobs.held = held;
        jobs.scope = Scope::Nothing;
        let (old, new) = (jobs.wake, jobs.wake.into_iter().chain(wake).min());
        jobs.wake = new;
        if let Some(at) = old {
            self.wakes.remove(&(at, class));
        }
        if let Some(at) = new {
            self.wakes.insert((at, class));
        }
    }

    pub(super) fn dispatch(
        &mut self,
        job: &Arc<QueuedJob>,
        key: TurnKey,
        class: usize,
        (place, worker): (usize, usize),
        chooser: Chooser,
        pass: &mut PassOutcome,
    ) {
        let Some(why) = self.why(class, job, (place, worker), chooser) else {
            return;
        };
        self.queue.take(job.id);
        self.leave(job, key, class);
        self.turns += 1;
        let turn = self.turns;
        let tokens = job.cache_expected();
        self.change_worker(place, worker, |state, _| state.take_slot(turn, tokens));
        let Some(state) = &mut self.pools[place] else {
            return;
        };
        let usage = &mut state.usage[worker];
        usage.take(turn);
        usage.unanswered += 1;
        let action = Action::Dispatch {
            job: job.id,
            pool: state.state.id.clone(),
            worker: state.state.workers[worker].id.clone(),
        };
        let pool = Arc::clone(&state.name);
        if let Some(session) = &job.session_id {
            self.remember_session(session, pool, turn);
        }
        pass.jobs.push(Arc::clone(job));
        pass.why.push(why);
        pass.actions.push(action);
    }

    /// Returns the reason for dispatching the job to this worker.
    fn why(
        &self,
        class: usize,
        job: &QueuedJob,
        (place, worker): (usize, usize),
        chooser: Chooser,
    ) -> Option<Why> {
        let (jobs, pool) = (self.classes[class].as_ref()?, self.pools[place].as_ref()?);
        let choice = WorkerChoice {
            pool: &pool.state,
            worker: &pool.state.workers[worker],
        };
        let session_was_here = self.prefers(job) == Some(pool.state.id.as_str());
        let free_workers = self.models[jobs.model].free_workers(jobs.class.context);
        Some(Why::new(
            job,
            &choice,
            chooser,
            session_was_here,
            free_workers,
        ))
    }

    fn remember_session(&mut self, session: &str, pool: Arc<str>, turn: u64) {
        if let Some(known) = self.sessions.get_mut(session) {
            *known = (pool, turn);
            return;
        }
        self.sessions.insert(session.to_owned(), (pool, turn));
        if self.sessions.len() > SESSIONS {
            let mut turns: Vec<u64> = self.sessions.values().map(|(_, turn)| *turn).collect();
            let (_, middle, _) = turns.select_nth_unstable(SESSIONS / 2);
            let middle = *middle;
            self.sessions.retain(|_, (_, turn)| *turn > middle);
        }
    }

    /// Rejects a job, unless a pool that could run it may still register after a restart.
    pub(super) fn reject(
        &mut self,
        job: &Arc<QueuedJob>,
        key: TurnKey,
        class: usize,
        now: Timestamp,
        why: (JobErrorCode, &str),
        pass: &mut PassOutcome,
    ) {
        if awaits_pools(job, now, self.started_at) {
            let wake = self.started_at.checked_add(REGISTRATION).ok();
            self.settle(
                class,
                key,
                &ClassDecision::Wait(WaitReason::PoolsAway),
                wake,
            );
            // Only jobs from before the restart wait for pools. A new job of the class must be evaluated.
            self.class_mut(class).scope = Scope::All;
            return;
        }
        self.queue.take(job.id);
        self.leave(job, key, class);
        pass.actions.push(Action::Reject {
            job: job.id,
            code: why.0,
            message: why.1.to_owned(),
        });
        pass.jobs.push(Arc::clone(job));
    }

    /// Carries out a verdict that concerns the whole class, not just one job.
    pub(super) fn take(
        &mut self,
        model: &ModelRef,
        verdict: ClassDecision,
        now: Timestamp,
        pass: &mut PassOutcome,
    ) {
        let model = model.clone();
        let name = |index: &Self, place: usize| {
            let pool = index.pools[place].as_ref();
            pool.map(|pool| pool.state.id.clone()).unwrap_or_default()
        };
        match verdict {
            ClassDecision::Start {
                pool,
                device,
                context,
            } => {
                self.turns += 1;
                let turn = self.turns;
                self.change_pool(pool, |state| {
                    state.reserve_start(&model, device, context, now, turn);
                });
                // If a start was refused, or waits for workers to end, there may now be too little memory for it, so that other
                // workers must be evicted. A class that waits for room in a cache may now wait for this worker instead.
                let is_affected = |jobs: &ClassJobs| match jobs.settled {
                    Some(WaitReason::StartRefused | WaitReason::Evicting) => true,
                    Some(WaitReason::CacheFull) => jobs.class.model == model,
                    _ => false,
                };
                for class in self.classes_where(is_affected) {
                    self.look_at_all(class);
                }
                let pool = name(self, pool);
                self.last_starts.insert(pool.clone(), turn);
                pass.actions.push(Action::StartWorker {
                    pool,
                    model,
                    device,
                    context_length: context,
                });
            }
            ClassDecision::Evict { pool, workers } => {
                // Classes that relied on one of these workers may have to start another, on any pool.
                for class in self.classes_that_could_use(pool, &workers) {
                    self.look_at_all(class);
                }
                let stopped = self.stop(pool, &workers);
                let pool = name(self, pool);
                pass.actions
                    .extend(stopped.into_iter().map(|worker| Action::EvictWorker {
                        pool: pool.clone(),
                        worker,
                        needed_by: model.clone(),
                    }));
            }
            ClassDecision::Download { pool } => {
                let size = self.sizes.get(&model).copied().unwrap_or_default();
                self.change_pool(pool, |state| state.reserve_download(&model, size));
                let pool = name(self, pool);
                pass.actions.push(Action::Download { pool, model });
            }
            _ => {}
        }
    }

    /// Returns the classes that could use one of the workers.
    fn classes_that_could_use(&self, place: usize, workers: &[usize]) -> Vec<usize> {
        let Some(pool) = &self.pools[place] else {
            return Vec::new();
        };
        self.classes_where(|jobs| {
            let mut workers = workers.iter().map(|&worker| &pool.state.workers[worker]);
            workers.any(|worker| jobs.class.admits_worker(&pool.state.id, worker))
        })
    }

    /// Marks workers as draining, and returns their ids.
    pub(super) fn stop(&mut self, place: usize, workers: &[usize]) -> Vec<String> {
        let mut names = Vec::with_capacity(workers.len());
        self.change_pool(place, |state| {
            for &worker in workers {
                state.workers[worker].status = WorkerStatus::Draining;
                names.push(state.workers[worker].id.clone());
            }
        });
        names
    }

    /// Stops workers that have been idle for longer than `idle_ttl`.
    pub(super) fn unload(&mut self, now: Timestamp, pass: &mut PassOutcome) {
        let Some(ttl) = self.settings.idle_ttl else {
            return;
        };
        let due = |since: &Timestamp| since.checked_add(ttl).is_ok_and(|at| at <= now);
        let mut due: Vec<(String, usize, usize)> = self.with_world(now, Held::default(), |world| {
            let due = self.idle.iter().take_while(|(since, ..)| due(since));
            let spare = due.filter_map(|&(_, place, worker)| {
                let state = &self.pools[place].as_ref()?.state;
                let needed = (world.needed)(&state.id, &state.workers[worker]);
                (!needed).then(|| (state.id.clone(), worker, place))
            });
            spare.collect()
        });
        due.sort_unstable();
        for (pool, worker, place) in due {
            for worker in self.stop(place, &[worker]) {
                let pool = pool.clone();
                pass.actions.push(Action::UnloadWorker { pool, worker });
            }
        }
    }
}
