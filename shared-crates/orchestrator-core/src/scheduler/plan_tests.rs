#[path = "plan_tests/cache.rs"]
mod cache;

use std::collections::BTreeMap;

use jiff::SignedDuration;
use pool_core::api::pool::ContextMemory;
use pool_core::worker::ModelFile;

use super::*;
use crate::job::{Placement, Priority};
use crate::pool::PoolLiveness;
use crate::scheduler::{
    BuiltIn, DeviceState, Filter, LeastLoaded, ModelState, RefusedDownload, RefusedStart, Settings,
    WaitReason,
};

const GIB: u64 = 1 << 30;

fn file() -> ModelFile {
    ModelFile {
        size_bytes: 100,
        modified_ns: 1,
        sha256: None,
    }
}

fn worker(id: &str, status: WorkerStatus, active: u32) -> WorkerState {
    WorkerState {
        id: id.into(),
        model: "m".parse().unwrap(),
        file: file(),
        device: Device::CPU,
        status,
        context_length: None,
        slots: 2,
        active,
        free_tokens: None,
        full: false,
        memory_bytes: GIB,
        created_at: Timestamp::UNIX_EPOCH,
        ready_at: Some(Timestamp::UNIX_EPOCH),
        idle_since: None,
        last_turn: 0,
        start_failure: None,
    }
}

fn failed(id: &str) -> WorkerState {
    WorkerState {
        start_failure: Some("truncated".into()),
        ..worker(id, WorkerStatus::Failed, 0)
    }
}

fn pool(id: &str, workers: Vec<WorkerState>) -> PoolState {
    PoolState {
        id: id.into(),
        liveness: PoolLiveness::Online,
        draining: false,
        devices: vec![DeviceState {
            device: Device::CPU,
            free_bytes: 8 * GIB,
            total_bytes: 16 * GIB,
        }],
        workers,
        models: vec![ModelState {
            model: "m".parse().unwrap(),
            file: file(),
            needed_bytes: GIB,
            context: None,
        }],
        disk_free_bytes: 0,
        downloads: vec![],
        refused_starts: vec![],
        refused_downloads: vec![],
        last_start: 0,
    }
}

fn job() -> QueuedJob {
    job_for("m", Placement::default())
}

fn job_for(model: &str, placement: Placement) -> QueuedJob {
    QueuedJob {
        id: JobId::random(),
        model: model.parse().unwrap(),
        priority: Priority::Interactive,
        session_id: None,
        created_at: Timestamp::UNIX_EPOCH,
        not_before: None,
        placement,
        turn: None,
        bytes: 0,
        max_tokens: 256,
        context_needed: None,
        cache_needed: None,
    }
}

fn snapshot(jobs: &[QueuedJob], pools: Vec<PoolState>) -> Snapshot {
    Snapshot {
        now: Timestamp::UNIX_EPOCH,
        started_at: Timestamp::UNIX_EPOCH,
        settings: Settings::default(),
        jobs: jobs.iter().cloned().map(Arc::new).collect(),
        pools: pools.into_iter().map(Arc::new).collect(),
        sessions: BTreeMap::new(),
        sizes: BTreeMap::new(),
        turns: 0,
    }
}

fn plan(jobs: &[QueuedJob], pools: Vec<PoolState>) -> Plan {
    schedule(&snapshot(jobs, pools), &LeastLoaded)
}

fn dispatched(plan: &Plan) -> Vec<(&str, &str)> {
    plan.actions
        .iter()
        .filter_map(|action| match action {
            Action::Dispatch { pool, worker, .. } => Some((pool.as_str(), worker.as_str())),
            _ => None,
        })
        .collect()
}

fn reason(job: &QueuedJob, pools: Vec<PoolState>) -> WaitReason {
    let plan = plan(std::slice::from_ref(job), pools);
    assert_eq!(plan.actions, [], "expected the job to wait");
    plan.waiting[&job.id].reason
}

// [ORCHCORE-050]
#[test]
fn the_least_loaded_worker_gets_the_job() {
    let busy = pool("a", vec![worker("w0", WorkerStatus::Ready, 1)]);
    let idle = pool("b", vec![worker("w0", WorkerStatus::Ready, 0)]);
    assert_eq!(dispatched(&plan(&[job()], vec![busy, idle])), [("b", "w0")]);
}

// [ORCHCORE-050]
#[test]
fn jobs_of_one_pass_fill_slots_evenly_and_no_further() {
    let jobs = [job(), job(), job(), job(), job()];
    let pools = vec![
        pool("a", vec![worker("w0", WorkerStatus::Ready, 0)]),
        pool("b", vec![worker("w0", WorkerStatus::Ready, 0)]),
    ];
    let plan = plan(&jobs, pools);
    assert_eq!(
        dispatched(&plan),
        [("a", "w0"), ("b", "w0"), ("a", "w0"), ("b", "w0")]
    );
    assert_eq!(plan.waiting[&jobs[4].id].reason, WaitReason::SlotsBusy);
}

