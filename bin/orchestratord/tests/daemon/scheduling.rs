//! Scheduling: the choice of a worker, the reasons for waiting, and the end of each reason.

use std::time::Duration;

use jiff::Timestamp;
use orchestrator_core::api::events::TaskEvent;
use orchestrator_core::api::tasks::TaskExplanation;
use orchestrator_core::config::OrchestratorConfig;
use orchestrator_core::queue::QueueOrder;
use orchestrator_core::scheduler::{Explanation, Filter, WaitReason};
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::models::{
    DownloadEnd, DownloadErrorCode, DownloadEvent, DownloadFailure, DownloadPhase, DownloadProgress,
};
use pool_core::api::pool::{PoolStatus, WorkerEndpoint};
use pool_core::worker::{Device, WorkerInfo, WorkerStatus};
use serde_json::json;

use crate::support::{
    FakePool, FakeWorker, MODEL, Orchestrator, ended, eventually, one_worker, worker_info,
};

async fn explain(orchestrator: &Orchestrator, job: JobId) -> TaskExplanation {
    let path = format!("/v2/tasks/{job}/explain");
    orchestrator.client.get(&path).await.unwrap()
}

/// Waits until the job waits for this reason, and returns the explanation.
async fn waits_for(
    orchestrator: &Orchestrator,
    job: JobId,
    reason: WaitReason,
) -> orchestrator_core::api::tasks::TaskWaiting {
    eventually(&format!("{reason:?}"), async || {
        let waiting = explain(orchestrator, job).await.waiting;
        waiting.filter(|waiting| waiting.explanation.reason == reason)
    })
    .await
}

/// Waits until the pool is asked for a worker.
async fn started(pool: &FakePool) {
    eventually("a start", async || {
        pool.spawned.lock().unwrap().first().cloned()
    })
    .await;
}

/// Starts the worker that the pool was asked for, and waits until the worker has the job.
async fn runs(orchestrator: &Orchestrator, pool: &mut FakePool, job: JobId) {
    started(pool).await;
    let latest = pool.spawned.lock().unwrap().len() - 1;
    let worker = FakeWorker::start(&format!("worker-cpu-{latest}")).await;
    let id = worker.info(WorkerStatus::Ready).id;
    pool.workers.retain(|known| known.id != id);
    pool.workers.push(worker.info(WorkerStatus::Ready));
    pool.endpoints.push(worker.endpoint());
    pool.beat(orchestrator).await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());
}

/// Returns an idle worker of another model that holds half of the pool's memory.
fn idle_worker() -> WorkerInfo {
    let mut info = worker_info("worker-cpu-9", WorkerStatus::Ready);
    info.model_ref = "tinyllama".parse().unwrap();
    info.ready_at = Some(Timestamp::UNIX_EPOCH);
    info.idle_since = Some(Timestamp::UNIX_EPOCH);
    info.memory.predicted_bytes = 1 << 29;
    info
}

/// Returns a pool with these workers.
async fn pool_with(workers: Vec<WorkerInfo>) -> FakePool {
    let mut pool = FakePool::start("pool-a").await;
    let endpoint = |worker: &WorkerInfo| WorkerEndpoint {
        worker_id: worker.id.clone(),
        url: "http://127.0.0.1:9".into(),
        secret: "s".into(),
    };
    pool.endpoints = workers.iter().map(endpoint).collect();
    pool.workers = workers;
    pool
}

