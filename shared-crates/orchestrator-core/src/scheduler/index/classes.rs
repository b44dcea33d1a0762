//! Jobs and their classes, and which of them a pass has to evaluate.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{ClassJobs, Index, Scope};
use crate::job::JobId;
use crate::queue::{Load, QueuedJob, TurnKey};
use crate::scheduler::judge::Class;
use crate::scheduler::wait_reason::WaitReason;

/// Number of changed pools up to which a class is evaluated against these only. Beyond that, all pools are considered.
const FEW_POOLS: usize = 16;

impl Index {
    /// Adds a job to the queue and to its class.
    pub fn put(&mut self, job: QueuedJob) {
        self.remove(job.id);
        let job = self.queue.put_back(job);
        let class = self.class_for(&job);
        let Some(key) = self.line().key(job.id) else {
            return;
        };
        self.count_in(class, job.bytes);
        let jobs = self.class_mut(class);
        if let Some(at) = job.not_before {
            jobs.later += 1;
            self.later.insert((at, job.id));
        } else {
            self.make_ready(class, key);
        }
    }

    /// Adds a job of the class to those whose turn may come.
    pub(super) fn make_ready(&mut self, class: usize, key: TurnKey) {
        let jobs = self.class_mut(class);
        jobs.ready.insert(key);
        let (model, held) = (jobs.model, jobs.held);
        let is_first = jobs.ready.first() == Some(&key);
        // Workers reserved from the other jobs of the class may not be reserved from this earlier one, and those that have jobs
        // to answer may surely have room for it.
        if is_first && (held || self.models[model].short > 0) {
            self.look_at_all(class);
        }
        self.look_again(class);
    }

