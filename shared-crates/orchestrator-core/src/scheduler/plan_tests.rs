#[path = "plan_tests/cache.rs"]
mod cache;
#[path = "plan_tests/context.rs"]
mod context;
#[path = "plan_tests/memory.rs"]
mod memory;

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
        unanswered: 0,
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

// [ORCHCORE-052] One scenario per reason, in each of which the named thing is missing.
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

/// Returns a pool whose memory is full, with an idle worker of another model.
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

/// Returns a job for the model of [`loaded`] that is backing off after a lost attempt.
fn backing_off() -> QueuedJob {
    QueuedJob {
        not_before: Some(Timestamp::from_second(1000).unwrap()),
        ..job_for("other", Placement::default())
    }
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
    // The preference has limits: a free slot on another pool is better than waiting.
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
    // The download would leave `a` with less than the reserve.
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

    // A model is not downloaded while a pool that has it will soon be back.
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
    // A second worker on the same device would only share that device.
    assert_eq!(plan(&jobs, vec![busy()]).actions, []);
    // Only one additional worker is started at a time.
    let starting = pool("b", vec![worker("w0", WorkerStatus::Starting, 0)]);
    assert_eq!(
        plan(&jobs, vec![busy(), starting, pool("c", vec![])]).actions,
        []
    );
    // Helping out is no reason to evict a worker.
    let full = crowded("b", 1);
    let waits = at(100, snapshot(&jobs, vec![busy(), full]));
    assert_eq!(waits.actions, []);
    assert_eq!(waits.waiting[&jobs[0].id].reason, WaitReason::SlotsBusy);
}