// [ORCHCORE-051]
#[test]
fn one_worker_is_started_for_all_jobs_of_a_model() {
    let jobs = [job(), job()];
    let mut small = pool("a", vec![]);
    small.devices[0].free_bytes = 2 * GIB;
    let plan = plan(&jobs, vec![small, pool("b", vec![])]);
    let start = Action::StartWorker {
        pool: "b".into(),
        model: "m".parse().unwrap(),
        device: Device::CPU,
        context_length: None,
    };
    assert_eq!(plan.actions, [start]);
    assert_eq!(plan.waiting[&jobs[1].id].reason, WaitReason::WorkerStarting);
}

// [ORCHCORE-051]
#[test]
fn memory_given_to_one_start_is_gone_for_the_next() {
    let mut only = pool("a", vec![]);
    only.models.push(ModelState {
        model: "other".parse().unwrap(),
        file: file(),
        needed_bytes: 8 * GIB,
        context: None,
    });
    let jobs = [job(), job_for("other", Placement::default())];
    let plan = plan(&jobs, vec![only]);
    assert_eq!(plan.actions.len(), 1);
    assert_eq!(plan.waiting[&jobs[1].id].reason, WaitReason::MemoryShort);
}

// [ORCHCORE-052] One scenario for each reason; in each, the thing it names is what is missing.
#[test]
fn every_wait_has_its_reason() {
    assert_eq!(reason(&job(), vec![]), WaitReason::NoPool);
    let elsewhere = Placement {
        pool: Some("z".into()),
        device: None,
    };
    assert_eq!(
        reason(&job_for("m", elsewhere), vec![pool("a", vec![])]),
        WaitReason::NoPool
    );

    let silent = PoolState {
        liveness: PoolLiveness::Suspect,
        ..pool("a", vec![])
    };
    assert_eq!(reason(&job(), vec![silent]), WaitReason::PoolsAway);
    let draining = PoolState {
        draining: true,
        ..pool("a", vec![])
    };
    assert_eq!(reason(&job(), vec![draining]), WaitReason::PoolsAway);

    let on_gpu = Placement {
        pool: None,
        device: Some("cuda:0".parse().unwrap()),
    };
    assert_eq!(
        reason(&job_for("m", on_gpu), vec![pool("a", vec![])]),
        WaitReason::NoBackend
    );
    assert_eq!(
        reason(&job_for("x", Placement::default()), vec![pool("a", vec![])]),
        WaitReason::ModelMissing
    );

    let mut full = pool("a", vec![]);
    full.devices[0].free_bytes = GIB - 1;
    assert_eq!(reason(&job(), vec![full]), WaitReason::MemoryShort);

    let loading = pool("a", vec![worker("w0", WorkerStatus::Starting, 0)]);
    assert_eq!(reason(&job(), vec![loading]), WaitReason::WorkerStarting);
    let busy = pool("a", vec![worker("w0", WorkerStatus::Busy, 2)]);
    assert_eq!(reason(&job(), vec![busy]), WaitReason::SlotsBusy);
    let full = WorkerState {
        full: true,
        ..worker("w0", WorkerStatus::Ready, 0)
    };
    let full = pool("a", vec![full]);
    assert_eq!(reason(&job(), vec![full]), WaitReason::SlotsBusy);

    let refused = RefusedStart {
        model: "m".parse().unwrap(),
        device: Device::CPU,
        context_length: None,
        message: "no port".into(),
    };
    let refusing = PoolState {
        refused_starts: vec![refused],
        ..pool("a", vec![])
    };
    assert_eq!(
        reason(&job(), vec![refusing.clone()]),
        WaitReason::StartRefused
    );
    let elsewhere = plan(&[job()], vec![refusing, pool("b", vec![])]);
    assert!(
        matches!(&elsewhere.actions[..], [Action::StartWorker { pool, .. }] if pool == "b"),
        "{elsewhere:?}"
    );

    let later = QueuedJob {
        not_before: Some(Timestamp::from_second(1).unwrap()),
        ..job()
    };
    assert_eq!(
        reason(&later, vec![pool("a", vec![])]),
        WaitReason::BackingOff
    );
}

// [ORCHCORE-053] P18
#[test]
fn a_model_that_failed_is_not_tried_there_again_until_its_file_changes() {
    let bad = job();
    let rejected = plan(
        std::slice::from_ref(&bad),
        vec![pool("a", vec![failed("w0")])],
    );
    let Action::Reject { job, code, message } = &rejected.actions[0] else {
        panic!("{rejected:?}")
    };
    assert_eq!((*job, *code), (bad.id, JobErrorCode::ModelFailed));
    assert!(message.contains("truncated"), "{message}");

    let elsewhere = plan(
        std::slice::from_ref(&bad),
        vec![pool("a", vec![failed("w0")]), pool("b", vec![])],
    );
    assert!(
        matches!(&elsewhere.actions[..], [Action::StartWorker { pool, .. }] if pool == "b"),
        "{elsewhere:?}"
    );

    let mut mended = pool("a", vec![failed("w0")]);
    mended.models[0].file.modified_ns += 1;
    let again = plan(std::slice::from_ref(&bad), vec![mended]);
    assert!(
        matches!(again.actions[..], [Action::StartWorker { .. }]),
        "{again:?}"
    );
}