/// Checks that a job waits for `reason` on a pool whose report `wrong` has changed, and that the job starts once the pool's
/// report is right again, with no other change.
async fn lifted_by_the_pool(reason: WaitReason, wrong: impl FnOnce(&mut PoolStatus)) {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    pool.beat_with(&orchestrator, wrong).await;
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, reason).await;
    assert!(!waiting.explanation.hint.is_empty());
    let last = waiting.explanation.filters.last().unwrap();
    assert_eq!(last.pools, 0, "{waiting:?}");
    assert!(pool.spawned.lock().unwrap().is_empty());
    pool.beat(&orchestrator).await;
    runs(&orchestrator, &mut pool, job).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn no_pool_is_lifted_by_a_pool_that_registers() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, WaitReason::NoPool).await;
    assert_eq!(waiting.explanation.filters[0].filter, Filter::Known);
    let body = json!({"model": MODEL, "prompt": "hi", "placement": {"pool": "pool-b"}});
    let elsewhere = orchestrator.submit(body).await.unwrap().job_id;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    runs(&orchestrator, &mut pool, job).await;
    let waiting = waits_for(&orchestrator, elsewhere, WaitReason::NoPool).await;
    assert!(
        waiting.explanation.message.contains("`pool-b`"),
        "{waiting:?}"
    );
    let mut wanted = FakePool::start("pool-b").await;
    wanted.register(&orchestrator).await;
    runs(&orchestrator, &mut wanted, elsewhere).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn pools_away_is_lifted_by_a_pool_that_drains_no_more() {
    lifted_by_the_pool(WaitReason::PoolsAway, |status| status.draining = true).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn no_backend_is_lifted_by_a_worker_program() {
    lifted_by_the_pool(WaitReason::NoBackend, |status| status.backends.clear()).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn no_backend_is_lifted_by_the_device_that_the_job_asks_for() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let body = json!({"model": MODEL, "prompt": "hi", "placement": {"device": "cuda:0"}});
    let job = orchestrator.submit(body).await.unwrap().job_id;
    let waiting = waits_for(&orchestrator, job, WaitReason::NoBackend).await;
    let Explanation { message, hint, .. } = waiting.explanation;
    assert!(
        message.contains("cuda:0") && hint.contains("placement.device"),
        "{message}: {hint}"
    );
    assert!(pool.spawned.lock().unwrap().is_empty());
    let cuda: Device = "cuda:0".parse().unwrap();
    pool.beat_with(&orchestrator, |status| {
        let mut gpu = status.devices[0].clone();
        gpu.device = cuda;
        status.backends.push(cuda.backend);
        status.devices.push(gpu);
    })
    .await;
    started(&pool).await;
    assert_eq!(pool.spawned.lock().unwrap()[0].gpu, Some(0));
    let worker = FakeWorker::start("worker-cuda-0").await;
    pool = pool.has(&worker);
    pool.workers[0].device = cuda;
    pool.beat(&orchestrator).await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn model_missing_is_lifted_by_the_file() {
    lifted_by_the_pool(WaitReason::ModelMissing, |status| status.models.clear()).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn memory_short_is_lifted_by_memory() {
    lifted_by_the_pool(WaitReason::MemoryShort, |status| {
        status.devices[0].memory_free_bytes = 999;
    })
    .await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn start_refused_is_lifted_by_a_pool_that_agrees() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    *pool.refusal.lock().unwrap() = Some("no port is free".into());
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, WaitReason::StartRefused).await;
    assert!(waiting.explanation.message.contains("no port is free"));
    *pool.refusal.lock().unwrap() = None;
    waits_for(&orchestrator, job, WaitReason::WorkerStarting).await;
    runs(&orchestrator, &mut pool, job).await;
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn worker_starting_is_lifted_by_the_worker_being_ready() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.workers = vec![worker_info("worker-cpu-0", WorkerStatus::Starting)];
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    waits_for(&orchestrator, job, WaitReason::WorkerStarting).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    pool.workers = vec![worker.info(WorkerStatus::Ready)];
    pool.endpoints = vec![worker.endpoint()];
    pool.beat(&orchestrator).await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());
}

// [ORCHD-110] A worker is ready for its pool before the orchestrator has its endpoint.
#[tokio::test(flavor = "multi_thread")]
async fn worker_starting_is_lifted_by_the_address_of_the_worker() {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    let endpoints = std::mem::take(&mut pool.endpoints);
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    waits_for(&orchestrator, job, WaitReason::WorkerStarting).await;
    assert!(orchestrator.show(job).await.attempts.is_empty());
    pool.endpoints = endpoints;
    pool.beat(&orchestrator).await;
    assert_eq!(worker.request(1).await.attempt, 1);
}

// [ORCHD-110] [ORCHD-114]
#[tokio::test(flavor = "multi_thread")]
async fn slots_busy_is_lifted_by_the_end_of_the_job_before_and_the_start_is_estimated() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let first = orchestrator.job().await;
    worker.request(1).await;
    let (second, third) = (orchestrator.job().await, orchestrator.job().await);
    let waiting = waits_for(&orchestrator, second, WaitReason::SlotsBusy).await;
    // No job has shown yet how long a job takes.
    assert_eq!(
        (waiting.queue_position, waiting.estimated_start_ms),
        (0, None)
    );
    worker.started(first);
    worker.end(first, 0);
    assert_eq!(worker.request(2).await.job_id, second.to_string());
    let estimated = eventually("an estimate", async || {
        let waiting = explain(&orchestrator, third).await.waiting?;
        waiting.estimated_start_ms
    })
    .await;
    assert!(estimated < 60_000, "{estimated}");
}

