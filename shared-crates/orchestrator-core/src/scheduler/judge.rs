//! Judgement of a class: the best action for its jobs in the current state of the pools.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use jiff::Timestamp;
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};

use super::policy::{Policy, Rank, StartChoice, WorkerChoice};
use super::rules::{
    self, Needs, Obstacle, Promised, at_rest, loadable, resident_until, startable_on, takes_work,
};
use super::snapshot::{DeviceState, ModelState, PoolState, Settings, StartSize, WorkerState};
use super::wait_reason::WaitReason;
use crate::job::{JobErrorCode, Placement};
use crate::pool::PoolLiveness;
use crate::queue::QueuedJob;

/// The model, placement and needs that jobs have in common. A judgement of one job holds for all jobs of its class.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Class {
    pub(super) model: ModelRef,
    pub(super) placement: Placement,
    /// Required tokens of context, if a worker has counted them; 0 otherwise.
    pub(super) context: u32,
    /// Required tokens of a worker's cache, if a worker has counted them; 0 otherwise.
    pub(super) cache: u32,
}

impl Class {
    pub(super) fn of(job: &QueuedJob) -> Self {
        let needs = Needs::of(job);
        Self {
            model: needs.model.clone(),
            placement: needs.placement.clone(),
            context: needs.context,
            cache: needs.cache,
        }
    }

    pub(super) fn needs(&self) -> Needs<'_> {
        Needs {
            model: &self.model,
            placement: &self.placement,
            context: self.context,
            cache: self.cache,
        }
    }

    pub(super) fn admits_pool(&self, pool: &str) -> bool {
        self.placement.admits_pool(pool)
    }

    pub(super) fn admits_device(&self, device: Device) -> bool {
        self.placement.admits_device(device)
    }

    /// Returns whether the worker suits these jobs, regardless of its state.
    pub(super) fn admits_worker(&self, pool: &str, worker: &WorkerState) -> bool {
        self.needs().suited_by(pool, worker).is_ok()
    }

    /// Returns whether the worker, which admits the class, has a slot and cache room for one of its jobs now. `tokens` is the most
    /// that this job is expected to take of the cache.
    pub(super) fn finds_place(&self, worker: &WorkerState, tokens: u32) -> bool {
        let place = || self.needs().placed_on(worker, tokens, Promised::default());
        // Most workers that a pass looks at have no free slot, which is seen at once.
        worker.has_slot() && place().is_ok()
    }
}

/// Classes that wait for room in the caches of workers, with jobs whose turn came earlier. Later jobs get no place on a worker
/// that one of these classes could use: otherwise small jobs would take the room again and again, and a large job would never
/// start.
#[derive(Clone, Copy, Default)]
pub(super) struct Held<'a>(pub(super) &'a [&'a Class]);

impl Held<'_> {
    /// Returns whether no worker is reserved.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether the worker is reserved for one of the classes.
    pub(super) fn keeps(&self, pool: &str, worker: &WorkerState) -> bool {
        self.0.iter().any(|class| class.admits_worker(pool, worker))
    }
}

/// Preferences of the first job of a class. They reserve no place for the job.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wish<'a> {
    /// Pool of the session's latest run.
    pub(super) pool: Option<&'a str>,
    /// Estimated tokens of context that hold the job's prompt and its longest answer.
    pub(super) context: u32,
    /// Most tokens of the job's answer.
    pub(super) max_tokens: u32,
    /// Most tokens that the job is expected to take of a worker's cache.
    pub(super) cache: u32,
}

impl<'a> Wish<'a> {
    pub(super) fn of(job: &QueuedJob, pool: Option<&'a str>) -> Self {
        Self {
            pool,
            context: job.context_wished(),
            max_tokens: job.max_tokens,
            cache: job.cache_expected(),
        }
    }

    pub(super) fn is_elsewhere(&self, pool: &PoolState) -> bool {
        self.pool.is_some_and(|wanted| wanted != pool.id)
    }

    /// Returns the context for a new worker on the device: room for the whole answer if there is memory for it, otherwise the
    /// smallest sufficient context.
    pub(super) fn size(&self, class: &Class, choice: &StartChoice<'_>) -> Option<u32> {
        let StartChoice { pool, device } = choice;
        let cost = pool.model(&class.model)?.cost();
        let may = |size: &StartSize| startable_on(pool, &class.model, device, *size).is_ok();
        // The needed context is the prompt and one token of the answer.
        let prompt = match class.context {
            0 => self.context.saturating_sub(self.max_tokens),
            context => context - 1,
        };
        let roomy = cost
            .roomy(class.context, prompt, self.max_tokens)
            .filter(may);
        roomy.or_else(|| cost.least(class.context))?.context
    }
}

