//! The fleet: registering, heartbeats, starting workers, tokens.

use std::os::unix::fs::PermissionsExt as _;

use orchestrator_core::JobStatus;
use orchestrator_core::api::models::ModelList;
use orchestrator_core::api::pools::{PoolList, PoolView};
use orchestrator_core::job::JobErrorCode;
use orchestrator_core::pool::PoolLiveness;
use orchestrator_core::scheduler::WaitReason;
use pool_core::kit::client::ApiClient;
use pool_core::kit::secret::Secret;
use pool_core::worker::WorkerStatus;
use serde_json::{Value, json};

use crate::support::{
    FakePool, FakeWorker, MODEL, Orchestrator, ended, eventually, one_worker, worker_info,
};

// [ORCHD-050]
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_are_taken_in_their_order_from_the_newest_instance_only() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    let beat = async |heartbeat| {
        orchestrator
            .client
            .post::<_, Value>("/v2/pools/pool-a/heartbeat", &heartbeat)
            .await
    };
    let error = beat(pool.next_heartbeat()).await.unwrap_err();
    assert_eq!(
        (error.status(), error.api().unwrap().code.as_str()),
        (Some(404), "POOL_NOT_FOUND")
    );

    pool.register(&orchestrator).await;
    let old = pool.next_heartbeat();
    let new = pool.next_heartbeat();
    beat(new.clone()).await.unwrap();
    for stale in [old, new] {
        let error = beat(stale).await.unwrap_err();
        assert_eq!(
            (error.status(), error.api().unwrap().code.as_str()),
            (Some(409), "STALE_HEARTBEAT")
        );
    }
    let of_old_instance = pool.next_heartbeat();
    pool.instance = "instance-2".into();
    pool.register(&orchestrator).await;
    assert_eq!(beat(of_old_instance).await.unwrap_err().status(), Some(409));

    let mut other = pool.registration();
    other.api_version = 99;
    let error = orchestrator
        .client
        .post::<_, Value>("/v2/pools/register", &other)
        .await
        .unwrap_err();
    assert_eq!(
        (error.status(), error.api().unwrap().code.as_str()),
        (Some(409), "VERSION_MISMATCH")
    );
    assert!(
        error.to_string().contains("version 99") && error.to_string().contains("version 1"),
        "{error}"
    );
}

// [ORCHD-057] P19
#[tokio::test(flavor = "multi_thread")]
async fn pools_are_bounded_and_a_known_one_is_never_refused() {
    let orchestrator = Orchestrator::start_with(|config| config.max_pools = 2).await;
    let pool = FakePool::start("pool-a").await;
    let register = async |orchestrator: &Orchestrator, id: &str, instance: &str| {
        let mut registration = pool.registration();
        registration.pool_id = id.into();
        registration.instance_id = instance.into();
        let call = reqwest::Client::new().post(format!("{}/v2/pools/register", orchestrator.url()));
        call.json(&registration).send().await.unwrap()
    };
    for (id, instance) in [("pool-a", "1"), ("pool-b", "1"), ("pool-a", "2")] {
        assert_eq!(register(&orchestrator, id, instance).await.status(), 200);
    }
    let refused = register(&orchestrator, "pool-c", "1").await;
    assert_eq!(refused.status(), 429);
    assert!(refused.headers().contains_key("retry-after"));
    let error = refused.json::<Value>().await.unwrap()["error"].clone();
    assert_eq!(error["code"], "TOO_MANY_POOLS");
    assert!(error["hint"].as_str().unwrap().contains("max_pools"));
    let list: PoolList = orchestrator.client.get("/v2/pools").await.unwrap();
    assert_eq!(list.pools.len(), 2);

    let (home, mut config) = orchestrator.stop().await;
    config.max_pools = 1;
    let orchestrator = Orchestrator::start_in(home, config).await.unwrap();
    for id in ["pool-a", "pool-b"] {
        assert_eq!(register(&orchestrator, id, "3").await.status(), 200, "{id}");
    }
    for id in ["pool-a", "pool-b"] {
        assert_eq!(register(&orchestrator, "pool-c", "1").await.status(), 429);
        let path = format!("/v2/pools/{id}");
        orchestrator.client.delete::<()>(&path).await.unwrap();
    }
    assert_eq!(register(&orchestrator, "pool-c", "1").await.status(), 200);
}