// [ORCHD-110]
#[tokio::test(flavor = "multi_thread")]
async fn backing_off_is_lifted_by_time() {
    let (orchestrator, mut pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    worker.kill().await;
    pool.workers = vec![ended(worker.info(WorkerStatus::Ready), "killed", false)];
    pool.endpoints.clear();
    pool.beat(&orchestrator).await;
    loop {
        let got = reader.any().await.expect("the job is not over");
        if let TaskEvent::Waiting(waiting) = got.event
            && waiting.explanation.reason == WaitReason::BackingOff
        {
            break;
        }
    }
    runs(&orchestrator, &mut pool, job).await;
}

fn evicts(config: &mut OrchestratorConfig) {
    config.scheduler.min_residence_s = 0;
    config.scheduler.idle_ttl_s = 0;
}

// [ORCHD-110] [ORCHD-111]
#[tokio::test(flavor = "multi_thread")]
async fn evicting_is_lifted_by_the_end_of_the_idle_worker() {
    let orchestrator = Orchestrator::start_with(evicts).await;
    let mut pool = pool_with(vec![idle_worker()]).await;
    pool.register(&orchestrator).await;
    pool.beat_with(&orchestrator, |status| {
        status.devices[0].memory_free_bytes = 0;
    })
    .await;
    let job = orchestrator.job().await;
    waits_for(&orchestrator, job, WaitReason::Evicting).await;
    eventually("the stop", async || {
        (*pool.asked.stops.lock().unwrap() == ["worker-cpu-9"]).then_some(())
    })
    .await;
    // A late heartbeat changes nothing, and no second stop is sent.
    pool.beat_with(&orchestrator, |status| {
        status.devices[0].memory_free_bytes = 0;
    })
    .await;
    waits_for(&orchestrator, job, WaitReason::Evicting).await;
    assert!(pool.spawned.lock().unwrap().is_empty());
    pool.workers[0].status = WorkerStatus::Stopped;
    pool.beat(&orchestrator).await;
    runs(&orchestrator, &mut pool, job).await;
    assert_eq!(pool.asked.stops.lock().unwrap().len(), 1);
}

// [ORCHD-111]
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_with_work_is_not_evicted() {
    let orchestrator = Orchestrator::start_with(evicts).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    pool.workers[0].ready_at = Some(Timestamp::UNIX_EPOCH);
    pool.workers[0].idle_since = Some(Timestamp::UNIX_EPOCH);
    pool.workers[0].memory.predicted_bytes = 1 << 29;
    let mut other = pool.models[0].clone();
    other.model_ref = "tinyllama".parse().unwrap();
    pool.models.push(other);
    pool.register(&orchestrator).await;
    let full = |status: &mut PoolStatus| status.devices[0].memory_free_bytes = 0;
    pool.beat_with(&orchestrator, full).await;
    let running = orchestrator.job().await;
    worker.request(1).await;
    let body = json!({"model": "tinyllama", "prompt": "hi"});
    let waiting = orchestrator.submit(body).await.unwrap().job_id;
    waits_for(&orchestrator, waiting, WaitReason::MemoryShort).await;
    // The pool has not noticed the worker's job, and still reports the worker as idle.
    pool.beat_with(&orchestrator, full).await;
    waits_for(&orchestrator, waiting, WaitReason::MemoryShort).await;
    assert!(pool.asked.stops.lock().unwrap().is_empty());
    worker.started(running);
    worker.end(running, 0);
    orchestrator.until(running, JobStatus::Completed).await;
    eventually("the stop", async || {
        (*pool.asked.stops.lock().unwrap() == ["worker-cpu-0"]).then_some(())
    })
    .await;
}

// [ORCHD-112]
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_idle_for_long_is_unloaded() {
    let orchestrator = Orchestrator::start_with(|config| config.scheduler.idle_ttl_s = 5).await;
    let fresh = WorkerInfo {
        id: "worker-cpu-8".into(),
        idle_since: Some(Timestamp::now()),
        ..idle_worker()
    };
    let pool = pool_with(vec![idle_worker(), fresh]).await;
    pool.register(&orchestrator).await;
    let stops = || pool.asked.stops.lock().unwrap().clone();
    eventually("the first stop", async || {
        (!stops().is_empty()).then_some(())
    })
    .await;
    // Only time passes.
    eventually("the second stop", async || {
        (stops() == ["worker-cpu-9", "worker-cpu-8"]).then_some(())
    })
    .await;
}

fn downloads(config: &mut OrchestratorConfig) {
    config.scheduler.download = true;
}

fn large_disk(status: &mut PoolStatus) {
    status.disk.free_bytes = 1 << 40;
    status.models.clear();
}

fn ask_count(pool: &FakePool) -> usize {
    pool.asked.downloads.lock().unwrap().len()
}

// [ORCHD-110] [ORCHD-113]
#[tokio::test(flavor = "multi_thread")]
async fn download_refused_is_lifted_by_room_and_downloading_by_the_file() {
    let orchestrator = Orchestrator::start_with(downloads).await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    pool.beat_with(&orchestrator, |status| status.models.clear())
        .await;
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, WaitReason::DownloadRefused).await;
    assert!(
        waiting.explanation.hint.contains("make room"),
        "{waiting:?}"
    );
    assert_eq!(ask_count(&pool), 0);

    pool.beat_with(&orchestrator, large_disk).await;
    waits_for(&orchestrator, job, WaitReason::Downloading).await;
    let say = |event| pool.asked.events.lock().unwrap().push(event);
    say(DownloadEvent::Progress(DownloadProgress {
        phase: DownloadPhase::Downloading,
        done_bytes: 43,
        total_bytes: Some(100),
        bytes_per_s: 1,
    }));
    eventually("its progress", async || {
        let waiting = explain(&orchestrator, job).await.waiting?;
        waiting.explanation.message.contains("43 %").then_some(())
    })
    .await;
    say(DownloadEvent::End(DownloadEnd {
        model_ref: MODEL.parse().unwrap(),
        path: "/models/m.gguf".into(),
        size_bytes: 100,
        sha256: "ab".into(),
        already_there: false,
    }));
    // No heartbeat shows the model yet, but the download is not requested a second time.
    pool.beat_with(&orchestrator, large_disk).await;
    waits_for(&orchestrator, job, WaitReason::Downloading).await;
    pool.beat(&orchestrator).await;
    runs(&orchestrator, &mut pool, job).await;
    assert_eq!(*pool.asked.downloads.lock().unwrap(), [MODEL]);
}