// [ORCHCORE-054]
#[test]
fn a_job_that_cannot_start_holds_up_nobody() {
    let stuck = job_for("x", Placement::default());
    let ready = pool("a", vec![worker("w0", WorkerStatus::Ready, 0)]);
    let plan = plan(&[stuck.clone(), job()], vec![ready]);
    assert_eq!(dispatched(&plan), [("a", "w0")]);
    assert_eq!(plan.waiting[&stuck.id].reason, WaitReason::ModelMissing);
}

// [ORCHCORE-055]
#[test]
fn an_explanation_counts_what_each_filter_left() {
    let waiting = job();
    let silent = PoolState {
        liveness: PoolLiveness::Offline,
        ..pool("a", vec![])
    };
    let bare = PoolState {
        models: vec![],
        ..pool("b", vec![])
    };
    let plan = plan(std::slice::from_ref(&waiting), vec![silent, bare]);
    let counts: Vec<_> = plan.waiting[&waiting.id]
        .filters
        .iter()
        .map(|f| (f.filter, f.pools))
        .collect();
    assert_eq!(
        counts,
        [
            (Filter::Known, 2),
            (Filter::Alive, 1),
            (Filter::Backend, 1),
            (Filter::ModelPresent, 0)
        ]
    );
}

// [ORCHCORE-053] P18
#[test]
fn nothing_is_rejected_while_a_pool_that_may_do_it_is_away() {
    let waiting = job();
    let away = PoolState {
        liveness: PoolLiveness::Suspect,
        ..pool("b", vec![])
    };
    let pools = vec![pool("a", vec![failed("w0")]), away];
    assert_eq!(reason(&waiting, pools), WaitReason::PoolsAway);
}

// [ORCHCORE-056]
#[test]
fn a_job_of_before_a_restart_is_not_rejected_until_pools_could_register() {
    let waiting = job();
    let pools = vec![pool("a", vec![failed("w0")])];
    let start = Timestamp::from_second(100).unwrap();
    let after = |pause| Snapshot {
        now: start + pause,
        started_at: start,
        ..snapshot(std::slice::from_ref(&waiting), pools.clone())
    };
    let soon = schedule(&after(SignedDuration::from_secs(1)), &LeastLoaded);
    assert_eq!(soon.actions, []);
    assert_eq!(soon.waiting[&waiting.id].reason, WaitReason::PoolsAway);
    let late = schedule(&after(REGISTRATION), &LeastLoaded);
    assert!(
        matches!(late.actions[..], [Action::Reject { .. }]),
        "{late:?}"
    );
}

// [ORCHCORE-057]
#[test]
fn each_policy_chooses_by_its_own_measure() {
    let with = |id: &str, free: u64, active: u32, turn: u64| {
        let mut pool = pool(id, vec![worker("w0", WorkerStatus::Ready, active)]);
        pool.devices[0].free_bytes = free * GIB;
        pool.workers[0].last_turn = turn;
        pool
    };
    let pools = || vec![with("a", 4, 0, 9), with("b", 8, 1, 5), with("c", 2, 1, 3)];
    let choice = |policy: BuiltIn| {
        let plan = schedule(&snapshot(&[job()], pools()), policy.policy());
        dispatched(&plan)[0].0.to_owned()
    };
    assert_eq!(BuiltIn::ALL.map(choice), ["a", "b", "c"]);
}

// [ORCHCORE-057]
#[test]
fn ties_go_to_free_memory_then_work_then_name() {
    for policy in BuiltIn::ALL {
        let idle = || vec![worker("w0", WorkerStatus::Ready, 0)];
        let mut large = pool("z", idle());
        large.devices[0].free_bytes += 1;
        let choice = |pools| {
            let plan = schedule(&snapshot(&[job()], pools), policy.policy());
            dispatched(&plan)[0].0.to_owned()
        };
        assert_eq!(choice(vec![pool("a", idle()), large]), "z", "{policy}");
        assert_eq!(
            choice(vec![pool("b", idle()), pool("a", idle())]),
            "a",
            "{policy}"
        );
        let started = |pools| schedule(&snapshot(&[job()], pools), policy.policy()).actions;
        let busier = pool(
            "a",
            vec![WorkerState {
                model: "x".parse().unwrap(),
                ..worker("w0", WorkerStatus::Busy, 2)
            }],
        );
        let starts = started(vec![busier, pool("b", vec![])]);
        assert!(
            matches!(&starts[0], Action::StartWorker { pool, .. } if pool == "b"),
            "{policy}: {starts:?}"
        );
    }
}

