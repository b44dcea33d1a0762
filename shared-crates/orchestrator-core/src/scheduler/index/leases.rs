//! Use of workers by the orchestrator's own leases.

use std::sync::Arc;

use jiff::{SignedDuration, Timestamp};

use super::{ClassJobs, Index};
use crate::scheduler::snapshot::WorkerUsage;
use crate::scheduler::wait_reason::WaitReason;

impl Index {
    /// Returns the use of these workers, which are all that the pool has now. Other workers of the pool stay recorded as long
    /// as they have leases.
    pub(super) fn usage_of<'a>(
        &mut self,
        place: usize,
        name: &str,
        workers: impl Iterator<Item = &'a str> + Clone,
    ) -> Vec<WorkerUsage> {
        let old = self.pools[place].as_ref();
        let mut away = self.away.remove(name).unwrap_or_default();
        if let Some(old) = old {
            if away.is_empty() && old.worker_names.iter().map(|n| &**n).eq(workers.clone()) {
                return old.usage.clone();
            }
            let known = old.worker_names.iter().zip(&old.usage);
            away.extend(known.map(|(worker, usage)| (worker.to_string(), *usage)));
        }
        let usage = workers.map(|worker| away.remove(worker).unwrap_or_default());
        let usage = usage.collect();
        away.retain(|_, usage| usage.active > 0);
        if !away.is_empty() {
            self.away.insert(name.to_owned(), away);
        }
        usage
    }

    pub(super) fn worker_place(&self, pool: &str, worker: &str) -> Option<(usize, usize)> {
        let place = self.pool_place(pool)?;
        let state = &self.pools[place].as_ref()?.state;
        let worker = state.workers.iter().position(|w| w.id == worker)?;
        Some((place, worker))
    }

    /// Changes the recorded use of a worker. Returns the new record, and the worker's indices if its pool lists it.
    fn change_usage(
        &mut self,
        pool: &str,
        worker: &str,
        change: impl FnOnce(&mut WorkerUsage),
    ) -> (WorkerUsage, Option<(usize, usize)>) {
        let found = self.worker_place(pool, worker);
        if let Some((place, worker)) = found
            && let Some(pool) = &mut self.pools[place]
        {
            change(&mut pool.usage[worker]);
            return (pool.usage[worker], found);
        }
        let away = self.away.entry(pool.to_owned()).or_default();
        let usage = away.entry(worker.to_owned()).or_default();
        change(usage);
        let usage = *usage;
        away.retain(|_, usage| usage.active > 0);
        if away.is_empty() {
            self.away.remove(pool);
        }
        (usage, None)
    }

    /// Records a lease that no pass gave: one from an earlier run of the orchestrator whose attempt is still running.
    pub fn lease(&mut self, pool: &str, worker: &str) {
        self.turns += 1;
        let turn = self.turns;
        let (usage, found) = self.change_usage(pool, worker, |usage| usage.take(turn));
        if let Some((place, worker)) = found {
            self.change_worker(place, worker, |state, _| state.apply(usage));
        }
    }

    /// Records the end of a lease. `answered` says whether the worker had answered the job.
    pub fn release(&mut self, pool: &str, worker: &str, answered: bool, now: Timestamp) {
        let (usage, found) = self.change_usage(pool, worker, |usage| {
            usage.active = usage.active.saturating_sub(1);
            usage.unanswered = usage.unanswered.saturating_sub(u32::from(!answered));
            usage.released_at = Some(now);
        });
        self.gained(pool, usage, found);
    }

    /// Records that the worker has taken a job of a pass. Returns whether others may have waited for that.
    pub fn answered(&mut self, pool: &str, worker: &str) -> bool {
        let (usage, found) = self.change_usage(pool, worker, |usage| {
            usage.unanswered = usage.unanswered.saturating_sub(1);
        });
        let Some((place, index)) = found else {
            return false;
        };
        let Some(known) = &mut self.pools[place] else {
            return false;
        };
        let awaited = known.state.workers[index].is_short();
        if awaited {
            self.gained(pool, usage, found);
        } else {
            Arc::make_mut(&mut known.state).workers[index].unanswered = usage.unanswered;
        }
        awaited
    }

    /// Applies the new record of a worker that has room for more jobs now, and marks for evaluation the classes that may gain.
    fn gained(&mut self, pool: &str, usage: WorkerUsage, found: Option<(usize, usize)>) {
        let Some((place, index)) = found else {
            return;
        };
        self.change_worker(place, index, |state, reported| {
            state.idle_since = reported;
            state.apply(usage);
        });
        let model = self.pools[place].as_ref().map(|p| p.worker_models[index]);
        let gains = |jobs: &ClassJobs| {
            jobs.class.admits_pool(pool)
                && (Some(jobs.model) == model || jobs.settled == Some(WaitReason::MemoryShort))
        };
        for class in self.classes_where(gains) {
            self.look_at(class, place);
        }
    }

    /// Records the run time of a job on the worker that completed it.
    pub fn completed(&mut self, pool: &str, worker: &str, took: SignedDuration) {
        let Some((place, worker)) = self.worker_place(pool, worker) else {
            return;
        };
        if let Some(pool) = &self.pools[place] {
            self.estimates
                .completed(&pool.state.workers[worker].model, took);
        }
    }
}
