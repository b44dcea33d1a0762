use std::collections::BTreeMap;

use jiff::SignedDuration;
use pool_core::worker::ModelFile;

use super::*;
use crate::job::Priority;
use crate::scheduler::{DeviceState, LeastLoaded, ModelState, RefusedStart, Settings};

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
        slots: 2,
        active,
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

    let refused = RefusedStart {
        model: "m".parse().unwrap(),
        device: Device::CPU,
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