// [ORCHD-113]
#[tokio::test(flavor = "multi_thread")]
async fn a_download_that_failed_is_explained_and_not_asked_for_again_and_again() {
    let orchestrator = Orchestrator::start_with(downloads).await;
    let pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let failure = DownloadFailure {
        code: DownloadErrorCode::SourceRefused,
        message: "the source wants a token".into(),
        hint: None,
        retriable: false,
    };
    *pool.asked.events.lock().unwrap() = vec![DownloadEvent::Error(failure)];
    pool.beat_with(&orchestrator, large_disk).await;
    let begun = std::time::Instant::now();
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, WaitReason::DownloadRefused).await;
    assert!(
        waiting.explanation.message.contains("wants a token"),
        "{waiting:?}"
    );
    for _ in 0..20 {
        pool.beat_with(&orchestrator, large_disk).await;
        orchestrator.job().await;
    }
    waits_for(&orchestrator, job, WaitReason::DownloadRefused).await;
    // The pause is at least five seconds.
    let (asked, took) = (ask_count(&pool) as u64, begun.elapsed());
    assert!(asked <= 1 + took.as_secs() / 5, "{asked} in {took:?}");
}

// [ORCHD-113]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_downloaded_unless_that_is_allowed() {
    let orchestrator = Orchestrator::start().await;
    let pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    pool.beat_with(&orchestrator, large_disk).await;
    let job = orchestrator.job().await;
    let waiting = waits_for(&orchestrator, job, WaitReason::ModelMissing).await;
    assert!(
        waiting.explanation.hint.contains("scheduler.download"),
        "{waiting:?}"
    );
    assert_eq!(ask_count(&pool), 0);
}

