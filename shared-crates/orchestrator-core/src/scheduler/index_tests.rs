use proptest::prelude::*;

use super::*;
use crate::job::{Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::Capacity;
use crate::scheduler::{
    BuiltIn, DeviceState, DownloadState, ModelState, RefusedDownload, RefusedStart, schedule,
};
use pool_core::worker::ModelFile;

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

/// One thing that happens.
#[derive(Debug, Clone)]
enum Change {
    Put {
        model: usize,
        pool: Option<usize>,
        device: Option<usize>,
        batch: bool,
        session: Option<u8>,
        pause: Option<i64>,
    },
    Cancel(prop::sample::Index),
    Pool(Box<PoolState>),
    Leave(usize),
    Release(prop::sample::Index),
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
        1u32..3,
        1u64..4,
        prop::option::of(0i64..100),
        prop::option::of(0i64..100),
        prop::bool::weighted(0.1),
        prop::bool::weighted(0.5),
    )
        .prop_map(
            |(status, m, d, slots, memory_bytes, ready, idle, full, failed)| WorkerState {
                id: String::new(),
                model: model(m),
                file: file(),
                device: device(d),
                status,
                slots,
                active: 0,
                full,
                memory_bytes,
                created_at: at(0),
                ready_at: ready.map(at),
                idle_since: idle.map(at),
                last_turn: 0,
                start_failure: (status == WorkerStatus::Failed && failed).then(|| "bad".to_owned()),
            },
        )
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
        prop::collection::btree_map(0usize..4, 1u64..5, 0..4),
        prop::option::weighted(0.2, (0usize..4, 0usize..2)),
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
                            free_bytes,
                            total_bytes: 6,
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
                        .map(|(m, needed_bytes)| ModelState {
                            model: model(m),
                            file: file(),
                            needed_bytes,
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
                        .map(|(m, d)| RefusedStart {
                            model: model(m),
                            device: device(d),
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
    )
        .prop_map(|(model, pool, device, batch, session, pause)| Change::Put {
            model,
            pool,
            device,
            batch,
            session,
            pause,
        });
    prop_oneof![
        6 => put,
        1 => any::<prop::sample::Index>().prop_map(Change::Cancel),
        4 => pool().prop_map(|pool| Change::Pool(Box::new(pool))),
        1 => (0usize..4).prop_map(Change::Leave),
        4 => any::<prop::sample::Index>().prop_map(Change::Release),
        1 => (0usize..4, 0usize..4).prop_map(|(p, w)| Change::Lease(p, w)),
        2 => (1i64..60).prop_map(Change::Time),
        1 => Just(Change::Nothing),
    ]
}

/// An index, and what the test has to know of it.
struct Tested {
    index: Index,
    now: i64,
    jobs: Vec<JobId>,
    leases: Vec<(String, String)>,
}

impl Tested {
    fn new(policy: BuiltIn, settings: Settings) -> Self {
        let queue = FairQueue::new(Capacity::default(), SignedDuration::from_secs(50));
        let sizes = [(model(0), 2), (model(1), 7)].into();
        Self {
            index: Index::new(queue, policy, settings, sizes, at(10)),
            now: 0,
            jobs: Vec::new(),
            leases: Vec::new(),
        }
    }

    fn apply(&mut self, change: Change) {
        match change {
            Change::Put {
                model: m,
                pool,
                device: d,
                batch,
                session,
                pause,
            } => {
                let job = QueuedJob {
                    id: JobId::random(),
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
                    max_tokens: 256,
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
                let (pool, worker) = self.leases.swap_remove(which.index(self.leases.len()));
                self.index.release(&pool, &worker, at(self.now));
            }
            Change::Lease(pool, worker) => {
                let (pool, worker) = (format!("p{pool}"), format!("w{worker}"));
                self.index.lease(&pool, &worker);
                self.leases.push((pool, worker));
            }
            Change::Time(seconds) => self.now += seconds,
            _ => {}
        }
    }

    /// Makes a pass, and compares it with the plain function.
    fn pass(&mut self) -> Result<(), TestCaseError> {
        let now = at(self.now);
        let snapshot = self.index.snapshot(now);
        let plan = schedule(&snapshot, self.index.policy);
        let pass = self.index.pass(now);
        prop_assert_eq!(&pass.actions, &plan.actions);
        for action in &pass.actions {
            match action {
                Action::Dispatch { job, pool, worker } => {
                    self.leases.push((pool.clone(), worker.clone()));
                    self.jobs.retain(|id| id != job);
                }
                Action::Reject { job, .. } => self.jobs.retain(|id| id != job),
                _ => {}
            }
        }
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
        // It may wake early, never late.
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

// [ORCHCORE-062] What a pool says of a worker's idleness may be older than our own leases.
#[test]
fn idleness_counts_from_the_end_of_the_latest_lease() {
    let settings = Settings {
        idle_ttl: Some(SignedDuration::from_secs(120)),
        ..Settings::default()
    };
    let mut index = Tested::new(BuiltIn::LeastLoaded, settings).index;
    let worker = WorkerState {
        id: "w0".into(),
        ..WorkerState::asked_for(
            &ModelState {
                model: model(0),
                file: file(),
                needed_bytes: 1,
            },
            device(0),
            at(0),
        )
    };
    index.set_pool(PoolState {
        id: "p0".into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![],
        workers: vec![WorkerState {
            status: WorkerStatus::Ready,
            idle_since: Some(at(0)),
            ..worker
        }],
        models: vec![],
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    });
    index.lease("p0", "w0");
    assert_eq!(index.pass(at(119)).actions, []);
    assert_eq!(index.pass(at(130)).actions, []);
    index.release("p0", "w0", at(140));
    let pass = index.pass(at(150));
    assert_eq!((pass.actions, pass.wake), (vec![], Some(at(260))));
    let unload = Action::UnloadWorker {
        pool: "p0".into(),
        worker: "w0".into(),
    };
    assert_eq!(index.pass(at(260)).actions, [unload]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    // [ORCHCORE-066]
    #[test]
    fn the_index_decides_what_the_plain_function_decides(
        policy in prop::sample::select(BuiltIn::ALL.to_vec()),
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
        let mut tested = Tested::new(policy, settings);
        for (change, pass) in changes {
            tested.apply(change);
            if pass {
                tested.pass()?;
            }
        }
        tested.pass()?;
        // Nothing has changed: nothing is left to do, but what the end of the last pass made possible.
        tested.pass()?;
        tested.pass()?;
    }
}
