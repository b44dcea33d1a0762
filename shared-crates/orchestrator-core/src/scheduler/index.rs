//! The incremental scheduler: it records changes, and a pass evaluates only the jobs that they may affect.
//!
//! Its decisions equal those of [`schedule`](super::schedule) for [`Index::snapshot`]; a property test compares the two. Four
//! techniques make it fast:
//!
//! - Jobs that ask for the same model in the same place form a class and wait for the same reason. A pass evaluates the first
//!   job of each class, and a class only after a change that could give it a place.
//! - For each model, the workers with a free slot are kept sorted by rank.
//! - The pools with a model's file are indexed, so that a start considers no others. For a class that waits for
//!   memory, only the pools that have changed are considered.
//! - Explanations are computed on request.

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
use crate::queue::{JobQueue, Line, Load, QueuedJob, TurnKey};
use crate::scheduler::estimate::Estimates;
use crate::scheduler::explain::{Explanation, Why};
use crate::scheduler::judge::Class;
use crate::scheduler::plan::Action;
use crate::scheduler::policy::{BuiltIn, Policy, Rank};
use crate::scheduler::snapshot::{PoolState, Settings, Snapshot, StartCost, WorkerUsage};
use crate::scheduler::wait_reason::WaitReason;

/// Result of a pass. The index already reflects it: dispatched jobs have left the queue and hold their slots, and requested
/// workers occupy their memory.
#[derive(Debug, Default)]
pub struct PassOutcome {
    /// Actions to take, in order.
    pub actions: Vec<Action>,
    /// Job of each dispatch and rejection, in the order of the actions, as it stood in the queue.
    pub jobs: Vec<Arc<QueuedJob>>,
    /// Reason for each dispatch, in the order of the actions.
    pub why: Vec<Why>,
    /// Time at which the next pass is due even without a change; `None` if there is none.
    pub wake: Option<Timestamp>,
    /// True if any job was evaluated. If false, every job waits for the same reason as before.
    pub judged: bool,
}

/// The reason that a job waits, with its place in the queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Waiting {
    /// Number of jobs ahead of it.
    pub position: u64,
    /// Explanation from the current state of the pools.
    pub explanation: Arc<Explanation>,
    /// Estimated time until the job starts; `None` if too little was measured.
    pub estimated_start: Option<SignedDuration>,
}

/// Index of jobs, pools and leases, from which passes are computed incrementally.
pub struct Index {
    started_at: Timestamp,
    settings: Settings,
    policy: &'static dyn Policy,
    policy_name: BuiltIn,
    sizes: BTreeMap<ModelRef, u64>,
    queue: Box<dyn JobQueue>,
    /// Jobs backing off after a lost attempt, by the end of the backoff.
    later: BTreeSet<(Timestamp, JobId)>,
    classes: Vec<Option<ClassJobs>>,
    class_ids: HashMap<Class, usize>,
    /// Classes that the next pass evaluates if they have jobs.
    dirty: BTreeSet<usize>,
    /// Times at which a class is due for evaluation, even without a change.
    wakes: BTreeSet<(Timestamp, usize)>,
    pools: Vec<Option<IndexedPool>>,
    by_name: HashMap<Arc<str>, usize>,
    models: Vec<Model>,
    model_ids: HashMap<ModelRef, usize>,
    /// Idle workers of live pools, by the start of their idle time.
    idle: BTreeSet<(Timestamp, usize, usize)>,
    /// Use of workers with leases that their pool does not list now, by pool and worker.
    away: HashMap<String, HashMap<String, WorkerUsage>>,
    /// Pool of each session's latest run, and the number of the dispatch that chose it.
    sessions: HashMap<String, (Arc<str>, u64)>,
    last_starts: HashMap<String, u64>,
    turns: u64,
    estimates: Estimates,
    /// Waiting jobs that nothing can run at present.
    stranded: Load,
    /// True if pools have changed since the last search for stranded classes.
    reach_changed: bool,
}

