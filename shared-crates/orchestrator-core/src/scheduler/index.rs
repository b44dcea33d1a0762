//! The scheduler that remembers: it takes changes, and a pass looks only at what they may have changed.
//!
//! It decides what [`schedule`](super::schedule) decides from [`Index::snapshot`]; a property test compares the two. What
//! makes it quick:
//!
//! - Jobs that ask for the same model in the same place form a class, and wait for the same thing. A pass looks at the
//!   first job of each class, and at a class only when something changed that could give it a place.
//! - Workers with a free slot stand in the order of their ranks, a set for each model.
//! - Pools that have a model's file are known, so that a start looks at no other; and a class that waits for memory looks
//!   again only at the pools that changed.
//! - Explanations are worked out when somebody asks.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _, HashSet, HashSetExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};

use super::REGISTRATION;
use super::estimate::Estimates;
use super::explain::{self, Chooser, Explanation, WaitReason, Why};
use super::judge::{
    Class, EvictionKey, Verdict, World, alive, eviction_key, fitting, judge, next_spare, stopping,
    victims,
};
use super::plan::{Action, awaits_pools, idle_until};
use super::policy::{BuiltIn, Policy, Rank, StartChoice, WorkerChoice};
use super::snapshot::{PoolState, Settings, Snapshot, Usage, WorkerState};
use crate::job::{JobErrorCode, JobId};
use crate::queue::{FairQueue, QueuedJob, TurnKey};

/// Sessions whose last pool is remembered.
const SESSIONS: usize = 10_000;
/// Changed pools up to which a class looks at each of them instead of at all.
const FEW_POOLS: usize = 16;

/// What a pass decided. Everything in it is done as far as the index goes: jobs that were dispatched wait no more and
/// hold their slots, workers that were asked for take their memory.
#[derive(Debug, Default)]
pub struct Pass {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// The jobs that the actions dispatch or reject, as they stood in the queue.
    pub jobs: HashMap<JobId, Arc<QueuedJob>>,
    /// Of each action that dispatches a job, in their order: why there.
    pub why: Vec<Why>,
    /// When time alone makes the next pass due.
    pub wake: Option<Timestamp>,
    /// Whether any job was looked at: if not, every job waits for what it waited for before.
    pub judged: bool,
}

/// Why a job waits, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// How many jobs have their turn before it.
    pub position: u64,
    /// Why.
    pub explanation: Arc<Explanation>,
    /// How long until it starts, as far as measured times tell; `None` where they don't.
    pub estimated_start: Option<SignedDuration>,
}

/// Jobs, pools and leases, and what follows from them.
pub struct Index {
    started_at: Timestamp,
    settings: Settings,
    policy: &'static dyn Policy,
    policy_name: BuiltIn,
    sizes: BTreeMap<ModelRef, u64>,
    queue: FairQueue,
    /// Jobs that wait for their next attempt, by when that may begin.
    later: BTreeSet<(Timestamp, JobId)>,
    classes: Vec<Option<Jobs>>,
    class_ids: HashMap<Class, usize>,
    /// Classes that a pass has to look at, if they have jobs.
    dirty: BTreeSet<usize>,
    /// When a class is to be looked at whatever happens.
    wakes: BTreeSet<(Timestamp, usize)>,
    pools: Vec<Option<Pool>>,
    by_name: BTreeMap<String, usize>,
    models: Vec<Model>,
    model_ids: HashMap<ModelRef, usize>,
    /// Workers of live pools that have nothing to do, by since when.
    idle: BTreeSet<(Timestamp, usize, usize)>,
    /// Workers with leases that are on no pool's list now, by pool and worker.
    away: HashMap<String, HashMap<String, Usage>>,
    /// The pool of each session, and the number of the dispatch that made it so.
    sessions: HashMap<String, (String, u64)>,
    last_starts: HashMap<String, u64>,
    turns: u64,
    estimates: Estimates,
}

/// The jobs of a class.
struct Jobs {
    class: Class,
    model: usize,
    /// Those whose turn may come.
    ready: BTreeSet<TurnKey>,
    /// How many wait for their next attempt.
    later: usize,
    scope: Scope,
    /// What the class waits for since it was looked at.
    settled: Option<WaitReason>,
    wake: Option<Timestamp>,
}

/// Which pools may give a class a place that it did not have when it was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    /// None.
    Nothing,
    /// These.
    Pools(Vec<usize>),
    /// Any.
    All,
}

/// A pool with what stands elsewhere because of it.
struct Pool {
    state: Arc<PoolState>,
    /// What the orchestrator's own leases say of its workers.
    usage: Vec<Usage>,
    /// What the pool itself says of its workers' idleness, before our own leases are laid over it.
    reported_idle: Vec<Option<Timestamp>>,
    name: Arc<str>,
    worker_names: Vec<Arc<str>>,
    /// The models of its workers.
    worker_models: Vec<usize>,
    /// The ranks under which workers stand in [`Model::free`].
    ranks: Vec<Option<Rank>>,
    /// Since when workers stand in [`Index::idle`].
    idle: Vec<Option<Timestamp>>,
    /// The models that it can start, with the bytes they need.
    files: Vec<(usize, u64)>,
}

/// A model and where it is.
#[derive(Default)]
struct Model {
    /// Workers of live pools with a free slot, best first.
    free: BTreeSet<Free>,
    /// Workers of live pools, by device: those that start, and those that serve.
    workers: BTreeMap<Device, (u32, u32)>,
    /// Pools that can start it, with the bytes that takes.
    files: BTreeMap<usize, u64>,
    /// Classes of jobs that ask for it.
    classes: BTreeSet<usize>,
}

