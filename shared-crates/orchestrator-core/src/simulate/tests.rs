use pool_core::worker::ModelFile;

use super::*;
use crate::decide::Costs;
use crate::job::{Placement, Priority};
use crate::pool::PoolLiveness;
use crate::queue::QueueOrder;
use crate::scheduler::{LeastLoaded, ModelState, schedule};
use crate::script::Script;
use crate::trace::{By, Header, HeldSlot, PassRecord, Recorder, VERSION};

const GIB: u64 = 1 << 30;
/// Only a hanging script takes this long.
const LONG: Duration = Duration::from_secs(30);

const SHORTEST_FIRST: &[u8] =
    include_bytes!("../../../../bin/orchestratord/policies/shortest-job-first.rhai");
const TOGETHER: &[u8] =
    include_bytes!("../../../../bin/orchestratord/policies/keep-model-together.rhai");
const BY_COST: &[u8] =
    include_bytes!("../../../../bin/orchestratord/policies/prefer-host-by-cost.rhai");

fn at(ms: i64) -> Timestamp {
    Timestamp::from_millisecond(1_000_000_000 + ms).unwrap()
}

fn id(number: u64) -> JobId {
    format!("job-01900000-0000-7000-8000-{number:012}")
        .parse()
        .unwrap()
}

fn model(name: &str, gib: u64) -> ModelState {
    ModelState {
        model: name.parse().unwrap(),
        file: ModelFile {
            size_bytes: gib * GIB,
            modified_ns: 1,
            sha256: None,
        },
        needed_bytes: gib * GIB,
        context: None,
    }
}

/// Returns a pool with the models `a` and `b` of 1 GiB each, and a ready worker with one slot for each listed model.
fn pool(id: &str, free_gib: u64, workers: &[&str]) -> PoolState {
    let worker = |(number, of): (usize, &&str)| WorkerState {
        id: format!("worker-cpu-{number}"),
        status: WorkerStatus::Ready,
        ready_at: Some(at(-600_000)),
        idle_since: Some(at(-1000)),
        ..WorkerState::asked_for(&model(of, 1), Device::CPU, None, at(-700_000))
    };
    PoolState {
        id: id.into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![DeviceState {
            device: Device::CPU,
            free_bytes: free_gib * GIB,
            total_bytes: 64 * GIB,
        }],
        workers: workers.iter().enumerate().map(worker).collect(),
        models: vec![model("a", 1), model("b", 1)],
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    }
}

/// A job of an invented trace.
#[derive(Clone)]
struct Sent {
    at_ms: i64,
    model: &'static str,
    tokens: u32,
    takes_ms: i64,
    priority: Priority,
}

fn sent(at_ms: i64, model: &'static str, tokens: u32) -> Sent {
    Sent {
        at_ms,
        model,
        tokens,
        // 20 tokens per second.
        takes_ms: i64::from(tokens) * 50,
        priority: Priority::Interactive,
    }
}

