//! Cost of a scheduling pass: `cargo bench -p orchestrator-core --bench scheduler`.
//!
//! The main fleet has the size that the project aims for: 1,000 pools with four workers each, 50 models with five of them on
//! each disk, and 10,000 waiting jobs. Smaller and larger fleets show how the cost grows.

use std::collections::BTreeMap;
use std::hint::black_box;

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use jiff::{SignedDuration, Timestamp};
use orchestrator_core::job::{JobId, Placement, Priority};
use orchestrator_core::pool::PoolLiveness;
use orchestrator_core::queue::{Capacity, QueueOrder, QueuedJob};
use orchestrator_core::scheduler::{
    BuiltIn, DeviceState, Index, ModelState, PoolState, Settings, WorkerState, schedule,
};
use pool_core::ModelRef;
use pool_core::worker::{Device, ModelFile, WorkerStatus};

const MODELS: usize = 50;
const GIB: u64 = 1 << 30;

fn now() -> Timestamp {
    Timestamp::from_second(1_000_000).expect("a time in range")
}

fn model(index: usize) -> ModelRef {
    format!("model-{}", index % MODELS)
        .parse()
        .expect("an alias")
}

fn file() -> ModelFile {
    ModelFile {
        size_bytes: GIB,
        modified_ns: 1,
        sha256: None,
    }
}

/// Returns a pool with full memory and four workers, of which the first `free` have a free slot.
fn pool(index: usize, free: usize) -> PoolState {
    let worker = |w: usize| WorkerState {
        id: format!("worker-cpu-{w}"),
        model: model(index * 4 + w),
        file: file(),
        device: Device::CPU,
        status: if w < free {
            WorkerStatus::Ready
        } else {
            WorkerStatus::Starting
        },
        context_length: Some(4096),
        slots: 1,
        active: 0,
        free_tokens: Some(8192),
        unanswered: 0,
        full: false,
        memory_bytes: 4 * GIB,
        created_at: now(),
        ready_at: Some(now()),
        idle_since: Some(now()),
        last_turn: 0,
        start_failure: None,
    };
    PoolState {
        id: format!("pool-{index:05}"),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![DeviceState {
            device: Device::CPU,
            free_bytes: index as u64,
            total_bytes: 32 * GIB,
        }],
        workers: (0..4).map(worker).collect(),
        models: (0..5)
            .map(|m| ModelState {
                model: model(index * 4 + m),
                file: file(),
                needed_bytes: 4 * GIB,
                context: None,
            })
            .collect(),
        disk_free_bytes: 0,
        downloads: Vec::new(),
        refused_starts: Vec::new(),
        refused_downloads: Vec::new(),
        last_start: 0,
    }
}

fn job(index: usize) -> QueuedJob {
    QueuedJob {
        id: JobId::random(),
        model: model(index),
        priority: if index.is_multiple_of(4) {
            Priority::Batch
        } else {
            Priority::Interactive
        },
        session_id: Some(format!("session-{}", index % 500)),
        created_at: now(),
        not_before: None,
        placement: Placement::default(),
        turn: None,
        bytes: 1000,
        max_tokens: 256,
        context_needed: None,
        cache_needed: None,
    }
}

/// Returns an index that has not made a pass yet. `free` is the number of workers per pool with a free slot.
fn index(pools: usize, jobs: usize, free: usize) -> Index {
    let queue = QueueOrder::Fair.queue(Capacity::default(), SignedDuration::from_mins(5));
    let mut index = Index::new(
        queue,
        BuiltIn::LeastLoaded,
        Settings::default(),
        BTreeMap::new(),
        now(),
    );
    (0..pools).for_each(|p| index.set_pool(pool(p, free)));
    (0..jobs).for_each(|j| index.put(job(j)));
    index
}

/// Measures the first pass, which evaluates everything, with a quarter of the slots free and with all of them free.
fn full_pass(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("full_pass");
    group.sample_size(20);
    for (pools, jobs) in [(250, 2_500), (500, 5_000), (1_000, 10_000), (2_000, 20_000)] {
        for free in [0, 1, 4] {
            let name = format!("{pools}_pools_{jobs}_jobs");
            group.bench_function(
                BenchmarkId::new(name, format!("{free}_of_4_free")),
                |bench| {
                    bench.iter_batched_ref(
                        || index(pools, jobs, free),
                        |index| black_box(index.pass(now())),
                        BatchSize::LargeInput,
                    );
                },
            );
        }
    }
    group.finish();
}

/// Measures the reference implementation on the same snapshots, for comparison with the index.
fn plain(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("plain_function");
    group.sample_size(10);
    for (pools, jobs) in [(250, 2_500), (500, 5_000), (1_000, 10_000)] {
        let snapshot = index(pools, jobs, 0).snapshot(now());
        group.bench_function(
            BenchmarkId::new("pass", format!("{pools}_pools")),
            |bench| {
                bench.iter(|| black_box(schedule(&snapshot, BuiltIn::LeastLoaded.policy())));
            },
        );
    }
    group.finish();
}

/// Measures the pass after a single change, in a fleet where every slot is taken and every job waits.
fn one_change(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pass_after_one_change");
    for (pools, jobs) in [(250, 2_500), (500, 5_000), (1_000, 10_000), (2_000, 20_000)] {
        let name = format!("{pools}_pools_{jobs}_jobs");
        let ready = || {
            let mut index = index(pools, jobs, 4);
            index.pass(now());
            index
        };

        let mut fleet = ready();
        group.bench_function(BenchmarkId::new("a_job_came", &name), |bench| {
            bench.iter(|| {
                let new = job(7);
                let id = new.id;
                fleet.put(new);
                black_box(fleet.pass(now()));
                fleet.remove(id);
            });
        });

        let mut fleet = ready();
        group.bench_function(BenchmarkId::new("a_slot_became_free", &name), |bench| {
            bench.iter(|| {
                // Another job replaces the one that gets the slot, so that the queue keeps its length.
                fleet.release("pool-00000", "worker-cpu-0", false, now());
                let pass = black_box(fleet.pass(now()));
                assert_eq!(pass.actions.len(), 1);
                fleet.put(job(0));
            });
        });

        let mut fleet = ready();
        let mut turn = 0;
        group.bench_function(BenchmarkId::new("a_pool_has_more_memory", &name), |bench| {
            bench.iter(|| {
                turn += 1;
                let mut changed = pool(0, 4);
                changed.devices[0].free_bytes = turn % GIB;
                fleet.set_pool(changed);
                black_box(fleet.pass(now()));
            });
        });
    }
    group.finish();
}

criterion_group!(benches, full_pass, plain, one_change);
criterion_main!(benches);