/// A worker with a free slot, in the order in which they are taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Free {
    rank: Rank,
    pool_name: Arc<str>,
    name: Arc<str>,
    device: Device,
    pool: usize,
    worker: usize,
}

impl std::fmt::Debug for Index {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Index")
            .field("jobs", &self.queue.len())
            .field("pools", &self.by_name.len())
            .finish_non_exhaustive()
    }
}

impl Index {
    /// An index without pools for the jobs of `queue`, which is empty.
    pub fn new(
        queue: FairQueue,
        policy: BuiltIn,
        settings: Settings,
        sizes: BTreeMap<ModelRef, u64>,
        started_at: Timestamp,
    ) -> Self {
        Self {
            started_at,
            settings,
            policy: policy.policy(),
            policy_name: policy,
            sizes,
            queue,
            later: BTreeSet::new(),
            classes: Vec::new(),
            class_ids: HashMap::new(),
            dirty: BTreeSet::new(),
            wakes: BTreeSet::new(),
            pools: Vec::new(),
            by_name: BTreeMap::new(),
            models: Vec::new(),
            model_ids: HashMap::new(),
            idle: BTreeSet::new(),
            away: HashMap::new(),
            sessions: HashMap::new(),
            last_starts: HashMap::new(),
            turns: 0,
            estimates: Estimates::default(),
        }
    }

    /// The waiting jobs.
    pub fn queue(&self) -> &FairQueue {
        &self.queue
    }

    /// How many jobs have their turn before `id`; `None` where it does not wait.
    pub fn position(&mut self, id: JobId, now: Timestamp) -> Option<u64> {
        self.promote(now);
        self.queue.position(id, now)
    }

    /// How many jobs would have their turn before `job`, were it added now.
    pub fn position_of_new(&mut self, job: &QueuedJob, now: Timestamp) -> u64 {
        self.promote(now);
        self.queue.position_of_new(job, now)
    }

    /// Everything that the next pass depends on.
    pub fn snapshot(&mut self, now: Timestamp) -> Snapshot {
        self.promote(now);
        Snapshot {
            now,
            started_at: self.started_at,
            settings: self.settings,
            jobs: self.queue.ordered(now),
            pools: self
                .by_name
                .values()
                .filter_map(|&pool| Some(Arc::clone(&self.pools[pool].as_ref()?.state)))
                .collect(),
            sessions: self
                .sessions
                .iter()
                .map(|(session, (pool, _))| (session.clone(), pool.clone()))
                .collect(),
            sizes: self.sizes.clone(),
            turns: self.turns,
        }
    }

    // Jobs.

    /// Lets a job wait for its turn.
    pub fn put(&mut self, job: QueuedJob) {
        self.remove(job.id);
        let job = self.queue.put_back(job);
        let class = self.class_for(&job);
        let Some(key) = self.queue.key(job.id) else {
            return;
        };
        let jobs = self.class_mut(class);
        if let Some(at) = job.not_before {
            jobs.later += 1;
            self.later.insert((at, job.id));
        } else {
            jobs.ready.insert(key);
            self.look_again(class);
        }
    }

    /// Takes a job out that wants no turn any more.
    pub fn remove(&mut self, id: JobId) -> Option<Arc<QueuedJob>> {
        let (key, class) = self.place_of(id)?;
        let job = self.queue.remove(id)?;
        self.leave(&job, key, class);
        self.drop_if_empty(class);
        Some(job)
    }

    fn place_of(&self, id: JobId) -> Option<(TurnKey, usize)> {
        let job = self.queue.get(id)?;
        let class = *self.class_ids.get(&Class::of(job))?;
        Some((self.queue.key(id)?, class))
    }

    /// Takes a job that has left the queue out of its class.
    fn leave(&mut self, job: &QueuedJob, key: TurnKey, class: usize) {
        let jobs = self.class_mut(class);
        if jobs.ready.remove(&key) {
            return;
        }
        jobs.later -= 1;
        if let Some(at) = job.not_before {
            self.later.remove(&(at, job.id));
        }
    }

    fn class_mut(&mut self, class: usize) -> &mut Jobs {
        self.classes[class]
            .as_mut()
            .expect("classes are dropped when no job is left that knows them")
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
        self.class_ids.insert(class.clone(), id);
        self.models[model].classes.insert(id);
        self.classes[id] = Some(Jobs {
            class,
            model,
            ready: BTreeSet::new(),
            later: 0,
            scope: Scope::All,
            settled: None,
            wake: None,
        });
        id
    }

    /// Forgets a class without jobs. What only its jobs needed may now be evicted for others.
    fn drop_if_empty(&mut self, class: usize) {
        let empty = |jobs: &Jobs| jobs.ready.is_empty() && jobs.later == 0;
        if !self.classes[class].as_ref().is_some_and(empty) {
            return;
        }
        if let Some(jobs) = self.classes[class].take() {
            self.class_ids.remove(&jobs.class);
            self.models[jobs.model].classes.remove(&class);
            self.dirty.remove(&class);
            if let Some(at) = jobs.wake {
                self.wakes.remove(&(at, class));
            }
        }
        self.classes_where(|jobs| jobs.settled == Some(WaitReason::MemoryShort))
            .into_iter()
            .for_each(|class| self.look_at_all(class));
    }

    fn classes_where(&self, test: impl Fn(&Jobs) -> bool) -> Vec<usize> {
        let classes = self.classes.iter().enumerate();
        classes
            .filter(|(_, jobs)| jobs.as_ref().is_some_and(&test))
            .map(|(class, _)| class)
            .collect()
    }

