//! Simulator, which runs a recorded workload under another policy on a virtual clock.
//!
//! It decides with the daemon's own code ([`crate::decide`]) and orders jobs with the daemon's own queue. The rest of the world
//! responds as it did in the trace:
//!
//! - Jobs arrive at their recorded times, and leave the queue without a worker if they did so in the trace.
//! - A job takes as long as its last attempt took, on any worker. A job that the trace never ran takes the median time of its
//!   model's jobs, or of all jobs.
//! - A worker loads for as long as the trace's workers of its model did, or for the time that reading its bytes at 500 MB/s
//!   takes. It has as many slots and as large a cache as they had.
//! - A job takes as much of its worker's cache as a worker counted, or as is estimated from its size. A worker without that
//!   room refuses the job.
//! - Pools come, go and drain, and have models and devices, as in the trace. Free memory depends on the policy's own workers.
//!
//! Lost attempts, refused starts and downloads are not simulated.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::api::scheduler::{Replay, Report, SimulateAnswer};
use crate::decide::{Costs, Decider};
use crate::job::JobId;
use crate::queue::{Capacity, JobQueue, QueueOrder, QueuedJob};
use crate::scheduler::{Action, BuiltIn, DeviceState, PoolState, Settings, Snapshot, WorkerState};
use crate::script::Script;
use crate::trace::{By, Line, Rebuild, Scribe, Trace};
use jiff::{SignedDuration, Timestamp};
use pool_core::ModelRef;
use pool_core::worker::{Device, WorkerStatus};

/// Waiting time above which a job counts as starved.
pub const STARVED: SignedDuration = SignedDuration::from_mins(5);
/// Time that the simulation continues after the trace: long enough to run the remaining jobs.
const AFTERWARDS: SignedDuration = SignedDuration::from_hours(24);
/// Load rate in bytes per second of a model whose loading the trace does not show.
const LOAD_RATE: u64 = 500_000_000;
/// Time that a worker takes to answer whether it takes a job.
const ANSWERING: SignedDuration = SignedDuration::from_millis(5);
/// Time that a worker takes to end and free its memory.
const ENDING: SignedDuration = SignedDuration::from_millis(100);

/// Reason that a trace can't be simulated.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SimulateError {
    /// The trace has no passes.
    #[error("the trace has no passes")]
    Empty,
    /// The trace contradicts itself.
    #[error("the trace contradicts itself: {0}")]
    Broken(String),
    /// The thread for the script could not be started.
    #[error("can't start a thread for the script: {0}")]
    NoThread(String),
    /// The simulation exceeded its time limit.
    #[error("the simulation took longer than {}", pool_core::kit::units::human_duration(*.0))]
    TooLong(Duration),
}

/// A job that got a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Id of the job.
    pub job: JobId,
    /// Time of arrival.
    pub arrived: Timestamp,
    /// Time of the dispatch.
    pub at: Timestamp,
    /// Name of the worker's pool.
    pub pool: String,
    /// Id of the worker on its pool.
    pub worker: String,
}

/// Outcome of a workload under a policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Simulation {
    /// Summary in numbers.
    pub report: Report,
    /// Placements of the individual jobs, in the order of their dispatch.
    pub placed: Vec<Placed>,
}

/// Time that a script may take for a pass. It is longer than in the daemon, because no jobs are waiting.
const SCRIPT_LIMIT: Duration = Duration::from_secs(5);