/// Returns the context for a new worker that is meant for the job.
pub(crate) fn start_context(job: &QueuedJob, choice: &StartChoice<'_>) -> Option<u32> {
    Wish::of(job, None).size(&Class::of(job), choice)
}

/// Input of a judgement, in addition to the class and the pools.
#[derive(Clone, Copy)]
pub(super) struct World<'a> {
    pub(super) now: Timestamp,
    pub(super) settings: &'a Settings,
    pub(super) policy: &'a dyn Policy,
    pub(super) sizes: &'a BTreeMap<ModelRef, u64>,
    /// Test of whether a waiting job could use the worker.
    pub(super) needed: &'a dyn Fn(&str, &WorkerState) -> bool,
    /// Classes for which workers are reserved.
    pub(super) held: Held<'a>,
}

/// Result of a judgement. Pools and workers are indices into its input.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ClassDecision {
    Dispatch {
        pool: usize,
        worker: usize,
    },
    Start {
        pool: usize,
        device: Device,
        context: Option<u32>,
    },
    Evict {
        pool: usize,
        workers: Vec<usize>,
    },
    Download {
        pool: usize,
    },
    Reject {
        code: JobErrorCode,
        message: String,
    },
    Wait(WaitReason),
}

/// Returns whether the pool is online and takes work.
pub(super) fn alive(pool: &PoolState) -> bool {
    takes_work(pool).is_ok()
}

/// Returns whether the pool has a device for the class, or a worker that already runs on one.
pub(super) fn has_backend(class: &Class, pool: &PoolState) -> bool {
    pool.devices.iter().any(|d| class.admits_device(d.device)) || runs(class, pool)
}

/// Returns whether the pool has a live worker for the class.
pub(super) fn runs(class: &Class, pool: &PoolState) -> bool {
    let mut workers = pool.workers.iter();
    workers.any(|w| w.status.is_live() && class.admits_worker(&pool.id, w))
}

/// Returns the class's model, if it is on the pool's disk and has not failed to load.
pub(super) fn usable<'a>(class: &Class, pool: &'a PoolState) -> Option<&'a ModelState> {
    loadable(pool, &class.model).ok()
}

/// Returns the smallest worker for the class that the pool could start if it had the memory.
pub(super) fn startable(class: &Class, pool: &PoolState) -> Option<StartSize> {
    usable(class, pool)?.cost().least(class.context)
}

/// Returns the devices on which a worker of this size for the class may be started, and those where only the pool's refusal
/// forbids it. With `spread`, devices that already have a live worker with the model are excluded, because a second worker would
/// share the device and load the model twice.
pub(super) fn fitting<'a>(
    class: &'a Class,
    pool: &'a PoolState,
    size: StartSize,
    spread: bool,
) -> impl Iterator<Item = (DeviceState, Fit)> + 'a {
    let has_one = move |device: Device| {
        let mut workers = pool.workers.iter();
        workers.any(|w| w.device == device && w.model == class.model && w.status.is_live())
    };
    // Most devices lack the memory, which is checked first because it is the cheapest.
    let devices = pool.devices.iter().copied();
    devices
        .filter(move |d| class.admits_device(d.device))
        .filter_map(move |d| match startable_on(pool, &class.model, &d, size) {
            Ok(()) => Some((d, Fit::Free)),
            Err(Obstacle::StartRefused(_)) => Some((d, Fit::Refused)),
            Err(_) => None,
        })
        .filter(move |(d, _)| !(spread && has_one(d.device)))
}

/// The way in which a device has the memory for a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fit {
    /// The worker can be started.
    Free,
    /// The pool recently refused to start it.
    Refused,
}

/// Returns the bytes of the device that become free once its draining workers have ended.
pub(super) fn stopping(pool: &PoolState, device: Device) -> u64 {
    let ending = |w: &&WorkerState| w.device == device && w.status == WorkerStatus::Draining;
    pool.workers
        .iter()
        .filter(ending)
        .map(|w| w.memory_bytes)
        .sum()
}

/// Returns the time from which the worker may be stopped for others: any time if no waiting job could use it, otherwise the end
/// of its residence. `None` while it works.
pub(super) fn spare_from(
    world: &World<'_>,
    pool: &PoolState,
    worker: &WorkerState,
) -> Option<Timestamp> {
    at_rest(worker, Promised::default()).ok()?;
    if (world.needed)(&pool.id, worker) {
        return resident_until(world.settings, worker);
    }
    let idle = worker.status == WorkerStatus::Ready && worker.idle_since.is_some();
    idle.then_some(Timestamp::MIN)
}

