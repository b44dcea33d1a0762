//! Passes: the order of evaluations, and changes due to time alone.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::Timestamp;

use super::{Index, PassOutcome};
use crate::job::JobErrorCode;
use crate::queue::TurnKey;
use crate::scheduler::explain::Chooser;
use crate::scheduler::judge::{Class, ClassDecision, alive};
use crate::scheduler::plan::{Action, Plan};
use crate::scheduler::wait_reason::WaitReason;

impl Index {
    /// Decides on the waiting jobs and the idle workers, and applies the decisions to the index.
    pub fn pass(&mut self, now: Timestamp) -> PassOutcome {
        let mut pass = PassOutcome::default();
        self.let_time_pass(now);
        let mut turns: BinaryHeap<Reverse<(TurnKey, usize)>> = BinaryHeap::new();
        let mut slots = 0;
        for class in std::mem::take(&mut self.dirty) {
            let jobs = self.class_mut(class);
            let (model, ready) = (jobs.model, jobs.ready.len());
            if let Some(next) = jobs.ready.first() {
                turns.push(Reverse((*next, class)));
                slots += ready.min(self.models[model].free_workers(0));
            }
        }
        pass.judged = !turns.is_empty();
        // An estimate of the number of dispatches, which avoids growing the lists while thousands of jobs are dispatched.
        pass.actions.reserve(slots);
        pass.jobs.reserve(slots);
        pass.why.reserve(slots);
        let mut emptied = Vec::new();
        let mut rejected: HashMap<usize, (JobErrorCode, String)> = HashMap::new();
        while let Some(&Reverse((key, class))) = turns.peek() {
            let Some(job) = self.line().get(key.3).cloned() else {
                turns.pop();
                continue;
            };
            if let Some((code, message)) = rejected.get(&class) {
                turns.pop();
                self.reject(&job, key, class, now, (*code, message), &mut pass);
                continue;
            }
            match self.judge(class, &job, key, now) {
                (ClassDecision::Dispatch { pool, worker }, _) => {
                    let chooser = Chooser::Policy(self.policy_name);
                    self.dispatch(&job, key, class, (pool, worker), chooser, &mut pass);
                    match self.class_mut(class).ready.first() {
                        // Replacing the top of the heap is cheaper than removing it first.
                        Some(next) => {
                            if let Some(mut turn) = turns.peek_mut() {
                                *turn = Reverse((*next, class));
                            }
                        }
                        None => {
                            turns.pop();
                            emptied.push(class);
                        }
                    }
                    self.call_up(key, &mut turns);
                }
                (ClassDecision::Reject { code, message }, _) => {
                    // The jobs of the class are rejected one by one, each at its own turn.
                    turns.pop();
                    let others = self.class_mut(class).ready.iter().copied();
                    turns.extend(
                        others
                            .filter(|other| *other != key)
                            .map(|k| Reverse((k, class))),
                    );
                    self.reject(&job, key, class, now, (code, &message), &mut pass);
                    rejected.insert(class, (code, message));
                    emptied.push(class);
                }
                (verdict, wake) => {
                    turns.pop();
                    self.settle(class, key, &verdict, wake);
                    let model = self.class_mut(class).class.model.clone();
                    self.take(&model, verdict, now, &mut pass);
                    self.call_up(key, &mut turns);
                }
            }
        }
        self.unload(now, &mut pass);
        for class in emptied {
            self.drop_if_empty(class);
        }
        pass.wake = self.next_wake(now);
        pass
    }

    /// Adds the classes due for evaluation to this pass if their turn comes after `key`. The others stay for the next pass.
    fn call_up(&mut self, key: TurnKey, turns: &mut BinaryHeap<Reverse<(TurnKey, usize)>>) {
        for class in std::mem::take(&mut self.dirty) {
            match self.class_mut(class).ready.first() {
                Some(next) if *next > key => turns.push(Reverse((*next, class))),
                Some(_) => _ = self.dirty.insert(class),
                None => {}
            }
        }
    }

    /// Promotes batch jobs that have waited long enough, in their classes as well as in the queue.
    pub(super) fn promote(&mut self, now: Timestamp) {
        for id in self.queue.promote(now) {
            let Some((key, class)) = self.place_of(id) else {
                continue;
            };
            let old = (true, key.1, key.2, key.3);
            let jobs = self.class_mut(class);
            if jobs.ready.remove(&old) {
                let model = jobs.model;
                self.make_ready(class, key);
                if self.models[model].short_of_cache > 0 {
                    self.keep_less(model);
                }
            }
        }
    }

    /// Applies a plan that a script or [`schedule`](super::schedule) made from an [`Index::snapshot`]. Actions
    /// that are no longer possible are skipped. The time of the next pass comes from the plan, not from the returned [`PassOutcome`].
    pub fn apply(&mut self, plan: &Plan, chooser: Chooser, now: Timestamp) -> PassOutcome {
        let mut pass = PassOutcome {
            judged: true,
            ..PassOutcome::default()
        };
        self.let_time_pass(now);
        for action in &plan.actions {
            self.apply_one(action, chooser, now, &mut pass);
        }
        for job in &pass.jobs {
            if let Some(&class) = self.class_ids.get(&Class::of(job)) {
                self.drop_if_empty(class);
            }
        }
        // The plan may have omitted an action that a pass would have taken, or stopped a worker that a class relied on.
        for class in self.classes_where(|_| true) {
            self.look_at_all(class);
            self.settle_as(class, plan);
        }
        pass
    }

