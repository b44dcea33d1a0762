//! Jobs that need a longer context than a worker has, and the memory that workers of different models share.

use jiff::{SignedDuration, Timestamp};
use orchestrator_core::api::tasks::{TaskExplanation, TaskWaiting};
use orchestrator_core::job::{AttemptOutcome, JobErrorCode};
use orchestrator_core::scheduler::{Filter, WaitReason};
use orchestrator_core::{JobId, JobStatus};
use pool_core::api::pool::{ContextMemory, PoolStatus};
use pool_core::api::worker::{CacheShortage, ContextOverflow};
use pool_core::worker::CacheRoom;
use pool_core::worker::WorkerStatus;
use serde_json::json;

use crate::support::{FakePool, FakeWorker, MODEL, Orchestrator, eventually};

/// A prompt of 731 tokens on a worker with 512.
const LONG: ContextOverflow = ContextOverflow {
    prompt_tokens: 731,
    needed_tokens: 732,
    context_length: 512,
    model_context: 8192,
};

/// Memory by context of the pool's default model.
const CONTEXTS: ContextMemory = ContextMemory {
    max_tokens: 8192,
    default_tokens: 512,
    base_bytes: 488,
    token_bytes: 1,
    floor_bytes: 0,
};

async fn worker_with(pool: &mut FakePool, id: &str, context_length: u32) -> FakeWorker {
    let worker = FakeWorker::start(id).await;
    let mut info = worker.info(WorkerStatus::Ready);
    info.context_length = Some(context_length);
    pool.workers.push(info);
    pool.endpoints.push(worker.endpoint());
    worker
}

/// Returns a registered pool with a worker of 512 tokens.
async fn small_worker(orchestrator: &Orchestrator) -> (FakePool, FakeWorker) {
    let mut pool = FakePool::start("pool-a").await;
    pool.models[0].context = Some(CONTEXTS);
    let small = worker_with(&mut pool, "worker-cpu-7", 512).await;
    pool.register(orchestrator).await;
    (pool, small)
}

async fn completes(orchestrator: &Orchestrator, worker: &FakeWorker, job: JobId) {
    worker.started(job);
    worker.end(job, 0);
    orchestrator.until(job, JobStatus::Completed).await;
}

async fn waits_for(orchestrator: &Orchestrator, job: JobId, reason: WaitReason) -> TaskWaiting {
    eventually(&format!("{reason:?}"), async || {
        let path = format!("/v2/tasks/{job}/explain");
        let explained: TaskExplanation = orchestrator.client.get(&path).await.unwrap();
        let waiting = explained.waiting;
        waiting.filter(|waiting| waiting.explanation.reason == reason)
    })
    .await
}

/// Submits a job limited to one attempt.
async fn only_once(orchestrator: &Orchestrator) -> JobId {
    let body = json!({"model": MODEL, "prompt": "hi", "max_attempts": 1});
    orchestrator.submit(body).await.unwrap().job_id
}

// [ORCHD-190]
#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_does_not_fit_goes_to_a_larger_worker_and_loses_nothing() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, small) = small_worker(&orchestrator).await;
    let large = worker_with(&mut pool, "worker-cpu-9", 4096).await;
    pool.beat(&orchestrator).await;
    let job = only_once(&orchestrator).await;
    small.request(1).await;
    small.overflow(job, LONG);
    assert_eq!(large.request(1).await.job_id, job.to_string());
    // The small worker takes jobs that fit meanwhile.
    let other = only_once(&orchestrator).await;
    assert_eq!(small.request(2).await.job_id, other.to_string());
    completes(&orchestrator, &small, other).await;
    completes(&orchestrator, &large, job).await;
    let view = orchestrator.show(job).await;
    let outcomes: Vec<_> = view.attempts.iter().map(|a| a.outcome).collect();
    assert_eq!(
        outcomes,
        [
            Some(AttemptOutcome::Refused),
            Some(AttemptOutcome::Completed)
        ]
    );
    assert!(pool.spawned.lock().unwrap().is_empty());
}