/// Plays the trace under each of the named built-in policies and each of the scripts, which come with the names for their
/// reports. Without policy names, plays the recorded policy if there is a script, otherwise all policies. Also replays the
/// trace and compares its decisions. Fails after `limit`.
pub fn compare(
    trace: &Trace,
    scripts: &[(String, Script)],
    names: &[BuiltIn],
    limit: Option<Duration>,
) -> Result<SimulateAnswer, SimulateError> {
    let begun = Instant::now();
    let left = || limit.map(|limit| limit.saturating_sub(begun.elapsed()));
    let costs = Costs::new(trace.header.costs.clone());
    let recorded = trace.header.policy.parse::<BuiltIn>();
    let names: Vec<BuiltIn> = match (names, scripts, &recorded) {
        ([], [_, ..], Ok(recorded)) => vec![*recorded],
        ([], ..) => BuiltIn::ALL.to_vec(),
        (names, ..) => names.to_vec(),
    };
    let mut reports = Vec::new();
    for name in names {
        let decider = Decider::built_in(name.policy());
        reports.push(play(trace, &decider, name.as_str(), left())?.report);
    }
    let policy = recorded.clone().unwrap_or_default().policy();
    let mut deciders = Vec::new();
    for (name, script) in scripts {
        let decider = Decider::script(policy, script.clone(), Arc::clone(&costs), SCRIPT_LIMIT)
            .map_err(|error| SimulateError::NoThread(error.to_string()))?;
        reports.push(play(trace, &decider, name, left())?.report);
        deciders.push(decider);
    }
    let replay = match recorded {
        Ok(policy) => Some(replay(trace, policy, &deciders, left())?),
        Err(_) => None,
    };
    Ok(SimulateAnswer { replay, reports })
}

/// Repeats the decision of every pass, with the built-in policy or the script that made it, and compares the results.
pub fn replay(
    trace: &Trace,
    policy: BuiltIn,
    scripts: &[Decider],
    limit: Option<Duration>,
) -> Result<Replay, SimulateError> {
    let begun = Instant::now();
    let mut result = Replay {
        passes: 0,
        equal: 0,
        skipped: 0,
        first_difference: None,
    };
    let (mut rebuild, mut scribe) = (Rebuild::default(), Scribe::default());
    let built_in = Decider::built_in(policy.policy());
    let same_policy = trace.header.policy == policy.as_str();
    let sha256 = |decider: &Decider| decider.source().map(|script| script.sha256().to_owned());
    for pass in &trace.passes {
        check_time(begun, limit)?;
        let snapshot = rebuild.next(&pass.saw).map_err(SimulateError::Broken)?;
        result.passes += 1;
        let recorded = &pass.decided;
        let script = scripts
            .iter()
            .find(|decider| sha256(decider) == recorded.script);
        let (by, plan) = match (recorded.by, script) {
            (By::Script, Some(script)) => {
                let decision = script.decide(&snapshot);
                (decision.by, decision.plan)
            }
            // The timeout or refusal of a run can't be reproduced, but the fallback decision that followed can.
            (by @ (By::BuiltIn | By::Fallback(_)), _) if same_policy => {
                (by, built_in.decide(&snapshot).plan)
            }
            _ => {
                result.skipped += 1;
                scribe.skip(recorded);
                continue;
            }
        };
        let decided = scribe.write(&snapshot, &plan, by, recorded.script.as_deref());
        let line = serde_json::to_string(&Line::Decided(decided)).unwrap_or_default();
        if line == pass.decided_line {
            result.equal += 1;
        } else if result.first_difference.is_none() {
            result.first_difference = Some(recorded.pass);
        }
    }
    Ok(result)
}

fn check_time(begun: Instant, limit: Option<Duration>) -> Result<(), SimulateError> {
    match limit {
        Some(limit) if begun.elapsed() > limit => Err(SimulateError::TooLong(limit)),
        _ => Ok(()),
    }
}

/// The world as a trace describes it: recorded events, and the durations of jobs and loads.
struct World {
    begin: Timestamp,
    end: Timestamp,
    started_at: Timestamp,
    settings: Settings,
    sizes: BTreeMap<ModelRef, u64>,
    order: QueueOrder,
    promote_after: SignedDuration,
    arrivals: Vec<(Timestamp, Arc<QueuedJob>)>,
    /// Jobs that left the queue without a worker, with the time.
    left: HashMap<JobId, Timestamp>,
    service: HashMap<JobId, SignedDuration>,
    service_by_model: HashMap<ModelRef, SignedDuration>,
    service_of_all: SignedDuration,
    loading: HashMap<ModelRef, SignedDuration>,
    slots: HashMap<ModelRef, u32>,
    /// Most free tokens that a worker of the model ever reported, as the size of its cache.
    cache: HashMap<ModelRef, u32>,
    /// Tokens that jobs take in a cache, if a worker has counted them.
    needed: HashMap<JobId, u32>,
    pools: Vec<(Timestamp, PoolChange)>,
}