// [ORCHCORE-057]
#[test]
fn round_robin_goes_round() {
    let jobs: Vec<_> = (0..6).map(|_| job()).collect();
    let worker = || WorkerState {
        slots: 9,
        ..worker("w0", WorkerStatus::Ready, 0)
    };
    let pools = ["a", "b", "c"].map(|id| pool(id, vec![worker()])).to_vec();
    let plan = schedule(&snapshot(&jobs, pools), BuiltIn::RoundRobin.policy());
    let order: Vec<_> = dispatched(&plan)
        .iter()
        .map(|(pool, _)| (*pool).to_owned())
        .collect();
    assert_eq!(order, ["a", "b", "c", "a", "b", "c"]);
}

// [ORCHCORE-057]
#[test]
fn a_policy_that_is_misspelt_is_answered_with_the_nearest() {
    for policy in BuiltIn::ALL {
        assert_eq!(policy.as_str().parse(), Ok(policy));
    }
    let error = "round-robbin".parse::<BuiltIn>().unwrap_err().to_string();
    assert!(error.contains("did you mean `round-robin`"), "{error}");
}

/// A pool whose memory is full, with an idle worker of another model.
fn crowded(id: &str, idle_since: i64) -> PoolState {
    let mut pool = pool(id, vec![idle("w0", "other", idle_since)]);
    pool.devices[0].free_bytes = 0;
    pool
}

fn idle(id: &str, model: &str, since: i64) -> WorkerState {
    WorkerState {
        model: model.parse().unwrap(),
        idle_since: Some(Timestamp::from_second(since).unwrap()),
        ..worker(id, WorkerStatus::Ready, 0)
    }
}

fn at(second: i64, snapshot: Snapshot) -> Plan {
    let now = Timestamp::from_second(second).unwrap();
    schedule(&Snapshot { now, ..snapshot }, &LeastLoaded)
}

fn evicted(plan: &Plan) -> Vec<(&str, &str)> {
    plan.actions
        .iter()
        .filter_map(|action| match action {
            Action::EvictWorker { pool, worker, .. } => Some((pool.as_str(), worker.as_str())),
            _ => None,
        })
        .collect()
}

// [ORCHCORE-060]
#[test]
fn the_least_recently_used_idle_worker_makes_room() {
    let waiting = job();
    let pools = vec![crowded("a", 50), crowded("b", 10), crowded("c", 30)];
    let plan = at(100, snapshot(std::slice::from_ref(&waiting), pools));
    assert_eq!(evicted(&plan), [("b", "w0")]);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::Evicting);
    // It is stopping: nothing else has to go.
    let mut stopping = crowded("b", 10);
    stopping.workers[0].status = WorkerStatus::Draining;
    let plan = at(
        100,
        snapshot(
            std::slice::from_ref(&waiting),
            vec![crowded("a", 50), stopping],
        ),
    );
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::Evicting);
}

// [ORCHCORE-060]
#[test]
fn no_more_workers_are_evicted_than_it_takes() {
    let mut pool = pool(
        "a",
        vec![idle("w0", "x", 1), idle("w1", "y", 2), idle("w2", "z", 3)],
    );
    pool.devices[0].free_bytes = 0;
    pool.models[0].needed_bytes = 4 * GIB;
    pool.workers[1].memory_bytes = 4 * GIB;
    let plan = at(100, snapshot(&[job()], vec![pool.clone()]));
    assert_eq!(evicted(&plan), [("a", "w1")]);
    pool.models[0].needed_bytes = 5 * GIB;
    let plan = at(100, snapshot(&[job()], vec![pool]));
    assert_eq!(evicted(&plan), [("a", "w0"), ("a", "w1")]);
}

// [ORCHCORE-060]
#[test]
fn of_the_workers_of_a_device_the_least_recently_used_one_goes() {
    let mut pool = pool("a", vec![idle("w0", "x", 50), idle("w1", "y", 10)]);
    pool.devices[0].free_bytes = 0;
    let plan = at(100, snapshot(&[job()], vec![pool]));
    assert_eq!(evicted(&plan), [("a", "w1")]);
}

/// Returns a worker whose model took 10 s to load and became ready at time 100.
fn loaded(idle_since: i64) -> WorkerState {
    let time = |second| Timestamp::from_second(second).unwrap();
    WorkerState {
        created_at: time(90),
        ready_at: Some(time(100)),
        ..idle("w0", "other", idle_since)
    }
}

/// Returns a pool whose memory such a worker fills.
fn taken() -> PoolState {
    PoolState {
        workers: vec![loaded(105)],
        ..crowded("a", 105)
    }
}

/// Returns a job for the model of [`loaded`] that waits for its next attempt.
fn backing_off() -> QueuedJob {
    QueuedJob {
        not_before: Some(Timestamp::from_second(1000).unwrap()),
        ..job_for("other", Placement::default())
    }
}