    /// Removes a job that needs no turn any more.
    pub fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        let (key, class) = self.place_of(id)?;
        let job = self.queue.remove(id)?;
        self.leave(&job, key, class);
        let model = self.class_mut(class).model;
        // The next job of the class may be smaller than this one.
        if self.models[model].short > 0 {
            self.look_at_all(class);
        }
        self.drop_if_empty(class);
        Some(job)
    }

    pub(super) fn place_of(&self, id: JobId) -> Option<(TurnKey, usize)> {
        let job = self.line().get(id)?;
        let class = *self.class_ids.get(&Class::of(job))?;
        Some((self.line().key(id)?, class))
    }

    /// Removes a job that has left the queue from its class.
    pub(super) fn leave(&mut self, job: &QueuedJob, key: TurnKey, class: usize) {
        self.count_out(class, job.bytes);
        let jobs = self.class_mut(class);
        // Most jobs leave because their turn has come.
        if jobs.ready.first() == Some(&key) {
            jobs.ready.pop_first();
            if jobs.settled == Some(WaitReason::CacheFull) {
                let model = jobs.model;
                self.keep_less(model);
            }
            return;
        }
        if jobs.ready.remove(&key) {
            return;
        }
        jobs.later -= 1;
        if let Some(at) = job.not_before {
            self.later.remove(&(at, job.id));
        }
    }

    pub(super) fn class_mut(&mut self, class: usize) -> &mut ClassJobs {
        self.classes[class]
            .as_mut()
            .expect("classes are dropped only when no job refers to them")
    }

    fn class_for(&mut self, job: &QueuedJob) -> usize {
        let class = Class::of(job);
        if let Some(&known) = self.class_ids.get(&class) {
            return known;
        }
        let model = self.model_id(&class.model);
        let id = self.classes.iter().position(Option::is_none);
        let id = id.unwrap_or_else(|| {
            self.classes.push(None);
            self.classes.len() - 1
        });
        self.models[model].classes.insert((class.context, id));
        let stranded = !self.can_run(&class);
        self.class_ids.insert(class.clone(), id);
        self.classes[id] = Some(ClassJobs {
            class,
            model,
            ready: BTreeSet::new(),
            later: 0,
            scope: Scope::All,
            load: Load::default(),
            stranded,
            settled: None,
            held: false,
            wake: None,
        });
        self.look_for_memory_again();
        id
    }

    /// Sets the reason that the class waits, and keeps `short_of_cache` in step.
    pub(super) fn set_settled(&mut self, class: usize, reason: Option<WaitReason>) {
        let jobs = self.class_mut(class);
        let (model, before) = (jobs.model, jobs.settled);
        jobs.settled = reason;
        let is_short = |reason| usize::from(reason == Some(WaitReason::CacheFull));
        let count = &mut self.models[model].short_of_cache;
        *count = *count + is_short(reason) - is_short(before);
        if is_short(before) > is_short(reason) {
            self.keep_less(model);
        }
    }

    /// Marks for evaluation the classes that workers of the model were reserved from, because fewer workers may be reserved now.
    pub(super) fn keep_less(&mut self, model: usize) {
        let held = |jobs: &ClassJobs| jobs.model == model && jobs.held;
        for class in self.classes_where(held) {
            self.look_at_all(class);
        }
    }

    /// Returns the classes whose reserved workers are off limits for a job of this class with this turn.
    pub(super) fn held(&self, class: usize, key: TurnKey) -> Vec<&Class> {
        let Some(jobs) = &self.classes[class] else {
            return Vec::new();
        };
        let model = &self.models[jobs.model];
        if model.short_of_cache == 0 {
            return Vec::new();
        }
        let others = model.classes.iter().filter(|(_, other)| *other != class);
        let others = others.filter_map(|(_, other)| self.classes[*other].as_ref());
        let earlier = others.filter(|other| {
            other.settled == Some(WaitReason::CacheFull)
                && other.ready.first().is_some_and(|first| *first < key)
        });
        earlier.map(|other| &other.class).collect()
    }

    /// Marks for evaluation against all pools the classes that wait for memory. Different rules apply to the eviction of a
    /// worker while a job could use it, so the first and the last such job change which workers may be evicted.
    fn look_for_memory_again(&mut self) {
        for class in self.classes_where(|jobs| jobs.settled == Some(WaitReason::MemoryShort)) {
            self.look_at_all(class);
        }
    }

    /// Drops a class without jobs. Workers that only its jobs could use may now be evicted for others.
    pub(super) fn drop_if_empty(&mut self, class: usize) {
        let empty = |jobs: &ClassJobs| jobs.ready.is_empty() && jobs.later == 0;
        if !self.classes[class].as_ref().is_some_and(empty) {
            return;
        }
        self.set_settled(class, None);
        if let Some(jobs) = self.classes[class].take() {
            self.class_ids.remove(&jobs.class);
            let entry = (jobs.class.context, class);
            self.models[jobs.model].classes.remove(&entry);
            self.dirty.remove(&class);
            if let Some(at) = jobs.wake {
                self.wakes.remove(&(at, class));
            }
        }
        self.look_for_memory_again();
    }

    pub(super) fn classes_where(&self, test: impl Fn(&ClassJobs) -> bool) -> Vec<usize> {
        let classes = self.classes.iter().enumerate();
        classes
            .filter(|(_, jobs)| jobs.as_ref().is_some_and(&test))
            .map(|(class, _)| class)
            .collect()
    }

    /// Marks the class for evaluation by the next pass, if it has a job and anything has changed for it.
    pub(super) fn look_again(&mut self, class: usize) {
        let jobs = self.class_mut(class);
        if jobs.scope != Scope::Nothing && !jobs.ready.is_empty() {
            self.dirty.insert(class);
        }
    }

    pub(super) fn look_at_all(&mut self, class: usize) {
        self.class_mut(class).scope = Scope::All;
        self.look_again(class);
    }

    /// Records that the pool may have a place for the class.
    pub(super) fn look_at(&mut self, class: usize, pool: usize) {
        let downloads = self.settings.download;
        let jobs = self.class_mut(class);
        // The search for these reasons considered every pool. Other reasons end the search early and say nothing about the
        // remaining pools. With downloads, another pool may download a file that its only owner can no longer run.
        let looked_everywhere = match jobs.settled {
            Some(WaitReason::MemoryShort) => !downloads,
            Some(
                WaitReason::ModelMissing
                | WaitReason::SlotsBusy
                | WaitReason::CacheFull
                | WaitReason::WorkerStarting,
            ) => true,
            _ => false,
        };
        match &mut jobs.scope {
            Scope::All => {}
            Scope::Nothing if looked_everywhere => jobs.scope = Scope::Pools(vec![pool]),
            Scope::Pools(pools) if pools.contains(&pool) => {}
            Scope::Pools(pools) if pools.len() < FEW_POOLS => pools.push(pool),
            _ => jobs.scope = Scope::All,
        }
        self.look_again(class);
    }
}