/// A class and its jobs.
struct ClassJobs {
    class: Class,
    model: usize,
    /// Keys of the jobs that are not backing off.
    ready: BTreeSet<TurnKey>,
    /// Number of jobs backing off after a lost attempt.
    later: usize,
    scope: Scope,
    /// Number and bytes of the class's jobs.
    load: Load,
    /// True if nothing can run the jobs of the class at present.
    stranded: bool,
    /// Reason found by the latest evaluation; `None` before.
    settled: Option<WaitReason>,
    /// True if workers were reserved for earlier jobs of other classes at the latest evaluation.
    held: bool,
    wake: Option<Timestamp>,
}

/// The pools that may offer a class a place that they did not have at its latest evaluation.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Scope {
    /// No pool.
    Nothing,
    /// Only these pools.
    Pools(Vec<usize>),
    /// Any pool.
    All,
}

/// A pool, with the entries that the other tables hold for it.
struct IndexedPool {
    state: Arc<PoolState>,
    /// Use of each worker by the orchestrator's own leases.
    usage: Vec<WorkerUsage>,
    /// Start of each worker's idle time as reported by the pool, before our own leases are applied.
    reported_idle: Vec<Option<Timestamp>>,
    name: Arc<str>,
    worker_names: Vec<Arc<str>>,
    /// Index of each worker's model.
    worker_models: Vec<usize>,
    /// Ranks of the workers in [`Model::free`]; `None` for a worker without an entry.
    ranks: Vec<Option<Rank>>,
    /// Times of the workers in [`Index::idle`]; `None` for a worker without an entry.
    idle: Vec<Option<Timestamp>>,
    /// Models that the pool can start, with the cost of each.
    files: Vec<(usize, StartCost)>,
}

/// A model, with its workers, files and classes.
#[derive(Default)]
struct Model {
    /// Workers of live pools with a free slot, best first, grouped by context. The workers of a model rarely differ in context,
    /// so searching a list is faster than searching a map.
    free: Vec<(u32, BTreeSet<Free>)>,
    /// Number of workers in `free` that may refuse some jobs for lack of room in their caches.
    short: usize,
    /// Numbers of starting and of serving workers on live pools, by device and context.
    workers: Vec<((Device, u32), (u32, u32))>,
    /// Pools that can start the model, with the cost of each.
    files: BTreeMap<usize, StartCost>,
    /// Classes of jobs that ask for the model, by required context.
    classes: BTreeSet<(u32, usize)>,
    /// Number of these classes that wait for room in the caches of workers.
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
            // Contexts that no free worker has any more would only slow down the search.
            self.free.retain(|(_, free)| !free.is_empty());
            self.free.push((context, BTreeSet::new()));
            self.free.len() - 1
        });
        &mut self.free[index].1
    }

    /// Returns the numbers of starting and serving workers on this device with this context.
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

/// A worker with a free slot. Sorts in the order in which free workers are used.
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
            .field("jobs", &self.line().len())
            .field("pools", &self.by_name.len())
            .finish_non_exhaustive()
    }
}

impl Index {
    /// Returns an index without pools. `queue` must be empty.
    pub fn new(
        queue: Box<dyn JobQueue>,
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

    /// Returns the waiting jobs.
    pub fn line(&self) -> &Line {
        self.queue.line()
    }

    /// Returns the number of jobs ahead of `id`; `None` if that job does not wait.
    pub fn position(&mut self, id: JobId, now: Timestamp) -> Option<u64> {
        self.promote(now);
        self.queue.position(id, now)
    }

    /// Returns the number of jobs that would be ahead of `job` if it were added now.
    pub fn position_of_new(&mut self, job: &QueuedJob, now: Timestamp) -> u64 {
        self.promote(now);
        self.queue.position_of_new(job, now)
    }

    /// Returns the complete input of the next pass.
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