enum PoolChange {
    Is(Arc<PoolState>),
    Gone(String),
}

fn median(mut values: Vec<SignedDuration>) -> Option<SignedDuration> {
    values.sort_unstable();
    values.get(values.len() / 2).copied()
}

impl World {
    fn read(trace: &Trace) -> Result<Self, SimulateError> {
        let (Some(first), Some(last)) = (trace.passes.first(), trace.passes.last()) else {
            return Err(SimulateError::Empty);
        };
        let begin = first.saw.now;
        let mut rebuild = Rebuild::default();
        let mut known: HashMap<JobId, Arc<QueuedJob>> = HashMap::new();
        let (mut arrivals, mut pools) = (Vec::new(), Vec::new());
        let mut left: HashMap<JobId, Timestamp> = HashMap::new();
        let mut leased: HashMap<JobId, Timestamp> = HashMap::new();
        let mut service: HashMap<JobId, SignedDuration> = HashMap::new();
        let mut slots: HashMap<ModelRef, u32> = HashMap::new();
        let mut cache: HashMap<ModelRef, u32> = HashMap::new();
        let mut needed: HashMap<JobId, u32> = HashMap::new();
        // Start of each worker that was seen loading.
        let mut loading_since: HashMap<(String, String), Timestamp> = HashMap::new();
        let mut loads: HashMap<ModelRef, Vec<SignedDuration>> = HashMap::new();
        let mut snapshot = None;
        for pass in &trace.passes {
            let (saw, now) = (&pass.saw, pass.saw.now);
            for (_, job) in &saw.jobs {
                left.remove(&job.id);
                needed.extend(job.cache_needed.map(|tokens| (job.id, tokens)));
                known.entry(job.id).or_insert_with(|| {
                    arrivals.push((job.created_at.clamp(begin, now), Arc::clone(job)));
                    Arc::clone(job)
                });
            }
            let gone = saw.jobs_gone.iter().filter(|id| !leased.contains_key(id));
            left.extend(gone.map(|id| (*id, now)));
            for id in &saw.freed {
                if let Some(since) = leased.remove(id) {
                    service.insert(*id, now.duration_since(since));
                }
            }
            for lease in &saw.leased {
                left.remove(&lease.job);
                // The decision that led to the lease was slightly earlier, but only the next pass shows the lease.
                leased.insert(lease.job, now);
            }
            for pool in &saw.pools {
                pools.push((now, PoolChange::Is(Arc::clone(pool))));
                for worker in &pool.workers {
                    let key = (pool.id.clone(), worker.id.clone());
                    if worker.status == WorkerStatus::Starting && !worker.id.is_empty() {
                        loading_since.entry(key).or_insert(worker.created_at);
                    } else if worker.serves() {
                        slots.insert(worker.model.clone(), worker.slots);
                        if let Some(free) = worker.free_tokens {
                            let most = cache.entry(worker.model.clone()).or_default();
                            *most = free.max(*most);
                        }
                        if let Some(since) = loading_since.remove(&key) {
                            let ready = worker.ready_at.unwrap_or(now);
                            let took = ready.duration_since(since).max(SignedDuration::ZERO);
                            loads.entry(worker.model.clone()).or_default().push(took);
                        }
                    }
                }
            }
            for id in &saw.pools_gone {
                pools.push((now, PoolChange::Gone(id.clone())));
            }
            for action in &pass.decided.actions {
                if let Action::Dispatch { job, .. } = action {
                    left.remove(job);
                    leased.insert(*job, now);
                }
            }
            snapshot = Some(rebuild.next(saw).map_err(SimulateError::Broken)?);
        }
        let snapshot = snapshot.ok_or(SimulateError::Empty)?;
        // A job whose attempt is still running at the end of the trace took at least until then.
        for (id, since) in leased {
            service
                .entry(id)
                .or_insert_with(|| last.saw.now.duration_since(since));
        }
        left.retain(|id, _| !service.contains_key(id));
        let mut by_model: HashMap<ModelRef, Vec<SignedDuration>> = HashMap::new();
        for (id, took) in &service {
            if let Some(job) = known.get(id) {
                by_model.entry(job.model.clone()).or_default().push(*took);
            }
        }
        let of_all = median(service.values().copied().collect());
        Ok(Self {
            begin,
            end: last.saw.now,
            started_at: snapshot.started_at,
            settings: snapshot.settings,
            sizes: snapshot.sizes.clone(),
            order: trace.header.order,
            promote_after: SignedDuration::from_secs(
                i64::try_from(trace.header.promote_after_s).unwrap_or(i64::MAX),
            ),
            arrivals,
            left,
            service,
            service_by_model: medians(by_model),
            service_of_all: of_all.unwrap_or(SignedDuration::from_secs(1)),
            loading: medians(loads),
            slots,
            cache,
            needed,
            pools,
        })
    }