// [ORCHD-190] The number is stored with the job: after a restart the small worker is not tried again.
#[tokio::test(flavor = "multi_thread")]
async fn a_larger_worker_is_started_and_the_need_outlives_a_restart() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, small) = small_worker(&orchestrator).await;
    let job = only_once(&orchestrator).await;
    small.request(1).await;
    small.overflow(job, LONG);
    let asked = eventually("a start", async || {
        pool.spawned.lock().unwrap().first().cloned()
    })
    .await;
    // The prompt and an answer of 256 tokens, in steps of 256.
    assert_eq!(asked.context_length, Some(1024));
    waits_for(&orchestrator, job, WaitReason::WorkerStarting).await;

    let orchestrator = orchestrator.restart().await;
    let large = worker_with(&mut pool, "worker-cpu-9", 1024).await;
    pool.workers[1].status = WorkerStatus::Starting;
    let endpoint = pool.endpoints.pop().unwrap();
    pool.register(&orchestrator).await;
    waits_for(&orchestrator, job, WaitReason::WorkerStarting).await;
    pool.workers[1].status = WorkerStatus::Ready;
    pool.endpoints.push(endpoint);
    pool.beat(&orchestrator).await;
    assert_eq!(large.request(1).await.job_id, job.to_string());
    completes(&orchestrator, &large, job).await;
    assert_eq!(small.requests().len(), 1);
}

// [ORCHD-190] P6
#[tokio::test(flavor = "multi_thread")]
async fn a_prompt_beyond_the_model_fails_at_once() {
    let orchestrator = Orchestrator::start().await;
    let (_pool, small) = small_worker(&orchestrator).await;
    let job = orchestrator.job().await;
    small.request(1).await;
    let beyond = ContextOverflow {
        model_context: 731,
        ..LONG
    };
    small.overflow(job, beyond);
    let view = orchestrator.until(job, JobStatus::Failed).await;
    assert_eq!(
        (view.error.unwrap().code, view.attempts.len()),
        (JobErrorCode::ContextOverflow, 1)
    );
}

// [ORCHD-190] A worker that reports a wrong context can't hold a job forever.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_refuses_what_fits_costs_attempts() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    let worker = worker_with(&mut pool, "worker-cpu-0", 4096).await;
    pool.register(&orchestrator).await;
    let job = only_once(&orchestrator).await;
    worker.request(1).await;
    worker.overflow(job, LONG);
    worker.request(2).await;
    worker.overflow(job, LONG);
    let view = orchestrator.until(job, JobStatus::Failed).await;
    assert_eq!(view.error.unwrap().code, JobErrorCode::WorkerLost);
}

/// Returns a pool with a worker that has a cache of 8192 tokens, the worker, and a job that it runs. The pool has reported the
/// job, and this many free tokens.
async fn busy_worker(
    orchestrator: &Orchestrator,
    free_tokens: u32,
) -> (FakePool, FakeWorker, JobId) {
    let mut pool = FakePool::start("pool-a").await;
    let worker = worker_with(&mut pool, "worker-cpu-0", 8192).await;
    pool.workers[0].slots = 4;
    set_room(&mut pool, 0, 8192);
    pool.register(orchestrator).await;
    let first = only_once(orchestrator).await;
    worker.request(1).await;
    worker.started(first);
    set_room(&mut pool, 1, free_tokens);
    pool.beat(orchestrator).await;
    (pool, worker, first)
}

fn set_room(pool: &mut FakePool, active: u32, free_tokens: u32) {
    let worker = &mut pool.workers[0];
    worker.active = active;
    worker.cache = Some(CacheRoom {
        tokens: 8192,
        free_tokens,
        executions: None,
    });
}

async fn of_tokens(orchestrator: &Orchestrator, max_tokens: u32) -> JobId {
    let body = json!({"model": MODEL, "prompt": "hi", "max_tokens": max_tokens});
    orchestrator.submit(body).await.unwrap().job_id
}

// [ORCHD-198]
#[tokio::test(flavor = "multi_thread")]
async fn a_job_waits_for_room_in_the_cache_and_those_behind_it_wait_too() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, worker, first) = busy_worker(&orchestrator, 8192).await;
    assert!(worker.request(1).await.refuse_if_full);
    let large = only_once(&orchestrator).await;
    worker.request(2).await;
    worker.short(
        large,
        CacheShortage {
            needed_tokens: 5000,
            free_tokens: 3000,
        },
    );
    let waiting = waits_for(&orchestrator, large, WaitReason::CacheFull).await;
    let said = &waiting.explanation.message;
    assert!(said.contains("5000") && said.contains("3000"), "{said}");
    let later = only_once(&orchestrator).await;
    waits_for(&orchestrator, later, WaitReason::CacheFull).await;
    // 4096 free tokens are more than before, but still too few for the large job.
    set_room(&mut pool, 1, 4096);
    pool.beat(&orchestrator).await;
    assert_eq!(worker.requests().len(), 2);
    set_room(&mut pool, 1, 5120);
    pool.beat(&orchestrator).await;
    // The worker must have taken the large job before it can refuse the other.
    assert_eq!(worker.request(3).await.job_id, large.to_string());
    waits_for(&orchestrator, later, WaitReason::CacheFull).await;
    worker.started(large);
    assert_eq!(worker.request(4).await.job_id, later.to_string());
    for job in [first, large, later] {
        completes(&orchestrator, &worker, job).await;
    }
    let outcomes = orchestrator.show(large).await.attempts;
    let outcomes: Vec<_> = outcomes.iter().map(|attempt| attempt.outcome).collect();
    assert_eq!(
        outcomes,
        [
            Some(AttemptOutcome::Refused),
            Some(AttemptOutcome::Completed)
        ]
    );
}