// [ORCHD-051]
#[tokio::test(flavor = "multi_thread")]
async fn the_fleet_is_shown_without_secrets() {
    let (orchestrator, pool, worker) = one_worker().await;
    let text = orchestrator.client.get_text("/v2/pools").await.unwrap();
    assert!(
        !text.contains(&worker.secret) && !text.contains("endpoints"),
        "{text}"
    );
    let list: PoolList = serde_json::from_str(&text).unwrap();
    assert_eq!(
        list.pools[0].status.as_ref().unwrap().workers[0].id,
        worker.id
    );
    let one: PoolView = orchestrator.client.get("/v2/pools/pool-a").await.unwrap();
    assert_eq!(
        (one.id.as_str(), one.liveness),
        (pool.id.as_str(), PoolLiveness::Online)
    );
    let models: ModelList = orchestrator.client.get("/v2/models").await.unwrap();
    let known = models
        .models
        .iter()
        .find(|model| model.model_ref.to_string() == MODEL)
        .unwrap();
    assert_eq!(known.pools, ["pool-a"]);
    orchestrator
        .client
        .delete::<()>("/v2/pools/pool-a")
        .await
        .unwrap();
    assert_eq!(
        orchestrator
            .client
            .get::<Value>("/v2/pools/pool-a")
            .await
            .unwrap_err()
            .status(),
        Some(404)
    );
}

// [ORCHD-052] P7: a silent pool gets no new work.
#[tokio::test(flavor = "multi_thread")]
async fn a_silent_pool_gets_no_work_until_it_speaks() {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    pool.interval_ms = 40;
    pool.register(&orchestrator).await;
    let liveness = async || {
        orchestrator
            .client
            .get::<PoolView>("/v2/pools/pool-a")
            .await
            .unwrap()
            .liveness
    };
    eventually("silence", async || {
        (liveness().await == PoolLiveness::Offline).then_some(())
    })
    .await;
    let job = orchestrator.job().await;
    let waiting = eventually("an explanation", async || {
        orchestrator.show(job).await.waiting
    })
    .await;
    assert_eq!(waiting.explanation.reason, WaitReason::PoolsAway);
    assert!(worker.requests().is_empty());
    pool.speaks_until("the job", &orchestrator, async || worker.requests().pop())
        .await;
}

// [ORCHD-053]
#[tokio::test(flavor = "multi_thread")]
async fn one_worker_is_started_where_none_has_the_model() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    orchestrator.job().await;
    eventually("a spawn", async || {
        pool.spawned.lock().unwrap().first().cloned()
    })
    .await;
    let waiting = eventually("an explanation", async || {
        orchestrator.show(job).await.waiting
    })
    .await;
    assert_eq!(waiting.explanation.reason, WaitReason::WorkerStarting);
    pool.workers = vec![worker_info("worker-cpu-0", WorkerStatus::Starting)];
    pool.beat(&orchestrator).await;
    pool.beat(&orchestrator).await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    pool.workers = vec![worker.info(WorkerStatus::Ready)];
    pool.endpoints = vec![worker.endpoint()];
    pool.beat(&orchestrator).await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());
    assert_eq!(pool.spawned.lock().unwrap().len(), 1);
}

// [ORCHD-054]
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_start_is_explained_and_not_hammered() {
    let orchestrator = Orchestrator::start().await;
    let pool = FakePool::start("pool-a").await;
    *pool.refusal.lock().unwrap() = Some("no port is free".into());
    pool.register(&orchestrator).await;
    let begun = std::time::Instant::now();
    let job = orchestrator.job().await;
    let waiting = eventually("the refusal", async || {
        let waiting = orchestrator.show(job).await.waiting?;
        (waiting.explanation.reason == WaitReason::StartRefused).then_some(waiting)
    })
    .await;
    assert!(
        waiting.explanation.message.contains("no port is free"),
        "{waiting:?}"
    );
    for _ in 0..20 {
        pool.beat(&orchestrator).await;
        orchestrator.job().await;
    }
    // The pause is at least a second.
    let tries = pool.spawned.lock().unwrap().len();
    let took = begun.elapsed();
    assert!(tries as u64 <= 1 + took.as_secs(), "{tries} in {took:?}");
    *pool.refusal.lock().unwrap() = None;
    eventually("a further try", async || {
        (pool.spawned.lock().unwrap().len() > tries).then_some(())
    })
    .await;
}