/// Returns two pools with one worker each.
async fn two_pools(orchestrator: &Orchestrator) -> [(FakePool, FakeWorker); 2] {
    let mut pools = Vec::new();
    for id in ["pool-a", "pool-b"] {
        let worker = FakeWorker::start("worker-cpu-0").await;
        let pool = FakePool::start(id).await.has(&worker);
        pool.register(orchestrator).await;
        pools.push((pool, worker));
    }
    pools.try_into().ok().unwrap()
}

async fn run_to_end(
    orchestrator: &Orchestrator,
    worker: &FakeWorker,
    body: serde_json::Value,
) -> JobId {
    let count = worker.requests().len();
    let job = orchestrator.submit(body).await.unwrap().job_id;
    assert_eq!(worker.request(count + 1).await.job_id, job.to_string());
    worker.started(job);
    worker.end(job, 0);
    orchestrator.until(job, JobStatus::Completed).await;
    job
}

// [ORCHD-115]
#[tokio::test(flavor = "multi_thread")]
async fn a_session_goes_back_to_its_pool_and_a_placement_is_honoured() {
    let orchestrator = Orchestrator::start().await;
    let [_, (_pool_b, on_b)] = &two_pools(&orchestrator).await;
    let placed =
        json!({"model": MODEL, "prompt": "hi", "session_id": "s", "placement": {"pool": "pool-b"}});
    let first = run_to_end(&orchestrator, on_b, placed).await;
    let why = async |job| explain(&orchestrator, job).await.placements[0].why.clone();
    assert!(why(first).await.unwrap().contains("asks for this pool"));
    // Without the session, the job would go to `pool-a`, which is before `pool-b`.
    let second = json!({"model": MODEL, "prompt": "hi", "session_id": "s"});
    let second = run_to_end(&orchestrator, on_b, second).await;
    assert!(why(second).await.unwrap().contains("session"));
}

// [ORCHD-116]
#[tokio::test(flavor = "multi_thread")]
async fn the_policy_is_the_configured_one() {
    let orchestrator = Orchestrator::start_with(|config| {
        config.scheduler.policy = "round-robin".parse().unwrap();
    })
    .await;
    let pools = &two_pools(&orchestrator).await;
    let body = || json!({"model": MODEL, "prompt": "hi"});
    for (_, worker) in pools.iter().chain(pools) {
        let job = run_to_end(&orchestrator, worker, body()).await;
        let explained = explain(&orchestrator, job).await;
        assert_eq!(
            (explained.waiting, explained.status),
            (None, JobStatus::Completed)
        );
        let why = explained.placements[0].why.clone().unwrap();
        assert!(
            why.contains("best of 2") && why.contains("round-robin"),
            "{why}"
        );
    }
}

