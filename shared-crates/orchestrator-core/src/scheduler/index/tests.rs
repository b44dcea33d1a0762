mod cases;

use std::collections::HashSet;

use pool_core::api::pool::ContextMemory;
use pool_core::worker::{ModelFile, WorkerStatus};
use proptest::prelude::*;

use super::*;
use crate::adopt::{self, Proposal};
use crate::job::{Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::{Capacity, QueueOrder};
use crate::scheduler::explain::Chooser;
use crate::scheduler::{
    BuiltIn, DeviceState, DownloadState, ModelState, Plan, RefusedDownload, RefusedStart,
    WorkerState, schedule,
};

const MODELS: [&str; 4] = ["m0", "m1", "m2", "m3"];

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

fn model(index: usize) -> ModelRef {
    MODELS[index % MODELS.len()].parse().unwrap()
}

fn device(index: usize) -> Device {
    ["cpu", "cuda:0"][index % 2].parse().unwrap()
}

fn file() -> ModelFile {
    ModelFile {
        size_bytes: 1,
        modified_ns: 1,
        sha256: None,
    }
}

/// A change of the world.
#[derive(Debug, Clone)]
enum Change {
    Put {
        model: usize,
        pool: Option<usize>,
        device: Option<usize>,
        batch: bool,
        session: Option<u8>,
        pause: Option<i64>,
        context: Option<u32>,
        cache: Option<u32>,
        max_tokens: u32,
    },
    Cancel(prop::sample::Index),
    Pool(Box<PoolState>),
    Leave(usize),
    Release(prop::sample::Index),
    Answer(prop::sample::Index),
    Lease(usize, usize),
    Time(i64),
    Nothing,
}

fn worker() -> impl Strategy<Value = WorkerState> {
    let status = prop_oneof![
        5 => Just(WorkerStatus::Ready),
        2 => Just(WorkerStatus::Busy),
        2 => Just(WorkerStatus::Starting),
        1 => Just(WorkerStatus::Draining),
        1 => Just(WorkerStatus::Failed),
    ];
    (
        status,
        0usize..4,
        0usize..2,
        (
            1u32..4,
            prop::option::of(prop::sample::select(vec![0u32, 300, 900])),
        ),
        1u64..4,
        prop::option::of(0i64..100),
        prop::option::of(0i64..100),
        prop::bool::weighted(0.1),
        (
            prop::bool::weighted(0.5),
            prop::option::of(prop::sample::select(vec![512u32, 1024, 2048])),
        ),
    )
        .prop_map(
            |(
                status,
                m,
                d,
                (slots, free_tokens),
                memory,
                ready,
                idle,
                full,
                (failed, context_length),
            )| {
                WorkerState {
                    id: String::new(),
                    model: model(m),
                    file: file(),
                    device: device(d),
                    status,
                    context_length,
                    slots,
                    active: 0,
                    free_tokens,
                    unanswered: 0,
                    full,
                    memory_bytes: memory * UNIT,
                    created_at: at(0),
                    ready_at: ready.map(at),
                    idle_since: idle.map(at),
                    last_turn: 0,
                    start_failure: (status == WorkerStatus::Failed && failed)
                        .then(|| "bad".to_owned()),
                }
            },
        )
}

/// Bytes of memory for 500 tokens of context.
const UNIT: u64 = 512;

/// Generates the longest context of a model; `None` if its pool reports none.
fn context() -> impl Strategy<Value = Option<u32>> {
    prop::option::of(prop::sample::select(vec![512u32, 1024, 2048]))
}

fn pool() -> impl Strategy<Value = PoolState> {
    let liveness = prop_oneof![
        8 => Just(PoolLiveness::Online),
        1 => Just(PoolLiveness::Suspect),
        1 => Just(PoolLiveness::Offline),
    ];
    (
        0usize..4,
        liveness,
        prop::bool::weighted(0.1),
        prop::collection::vec((0usize..2, 0u64..6), 0..3),
        prop::collection::vec(worker(), 0..4),
        prop::collection::btree_map(0usize..4, (1u64..5, context()), 0..4),
        prop::option::weighted(0.2, (0usize..4, 0usize..2, prop::option::of(Just(1024u32)))),
        prop::option::weighted(0.2, 0usize..4),
        (prop::option::weighted(0.2, 0usize..4), 0u64..4),
    )
        .prop_map(
            |(id, liveness, draining, devices, workers, models, start, download, downloads)| {
                let mut seen = HashSet::new();
                PoolState {
                    id: format!("p{id}"),
                    liveness,
                    draining,
                    devices: devices
                        .into_iter()
                        .filter(|(d, _)| seen.insert(*d))
                        .map(|(d, free_bytes)| DeviceState {
                            device: device(d),
                            free_bytes: free_bytes * UNIT,
                            total_bytes: 6 * UNIT,
                        })
                        .collect(),
                    workers: workers
                        .into_iter()
                        .enumerate()
                        .map(|(index, worker)| WorkerState {
                            id: format!("w{index}"),
                            ..worker
                        })
                        .collect(),
                    models: models
                        .into_iter()
                        .map(|(m, (needed, longest))| ModelState {
                            model: model(m),
                            file: file(),
                            needed_bytes: needed * UNIT,
                            context: longest.map(|max_tokens| ContextMemory {
                                max_tokens,
                                default_tokens: 512,
                                base_bytes: (needed - 1) * UNIT,
                                token_bytes: 1,
                                floor_bytes: 0,
                            }),
                        })
                        .collect(),
                    disk_free_bytes: (1 << 30) + downloads.1,
                    downloads: downloads
                        .0
                        .into_iter()
                        .map(|m| DownloadState {
                            model: model(m),
                            percent: None,
                        })
                        .collect(),
                    refused_starts: start
                        .into_iter()
                        .map(|(m, d, context_length)| RefusedStart {
                            model: model(m),
                            device: device(d),
                            context_length,
                            message: "no".into(),
                        })
                        .collect(),
                    refused_downloads: download
                        .into_iter()
                        .map(|m| RefusedDownload {
                            model: model(m),
                            message: "no".into(),
                        })
                        .collect(),
                    last_start: 0,
                }
            },
        )
}

fn change() -> impl Strategy<Value = Change> {
    let put = (
        0usize..4,
        prop::option::weighted(0.2, 0usize..4),
        prop::option::weighted(0.2, 0usize..2),
        any::<bool>(),
        prop::option::of(0u8..3),
        prop::option::weighted(0.1, 1i64..40),
        (
            prop::option::weighted(0.4, prop::sample::select(vec![500u32, 700, 1500, 3000])),
            prop::option::weighted(0.3, prop::sample::select(vec![200u32, 800, 1500])),
        ),
        prop::sample::select(vec![10u32, 600, 2000]),
    )
        .prop_map(
            |(model, pool, device, batch, session, pause, (context, cache), max_tokens)| {
                Change::Put {
                    model,
                    pool,
                    device,
                    batch,
                    session,
                    pause,
                    context,
                    cache,
                    max_tokens,
                }
            },
        );
    prop_oneof![
        6 => put,
        1 => any::<prop::sample::Index>().prop_map(Change::Cancel),
        4 => pool().prop_map(|pool| Change::Pool(Box::new(pool))),
        1 => (0usize..4).prop_map(Change::Leave),
        4 => any::<prop::sample::Index>().prop_map(Change::Release),
        2 => any::<prop::sample::Index>().prop_map(Change::Answer),
        1 => (0usize..4, 0usize..4).prop_map(|(p, w)| Change::Lease(p, w)),
        2 => (1i64..60).prop_map(Change::Time),
        1 => Just(Change::Nothing),
    ]
}

/// A random proposal of a script, independent of the snapshot.
#[derive(Debug, Clone)]
struct Wish {
    what: usize,
    job: prop::sample::Index,
    pool: prop::sample::Index,
    place: prop::sample::Index,
}

fn wish() -> impl Strategy<Value = Wish> {
    let index = any::<prop::sample::Index>;
    (0usize..4, index(), index(), index()).prop_map(|(what, job, pool, place)| Wish {
        what,
        job,
        pool,
        place,
    })
}

impl Wish {
    /// Returns the proposal for the jobs and places of this snapshot; `None` if they offer no such choice.
    fn proposal(&self, snapshot: &Snapshot, offered: &[usize]) -> Option<Proposal> {
        if offered.is_empty() || snapshot.pools.is_empty() {
            return None;
        }
        let job = offered[self.job.index(offered.len())];
        let pool = self.pool.index(snapshot.pools.len());
        let (workers, devices) = (&snapshot.pools[pool].workers, &snapshot.pools[pool].devices);
        let model = snapshot.jobs[job].model.clone();
        let worker = || (!workers.is_empty()).then(|| self.place.index(workers.len()));
        Some(match self.what {
            0 => Proposal::Dispatch {
                job,
                pool,
                worker: worker()?,
            },
            1 if !devices.is_empty() => Proposal::StartWorker {
                pool,
                device: devices[self.place.index(devices.len())].device,
                model,
                context_length: [None, Some(1024)][self.job.index(2)],
            },
            2 => Proposal::EvictWorker {
                pool,
                worker: worker()?,
                needed_by: model,
            },
            _ => Proposal::Wait {
                job,
                reason: "later".into(),
                again: None,
            },
        })
    }
}

/// An index under test, with the jobs and leases that the test expects.
struct Tested {
    index: Index,
    order: QueueOrder,
    now: i64,
    jobs: Vec<JobId>,
    /// Pool and worker of each lease, and whether the worker has answered.
    leases: Vec<(String, String, bool)>,
}

impl Tested {
    fn new(policy: BuiltIn, order: QueueOrder, settings: Settings) -> Self {
        let queue = order.queue(Capacity::default(), SignedDuration::from_secs(50));
        let sizes = [(model(0), 2 * UNIT), (model(1), 7 * UNIT)].into();
        Self {
            index: Index::new(queue, policy, settings, sizes, at(10)),
            order,
            now: 0,
            jobs: Vec::new(),
            leases: Vec::new(),
        }
    }

    fn change(&mut self, change: Change, id: JobId) {
        match change {
            Change::Put {
                model: m,
                pool,
                device: d,
                batch,
                session,
                pause,
                context,
                cache,
                max_tokens,
            } => {
                let job = QueuedJob {
                    id,
                    model: model(m),
                    priority: if batch {
                        Priority::Batch
                    } else {
                        Priority::Interactive
                    },
                    session_id: session.map(|s| format!("s{s}")),
                    created_at: at(self.now),
                    not_before: pause.map(|pause| at(self.now + pause)),
                    placement: Placement {
                        pool: pool.map(|p| format!("p{p}")),
                        device: d.map(device),
                    },
                    turn: None,
                    bytes: 1,
                    max_tokens,
                    context_needed: context,
                    cache_needed: cache,
                };
                self.jobs.push(job.id);
                self.index.put(job);
            }
            Change::Cancel(which) if !self.jobs.is_empty() => {
                let id = self.jobs.swap_remove(which.index(self.jobs.len()));
                self.index.remove(id);
            }
            Change::Pool(state) => self.index.set_pool(*state),
            Change::Leave(pool) => self.index.remove_pool(&format!("p{pool}")),
            Change::Release(which) if !self.leases.is_empty() => {
                let (pool, worker, answered) =
                    self.leases.swap_remove(which.index(self.leases.len()));
                self.index.release(&pool, &worker, answered, at(self.now));
            }
            Change::Answer(which) if !self.leases.is_empty() => {
                let lease = which.index(self.leases.len());
                let (pool, worker, answered) = &mut self.leases[lease];
                if !std::mem::replace(answered, true) {
                    self.index.answered(pool, worker);
                }
            }
            Change::Lease(pool, worker) => {
                let (pool, worker) = (format!("p{pool}"), format!("w{worker}"));
                self.index.lease(&pool, &worker);
                self.leases.push((pool, worker, true));
            }
            Change::Time(seconds) => self.now += seconds,
            _ => {}
        }
    }

    /// Records the effect of actions on jobs and leases.
    fn note(&mut self, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Dispatch { job, pool, worker } => {
                    self.leases.push((pool.clone(), worker.clone(), false));
                    self.jobs.retain(|id| id != job);
                }
                Action::Reject { job, .. } => self.jobs.retain(|id| id != job),
                _ => {}
            }
        }
    }

    /// Adopts the plan of a script that proposes `wishes`. Every proposal that the rules allow is carried out, and nothing
    /// else.
    fn adopt(&mut self, wishes: &[Wish]) -> Result<(), TestCaseError> {
        let now = at(self.now);
        let snapshot = self.index.snapshot(now);
        let built_in = schedule(&snapshot, self.index.policy);
        let offered = adopt::candidates(&snapshot, &built_in);
        let mut promised = adopt::Promised::default();
        let wishes = wishes.iter();
        let mut proposals: Vec<_> = wishes
            .filter_map(|wish| wish.proposal(&snapshot, &offered))
            .collect();
        proposals.retain(|proposal| promised.take(&snapshot, proposal).is_ok());
        let plan = adopt::adopt(
            &snapshot,
            self.index.policy,
            &built_in,
            &offered,
            &proposals,
        );
        let plan = plan.map_err(|refused| TestCaseError::fail(refused.to_string()))?;
        let pass = self.index.apply(&plan, Chooser::Script, now);
        prop_assert_eq!(&pass.actions, &plan.actions);
        let given = pass.actions.iter();
        let given = given.filter(|action| matches!(action, Action::Dispatch { .. }));
        prop_assert_eq!(given.count(), pass.why.len());
        self.note(&pass.actions);
        for id in &self.jobs {
            prop_assert!(plan.waiting.contains_key(id));
        }
        Ok(())
    }

    /// Returns a new index built only from this one's snapshot.
    fn made_anew(&mut self) -> Index {
        let snapshot = self.index.snapshot(at(self.now));
        let queue = self
            .order
            .queue(Capacity::default(), SignedDuration::from_secs(50));
        let mut fresh = Index::new(
            queue,
            self.index.policy_name,
            snapshot.settings,
            snapshot.sizes.clone(),
            snapshot.started_at,
        );
        fresh.turns = snapshot.turns;
        for (session, pool) in &snapshot.sessions {
            fresh
                .sessions
                .insert(session.clone(), (pool.as_str().into(), 0));
        }
        for pool in &snapshot.pools {
            fresh.last_starts.insert(pool.id.clone(), pool.last_start);
            let usage = pool.workers.iter().map(|worker| {
                let usage = WorkerUsage {
                    active: worker.active,
                    last_turn: worker.last_turn,
                    released_at: None,
                    unanswered: worker.unanswered,
                };
                (worker.id.clone(), usage)
            });
            fresh.away.insert(pool.id.clone(), usage.collect());
            fresh.set_pool(pool.as_ref().clone());
        }
        for job in &snapshot.jobs {
            fresh.put(job.as_ref().clone());
        }
        fresh
    }

    /// Makes a pass, and compares it with the reference implementation.
    fn pass(&mut self) -> Result<(), TestCaseError> {
        let now = at(self.now);
        let snapshot = self.index.snapshot(now);
        let plan = schedule(&snapshot, self.index.policy);
        let pass = self.index.pass(now);
        prop_assert_eq!(&pass.actions, &plan.actions);
        self.note(&pass.actions);
        prop_assert_eq!(plan.waiting.len(), self.jobs.len());
        for (id, explanation) in &plan.waiting {
            let waiting = self.index.waiting(*id, now).unwrap();
            prop_assert_eq!(&waiting.explanation, explanation);
            let place = self
                .index
                .queue
                .ordered(now)
                .iter()
                .position(|job| job.id == *id);
            prop_assert_eq!(Some(waiting.position), place.map(|place| place as u64));
        }
        let (mut fresh, mut stranded) = (self.made_anew(), Load::default());
        for job in &self.index.queue.ordered(now) {
            let nothing_runs_it = fresh.is_stranded(job);
            prop_assert_eq!(self.index.is_stranded(job), nothing_runs_it);
            if nothing_runs_it {
                stranded.add(job.bytes);
            }
        }
        prop_assert_eq!(self.index.stranded(), stranded);
        // The index may wake early, but never late.
        if let Some(wake) = plan.wake {
            prop_assert!(
                pass.wake.is_some_and(|at| at <= wake),
                "{:?} {wake}",
                pass.wake
            );
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // [ORCHCORE-066]
    #[test]
    fn the_index_decides_what_the_plain_function_decides(
        policy in prop::sample::select(BuiltIn::ALL.to_vec()),
        order in prop::sample::select(vec![QueueOrder::Fair, QueueOrder::Fifo]),
        evict in any::<bool>(),
        download in any::<bool>(),
        changes in prop::collection::vec((change(), prop::bool::weighted(0.4)), 1..80),
    ) {
        let settings = Settings {
            idle_ttl: Some(SignedDuration::from_secs(120)),
            min_residence: SignedDuration::from_secs(30),
            evict,
            download,
        };
        let mut tested = Tested::new(policy, order, settings);
        for (change, pass) in changes {
            tested.change(change, JobId::random());
            if pass {
                tested.pass()?;
            }
        }
        tested.pass()?;
        // Without changes there is nothing to do, except for actions that became possible at the end of the last pass.
        tested.pass()?;
        tested.pass()?;
    }
}

/// Generates proposals. Most lists are long enough to name everything in a small fleet.
fn wishes() -> impl Strategy<Value = Vec<Wish>> {
    prop::collection::vec(wish(), 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // [ORCHCORE-068] A plan from elsewhere leaves the index in the same state as a pass: later decisions equal those of the
    // reference implementation, and those of a new index built from the snapshot.
    #[test]
    fn a_plan_that_is_applied_leaves_nothing_behind(
        policy in prop::sample::select(BuiltIn::ALL.to_vec()),
        order in prop::sample::select(vec![QueueOrder::Fair, QueueOrder::Fifo]),
        evict in any::<bool>(),
        changes in prop::collection::vec((change(), prop::option::weighted(0.4, wishes()), prop::bool::weighted(0.2)), 1..60),
    ) {
        let settings = Settings {
            idle_ttl: Some(SignedDuration::from_secs(120)),
            min_residence: SignedDuration::from_secs(30),
            evict,
            download: true,
        };
        let mut tested = Tested::new(policy, order, settings);
        for (change, wishes, pass) in changes {
            tested.change(change, JobId::random());
            if let Some(wishes) = wishes {
                tested.adopt(&wishes)?;
                let now = at(tested.now);
                let mut fresh = tested.made_anew();
                prop_assert_eq!(&fresh.snapshot(now), &tested.index.snapshot(now));
                let anew = fresh.pass(now);
                let plan = schedule(&tested.index.snapshot(now), tested.index.policy);
                prop_assert_eq!(&anew.actions, &plan.actions);
            }
            if pass {
                tested.pass()?;
            }
        }
        tested.pass()?;
        tested.pass()?;
    }

    // [ORCHCORE-068] While it is recorded, a daemon decides with the reference implementation and applies the plan. The same
    // changes bring it to the same state as a daemon that is not recorded.
    #[test]
    fn to_decide_plainly_and_apply_the_plan_is_to_pass(
        policy in prop::sample::select(BuiltIn::ALL.to_vec()),
        order in prop::sample::select(vec![QueueOrder::Fair, QueueOrder::Fifo]),
        changes in prop::collection::vec((change(), prop::bool::weighted(0.4)), 1..60),
    ) {
        let new = || Tested::new(policy, order, Settings::default());
        let (mut passes, mut applies) = (new(), new());
        for (change, pass) in changes {
            let id = JobId::random();
            passes.change(change.clone(), id);
            applies.change(change, id);
            let now = at(passes.now);
            if pass {
                let plan = schedule(&applies.index.snapshot(now), applies.index.policy);
                let applied = applies.index.apply(&plan, Chooser::Policy(policy), now);
                let passed = passes.index.pass(now);
                prop_assert_eq!(&applied.actions, &passed.actions);
                prop_assert_eq!(&applied.why, &passed.why);
                prop_assert_eq!(applied.jobs, passed.jobs);
                passes.note(&passed.actions);
                applies.note(&passed.actions);
                for (id, explanation) in &plan.waiting {
                    let waiting = applies.index.waiting(*id, now).unwrap();
                    prop_assert_eq!(&waiting.explanation, explanation);
                }
            }
            prop_assert_eq!(applies.index.snapshot(now), passes.index.snapshot(now));
        }
    }
}
