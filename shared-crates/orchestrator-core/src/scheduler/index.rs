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

mod actions;
mod classes;
mod leases;
mod passes;
mod pools;
mod reach;
mod verdicts;
mod waiting;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use foldhash::{HashMap, HashMapExt as _};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::worker::Device;

use crate::job::JobId;
use crate::queue::{FairQueue, Load, QueuedJob, TurnKey};
use crate::scheduler::estimate::Estimates;
use crate::scheduler::explain::{Explanation, WaitReason, Why};
use crate::scheduler::judge::Class;
use crate::scheduler::plan::Action;
use crate::scheduler::policy::{BuiltIn, Policy, Rank};
use crate::scheduler::snapshot::{PoolState, Settings, Snapshot, StartCost, Usage};

/// What a pass decided. Everything in it is done as far as the index goes: jobs that were dispatched wait no more and
/// hold their slots, workers that were asked for take their memory.
#[derive(Debug, Default)]
pub struct Pass {
    /// What to do, in order.
    pub actions: Vec<Action>,
    /// Of each action that dispatches or rejects a job, in their order: the job as it stood in the queue.
    pub jobs: Vec<Arc<QueuedJob>>,
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
    by_name: HashMap<Arc<str>, usize>,
    models: Vec<Model>,
    model_ids: HashMap<ModelRef, usize>,
    /// Workers of live pools that have nothing to do, by since when.
    idle: BTreeSet<(Timestamp, usize, usize)>,
    /// Workers with leases that are on no pool's list now, by pool and worker.
    away: HashMap<String, HashMap<String, Usage>>,
    /// The pool of each session, and the number of the dispatch that made it so.
    sessions: HashMap<String, (Arc<str>, u64)>,
    last_starts: HashMap<String, u64>,
    turns: u64,
    estimates: Estimates,
    /// Waiting jobs that nothing can run at present.
    stranded: Load,
    /// True if pools have changed since the last search for stranded classes.
    reach_changed: bool,
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
    /// Number and bytes of the class's jobs.
    load: Load,
    /// True if nothing can run the jobs of the class at present.
    stranded: bool,
    /// What the class waits for since it was looked at.
    settled: Option<WaitReason>,
    /// True if workers were kept for earlier jobs of other classes when the class was looked at.
    held: bool,
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
    /// The models that the pool can start, with the cost of each.
    files: Vec<(usize, StartCost)>,
}

/// A model and where it is.
#[derive(Default)]
struct Model {
    /// Workers of live pools with a free slot, best first, by their context. Workers of a model rarely differ in it, so a
    /// list is searched faster than a map.
    free: Vec<(u32, BTreeSet<Free>)>,
    /// Workers of live pools by device and context: the number starting, and the number serving.
    workers: Vec<((Device, u32), (u32, u32))>,
    /// Pools that can start the model, with the cost of each.
    files: BTreeMap<usize, StartCost>,
    /// Classes of jobs that ask for the model, by required context.
    classes: BTreeSet<(u32, usize)>,
    /// Number of the classes that wait for room in the caches of workers.
    short_of_cache: usize,
}

impl Model {
    /// Returns the workers with a free slot and at least this context, by context.
    fn free(&self, context: u32) -> impl Iterator<Item = &BTreeSet<Free>> {
        let sets = self.free.iter();
        sets.filter(move |(of, _)| *of >= context)
            .map(|(_, free)| free)
    }

    /// Returns the number of workers with a free slot and at least this context.
    fn free_workers(&self, context: u32) -> usize {
        self.free(context).map(BTreeSet::len).sum()
    }

    /// Returns the workers with a free slot and this context.
    fn free_mut(&mut self, context: u32) -> &mut BTreeSet<Free> {
        let known = self.free.iter().position(|(of, _)| *of == context);
        let index = known.unwrap_or_else(|| {
            self.free.retain(|(_, free)| !free.is_empty());
            self.free.push((context, BTreeSet::new()));
            self.free.len() - 1
        });
        &mut self.free[index].1
    }

    /// Returns the numbers of workers on this device with this context.
    fn workers_mut(&mut self, device: Device, context: u32) -> &mut (u32, u32) {
        let key = (device, context);
        let known = self.workers.iter().position(|(of, _)| *of == key);
        let index = known.unwrap_or_else(|| {
            self.workers.retain(|(_, counts)| *counts != (0, 0));
            self.workers.push((key, (0, 0)));
            self.workers.len() - 1
        });
        &mut self.workers[index].1
    }
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
            by_name: HashMap::new(),
            models: Vec::new(),
            model_ids: HashMap::new(),
            idle: BTreeSet::new(),
            away: HashMap::new(),
            sessions: HashMap::new(),
            last_starts: HashMap::new(),
            turns: 0,
            estimates: Estimates::default(),
            stranded: Load::default(),
            reach_changed: false,
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
                .ordered_places()
                .into_iter()
                .filter_map(|place| Some(Arc::clone(&self.pools[place].as_ref()?.state)))
                .collect(),
            sessions: self
                .sessions
                .iter()
                .map(|(session, (pool, _))| (session.clone(), pool.to_string()))
                .collect(),
            sizes: self.sizes.clone(),
            turns: self.turns,
        }
    }
}

#[cfg(test)]
mod tests;