// [ORCHCORE-060]
#[test]
fn a_worker_with_work_is_never_evicted() {
    let short = |pools: Vec<PoolState>, jobs: &[QueuedJob]| {
        let plan = at(100, snapshot(jobs, pools));
        assert_eq!(evicted(&plan), [], "{plan:?}");
        assert_eq!(plan.waiting[&jobs[0].id].reason, WaitReason::MemoryShort);
    };
    let mut working = crowded("a", 1);
    working.workers[0].active = 1;
    short(vec![working], &[job()]);
    let mut computing = crowded("a", 1);
    computing.workers[0].idle_since = None;
    short(vec![computing], &[job()]);
    // It has no room, so somebody else's work is on it.
    let mut full = crowded("a", 1);
    full.workers[0].full = true;
    short(vec![full], &[job()]);
    let mut forbidden = snapshot(&[job()], vec![crowded("a", 1)]);
    forbidden.settings.evict = false;
    assert_eq!(at(100, forbidden).actions, []);
}

// [ORCHCORE-061] Regardless of the worker's age.
#[test]
fn an_idle_worker_that_no_job_waits_for_makes_room_at_once() {
    assert_eq!(
        evicted(&at(106, snapshot(&[job()], vec![taken()]))),
        [("a", "w0")]
    );
}

// [ORCHCORE-061] Three times its load time, and no longer than the settings allow.
#[test]
fn a_worker_stays_for_its_time_while_jobs_wait_for_it() {
    let waiting = job();
    let snapshot = snapshot(&[waiting.clone(), backing_off()], vec![taken()]);
    let plan = at(110, snapshot.clone());
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::MemoryShort);
    assert!(
        plan.waiting[&waiting.id].hint.contains("in 21s"),
        "{plan:?}"
    );
    assert_eq!(plan.wake, Timestamp::from_second(130).ok());
    assert_eq!(evicted(&at(130, snapshot.clone())), [("a", "w0")]);
    let mut bounded = snapshot;
    bounded.settings.min_residence = SignedDuration::from_secs(15);
    assert_eq!(
        at(110, bounded.clone()).wake,
        Timestamp::from_second(115).ok()
    );
    assert_eq!(evicted(&at(115, bounded)), [("a", "w0")]);
}

// [ORCHCORE-061] Two models that fit one at a time: the model whose turn it is gets the memory, but not before a reload
// pays.
#[test]
fn models_that_do_not_fit_together_take_turns() {
    let (first, second) = (job(), job_for("other", Placement::default()));
    let both = |order: [&QueuedJob; 2], pool: PoolState| {
        snapshot(&order.map(QueuedJob::clone), vec![pool])
    };
    // The pool has not yet reported that its worker is idle again.
    let busy = || {
        let mut pool = taken();
        (pool.workers[0].status, pool.workers[0].idle_since) = (WorkerStatus::Busy, None);
        pool
    };
    for pool in [taken(), busy()] {
        let early = at(129, both([&first, &second], pool.clone()));
        assert_eq!(
            (evicted(&early), dispatched(&early)),
            (vec![], vec![("a", "w0")])
        );
        let due = at(130, both([&first, &second], pool.clone()));
        assert_eq!(
            (evicted(&due), dispatched(&due)),
            (vec![("a", "w0")], vec![])
        );
        // In the opposite order the job of the resident model comes first, and its worker runs.
        let later = at(130, both([&second, &first], pool));
        assert_eq!(
            (evicted(&later), dispatched(&later)),
            (vec![], vec![("a", "w0")])
        );
    }
}

// [ORCHCORE-062]
#[test]
fn a_worker_that_is_idle_for_long_is_unloaded() {
    let pools = || vec![pool("a", vec![idle("w0", "other", 100)])];
    let unload = |plan: &Plan| {
        plan.actions.contains(&Action::UnloadWorker {
            pool: "a".into(),
            worker: "w0".into(),
        })
    };
    let early = at(699, snapshot(&[], pools()));
    assert_eq!(
        (unload(&early), early.wake),
        (false, Timestamp::from_second(700).ok())
    );
    assert!(unload(&at(700, snapshot(&[], pools()))));
    // A job that backs off comes back to it.
    let later = QueuedJob {
        not_before: Some(Timestamp::from_second(1000).unwrap()),
        ..job_for("other", Placement::default())
    };
    assert!(!unload(&at(700, snapshot(&[later], pools()))));
    let mut never = snapshot(&[], pools());
    never.settings.idle_ttl = None;
    assert_eq!(
        (at(70_000, never.clone()).actions, at(70_000, never).wake),
        (vec![], None)
    );
}