    /// Lets the next pass look at the class, where it has a job and something changed for it.
    fn look_again(&mut self, class: usize) {
        let jobs = self.class_mut(class);
        if jobs.scope != Scope::Nothing && !jobs.ready.is_empty() {
            self.dirty.insert(class);
        }
    }

    fn look_at_all(&mut self, class: usize) {
        self.class_mut(class).scope = Scope::All;
        self.look_again(class);
    }

    /// Notes that the pool may have a place for the class.
    fn look_at(&mut self, class: usize, pool: usize) {
        let jobs = self.class_mut(class);
        // These were found after every pool was looked at. The others end the search early, and say nothing of the rest.
        let looked_everywhere = matches!(
            jobs.settled,
            Some(
                WaitReason::MemoryShort
                    | WaitReason::ModelMissing
                    | WaitReason::SlotsBusy
                    | WaitReason::WorkerStarting
            )
        );
        match &mut jobs.scope {
            Scope::All => {}
            Scope::Nothing if looked_everywhere => jobs.scope = Scope::Pools(vec![pool]),
            Scope::Pools(pools) if pools.contains(&pool) => {}
            Scope::Pools(pools) if pools.len() < FEW_POOLS => pools.push(pool),
            _ => jobs.scope = Scope::All,
        }
        self.look_again(class);
    }

    // Pools.

    /// Takes in what a pool is now. Leases are known here, and laid over it.
    pub fn set_pool(&mut self, mut state: PoolState) {
        let reported_idle: Vec<_> = state.workers.iter().map(|w| w.idle_since).collect();
        state.last_start = self.last_starts.get(&state.id).copied().unwrap_or(0);
        let place = match self.by_name.get(&state.id) {
            Some(&place) => place,
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
        let pool = Pool {
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
        for &(model, needed) in &pool.files {
            self.models[model].files.insert(place, needed);
        }
        self.pools[place] = Some(pool);
        self.refresh(place);
        self.announce(place, &name, whole, &changed);
    }

    /// Forgets a pool.
    pub fn remove_pool(&mut self, name: &str) {
        let Some(place) = self.by_name.remove(name) else {
            return;
        };
        self.usage_of(place, name, std::iter::empty());
        if let Some(old) = self.pools[place].take() {
            self.uninstall(place, &old);
        }
        self.announce(place, name, true, &HashSet::new());
    }

    /// Tells classes of a pool that has changed.
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
        self.by_name.insert(name.to_owned(), place);
        place
    }

    fn model_id(&mut self, model: &ModelRef) -> usize {
        if let Some(&known) = self.model_ids.get(model) {
            return known;
        }
        self.models.push(Model::default());
        self.model_ids.insert(model.clone(), self.models.len() - 1);
        self.models.len() - 1
    }

    fn files_of(&mut self, state: &PoolState) -> Vec<(usize, u64)> {
        let usable = state
            .models
            .iter()
            .filter(|model| state.start_failure(model).is_none());
        usable
            .map(|model| (self.model_id(&model.model), model.needed_bytes))
            .collect()
    }

    /// Takes everything away that stands elsewhere because of the pool.
    fn uninstall(&mut self, place: usize, pool: &Pool) {
        for &(model, _) in &pool.files {
            self.models[model].files.remove(&place);
        }
        for worker in 0..pool.worker_models.len() {
            self.clear_worker(place, pool, worker);
            self.count(pool, worker, u32::wrapping_sub);
        }
    }

    /// Counts a worker in or out of its model's live workers.
    fn count(&mut self, pool: &Pool, worker: usize, change: fn(u32, u32) -> u32) {
        let state = &pool.state.workers[worker];
        if !alive(&pool.state) {
            return;
        }
        let counts = self.models[pool.worker_models[worker]]
            .workers
            .entry(state.device)
            .or_default();
        if state.status == WorkerStatus::Starting {
            counts.0 = change(counts.0, 1);
        } else if state.serves() {
            counts.1 = change(counts.1, 1);
        }
    }

    fn clear_worker(&mut self, place: usize, pool: &Pool, worker: usize) {
        if let Some(rank) = pool.ranks[worker] {
            let free = free_entry(place, pool, worker, rank);
            self.models[pool.worker_models[worker]].free.remove(&free);
        }
        if let Some(since) = pool.idle[worker] {
            self.idle.remove(&(since, place, worker));
        }
    }

    /// Puts all workers of a pool where they belong that stand nowhere.
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

    fn place_worker(&mut self, place: usize, pool: &mut Pool, worker: usize) {
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
            self.models[pool.worker_models[worker]].free.insert(free);
        }
        if let Some(since) = pool.idle[worker] {
            self.idle.insert((since, place, worker));
        }
    }

    /// Changes one worker's use: nothing but its own place changes.
    fn change_worker(
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

    /// Changes a pool in what may move all of its workers.
    fn change_pool(&mut self, place: usize, change: impl FnOnce(&mut PoolState)) {
        let Some(mut pool) = self.pools[place].take() else {
            return;
        };
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
            pool.usage.push(Usage::default());
            pool.reported_idle.push(None);
            pool.ranks.push(None);
            pool.idle.push(None);
        }
        self.pools[place] = Some(pool);
        self.refresh(place);
    }

    /// Learns how long workers took to come up.
    fn note_starts(&mut self, old: &PoolState, new: &PoolState) {
        for worker in &new.workers {
            let before = old.workers.iter().find(|w| w.id == worker.id);
            if let (Some(ready), Some(None)) = (worker.ready_at, before.map(|w| w.ready_at)) {
                let took = ready.duration_since(worker.created_at);
                self.estimates.started(&worker.model, took);
            }
        }
    }

