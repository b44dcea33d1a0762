//! Standing of pools: awaited after a restart, stopped on purpose, draining, and two instances with one id.

use std::sync::atomic::Ordering;

use orchestrator_core::JobStatus;
use orchestrator_core::api::pools::{PoolList, PoolView, PoolViewState};
use orchestrator_core::api::tasks::TaskExplanation;
use orchestrator_core::pool::PoolLiveness;
use orchestrator_core::scheduler::WaitReason;
use pool_core::kit::client::ClientError;
use pool_core::kit::wire::ErrorBody;
use serde_json::{Value, json};

use crate::support::{Api, FakePool, FakeWorker, MODEL, Orchestrator, eventually, one_worker};

async fn view(orchestrator: &Api) -> PoolView {
    orchestrator.client.get("/v2/pools/pool-a").await.unwrap()
}

async fn registration(orchestrator: &Api, pool: &FakePool) -> Result<(), Box<ErrorBody>> {
    let request = pool.registration();
    let answer = orchestrator
        .client
        .post::<_, Value>("/v2/pools/register", &request);
    match answer.await {
        Ok(_) => Ok(()),
        Err(ClientError::Api { error, .. }) => Err(error),
        Err(error) => panic!("{error}"),
    }
}

async fn goodbye(orchestrator: &Api, pool: &FakePool) -> Result<(), ClientError> {
    let path = format!("/v2/pools/{}?instance_id={}", pool.id, pool.instance);
    orchestrator.client.delete::<()>(&path).await
}

// [ORCHD-058] P24: a restarted orchestrator asks the known pools to report, and meanwhile names them in explanations.
#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_orchestrator_asks_its_pools_at_once() {
    let (orchestrator, pool, worker) = one_worker().await;
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Online);
    let orchestrator = orchestrator.restart().await;
    eventually("the question", async || {
        (pool.asked.beats.load(Ordering::Relaxed) == 1).then_some(())
    })
    .await;
    let awaited = view(&orchestrator).await;
    assert_eq!(
        (awaited.state, awaited.liveness),
        (PoolViewState::Awaited, PoolLiveness::Suspect)
    );
    let job = orchestrator.job().await;
    let explained: TaskExplanation = eventually("an explanation", async || {
        let path = format!("/v2/tasks/{job}/explain");
        let explained: TaskExplanation = orchestrator.client.get(&path).await.unwrap();
        explained.waiting.is_some().then_some(explained)
    })
    .await;
    let waiting = explained.waiting.unwrap().explanation;
    assert_eq!(waiting.reason, WaitReason::PoolsAway);
    for part in [
        "pool `pool-a`",
        "not reported since orchestratord started",
        "expected within",
    ] {
        assert!(waiting.message.contains(part), "{}", waiting.message);
    }
    pool.beat(&orchestrator).await;
    assert_eq!(worker.request(1).await.job_id, job.to_string());
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Online);
}

// [ORCHD-059] P24: two live instances with one id do not take the pool from each other.
#[tokio::test(flavor = "multi_thread")]
async fn a_second_host_with_the_same_pool_id_is_refused_and_shown() {
    let orchestrator = Orchestrator::start().await;
    let mut first = FakePool::start("pool-a").await;
    first.host_id = Some("host-1".into());
    first.register(&orchestrator).await;
    let mut second = FakePool::start("pool-a").await;
    (second.instance, second.host_id) = ("other-1".into(), Some("host-2".into()));
    let refusal = registration(&orchestrator, &second).await.unwrap_err();
    assert_eq!(refusal.code, "POOL_ID_TAKEN");
    assert!(
        refusal.message.contains(&first.registration().url),
        "{refusal:?}"
    );
    assert!(
        refusal.hint.as_ref().unwrap().contains("LLORCH_POOL_ID"),
        "{refusal:?}"
    );
    let shown = view(&orchestrator).await;
    let conflict = shown.conflict.unwrap();
    assert_eq!(
        (conflict.url, conflict.instance_id.as_str()),
        (second.registration().url, "other-1")
    );
    first.beat(&orchestrator).await;
    assert_eq!(view(&orchestrator).await.url, first.registration().url);

    // A restart on the holder's host replaces the holder at once, at any address; the predecessor is refused afterwards.
    let mut restarted = FakePool::start("pool-a").await;
    (restarted.instance, restarted.host_id) = ("instance-2".into(), first.host_id.clone());
    registration(&orchestrator, &restarted).await.unwrap();
    restarted.beat(&orchestrator).await;
    let copy = registration(&orchestrator, &first).await.unwrap_err();
    assert_eq!(
        copy.code, "POOL_ID_TAKEN",
        "a copied folder keeps both alive: {copy:?}"
    );

    // The orchestrator remembers the holder across a restart, before the holder reports.
    let orchestrator = orchestrator.restart().await;
    let refusal = registration(&orchestrator, &second).await.unwrap_err();
    assert_eq!(refusal.code, "POOL_ID_TAKEN");
    // The refused instance gives up, and the conflict is over.
    assert!(view(&orchestrator).await.conflict.is_some());
    goodbye(&orchestrator, &second).await.unwrap();
    assert_eq!(view(&orchestrator).await.conflict, None);
    // The holder stops, and the id is free.
    goodbye(&orchestrator, &restarted).await.unwrap();
    registration(&orchestrator, &second).await.unwrap();
    assert_eq!(view(&orchestrator).await.url, second.registration().url);
}