// [ORCHD-117]
#[tokio::test(flavor = "multi_thread")]
async fn readers_are_told_when_a_job_waits_for_something_else() {
    let orchestrator = Orchestrator::start().await;
    let job = orchestrator.job().await;
    let mut reader = orchestrator.follow(job, None).await.unwrap();
    let mut reason = async || loop {
        let got = reader.any().await.expect("the job is not over");
        if let TaskEvent::Waiting(waiting) = got.event {
            break waiting.explanation.reason;
        }
    };
    assert_eq!(reason().await, WaitReason::NoPool);
    let pool = FakePool::start("pool-a").await;
    *pool.refusal.lock().unwrap() = Some("no".into());
    let _: serde_json::Value = orchestrator
        .client
        .post("/v2/pools/register", &pool.registration())
        .await
        .unwrap();
    pool.beat_with(&orchestrator, |status| status.models.clear())
        .await;
    // A pass may come between the registration and the heartbeat.
    let mut next = reason().await;
    if next == WaitReason::PoolsAway {
        next = reason().await;
    }
    assert_eq!(next, WaitReason::ModelMissing);
}

// [ORCHD-118]
#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_job_has_no_explanation() {
    let orchestrator = Orchestrator::start().await;
    let path = format!("/v2/tasks/{}/explain", JobId::random());
    let error = orchestrator
        .client
        .get::<TaskExplanation>(&path)
        .await
        .unwrap_err();
    assert_eq!(error.status(), Some(404));
}

// [ORCHD-119] P19
#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_bounded_in_bytes_and_says_when_to_come_back() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity_bytes = 3500).await;
    let body = || json!({"model": MODEL, "prompt": "x".repeat(1000)});
    let first = orchestrator.submit(body()).await.unwrap().job_id;
    let error = orchestrator.submit(body()).await;
    assert!(error.is_ok(), "two fit");
    let error = orchestrator.submit(body()).await.unwrap_err();
    let refusal = error.api().unwrap();
    assert_eq!(
        (error.status(), refusal.code.as_str()),
        (Some(429), "QUEUE_FULL")
    );
    let pause = refusal.retry_after_ms.unwrap();
    assert!((1000..=60_000).contains(&pause), "{pause}");
    assert!(refusal.hint.as_ref().unwrap().contains("capacity_bytes"));
    orchestrator.cancel(first).await;
    orchestrator.submit(body()).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), orchestrator.stop())
        .await
        .unwrap();
}

// [ORCHD-248]
#[tokio::test(flavor = "multi_thread")]
async fn the_order_of_the_queue_is_a_setting() {
    for (order, later_is_ahead) in [(QueueOrder::Fair, true), (QueueOrder::Fifo, false)] {
        let orchestrator = Orchestrator::start_with(|config| config.queue.order = order).await;
        let body = |priority| json!({"model": MODEL, "prompt": "hi", "priority": priority});
        let batch = orchestrator.submit(body("batch")).await.unwrap().job_id;
        let interactive = orchestrator.submit(body("interactive")).await.unwrap();
        assert_eq!(interactive.queue_position, Some(u64::from(!later_is_ahead)));
        let ahead_of_batch = async |orchestrator: &Orchestrator| {
            let explanation = explain(orchestrator, batch).await;
            explanation.waiting.unwrap().queue_position
        };
        let expected = u64::from(later_is_ahead);
        assert_eq!(ahead_of_batch(&orchestrator).await, expected, "{order:?}");
        // Jobs that waited before a restart have the same order after it.
        let (home, config) = orchestrator.stop().await;
        let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
        assert_eq!(ahead_of_batch(&orchestrator).await, expected, "{order:?}");
    }
}