/// Returns the idle workers of the device to stop so that `needed` bytes fit: first those that no job waits for, then the least
/// recently used, and no more than necessary. `None` if stopping all of them would not be enough.
pub(super) fn victims(
    world: &World<'_>,
    pool: &PoolState,
    device: DeviceState,
    needed: u64,
) -> Option<Vec<usize>> {
    let on_device = pool.workers.iter().enumerate();
    let mut idle: Vec<_> = on_device
        .filter(|(_, w)| w.device == device.device)
        .filter_map(|(index, w)| Some((spare_from(world, pool, w)?, index, w)))
        .filter(|(from, ..)| *from <= world.now)
        .collect();
    idle.sort_unstable_by_key(|(from, _, w)| {
        (
            *from > Timestamp::MIN,
            w.idle_since.unwrap_or(world.now),
            &w.id,
        )
    });
    let mut free = device.free_bytes;
    let mut chosen = Vec::new();
    for (_, index, worker) in idle {
        if free >= needed {
            break;
        }
        free = free.saturating_add(worker.memory_bytes);
        chosen.push((index, worker.memory_bytes));
    }
    if free < needed {
        return None;
    }
    // A small worker chosen early may be unnecessary once a large one was chosen.
    for place in (0..chosen.len()).rev() {
        let bytes = chosen[place].1;
        if free - bytes >= needed {
            free -= bytes;
            chosen.remove(place);
        }
    }
    Some(chosen.into_iter().map(|(index, _)| index).collect())
}

/// Returns the next time at which a worker of the device that is still protected may be evicted.
pub(super) fn next_spare(world: &World<'_>, pool: &PoolState, device: Device) -> Option<Timestamp> {
    pool.workers
        .iter()
        .filter(|w| w.device == device)
        .filter_map(|w| spare_from(world, pool, w))
        .filter(|at| *at > world.now)
        .min()
}

/// Sort key of evictions: workers that no job waits for first, then the least recently used, then the fewest workers.
pub(super) type EvictionKey<'a> = (bool, Option<Timestamp>, usize, Rank, &'a str, Device);

/// Returns the sort key of an eviction.
pub(super) fn eviction_key<'a>(
    world: &World<'_>,
    pool: &'a PoolState,
    device: DeviceState,
    victims: &[usize],
) -> EvictionKey<'a> {
    let workers = || victims.iter().map(|&w| &pool.workers[w]);
    let missed = workers().any(|w| (world.needed)(&pool.id, w));
    let latest = workers().map(|w| w.idle_since.unwrap_or(world.now)).max();
    let rank = world.policy.rank_start(&StartChoice { pool, device });
    (missed, latest, victims.len(), rank, &pool.id, device.device)
}

/// The places for a class, as a judgement sees them: all pools of a snapshot, or those that the index's tables name.
pub(super) trait Places {
    /// Returns the best worker with a free slot and room in its cache.
    fn free_worker(&self) -> Option<(usize, usize)>;

    /// Returns the live workers for the class.
    fn workers(&self) -> LiveWorkers;

    /// Returns whether one of these workers has a free slot, with or without room in its cache.
    fn has_slot(&self) -> bool;

    /// Returns the pools that take work and can start a worker for the class if they have the memory, with the size of the
    /// smallest such worker.
    fn with_file(&self) -> impl Iterator<Item = (usize, &PoolState, StartSize)>;

    /// Judges a class that no device of the pools in [`Places::with_file`] suits.
    fn without_file(&self) -> ClassDecision;
}

/// Live workers for a class.
#[derive(Debug, Clone, Copy)]
pub(super) struct LiveWorkers {
    /// True if a worker is loading the model.
    pub(super) starting: bool,
    /// True if a worker serves.
    pub(super) serving: bool,
}