// [ORCHD-055] P18
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_can_not_be_loaded_fails_its_job_with_the_reason() {
    let orchestrator = Orchestrator::start().await;
    let mut pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let job = orchestrator.job().await;
    eventually("a spawn", async || {
        pool.spawned.lock().unwrap().first().cloned()
    })
    .await;
    let info = worker_info("worker-cpu-0", WorkerStatus::Starting);
    pool.workers = vec![ended(info, "the file is cut off at byte 1000", true)];
    pool.beat(&orchestrator).await;
    let view = orchestrator.until(job, JobStatus::Failed).await;
    let error = view.error.unwrap();
    assert_eq!(error.code, JobErrorCode::ModelFailed);
    assert!(error.message.contains("cut off at byte 1000"), "{error:?}");
    assert_eq!(pool.spawned.lock().unwrap().len(), 1);
}

// [ORCHD-060]
#[tokio::test(flavor = "multi_thread")]
async fn each_token_opens_its_own_side() {
    let home = tempfile::tempdir().unwrap();
    let token = |name: &str| {
        let path = home.path().join(name);
        std::fs::write(&path, format!("{name}-secret")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        Some(path)
    };
    let orchestrator = Orchestrator::start_with(|config| {
        config.token_file = token("api");
        config.pool_token_file = token("pool");
    })
    .await;
    let client =
        |secret: &str| ApiClient::new(&orchestrator.url(), Some(Secret::new(secret))).unwrap();
    let (api, pool, none) = (
        client("api-secret"),
        client("pool-secret"),
        &orchestrator.client,
    );
    let fake = FakePool::start("pool-a").await;
    let register = async |client: &ApiClient| {
        client
            .post::<_, Value>("/v2/pools/register", &fake.registration())
            .await
    };
    let list = async |client: &ApiClient| client.get::<Value>("/v2/tasks").await;

    assert_eq!(register(none).await.unwrap_err().status(), Some(401));
    register(&pool).await.unwrap();
    register(&api).await.unwrap();
    assert_eq!(list(none).await.unwrap_err().status(), Some(401));
    assert_eq!(list(&pool).await.unwrap_err().status(), Some(401));
    list(&api).await.unwrap();
    let submit = pool
        .post::<_, Value>("/v2/tasks", &json!({"model": MODEL, "prompt": "x"}))
        .await;
    assert_eq!(submit.unwrap_err().status(), Some(401));
    for open in ["/health", "/metrics"] {
        none.get_text(open).await.unwrap();
    }
}

// [ORCHD-061]
#[tokio::test(flavor = "multi_thread")]
async fn health_version_and_metrics_answer() {
    let (orchestrator, _pool, worker) = one_worker().await;
    let job = orchestrator.job().await;
    worker.request(1).await;
    worker.started(job);
    worker.tokens(job, 0..1);
    worker.end(job, 1);
    orchestrator.until(job, JobStatus::Completed).await;
    orchestrator
        .client
        .check_version(pool_core::ORCHESTRATOR_API_VERSION)
        .await
        .unwrap();
    orchestrator.client.get::<Value>("/ready").await.unwrap();
    let text = eventually("the figures", async || {
        let text = orchestrator.client.get_text("/metrics").await.unwrap();
        text.contains("orchd_attempts_ended_total{outcome=\"completed\"} 1")
            .then_some(text)
    })
    .await;
    for line in [
        "orchd_tasks_submitted_total{outcome=\"accepted\"} 1",
        "orchd_tasks_enqueued_total{priority=\"interactive\"} 1",
        "orchd_tasks_dispatched_total 1",
        "orchd_tasks_finished_total{outcome=\"completed\"} 1",
        "orchd_heartbeats_total{outcome=\"accepted\"} 1",
        "orchd_queue_depth{priority=\"interactive\"} 0",
        "orchd_active_streams 0",
        "orchd_lagged_total 0",
        "orchd_ttft_seconds_count 1",
        "orchd_queue_wait_seconds_count 1",
    ] {
        assert!(text.contains(line), "{line} is missing in\n{text}");
    }
}