/// Returns a trace in which the jobs arrive and take as long as they say, regardless of place and time.
fn trace(pools: &[PoolState], jobs: &[Sent]) -> Trace {
    enum What<'a> {
        Came(&'a Sent),
        Leased,
        Freed,
    }
    let mut happened: Vec<(i64, usize, What<'_>)> = Vec::new();
    for (number, job) in jobs.iter().enumerate() {
        happened.push((job.at_ms, number, What::Came(job)));
        happened.push((job.at_ms + 1, number, What::Leased));
        happened.push((job.at_ms + 1 + job.takes_ms, number, What::Freed));
    }
    happened.sort_by_key(|(at, ..)| *at);
    let mut snapshot = Snapshot {
        now: at(0),
        started_at: at(-1_000_000),
        settings: Settings::default(),
        jobs: vec![],
        pools: pools.iter().cloned().map(Arc::new).collect(),
        sessions: BTreeMap::new(),
        sizes: BTreeMap::new(),
        turns: 0,
    };
    let mut recorder = Recorder::default();
    let mut leases: Vec<HeldSlot> = Vec::new();
    let mut lines = vec![Line::Trace(Header {
        version: VERSION,
        recorded_by: "test".into(),
        recorded_at: at(0),
        policy: "least-loaded".into(),
        order: QueueOrder::Fair,
        promote_after_s: 300,
        costs: BTreeMap::new(),
    })];
    for (ms, number, what) in happened {
        snapshot.now = at(ms);
        let job = id(number as u64);
        match what {
            What::Came(sent) => snapshot.jobs.push(Arc::new(QueuedJob {
                id: job,
                model: sent.model.parse().unwrap(),
                priority: sent.priority,
                session_id: None,
                created_at: at(ms),
                not_before: None,
                placement: Placement::default(),
                turn: None,
                bytes: 100,
                max_tokens: sent.tokens,
                context_needed: None,
                cache_needed: None,
            })),
            What::Leased => {
                snapshot.jobs.retain(|queued| queued.id != job);
                leases.push(HeldSlot {
                    job,
                    pool: "p".into(),
                    worker: "w".into(),
                });
            }
            What::Freed => leases.retain(|lease| lease.job != job),
        }
        let plan = schedule(&snapshot, &LeastLoaded);
        lines.extend(
            recorder
                .pass(&snapshot, &leases, &plan, By::BuiltIn, None)
                .unwrap(),
        );
    }
    let text: String = lines
        .iter()
        .map(|line| serde_json::to_string(line).unwrap() + "\n")
        .collect();
    Trace::read(&text).unwrap()
}

fn built_in() -> Decider {
    Decider::built_in(&LeastLoaded)
}

fn script(source: &[u8], costs: &[(&str, f64)]) -> Decider {
    let costs: BTreeMap<String, f64> = costs.iter().map(|(p, c)| ((*p).to_owned(), *c)).collect();
    let script = Script::compile(source).unwrap();
    Decider::script(&LeastLoaded, script, Costs::new(costs), LONG).unwrap()
}

fn run(trace: &Trace, decider: &Decider) -> Simulation {
    let simulation = play(trace, decider, "tested", None).unwrap();
    assert_eq!(simulation.report.fallbacks, 0);
    simulation
}

impl Simulation {
    fn waited_ms(&self, number: u64) -> i64 {
        let placed = self.placed(number);
        i64::try_from(placed.at.duration_since(placed.arrived).as_millis()).unwrap()
    }

    fn placed(&self, number: u64) -> &Placed {
        let mut all = self.placed.iter();
        all.find(|placed| placed.job == id(number)).unwrap()
    }
}

// [ORCHCORE-170]
#[test]
fn a_simulation_tells_what_a_policy_makes_of_the_workload() {
    // One worker and ten simultaneous jobs of one second each, which wait 0 to 9 seconds.
    let jobs: Vec<_> = (0..10).map(|_| sent(0, "a", 20)).collect();
    let trace = trace(&[pool("p", 0, &["a"])], &jobs);
    let report = run(&trace, &built_in()).report;
    assert_eq!(
        (report.jobs, report.dispatched, report.starved),
        (10, 10, 0)
    );
    assert_eq!(
        [report.wait_p50_ms, report.wait_p95_ms, report.wait_p99_ms],
        [4000, 9000, 9000]
    );
    assert_eq!((report.worker_starts, report.evictions), (0, 0));
    assert_eq!(report.makespan_ms, 10_000);
    assert_eq!(report, run(&trace, &built_in()).report);
}

// [ORCHCORE-170] A started worker loads at 500 MB/s if the trace shows no load of its model. Memory limits the number of
// workers.
#[test]
fn a_simulated_policy_starts_its_own_workers() {
    let jobs = [sent(0, "a", 20), sent(100, "b", 20)];
    let trace = trace(&[pool("p", 2, &[])], &jobs);
    let simulation = run(&trace, &built_in());
    let loading = i64::try_from(GIB * 1000 / LOAD_RATE).unwrap();
    assert_eq!(simulation.waited_ms(0), loading);
    let report = simulation.report;
    assert_eq!((report.dispatched, report.starved), (2, 0));
    assert_eq!(report.worker_starts, 2, "{report:?}");
}

// [ORCHCORE-171]
#[test]
fn what_was_never_given_a_worker_is_starved() {
    let jobs = [sent(0, "a", 20), sent(0, "nowhere", 20)];
    let report = run(&trace(&[pool("p", 0, &["a"])], &jobs), &built_in()).report;
    assert_eq!((report.jobs, report.dispatched, report.starved), (2, 1, 1));
    let empty = trace(&[], &[]);
    assert_eq!(
        play(&empty, &built_in(), "x", None).err(),
        Some(SimulateError::Empty)
    );
}

// [ORCHCORE-172]
#[test]
fn shortest_job_first_lets_short_jobs_go_before_long_ones() {
    // A long job runs. Three long jobs and then three short ones wait for it.
    let mut jobs = vec![sent(0, "a", 200)];
    jobs.extend((0..3).map(|n| sent(10 + n, "a", 400)));
    jobs.extend((0..3).map(|n| sent(20 + n, "a", 10)));
    let trace = trace(&[pool("p", 0, &["a"])], &jobs);
    let (plain, shortest) = (
        run(&trace, &built_in()),
        run(&trace, &script(SHORTEST_FIRST, &[])),
    );
    for short in 4..7 {
        assert!(shortest.waited_ms(short) < 12_000);
        assert!(plain.waited_ms(short) > 60_000);
    }
    assert!(shortest.report.wait_p50_ms < plain.report.wait_p50_ms);
}

// [ORCHCORE-172] For ten minutes, there is always a shorter job.
#[test]
fn shortest_job_first_starves_nobody() {
    let mut jobs = vec![sent(0, "a", 40), sent(1, "a", 1000)];
    jobs.extend((0..600).map(|n| sent(n * 1000 + 2, "a", 20)));
    let trace = trace(&[pool("p", 0, &["a"])], &jobs);
    let aged = run(&trace, &script(SHORTEST_FIRST, &[]));
    assert!(aged.waited_ms(1) < 120_000, "{}", aged.waited_ms(1));
    let text = std::str::from_utf8(SHORTEST_FIRST).unwrap();
    let without = text.replace("- job.age_ms / 1000 * tokens_per_second()", "");
    assert_ne!(text, without);
    let ageless = run(&trace, &script(without.as_bytes(), &[]));
    assert!(ageless.waited_ms(1) > 500_000, "{}", ageless.waited_ms(1));
}

// [ORCHCORE-173]
#[test]
fn keep_model_together_waits_for_company_and_no_longer_than_it_may() {
    // `a` has the only place. In the first run, a job for `b` comes alone; in the second, three more follow within seconds.
    let alone = vec![sent(0, "a", 20), sent(1000, "b", 20)];
    let place = [pool("p", 0, &["a"])];
    let patient = run(&trace(&place, &alone), &script(TOGETHER, &[]));
    let waited = patient.waited_ms(1);
    assert!((30_000..40_000).contains(&waited), "{waited}");
    assert_eq!(
        (patient.report.worker_starts, patient.report.evictions),
        (1, 1)
    );

    let mut four = alone;
    four.extend((0..3).map(|n| sent(5000 + n, "b", 20)));
    let together = run(&trace(&place, &four), &script(TOGETHER, &[]));
    let waited = together.waited_ms(1);
    assert!((4000..10_000).contains(&waited), "{waited}");
    assert_eq!(together.report.worker_starts, 1);
}

// [ORCHCORE-174]
#[test]
fn prefer_host_by_cost_takes_the_cheap_host_and_lets_batch_jobs_wait_for_it() {
    let batch = |at_ms| Sent {
        priority: Priority::Batch,
        ..sent(at_ms, "a", 20)
    };
    let jobs = [sent(0, "a", 200), sent(10, "a", 20), batch(20), batch(21)];
    // By name, the expensive host would come first.
    let pools = [pool("a-dear", 0, &["a"]), pool("b-cheap", 0, &["a"])];
    let trace = trace(&pools, &jobs);
    let by_cost = run(
        &trace,
        &script(BY_COST, &[("a-dear", 5.0), ("b-cheap", 0.5)]),
    );
    let hosts: Vec<_> = (0..4).map(|n| by_cost.placed(n).pool.as_str()).collect();
    assert_eq!(hosts, ["b-cheap", "a-dear", "b-cheap", "b-cheap"]);
    assert!(by_cost.waited_ms(2) > 9000, "{}", by_cost.waited_ms(2));
    let plain = run(&trace, &built_in());
    assert_eq!(plain.placed(0).pool, "a-dear");
    assert!(plain.waited_ms(2) < 5000, "{}", plain.waited_ms(2));
}

// [ORCHCORE-175]
#[test]
fn a_replay_finds_every_decision_again_and_tells_the_first_that_differs() {
    let jobs: Vec<_> = (0..50).map(|n| sent(n * 30, "a", 20)).collect();
    let mut trace = trace(&[pool("p", 0, &["a", "a"])], &jobs);
    let again = replay(&trace, BuiltIn::LeastLoaded, &[], None).unwrap();
    assert_eq!((again.passes, again.equal, again.skipped), (150, 150, 0));
    let other = replay(&trace, BuiltIn::RoundRobin, &[], None).unwrap();
    assert_eq!((other.equal, other.skipped), (0, 150));
    let PassRecord { decided_line, .. } = &mut trace.passes[17];
    *decided_line = decided_line.replace("worker-cpu-0", "worker-cpu-1");
    *decided_line += " ";
    let changed = replay(&trace, BuiltIn::LeastLoaded, &[], None).unwrap();
    assert_eq!((changed.equal, changed.first_difference), (149, Some(18)));
    let none = replay(&trace, BuiltIn::LeastLoaded, &[], Some(Duration::ZERO));
    assert!(matches!(none, Err(SimulateError::TooLong(_))), "{none:?}");
}

// [ORCHCORE-188] Jobs that don't fit in a cache together run one after the other, even with free slots.
#[test]
fn a_simulation_knows_the_workers_caches() {
    let with = |free_tokens: Option<u32>| {
        let mut pool = pool("p", 0, &["a"]);
        pool.workers[0].slots = 4;
        pool.workers[0].free_tokens = free_tokens;
        // A little more than 300 tokens take two seconds.
        let job = |at_ms| Sent {
            takes_ms: 2000,
            ..sent(at_ms, "a", 300)
        };
        let jobs = [job(0), job(10), job(20)];
        run(&trace(&[pool], &jobs), &built_in())
    };
    let unbounded = with(None);
    assert_eq!([0, 1, 2].map(|n| unbounded.waited_ms(n)), [0, 0, 0]);
    // Two jobs find room, and the third waits for the first to end.
    let bounded = with(Some(700));
    assert_eq!([0, 1].map(|n| bounded.waited_ms(n)), [0, 0]);
    let third = bounded.waited_ms(2);
    assert!((1980..2000).contains(&third), "{third}");
}

// [ORCHCORE-188] [ORCHCORE-189] The second job may not fit, so it waits for the answer to the first.
#[test]
fn a_simulated_worker_answers_soon() {
    let mut pool = pool("p", 0, &["a"]);
    pool.workers[0].slots = 4;
    pool.workers[0].free_tokens = Some(650);
    let job = Sent {
        takes_ms: 2000,
        ..sent(0, "a", 300)
    };
    let played = run(&trace(&[pool], &[job.clone(), job]), &built_in());
    assert_eq!([0, 1].map(|n| played.waited_ms(n)), [0, 5]);
}

// [ORCHCORE-190]
#[test]
fn a_simulation_has_the_queue_of_its_recording() {
    let batch = Sent {
        priority: Priority::Batch,
        ..sent(10, "a", 100)
    };
    let jobs = [sent(0, "a", 100), batch, sent(20, "a", 100)];
    let mut trace = trace(&[pool("p", 0, &["a"])], &jobs);
    let batch_waits_longer = |trace: &Trace| {
        let simulation = run(trace, &built_in());
        simulation.waited_ms(1) > simulation.waited_ms(2)
    };
    assert!(batch_waits_longer(&trace));
    trace.header.order = QueueOrder::Fifo;
    assert!(!batch_waits_longer(&trace));
}