    fn service(&self, job: &QueuedJob) -> SignedDuration {
        let of_model = || self.service_by_model.get(&job.model).copied();
        let own = self.service.get(&job.id).copied();
        own.or_else(of_model).unwrap_or(self.service_of_all)
    }

    /// Returns the tokens that the job takes in its worker's cache.
    fn needed(&self, job: &QueuedJob) -> u32 {
        let counted = self.needed.get(&job.id).copied();
        counted.unwrap_or_else(|| job.context_wished())
    }

    fn loading(&self, model: &ModelRef, bytes: u64) -> SignedDuration {
        let by_size = || {
            let ms = bytes.saturating_mul(1000) / LOAD_RATE;
            SignedDuration::from_millis(i64::try_from(ms).unwrap_or(i64::MAX))
        };
        self.loading.get(model).copied().unwrap_or_else(by_size)
    }
}

fn medians(of: HashMap<ModelRef, Vec<SignedDuration>>) -> HashMap<ModelRef, SignedDuration> {
    of.into_iter()
        .filter_map(|(model, values)| Some((model, median(values)?)))
        .collect()
}

/// An event on the virtual clock. The order of variants decides between events at the same time.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Pool(usize),
    Finished {
        job: JobId,
        tokens: u32,
        pool: String,
        worker: String,
    },
    Ended {
        pool: String,
        worker: String,
    },
    Ready {
        pool: String,
        worker: String,
    },
    Arrives(usize),
    Leaves(JobId),
    Wake,
}

struct Sim<'a> {
    world: &'a World,
    decider: &'a Decider,
    clock: Timestamp,
    events: BinaryHeap<Reverse<(Timestamp, Event)>>,
    queue: Box<dyn JobQueue>,
    /// Pools as recorded, with the policy's own workers.
    pools: BTreeMap<String, PoolState>,
    /// Bytes that workers may take in total, by pool and device.
    room: HashMap<(String, Device), u64>,
    /// Recorded workers that the policy under test may use.
    shown: HashSet<(String, String)>,
    sessions: BTreeMap<String, String>,
    turns: u64,
    started: u64,
    wakes: BTreeSet<Timestamp>,
    placed: Vec<Placed>,
    report: Report,
    idle_byte_ms: u128,
    last_done: Timestamp,
}

/// Plays the trace's workload under the policy. Fails after `limit`.
pub fn play(
    trace: &Trace,
    decider: &Decider,
    name: &str,
    limit: Option<Duration>,
) -> Result<Simulation, SimulateError> {
    let begun = Instant::now();
    let world = World::read(trace)?;
    let mut sim = Sim::new(&world, decider, name);
    let horizon = world.end.checked_add(AFTERWARDS).unwrap_or(Timestamp::MAX);
    while let Some(Reverse((at, event))) = sim.events.pop() {
        if at > horizon {
            break;
        }
        check_time(begun, limit)?;
        sim.advance(at);
        sim.happen(event);
        // Simultaneous events are handled by a single pass, as the daemon handles a burst.
        while let Some(Reverse((next, _))) = sim.events.peek()
            && *next == at
        {
            if let Some(Reverse((_, event))) = sim.events.pop() {
                sim.happen(event);
            }
        }
        sim.pass();
        if at > world.end && sim.queue.line().is_empty() && sim.nothing_runs() {
            break;
        }
    }
    Ok(sim.finish())
}

