//! Stranded jobs, which nothing can run at present. They must not use up the queue's capacity for other jobs.

use std::collections::BTreeMap;

use pool_core::ModelRef;
use pool_core::worker::{Device, ModelFile, WorkerStatus};

use super::Index;
use crate::pool::PoolLiveness;
use crate::queue::{Load, QueuedJob};
use crate::scheduler::judge::{Class, runs, startable};
use crate::scheduler::rules::may_download;
use crate::scheduler::snapshot::{PoolState, Settings};

impl Index {
    /// Returns whether nothing can run the job at present, however long it waits: no pool that takes work has both the
    /// model (or its download) and a device that it fits on.
    pub fn is_stranded(&mut self, job: &QueuedJob) -> bool {
        self.look_through();
        let class = Class::of(job);
        let known = self.class_ids.get(&class).copied();
        match known.and_then(|id| self.classes[id].as_ref()) {
            Some(jobs) => jobs.stranded,
            None => !self.can_run(&class),
        }
    }

    /// Returns the load of waiting jobs that nothing can run at present.
    pub fn stranded(&mut self) -> Load {
        self.look_through();
        self.stranded
    }

    /// Updates which classes are stranded. Does nothing unless a pool's models or devices have changed.
    fn look_through(&mut self) {
        if !std::mem::take(&mut self.reach_changed) {
            return;
        }
        let mut stranded = Load::default();
        for id in 0..self.classes.len() {
            let Some(jobs) = &self.classes[id] else {
                continue;
            };
            let (load, now) = (jobs.load, !self.can_run(&jobs.class));
            if now {
                stranded = stranded + load;
            }
            self.class_mut(id).stranded = now;
        }
        self.stranded = stranded;
    }

    pub(super) fn count_in(&mut self, class: usize, bytes: u64) {
        let jobs = self.class_mut(class);
        jobs.load.add(bytes);
        if jobs.stranded {
            self.stranded.add(bytes);
        }
    }

    pub(super) fn count_out(&mut self, class: usize, bytes: u64) {
        let jobs = self.class_mut(class);
        jobs.load.subtract(bytes);
        if jobs.stranded {
            self.stranded.subtract(bytes);
        }
    }

    /// Records a change of a pool, if it may affect which jobs can run there.
    pub(super) fn note_reach(&mut self, old: Option<&PoolState>, new: Option<&PoolState>) {
        if self.reach_changed {
            return;
        }
        let same = match (old, new) {
            (Some(old), Some(new)) => has_same_reach(old, new),
            _ => false,
        };
        self.reach_changed = !same;
    }

    /// Returns whether a pool can run the class at present.
    pub(super) fn can_run(&self, class: &Class) -> bool {
        let on = |place: usize| {
            let pool = self.pools[place].as_ref();
            pool.is_some_and(|pool| could_run(class, &pool.state, &self.settings, &self.sizes))
        };
        if let Some(wanted) = &class.placement.pool {
            return self.pool_place(wanted).is_some_and(on);
        }
        let with_file = self.model_ids.get(&class.model);
        // Few pools have the file, and usually one of them can run the class.
        with_file.is_some_and(|&model| self.models[model].files.keys().copied().any(on))
            || (0..self.pools.len()).any(on)
    }
}

/// Returns whether the pool takes work, or is likely to soon: a pool that missed a single heartbeat, has not reported yet or was
/// just stopped counts, too.
fn takes_work(pool: &PoolState) -> bool {
    pool.liveness != PoolLiveness::Offline && !pool.draining
}

fn could_run(
    class: &Class,
    pool: &PoolState,
    settings: &Settings,
    sizes: &BTreeMap<ModelRef, u64>,
) -> bool {
    if !takes_work(pool) || !class.admits_pool(&pool.id) {
        return false;
    }
    let fits = || {
        startable(class, pool).is_some_and(|size| {
            let mut devices = pool.devices.iter();
            devices.any(|d| class.admits_device(d.device) && d.total_bytes >= size.bytes)
        })
    };
    let downloads = || {
        let size = sizes.get(&class.model).filter(|_| settings.download);
        pool.downloads.iter().any(|d| d.model == class.model)
            || size.is_some_and(|size| may_download(class.needs(), pool, *size).is_some())
    };
    runs(class, pool) || fits() || downloads()
}

/// Returns whether a pool can run the same jobs in both states.
fn has_same_reach(old: &PoolState, new: &PoolState) -> bool {
    takes_work(old) == takes_work(new)
        && old.models == new.models
        && old.downloads == new.downloads
        && old.refused_downloads == new.refused_downloads
        && totals(old).eq(totals(new))
        && live(old).eq(live(new))
        && failed(old).eq(failed(new))
}

/// Returns the devices with their total memory.
fn totals(pool: &PoolState) -> impl Iterator<Item = (Device, u64)> {
    pool.devices.iter().map(|d| (d.device, d.total_bytes))
}

/// Returns the properties of workers that determine which jobs they can run.
fn live(pool: &PoolState) -> impl Iterator<Item = (&ModelRef, Device, u32)> {
    let live = pool.workers.iter().filter(|w| w.status.is_live());
    live.map(|w| (&w.model, w.device, w.capacity()))
}

/// Returns the properties of failed workers that determine which models the pool does not start again.
fn failed(pool: &PoolState) -> impl Iterator<Item = (&ModelRef, &ModelFile, Option<&str>)> {
    let failed = pool.workers.iter();
    let failed = failed.filter(|w| w.status == WorkerStatus::Failed);
    failed.map(|w| (&w.model, &w.file, w.start_failure.as_deref()))
}