// [ORCHCORE-063]
#[test]
fn a_session_goes_back_to_its_pool() {
    let ready = || vec![worker("w0", WorkerStatus::Ready, 0)];
    let busier = || vec![worker("w0", WorkerStatus::Busy, 1)];
    let of_session = || QueuedJob {
        session_id: Some("s".into()),
        ..job()
    };
    let with = |pools, jobs: &[QueuedJob]| {
        let mut snapshot = snapshot(jobs, pools);
        snapshot.sessions.insert("s".into(), "b".into());
        schedule(&snapshot, &LeastLoaded)
    };
    let plan = with(
        vec![pool("a", ready()), pool("b", busier())],
        &[of_session(), job()],
    );
    assert_eq!(dispatched(&plan), [("b", "w0"), ("a", "w0")]);
    // Not at any price: another pool's free slot goes before a wait.
    let full = vec![worker("w0", WorkerStatus::Busy, 2)];
    let plan = with(vec![pool("a", ready()), pool("b", full)], &[of_session()]);
    assert_eq!(dispatched(&plan), [("a", "w0")]);
    let plan = with(vec![pool("a", vec![]), pool("b", vec![])], &[of_session()]);
    assert!(
        matches!(&plan.actions[0], Action::StartWorker { pool, .. } if pool == "b"),
        "{plan:?}"
    );
    let bare = |id: &str| PoolState {
        models: vec![],
        disk_free_bytes: 9 * GIB,
        ..pool(id, vec![])
    };
    let mut snapshot = snapshot(&[of_session()], vec![bare("a"), bare("b")]);
    snapshot.sessions.insert("s".into(), "b".into());
    snapshot.settings.download = true;
    snapshot.sizes.insert("m".parse().unwrap(), GIB);
    let plan = schedule(&snapshot, &LeastLoaded);
    assert!(
        matches!(&plan.actions[0], Action::Download { pool, .. } if pool == "b"),
        "{plan:?}"
    );
}

// [ORCHCORE-064]
#[test]
fn a_model_that_no_pool_has_is_downloaded_where_that_is_allowed() {
    let waiting = job();
    let bare = |id: &str, disk: u64| PoolState {
        models: vec![],
        disk_free_bytes: disk,
        ..pool(id, vec![])
    };
    let snapshot = |pools| {
        let mut snapshot = snapshot(std::slice::from_ref(&waiting), pools);
        snapshot.settings.download = true;
        snapshot.sizes.insert("m".parse().unwrap(), GIB);
        snapshot
    };
    let downloads = |plan: &Plan| {
        plan.actions
            .iter()
            .filter_map(|action| match action {
                Action::Download { pool, .. } => Some(pool.clone()),
                _ => None,
            })
            .collect::<Vec<_>>()
    };
    let why = |plan: &Plan| plan.waiting[&waiting.id].clone();
    // `a` would be left with less than the reserve.
    let pools = || vec![bare("a", 2 * GIB - 1), bare("b", 2 * GIB)];
    let plan = schedule(&snapshot(pools()), &LeastLoaded);
    assert_eq!(downloads(&plan), ["b"]);
    assert_eq!(why(&plan).reason, WaitReason::Downloading);

    let mut forbidden = snapshot(pools());
    forbidden.settings.download = false;
    let plan = schedule(&forbidden, &LeastLoaded);
    assert_eq!(
        (downloads(&plan), why(&plan).reason),
        (vec![], WaitReason::ModelMissing)
    );
    assert!(why(&plan).hint.contains("scheduler.download"), "{plan:?}");

    // Nobody downloads what a pool has that will be back.
    let away = PoolState {
        liveness: PoolLiveness::Suspect,
        ..pool("c", vec![])
    };
    let plan = schedule(&snapshot(vec![bare("b", 9 * GIB), away]), &LeastLoaded);
    assert_eq!(
        (downloads(&plan), why(&plan).reason),
        (vec![], WaitReason::PoolsAway)
    );

    let mut running = bare("a", 9 * GIB);
    running.downloads.push(crate::scheduler::DownloadState {
        model: "m".parse().unwrap(),
        percent: Some(43),
    });
    let plan = schedule(&snapshot(vec![running, bare("b", 9 * GIB)]), &LeastLoaded);
    assert_eq!(
        (downloads(&plan), why(&plan).reason),
        (vec![], WaitReason::Downloading)
    );
    assert!(why(&plan).message.contains("43 %"), "{plan:?}");

    let plan = schedule(&snapshot(vec![bare("a", GIB)]), &LeastLoaded);
    assert_eq!(why(&plan).reason, WaitReason::DownloadRefused);
    assert!(why(&plan).hint.contains("make room"), "{plan:?}");
    let mut refused = bare("a", 9 * GIB);
    refused.refused_downloads.push(RefusedDownload {
        model: "m".parse().unwrap(),
        message: "no network".into(),
    });
    let plan = schedule(&snapshot(vec![refused]), &LeastLoaded);
    assert_eq!(why(&plan).reason, WaitReason::DownloadRefused);
    assert!(why(&plan).message.contains("no network"), "{plan:?}");
    let mut small = bare("a", 9 * GIB);
    small.devices[0].total_bytes = GIB - 1;
    let plan = schedule(&snapshot(vec![small]), &LeastLoaded);
    assert_eq!(why(&plan).reason, WaitReason::DownloadRefused);
    assert!(
        why(&plan).message.contains("no device is large enough"),
        "{plan:?}"
    );
}