// [ORCHD-059] An id is free when its holder is lost. A pool of an older release is identified by its address.
#[tokio::test(flavor = "multi_thread")]
async fn a_lost_pool_gives_its_id_away_and_an_older_one_is_known_by_its_address() {
    let orchestrator = Orchestrator::start().await;
    let mut first = FakePool::start("pool-a").await;
    first.interval_ms = 50;
    first.register(&orchestrator).await;
    let mut other = FakePool::start("pool-a").await;
    other.instance = "other-1".into();
    let refused = registration(&orchestrator, &other).await.unwrap_err();
    assert_eq!(refused.code, "POOL_ID_TAKEN");
    first.instance = "instance-2".into();
    registration(&orchestrator, &first).await.unwrap();
    eventually("its loss", async || {
        registration(&orchestrator, &other).await.ok()
    })
    .await;
    assert_eq!(view(&orchestrator).await.url, other.registration().url);
}

// [ORCHD-098] P8 P24: a pool that stops on purpose is shown as stopped at once, gets no work, and finishes its running
// jobs.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_stops_is_shown_so_and_loses_nothing() {
    let (orchestrator, mut pool, worker) = one_worker().await;
    let running = orchestrator.job().await;
    worker.request(1).await;
    worker.started(running);
    worker.tokens(running, 0..2);
    orchestrator.until(running, JobStatus::Running).await;
    let late = pool.next_heartbeat();
    goodbye(&orchestrator, &pool).await.unwrap();
    let shown = view(&orchestrator).await;
    assert_eq!(
        (shown.state, shown.liveness),
        (PoolViewState::Stopped, PoolLiveness::Offline)
    );
    let answer = orchestrator
        .client
        .post::<_, Value>("/v2/pools/pool-a/heartbeat", &late);
    assert_eq!(answer.await.unwrap_err().status(), Some(404));
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Stopped);

    // The pool's models stay known, and a job for one of them waits.
    let job = orchestrator.job().await;
    let waiting = eventually("an explanation", async || {
        orchestrator.show(job).await.waiting
    })
    .await;
    assert_eq!(waiting.explanation.reason, WaitReason::PoolsAway);
    assert!(
        waiting.explanation.message.contains("was stopped"),
        "{waiting:?}"
    );
    worker.tokens(running, 2..4);
    worker.end(running, 4);
    let done = orchestrator.until(running, JobStatus::Completed).await;
    assert_eq!(
        (done.text.as_str(), done.attempts.len()),
        ("<0><1><2><3>", 1)
    );

    // An earlier instance can't stop its successor.
    let old = pool.instance.clone();
    pool.instance = "instance-2".into();
    pool.register(&orchestrator).await;
    assert_eq!(worker.request(2).await.job_id, job.to_string());
    let path = format!("/v2/pools/pool-a?instance_id={old}");
    let refused = orchestrator.client.delete::<()>(&path).await;
    assert_eq!(refused.unwrap_err().status(), Some(409));
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Online);
}

// [ORCHD-098] A stopped pool stays known across a restart, and gives its place to a new pool when places are short.
#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_pool_is_known_after_a_restart_and_takes_no_place_away() {
    let orchestrator = Orchestrator::start_with(|config| config.max_pools = 1).await;
    let mut pool = FakePool::start("pool-a").await;
    pool.models[0].model_ref = "its-own".parse().unwrap();
    pool.register(&orchestrator).await;
    goodbye(&orchestrator, &pool).await.unwrap();
    let orchestrator = orchestrator.restart().await;
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Stopped);
    assert_eq!(pool.asked.beats.load(Ordering::Relaxed), 0);
    // The pool may return, so the answer is not final.
    let own = orchestrator
        .submit(json!({"model": "its-own", "prompt": "hi"}))
        .await;
    assert_eq!(own.unwrap_err().status(), Some(503));
    let other = FakePool::start("pool-b").await;
    other.register(&orchestrator).await;
    let list: PoolList = orchestrator.client.get("/v2/pools").await.unwrap();
    let names: Vec<_> = list.pools.iter().map(|pool| pool.id.as_str()).collect();
    assert_eq!(names, ["pool-b"]);
}