impl<'a> Sim<'a> {
    fn new(world: &'a World, decider: &'a Decider, name: &str) -> Self {
        let mut events = BinaryHeap::new();
        for (index, (at, _)) in world.arrivals.iter().enumerate() {
            events.push(Reverse((*at, Event::Arrives(index))));
        }
        for (index, (at, _)) in world.pools.iter().enumerate() {
            events.push(Reverse((*at, Event::Pool(index))));
        }
        for (job, at) in &world.left {
            events.push(Reverse((*at, Event::Leaves(*job))));
        }
        Self {
            world,
            decider,
            clock: world.begin,
            events,
            queue: world.order.queue(Capacity::default(), world.promote_after),
            pools: BTreeMap::new(),
            room: HashMap::new(),
            shown: HashSet::new(),
            sessions: BTreeMap::new(),
            turns: 0,
            started: 0,
            wakes: BTreeSet::new(),
            placed: Vec::new(),
            report: Report {
                policy: name.to_owned(),
                jobs: world.arrivals.len() as u64,
                dispatched: 0,
                wait_p50_ms: 0,
                wait_p95_ms: 0,
                wait_p99_ms: 0,
                worker_starts: 0,
                evictions: 0,
                starved: 0,
                idle_memory_bytes: 0,
                makespan_ms: 0,
                passes: 0,
                fallbacks: 0,
            },
            idle_byte_ms: 0,
            last_done: world.begin,
        }
    }

    fn at(&mut self, pause: SignedDuration, event: Event) {
        let at = self.clock.checked_add(pause).unwrap_or(Timestamp::MAX);
        self.events.push(Reverse((at, event)));
    }

    /// Advances the clock, and adds up the memory that was idle meanwhile.
    fn advance(&mut self, to: Timestamp) {
        let ms = to.duration_since(self.clock).as_millis().max(0);
        if self.work_is_left() {
            let idle = self
                .pools
                .values()
                .flat_map(|pool| &pool.workers)
                .filter(|w| w.serves() && w.active == 0)
                .map(|w| u128::from(w.memory_bytes));
            self.idle_byte_ms += idle.sum::<u128>() * ms.unsigned_abs();
        }
        self.clock = to;
    }

    fn work_is_left(&self) -> bool {
        self.clock < self.world.end || !self.queue.line().is_empty() || !self.nothing_runs()
    }

    fn nothing_runs(&self) -> bool {
        let workers = self.pools.values().flat_map(|pool| &pool.workers);
        workers.into_iter().all(|w| w.active == 0)
    }

    fn worker(&mut self, pool: &str, worker: &str) -> Option<&mut WorkerState> {
        let pool = self.pools.get_mut(pool)?;
        pool.workers.iter_mut().find(|w| w.id == worker)
    }

    fn happen(&mut self, event: Event) {
        let world = self.world;
        match event {
            Event::Arrives(index) => {
                let mut job = world.arrivals[index].1.as_ref().clone();
                (job.turn, job.not_before) = (None, None);
                self.queue.put_back(job);
            }
            Event::Leaves(job) => {
                self.queue.remove(job);
            }
            Event::Pool(index) => match &world.pools[index].1 {
                PoolChange::Is(pool) => self.show(pool),
                PoolChange::Gone(id) => {
                    // Its running jobs end as recorded, because lost attempts are not simulated.
                    if let Some(pool) = self.pools.get_mut(id) {
                        pool.draining = true;
                    }
                }
            },
            Event::Ready { pool, worker } => {
                let now = self.clock;
                if let Some(state) = self.worker(&pool, &worker) {
                    state.status = WorkerStatus::Ready;
                    state.ready_at = Some(now);
                    state.idle_since = Some(now);
                }
            }
            Event::Finished {
                pool,
                worker,
                tokens,
                ..
            } => {
                let now = self.clock;
                self.last_done = now;
                if let Some(state) = self.worker(&pool, &worker) {
                    state.active = state.active.saturating_sub(1);
                    let all = world.cache.get(&state.model).copied().unwrap_or(u32::MAX);
                    let free = state.free_tokens;
                    state.free_tokens = free.map(|free| free.saturating_add(tokens).min(all));
                    if state.active == 0 {
                        state.idle_since = Some(now);
                        if state.status == WorkerStatus::Busy {
                            state.status = WorkerStatus::Ready;
                        }
                    }
                }
            }
            Event::Ended { pool, worker } => {
                if let Some(pool) = self.pools.get_mut(&pool) {
                    pool.workers.retain(|w| w.id != worker);
                }
                self.account(&pool);
            }
            Event::Wake => {
                self.wakes.remove(&self.clock);
            }
        }
    }