    /// Records whether the class waits for room in caches according to the plan: then the explanations of later jobs say so.
    fn settle_as(&mut self, class: usize, plan: &Plan) {
        let jobs = self.class_mut(class);
        let settled = jobs.settled;
        let first = jobs.ready.first().and_then(|key| plan.waiting.get(&key.3));
        let is_short = first.is_some_and(|why| why.reason == WaitReason::CacheFull);
        match (is_short, settled == Some(WaitReason::CacheFull)) {
            (true, false) => self.set_settled(class, Some(WaitReason::CacheFull)),
            (false, true) => self.set_settled(class, None),
            _ => {}
        }
    }

    /// Applies an action. Returns `None` if the action is no longer possible.
    fn apply_one(
        &mut self,
        action: &Action,
        chooser: Chooser,
        now: Timestamp,
        pass: &mut PassOutcome,
    ) -> Option<()> {
        match action {
            Action::Dispatch { job, pool, worker } => {
                let (key, class) = self.place_of(*job)?;
                let job = Arc::clone(self.line().get(*job)?);
                let (place, worker) = self.worker_place(pool, worker)?;
                let state = &self.pools[place].as_ref()?.state;
                let alive = alive(state);
                let (wanted, state) = (Class::of(&job), &state.workers[worker]);
                let fits = alive
                    && wanted.admits_worker(pool, state)
                    && wanted.finds_place(state, job.cache_expected())
                    && !job.backs_off(now);
                let at = (place, worker);
                fits.then(|| self.dispatch(&job, key, class, at, chooser, pass))
            }
            Action::Reject { job, code, message } => {
                let (key, class) = self.place_of(*job)?;
                let job = Arc::clone(self.line().get(*job)?);
                self.reject(&job, key, class, now, (*code, message), pass);
                Some(())
            }
            Action::StartWorker {
                pool,
                model,
                device,
                context_length,
            } => {
                let place = self.pool_place(pool)?;
                let state = &self.pools[place].as_ref()?.state;
                let on = state.devices.iter().find(|d| d.device == *device)?;
                let needed = state.model(model)?.bytes(*context_length);
                let fits = alive(state) && needed <= on.free_bytes;
                let start = ClassDecision::Start {
                    pool: place,
                    device: *device,
                    context: *context_length,
                };
                fits.then(|| self.take(model, start, now, pass))
            }
            Action::EvictWorker {
                pool,
                worker,
                needed_by,
            } => {
                let (pool, worker) = self.idle_worker_place(pool, worker)?;
                let workers = vec![worker];
                self.take(needed_by, ClassDecision::Evict { pool, workers }, now, pass);
                Some(())
            }
            Action::UnloadWorker { pool, worker } => {
                let (place, index) = self.idle_worker_place(pool, worker)?;
                self.stop(place, &[index]);
                pass.actions.push(action.clone());
                Some(())
            }
            Action::Download { pool, model } => {
                let pool = self.pool_place(pool)?;
                self.take(model, ClassDecision::Download { pool }, now, pass);
                Some(())
            }
        }
    }

    /// Returns the indices of a worker that has no work.
    fn idle_worker_place(&self, pool: &str, worker: &str) -> Option<(usize, usize)> {
        let (place, index) = self.worker_place(pool, worker)?;
        let state = &self.pools[place].as_ref()?.state.workers[index];
        // A pool that has not yet seen the end of the lease still reports the worker as busy.
        let idle = state.serves() && state.active == 0;
        idle.then_some((place, index))
    }

    /// Applies the changes that are due to time alone.
    fn let_time_pass(&mut self, now: Timestamp) {
        self.promote(now);
        while let Some(&(at, id)) = self.later.first()
            && at <= now
        {
            self.later.pop_first();
            if let Some((key, class)) = self.place_of(id) {
                self.class_mut(class).later -= 1;
                self.make_ready(class, key);
            }
        }
        while let Some(&(at, class)) = self.wakes.first()
            && at <= now
        {
            self.wakes.pop_first();
            self.class_mut(class).wake = None;
            self.look_at_all(class);
        }
    }

    fn next_wake(&self, now: Timestamp) -> Option<Timestamp> {
        let unload = self.settings.idle_ttl.and_then(|ttl| {
            let due = |since: &Timestamp| since.checked_add(ttl).ok().filter(|at| *at > now);
            self.idle.iter().find_map(|(since, ..)| due(since))
        });
        let again = (!self.dirty.is_empty()).then_some(now);
        let later = self.later.first().map(|(at, _)| *at);
        let class = self.wakes.first().map(|(at, _)| *at);
        [unload, again, later, class].into_iter().flatten().min()
    }
}