/// Judges a class that has pools with a backend for it. Returns with [`WaitReason::MemoryShort`] the time from which a worker may be
/// evicted.
pub(super) fn judge_places(
    places: &impl Places,
    class: &Class,
    wish: &Wish<'_>,
    world: &World<'_>,
) -> (ClassDecision, Option<Timestamp>) {
    // First choice: a worker with a free slot.
    if let Some((pool, worker)) = places.free_worker() {
        return (ClassDecision::Dispatch { pool, worker }, None);
    }

    // Second choice: another worker.
    let LiveWorkers { starting, serving } = places.workers();
    if starting {
        return (ClassDecision::Wait(WaitReason::WorkerStarting), None);
    }
    let mut refused = false;
    let mut best: Option<(StartKey<'_>, usize, StartChoice<'_>)> = None;
    for (place, pool, size) in places.with_file() {
        for (device, fit) in fitting(class, pool, size, serving) {
            if fit == Fit::Refused {
                refused = true;
                continue;
            }
            let choice = StartChoice { pool, device };
            let rank = world.policy.rank_start(&choice);
            let elsewhere = wish.is_elsewhere(pool);
            let key = (elsewhere, rank, pool.id.as_str(), device.device);
            if best.as_ref().is_none_or(|(known, ..)| key < *known) {
                best = Some((key, place, choice));
            }
        }
    }
    if let Some((_, pool, choice)) = best {
        let start = ClassDecision::Start {
            pool,
            device: choice.device.device,
            context: wish.size(class, &choice),
        };
        return (start, None);
    }
    if serving {
        return (
            ClassDecision::Wait(WaitReason::of_serving(places.has_slot())),
            None,
        );
    }
    if refused {
        return (ClassDecision::Wait(WaitReason::StartRefused), None);
    }

    // Last choice: memory that other workers hold.
    let mut best: Option<(EvictionKey<'_>, usize, Vec<usize>)> = None;
    let mut wake: Option<Timestamp> = None;
    let mut any = false;
    for (place, pool, size) in places.with_file() {
        let needed = size.bytes;
        let devices = pool.devices.iter();
        for &device in devices.filter(|d| class.admits_device(d.device)) {
            any = true;
            let after = stopping(pool, device.device).saturating_add(device.free_bytes);
            if after >= needed {
                return (ClassDecision::Wait(WaitReason::Evicting), None);
            }
            if !world.settings.evict {
                continue;
            }
            let spare = next_spare(world, pool, device.device);
            wake = wake.into_iter().chain(spare).min();
            if let Some(victims) = victims(world, pool, device, needed) {
                let key = eviction_key(world, pool, device, &victims);
                if best.as_ref().is_none_or(|(known, ..)| key < *known) {
                    best = Some((key, place, victims));
                }
            }
        }
    }
    match best {
        Some((_, pool, workers)) => (ClassDecision::Evict { pool, workers }, None),
        None if any => (ClassDecision::Wait(WaitReason::MemoryShort), wake),
        None => (places.without_file(), None),
    }
}

/// Sort key of possible starts.
type StartKey<'a> = (bool, Rank, &'a str, Device);

/// Judges a class against all pools. `wish` holds the preferences of its first job. Returns with [`WaitReason::MemoryShort`] the
/// time from which a worker may be evicted.
pub(super) fn judge(
    class: &Class,
    wish: &Wish<'_>,
    pools: &[&PoolState],
    world: &World<'_>,
) -> (ClassDecision, Option<Timestamp>) {
    let known = || pools.iter().filter(|p| class.admits_pool(&p.id));
    if known().next().is_none() {
        return (ClassDecision::Wait(WaitReason::NoPool), None);
    }
    if !known().any(|p| alive(p)) {
        return (ClassDecision::Wait(WaitReason::PoolsAway), None);
    }
    let left = pools
        .iter()
        .enumerate()
        .filter(|(_, pool)| class.admits_pool(&pool.id) && alive(pool) && has_backend(class, pool));
    let left: Vec<_> = left.map(|(place, pool)| (place, *pool)).collect();
    if left.is_empty() {
        return (ClassDecision::Wait(WaitReason::NoBackend), None);
    }
    let workers = left.iter().flat_map(|&(place, pool)| {
        let own = pool.workers.iter().enumerate();
        own.map(move |(at, worker)| (place, pool, at, worker))
    });
    let mine = workers.filter(|(_, pool, _, worker)| {
        worker.status.is_live() && class.admits_worker(&pool.id, worker)
    });
    let all = AllPools {
        class,
        wish,
        pools,
        mine: mine.collect(),
        left,
        with_file: OnceCell::new(),
        world,
    };
    judge_places(&all, class, wish, world)
}