// [ORCHCORE-065]
#[test]
fn another_host_helps_out_when_all_workers_are_busy() {
    let busy = || pool("a", vec![worker("w0", WorkerStatus::Busy, 2)]);
    let jobs = [job(), job()];
    let helped = plan(&jobs, vec![busy(), pool("b", vec![])]);
    assert!(
        matches!(&helped.actions[..], [Action::StartWorker { pool, .. }] if pool == "b"),
        "{helped:?}"
    );
    // A second worker on the same device would only share it.
    assert_eq!(plan(&jobs, vec![busy()]).actions, []);
    // One at a time.
    let starting = pool("b", vec![worker("w0", WorkerStatus::Starting, 0)]);
    assert_eq!(
        plan(&jobs, vec![busy(), starting, pool("c", vec![])]).actions,
        []
    );
    // Nobody is evicted only to help out.
    let full = crowded("b", 1);
    let waits = at(100, snapshot(&jobs, vec![busy(), full]));
    assert_eq!(waits.actions, []);
    assert_eq!(waits.waiting[&jobs[0].id].reason, WaitReason::SlotsBusy);
}

/// Returns a pool with the file of `m` and contexts up to 4,096 tokens; the default of 512 takes 1 GiB in all.
fn with_contexts(pool: PoolState) -> PoolState {
    let memory = ContextMemory {
        max_tokens: 4096,
        default_tokens: 512,
        base_bytes: GIB / 2,
        token_bytes: GIB / 1024,
        floor_bytes: 0,
    };
    let mut pool = pool;
    pool.models[0].context = Some(memory);
    pool
}

/// Returns a free worker with one slot.
fn of_context(id: &str, tokens: u32) -> WorkerState {
    WorkerState {
        context_length: Some(tokens),
        slots: 1,
        ..worker(id, WorkerStatus::Ready, 0)
    }
}

fn needs(tokens: u32) -> QueuedJob {
    QueuedJob {
        context_needed: Some(tokens),
        ..job()
    }
}

// [ORCHCORE-181]
#[test]
fn a_job_goes_to_no_worker_whose_context_is_too_small() {
    let pools = || {
        vec![pool(
            "a",
            vec![of_context("w0", 512), of_context("w1", 4096)],
        )]
    };
    let to_large = plan(&[needs(732), job()], pools());
    assert_eq!(dispatched(&to_large), [("a", "w1"), ("a", "w0")]);
    // A worker whose context is exactly large enough.
    assert_eq!(
        dispatched(&plan(
            &[needs(512)],
            vec![pool("a", vec![of_context("w0", 512)])]
        )),
        [("a", "w0")]
    );
    // Other jobs don't wait for that worker.
    let job = job();
    let both = plan(
        &[needs(4097), job.clone()],
        vec![pool("a", vec![of_context("w0", 512)])],
    );
    assert_eq!(dispatched(&both), [("a", "w0")]);
}

// [ORCHCORE-181] Before any worker has counted, the worker with the most room for prompt and answer is the better
// guess.
#[test]
fn of_free_workers_one_that_probably_has_the_room_is_taken() {
    let long = QueuedJob {
        bytes: 512 + 4 * 400,
        ..job()
    };
    let pools = || {
        vec![
            pool("a", vec![of_context("w0", 512)]),
            pool("b", vec![of_context("w0", 1024)]),
        ]
    };
    let alone = plan(std::slice::from_ref(&long), pools());
    assert_eq!(dispatched(&alone), [("b", "w0")]);
    assert_eq!(
        dispatched(&plan(&[long.clone(), long], pools())),
        [("b", "w0"), ("a", "w0")]
    );
    assert_eq!(dispatched(&plan(&[job()], pools())), [("a", "w0")]);
}

