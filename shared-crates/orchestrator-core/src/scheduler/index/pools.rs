//! Pools and their workers, and the index entries that depend on them.

use std::collections::BTreeSet;
use std::sync::Arc;

use foldhash::{HashSet, HashSetExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::worker::WorkerStatus;

use super::{Free, Index, IndexedPool, Model};
use crate::scheduler::judge::alive;
use crate::scheduler::plan::idle_until;
use crate::scheduler::policy::{Rank, WorkerChoice};
use crate::scheduler::snapshot::{PoolState, StartCost, WorkerState, WorkerUsage};

impl Index {
    /// Updates the index with a pool's new state. Our own leases, which the index records, are applied to that state.
    pub fn set_pool(&mut self, mut state: PoolState) {
        let reported_idle: Vec<_> = state.workers.iter().map(|w| w.idle_since).collect();
        state.last_start = self.last_starts.get(&state.id).copied().unwrap_or(0);
        let place = match self.pool_place(&state.id) {
            Some(place) => place,
            None => self.new_place(&state.id),
        };
        let names = state.workers.iter().map(|w| w.id.as_str());
        let usage = self.usage_of(place, &state.id, names);
        for (worker, usage) in state.workers.iter_mut().zip(&usage) {
            worker.apply(*usage);
        }
        let old = match self.pools[place].take() {
            Some(mut old) if *old.state == state => {
                (old.reported_idle, old.usage) = (reported_idle, usage);
                self.pools[place] = Some(old);
                return;
            }
            old => old,
        };
        self.note_reach(old.as_ref().map(|old| &*old.state), Some(&state));
        if let Some(old) = &old {
            self.note_starts(&old.state, &state);
            self.uninstall(place, old);
        }
        let alive_before = old.as_ref().is_some_and(|old| alive(&old.state));
        let whole = alive_before != alive(&state) || old.is_none();
        let worker_models: Vec<_> = state
            .workers
            .iter()
            .map(|w| self.model_id(&w.model))
            .collect();
        let files = self.files_of(&state);
        let worker_names = state.workers.iter().map(|w| Arc::from(w.id.as_str()));
        let pool = IndexedPool {
            name: Arc::from(state.id.as_str()),
            worker_names: worker_names.collect(),
            ranks: vec![None; worker_models.len()],
            idle: vec![None; worker_models.len()],
            state: Arc::new(state),
            usage,
            reported_idle,
            worker_models,
            files,
        };
        let changed = match &old {
            Some(old) if !whole => changed_models(old, &pool),
            _ => HashSet::new(),
        };
        let name = pool.state.id.clone();
        for &(model, cost) in &pool.files {
            self.models[model].files.insert(place, cost);
        }
        self.pools[place] = Some(pool);
        self.refresh(place);
        self.announce(place, &name, whole, &changed);
    }

    /// Removes a pool. Leases on its workers stay recorded.
    pub fn remove_pool(&mut self, name: &str) {
        let Some(place) = self.by_name.remove(name) else {
            return;
        };
        self.usage_of(place, name, std::iter::empty());
        if let Some(old) = self.pools[place].take() {
            self.note_reach(Some(&old.state), None);
            self.uninstall(place, &old);
        }
        self.announce(place, name, true, &HashSet::new());
    }

    /// Marks for evaluation the classes that a change of the pool may affect.
    fn announce(&mut self, place: usize, name: &str, whole: bool, changed: &HashSet<usize>) {
        for class in self.classes_where(|jobs| jobs.class.admits_pool(name)) {
            if whole || changed.contains(&self.class_mut(class).model) {
                self.look_at_all(class);
            } else {
                self.look_at(class, place);
            }
        }
    }

    fn new_place(&mut self, name: &str) -> usize {
        let taken: HashSet<_> = self.by_name.values().copied().collect();
        let place = (0..self.pools.len()).find(|place| !taken.contains(place));
        let place = place.unwrap_or_else(|| {
            self.pools.push(None);
            self.pools.len() - 1
        });
        self.by_name.insert(Arc::from(name), place);
        place
    }

    pub(super) fn pool_place(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// Returns the indices of all pools, sorted by the pools' names.
    pub(super) fn ordered_places(&self) -> Vec<usize> {
        let mut named: Vec<_> = self.by_name.iter().collect();
        named.sort_unstable();
        named.into_iter().map(|(_, &place)| place).collect()
    }

    pub(super) fn model_id(&mut self, model: &ModelRef) -> usize {
        if let Some(&known) = self.model_ids.get(model) {
            return known;
        }
        self.models.push(Model::default());
        self.model_ids.insert(model.clone(), self.models.len() - 1);
        self.models.len() - 1
    }

    fn files_of(&mut self, state: &PoolState) -> Vec<(usize, StartCost)> {
        let usable = state
            .models
            .iter()
            .filter(|model| state.start_failure(model).is_none());
        usable
            .map(|model| (self.model_id(&model.model), model.cost()))
            .collect()
    }

    /// Removes all index entries of the pool.
    fn uninstall(&mut self, place: usize, pool: &IndexedPool) {
        for &(model, _) in &pool.files {
            self.models[model].files.remove(&place);
        }
        for worker in 0..pool.worker_models.len() {
            self.clear_worker(place, pool, worker);
            self.count(pool, worker, u32::wrapping_sub);
        }
    }

    /// Adds a worker to the counts of its model's live workers, or subtracts it.
    pub(super) fn count(&mut self, pool: &IndexedPool, worker: usize, change: fn(u32, u32) -> u32) {
        let state = &pool.state.workers[worker];
        if !alive(&pool.state) {
            return;
        }
        let model = &mut self.models[pool.worker_models[worker]];
        let counts = model.workers_mut(state.device, state.capacity());
        if state.status == WorkerStatus::Starting {
            counts.0 = change(counts.0, 1);
        } else if state.serves() {
            counts.1 = change(counts.1, 1);
        }
    }

    fn clear_worker(&mut self, place: usize, pool: &IndexedPool, worker: usize) {
        if let Some(rank) = pool.ranks[worker] {
            let model = &mut self.models[pool.worker_models[worker]];
            model.short -= usize::from(pool.state.workers[worker].is_short());
            // The worker is usually the best one, just taken, which is found without reading its state.
            let is_first = |free: &BTreeSet<Free>| {
                let first = free.first().map(|free| (free.pool, free.worker));
                first == Some((place, worker))
            };
            if let Some((_, free)) = model.free.iter_mut().find(|(_, free)| is_first(free)) {
                free.pop_first();
            } else {
                let context = pool.state.workers[worker].capacity();
                let entry = free_entry(place, pool, worker, rank);
                model.free_mut(context).remove(&entry);
            }
        }
        if let Some(since) = pool.idle[worker] {
            self.idle.remove(&(since, place, worker));
        }
    }

    /// Adds the index entries of all workers of a pool, which must have none.
    fn refresh(&mut self, place: usize) {
        let Some(mut pool) = self.pools[place].take() else {
            return;
        };
        for worker in 0..pool.worker_models.len() {
            self.count(&pool, worker, u32::wrapping_add);
            self.place_worker(place, &mut pool, worker);
        }
        self.pools[place] = Some(pool);
    }

    fn place_worker(&mut self, place: usize, pool: &mut IndexedPool, worker: usize) {
        let state = &pool.state.workers[worker];
        let alive = alive(&pool.state);
        pool.ranks[worker] = (alive && state.has_slot()).then(|| {
            self.policy.rank_worker(&WorkerChoice {
                pool: &pool.state,
                worker: state,
            })
        });
        let idle = alive && idle_until(state, SignedDuration::ZERO).is_some();
        pool.idle[worker] = state.idle_since.filter(|_| idle);
        if let Some(rank) = pool.ranks[worker] {
            let free = free_entry(place, pool, worker, rank);
            let state = &pool.state.workers[worker];
            let model = &mut self.models[pool.worker_models[worker]];
            model.free_mut(state.capacity()).insert(free);
            model.short += usize::from(state.is_short());
        }
        if let Some(since) = pool.idle[worker] {
            self.idle.insert((since, place, worker));
        }
    }

    /// Changes the use of one worker. Only that worker's own entries change.
    pub(super) fn change_worker(
        &mut self,
        place: usize,
        worker: usize,
        change: impl FnOnce(&mut WorkerState, Option<Timestamp>),
    ) {
        let Some(mut pool) = self.pools[place].take() else {
            return;
        };
        self.clear_worker(place, &pool, worker);
        let reported = pool.reported_idle[worker];
        change(
            &mut Arc::make_mut(&mut pool.state).workers[worker],
            reported,
        );
        self.place_worker(place, &mut pool, worker);
        self.pools[place] = Some(pool);
    }

    /// Changes a pool in a way that may affect the entries of all its workers.
    pub(super) fn change_pool(&mut self, place: usize, change: impl FnOnce(&mut PoolState)) {
        let Some(mut pool) = self.pools[place].take() else {
            return;
        };
        self.reach_changed = true;
        for worker in 0..pool.worker_models.len() {
            self.clear_worker(place, &pool, worker);
            self.count(&pool, worker, u32::wrapping_sub);
        }
        change(Arc::make_mut(&mut pool.state));
        for worker in pool.worker_models.len()..pool.state.workers.len() {
            let model = self.model_id(&pool.state.workers[worker].model);
            let name = Arc::from(pool.state.workers[worker].id.as_str());
            pool.worker_names.push(name);
            pool.worker_models.push(model);
            pool.usage.push(WorkerUsage::default());
            pool.reported_idle.push(None);
            pool.ranks.push(None);
            pool.idle.push(None);
        }
        self.pools[place] = Some(pool);
        self.refresh(place);
    }

    /// Records the load times of workers that have become ready.
    fn note_starts(&mut self, old: &PoolState, new: &PoolState) {
        for worker in &new.workers {
            let before = old.workers.iter().find(|w| w.id == worker.id);
            if let (Some(ready), Some(None)) = (worker.ready_at, before.map(|w| w.ready_at)) {
                let took = ready.duration_since(worker.created_at);
                self.estimates.started(&worker.model, took);
            }
        }
    }
}

fn free_entry(place: usize, pool: &IndexedPool, worker: usize, rank: Rank) -> Free {
    let state = &pool.state.workers[worker];
    Free {
        rank,
        pool_name: Arc::clone(&pool.name),
        name: Arc::clone(&pool.worker_names[worker]),
        device: state.device,
        pool: place,
        worker,
    }
}

/// Returns the models whose workers or files differ.
fn changed_models(old: &IndexedPool, new: &IndexedPool) -> HashSet<usize> {
    let mut changed = HashSet::new();
    let workers = |pool: &IndexedPool, other: &IndexedPool, changed: &mut HashSet<usize>| {
        for (worker, model) in pool.state.workers.iter().zip(&pool.worker_models) {
            if !other.state.workers.contains(worker) {
                changed.insert(*model);
            }
        }
    };
    workers(old, new, &mut changed);
    workers(new, old, &mut changed);
    let files = |pool: &IndexedPool, other: &IndexedPool, changed: &mut HashSet<usize>| {
        let other: HashSet<_> = other.files.iter().collect();
        let missing = pool.files.iter().filter(|file| !other.contains(file));
        changed.extend(missing.map(|(model, _)| *model));
    };
    files(old, new, &mut changed);
    files(new, old, &mut changed);
    changed
}