    /// Updates a pool to its recorded state, except for effects of the recorded policy.
    fn show(&mut self, recorded: &Arc<PoolState>) {
        let held = |device: Device| {
            let on = move |w: &&WorkerState| w.device == device && w.status.is_live();
            recorded.workers.iter().filter(on).map(|w| w.memory_bytes)
        };
        for state in &recorded.devices {
            let room = held(state.device).fold(state.free_bytes, u64::saturating_add);
            self.room.insert((recorded.id.clone(), state.device), room);
        }
        let known = self.pools.remove(&recorded.id);
        let first = known.is_none();
        let mut workers = known.map(|pool| pool.workers).unwrap_or_default();
        for worker in &recorded.workers {
            let key = (recorded.id.clone(), worker.id.clone());
            // Workers that existed before the recording are part of the world. Later ones came from the recorded policy's
            // decisions, and the policy under test makes its own.
            let comes_up = worker.serves() || worker.status == WorkerStatus::Starting;
            if first && comes_up && !worker.id.is_empty() && self.shown.insert(key) {
                let mut worker = worker.clone();
                worker.active = 0;
                worker.last_turn = 0;
                worker.free_tokens = self.world.cache.get(&worker.model).copied();
                if worker.serves() {
                    worker.status = WorkerStatus::Ready;
                    worker.idle_since = worker.idle_since.or(Some(self.clock));
                } else {
                    let loading = self.world.loading(&worker.model, worker.memory_bytes);
                    let (pool, worker) = (recorded.id.clone(), worker.id.clone());
                    self.at(loading, Event::Ready { pool, worker });
                }
                workers.push(worker);
            }
        }
        let pool = PoolState {
            workers,
            downloads: Vec::new(),
            refused_starts: Vec::new(),
            refused_downloads: Vec::new(),
            last_start: 0,
            ..recorded.as_ref().clone()
        };
        self.pools.insert(recorded.id.clone(), pool);
        self.account(&recorded.id);
    }

    /// Updates the free memory of the pool's devices: the total room minus the memory of the workers.
    fn account(&mut self, pool: &str) {
        let Some(state) = self.pools.get_mut(pool) else {
            return;
        };
        let workers = &state.workers;
        for device in &mut state.devices {
            let on = |w: &&WorkerState| w.device == device.device && w.status.is_live();
            let held = workers.iter().filter(on).map(|w| w.memory_bytes);
            let room = self.room.get(&(pool.to_owned(), device.device));
            let free = room.copied().unwrap_or(0);
            *device = DeviceState {
                free_bytes: held.fold(free, u64::saturating_sub),
                ..*device
            };
        }
    }