// [ORCHD-246] Whether the large job fits is up to the worker. The small one would fit in any case.
#[tokio::test(flavor = "multi_thread")]
async fn no_job_overtakes_one_whose_room_is_uncertain() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, worker, _) = busy_worker(&orchestrator, 1024).await;
    let [large, small] = [5000, 10].map(|tokens| of_tokens(&orchestrator, tokens));
    let (large, small) = (large.await, small.await);
    assert_eq!(worker.request(2).await.job_id, large.to_string());
    waits_for(&orchestrator, small, WaitReason::CacheFull).await;
    worker.short(
        large,
        CacheShortage {
            needed_tokens: 5001,
            free_tokens: 1024,
        },
    );
    for job in [large, small] {
        let waiting = waits_for(&orchestrator, job, WaitReason::CacheFull).await;
        assert_eq!(waiting.queue_position, u64::from(job == small));
    }
    set_room(&mut pool, 1, 6000);
    pool.beat(&orchestrator).await;
    let mut given = [worker.request(3).await, worker.request(4).await].map(|asked| asked.job_id);
    given.sort_unstable();
    assert_eq!(given, [large, small].map(|job| job.to_string()));
    worker.started(small);
    completes(&orchestrator, &worker, large).await;
    // The next large job fits after all. The pool need not report for the last job to follow it.
    let [large, last] = [8000, 10].map(|tokens| of_tokens(&orchestrator, tokens));
    let (large, last) = (large.await, last.await);
    assert_eq!(worker.request(5).await.job_id, large.to_string());
    waits_for(&orchestrator, last, WaitReason::CacheFull).await;
    worker.started(large);
    assert_eq!(worker.request(6).await.job_id, last.to_string());
    worker.started(last);
    for job in [small, large, last] {
        worker.end(job, 0);
        orchestrator.until(job, JobStatus::Completed).await;
    }
}

// [ORCHD-246] The small jobs arrive while the orchestrator records the refusal of the large one.
#[tokio::test(flavor = "multi_thread")]
async fn no_job_overtakes_one_that_is_just_being_refused() {
    let orchestrator = Orchestrator::start().await;
    let (_pool, worker, _) = busy_worker(&orchestrator, 1024).await;
    for round in 0..10 {
        let large = of_tokens(&orchestrator, 5000).await;
        worker.request(2 + round).await;
        let shortage = CacheShortage {
            needed_tokens: 5001,
            free_tokens: 1024,
        };
        worker.short(large, shortage);
        let mut small = Vec::new();
        for _ in 0..5 {
            small.push(of_tokens(&orchestrator, 10).await);
        }
        for job in small.iter().chain([&large]) {
            waits_for(&orchestrator, *job, WaitReason::CacheFull).await;
        }
        assert_eq!(worker.requests().len(), 2 + round);
        for job in small.iter().chain([&large]) {
            orchestrator.cancel(*job).await;
        }
    }
}