// [ORCHCORE-182]
#[test]
fn a_worker_with_more_room_is_started_for_a_job_that_needs_it() {
    let start = |free_bytes: u64, job: QueuedJob| {
        let mut pool = with_contexts(pool("a", vec![of_context("w0", 512)]));
        pool.devices[0].free_bytes = free_bytes;
        let plan = plan(&[job], vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => Some(*context_length),
            [] => None,
            other => panic!("{other:?}"),
        }
    };
    // Room for the answer, in steps of 256 tokens.
    assert_eq!(start(8 * GIB, needs(732)), Some(Some(1024)));
    // Before any worker has counted, the size of the request tells about how long the prompt is.
    let uncounted = QueuedJob {
        bytes: 512 + 4 * 1500,
        ..job_for("m", Placement::default())
    };
    let new = |free_bytes: u64| {
        let mut pool = with_contexts(pool("a", vec![]));
        pool.devices[0].free_bytes = free_bytes;
        let plan = plan(std::slice::from_ref(&uncounted), vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => *context_length,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(new(8 * GIB), Some(1792));
    assert_eq!(new(GIB), None);
    // If that does not fit, room for the prompt.
    assert_eq!(start(GIB + GIB / 2, needs(732)), Some(Some(1024)));
    assert_eq!(
        start(GIB / 2 + 768 * (GIB / 1024), needs(732)),
        Some(Some(768))
    );
    assert_eq!(start(GIB / 2 + 768 * (GIB / 1024) - 1, needs(732)), None);
    // Never beyond the model's own limit.
    assert_eq!(start(8 * GIB, needs(4000)), Some(Some(4096)));
    assert_eq!(start(8 * GIB, needs(4096)), Some(Some(4096)));
    assert_eq!(start(8 * GIB, needs(4097)), None);
    // A starting worker with that context is awaited.
    let starting = WorkerState {
        context_length: Some(1024),
        ..worker("w1", WorkerStatus::Starting, 0)
    };
    let waiting = needs(732);
    let pool = with_contexts(pool("a", vec![of_context("w0", 512), starting]));
    let plan = plan(std::slice::from_ref(&waiting), vec![pool]);
    assert_eq!(plan.actions, []);
    assert_eq!(plan.waiting[&waiting.id].reason, WaitReason::WorkerStarting);
}

// [ORCHCORE-182] A small worker of the same model that no job could use is evicted like any other.
#[test]
fn a_smaller_worker_of_the_model_makes_room_for_a_larger_one() {
    let mut full = with_contexts(pool(
        "a",
        vec![WorkerState {
            idle_since: Some(Timestamp::UNIX_EPOCH),
            ..of_context("w0", 512)
        }],
    ));
    full.devices[0].free_bytes = GIB / 2;
    let plan = plan(&[needs(732)], vec![full]);
    assert_eq!(evicted(&plan), [("a", "w0")]);
}

// [ORCHCORE-182] A refused start with a long context implies nothing about a shorter one.
#[test]
fn a_refused_context_holds_up_only_those_that_need_as_much() {
    let refused = |context_length| RefusedStart {
        model: "m".parse().unwrap(),
        device: Device::CPU,
        context_length,
        message: "no memory".into(),
    };
    let with = |context_length, job: QueuedJob| {
        let mut pool = with_contexts(pool("a", vec![]));
        pool.refused_starts = vec![refused(context_length)];
        let id = job.id;
        let plan = plan(&[job], vec![pool]);
        match plan.actions.as_slice() {
            [Action::StartWorker { context_length, .. }] => Ok(*context_length),
            _ => Err(plan.waiting[&id].reason),
        }
    };
    assert_eq!(with(Some(1024), job()), Ok(None));
    assert_eq!(with(Some(1024), needs(732)), Ok(Some(768)));
    assert_eq!(with(Some(768), needs(732)), Err(WaitReason::StartRefused));
    assert_eq!(with(None, needs(732)), Err(WaitReason::StartRefused));
}

// [ORCHCORE-183]
#[test]
fn the_context_is_a_filter_with_its_own_reason_and_remedy() {
    let explained = |job: &QueuedJob, pool: PoolState| {
        let plan = plan(std::slice::from_ref(job), vec![pool]);
        let why = Arc::clone(&plan.waiting[&job.id]);
        let last = why.filters.last().map(|count| (count.filter, count.pools));
        (why, last)
    };
    let job = needs(5000);
    let small = || with_contexts(pool("a", vec![of_context("w0", 512)]));
    let (why, last) = explained(&job, small());
    assert_eq!(
        (why.reason, last),
        (WaitReason::ContextShort, Some((Filter::Context, 0)))
    );
    assert!(
        why.message.contains("5000 tokens") && why.message.contains("allow 4096"),
        "{why:?}"
    );
    assert!(why.hint.contains("shorter prompt"), "{why:?}");
    let (why, _) = explained(&job, pool("a", vec![of_context("w0", 512)]));
    assert_eq!(why.reason, WaitReason::ContextShort);
    assert!(why.hint.contains("--context-length 5000"), "{why:?}");
    // A file allows the context, but there is no memory for it.
    let mut short = small();
    short.devices[0] = DeviceState {
        free_bytes: GIB,
        total_bytes: 2 * GIB,
        ..short.devices[0]
    };
    let (why, last) = explained(&needs(2000), short);
    assert_eq!(
        (why.reason, last),
        (WaitReason::MemoryShort, Some((Filter::MemoryFits, 0)))
    );
    assert!(
        why.message.contains("2000 tokens") && why.message.contains("needs 2.5 GiB"),
        "{why:?}"
    );
    assert!(why.hint.contains("shorter prompt"), "{why:?}");
}