/// Every pool of a snapshot.
struct AllPools<'a> {
    class: &'a Class,
    wish: &'a Wish<'a>,
    pools: &'a [&'a PoolState],
    /// Pools that take work and have a backend for the class, with their indices.
    left: Vec<(usize, &'a PoolState)>,
    /// Live workers for the class on these pools: pool and worker, each after its index.
    mine: Vec<(usize, &'a PoolState, usize, &'a WorkerState)>,
    /// Result of [`Places::with_file`], kept because finding it is slow.
    with_file: OnceCell<Vec<(usize, &'a PoolState, StartSize)>>,
    world: &'a World<'a>,
}

impl Places for AllPools<'_> {
    fn free_worker(&self) -> Option<(usize, usize)> {
        let Self {
            class, wish, world, ..
        } = self;
        let free = self.mine.iter().filter(|(_, pool, _, w)| {
            class.finds_place(w, wish.cache) && !world.held.keeps(&pool.id, w)
        });
        let best = free.min_by_key(|(_, pool, _, worker)| {
            let rank = world.policy.rank_worker(&WorkerChoice { pool, worker });
            let unsure = !worker.surely_has_room(wish.cache);
            let cramped = worker.capacity() < wish.context;
            let elsewhere = wish.is_elsewhere(pool);
            (unsure, cramped, elsewhere, rank, &pool.id, &worker.id)
        });
        best.map(|&(pool, _, worker, _)| (pool, worker))
    }

    fn workers(&self) -> LiveWorkers {
        let any = |test: fn(&WorkerState) -> bool| self.mine.iter().any(|(.., w)| test(w));
        LiveWorkers {
            starting: any(|w| w.status == WorkerStatus::Starting),
            serving: any(WorkerState::serves),
        }
    }

    fn has_slot(&self) -> bool {
        self.mine.iter().any(|(.., worker)| worker.has_slot())
    }

    fn with_file(&self) -> impl Iterator<Item = (usize, &PoolState, StartSize)> {
        let find = || {
            let left = self.left.iter();
            let found =
                left.filter_map(|&(place, pool)| Some((place, pool, startable(self.class, pool)?)));
            found.collect()
        };
        self.with_file.get_or_init(find).iter().copied()
    }

    fn without_file(&self) -> ClassDecision {
        if self.with_file().next().is_some() {
            return ClassDecision::Wait(WaitReason::MemoryShort);
        }
        let mut left = self.left.iter();
        if left.any(|(_, pool)| usable(self.class, pool).is_some()) {
            return ClassDecision::Wait(WaitReason::ContextShort);
        }
        let Self {
            class,
            wish,
            pools,
            left,
            world,
            ..
        } = self;
        missing(class, wish, pools, left, world)
    }
}

/// Judges a class whose model no pool can start.
fn missing(
    class: &Class,
    wish: &Wish<'_>,
    pools: &[&PoolState],
    left: &[(usize, &PoolState)],
    world: &World<'_>,
) -> ClassDecision {
    let failure = left.iter().find_map(|(_, pool)| {
        let why = pool.start_failure(pool.model(&class.model)?)?;
        Some((&pool.id, why))
    });
    // An unreachable pool may have a good copy, and so may a pool that has not reported yet.
    let away = pools.iter().find(|p| {
        let may_have = p.liveness == PoolLiveness::Awaited || usable(class, p).is_some();
        class.admits_pool(&p.id) && !alive(p) && may_have
    });
    if let Some((pool, why)) = failure {
        return match away {
            Some(_) => ClassDecision::Wait(WaitReason::PoolsAway),
            None => ClassDecision::Reject {
                code: JobErrorCode::ModelFailed,
                message: format!("`{}` can't be started on pool `{pool}`: {why}", class.model),
            },
        };
    }
    let downloads = |pool: &PoolState| pool.downloads.iter().any(|d| d.model == class.model);
    if left.iter().any(|(_, pool)| downloads(pool)) {
        return ClassDecision::Wait(WaitReason::Downloading);
    }
    // If the file can be downloaded, waiting for an offline pool is pointless.
    let wanted = world
        .sizes
        .get(&class.model)
        .filter(|_| world.settings.download);
    match (wanted, away) {
        (None, None) => return ClassDecision::Wait(WaitReason::ModelMissing),
        (None, Some(_)) => return ClassDecision::Wait(WaitReason::PoolsAway),
        (Some(_), Some(pool)) if pool.liveness != PoolLiveness::Offline => {
            return ClassDecision::Wait(WaitReason::PoolsAway);
        }
        (Some(_), _) => {}
    }
    let size = wanted.copied().unwrap_or(u64::MAX);
    let possible = left.iter().filter_map(|&(index, pool)| {
        let device = rules::may_download(class.needs(), pool, size)?;
        Some((index, StartChoice { pool, device }))
    });
    let best = possible.min_by_key(|(_, choice)| {
        let rank = world.policy.rank_start(choice);
        (wish.is_elsewhere(choice.pool), rank, &choice.pool.id)
    });
    match best {
        Some((pool, _)) => ClassDecision::Download { pool },
        None => ClassDecision::Wait(WaitReason::DownloadRefused),
    }
}