// [ORCHD-247]
#[tokio::test(flavor = "multi_thread")]
async fn a_report_that_does_not_count_a_job_yet_leaves_no_room_for_another() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, worker, _) = busy_worker(&orchestrator, 1024).await;
    let mut jobs = [of_tokens(&orchestrator, 4000).await, JobId::random()];
    let shortage = CacheShortage {
        needed_tokens: 5000,
        free_tokens: 1024,
    };
    worker.request(2).await;
    worker.short(jobs[0], shortage);
    waits_for(&orchestrator, jobs[0], WaitReason::CacheFull).await;
    set_room(&mut pool, 1, 5120);
    pool.beat(&orchestrator).await;
    worker.request(3).await;
    // The worker runs the job, but has not counted its tokens.
    set_room(&mut pool, 2, 5120);
    pool.beat(&orchestrator).await;
    jobs[1] = of_tokens(&orchestrator, 4000).await;
    waits_for(&orchestrator, jobs[1], WaitReason::CacheFull).await;
    worker.started(jobs[0]);
    worker.request(4).await;
    worker.short(jobs[1], shortage);
    waits_for(&orchestrator, jobs[1], WaitReason::CacheFull).await;
    // The worker has not counted the 5000 tokens of the first job, although it is active.
    set_room(&mut pool, 2, 5200);
    pool.workers[0].cache.as_mut().unwrap().executions = Some(1);
    pool.beat(&orchestrator).await;
    eventually("the tokens that the first job leaves", async || {
        let waiting = waits_for(&orchestrator, jobs[1], WaitReason::CacheFull).await;
        let said = waiting.explanation.message;
        said.contains("at most 200 are free").then_some(())
    })
    .await;
    assert_eq!(worker.requests().len(), 4);
    set_room(&mut pool, 2, 5120);
    pool.beat(&orchestrator).await;
    worker.request(5).await;
    completes(&orchestrator, &worker, jobs[0]).await;
    completes(&orchestrator, &worker, jobs[1]).await;
}

// [ORCHD-198] A worker of an earlier build knows neither the field nor the refusal.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_says_nothing_of_its_cache_is_not_told_to_refuse() {
    let orchestrator = Orchestrator::start().await;
    let (_pool, worker) = small_worker(&orchestrator).await;
    let job = only_once(&orchestrator).await;
    assert!(!worker.request(1).await.refuse_if_full);
    completes(&orchestrator, &worker, job).await;
}

// [ORCHD-110] [ORCHCORE-183]
#[tokio::test(flavor = "multi_thread")]
async fn context_short_is_lifted_by_a_worker_with_the_context() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    // The pool does not report which contexts it can start.
    let small = worker_with(&mut pool, "worker-cpu-7", 512).await;
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    small.request(1).await;
    small.overflow(job, LONG);
    let waiting = waits_for(&orchestrator, job, WaitReason::ContextShort).await;
    let last = waiting.explanation.filters.last().unwrap();
    assert_eq!((last.filter, last.pools), (Filter::Context, 0));
    assert!(waiting.explanation.message.contains("732 tokens"));
    assert!(waiting.explanation.hint.contains("--context-length 732"));
    let large = worker_with(&mut pool, "worker-cpu-9", 732).await;
    pool.beat(&orchestrator).await;
    assert_eq!(large.request(1).await.job_id, job.to_string());
}

/// Returns a pool whose memory is filled by a worker of the default model, which has just become ready after loading
/// for `loading`.
async fn crowded(orchestrator: &Orchestrator, loading: SignedDuration) -> (FakePool, FakeWorker) {
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    let now = Timestamp::now();
    let info = &mut pool.workers[0];
    info.created_at = now - loading;
    (info.ready_at, info.idle_since) = (Some(now), Some(now));
    info.memory.predicted_bytes = 1 << 29;
    let mut other = pool.models[0].clone();
    other.model_ref = "tinyllama".parse().unwrap();
    pool.models.push(other);
    pool.register(orchestrator).await;
    pool.beat_with(orchestrator, full).await;
    (pool, worker)
}

fn full(status: &mut PoolStatus) {
    status.devices[0].memory_free_bytes = 0;
}

async fn of_other_model(orchestrator: &Orchestrator) -> JobId {
    let body = json!({"model": "tinyllama", "prompt": "hi"});
    orchestrator.submit(body).await.unwrap().job_id
}

async fn is_stopped(pool: &FakePool) {
    eventually("the stop", async || {
        (*pool.asked.stops.lock().unwrap() == ["worker-cpu-0"]).then_some(())
    })
    .await;
}

// [ORCHD-192] The worker could stay for a minute by the settings, and for three by its load time.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_no_job_waits_for_makes_room_at_once() {
    let orchestrator = Orchestrator::start().await;
    let (pool, _worker) = crowded(&orchestrator, SignedDuration::from_secs(60)).await;
    let asked = std::time::Instant::now();
    let job = of_other_model(&orchestrator).await;
    is_stopped(&pool).await;
    assert!(asked.elapsed().as_secs() < 30, "{:?}", asked.elapsed());
    waits_for(&orchestrator, job, WaitReason::Evicting).await;
}