    // Leases.

    /// What leases say of these workers, which are all that the pool has now. Those of its workers that are not among
    /// them any more are remembered for as long as they have leases.
    fn usage_of<'a>(
        &mut self,
        place: usize,
        name: &str,
        workers: impl Iterator<Item = &'a str> + Clone,
    ) -> Vec<Usage> {
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

    fn worker_place(&self, pool: &str, worker: &str) -> Option<(usize, usize)> {
        let place = *self.by_name.get(pool)?;
        let state = &self.pools[place].as_ref()?.state;
        let worker = state.workers.iter().position(|w| w.id == worker)?;
        Some((place, worker))
    }

    /// Changes what leases say of a worker, and returns it with the worker's place, where it has one.
    fn change_usage(
        &mut self,
        pool: &str,
        worker: &str,
        change: impl FnOnce(&mut Usage),
    ) -> (Usage, Option<(usize, usize)>) {
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

    /// Notes a lease that no pass gave: one of an earlier run of the orchestrator that still runs.
    pub fn lease(&mut self, pool: &str, worker: &str) {
        self.turns += 1;
        let turn = self.turns;
        let (_, found) = self.change_usage(pool, worker, |usage| usage.take(turn));
        if let Some((place, worker)) = found {
            self.change_worker(place, worker, |state, _| state.take_slot(turn));
        }
    }

    /// Notes that a lease is over.
    pub fn release(&mut self, pool: &str, worker: &str, now: Timestamp) {
        let (usage, found) = self.change_usage(pool, worker, |usage| {
            usage.active = usage.active.saturating_sub(1);
            usage.released_at = Some(now);
        });
        let Some((place, index)) = found else {
            return;
        };
        self.change_worker(place, index, |state, reported| {
            state.idle_since = reported;
            state.apply(usage);
        });
        let model = self.pools[place].as_ref().map(|p| p.worker_models[index]);
        let gains = |jobs: &Jobs| {
            jobs.class.admits_pool(pool)
                && (Some(jobs.model) == model || jobs.settled == Some(WaitReason::MemoryShort))
        };
        for class in self.classes_where(gains) {
            self.look_at(class, place);
        }
    }

    /// Notes how long a job ran on the worker that completed.
    pub fn completed(&mut self, pool: &str, worker: &str, took: SignedDuration) {
        let Some((place, worker)) = self.worker_place(pool, worker) else {
            return;
        };
        if let Some(pool) = &self.pools[place] {
            self.estimates
                .completed(&pool.state.workers[worker].model, took);
        }
    }

    // Passes.

    /// Decides what to do with the waiting jobs and the idle workers, and does it as far as the index goes.
    pub fn pass(&mut self, now: Timestamp) -> Pass {
        let mut pass = Pass::default();
        self.let_time_pass(now);
        let mut turns: BinaryHeap<Reverse<(TurnKey, usize)>> = std::mem::take(&mut self.dirty)
            .into_iter()
            .filter_map(|class| Some(Reverse((*self.class_mut(class).ready.first()?, class))))
            .collect();
        pass.judged = !turns.is_empty();
        let mut emptied = Vec::new();
        let mut rejected: HashMap<usize, (JobErrorCode, String)> = HashMap::new();
        while let Some(Reverse((key, class))) = turns.pop() {
            let Some(job) = self.queue.get(key.3).cloned() else {
                continue;
            };
            if let Some((code, message)) = rejected.get(&class) {
                self.reject(&job, key, class, now, (*code, message), &mut pass);
                continue;
            }
            match self.judge(class, &job, now) {
                (Verdict::Dispatch { pool, worker }, _) => {
                    let chooser = Chooser::Policy(self.policy_name);
                    self.dispatch(&job, key, class, (pool, worker), chooser, &mut pass);
                }
                (Verdict::Reject { code, message }, _) => {
                    // Its jobs are rejected each at its own turn.
                    let others = self.class_mut(class).ready.iter().copied();
                    turns.extend(
                        others
                            .filter(|other| *other != key)
                            .map(|k| Reverse((k, class))),
                    );
                    self.reject(&job, key, class, now, (code, &message), &mut pass);
                    rejected.insert(class, (code, message));
                    emptied.push(class);
                    continue;
                }
                (verdict, wake) => {
                    self.settle(class, &verdict, wake);
                    let model = self.class_mut(class).class.model.clone();
                    self.take(&model, verdict, now, &mut pass);
                    continue;
                }
            }
            match self.class_mut(class).ready.first() {
                Some(next) => turns.push(Reverse((*next, class))),
                None => emptied.push(class),
            }
        }
        self.unload(now, &mut pass);
        for class in emptied {
            self.drop_if_empty(class);
        }
        pass.wake = self.next_wake(now);
        pass
    }

    /// Lets batch jobs that have waited for long count as interactive, in their classes as in the queue.
    fn promote(&mut self, now: Timestamp) {
        for id in self.queue.promote(now) {
            let Some((key, class)) = self.place_of(id) else {
                continue;
            };
            let old = (true, key.1, key.2, key.3);
            let jobs = self.class_mut(class);
            if jobs.ready.remove(&old) {
                jobs.ready.insert(key);
            }
        }
    }

    /// Does, as far as the index goes, what a plan says that was made from an [`Index::snapshot`], by a script or by
    /// [`schedule`](super::schedule). An action that does not fit any more is left out. When time makes the next pass due
    /// is for the plan to say.
    pub fn apply(&mut self, actions: &[Action], chooser: Chooser, now: Timestamp) -> Pass {
        let mut pass = Pass {
            judged: true,
            ..Pass::default()
        };
        self.let_time_pass(now);
        for action in actions {
            self.apply_one(action, chooser, now, &mut pass);
        }
        let jobs = std::mem::take(&mut pass.jobs);
        for job in jobs.values() {
            if let Some(&class) = self.class_ids.get(&Class::of(job)) {
                self.drop_if_empty(class);
            }
        }
        pass.jobs = jobs;
        // Somebody else may have left undone what a pass would have done, or stopped what a class counts on.
        for class in self.classes_where(|_| true) {
            self.look_at_all(class);
        }
        pass
    }

    /// `None` where the action does not fit.
    fn apply_one(
        &mut self,
        action: &Action,
        chooser: Chooser,
        now: Timestamp,
        pass: &mut Pass,
    ) -> Option<()> {
        match action {
            Action::Dispatch { job, pool, worker } => {
                let (key, class) = self.place_of(*job)?;
                let job = Arc::clone(self.queue.get(*job)?);
                let (place, worker) = self.worker_place(pool, worker)?;
                let state = &self.pools[place].as_ref()?.state;
                let fits = alive(state)
                    && state.workers[worker].has_slot()
                    && Class::of(&job).admits_worker(pool, &state.workers[worker])
                    && !job.backs_off(now);
                let at = (place, worker);
                fits.then(|| self.dispatch(&job, key, class, at, chooser, pass))
            }
            Action::Reject { job, code, message } => {
                let (key, class) = self.place_of(*job)?;
                let job = Arc::clone(self.queue.get(*job)?);
                self.reject(&job, key, class, now, (*code, message), pass);
                Some(())
            }
            Action::StartWorker {
                pool,
                model,
                device,
            } => {
                let place = *self.by_name.get(pool)?;
                let state = &self.pools[place].as_ref()?.state;
                let on = state.devices.iter().find(|d| d.device == *device)?;
                let fits = alive(state) && state.model(model)?.needed_bytes <= on.free_bytes;
                let (pool, device) = (place, *device);
                fits.then(|| self.take(model, Verdict::Start { pool, device }, now, pass))
            }
            Action::EvictWorker {
                pool,
                worker,
                needed_by,
            } => {
                let (pool, worker) = self.idle_worker_place(pool, worker)?;
                let workers = vec![worker];
                self.take(needed_by, Verdict::Evict { pool, workers }, now, pass);
                Some(())
            }
            Action::UnloadWorker { pool, worker } => {
                let (place, index) = self.idle_worker_place(pool, worker)?;
                self.stop(place, &[index]);
                pass.actions.push(action.clone());
                Some(())
            }
            Action::Download { pool, model } => {
                let pool = *self.by_name.get(pool)?;
                self.take(model, Verdict::Download { pool }, now, pass);
                Some(())
            }
        }
    }

    /// The place of a worker that has nothing to do.
    fn idle_worker_place(&self, pool: &str, worker: &str) -> Option<(usize, usize)> {
        let (place, index) = self.worker_place(pool, worker)?;
        let state = &self.pools[place].as_ref()?.state.workers[index];
        let idle = state.status == WorkerStatus::Ready && state.active == 0;
        idle.then_some((place, index))
    }

    /// Does what time alone brings about.
    fn let_time_pass(&mut self, now: Timestamp) {
        self.promote(now);
        while let Some(&(at, id)) = self.later.first()
            && at <= now
        {
            self.later.pop_first();
            if let Some((key, class)) = self.place_of(id) {
                let jobs = self.class_mut(class);
                jobs.later -= 1;
                jobs.ready.insert(key);
                self.look_again(class);
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

    fn with_world<T>(&self, now: Timestamp, work: impl FnOnce(&World<'_>) -> T) -> T {
        let needed = |pool: &str, worker: &WorkerState| {
            let Some(&model) = self.model_ids.get(&worker.model) else {
                return false;
            };
            let mut classes = self.models[model].classes.iter();
            classes.any(|&class| {
                let jobs = self.classes[class].as_ref();
                jobs.is_some_and(|jobs| jobs.class.admits_worker(pool, worker))
            })
        };
        work(&World {
            now,
            settings: &self.settings,
            policy: self.policy,
            sizes: &self.sizes,
            needed: &needed,
        })
    }

    fn prefers(&self, job: &QueuedJob) -> Option<&str> {
        let session = job.session_id.as_ref()?;
        Some(self.sessions.get(session)?.0.as_str())
    }

    /// What [`judge`] says, from what is known already. With it, when the class is to be looked at again.
    fn judge(&self, class: usize, job: &QueuedJob, now: Timestamp) -> (Verdict, Option<Timestamp>) {
        let Some(jobs) = &self.classes[class] else {
            return (Verdict::Wait(WaitReason::PolicyHeld), None);
        };
        let prefer = self.prefers(job);
        if let Some((pool, worker)) = self.free_worker(jobs, prefer) {
            return (Verdict::Dispatch { pool, worker }, None);
        }
        self.with_world(now, |world| self.judge_starts(jobs, prefer, world))
    }

    fn free_worker(&self, jobs: &Jobs, prefer: Option<&str>) -> Option<(usize, usize)> {
        let on_pool = |name: &str| {
            let place = *self.by_name.get(name)?;
            let pool = self.pools[place].as_ref()?;
            let own = pool.state.workers.iter().enumerate();
            own.filter(|(_, w)| jobs.class.admits_worker(name, w))
                .filter_map(|(worker, state)| Some((pool.ranks[worker]?, &state.id, worker)))
                .min()
                .map(|(.., worker)| (place, worker))
        };
        if let Some(wanted) = &jobs.class.placement.pool {
            return on_pool(wanted);
        }
        prefer.and_then(on_pool).or_else(|| {
            let mut free = self.models[jobs.model].free.iter();
            free.find(|free| jobs.class.admits_device(free.device))
                .map(|free| (free.pool, free.worker))
        })
    }

    /// How many workers for the class start, and how many serve.
    fn live_workers(&self, jobs: &Jobs) -> (u32, u32) {
        if let Some(wanted) = &jobs.class.placement.pool {
            let pool = self.by_name.get(wanted);
            let pool = pool.and_then(|&place| self.pools[place].as_ref());
            let Some(pool) = pool.filter(|pool| alive(&pool.state)) else {
                return (0, 0);
            };
            let mine = |w: &&WorkerState| jobs.class.admits_worker(wanted, w);
            let mine = pool.state.workers.iter().filter(mine);
            return mine.fold((0, 0), |(starting, serving), w| {
                (
                    starting + u32::from(w.status == WorkerStatus::Starting),
                    serving + u32::from(w.serves()),
                )
            });
        }
        let devices = self.models[jobs.model].workers.iter();
        devices
            .filter(|(device, _)| jobs.class.admits_device(**device))
            .fold((0, 0), |sum, (_, counts)| {
                (sum.0 + counts.0, sum.1 + counts.1)
            })
    }

    /// The live pools to look at that can start the class's model, with the bytes that takes.
    fn with_file<'a>(
        &'a self,
        jobs: &'a Jobs,
    ) -> impl Iterator<Item = (usize, &'a PoolState, u64)> {
        let files = &self.models[jobs.model].files;
        let wanted = jobs.class.placement.pool.as_ref();
        let some: Option<Vec<usize>> = match (wanted, &jobs.scope) {
            (Some(wanted), _) => Some(self.by_name.get(wanted).copied().into_iter().collect()),
            (None, Scope::Pools(pools)) => Some(pools.clone()),
            (None, _) => None,
        };
        let all = some
            .is_none()
            .then(|| files.iter().map(|(&place, &needed)| (place, needed)));
        let some = some.into_iter().flatten();
        let some = some.filter_map(move |place| Some((place, *files.get(&place)?)));
        all.into_iter()
            .flatten()
            .chain(some)
            .filter_map(|(place, needed)| {
                let state = self.pools[place].as_ref()?.state.as_ref();
                alive(state).then_some((place, state, needed))
            })
    }

    fn judge_starts(
        &self,
        jobs: &Jobs,
        prefer: Option<&str>,
        world: &World<'_>,
    ) -> (Verdict, Option<Timestamp>) {
        let class = &jobs.class;
        let (starting, serving) = self.live_workers(jobs);
        if starting > 0 {
            return (Verdict::Wait(WaitReason::WorkerStarting), None);
        }
        let mut refused = false;
        let mut best = None;
        for (place, pool, needed) in self.with_file(jobs) {
            for device in fitting(class, pool, needed, serving > 0) {
                if pool.refused(&class.model, device.device).is_some() {
                    refused = true;
                    continue;
                }
                let rank = world.policy.rank_start(&StartChoice { pool, device });
                let elsewhere = prefer.is_some_and(|wanted| wanted != pool.id);
                let key = (elsewhere, rank, pool.id.as_str(), device.device);
                if best.as_ref().is_none_or(|(known, _)| key < *known) {
                    best = Some((key, place));
                }
            }
        }
        if let Some(((.., device), pool)) = best {
            return (Verdict::Start { pool, device }, None);
        }
        if serving > 0 {
            return (Verdict::Wait(WaitReason::SlotsBusy), None);
        }
        if refused {
            return (Verdict::Wait(WaitReason::StartRefused), None);
        }
        self.judge_evictions(jobs, prefer, world)
    }

    fn judge_evictions(
        &self,
        jobs: &Jobs,
        prefer: Option<&str>,
        world: &World<'_>,
    ) -> (Verdict, Option<Timestamp>) {
        let class = &jobs.class;
        let mut best: Option<(EvictionKey<'_>, usize, Vec<usize>)> = None;
        let mut wake: Option<Timestamp> = None;
        let mut any = false;
        for (place, pool, needed) in self.with_file(jobs) {
            for &device in &pool.devices {
                if !class.admits_device(device.device) {
                    continue;
                }
                any = true;
                let after = stopping(pool, device.device).saturating_add(device.free_bytes);
                if after >= needed {
                    return (Verdict::Wait(WaitReason::Evicting), None);
                }
                if !world.settings.evict {
                    continue;
                }
                wake = wake
                    .into_iter()
                    .chain(next_spare(world, pool, device.device))
                    .min();
                if let Some(victims) = victims(world, pool, device, needed) {
                    let key = eviction_key(world, pool, device, &victims);
                    if best.as_ref().is_none_or(|(known, ..)| key < *known) {
                        best = Some((key, place, victims));
                    }
                }
            }
        }
        if let Some((_, pool, workers)) = best {
            return (Verdict::Evict { pool, workers }, None);
        }
        if any || (jobs.settled == Some(WaitReason::MemoryShort) && jobs.scope != Scope::All) {
            return (Verdict::Wait(WaitReason::MemoryShort), wake);
        }
        (self.judge_plainly(jobs, prefer, world), None)
    }

    /// Judges a class whose model no pool can start, which is rare, the plain way.
    fn judge_plainly(&self, jobs: &Jobs, prefer: Option<&str>, world: &World<'_>) -> Verdict {
        let places: Vec<usize> = match &jobs.scope {
            Scope::Pools(pools) => pools.clone(),
            _ => self.by_name.values().copied().collect(),
        };
        let (places, pools): (Vec<usize>, Vec<&PoolState>) = places
            .into_iter()
            .filter_map(|place| Some((place, self.pools[place].as_ref()?.state.as_ref())))
            .unzip();
        match judge(&jobs.class, prefer, &pools, world) {
            Verdict::Dispatch { pool, worker } => Verdict::Dispatch {
                pool: places[pool],
                worker,
            },
            Verdict::Start { pool, device } => Verdict::Start {
                pool: places[pool],
                device,
            },
            Verdict::Evict { pool, workers } => Verdict::Evict {
                pool: places[pool],
                workers,
            },
            Verdict::Download { pool } => Verdict::Download { pool: places[pool] },
            other => other,
        }
    }

    /// Notes what a class waits for.
    fn settle(&mut self, class: usize, verdict: &Verdict, wake: Option<Timestamp>) {
        let found = match verdict {
            Verdict::Start { .. } => WaitReason::WorkerStarting,
            Verdict::Evict { .. } => WaitReason::Evicting,
            Verdict::Download { .. } => WaitReason::Downloading,
            Verdict::Wait(reason) => *reason,
            _ => return,
        };
        let jobs = self.class_mut(class);
        // A look at a few pools finds what these hold back, and not what all the others lack.
        let partial = matches!(jobs.scope, Scope::Pools(_));
        let lacks = matches!(
            found,
            WaitReason::NoPool | WaitReason::PoolsAway | WaitReason::NoBackend
        );
        if !(partial && lacks) {
            jobs.settled = Some(found);
        }
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

    fn dispatch(
        &mut self,
        job: &Arc<QueuedJob>,
        key: TurnKey,
        class: usize,
        (place, worker): (usize, usize),
        chooser: Chooser,
        pass: &mut Pass,
    ) {
        let Some(why) = self.why(class, job, (place, worker), chooser) else {
            return;
        };
        self.queue.take(job.id);
        self.leave(job, key, class);
        self.turns += 1;
        let turn = self.turns;
        self.change_worker(place, worker, |state, _| state.take_slot(turn));
        let Some(state) = &mut self.pools[place] else {
            return;
        };
        state.usage[worker].take(turn);
        let (pool, name) = (
            state.state.id.clone(),
            state.state.workers[worker].id.clone(),
        );
        if let Some(session) = &job.session_id {
            self.remember_session(session, &pool, turn);
        }
        pass.jobs.insert(job.id, Arc::clone(job));
        pass.why.push(why);
        pass.actions.push(Action::Dispatch {
            job: job.id,
            pool,
            worker: name,
        });
    }

    /// Why the job goes to this worker.
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
        let free_workers = self.models[jobs.model].free.len();
        Some(Why::new(
            job,
            &choice,
            chooser,
            session_was_here,
            free_workers,
        ))
    }

    fn remember_session(&mut self, session: &str, pool: &str, turn: u64) {
        self.sessions
            .insert(session.to_owned(), (pool.to_owned(), turn));
        if self.sessions.len() > SESSIONS {
            let mut turns: Vec<u64> = self.sessions.values().map(|(_, turn)| *turn).collect();
            let (_, middle, _) = turns.select_nth_unstable(SESSIONS / 2);
            let middle = *middle;
            self.sessions.retain(|_, (_, turn)| *turn > middle);
        }
    }

    /// Rejects a job, unless pools may still come for it.
    fn reject(
        &mut self,
        job: &Arc<QueuedJob>,
        key: TurnKey,
        class: usize,
        now: Timestamp,
        why: (JobErrorCode, &str),
        pass: &mut Pass,
    ) {
        if awaits_pools(job, now, self.started_at) {
            let wake = self.started_at.checked_add(REGISTRATION).ok();
            self.settle(class, &Verdict::Wait(WaitReason::PoolsAway), wake);
            return;
        }
        self.queue.take(job.id);
        self.leave(job, key, class);
        pass.actions.push(Action::Reject {
            job: job.id,
            code: why.0,
            message: why.1.to_owned(),
        });
        pass.jobs.insert(job.id, Arc::clone(job));
    }

    /// Does what a verdict says that is not about one job.
    fn take(&mut self, model: &ModelRef, verdict: Verdict, now: Timestamp, pass: &mut Pass) {
        let model = model.clone();
        let name = |index: &Self, place: usize| {
            let pool = index.pools[place].as_ref();
            pool.map(|pool| pool.state.id.clone()).unwrap_or_default()
        };
        match verdict {
            Verdict::Start { pool, device } => {
                self.turns += 1;
                let turn = self.turns;
                self.change_pool(pool, |state| state.reserve_start(&model, device, now, turn));
                let pool = name(self, pool);
                self.last_starts.insert(pool.clone(), turn);
                pass.actions.push(Action::StartWorker {
                    pool,
                    model,
                    device,
                });
            }
            Verdict::Evict { pool, workers } => {
                let stopped = self.stop(pool, &workers);
                let pool = name(self, pool);
                pass.actions
                    .extend(stopped.into_iter().map(|worker| Action::EvictWorker {
                        pool: pool.clone(),
                        worker,
                        needed_by: model.clone(),
                    }));
            }
            Verdict::Download { pool } => {
                let size = self.sizes.get(&model).copied().unwrap_or_default();
                self.change_pool(pool, |state| state.reserve_download(&model, size));
                let pool = name(self, pool);
                pass.actions.push(Action::Download { pool, model });
            }
            _ => {}
        }
    }

    /// Shows workers as told to stop, and returns their names.
    fn stop(&mut self, place: usize, workers: &[usize]) -> Vec<String> {
        let mut names = Vec::with_capacity(workers.len());
        self.change_pool(place, |state| {
            for &worker in workers {
                state.workers[worker].status = WorkerStatus::Draining;
                names.push(state.workers[worker].id.clone());
            }
        });
        names
    }

    /// Stops what has been idle for too long.
    fn unload(&mut self, now: Timestamp, pass: &mut Pass) {
        let Some(ttl) = self.settings.idle_ttl else {
            return;
        };
        let due = |since: &Timestamp| since.checked_add(ttl).is_ok_and(|at| at <= now);
        let mut due: Vec<(String, usize, usize)> = self.with_world(now, |world| {
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

    // Explanations.

    /// Why the job waits, while it does.
    pub fn waiting(&mut self, id: JobId, now: Timestamp) -> Option<Waiting> {
        let mut known = HashMap::new();
        self.waiting_with(id, now, &mut known)
    }

    /// Why each of the jobs waits that do. An explanation is worked out once for all jobs of a class.
    pub fn waiting_all(
        &mut self,
        ids: impl IntoIterator<Item = JobId>,
        now: Timestamp,
    ) -> Vec<(JobId, Waiting)> {
        let mut known = HashMap::new();
        ids.into_iter()
            .filter_map(|id| Some((id, self.waiting_with(id, now, &mut known)?)))
            .collect()
    }

    fn waiting_with(
        &mut self,
        id: JobId,
        now: Timestamp,
        known: &mut HashMap<usize, Arc<Explanation>>,
    ) -> Option<Waiting> {
        let position = self.position(id, now)?;
        let job = Arc::clone(self.queue.get(id)?);
        let (key, class) = self.place_of(id)?;
        if job.backs_off(now) {
            return Some(Waiting {
                position,
                explanation: Arc::new(explain::backing_off(&job, now)),
                estimated_start: job.not_before.map(|at| at.duration_since(now)),
            });
        }
        let explanation = match known.get(&class) {
            Some(explanation) => Arc::clone(explanation),
            None => {
                let explanation = Arc::new(self.explain(class, now)?);
                known.insert(class, Arc::clone(&explanation));
                explanation
            }
        };
        let estimated_start = self.estimate(class, key, explanation.reason, now);
        Some(Waiting {
            position,
            explanation,
            estimated_start,
        })
    }

    fn explain(&self, class: usize, now: Timestamp) -> Option<Explanation> {
        let jobs = self.classes[class].as_ref()?;
        let pools: Vec<&PoolState> = self
            .by_name
            .values()
            .filter_map(|&place| Some(self.pools[place].as_ref()?.state.as_ref()))
            .collect();
        Some(self.with_world(now, |world| explain::explain(&jobs.class, &pools, world)))
    }

    /// How long until a job of the class starts.
    fn estimate(
        &self,
        class: usize,
        key: TurnKey,
        reason: WaitReason,
        now: Timestamp,
    ) -> Option<SignedDuration> {
        let jobs = self.classes[class].as_ref()?;
        let rivals = self.models[jobs.model].classes.iter();
        let rivals = rivals.filter_map(|&rival| self.classes[rival].as_ref());
        let before: usize = rivals.map(|rival| rival.ready.range(..key).count()).sum();
        let mine: Vec<&WorkerState> = self
            .pools
            .iter()
            .flatten()
            .filter(|pool| alive(&pool.state))
            .flat_map(|pool| pool.state.workers.iter().map(|w| (&pool.state.id, w)))
            .filter(|(pool, w)| jobs.class.admits_worker(pool, w))
            .map(|(_, w)| w)
            .collect();
        let model = &jobs.class.model;
        match reason {
            WaitReason::SlotsBusy => {
                let slots = mine.iter().filter(|w| w.serves()).map(|w| w.slots).sum();
                self.estimates.turn(model, before, slots)
            }
            WaitReason::WorkerStarting => {
                let starting = mine.iter().filter(|w| w.status == WorkerStatus::Starting);
                let since = starting.map(|w| w.created_at).min()?;
                self.estimates
                    .start(model, before, now.duration_since(since))
            }
            _ => None,
        }
    }
}

fn free_entry(place: usize, pool: &Pool, worker: usize, rank: Rank) -> Free {
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

/// The models whose workers or files are others than before.
fn changed_models(old: &Pool, new: &Pool) -> HashSet<usize> {
    let mut changed = HashSet::new();
    let workers = |pool: &Pool, other: &Pool, changed: &mut HashSet<usize>| {
        for (worker, model) in pool.state.workers.iter().zip(&pool.worker_models) {
            if !other.state.workers.contains(worker) {
                changed.insert(*model);
            }
        }
    };
    workers(old, new, &mut changed);
    workers(new, old, &mut changed);
    let files = |pool: &Pool, other: &Pool, changed: &mut HashSet<usize>| {
        let other: HashSet<_> = other.files.iter().collect();
        let missing = pool.files.iter().filter(|file| !other.contains(file));
        changed.extend(missing.map(|(model, _)| *model));
    };
    files(old, new, &mut changed);
    files(new, old, &mut changed);
    changed
}

#[cfg(test)]
#[path = "index_tests.rs"]
mod tests;