// [ORCHD-099] P24: a draining pool is not shown as accepting work.
#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_drains_is_shown_so() {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let pool = FakePool::start("pool-a").await.has(&worker);
    pool.register(&orchestrator).await;
    for (remaining, state) in [
        (vec![worker.id.clone()], PoolViewState::Draining),
        (vec![], PoolViewState::Drained),
    ] {
        pool.beat_with(&orchestrator, |status| {
            status.draining = true;
            status.drain = Some(pool_core::api::pool::DrainStatus {
                since: jiff::Timestamp::UNIX_EPOCH,
                deadline: None,
                stop_workers: false,
                remaining: remaining.clone(),
            });
        })
        .await;
        assert_eq!(view(&orchestrator).await.state, state);
    }
    pool.beat(&orchestrator).await;
    assert_eq!(view(&orchestrator).await.state, PoolViewState::Online);
}

// [ORCHD-079] P24: a pool that has registered and not reported yet may have the model.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_of_a_pool_that_has_not_reported_yet_is_not_unknown() {
    let orchestrator = Orchestrator::start().await;
    let pool = FakePool::start("pool-a").await;
    pool.introduce(&orchestrator).await;
    let task = json!({"model": "its-own", "prompt": "hi"});
    let error = orchestrator.submit(task.clone()).await.unwrap_err();
    assert_eq!(error.status(), Some(503));
    assert!(error.api().unwrap().retry_after_ms.is_some());
    pool.beat(&orchestrator).await;
    assert_eq!(
        orchestrator.submit(task).await.unwrap_err().status(),
        Some(404)
    );
    orchestrator
        .submit(json!({"model": MODEL, "prompt": "hi"}))
        .await
        .unwrap();
}

// [ORCHD-101] P24: every name for a model on a pool means that model, and all names run on the same workers.
#[tokio::test(flavor = "multi_thread")]
async fn a_task_may_use_every_name_of_a_file() {
    let orchestrator = Orchestrator::start().await;
    let worker = FakeWorker::start("worker-cpu-0").await;
    let mut pool = FakePool::start("pool-a").await.has(&worker);
    let real = "file:/data/real/tiny.gguf";
    let hub = "hf:org/repo@v1::file=sub/tiny.gguf";
    pool.workers[0].model_ref = real.parse().unwrap();
    let mut file = pool.models[0].clone();
    file.model_ref = real.parse().unwrap();
    file.aliases = vec!["file:/data/link/tiny.gguf".parse().unwrap()];
    pool.models.push(file.clone());
    file.aliases.clear();
    for name in [hub, "hf:org/two::file=a.gguf", "hf:org/two::file=b.gguf"] {
        file.model_ref = name.parse().unwrap();
        pool.models.push(file.clone());
    }
    pool.register(&orchestrator).await;
    let submit = async |model: &str| {
        let task = json!({"model": model, "prompt": "hi", "max_tokens": 1});
        orchestrator.submit(task).await
    };
    for (count, name) in (1..).zip([real, "file:/data/link/tiny.gguf"]) {
        let job = submit(name).await.unwrap().job_id;
        assert_eq!(
            worker.request(count).await.job_id,
            job.to_string(),
            "{name}"
        );
        worker.started(job);
        worker.end(job, 0);
        orchestrator.until(job, JobStatus::Completed).await;
    }
    let job = submit("hf:org/repo").await.unwrap().job_id;
    assert_eq!(orchestrator.show(job).await.request.model.to_string(), hub);
    assert_eq!(submit("hf:org/two").await.unwrap_err().status(), Some(400));
    assert_eq!(
        submit("file:/data/other.gguf").await.unwrap_err().status(),
        Some(404)
    );
    let models: Value = orchestrator.client.get("/v2/models").await.unwrap();
    assert!(models.to_string().contains(real), "{models}");
}

// [ORCHD-079] P24: a model that a pool downloads is reported as pending, not as unknown.
#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_is_being_downloaded_is_not_unknown() {
    let orchestrator = Orchestrator::start().await;
    let pool = FakePool::start("pool-a").await;
    pool.register(&orchestrator).await;
    let hub = "hf:org/repo@v1::file=sub/tiny.gguf";
    let status = async |model: &str| {
        let task = json!({"model": model, "prompt": "hi"});
        let error = orchestrator.submit(task).await.unwrap_err();
        let again = error.api().unwrap().retry_after_ms;
        assert_eq!(again.is_some(), error.status() == Some(503));
        error.status()
    };
    assert_eq!(status(hub).await, Some(404));
    pool.beat_with(&orchestrator, |status| {
        status.downloads = vec![hub.parse().unwrap()];
    })
    .await;
    assert_eq!(
        [status(hub).await, status("hf:org/repo").await],
        [Some(503); 2]
    );
    assert_eq!(status("hf:org/other").await, Some(404));
}