// [ORCHD-192] The pool's report of an idle worker arrives after the next job of its model.
#[tokio::test(flavor = "multi_thread")]
async fn two_models_that_fit_one_at_a_time_take_turns() {
    let orchestrator = Orchestrator::start().await;
    let (mut pool, worker) = crowded(&orchestrator, SignedDuration::from_millis(500)).await;
    let first = orchestrator.job().await;
    worker.request(1).await;
    pool.workers[0].status = WorkerStatus::Busy;
    pool.workers[0].idle_since = None;
    pool.beat_with(&orchestrator, full).await;
    let other = of_other_model(&orchestrator).await;
    let mut running = first;
    let mut count = 1;
    // When a job of the resident model ends, another always waits.
    let stopped = loop {
        let next = orchestrator.job().await;
        worker.started(running);
        worker.end(running, 0);
        orchestrator.until(running, JobStatus::Completed).await;
        let outcome = eventually("the next job or the stop", async || {
            let stopped = !pool.asked.stops.lock().unwrap().is_empty();
            let taken = worker.requests().len() > count;
            (stopped || taken).then_some(stopped)
        })
        .await;
        if outcome {
            break next;
        }
        (running, count) = (next, count + 1);
    };
    is_stopped(&pool).await;
    let ready = pool.workers[0].ready_at.unwrap();
    let stayed = Timestamp::now().duration_since(ready);
    assert!(stayed >= SignedDuration::from_millis(1500), "{stayed:?}");
    assert!(count > 1, "the resident model had its turn");
    waits_for(&orchestrator, other, WaitReason::Evicting).await;
    assert_eq!(orchestrator.show(stopped).await.status, JobStatus::Queued);
}

/// Submits jobs with this model until one is refused, and returns the number of accepted jobs and the refusal.
async fn fill(
    orchestrator: &Orchestrator,
    model: &str,
) -> (usize, pool_core::kit::wire::ErrorBody) {
    for taken in 0.. {
        let body = json!({"model": model, "prompt": "hi"});
        if let Err(error) = orchestrator.submit(body).await {
            assert_eq!(error.status(), Some(429));
            return (taken, error.api().unwrap().clone());
        }
    }
    unreachable!()
}

// [ORCHD-191] P19
#[tokio::test(flavor = "multi_thread")]
async fn jobs_that_nothing_can_run_take_no_place_from_others() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 20).await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let first = of_other_model(&orchestrator).await;
    waits_for(&orchestrator, first, WaitReason::ModelMissing).await;
    let (taken, refusal) = fill(&orchestrator, "tinyllama").await;
    assert_eq!((taken, refusal.code.as_str()), (1, "QUEUE_FULL"));
    assert!(refusal.message.contains("nothing can run"), "{refusal:?}");
    assert!(refusal.hint.unwrap().contains("a tenth"));
    assert!(refusal.retry_after_ms.is_some());
    // Jobs that can run have the whole queue.
    let (taken, refusal) = fill(&orchestrator, MODEL).await;
    assert_eq!(taken, 20);
    assert!(
        refusal.message.contains("20 jobs are waiting"),
        "{refusal:?}"
    );

    // Now every job can run, and no further one is accepted.
    let mut other = pool.models[0].clone();
    other.model_ref = "tinyllama".parse().unwrap();
    pool.models.push(other);
    pool.beat(&orchestrator).await;
    eventually("the other share", async || {
        let (taken, refusal) = fill(&orchestrator, "tinyllama").await;
        assert_eq!(taken, 0);
        refusal
            .message
            .contains("20 jobs are waiting")
            .then_some(())
    })
    .await;

    // A restart loses none of the jobs, and a still unknown pool is no reason for a refusal.
    let orchestrator = orchestrator.restart().await;
    let listed: orchestrator_core::api::tasks::TaskList = orchestrator
        .client
        .get("/v2/tasks?limit=100")
        .await
        .unwrap();
    assert_eq!(listed.jobs.len(), 22);
    assert!(
        listed
            .jobs
            .iter()
            .all(|job| job.status == JobStatus::Queued)
    );
}

// [ORCHD-191] A queue of one job accepts one, runnable or not.
#[tokio::test(flavor = "multi_thread")]
async fn the_smallest_queue_takes_a_job_of_either_kind() {
    let orchestrator = Orchestrator::start_with(|config| config.queue.capacity = 1).await;
    let pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let first = of_other_model(&orchestrator).await;
    waits_for(&orchestrator, first, WaitReason::ModelMissing).await;
    assert_eq!(fill(&orchestrator, "tinyllama").await.0, 0);
    assert_eq!(fill(&orchestrator, MODEL).await.0, 1);
}