    fn pass(&mut self) {
        let snapshot = Arc::new(Snapshot {
            now: self.clock,
            started_at: self.world.started_at,
            settings: Settings {
                download: false,
                ..self.world.settings
            },
            jobs: self.queue.ordered(self.clock),
            pools: self.pools.values().cloned().map(Arc::new).collect(),
            sessions: self.sessions.clone(),
            sizes: self.world.sizes.clone(),
            turns: self.turns,
        });
        let decision = self.decider.decide(&snapshot);
        self.report.passes += 1;
        self.report.fallbacks += u64::from(matches!(decision.by, By::Fallback(_)));
        for action in decision.plan.actions {
            self.act(action);
        }
        let wake = decision.plan.wake.filter(|at| *at > self.clock);
        if let Some(at) = wake.filter(|at| self.wakes.insert(*at)) {
            self.events.push(Reverse((at, Event::Wake)));
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Dispatch { job, pool, worker } => {
                let Some(queued) = self.queue.take(job) else {
                    return;
                };
                self.turns += 1;
                let turn = self.turns;
                let tokens = self.world.needed(&queued);
                let state = self.worker(&pool, &worker);
                if state.is_some_and(|state| !state.has_room(tokens)) {
                    self.at(ANSWERING, Event::Wake);
                    self.queue.put_back(QueuedJob {
                        cache_needed: Some(tokens),
                        ..queued.as_ref().clone()
                    });
                    return;
                }
                self.placed.push(Placed {
                    job,
                    arrived: queued.created_at.max(self.world.begin),
                    at: self.clock,
                    pool: pool.clone(),
                    worker: worker.clone(),
                });
                self.report.dispatched += 1;
                if let Some(session) = &queued.session_id {
                    self.sessions.insert(session.clone(), pool.clone());
                }
                if let Some(state) = self.worker(&pool, &worker) {
                    state.take_slot(turn, tokens);
                    let others_wait = state.is_short();
                    state.unanswered = 0;
                    state.status = WorkerStatus::Busy;
                    if others_wait {
                        self.at(ANSWERING, Event::Wake);
                    }
                }
                let service = self.world.service(&queued);
                let finished = Event::Finished {
                    job,
                    tokens,
                    pool,
                    worker,
                };
                self.at(service, finished);
            }
            Action::StartWorker {
                pool,
                model,
                device,
                context_length,
            } => {
                self.turns += 1;
                self.started += 1;
                let (id, turn, now) = (
                    format!("worker-sim-{}", self.started),
                    self.turns,
                    self.clock,
                );
                let slots = self.world.slots.get(&model).copied().unwrap_or(1);
                let Some(state) = self.pools.get_mut(&pool) else {
                    return;
                };
                let Some(file) = state.model(&model).cloned() else {
                    return;
                };
                state.last_start = turn;
                state.workers.push(WorkerState {
                    id: id.clone(),
                    slots,
                    free_tokens: self.world.cache.get(&model).copied(),
                    ..WorkerState::asked_for(&file, device, context_length, now)
                });
                self.report.worker_starts += 1;
                self.account(&pool);
                let loading = self.world.loading(&model, file.bytes(context_length));
                self.at(loading, Event::Ready { pool, worker: id });
            }
            Action::EvictWorker { pool, worker, .. } | Action::UnloadWorker { pool, worker } => {
                self.report.evictions += 1;
                if let Some(state) = self.worker(&pool, &worker) {
                    state.status = WorkerStatus::Draining;
                }
                self.at(ENDING, Event::Ended { pool, worker });
            }
            Action::Download { .. } => {}
            Action::Reject { job, .. } => {
                self.queue.remove(job);
            }
        }
    }

    fn finish(mut self) -> Simulation {
        let mut waits: Vec<SignedDuration> = self
            .placed
            .iter()
            .map(|placed| placed.at.duration_since(placed.arrived))
            .collect();
        waits.sort_unstable();
        let ms = |wait: SignedDuration| u64::try_from(wait.as_millis()).unwrap_or(0);
        let percentile = |of: usize| {
            let last = waits.len().checked_sub(1)?;
            waits
                .get((waits.len() * of).div_ceil(100).clamp(1, last + 1) - 1)
                .copied()
        };
        self.report.wait_p50_ms = percentile(50).map_or(0, ms);
        self.report.wait_p95_ms = percentile(95).map_or(0, ms);
        self.report.wait_p99_ms = percentile(99).map_or(0, ms);
        let late = waits.iter().filter(|wait| **wait > STARVED).count();
        self.report.starved = (late + self.queue.line().len()) as u64;
        let until = self.last_done.max(self.world.end);
        let ms_in_all = until.duration_since(self.world.begin).as_millis().max(1);
        let idle = self.idle_byte_ms / ms_in_all.unsigned_abs();
        self.report.idle_memory_bytes = u64::try_from(idle).unwrap_or(u64::MAX);
        self.report.makespan_ms = ms(self.last_done.duration_since(self.world.begin));
        Simulation {
            report: self.report,
            placed: self.placed,
        }
    }
}

#[cfg(test)]
mod tests;
